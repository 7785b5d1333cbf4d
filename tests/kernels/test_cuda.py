"""The CUDA kernels in emulation: schedules, barriers, shapes of launches.

What they compute is tested with all other backends; see emulated.py.
"""

from __future__ import annotations

import ctypes
import faulthandler
import itertools
import os
import re
import types
from collections.abc import Iterator
from pathlib import Path

import emulated
import guards
import pytest
import torch
from emulation.plan import H100, bounds, plan
from tails import TAIL, entropy_of, tail_of
from torch import Tensor

from opd_kernels import backends
from opd_kernels._arguments import Allowed, Background, Objective, Tail, Tails, Temperature
from opd_kernels.backends import cpu, cuda
from opd_kernels.divergences import jsd, reverse_kl

SOURCES = Path(__file__).resolve().parents[2] / "csrc" / "cuda"
BARRIER = re.compile(r"\b(__syncthreads|__syncwarp|cluster_(barrier|arrive|wait))\(\);")
BARRIERS = [
    f"{path.name}:{number}"
    for path in sorted(SOURCES.glob("*.cuh"))
    for number, line in enumerate(path.read_text().splitlines(), 1)
    if BARRIER.search(line)
]
BF16, FP16, FP32 = torch.bfloat16, torch.float16, torch.float32
SCHEDULES = (0, 1, 2, 3, 4)

pytestmark = pytest.mark.skipif(
    cuda.DEVICE != "cpu", reason="the kernels are not emulated in this run"
)
Outputs = list[Tensor]


def rows(
    count: int, vocab: int, dtype: torch.dtype = BF16, offset: int = 0, seed: int = 0
) -> Tensor:
    """Random logits, the first one ``offset`` after a multiple of 128 bytes, at odd strides."""
    generator = torch.Generator().manual_seed(seed)
    stride = vocab + 3
    storage = torch.full((count * stride + offset + 256,), torch.nan, dtype=dtype)
    start = -(storage.data_ptr() // dtype.itemsize) % (128 // dtype.itemsize) + offset
    view = storage.as_strided((count, vocab), (stride, 1), start)
    return view.copy_(torch.randn(count, vocab, generator=generator) * 3)


def bitmap(vocab: int, ids: list[int]) -> Tensor:
    bits = torch.zeros(-(-vocab // 64) * 64, dtype=torch.uint8)
    bits[ids] = 1
    return (bits.view(-1, 8) << torch.arange(8, dtype=torch.uint8)).sum(-1, dtype=torch.uint8)


def logits_call(
    backend: object, teacher: Tensor, k: int, banned: list[int] | None = None
) -> Outputs:
    student = rows(*teacher.shape, FP32, seed=1)
    vocab = teacher.shape[1]
    allowed = Allowed(vocab, None if banned is None else bitmap(vocab, banned))
    objective = Objective(teacher_temperature=Temperature(1.5))
    selected = backend.select(teacher, k, allowed)
    return [*selected, *backend.select_divergence(student, teacher, k, allowed, objective)]


def support_call(backend: object, k: int, ids: Tensor) -> Outputs:
    student, values = rows(len(ids), 5000, seed=2), rows(len(ids), k, FP32, seed=3)
    return list(backend.entry_divergence(student, values, ids, Allowed(5000), Objective()))


def family_call(backend: object, k: int, ids: Tensor, outside: str) -> Outputs:
    """Entries of a divergence with every part, and their gradient over its background."""
    student, values = rows(len(ids), 5000, seed=2), rows(len(ids), k, FP32, seed=3)
    sampled = outside == "sample"
    divergence = reverse_kl() if sampled else jsd(0.3)._replace(forward=1.0)
    objective, allowed = Objective(divergence=divergence, outside=outside), Allowed(4900)
    if outside == "renormalize":
        return list(backend.entry_divergence(student, values, ids, allowed, objective))
    sums = torch.full((len(ids),), 12.5).double()
    tails = Tails(sums - 1, sums, 5000)
    full = backend.full_divergence(student, values, ids, allowed, objective, tails)
    _, out_ids, entry_grad, factors, logsumexp = full
    background = Background(factors, logsumexp, 5000, student)
    upstream = torch.linspace(-1, 1, len(ids))
    return [*full, backend.scatter_background(entry_grad, out_ids, upstream, background)]


def tail_call(
    backend: object, logits: Tensor, k: int, ids: Tensor | None = None, limit: int | None = None
) -> Outputs:
    """A tail without its ids, or those that are selected; if k is 0 nothing is."""
    vocab = logits.shape[1]
    tail = Tail(vocab, Temperature(1.5), ids, True)
    if k == 0:
        return list(backend.tail_logsumexp(logits, None, tail))
    allowed = Allowed(vocab if limit is None else limit)
    return list(backend.select_with_tail(logits, k, allowed, tail))


def scatter_call(backend: object, out: Tensor, k: int) -> Outputs:
    ids = torch.stack([torch.randperm(out.shape[1])[:k] for _ in out]).int()
    grad, upstream = torch.randn(ids.shape), torch.randn(len(out))
    backend.scatter_(out, grad, ids, upstream)
    return [out.clone()]


def scenarios(backend: object) -> Iterator[Outputs]:
    """Calls that together need every barrier: few and many entries, splits, repeats, bans."""
    torch.manual_seed(0)
    repeated = torch.randint(0, 20, (2, 100))
    yield support_call(backend, 100, repeated)
    yield support_call(backend, 17, torch.randint(0, 5, (1, 17)))
    for outside, k in (("renormalize", 101), ("bucket", 100), ("sample", 17)):
        yield family_call(backend, k, torch.randint(0, 60, (2, k)) * 97, outside)
    yield scatter_call(backend, rows(1, 40_000, offset=5), 200)
    for count, k in ((60, 5), (2, 200)):  # many rows in a block, one row in several turns
        yield [*backend.gather(rows(count, 300), torch.randint(-9, 309, (count, k)), Allowed(300))]
    with emulated.gpu(1):
        yield logits_call(backend, rows(3, 3000, offset=3), 9)  # 128 threads
        yield logits_call(backend, rows(40, 3000), 1)
        yield logits_call(backend, rows(1, 3000, FP32), 300)
        ascending = torch.arange(6000.0).reshape(2, 3000)  # too many candidates
        yield logits_call(backend, rows(2, 3000, FP32).copy_(ascending), 9)
        yield logits_call(backend, rows(9, 3000).sign_(), 100)
        equal = (torch.arange(40_000) % 32 >= 16).float()  # in no group's first half
        yield logits_call(backend, rows(1, 40_000, FP32).copy_(equal), 9)
        banned = list(range(0, 5000, 2))
        teacher = rows(1, 70_000, offset=9)
        teacher[:, banned] += 50
        yield logits_call(backend, teacher, 200, banned)
        few, many = torch.randint(0, 3000, (2, 9)), torch.randint(0, 3000, (2, 300))
        for k, ids in ((0, few), (0, many), (9, None), (200, None), (9, many)):
            yield tail_call(backend, rows(2, 3000, offset=3), k, ids)
    with emulated.gpu(2):
        yield logits_call(backend, rows(1, 40_000, offset=1), 70)  # a cluster of two blocks
        yield logits_call(backend, rows(1, 40_000, FP32), 1)
        yield tail_call(backend, rows(1, 40_000, offset=1), 0, few[:1])
        yield tail_call(backend, rows(1, 40_000, FP32), 70)


def same(ours: Outputs, theirs: Outputs) -> bool:
    pairs = zip(ours, theirs, strict=True)
    return all(torch.equal(a.nan_to_num(7e7), b.nan_to_num(7e7)) for a, b in pairs)


@pytest.fixture(scope="module")
def expected() -> list[Outputs]:
    return list(scenarios(cuda.backend))


@pytest.mark.parametrize("number", SCHEDULES[1:])
def test_no_schedule_changes_a_bit(number: int, expected: list[Outputs]) -> None:
    with emulated.schedule(number):
        for ours, theirs in zip(scenarios(cuda.backend), expected, strict=True):
            assert same(ours, theirs)


def differs(number: int, without: str, expected: list[Outputs]) -> bool:
    """Whether a schedule without a barrier fails, in a process of its own: it may well crash."""
    child = os.fork()
    if child == 0:
        right = False
        try:
            faulthandler.disable()
            torch.set_num_threads(1)  # those of the parent are not here
            with emulated.schedule(number, without):
                pairs = zip(scenarios(cuda.backend), expected, strict=True)
                right = all(same(ours, theirs) for ours, theirs in pairs)
        finally:
            os._exit(int(not right))
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) != 0


def test_with_every_barrier_no_schedule_fails(expected: list[Outputs]) -> None:
    assert not differs(2, "no such file:1", expected)


@pytest.mark.parametrize("barrier", BARRIERS)
def test_without_any_one_barrier_some_schedule_fails(barrier: str, expected: list[Outputs]) -> None:
    assert any(differs(number, barrier, expected) for number in SCHEDULES)


def test_barriers_were_found() -> None:
    assert len(BARRIERS) >= 12


# Shapes of launches


WIDTHS = (1, 7, 65, 300, 5000, 33_333)
HALF_AND_WHOLE = (BF16, FP16, FP32)
DEVICES = ((1, False), (2, False), (8, True), (16, True))  # multiprocessors, clusters


@pytest.mark.parametrize("vocab", WIDTHS)
@pytest.mark.parametrize("dtype", HALF_AND_WHOLE)
def test_every_shape_of_a_launch_selects_the_same(dtype: torch.dtype, vocab: int) -> None:
    # Each k at each offset on one device; the next dtype and width have the next device.
    turn = WIDTHS.index(vocab) + HALF_AND_WHOLE.index(dtype)
    for at, k in enumerate((1, 2, 33, 64, 65, 256, 257, 1024)):
        if k > vocab:
            continue
        for more, offset in enumerate((0, 1, 63, 128 // dtype.itemsize - 1)):
            teacher = rows(2, vocab, dtype, offset).round_()  # ties
            expected = cpu.backend.select(teacher, k, Allowed(vocab))
            with emulated.gpu(*DEVICES[(turn + at + more) % len(DEVICES)]):
                assert same([*cuda.backend.select(teacher, k, Allowed(vocab))], [*expected])


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_rows_may_end_anywhere_in_a_tile(dtype: torch.dtype) -> None:
    tile = 512 // dtype.itemsize
    for offset, end, tiles in itertools.product((0, 1, tile // 8), (-2, -1, 0, 1, 2), (1, 2, 65)):
        vocab = tiles * tile + end - offset
        teacher = rows(1, vocab, dtype, offset)  # NaN lies around it
        for k, multiprocessors in itertools.product((1, 33), (1, 16)):
            with emulated.gpu(multiprocessors):
                ours = cuda.backend.select(teacher, k, Allowed(vocab))
            assert same([*ours], [*cpu.backend.select(teacher, k, Allowed(vocab))])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_a_banned_id_is_seen_wherever_it_lies(dtype: torch.dtype) -> None:
    # Five tiles of halves; words of the bitmap begin at any place of a tile.
    vocab = 1300
    for offset in (0, 1, 37, 128 // dtype.itemsize - 1):
        teacher = rows(1, vocab, dtype, offset)
        edges = {at + off for at in range(0, vocab, 64) for off in (-1, 0, 1)}
        edges |= {edge - offset for edge in edges} | {vocab - 1}
        for banned in sorted(id for id in edges if 0 <= id < vocab):
            teacher[0, banned] = 100
            with emulated.gpu(8):
                ids, _ = cuda.backend.select(teacher, 1, Allowed(vocab, bitmap(vocab, [banned])))
            teacher[0, banned] = -100
            assert ids.item() == teacher.float().argmax(), (offset, banned)


@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_narrow_gradient_leaves_what_lies_around_alone(dtype: torch.dtype) -> None:
    for vocab, offset in itertools.product(range(1, 20), range(16 // dtype.itemsize)):
        outcomes = [rows(2, vocab, dtype, offset) for _ in range(2)]
        ids, grad = torch.tensor([[0], [vocab - 1]]).int(), torch.ones(2, 1)
        for backend, out in zip((cuda.backend, cpu.backend), outcomes, strict=True):
            backend.scatter_(out, grad, ids, torch.ones(2))
        with_gaps = [
            out.as_strided((2, vocab + 3), out.stride(), out.storage_offset()) for out in outcomes
        ]
        assert same(*([gaps] for gaps in with_gaps))


def test_all_outputs_of_masked_rows_are_written() -> None:
    teacher, mask = rows(4, 300), torch.tensor([True, False, True, False])
    ids = torch.arange(9).expand(4, 9)
    allowed, backend = Allowed(300, mask=mask), cuda.backend
    with guards.around_allocations(backend, "_empty"):  # which fill what they hand out
        for loss, out_ids, grad in (
            backend.select_divergence(teacher, teacher, 9, allowed, Objective()),
            backend.entry_divergence(teacher, rows(4, 9, FP32), ids, allowed, Objective()),
        ):
            assert (loss[~mask] == 0).all()
            assert (out_ids[~mask] == -1).all()
            assert (grad[~mask] == 0).all()
        for (out_ids, values), absent in (
            (backend.select(teacher, 9, allowed), -torch.inf),
            (backend.gather(teacher, ids, allowed)[::-1], 0),
        ):
            assert (out_ids[~mask] == -1).all()
            assert (values[~mask] == absent).all()


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_gradients_may_end_anywhere_in_a_piece(dtype: torch.dtype) -> None:
    piece = 65536 // dtype.itemsize
    for vocab in (piece - 8, piece - 1, piece, piece + 1, 2 * piece - 3, 2 * piece):
        for offset in range(16 // dtype.itemsize):
            ids = torch.tensor([[0, vocab - 1, vocab - 2, 9], [1, vocab - 3, -1, vocab - 8]])
            entries = ids.int(), torch.randn(2, 4), torch.ones(2)
            outcomes = [rows(2, vocab, dtype, offset) for _ in range(2)]
            for backend, out in zip((cuda.backend, cpu.backend), outcomes, strict=True):
                backend.scatter_(out, entries[1], entries[0], entries[2])
            assert torch.equal(*outcomes)
            around = [out.as_strided((vocab + 3,), (1,), out.storage_offset()) for out in outcomes]
            assert around[0][vocab:].isnan().all()


def test_a_row_is_spread_over_as_many_blocks_as_any_gpu_takes() -> None:
    teacher = rows(1, 66_000, FP32)
    with emulated.gpu(32):
        assert same(
            [*cuda.backend.select(teacher, 9, Allowed(66_000))],
            [*cpu.backend.select(teacher, 9, Allowed(66_000))],
        )


@pytest.mark.parametrize("count", [1, 8, 16, 17, 33, 42, 43, 64, 66, 67, 132])
def test_clusters_of_few_rows_are_all_resident_at_once(count: int) -> None:
    # By hand: the largest cluster of which an H100 holds as many as there are rows.
    largest = {1: 8, 8: 8, 16: 8, 17: 6, 33: 3, 42: 3, 43: 2, 64: 2, 66: 2, 67: 1, 132: 1}[count]
    cut = plan(count, 151_936, 64, 2, H100)
    assert cut.cluster == largest
    assert cut.cluster == 1 or count <= H100.clusters[cut.cluster - 2]
    assert cut.threads == 1024


@pytest.mark.parametrize("vocab", [5, 300, 1023, 7500, 33_333])
def test_clusters_of_any_size_share_a_row_s_tiles(vocab: int) -> None:
    teacher, k = rows(33, vocab, offset=1), min(9, vocab)
    expected = cpu.backend.select(teacher, k, Allowed(vocab))
    for size in range(2, 9):
        of_this_size = tuple(33 if other == size else 0 for other in range(2, 9))
        with emulated.gpu(264, of_this_size):
            assert same([*cuda.backend.select(teacher, k, Allowed(vocab))], [*expected])


@pytest.mark.parametrize("threads", [128, 256, 1024])
@pytest.mark.parametrize("k", [1, 64, 128, 129, 700, 1024])
def test_the_search_for_the_kth_key_begins_near_it(threads: int, k: int) -> None:
    generator = torch.Generator().manual_seed(k)
    for count in (8, 1000, 9496):
        keys = torch.randint(-30_000, 30_000, (count,), generator=generator)
        low, high = bounds(keys.tolist(), threads, k)
        assert high == keys.max()
        # Sets of keys of which each reaches the lower bound: one for a thread, or up to eight.
        holders = min(threads, count // 8)
        if k > 8 * holders:
            assert low == -(2**15) + 1
            continue
        kth = keys.sort(descending=True).values[k - 1]
        assert keys.min() <= low <= kth
        # In the middle of all by a wide margin: a set has nine keys, and there are 2048 at most.
        if count > 9000 and threads < 1024:
            assert low > -20_000


def test_clusters_are_asked_for_once_where_code_and_device_have_them(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked = []

    def max_clusters(index: int, size: int) -> int:
        asked.append((index, size))
        return 132 // size

    def properties(architectures: str, major: int) -> tuple[int, int, tuple[int, ...]]:
        device = types.SimpleNamespace(major=major, minor=0, multi_processor_count=132)
        module = types.SimpleNamespace(
            architectures=architectures,
            max_cluster=8,
            max_clusters=max_clusters,
            shared_bytes=lambda index: 228 * 1024,
        )
        monkeypatch.setattr(cuda.backend, "module", module)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda index: device)
        cuda._properties.cache_clear()
        assert cuda._properties(1) is cuda._properties(1)
        return cuda._properties(1)

    none = (132, 228 * 1024, (0,) * 7)
    assert properties("80 90", 8) == none
    assert properties("80+PTX", 9) == none  # code for 8.0 knows no clusters
    assert asked == []
    assert properties("80 90a", 9) == (132, 228 * 1024, (66, 44, 33, 26, 22, 18, 16))
    assert asked == [(1, size) for size in range(2, 9)]
    cuda._properties.cache_clear()


def test_a_temperature_that_is_nan_makes_all_of_its_row_nan() -> None:
    student = torch.tensor([[0.0, -1.0, -200.0, -torch.inf]])
    teacher = -torch.arange(4.0)[None]
    objective = Objective(teacher_temperature=Temperature(rows=torch.tensor([torch.nan])))
    loss, _, grad = cuda.backend.select_divergence(student, teacher, 4, Allowed(4), objective)
    assert loss.isnan().all()
    assert grad.isnan().all()


@pytest.mark.parametrize("k", [1, 64, 200])
def test_a_row_has_the_same_bits_in_every_batch_and_on_every_gpu(k: int) -> None:
    teacher = rows(9, 20_000)
    with emulated.gpu(1):
        expected = logits_call(cuda.backend, teacher, k)
    for multiprocessors, count in ((1, 1), (2, 3), (16, 1), (16, 3), (64, 9)):
        with emulated.gpu(multiprocessors):
            outcome = logits_call(cuda.backend, teacher[:count], k)
        assert same(outcome, [of_all[:count] for of_all in expected])


@pytest.mark.parametrize("dtype", [BF16, FP32])
@pytest.mark.parametrize("k", [1, 64, 1024])
def test_wide_rows_are_taken_up_to_a_limit(dtype: torch.dtype, k: int) -> None:
    widest = cuda._max_width(k, dtype)
    assert widest >= 300_000
    cpu_device = torch.device("cpu")
    assert cuda.backend.refusal(cpu_device, (dtype,), k, widest) is None
    assert f"above {widest}" in str(cuda.backend.refusal(cpu_device, (dtype,), k, widest + 1))
    teacher = torch.zeros(1, widest + 1, dtype=dtype)
    teacher[0, [5, widest - 1, widest]] = 1
    ids, values = cuda.backend.select(teacher, k, Allowed(widest))
    assert ids[0, : min(k, 4)].tolist() == [5, widest - 1, 0, 1][:k]
    assert values[0, : min(k, 4)].tolist() == [1, 1, 0, 0][:k]
    with pytest.raises(ValueError, match="do not fit"):
        cuda.backend.select(teacher, k, Allowed(widest + 1))


@pytest.mark.skipif(torch.cuda.is_available(), reason="is about machines without a GPU")
def test_without_a_gpu_the_compiled_module_is_there_and_a_launch_raises() -> None:
    module = pytest.importorskip("opd_kernels._cuda", reason="there was no nvcc")
    assert module is not cuda.backend.module  # the emulated one
    assert module.driver_version() >= 0
    assert module.runtime_version >= 12000
    rows = module.Rows(0, "float32", (1, 8), (8, 1))
    device = module.Device(0, 132, 228 * 1024, (66, 42, 32, 24, 18, 16, 16), 0)
    with pytest.raises(RuntimeError, match=r"CUDA cannot .*: cudaError"):
        module.select(device, rows, module.Allowed(8, 0, 0), 2, 0, 0)


@pytest.mark.parametrize(
    ("architectures", "capability", "driver", "vocab", "reason"),
    [
        ("80 90", (9, 0), 13000, 151936, None),
        ("80 90", (8, 6), 13020, 151936, None),
        ("80", (9, 0), 13000, 151936, "OPD_KERNELS_CUDA_ARCHS=90"),
        ("80 90", (9, 0), 12080, 151936, "update the driver"),
        ("80 90+PTX", (10, 0), 13000, 151936, "update the driver"),
        ("80 90+PTX", (10, 0), 13010, 151936, None),
        ("90", (9, 0), 13010, 10**7, "above 1000000"),
    ],
)
def test_gpu_tensors_take_these_kernels_where_they_run_and_triton_s_elsewhere(
    architectures: str,
    capability: tuple[int, int],
    driver: int,
    vocab: int,
    reason: str | None,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    pytest.importorskip("triton")
    module = types.SimpleNamespace(
        max_k=1024,
        architectures=architectures,
        runtime_version=13010,
        driver_version=lambda: driver,
        max_width=lambda k, dtype: 10**6,
    )
    emulated.device_refusal.cache_clear()
    cuda._max_width.cache_clear()
    monkeypatch.setattr(cuda.backend, "module", module)
    monkeypatch.setattr(cuda, "DEVICE", "cuda")
    monkeypatch.setattr(cuda, "_device_refusal", emulated.device_refusal)
    monkeypatch.setattr(torch.version, "cuda", "13.0")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    call = torch.device("cuda", 0), (BF16, BF16), 64, vocab
    chosen = backends.resolve(backends.AUTO, *call)
    assert chosen is backends.load("cuda" if reason is None else "triton")
    if reason is not None:
        with pytest.raises(ValueError, match=reason):
            backends.resolve("cuda", *call)
    cuda._max_width.cache_clear()


@pytest.mark.parametrize(
    ("architectures", "served", "refused"),
    [
        ("80", [(8, 0), (8, 6), (8, 9)], [(7, 5), (9, 0)]),
        ("86", [(8, 6), (8, 9)], [(8, 0), (9, 0)]),
        ("90a", [(9, 0)], [(8, 0), (10, 0)]),
        ("80+PTX", [(8, 0), (9, 0)], [(7, 5)]),
        ("100f", [(10, 0), (10, 3)], [(9, 0), (12, 0)]),
        ("80 90+PTX", [(8, 0), (9, 0), (10, 0), (12, 0)], [(7, 5)]),
        ("80 90 90a 100 120+PTX", [(8, 9), (9, 0), (10, 3), (12, 0), (12, 1)], [(7, 0), (11, 0)]),
    ],
)
def test_what_a_build_runs_on(
    architectures: str, served: list[tuple[int, int]], refused: list[tuple[int, int]]
) -> None:
    assert all(cuda.serves(architectures, capability) for capability in served)
    assert not any(cuda.serves(architectures, capability) for capability in refused)


def test_code_for_less_than_a_device_can_do_does_not_count() -> None:
    assert not cuda.serves("80+PTX", (9, 0), (9, 0))
    assert not cuda.serves("80+PTX 90", (10, 0), (9, 0))
    assert cuda.serves("80+PTX 90", (9, 0), (9, 0))
    assert cuda.serves("80 90+PTX", (10, 0), (9, 0))


# Tails


def loads() -> int:
    """How often the emulated kernels have read 16 bytes of a row so far."""
    library = ctypes.CDLL(cuda.backend.module.__file__)
    return ctypes.c_int64.in_dll(library, "emulated_loads").value


@pytest.mark.parametrize("dtype", HALF_AND_WHOLE)
@pytest.mark.parametrize("k", [1, 64, 300])
def test_a_tail_costs_no_second_read_of_the_row(dtype: torch.dtype, k: int) -> None:
    """It reads what the selection alone reads, and again a group for each id that is left out."""
    vocab = 40_000
    logits, tail = rows(3, vocab, dtype, offset=5), Tail(vocab, with_entropy=True)
    chunks, group = 3 * vocab * dtype.itemsize / 16, 64 * dtype.itemsize / 16
    allowed = Allowed(vocab, mask=torch.tensor([True, True, False]))
    for multiprocessors in (1, 16):
        with emulated.gpu(multiprocessors):
            start = loads()
            ids, _ = cuda.backend.select(logits, k, allowed)
            alone = loads() - start
            cuda.backend.select_with_tail(logits, k, allowed, tail)
            with_tail = loads() - start - alone
            cuda.backend.tail_logsumexp(logits, allowed.mask, tail._replace(ids=ids))
            given = loads() - start - alone - with_tail
        # In each block of a cluster the last turn may load tiles twice, fewer than eight.
        spare = 2 * 8 * 8 * 32
        assert 2 / 3 * chunks - spare <= alone
        assert with_tail <= alone + 2 * k * group + spare
        assert given <= 2 / 3 * chunks + 2 * k * group + spare


def assert_tail(found: list[Tensor], logits: Tensor, ids: Tensor, temperature: float) -> None:
    """A log-sum-exp and an entropy against float64."""
    torch.testing.assert_close(found[0], tail_of(logits, ids, temperature), rtol=0, atol=TAIL)
    expected, error = entropy_of(logits, ids, temperature)
    assert ((found[1] - expected).abs() <= error).all(), (found[1], expected, error)


@pytest.mark.parametrize("vocab", WIDTHS[:-1])
@pytest.mark.parametrize("dtype", HALF_AND_WHOLE)
def test_every_shape_of_a_launch_has_the_same_tail(dtype: torch.dtype, vocab: int) -> None:
    turn = WIDTHS.index(vocab) + HALF_AND_WHOLE.index(dtype)
    for at, k in enumerate((1, 65, 300)):
        if k > vocab:
            continue
        for more, offset in enumerate((0, 1, 128 // dtype.itemsize - 1)):
            logits, limit = rows(2, vocab, dtype, offset), max(vocab - more * 250, 1)
            tail = Tail(vocab, Temperature(0.7), None, True)
            with emulated.gpu(*DEVICES[(turn + at + more) % len(DEVICES)]):
                ids, values, *sums = cuda.backend.select_with_tail(logits, k, Allowed(limit), tail)
                given = cuda.backend.tail_logsumexp(logits, None, tail._replace(ids=ids))
            assert same([ids, values], [*cpu.backend.select(logits, k, Allowed(limit))])
            assert same([*given], sums)
            with emulated.gpu(*DEVICES[(turn + at + more + 1) % len(DEVICES)]):
                assert same(tail_call(cuda.backend, logits, k, None, limit)[:2], [ids, values])
                again = cuda.backend.select_with_tail(logits, k, Allowed(limit), tail)
            assert same([*again[2:]], sums)
            assert_tail(sums, logits, ids, 0.7)


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_rows_of_any_width_have_tails(dtype: torch.dtype) -> None:
    """Groups of more than 64 elements, two reads for many ids of float32, rows in segments."""
    tile, segment = 512 // dtype.itemsize, 4096
    for tiles, k in ((1000, 2), (2049, 1024), (segment + 1, 2)):
        vocab = tiles * tile - 9
        logits, allowed = rows(1, vocab, dtype, offset=1), Allowed(vocab)
        logits[0, [7, -7]] = 19  # of two segments
        tail = Tail(vocab, Temperature(0.7), None, True)
        found = cuda.backend.select_with_tail(logits, k, allowed, tail)
        assert same([*found[:2]], [*cpu.backend.select(logits, k, allowed)])
        for ids in (found[0], found[0][:, :1]):
            given = cuda.backend.tail_logsumexp(logits, None, tail._replace(ids=ids))
            assert_tail([*given], logits, ids, 0.7)
        given = cuda.backend.tail_logsumexp(logits, None, tail._replace(ids=found[0]))
        assert same([*given], [*found[2:]])


@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_nan_of_an_earlier_segment_stays(dtype: torch.dtype) -> None:
    """The last segment holds nothing but -inf, or, as rows begin where they do, no tile."""
    segment = 4096 * (512 // dtype.itemsize)
    for width in (segment + 70, segment - 5):
        logits = rows(1, width, dtype)
        logits[0, segment:] = -torch.inf
        tail = Tail(width, Temperature(), torch.tensor([[3]]), True)
        given = cuda.backend.tail_logsumexp(logits, None, tail)
        assert_tail([*given], logits, torch.tensor([[3]]), 1.0)
        logits[0, 7] = torch.nan
        for sums in cuda.backend.tail_logsumexp(logits, None, tail):
            assert sums is not None
            assert sums.isnan().all()

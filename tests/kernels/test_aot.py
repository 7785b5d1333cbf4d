"""The Triton kernels compiled for GPUs that are not here: registers, spills, widths of loads.

A slice of the configurations runs by default; ``OPD_KERNELS_AOT=90`` (``make test-aot``) runs all
that the table in ``configs`` gives for real vocabularies, for the architectures that it names.
"""

from __future__ import annotations

import itertools
import math
import os
from collections.abc import Callable

import pytest
import torch
from aot import Kernel, compile_call, compile_for_amd, compile_to_text, unordered_accesses
from triton.runtime.jit import JITFunction

from opd_kernels._arguments import Allowed, Background, Objective, Tail, Tails, Temperature
from opd_kernels.backends import triton as backend
from opd_kernels.backends.triton import configs
from opd_kernels.divergences import OUTSIDE, jsd, reverse_kl

ARCHITECTURES = (80, 90, 100, 120)
ALL = [int(name) for name in os.environ.get("OPD_KERNELS_AOT", "").split(",") if name]
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
VOCABULARIES = (32768, 128256, 151936, 151669, 262144)
TIERS = (16, 32, 64, 128, 256, 512, 1024)
EVERY = tuple(itertools.product(ALL, DTYPES, TIERS, VOCABULARIES, (False, True)))
# Each architecture, dtype, tier and vocabulary at least once, and the headline on all of them.
SLICE = (
    *((architecture, "bf16", 64, 151936, False) for architecture in ARCHITECTURES),
    (90, "bf16", 128, 151669, True),
    (90, "fp16", 32, 128256, False),
    (80, "fp32", 1024, 32768, False),
    (100, "fp16", 256, 262144, True),
    (120, "bf16", 512, 151669, False),
    (90, "bf16", 1024, 151936, False),
    (120, "bf16", 16, 262144, True),
)
# Of tails: (architecture, dtype, k, whether the entropy is wanted, whether ids are selected).
TAIL_SLICE = (
    *((architecture, "bf16", 64, False, False) for architecture in ARCHITECTURES),
    (90, "bf16", 64, False, True),
    (90, "fp32", 256, True, False),
)
TAILS = tuple(itertools.product(ALL, DTYPES, TIERS, (False, True), (False, True)))
# Of any member on given entries: (architecture, k, what becomes of the rest). And of backgrounds:
# (architecture, dtype).
ENTRIES_SLICE = (
    *((architecture, 64, "bucket") for architecture in ARCHITECTURES),
    (90, 1024, "bucket"),
    (90, 64, "sample"),
    (90, 64, "renormalize"),
)
ENTRIES = tuple(itertools.product(ALL, TIERS, OUTSIDE))
BACKGROUND_SLICE = (
    *((architecture, "bf16") for architecture in ARCHITECTURES),
    (90, "fp32"),
    (90, "fp16"),
)
BACKGROUND = tuple(itertools.product(ALL, DTYPES))
# Of the operators on hidden states and a head: (architecture, dtype, H, k).
LINEAR_SLICE = (
    *((architecture, "bf16", 4096, 64) for architecture in ARCHITECTURES),
    (90, "fp32", 576, 64),
    (90, "fp16", 2880, 5),
)
LINEAR = tuple(itertools.product(ALL, DTYPES, (576, 2880, 4096, 7168), (5, 32, 64)))
SORTED = ["entry_keys_kernel", "sorted_dot_kernel", "add_slices_kernel"]
GATHERING = ["gather_dot_kernel", "hidden_grad_kernel", "chunk_sums_kernel", "weight_grad_kernel"]
WALKING = ("select_tail_kernel", "tail_kernel")  # a program takes one row after another
ROWS = 8192
# Bytes in flight that cover the latency of HBM at full bandwidth, for each multiprocessor.
BYTES_IN_FLIGHT = 32 * 1024


def meta(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


@pytest.fixture(autouse=True)
def multiprocessors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of an H100."""
    monkeypatch.setattr(backend.common, "multiprocessors", lambda device: 132)


def check_resources(kernel: Kernel) -> None:
    what = f"{kernel.name}: {kernel.registers} registers, {kernel.shared} bytes shared"
    assert kernel.local == 0, what
    assert kernel.stack == 0, what
    assert not kernel.opcodes("LDL", "STL"), what
    assert kernel.shared <= 99 * 1024, what  # what a block of every architecture can have


def streaming_loop(kernel: Kernel) -> list[str]:
    """Opcodes of the loop over a row; around it there is a loop over rows where programs walk."""
    loops = (loop for loop in kernel.loops() if any(op.startswith("LDGSTS") for op in loop))
    loop, *outer = sorted(loops, key=len)
    assert len(outer) == (kernel.name in WALKING), kernel.name
    return loop


def check_streaming(kernel: Kernel, itemsize: int) -> None:
    """The loop over the row loads 16 bytes at a time and nothing else, with enough in flight."""
    loop = streaming_loop(kernel)
    loads = [op for op in loop if op.startswith(("LDG.", "LDGSTS"))]
    assert loads
    assert all(op.endswith(".128") for op in loads), loads
    in_flight = (configs.STAGES - 1) * configs.tile(itemsize, kernel.warps) * itemsize
    assert kernel.resident_programs() * in_flight >= BYTES_IN_FLIGHT, (
        f"{kernel.name}: {kernel.resident_programs()} programs of {kernel.registers} registers"
    )


@pytest.mark.parametrize(
    ("architecture", "dtype", "k", "vocab", "banned"),
    EVERY or SLICE,
    ids=lambda value: "headline" if value == 151936 else None,
)
def test_fused_kernel_has_no_spills_and_streams_by_16_bytes(
    architecture: int, dtype: str, k: int, vocab: int, banned: bool
) -> None:
    logits = meta(ROWS, vocab, dtype=DTYPES[dtype])
    bitmap = meta(-(-vocab // 64) * 8, dtype=torch.uint8) if banned else None
    (kernel,) = compile_call(
        lambda: backend.select_divergence(logits, logits, k, Allowed(vocab, bitmap), Objective()),
        architecture,
    )
    assert kernel.name == "logits_divergence_kernel"
    check_resources(kernel)
    check_streaming(kernel, logits.element_size())


@pytest.mark.parametrize(("architecture", "dtype", "k", "entropy", "selected"), TAILS or TAIL_SLICE)
def test_tails_take_one_power_an_element_in_the_streaming_loop(
    architecture: int, dtype: str, k: int, entropy: bool, selected: bool
) -> None:
    vocab = 151936
    logits = meta(ROWS, vocab, dtype=DTYPES[dtype])
    tail = Tail(vocab, Temperature(), meta(ROWS, k, dtype=torch.int32), entropy)
    if selected:
        tail = tail._replace(ids=None)
        (kernel,) = compile_call(
            lambda: backend.select_with_tail(logits, k, Allowed(vocab), tail), architecture
        )
        assert kernel.name == "select_tail_kernel"
    else:
        (kernel,) = compile_call(lambda: backend.tail_logsumexp(logits, None, tail), architecture)
        assert kernel.name == "tail_kernel"
        # Maxima of groups are loaded four at a time.
        assert not any("LDG.E.U16" in loop for loop in kernel.loops())
    check_tail(kernel, DTYPES[dtype].itemsize, entropy)


def check_tail(kernel: Kernel, itemsize: int, entropy: bool) -> None:
    """As other streaming kernels, at a few instructions for each 2 bytes of a row."""
    check_resources(kernel)
    check_streaming(kernel, itemsize)
    loop = streaming_loop(kernel)
    tile = configs.tile(itemsize, kernel.warps)
    assert loop.count("MUFU.EX2") == tile // (32 * kernel.warps)
    assert len(loop) <= (18 if entropy else 13) * tile * itemsize // (64 * kernel.warps)


@pytest.mark.parametrize("selected", [False, True])
def test_tails_take_memory_for_programs_and_not_for_rows(
    monkeypatch: pytest.MonkeyPatch, selected: bool
) -> None:
    """At most 16 N K + 64 N at the headline; ids, values and tails are 8 N K + 8 N of it."""
    asked: list[int] = []
    empty = backend.common.empty

    def counted(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        asked.append(math.prod(shape) * dtype.itemsize)
        return empty(shape, dtype, device)

    monkeypatch.setattr(backend.common, "empty", counted)
    monkeypatch.setattr(JITFunction, "run", lambda *args, **options: None)
    vocab, k, beyond = 151936, 64, []
    for rows in (ROWS, 16 * ROWS):
        logits, ids = meta(rows, vocab, dtype=torch.bfloat16), meta(rows, k, dtype=torch.int32)
        asked.clear()
        tail = Tail(vocab, Temperature(), None if selected else ids)
        if selected:
            backend.select_with_tail(logits, k, Allowed(vocab), tail)
        else:
            backend.tail_logsumexp(logits, None, tail)
        results = 8 * rows + 8 * rows * k * selected
        beyond.append(sum(asked) - results)
        assert 8 * rows * k + 8 * rows + beyond[-1] <= 16 * rows * k + 64 * rows
    assert max(beyond) <= 2 * 132 * (6 * configs.keys_stride(vocab, 64) + 12 * k)


@pytest.mark.parametrize("dtype", DTYPES if ALL else ("bf16",))
@pytest.mark.parametrize("architecture", ALL or (90,))
def test_tails_of_few_rows_and_of_given_ids(architecture: int, dtype: str) -> None:
    rows, vocab, k = 64, 151669, 64
    logits, mask = meta(rows, vocab, dtype=DTYPES[dtype]), meta(rows, dtype=torch.bool)
    bitmap = meta(-(-vocab // 64) * 8, dtype=torch.uint8)
    listed = meta(rows, 40, dtype=torch.int64)
    tail = Tail(vocab, Temperature(rows=meta(rows)), listed, True)
    streaming, selecting = compile_call(
        lambda: backend.select_with_tail(logits, k, Allowed(vocab, bitmap, mask), tail),
        architecture,
    )
    assert [streaming.name, selecting.name] == ["group_sums_kernel", "select_tail_kernel"]
    check_tail(streaming, DTYPES[dtype].itemsize, entropy=True)
    check_resources(selecting)


@pytest.mark.parametrize("k", TIERS if ALL else (64,))
@pytest.mark.parametrize("dtype", DTYPES if ALL else ("bf16",))
@pytest.mark.parametrize("architecture", ALL or (90,))
def test_selection_masks_temperatures_and_few_rows(architecture: int, dtype: str, k: int) -> None:
    rows, vocab = 64, 151669
    logits = meta(rows, vocab, dtype=DTYPES[dtype])
    allowed = Allowed(vocab, mask=meta(rows, dtype=torch.bool))
    temperature = Temperature(rows=meta(rows))
    kernels = compile_call(lambda: backend.select(logits, k, allowed), architecture)
    assert [kernel.name for kernel in kernels] == ["group_maxima_kernel", "select_kernel"]
    check_streaming(kernels[0], logits.element_size())
    kernels += compile_call(
        lambda: backend.select_divergence(
            logits, logits, k, allowed, Objective(temperature, temperature)
        ),
        architecture,
    )
    for kernel in kernels:
        check_resources(kernel)


@pytest.mark.parametrize("k", TIERS if ALL else (64, 1024))
@pytest.mark.parametrize("dtype", DTYPES if ALL else ("bf16",))
@pytest.mark.parametrize("architecture", ALL or (90,))
def test_gathering_loads_eight_values_of_a_thread_before_it_stores_one(
    architecture: int, dtype: str, k: int
) -> None:
    vocab = 151669
    student, mask = meta(ROWS, vocab, dtype=DTYPES[dtype]), meta(ROWS, dtype=torch.bool)
    bitmap = meta(-(-vocab // 64) * 8, dtype=torch.uint8)
    for ids in (meta(ROWS, k, dtype=torch.int32), meta(ROWS, k, dtype=torch.int64)):
        for allowed in (Allowed(vocab), Allowed(vocab, bitmap, mask)):
            (kernel,) = compile_call(
                lambda ids=ids, allowed=allowed: backend.gather(student, ids, allowed),
                architecture,
            )
            check_resources(kernel)
            assert not kernel.opcodes("BAR", "LDS", "STS"), kernel.name
            value = "LDG.E" if student.element_size() == 4 else "LDG.E.U16"
            accesses = kernel.opcodes("LDG", "STG")
            first = accesses.index("STG.E")
            assert accesses[first - 8 : first] == [value] * 8, accesses
            in_flight = 8 * 32 * kernel.warps * 32  # sectors of 32 bytes
            assert kernel.resident_programs() * in_flight >= BYTES_IN_FLIGHT


@pytest.mark.parametrize("k", TIERS)
def test_as_many_threads_hold_entries_with_and_without_selection(k: int) -> None:
    threads = min(k, 32 * configs.entry_warps(k))
    for width, itemsize in itertools.product((k, 1000, *VOCABULARIES, 400001, 1 << 20), (2, 4)):
        for aligned in (False, True):
            config = configs.selection(k, width, itemsize, aligned)
            assert min(config.k_pad, 32 * config.warps) == threads, (width, config)


@pytest.mark.parametrize("k", TIERS if ALL else (64, 256))
def test_entries_are_added_in_one_order_with_and_without_selection(k: int) -> None:
    """Entries go to threads one by one, and the threads that hold some are as many everywhere."""
    vocab = 151669
    logits = meta(ROWS, vocab, dtype=torch.bfloat16)
    bitmap = meta(-(-vocab // 64) * 8, dtype=torch.uint8)
    values, ids = meta(ROWS, k), meta(ROWS, k, dtype=torch.int32)
    allowed, objective = Allowed(vocab, bitmap), Objective()
    for call in (
        lambda: backend.select_divergence(logits, logits, k, allowed, objective),
        lambda: backend.entry_divergence(logits, values, ids, allowed, objective),
        lambda: backend.entry_divergence(values, values, ids, Allowed(k), objective),
    ):
        (kernel,) = compile_call(call, 90)
        assert set(kernel.entry_sums()) == {(k, 1)}
        assert min(k, 32 * kernel.warps) == min(k, 512)


@pytest.mark.parametrize("k", TIERS if ALL else (64, 1024))
@pytest.mark.parametrize("dtype", DTYPES if ALL else ("bf16",))
@pytest.mark.parametrize("architecture", ALL or (90,))
def test_given_support_and_gradient(architecture: int, dtype: str, k: int) -> None:
    vocab = 151669
    student = meta(ROWS, vocab, dtype=DTYPES[dtype])
    values, upstream = meta(ROWS, k), meta(ROWS)
    for ids in (meta(ROWS, k, dtype=torch.int32), meta(ROWS, k, dtype=torch.int64)):
        (kernel,) = compile_call(
            lambda ids=ids: backend.entry_divergence(
                student, values, ids, Allowed(vocab), Objective()
            ),
            architecture,
        )
        check_resources(kernel)
    ids = meta(ROWS, k, dtype=torch.int32)
    (clear,) = compile_call(
        lambda: backend.scatter(values, ids, upstream, vocab, student.dtype), architecture
    )
    check_resources(clear)
    (loop,) = (loop for loop in clear.loops() if any(op.startswith("STG") for op in loop))
    stores = [op for op in loop if op.startswith("STG")]
    assert stores
    assert all(op.endswith(".128") for op in stores), stores
    (add,) = compile_call(
        lambda: backend.scatter_add_(student, values, ids, upstream), architecture
    )
    check_resources(add)


def full_call(k: int, outside: str) -> Callable[[], object]:
    """Every part of a member, a floor, rows with weights of their own, a mask and banned ids."""
    vocab = 151669
    student, ids = meta(ROWS, vocab, dtype=torch.bfloat16), meta(ROWS, k, dtype=torch.int64)
    tails = Tails(meta(ROWS, dtype=torch.float64), meta(ROWS, dtype=torch.float64), vocab)
    bitmap, mask = meta(-(-vocab // 64) * 8, dtype=torch.uint8), meta(ROWS, dtype=torch.bool)
    allowed = Allowed(vocab, bitmap, mask)
    divergence = reverse_kl()._replace(logp_floor=-9.0)
    objective = Objective(divergence=divergence, weights=meta(ROWS, 4), outside=outside)
    if outside == "renormalize":
        return lambda: backend.entry_divergence(student, meta(ROWS, k), ids, allowed, objective)
    return lambda: backend.full_divergence(student, meta(ROWS, k), ids, allowed, objective, tails)


@pytest.mark.parametrize(("architecture", "k", "outside"), ENTRIES or ENTRIES_SLICE)
def test_any_member_on_given_entries_has_no_spills(architecture: int, k: int, outside: str) -> None:
    (kernel,) = compile_call(full_call(k, outside), architecture)
    name = "member" if outside == "renormalize" else "full"
    assert kernel.name == f"{name}_divergence_kernel"
    check_resources(kernel)


def background_call(dtype: torch.dtype, k: int, alike: bool) -> Callable[[], object]:
    """Of contiguous logits, or of a slice with rows that start elsewhere than the gradient's."""
    vocab = 151669
    logits = meta(ROWS, vocab + (not alike), dtype=dtype)[:, :vocab]
    sums = meta(ROWS, dtype=torch.float64)
    background = Background(meta(ROWS), sums, vocab, logits, Temperature(rows=meta(ROWS)))
    values, ids, upstream = meta(ROWS, k), meta(ROWS, k, dtype=torch.int32), meta(ROWS)
    return lambda: backend.scatter_background(values, ids, upstream, background)


@pytest.mark.parametrize(("architecture", "dtype"), BACKGROUND or BACKGROUND_SLICE)
def test_backgrounds_are_read_and_written_by_16_bytes(architecture: int, dtype: str) -> None:
    (kernel,) = compile_call(background_call(DTYPES[dtype], 64, alike=True), architecture)
    assert kernel.name == "background_kernel"
    check_resources(kernel)
    check_streaming(kernel, DTYPES[dtype].itemsize)
    (loop,) = (loop for loop in kernel.loops() if any(op.startswith("STG") for op in loop))
    stores = [op for op in loop if op.startswith("STG")]
    assert all(op.endswith(".128") for op in stores), stores
    # Both streams at full bandwidth leave a lane about 40 instructions for an element of 16 bits.
    elements = configs.tile(DTYPES[dtype].itemsize) // (32 * kernel.warps)
    assert len(loop) <= 25 * elements, len(loop)


def test_a_gradient_that_is_misaligned_otherwise_is_still_written_by_16_bytes() -> None:
    (kernel,) = compile_call(background_call(torch.bfloat16, 1025, alike=False), 90)
    check_resources(kernel)
    (loop,) = (loop for loop in kernel.loops() if any(op.startswith("STG") for op in loop))
    stores = [op for op in loop if op.startswith("STG")]
    assert all(op.endswith(".128") for op in stores), stores


def linear_calls(
    dtype: torch.dtype, width: int, k: int, everything: bool = False
) -> tuple[Callable[[], object], ...]:
    """The operators on hidden states and a head, in the order of ``GATHERING``."""
    vocab = 151936
    hidden, weight = meta(ROWS, width, dtype=dtype), meta(vocab, width, dtype=dtype)
    ids, upstream = meta(ROWS, k, dtype=torch.int32), meta(ROWS, k)
    bias = meta(vocab, dtype=dtype) if everything else None
    bitmap = meta(-(-vocab // 64) * 8, dtype=torch.uint8) if everything else None
    mask = meta(ROWS, dtype=torch.bool) if everything else None
    return (
        lambda: backend.gather_dot(hidden, weight, bias, ids, Allowed(vocab, bitmap, mask)),
        lambda: backend.gather_dot_hidden(upstream, ids, weight, dtype),
        lambda: backend.gather_dot_weight(upstream, ids, hidden, vocab, dtype),
    )


def check_gathering(kernel: Kernel, k: int, width: int, itemsize: int) -> None:
    """The loop loads its whole tile of gathered rows by 16 bytes; enough is in flight."""
    least_rows, warps = configs.WEIGHT_GRAD_ROWS, configs.WEIGHT_GRAD_WARPS
    shapes = {
        "gather_dot_kernel": configs.dots(k, width, itemsize),
        "hidden_grad_kernel": configs.row_sums(width, itemsize, configs.HIDDEN_GRAD_ROWS),
    }
    weight_grad = configs.row_sums(width, itemsize, least_rows, warps)
    tile = math.prod(shapes.get(kernel.name, weight_grad)) * itemsize
    (loop,) = (loop for loop in kernel.loops() if any(op.startswith("FFMA") for op in loop))
    loads = [op for op in loop if op.startswith(("LDG.", "LDGSTS"))]
    wide = tile // (16 * 32 * kernel.warps)
    assert sum(op.endswith(".128") for op in loads) == wide, (kernel.name, loads)
    stages = configs.STAGES - 1 if any(op.startswith("LDGSTS") for op in loop) else 1
    assert kernel.resident_programs() * stages * tile >= BYTES_IN_FLIGHT, (
        f"{kernel.name}: {kernel.resident_programs()} programs of {kernel.registers} registers"
    )


@pytest.mark.parametrize(("architecture", "dtype", "width", "k"), LINEAR or LINEAR_SLICE)
def test_gathered_rows_are_loaded_by_16_bytes_and_nothing_is_added_in_memory(
    architecture: int, dtype: str, width: int, k: int
) -> None:
    kernels: list[Kernel] = []
    for call in linear_calls(DTYPES[dtype], width, k):
        kernels += compile_call(call, architecture)
    assert [kernel.name for kernel in kernels] == GATHERING
    for kernel in kernels:
        check_resources(kernel)
        check_gathering(kernel, k, width, DTYPES[dtype].itemsize)
        assert not kernel.opcodes("RED.", "REDG", "ATOM"), kernel.name
    stores = kernels[-1].opcodes("STG")
    assert stores
    assert all(op.endswith(".128") for op in stores), stores


@pytest.mark.parametrize(("architecture", "dtype", "width", "k"), LINEAR or LINEAR_SLICE)
def test_sorted_entries_are_multiplied_without_spills_or_barriers(
    monkeypatch: pytest.MonkeyPatch, architecture: int, dtype: str, width: int, k: int
) -> None:
    monkeypatch.setattr(configs, "SORTED_DOTS", True)
    itemsize = DTYPES[dtype].itemsize
    kernels = compile_call(linear_calls(DTYPES[dtype], width, k)[0], architecture)
    assert [kernel.name for kernel in kernels] == SORTED
    for kernel in kernels:
        check_resources(kernel)
        assert not kernel.opcodes("RED.", "REDG", "ATOM"), kernel.name
    products = kernels[1]
    assert products.warps == 1
    assert products.shared == 0
    assert not products.opcodes("BAR", "STS", "LDS")
    (loop,) = products.loops()
    tile = configs.sorted_dots(ROWS, width, itemsize)[1] * itemsize
    loads = [op for op in loop if op.startswith("LDG")]
    # A row of the weight and one of the hidden states; key, row and place beside them.
    assert sum(op.endswith(".128") for op in loads) == 2 * tile // (16 * 32), loads
    assert len(loads) == 2 * tile // (16 * 32) + 3, loads
    assert products.resident_programs() * tile >= BYTES_IN_FLIGHT


# Vector registers of a lane with which a CU holds 4 programs of 4 waves; no AMD GPU has run them.
AMD, AMD_REGISTERS = "gfx942", 128
# A CU holds one program of 8 waves that also selects; two would need 128 registers.
AMD_SELECTING = 168


@pytest.mark.parametrize("k", TIERS if ALL else (64,))
@pytest.mark.parametrize("dtype", DTYPES if ALL else ("bf16",))
def test_kernels_compile_for_an_amd_gpu_and_load_by_16_bytes(dtype: str, k: int) -> None:
    vocab, objective = 151936, Objective(divergence=jsd(), outside="bucket")
    logits = meta(ROWS, vocab, dtype=DTYPES[dtype])
    values, ids = meta(ROWS, k), meta(ROWS, k, dtype=torch.int32)
    sums = meta(ROWS, dtype=torch.float64)
    tail = Tail(vocab, Temperature(), ids, True)
    background = Background(meta(ROWS), sums, vocab, logits)
    calls = {
        "select_tail_kernel": lambda: backend.select_with_tail(logits, k, Allowed(vocab), tail),
        "tail_kernel": lambda: backend.tail_logsumexp(logits, None, tail),
        "background_kernel": lambda: backend.scatter_background(
            values, ids, meta(ROWS), background
        ),
        "full_divergence_kernel": lambda: backend.full_divergence(
            logits, values, ids, Allowed(vocab), objective, Tails(sums, sums, vocab)
        ),
    }
    for name, call in calls.items():
        (kernel,) = compile_for_amd(call, AMD)
        what = f"{name}: {kernel.registers} registers"
        assert kernel.name == name
        assert kernel.spilled == 0, what
        assert kernel.scratch == 0, what
        most = AMD_SELECTING if name == "select_tail_kernel" else AMD_REGISTERS
        assert kernel.registers <= most, what
        if name == "full_divergence_kernel":  # reads no row
            continue
        loads = ("global_load", "buffer_load")
        loops = [[op for op in loop if op.startswith(loads)] for loop in kernel.loops()]
        streaming = [loop for loop in loops if loop and all("dwordx4" in op for op in loop)]
        assert streaming, loops


# What a run on a GPU tries, one at a time; the order of sorted ids has tests of its own.
VARIANTS = (
    {"STAGES": 4},
    {"WEIGHT_GRAD_ROWS": 1},
    {"WEIGHT_GRAD_ROWS": 4},
    {"WEIGHT_GRAD_WARPS": 2},
)


@pytest.mark.parametrize("variant", VARIANTS, ids=str)
def test_variants_that_a_gpu_tries_have_no_spills_and_load_by_16_bytes(
    monkeypatch: pytest.MonkeyPatch, variant: dict[str, int]
) -> None:
    for name, value in variant.items():
        monkeypatch.setattr(configs, name, value)
    vocab, k, width, dtype = 151936, 64, 4096, torch.bfloat16
    logits = meta(ROWS, vocab, dtype=dtype)
    (fused,) = compile_call(
        lambda: backend.select_divergence(logits, logits, k, Allowed(vocab), Objective()), 90
    )
    check_resources(fused)
    check_streaming(fused, dtype.itemsize)
    for call in linear_calls(dtype, width, k):
        for kernel in compile_call(call, 90):
            check_resources(kernel)
            check_gathering(kernel, k, width, dtype.itemsize)


@pytest.mark.parametrize("banned", [False, True])
def test_barriers_stand_between_stores_and_loads_of_the_same_memory(
    monkeypatch: pytest.MonkeyPatch, banned: bool
) -> None:
    vocab, k = 151669, 64
    logits = meta(ROWS, vocab, dtype=torch.bfloat16)
    bitmap = meta(-(-vocab // 64) * 8, dtype=torch.uint8) if banned else None
    ids, values, upstream = meta(ROWS, k, dtype=torch.int32), meta(ROWS, k), meta(ROWS)
    allowed, objective = Allowed(vocab, bitmap), Objective()
    tail = Tail(vocab, Temperature(), None, banned)
    calls = (
        lambda: backend.select_divergence(logits, logits, k, allowed, objective),
        lambda: backend.entry_divergence(logits, values, ids, allowed, objective),
        lambda: backend.select(logits, k, allowed),
        lambda: backend.select_with_tail(logits, k, allowed, tail),
        lambda: backend.tail_logsumexp(logits, None, tail._replace(ids=ids)),
        lambda: backend.gather(logits, ids, allowed),
        lambda: backend.scatter(values, ids, upstream, vocab, torch.bfloat16),
        background_call(torch.bfloat16, k, alike=not banned),
        *(full_call(k, outside) for outside in ("bucket", "sample", "renormalize")),
        *linear_calls(torch.bfloat16, 4096, k, everything=banned),
    )
    kernels = [kernel for call in calls for kernel in compile_to_text(call, 90)]
    monkeypatch.setattr(configs, "SORTED_DOTS", True)
    kernels += compile_to_text(linear_calls(torch.bfloat16, 4096, k, everything=banned)[0], 90)
    for name, text in kernels:
        assert unordered_accesses(text) == [], name

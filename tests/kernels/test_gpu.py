"""GPU kernels on GPU tensors: real shapes, streams, graphs, memory, launches. Needs a GPU.

``make gpu`` runs this, and in its second part the differential suite, which reaches the GPU by
bridge.py. It names the backends that have to be tested in ``OPD_KERNELS_GPU_BACKENDS``. Tests named
``test_sanitized_...`` are small: compute-sanitizer runs them.
"""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator

import pytest
import torch
from on_gpu import (
    BF16,
    CUDA,
    FP16,
    FP32,
    KERNELS,
    NAN,
    assert_equal,
    logits,
    needs_kernels,
    needs_memory,
    padded,
    pair,
    peak_growth,
    within,
)
from torch import Tensor

from opd_kernels import EntryGradient, TopK, backends, select_topk, topk_rkl
from opd_kernels.testing import Expected, Inputs, oracle

# Rows that make each kernel split one over several blocks, on GPUs of 24 multiprocessors and more,
# and rows that make none do so, on GPUs of up to 550.
FEW, MANY = 3, 1100
# What a forward of few rows may launch, where it is more than one kernel.
FEW_ROWS_LAUNCHES = {"triton": 2}
N, V, K = 2048, 151936, 64


@pytest.fixture
def device() -> torch.device:
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    return CUDA


@pytest.fixture(params=KERNELS)
def kernels(request: pytest.FixtureRequest, device: torch.device) -> Iterator[str]:
    """The name of each backend that has kernels for the GPU."""
    yield request.param
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def loss_and_grad(student: Tensor, teacher: Tensor | TopK, **options: object) -> tuple[Tensor, ...]:
    loss = topk_rkl(student, teacher, **options)
    return loss.detach(), torch.autograd.grad(loss.sum(), student)[0]


def assert_rows_right(
    rows: Iterable[int], student: Tensor, teacher: Tensor, k: int, loss: Tensor, grad: Tensor
) -> None:
    """Losses and gradients of some rows against float64, within their budgets."""
    for at, expected in expectations(rows, student, teacher, k):
        within(loss[at], expected.loss, expected.loss_budget)
        within(grad[at], *expected.grads["student"])


def expectations(
    rows: Iterable[int], student: Tensor, teacher: Tensor, k: int
) -> Iterator[tuple[slice, Expected]]:
    """Some rows and what they should be in float64."""
    names = ("mask", "weight", "banned_ids", "vocab_size")
    options = {"reduction": "none", "temperature": 1.0, **dict.fromkeys(names)}
    for row in rows:
        at = slice(row, row + 1)
        inputs = Inputs(student.detach()[at].cpu(), teacher[at].cpu(), k, False, options)
        yield at, oracle(inputs)


def test_every_backend_of_this_gpu_is_tested(device: torch.device) -> None:
    names = os.environ.get("OPD_KERNELS_GPU_BACKENDS")
    if names is None:
        pytest.skip("tests what there is")
    assert names.split(",") == KERNELS


# Real shapes


@pytest.mark.parametrize(
    ("vocab", "k", "dtype"),
    [
        *((151936, k, BF16) for k in (32, 64, 128, 256, 512, 1024)),
        *((151936, k, dtype) for k in (32, 1024) for dtype in (FP16, FP32)),
        (151669, 64, BF16),
        (151669, 1000, FP16),
        (151669, 64, FP32),
        (262144, 64, BF16),
        (262144, 1024, FP32),
        (32768, 64, BF16),
    ],
    ids=str,
)
def test_real_shapes_are_right(kernels: str, vocab: int, k: int, dtype: torch.dtype) -> None:
    student, teacher = pair(MANY, vocab, dtype=dtype)
    results = loss_and_grad(student, teacher, k=k, reduction="none", backend=kernels)
    assert_rows_right((0, MANY // 2, MANY - 1), student, teacher, k, *results)


@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.parametrize(("vocab", "k", "dtype"), [(151936, 64, BF16), (151669, 1000, FP32)])
def test_few_rows_are_right(
    kernels: str, rows: int, vocab: int, k: int, dtype: torch.dtype
) -> None:
    student, teacher = pair(rows, vocab, dtype=dtype)
    results = loss_and_grad(student, teacher, k=k, reduction="none", backend=kernels)
    assert_rows_right(range(rows), student, teacher, k, *results)


@pytest.mark.parametrize("rows", [3, MANY])
@pytest.mark.parametrize(("k", "dtype"), [(64, BF16), (1024, FP16), (64, FP32)])
def test_selection_equals_a_stable_sort(
    kernels: str, rows: int, k: int, dtype: torch.dtype
) -> None:
    teacher = logits(rows, 151669, dtype=dtype).round_()  # ties at every place
    teacher[:, 77::1000] = -0.0
    teacher[0, [5, 150_000]] = NAN
    teacher[1, [4, 6, 140_000]] = torch.inf
    teacher[2, 10:] = -torch.inf
    topk = select_topk(teacher, k, backend=kernels)
    for row in (0, 1, 2, rows - 1):
        values, ids = teacher[row].float().cpu().sort(descending=True, stable=True)
        assert torch.equal(topk.ids[row].cpu().long(), ids[:k])
        assert torch.equal(topk.logits[row].cpu().nan_to_num(7e7), values[:k].nan_to_num(7e7))


def test_backends_agree(device: torch.device) -> None:
    needs_kernels("cuda", "triton")
    teacher = logits(MANY, 151669).round_()  # ties at every place
    supports = [select_topk(teacher, K, backend=name) for name in ("cuda", "triton")]
    assert_equal((supports[0].ids, supports[0].logits), (supports[1].ids, supports[1].logits))
    student = logits(MANY, 151669, seed=1).requires_grad_()
    (loss, grad), (other_loss, other_grad) = (
        loss_and_grad(student, teacher, k=K, reduction="none", backend=name)
        for name in ("cuda", "triton")
    )
    for at, expected in expectations((0, MANY // 2, MANY - 1), student, teacher, K):
        within(loss[at], other_loss[at].double().cpu().numpy(), 2 * expected.loss_budget)
        within(grad[at], other_grad[at].double().cpu().numpy(), 2 * expected.grads["student"][1])


@pytest.mark.parametrize(("k", "dtype"), [(64, BF16), (1024, FP32)])
def test_a_row_does_not_depend_on_how_many_there_are(
    kernels: str, k: int, dtype: torch.dtype
) -> None:
    student, teacher = pair(MANY, V, dtype=dtype)
    options = {"k": k, "reduction": "none", "backend": kernels}
    loss, grad = loss_and_grad(student, teacher, **options)
    for rows in (1, 2, FEW, 7, 33, 64, 300):
        for part in (slice(rows), slice(MANY - rows, MANY)):
            some = student.detach()[part].requires_grad_()
            assert_equal(loss_and_grad(some, teacher[part], **options), (loss[part], grad[part]))


@pytest.mark.parametrize("rows", [FEW, MANY])
def test_every_element_of_the_results_is_written(kernels: str, rows: int) -> None:
    student, teacher = pair(rows, 20001)
    teacher[0, 5:] = -torch.inf  # fewer entries than k
    options = {
        "mask": torch.arange(rows, device=CUDA) % 3 != 1,
        "banned_ids": torch.arange(3, device=CUDA),
        "reduction": "none",
        "backend": kernels,
    }

    def step() -> tuple[Tensor, ...]:
        support = select_topk(teacher, K, mask=options["mask"], backend=kernels)
        given = loss_and_grad(student, support, **options)
        results = *loss_and_grad(student, teacher, k=K, **options), *given
        return *results, support.ids, support.logits

    expected = step()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        assert torch.empty(1, device=CUDA).isnan()
        assert_equal(step(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


def test_masked_rows_change_nothing(kernels: str) -> None:
    student, teacher = pair(MANY, V)
    mask = torch.arange(MANY, device=CUDA) % 3 != 0
    options = {"k": K, "reduction": "none", "backend": kernels}
    clean = loss_and_grad(student, teacher, **options)
    with torch.no_grad():
        student[~mask], teacher[~mask] = NAN, NAN
    loss, grad = loss_and_grad(student, teacher, mask=mask, **options)
    assert_equal((loss[mask], grad[mask]), (clean[0][mask], clean[1][mask]))
    assert (loss[~mask] == 0).all()
    assert (grad[~mask] == 0).all()


def test_rows_reach_beyond_two_to_the_31_elements(kernels: str) -> None:
    needs_memory(10)
    stride, vocab = 2**31 + 16, 300
    far = torch.empty_strided((2, vocab), (stride, 1), dtype=BF16, device=CUDA)
    far.copy_(logits(2, vocab))
    near = far.clone(memory_format=torch.contiguous_format)
    expected = topk_rkl(near, near.flip(-1), 9, reduction="none", backend=kernels)
    assert_equal([topk_rkl(far, near.flip(-1), 9, reduction="none", backend=kernels)], [expected])
    expected = topk_rkl(near.flip(-1), near, 9, reduction="none", backend=kernels)
    assert_equal([topk_rkl(near.flip(-1), far, 9, reduction="none", backend=kernels)], [expected])

    support = select_topk(near, 9, backend=kernels)
    entries, upstream = support.logits, torch.ones(2, device=CUDA)
    for name in ("scatter_", "scatter_add_"):
        scatter = getattr(torch.ops.opd_kernels, name)
        scatter(near, entries, support.ids, upstream, kernels)
        scatter(far, entries, support.ids, upstream, kernels)
        assert torch.equal(near, far)


def test_more_than_two_to_the_31_elements_are_right(kernels: str) -> None:
    rows = 16384
    needs_memory(20)
    student, teacher = pair(rows, V)
    assert student.numel() > 2**31
    results = loss_and_grad(student, teacher, k=K, reduction="none", backend=kernels)
    beyond = 2**31 // V
    sample = (0, beyond - 1, beyond, beyond + 1, rows - 1)
    assert_rows_right(sample, student, teacher, K, *results)


# What serves a call, where and when


def test_the_default_backend_has_kernels(device: torch.device) -> None:
    backends._warn_if_slow.cache_clear()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        loss_and_grad(*pair(3, 500), k=8)
        select_topk(logits(3, 500), 8)
    chosen = backends.resolve(backends.AUTO, device, (BF16, BF16), K)
    assert chosen is backends.load(KERNELS[0])


def test_the_default_backend_is_the_cuda_one_where_it_serves(device: torch.device) -> None:
    needs_kernels("cuda")
    cuda = backends.load("cuda")
    for rows in (FEW, 300):
        assert backends.resolve(backends.AUTO, device, (BF16, BF16), K, 20000) is cuda
        student, teacher = pair(rows, 20000)
        named = loss_and_grad(student, teacher, k=K, backend="cuda")
        assert_equal(loss_and_grad(student, teacher, k=K), named)


def test_a_launch_that_fails_raises_and_harms_nothing(
    device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    needs_kernels("cuda")
    module = backends.load("cuda").module
    student, teacher = pair(FEW, 20000)
    loss = topk_rkl(student, teacher, K, backend="cuda")
    step = functools.partial(loss_and_grad, student, teacher, k=K, backend="cuda")
    expected = step()
    nowhere = module.Device(torch.cuda.device_count(), 132, 228 * 1024, (0,) * 7, 0)
    with monkeypatch.context() as patch:
        patch.setattr("opd_kernels.backends.cuda._device", lambda *_: nowhere)
        for call in (step, loss.backward, lambda: select_topk(teacher, K, backend="cuda")):
            with pytest.raises(RuntimeError, match="cudaErrorInvalidDevice"):
                call()
    torch.cuda.synchronize()  # raises what was left behind
    assert torch.cuda.current_device() == 0
    assert_equal(step(), expected)


def test_more_rows_than_a_launch_takes_raise(device: torch.device) -> None:
    needs_kernels("cuda")
    rows = torch.zeros(300, dtype=BF16, device=CUDA).expand(2**31, 300)
    memory = rows.data_ptr()
    with pytest.raises(ValueError, match="at most 2\\^31 - 1 rows"):
        backends.load("cuda")._launch(
            "scatter", CUDA, backends.load("cuda")._rows(rows), memory, memory, memory, 1, "add"
        )


def test_work_goes_to_the_current_stream(kernels: str) -> None:
    student, teacher = pair(300, 20000)
    options = {"reduction": "none", "backend": kernels}

    def step() -> tuple[Tensor, ...]:
        support = select_topk(teacher, K, backend=kernels)
        given = loss_and_grad(student, support, **options)
        return *loss_and_grad(student, teacher, k=K, **options), *given

    expected = step()
    sources = student.detach().clone(), teacher.clone()
    with torch.no_grad():
        student.fill_(NAN), teacher.fill_(NAN)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(300_000_000)  # what another stream ran meanwhile would read NaN
        with torch.no_grad():
            student.copy_(sources[0]), teacher.copy_(sources[1])
        results = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(results, expected)


def test_nothing_waits_for_the_device(kernels: str) -> None:
    student, teacher = pair(300, 20000)
    rows = torch.rand(300, device=CUDA)
    options = {
        "mask": rows < 0.8,
        "weight": rows,
        "temperature": rows + 0.5,
        "banned_ids": torch.arange(5, device=CUDA),
        "vocab_size": 19990,
        "normalizer": torch.tensor(17.0, device=CUDA),
        "backend": kernels,
    }
    grad = torch.zeros_like(student)

    def step() -> Tensor:
        loss_and_grad(student * 1, teacher, k=K, inplace_grad=True, **options)
        topk_rkl(student, teacher, K, backend=kernels).backward()
        support = select_topk(teacher, K, mask=options["mask"], backend=kernels)
        ones = torch.ones_like(rows)
        EntryGradient(support.ids, support.logits).add_to_(grad, ones, backend=kernels)
        return topk_rkl(student, support, **options)

    step()
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss = step()
        with pytest.raises(RuntimeError, match="synchroniz"):
            loss.item()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite()


@pytest.mark.parametrize("rows", [FEW, 300, MANY])
def test_a_captured_graph_replays_forward_and_backward(kernels: str, rows: int) -> None:
    student, teacher = pair(rows, 20000)
    mask = torch.arange(rows, device=CUDA) % 5 != 0
    step = functools.partial(
        loss_and_grad, student, teacher, k=K, mask=mask, temperature=1.5, backend=kernels
    )
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (5, 6):
        fresh = pair(rows, 20000, seed=seed)
        with torch.no_grad():
            student.copy_(fresh[0]), teacher.copy_(fresh[1])
        graph.replay()
        assert_equal(captured, step())
    assert captured[0] > 0


def test_compiled_equals_eager(kernels: str) -> None:
    student, teacher = pair(300, 20000)
    mask = torch.arange(300, device=CUDA) % 5 != 0

    def loss(z: Tensor) -> Tensor:
        return topk_rkl(z * 2, teacher, K, mask=mask, reduction="none", backend=kernels)

    torch._dynamo.reset()
    outcomes = []
    for function in (torch.compile(loss, fullgraph=True), loss):
        rows = function(student)
        outcomes.append((rows.detach(), torch.autograd.grad(rows.sum(), student)[0]))
    torch._dynamo.reset()
    for ours, eager in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, eager)


def test_results_are_the_same_bits_under_load(kernels: str) -> None:
    student, teacher = pair(MANY, 50000)
    busy, load = logits(4096, 4096, dtype=FP16), torch.cuda.Stream()
    load.wait_stream(torch.cuda.current_stream())
    few = student.detach()[:3].requires_grad_()
    options = {"k": K, "backend": kernels}
    expected = None
    for _ in range(20):
        with torch.cuda.stream(load):
            for _ in range(10):
                torch.mm(busy, busy)
        results = (
            *loss_and_grad(student, teacher, **options),
            *loss_and_grad(few, teacher[:3], **options),
        )
        expected = expected or results
        assert_equal(results, expected)
    load.synchronize()


@pytest.mark.parametrize("rows", [FEW, 300])
def test_tensors_may_be_on_another_than_the_current_gpu(kernels: str, rows: int) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    student, teacher = pair(rows, 20000)
    other = student.detach().to("cuda:1").requires_grad_(), teacher.to("cuda:1")
    options = {"k": K, "reduction": "none", "backend": kernels}
    assert torch.cuda.current_device() == 0
    results = loss_and_grad(*other, **options)
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda", 1) for tensor in results)
    assert_equal(
        (tensor.to(CUDA) for tensor in results), loss_and_grad(student, teacher, **options)
    )


# Memory and launches


def test_forward_needs_memory_for_entries_and_group_maxima(kernels: str) -> None:
    student, teacher = pair(N, V)
    allowed = 12 * N * K + teacher.nbytes // 20
    options = {"k": K, "reduction": "none", "backend": kernels}
    assert peak_growth(lambda: topk_rkl(student, teacher, **options))[0] <= allowed
    assert peak_growth(lambda: select_topk(teacher, K, backend=kernels))[0] <= allowed


def test_backward_allocates_the_gradient_and_in_place_nothing(kernels: str) -> None:
    leaf, teacher = pair(N, V)
    student, upstream = leaf * 1, torch.ones(N, device=CUDA)
    slack = 16 * N * K
    for inplace, allowed in ((False, student.nbytes + slack), (True, slack)):
        loss = topk_rkl(
            student, teacher, K, reduction="none", inplace_grad=inplace, backend=kernels
        )
        backward = functools.partial(torch.autograd.grad, loss, student, upstream)
        growth, (grad,) = peak_growth(backward)
        assert growth <= allowed
        assert (grad.data_ptr() == student.data_ptr()) == inplace
        del grad


def launches(call: Callable[[], object]) -> list[str]:
    """What the GPU ran for a call: kernels, copies, fills."""
    torch.cuda.synchronize()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]) as profile:
        call()
        torch.cuda.synchronize()
    events = [event for event in profile.events() if event.device_type.name == "CUDA"]
    return [event.name for event in events if "Sync" not in event.name]


@pytest.mark.parametrize("rows", [1, FEW, 300, MANY])
def test_forward_and_backward_are_one_launch_each(kernels: str, rows: int) -> None:
    student, teacher = pair(rows, V)
    upstream = torch.ones(rows, device=CUDA)
    allowed = FEW_ROWS_LAUNCHES.get(kernels, 1) if rows < MANY else 1

    def forward() -> Tensor:
        return topk_rkl(student, teacher, K, reduction="none", backend=kernels)

    loss = forward()
    backward = functools.partial(torch.autograd.grad, loss, student, upstream, retain_graph=True)
    backward()
    launches(upstream.clone)  # the first profile may miss some
    if not launches(upstream.clone):
        pytest.skip("the profiler records no kernels here")
    assert 1 <= len(launches(forward)) <= allowed, launches(forward)
    assert len(launches(backward)) == 1, launches(backward)


# Under compute-sanitizer


@pytest.mark.parametrize(("rows", "k"), [(2, 16), (2, 1024), (300, 64)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_sanitized_kernels_give_the_same_results(
    kernels: str, rows: int, k: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab = 9001  # rows begin at every misalignment
    tensors = [(torch.randn(rows, vocab, generator=generator) * 3).to(dtype) for _ in range(3)]
    mask, banned = torch.arange(rows) % 3 != 1, torch.arange(0, vocab, 7)
    options = {"mask": mask, "banned_ids": banned, "temperature": torch.rand(rows) + 0.5}
    outcomes = []
    for backend in ("reference", kernels):
        device = CUDA if backend == kernels else torch.device("cpu")
        student, teacher, grad = map(padded, tensors) if backend == kernels else tensors
        there = {name: tensor.to(device) for name, tensor in options.items()}
        there |= {"backend": backend, "reduction": "none"}
        student = student.requires_grad_()
        support = select_topk(teacher, k, backend=backend)
        entries = support.ids, support.logits.nan_to_num(0), torch.ones(rows, device=device)
        outcomes.append(
            [
                support.ids,
                *loss_and_grad(student, teacher, k=k, **there),
                *loss_and_grad(student, support, **there),
                *loss_and_grad(student * 1, teacher, k=k, inplace_grad=True, backend=backend),
                EntryGradient(*entries, backend=backend).add_to_(grad.clone()),
            ]
        )
    for expected, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours.cpu(), expected)

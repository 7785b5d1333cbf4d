"""The divergence family on GPU tensors: real shapes, graphs, memory, no waiting. Needs a GPU.

``make gpu`` runs every member at a middling shape as well (benchmarks/gpu/correct.py).
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import pytest
import torch
from on_gpu import BF16, CUDA, FP16, FP32, KERNELS, NAN, assert_equal, pair, peak_growth
from torch import Tensor

from opd_kernels import (
    Divergence,
    forward_kl,
    jsd,
    reverse_kl,
    select_topk,
    topk_divergence,
    topk_rkl,
)
from opd_kernels.testing import Case, check

N, V, K, MANY = 2048, 151936, 64, 1100
MEMBERS: dict[str, dict[str, object]] = {
    "bucket": {"divergence": reverse_kl(), "outside": "bucket"},
    "truncate": {"divergence": forward_kl(), "outside": "truncate"},
    "generalize": {"divergence": Divergence(reverse=0.5, forward=0.5), "outside": "generalize"},
    "sample": {"divergence": reverse_kl(), "outside": "sample"},
    "jsd": {"divergence": jsd(), "outside": "renormalize"},
}
EVERYTHING = {"return_stats": True, "return_token_logprobs": True}


@pytest.fixture(params=KERNELS or ["none"])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend that has kernels for the GPU."""
    if not torch.cuda.is_available():
        pytest.skip("needs a GPU")
    yield request.param
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def step(student: Tensor, teacher: object, **options: object) -> tuple[Tensor, ...]:
    """Losses, statistics, log-probs of tokens, and the gradient of both sums."""
    tokens = options.pop("token_ids", torch.arange(len(student), device=CUDA) * 7 % 500)
    loss, logprobs, stats = topk_divergence(
        student, teacher, token_ids=tokens, reduction="none", **EVERYTHING, **options
    )
    (grad,) = torch.autograd.grad(loss.sum() + 0.5 * logprobs.sum(), student)
    masses = stats.teacher_mass, stats.student_mass, stats.teacher_entropy, stats.student_entropy
    return loss.detach(), logprobs.detach(), *masses, stats.overlap, grad


@pytest.mark.parametrize(
    ("vocab", "k", "dtype"),
    [(151936, 64, "bfloat16"), (151669, 1023, "float32"), (262144, 32, "float16")],
)
@pytest.mark.parametrize("outside", ["bucket", "sample"])
@pytest.mark.parametrize("rows", [2, 40])
def test_real_shapes_are_within_their_budgets(
    kernels: str, rows: int, outside: str, vocab: int, k: int, dtype: str
) -> None:
    case = Case(
        rows=(rows,), student_vocab=vocab, teacher_vocab=vocab, k=k, student_dtype=dtype,
        teacher_dtype=dtype, divergence="reverse_kl", outside=outside, reduction="none",
        token="likely" if outside == "sample" else "none", upstream="random", watched=True,
    )  # fmt: skip
    check(case, kernels, "cuda")


@pytest.mark.parametrize("member", MEMBERS)
@pytest.mark.parametrize("dtype", [BF16, FP16, FP32])
def test_a_row_does_not_depend_on_how_many_there_are(
    kernels: str, member: str, dtype: torch.dtype
) -> None:
    student, teacher = pair(MANY, 151669, dtype=dtype)
    tokens = torch.arange(MANY, device=CUDA) % 3000
    options = MEMBERS[member] | {"k": K, "backend": kernels}
    whole = step(student, teacher, token_ids=tokens, **options)
    for rows in (1, 3, 33, 300):
        some = student.detach()[:rows].requires_grad_()
        part = step(some, teacher[:rows], token_ids=tokens[:rows], **options)
        assert_equal(part, (result[:rows] for result in whole))


@pytest.mark.parametrize("member", MEMBERS)
def test_masked_rows_are_not_read_and_every_element_is_written(kernels: str, member: str) -> None:
    student, teacher = pair(300, 20001)
    mask = torch.arange(300, device=CUDA) % 3 != 1
    options = MEMBERS[member] | {"k": K, "mask": mask, "backend": kernels}
    expected = [result.nan_to_num(-7.0) for result in step(student, teacher, **options)]
    with torch.no_grad():
        student[~mask], teacher[~mask] = NAN, NAN
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        found = [result.nan_to_num(-7.0) for result in step(student, teacher, **options)]
        assert_equal(found, expected)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize("member", MEMBERS)
def test_nothing_waits_for_the_device(kernels: str, member: str) -> None:
    student, teacher = pair(300, 20000)
    rows = torch.rand(300, device=CUDA)
    options = MEMBERS[member] | {"k": K, "backend": kernels}
    options |= {"mask": rows < 0.8, "temperature": rows + 0.5, "teacher_temperature": 1.5}
    options |= {"banned_ids": torch.arange(5, device=CUDA), "vocab_size": 19990}
    step(student, teacher, **options)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, *_ = step(student * 1, teacher, inplace_grad=True, **options)
        select_topk(teacher, K, with_logsumexp=True, backend=kernels)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert loss.isfinite().all()


@pytest.mark.parametrize("rows", [3, 300])
@pytest.mark.parametrize("member", MEMBERS)
def test_a_captured_graph_replays_forward_and_backward(
    kernels: str, rows: int, member: str
) -> None:
    student, teacher = pair(rows, 20000)
    call = functools.partial(step, student, teacher, k=K, backend=kernels, **MEMBERS[member])
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = call()
    fresh = pair(rows, 20000, seed=5)
    with torch.no_grad():
        student.copy_(fresh[0]), teacher.copy_(fresh[1])
    graph.replay()
    assert_equal(captured, call())


def test_memory_is_the_gradient_and_what_belongs_to_entries_and_rows(kernels: str) -> None:
    student, teacher = pair(N, V)
    # Triton keeps the keys, maxima and sums of groups in memory.
    groups = 0 if kernels == "cuda" else N * V // 8
    allowed = 16 * N * K + 64 * N + groups
    for member in MEMBERS.values():
        tokens = torch.zeros(N, dtype=torch.int64, device=CUDA)
        own = {"token_ids": tokens} if member["outside"] == "sample" else {}
        call = functools.partial(
            topk_divergence, student, teacher, K, backend=kernels, reduction="none", **member, **own
        )
        growth, loss = peak_growth(call)
        assert growth <= allowed, (member, growth)
        upstream = torch.ones(N, device=CUDA)
        growth, _ = peak_growth(lambda: torch.autograd.grad(loss, student, upstream))  # noqa: B023
        assert growth <= student.nbytes + allowed, (member, growth)
    masses = ("teacher_mass", "student_mass")
    growth, _ = peak_growth(
        lambda: topk_rkl(student, teacher, K, return_stats=masses, backend=kernels)
    )
    assert growth <= allowed


@pytest.mark.parametrize("member", ["bucket", "sample"])
def test_compiled_equals_eager(kernels: str, member: str) -> None:
    student, teacher = pair(300, 20000)
    call = functools.partial(step, teacher=teacher, k=K, backend=kernels, **MEMBERS[member])
    tokens = torch.arange(300, device=CUDA)

    def loss(z: Tensor) -> Tensor:
        return topk_divergence(
            z * 2,
            teacher,
            K,
            token_ids=tokens,
            reduction="none",
            backend=kernels,
            **MEMBERS[member],
        )

    call(student)
    torch._dynamo.reset()
    outcomes = []
    for function in (torch.compile(loss, fullgraph=True), loss):
        rows = function(student)
        outcomes.append((rows.detach(), torch.autograd.grad(rows.sum(), student)[0]))
    torch._dynamo.reset()
    for ours, eager in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours, eager)

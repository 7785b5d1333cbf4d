"""``linear_topk_rkl`` on GPU tensors: real widths, streams, graphs, memory. Needs a GPU.

As test_gpu.py, for the backends with kernels for hidden states. Where a test compares bits and a
matrix product is among what it calls, its factors are integers that every algorithm adds exactly.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterator, Sequence

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
    needs_memory,
    padded,
    peak_growth,
)
from torch import Tensor
from torch.nn.functional import linear

from opd_kernels import LinearLogits, TopK, backends, linear_topk_rkl, select_topk, topk_rkl
from opd_kernels.backends import plain

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")

V, H, K = 151936, 4096, 64
MIB = 1 << 20
# Additions one after the other: of H products, in tiles of 128 columns and more, for a logit; of up
# to 1000 entries, two at once, for a gradient. Float32's unit roundoff.
DOT_DEPTH, SUM_DEPTH, U = 64, 600, 2.0**-24
HOT, RARE, ABSENT = 7, 101, 5  # ids of every row, of one row, of none
TEACHERS = ("logits", "linear", "topk")
TOLERANCE = {"rtol": 2e-2, "atol": 1e-3}


@pytest.fixture(params=[name for name in KERNELS if hasattr(backends.load(name), "gather_dot")])
def kernels(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of each backend that has such kernels for the GPU."""
    yield request.param
    torch.cuda.synchronize()
    torch.cuda.empty_cache()


def student(
    rows: int, width: int = H, vocab: int = V, seed: int = 0, dtype: torch.dtype = BF16
) -> tuple[Tensor, Tensor]:
    """(hidden states, weight) of logits with a standard deviation of 3."""
    hidden = (logits(rows, width, seed=seed, dtype=dtype) / 3).requires_grad_()
    weight = logits(vocab, width, seed=seed + 1, dtype=dtype).mul_(width**-0.5)
    return hidden, weight.requires_grad_()


def support(rows: int, vocab: int = V, k: int = K, seed: int = 2) -> TopK:
    """As of a language: one id in every row, some in many, most in few or none."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    spread = torch.rand(rows, k, generator=generator, device=CUDA) ** 4
    ids = (spread * vocab).to(torch.int32).clamp(max=vocab - 1)
    ids = torch.where((ids == RARE) | (ids == ABSENT), HOT, ids)
    ids[:, 0] = HOT
    ids[rows // 2, 1] = RARE
    ids[-1, -1] = vocab - 1
    return TopK(ids, logits(rows, k, seed=seed + 1, dtype=FP32))


def integers(*shape: int, seed: int = 0) -> Tensor:
    """-1, 0 and 1: sums of up to 256 products are exact in bfloat16."""
    generator = torch.Generator(CUDA).manual_seed(seed)
    return torch.randint(-1, 2, shape, generator=generator, device=CUDA).to(BF16)


def teacher(kind: str, rows: int, vocab: int, seed: int = 9) -> Tensor | LinearLogits | TopK:
    if kind == "logits":
        return logits(rows, vocab, seed=seed)
    if kind == "linear":
        parts = integers(rows, 64, seed=seed), integers(vocab, 64, seed=seed + 1)
        return LinearLogits(*parts, integers(vocab, seed=seed + 2), softcap=20.0, scale=0.5)
    return support(rows, vocab, seed=seed)


def leaves_of(tree: object) -> list[Tensor]:
    return [leaf for leaf in torch.utils._pytree.tree_leaves(tree) if isinstance(leaf, Tensor)]


def loss_and_grads(
    leaves: Sequence[Tensor], teacher: Tensor | LinearLogits | TopK, **options: object
) -> tuple[Tensor, ...]:
    """The loss and the gradients for hidden states, weight and, if there is one, bias."""
    bias = leaves[2] if len(leaves) > 2 else None
    k = None if isinstance(teacher, TopK) else K
    loss = linear_topk_rkl(*leaves[:2], teacher, k, student_bias=bias, **options)
    wanted = [leaf for leaf in leaves if leaf.requires_grad]
    return loss.detach(), *torch.autograd.grad(loss.sum(), wanted)


def close(actual: Tensor, expected: Tensor, budget: Tensor) -> None:
    error = (actual.double() - expected).abs()
    assert bool((error <= budget).all()), f"{(error / budget).max():.3g} times the budget"


def rounding(value: Tensor, dtype: torch.dtype) -> Tensor:
    """Half a unit in the last place."""
    info = torch.finfo(dtype)
    return value.abs() * info.eps / 2 + info.smallest_normal * info.eps / 2


def assert_rows_right(
    hidden: Tensor, weight: Tensor, given: TopK, loss: Tensor, grad: Tensor
) -> tuple[Tensor, Tensor]:
    """Losses and gradients of hidden states against float64; returns dL/dz and its budget.

    A log-softmax is off by twice its inputs' errors and a few u of their span; p, relatively, by as
    much. From there the bounds follow the formulas term by term.
    """
    results = []
    for at in torch.arange(len(hidden), device="cpu").split(64):
        rows = slice(int(at[0]), int(at[-1]) + 1)
        ids, h = given.ids[rows].long(), hidden.detach()[rows].double()
        w, t = weight.detach()[ids].double(), given.logits[rows].double()  # (rows, K, H), (rows, K)
        z = (w @ h[..., None]).squeeze(-1)
        log_p = z.log_softmax(-1)
        ratio, p = log_p - t.log_softmax(-1), log_p.exp()
        wanted = (p * ratio).sum(-1, keepdim=True)
        dz = p * (ratio - wanted)

        dot_error = DOT_DEPTH * U * (w.abs() @ h.abs()[..., None]).squeeze(-1)
        span = z.amax(-1) - z.amin(-1) + t.amax(-1) - t.amin(-1) + 16
        off = (2 * dot_error.amax(-1) + 8 * U * span)[:, None]
        loss_error = (p * off * (ratio.abs() + 2)).sum(-1, keepdim=True)
        dz_error = p * (off * ((ratio - wanted).abs() + 2) + loss_error)
        close(loss[rows, None], wanted, loss_error + rounding(wanted, FP32))

        dh, size = ((x[:, None] @ w.abs()).squeeze(1) for x in (dz_error, dz.abs()))
        budget = dh + SUM_DEPTH * U * size
        dh = (dz[:, None] @ w).squeeze(1)
        close(grad[rows], dh, budget + rounding(dh, grad.dtype))
        results.append((dz, dz_error))
    return torch.cat([dz for dz, _ in results]), torch.cat([error for _, error in results])


def assert_vocabulary_right(
    vocab_rows: Sequence[int], hidden: Tensor, ids: Tensor, dz: Tensor, error: Tensor, grad: Tensor
) -> None:
    """The weight's gradient: some rows against float64, and zeros where no row has the id."""
    for v in vocab_rows:
        of_v = ids == v
        rows = of_v.any(-1).nonzero().squeeze(-1)
        h = hidden.detach()[rows].double()
        factors = [torch.where(of_v, x, 0).sum(-1)[rows] for x in (dz, dz.abs(), error)]
        wanted = factors[0] @ h
        budget = (SUM_DEPTH * U * factors[1] + factors[2]) @ h.abs()
        close(grad[v], wanted, budget + rounding(wanted, grad.dtype))
    written = torch.zeros(len(grad), dtype=torch.bool, device=grad.device)
    written[ids.flatten().long()] = True
    assert not bool(written[ABSENT])
    assert bool(written[list(vocab_rows)].all())
    assert bool((grad.count_nonzero(-1)[~written] == 0).all())


# Real widths


@pytest.mark.parametrize(
    ("rows", "vocab", "width", "k", "dtype", "kind"),
    [
        (256, V, H, 64, BF16, "topk"),
        (256, V, H, 64, FP32, "topk"),
        (1100, V, 2560, 64, BF16, "topk"),
        (256, V, 896, 32, BF16, "logits"),
        (256, 262144, 2304, 64, BF16, "linear"),
        (256, 128256, H, 17, FP16, "topk"),
        (64, V, 4095, 1000, FP32, "topk"),
        (3, V, 5120, 64, BF16, "topk"),
    ],
    ids=str,
)
def test_real_widths_are_right(
    kernels: str, rows: int, vocab: int, width: int, k: int, dtype: torch.dtype, kind: str
) -> None:
    leaves = student(rows, width, vocab, dtype=dtype)
    given = support(rows, vocab, k) if kind == "topk" else teacher(kind, rows, vocab)
    loss = linear_topk_rkl(
        *leaves, given, None if kind == "topk" else k, reduction="none", backend=kernels
    )
    dh, dw = torch.autograd.grad(loss.sum(), leaves)
    if kind != "topk":
        given = select_topk(given, k, backend=kernels)
    dz = assert_rows_right(*leaves, given, loss.detach(), dh)
    ids = given.ids
    chosen = (HOT, RARE, vocab - 1) if kind == "topk" else (int(ids[0, 0]), int(ids[-1, -1]))
    if kind == "topk":
        assert_vocabulary_right(chosen, leaves[0], ids, *dz, dw)
        return
    absent = torch.ones(vocab, dtype=torch.bool, device=CUDA)
    absent[ids.flatten().long()] = False
    assert bool((dw.count_nonzero(-1)[absent] == 0).all())
    assert bool((dw.count_nonzero(-1)[ids[:, 0].long()] > 0).all())


def test_a_weight_of_more_than_two_to_the_31_elements(kernels: str) -> None:
    needs_memory(20)
    rows, vocab = 300, 600_000
    hidden, weight = student(rows, H, vocab)
    assert weight.numel() > 2**31
    given, edge = support(rows, vocab), 2**31 // H
    given.ids[:, 3] = torch.arange(edge - 150, edge + 150, dtype=torch.int32, device=CUDA)
    loss, dh, dw = loss_and_grads((hidden, weight), given, reduction="none", backend=kernels)
    dz = assert_rows_right(hidden, weight, given, loss, dh)
    chosen = (HOT, RARE, edge - 1, edge, edge + 1, vocab - 1)
    assert_vocabulary_right(chosen, hidden, given.ids, *dz, dw)


def test_rows_reach_beyond_two_to_the_31_elements(kernels: str) -> None:
    needs_memory(10)
    stride, width = 2**31 + 16, 300
    far = torch.empty_strided((2, width), (stride, 1), dtype=BF16, device=CUDA)
    far.copy_(logits(2, width))
    near = far.clone(memory_format=torch.contiguous_format).requires_grad_()
    far.requires_grad_()
    ids = torch.tensor([[0, 1], [1, 0]], device=CUDA)
    given = TopK(ids, logits(2, 2, dtype=FP32))
    expected = loss_and_grads(
        (near, near.detach().clone().requires_grad_()), given, backend=kernels
    )
    for leaves in ((near, far), (far, near)):
        assert_equal(loss_and_grads(leaves, given, backend=kernels), expected)


def test_many_rows(kernels: str) -> None:
    rows = 65536
    needs_memory(12)
    hidden, weight = student(rows)
    given = support(rows)
    loss, dh, dw = loss_and_grads((hidden, weight), given, reduction="none", backend=kernels)
    sample = torch.tensor([0, 1, rows // 2, rows - 2, rows - 1], device=CUDA)
    some = TopK(given.ids[sample], given.logits[sample])
    assert_rows_right(hidden[sample], weight, some, loss[sample], dh[sample])
    assert bool(dw.isfinite().all())
    written = torch.zeros(V, dtype=torch.bool, device=CUDA)
    written[given.ids.flatten().long()] = True
    assert torch.equal(dw.count_nonzero(-1) > 0, written)


def test_a_teachers_head_gives_what_its_logits_give(kernels: str) -> None:
    rows, vocab = 2000, V  # three pieces
    mask = torch.arange(rows, device=CUDA) % 5 != 0
    given = teacher("linear", rows, vocab)
    options = {"mask": mask, "banned_ids": torch.arange(0, vocab, 7, device=CUDA)}
    got = select_topk(given, K, with_logsumexp=True, backend=kernels, **options)
    whole = linear(given.hidden, given.weight, given.bias)
    expected = select_topk(whole, K, backend=kernels, **options)
    assert torch.equal(got.ids, expected.ids)
    values = (expected.logits.double() / 40).tanh() * 20
    torch.testing.assert_close(got.logits.double()[mask], values[mask], rtol=1e-5, atol=1e-5)
    row = int(mask.nonzero()[-1])
    logsumexp = ((whole[row].double() / 40).tanh() * 20).logsumexp(-1)
    # Of all logits scale and softcap are taken in their dtype, as a model's head does.
    torch.testing.assert_close(got.logsumexp[row].double(), logsumexp, rtol=1e-5, atol=0)


# What is read and written


def test_what_takes_no_part_is_not_read(kernels: str) -> None:
    rows, vocab = 300, 20000
    hidden, weight = student(rows, 512, vocab)
    given = support(rows, vocab)
    mask = torch.arange(rows, device=CUDA) % 3 != 0
    banned = torch.arange(100, 200, device=CUDA)
    step = functools.partial(
        loss_and_grads, (hidden, weight), given, mask=mask, banned_ids=banned,
        vocab_size=vocab - 5, reduction="none", backend=kernels,
    )  # fmt: skip
    expected = step()
    with torch.no_grad():
        hidden[~mask] = NAN
        weight[banned] = NAN
        weight[vocab - 5 :] = NAN
    assert_equal(step(), expected)
    loss, dh, dw = expected
    assert bool((loss[~mask] == 0).all() & (dh[~mask] == 0).all())
    assert bool((dw[banned] == 0).all() & (dw[vocab - 5 :] == 0).all())


@pytest.mark.parametrize("rows", [3, 1100])
def test_every_element_of_the_results_is_written(kernels: str, rows: int) -> None:
    leaves = *student(rows, 500, 20001), logits(20001).requires_grad_()
    given = support(rows, 20001)
    given.logits[0, 5:] = -torch.inf  # fewer entries than k
    mask = torch.arange(rows, device=CUDA) % 3 != 1

    def step() -> tuple[Tensor, ...]:
        return loss_and_grads(leaves, given, mask=mask, reduction="none", backend=kernels)

    expected = step()
    torch.use_deterministic_algorithms(True, warn_only=True)  # fills new memory with NaN
    try:
        assert torch.empty(1, device=CUDA).isnan()
        assert_equal(step(), expected)
    finally:
        torch.use_deterministic_algorithms(False)


# What serves a call, where and when


def test_the_default_backend_has_kernels() -> None:
    if not KERNELS:
        pytest.skip("needs kernels")
    backends._warn_if_slow.cache_clear()
    leaves, given = student(5, 64, 500), support(5, 500)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours = loss_and_grads(leaves, given)
    chosen = backends.resolve_linear(backends.AUTO, CUDA, (BF16, BF16, BF16), K)
    assert chosen is backends.load("triton")
    assert_equal(ours, loss_and_grads(leaves, given, backend="triton"))
    if "cuda" in KERNELS:
        with pytest.raises(ValueError, match="no kernels for hidden states"):
            loss_and_grads(leaves, given, backend="cuda")


def every_option(rows: int) -> dict[str, object]:
    """Each argument that may be a tensor is one."""
    values = torch.rand(rows, device=CUDA, generator=torch.Generator(CUDA).manual_seed(4))
    return {
        "mask": values < 0.8,
        "weight": values,
        "temperature": values + 0.5,
        "teacher_temperature": torch.tensor(1.5, device=CUDA),
        "banned_ids": torch.arange(5, device=CUDA),
        "vocab_size": 19990,
        "normalizer": torch.tensor(17.0, device=CUDA),
        "logit_softcap": 30.0,
        "logit_scale": 0.5,
    }


def biased_student(rows: int, seed: int = 0) -> tuple[Tensor, ...]:
    leaves = student(rows, 512, 20000, seed=seed)
    return *leaves, logits(20000, seed=seed + 5).requires_grad_()


@pytest.mark.parametrize("kind", TEACHERS)
def test_work_goes_to_the_current_stream(kernels: str, kind: str) -> None:
    leaves, given = biased_student(300), teacher(kind, 300, 20000)
    step = functools.partial(loss_and_grads, leaves, given, reduction="none", backend=kernels)
    expected = step()
    inputs = [*leaves, *leaves_of(given)]
    sources = [tensor.detach().clone() for tensor in inputs]
    with torch.no_grad():
        for tensor in inputs:
            tensor.fill_(NAN if tensor.is_floating_point() else 0)
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(300_000_000)  # what another stream ran meanwhile would read NaN
        with torch.no_grad():
            for tensor, source in zip(inputs, sources, strict=True):
                tensor.copy_(source)
        results = step()
    torch.cuda.current_stream().wait_stream(stream)
    assert_equal(results, expected)


def test_nothing_waits_for_the_device(kernels: str) -> None:
    leaves, options = biased_student(300), every_option(300)
    strided = leaves[0].detach().view(3, 100, 512).transpose(0, 1)[..., :500].requires_grad_()
    narrow, few = leaves[1].detach()[:, :500].requires_grad_(), support(300, 20000)
    given = [teacher(kind, 300, 20000) for kind in TEACHERS]

    def step() -> Tensor:
        for one in given:
            loss_and_grads(leaves, one, backend=kernels, **options)
        select_topk(given[1], K, mask=options["mask"], with_logsumexp=True, backend=kernels)
        shaped = TopK(few.ids.view(100, 3, K), few.logits.view(100, 3, K))
        return loss_and_grads((strided, narrow), shaped, backend=kernels)[0]

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


@pytest.mark.parametrize("kind", TEACHERS)
def test_a_captured_graph_replays_forward_and_backward(kernels: str, kind: str) -> None:
    rows = 1100
    leaves, given, options = biased_student(rows), teacher(kind, rows, 20000), every_option(rows)
    step = functools.partial(loss_and_grads, leaves, given, backend=kernels, **options)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            step()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for seed in (50, 60):  # other values, and ids whose segments lie elsewhere
        fresh = [*biased_student(rows, seed), *leaves_of(teacher(kind, rows, 20000, seed))]
        with torch.no_grad():
            for tensor, source in zip([*leaves, *leaves_of(given)], fresh, strict=True):
                tensor.copy_(source)
        graph.replay()
        assert_equal(captured, step())
    assert captured[0] > 0


def test_compiled_equals_eager(kernels: str) -> None:
    leaves, given = biased_student(300), teacher("linear", 300, 20000)
    mask = torch.arange(300, device=CUDA) % 5 != 0

    def loss(hidden: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        return linear_topk_rkl(
            hidden * 2, weight, given, K, student_bias=bias, logit_softcap=30.0, mask=mask,
            reduction="none", backend=kernels,
        )  # fmt: skip

    torch._dynamo.reset()
    outcomes = []
    for function in (torch.compile(loss, fullgraph=True), loss):
        rows = function(*leaves)
        outcomes.append((rows.detach(), *torch.autograd.grad(rows.sum(), leaves)))
    torch._dynamo.reset()
    for ours, eager in zip(*outcomes, strict=True):
        # One tanh is not the other; a gradient is rounded to bfloat16.
        tolerance = {"rtol": 1e-4, "atol": 1e-4} if ours.dtype == FP32 else TOLERANCE
        torch.testing.assert_close(ours, eager, **tolerance)


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_autocast_takes_what_linear_takes(kernels: str, dtype: torch.dtype) -> None:
    hidden, weight = student(300, 512, 20000, dtype=FP32)
    hidden = hidden.detach().to(dtype).requires_grad_()
    given, whole = teacher("linear", 300, 20000), logits(300, 20000, seed=3)
    with torch.autocast(CUDA.type, BF16):
        wide = LinearLogits(given.hidden.to(dtype), given.weight.float())
        loss = linear_topk_rkl(hidden, weight, whole, K, backend=kernels)
        expected = topk_rkl(linear(hidden, weight), whole, K, backend=kernels)
        got = select_topk(wide, K, backend=kernels)
        rounded = select_topk(linear(wide.hidden, wide.weight), K, backend=kernels)
    assert_equal((got.ids, got.logits), (rounded.ids, rounded.logits))
    grads = torch.autograd.grad(loss, (hidden, weight))
    assert [grad.dtype for grad in grads] == [dtype, FP32]
    torch.testing.assert_close(loss, expected, rtol=0.02, atol=0)
    for ours, theirs in zip(grads, torch.autograd.grad(expected, (hidden, weight)), strict=True):
        off = (ours.double() - theirs.double()).norm() / theirs.double().norm()
        assert off <= 0.05  # rounded logits, of up to 12, are off by up to 2^-6


def test_results_are_the_same_bits_under_load(kernels: str) -> None:
    leaves, given = student(4096, 1024, 50000), support(4096, 50000)
    busy, load = logits(4096, 4096, dtype=FP16), torch.cuda.Stream()
    load.wait_stream(torch.cuda.current_stream())
    expected = None
    for _ in range(10):
        with torch.cuda.stream(load):
            for _ in range(10):
                torch.mm(busy, busy)
        results = loss_and_grads(leaves, given, backend=kernels)
        expected = expected or results
        assert_equal(results, expected)
    load.synchronize()


@pytest.mark.parametrize("kind", TEACHERS)
def test_tensors_may_be_on_another_than_the_current_gpu(kernels: str, kind: str) -> None:
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    leaves, given = biased_student(300), teacher(kind, 300, 20000)
    there = [leaf.detach().to("cuda:1").requires_grad_() for leaf in leaves]
    given_there = torch.utils._pytree.tree_map(lambda tensor: tensor.to("cuda:1"), given)
    options = {"reduction": "none", "backend": kernels}
    assert torch.cuda.current_device() == 0
    results = loss_and_grads(there, given_there, **options)
    assert torch.cuda.current_device() == 0
    assert all(tensor.device == torch.device("cuda", 1) for tensor in results)
    assert_equal((x.to(CUDA) for x in results), loss_and_grads(leaves, given, **options))


# Memory


def growth(rows: int, call: Callable[[slice], object]) -> int:
    """By how much a call on all rows grows memory, after one on a few: handles, workspaces."""
    call(slice(8))
    return peak_growth(lambda: call(slice(rows)))[0]


@pytest.mark.parametrize("frozen", [False, True])
def test_backward_needs_memory_for_gradients_and_entries(kernels: str, frozen: bool) -> None:
    rows = 8192
    needs_memory(8)
    hidden, weight = student(rows)
    weight.requires_grad_(not frozen)
    given = support(rows)

    def call(part: slice) -> tuple[Tensor, ...]:
        some = hidden.detach()[part].requires_grad_()
        return loss_and_grads(
            (some, weight), TopK(given.ids[part], given.logits[part]), backend=kernels
        )

    results = hidden.nbytes if frozen else hidden.nbytes + weight.nbytes
    slack = 32 * rows * K if frozen else 64 * MIB + 16 * rows * K
    assert growth(rows, call) <= results + slack


def test_a_teachers_head_needs_memory_for_its_workspace(kernels: str) -> None:
    rows = 8192
    needs_memory(4)
    given = LinearLogits(*(tensor.detach() for tensor in student(rows)))

    def call(part: slice) -> TopK:
        return select_topk(LinearLogits(given.hidden[part], given.weight), K, backend=kernels)

    # The last rows of a piece and group maxima, a twentieth at most, come besides.
    workspace = plain.GPU_WORKSPACE_BYTES
    assert growth(rows, call) <= workspace + workspace // 20 + 16 * rows * K


# Under compute-sanitizer: torch's matrix products, which are not all clean under it, stay out.


@pytest.mark.parametrize(("rows", "k", "width"), [(3, 16, 41), (300, 64, 64), (300, 17, 300)])
@pytest.mark.parametrize("dtype", [BF16, FP32])
def test_sanitized_kernels_give_the_same_results(
    kernels: str, rows: int, k: int, width: int, dtype: torch.dtype
) -> None:
    generator = torch.Generator().manual_seed(0)
    vocab = 1001

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        return torch.randn(shape, generator=generator) * scale

    tensors = normal(rows, width), normal(vocab, width, scale=width**-0.5), normal(vocab)
    tensors = [tensor.to(dtype) for tensor in tensors]
    teacher = normal(rows, vocab).to(dtype)
    ids = torch.randint(-1, vocab + 1, (rows, k), generator=generator)
    ids[:, 1] = HOT  # a segment of whole chunks
    given = ids.to(torch.int32), normal(rows, k)
    options = {"mask": torch.arange(rows) % 7 != 1, "banned_ids": torch.arange(0, vocab, 9)}
    outcomes = []
    for backend in ("reference", kernels):
        ours = backend == kernels
        device = CUDA if ours else torch.device("cpu")
        leaves = [padded(tensor) if ours else tensor.clone() for tensor in tensors]
        leaves = [leaf.requires_grad_() for leaf in leaves]
        there = {name: tensor.to(device) for name, tensor in options.items()}
        results = []
        for source, count in ((teacher, k), (given, None)):
            if count is None:
                moved = TopK(*(tensor.to(device) for tensor in source))
            else:
                moved = padded(source) if ours else source
            loss = linear_topk_rkl(
                *leaves[:2], moved, count, student_bias=leaves[2], logit_softcap=20.0,
                reduction="none", backend=backend, **there,
            )  # fmt: skip
            results += [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]
        outcomes.append(results)
    # Sums of up to 300 terms of a few units.
    tolerance = {"rtol": 1e-4, "atol": 1e-4} if dtype == FP32 else TOLERANCE
    for expected, ours in zip(*outcomes, strict=True):
        torch.testing.assert_close(ours.cpu(), expected, **tolerance)

"""``score_ids``: a teacher's logits at ids that it is given, and the sums of the whole row."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from effort import INTERPRETED
from tensors import DTYPES, integers, normal
from torch import Tensor

from opd_kernels import LinearLogits, TopK, score_ids, select_topk, topk_divergence
from opd_kernels.backends import plain

N, H, V, K, WIDTH = 5, 6, 131, 9, 120
FIELDS = ("ids", "logits", "logsumexp", "tail_logsumexp", "token_logits")


def given(seed: int = 0) -> Tensor:
    """Ids in any order, some twice, some outside of the vocabulary."""
    ids = torch.randint(V, (N, K), generator=torch.Generator().manual_seed(seed))
    ids[:, 3] = ids[:, 0]
    ids[0, 5], ids[1, 6], ids[2, 7], ids[3, 1] = -1, V, 2**32 + 1, WIDTH
    return ids


def expected(logits: Tensor, ids: Tensor, width: int, temperature: float) -> list[Tensor]:
    """(ids, logits, log-sum-exps of all and of what is not listed) of rows, in float64."""
    rows = logits.double()[:, :width] / temperature
    inside = (ids >= 0) & (ids < width)
    at = ids.where(inside, 0)
    values = logits.double().gather(-1, at).masked_fill(~inside, -torch.inf)
    rest = torch.nn.functional.pad(rows, (0, 1))
    rest = rest.scatter(-1, ids.where(inside, width), -torch.inf)
    rest[:, -1] = -torch.inf
    return [ids.masked_fill(~inside, -1), values, rows.logsumexp(-1), rest.logsumexp(-1)]


@pytest.mark.parametrize("form", ["logits", "head", "shaped head"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_numbers_are_those_of_float64(
    form: str, dtype: torch.dtype, linear_backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(plain.WORKSPACE_BYTES, "cpu", 0)
    monkeypatch.setattr(plain, "TILE_ROWS", 2)
    hidden, weight = integers(N, H, dtype=dtype), integers(V, H, seed=1, dtype=dtype)
    scale, softcap = (0.5, 6.0) if form == "shaped head" else (1.0, None)
    logits = plain.shaped(hidden.float() @ weight.float().t(), scale, softcap)
    teacher: Any = LinearLogits(hidden, weight, None, softcap, scale)
    if form == "logits":
        teacher = logits = logits.to(dtype)
    mask = torch.tensor([True, True, False, True, True])
    tokens = torch.tensor([3, WIDTH, 5, -100, 7])
    found = score_ids(
        teacher, given(), mask=mask, vocab_size=WIDTH, temperature=1.3, token_ids=tokens,
        backend=linear_backend,
    )  # fmt: skip
    ids, values, whole, rest = (x[mask] for x in expected(logits.float(), given(), WIDTH, 1.3))
    assert found.ids.dtype == torch.int32
    assert torch.equal(found.ids[mask].long(), ids)
    assert torch.equal(found.logits[mask].double(), values)
    # Sums of the CPU's kernels are in float32: each term by its exponent, and their count.
    unit = torch.finfo(torch.float32).eps
    bound = unit * (16 + 4 * float(logits.abs().max()) / 1.3)
    assert found.logsumexp is not None
    assert found.tail_logsumexp is not None
    torch.testing.assert_close(found.logsumexp[mask].double(), whole, rtol=0, atol=bound)
    torch.testing.assert_close(found.tail_logsumexp[mask].double(), rest, rtol=0, atol=bound)
    assert found.ids[2].tolist() == [-1] * K
    assert found.logits[2].tolist() == [-torch.inf] * K
    assert found.logsumexp[2] == found.tail_logsumexp[2] == 0
    assert found.token_logits is not None
    assert found.token_logits.isnan().tolist() == [False, True, True, True, False]
    assert found.token_logits[0] == logits[0, 3]


@pytest.mark.parametrize("head", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_ids_that_were_selected_are_scored_as_they_were(
    head: bool, dtype: torch.dtype, linear_backend: str
) -> None:
    teacher: Any = normal(N, V, dtype=dtype)
    if head:
        teacher = LinearLogits(normal(N, H, dtype=dtype), normal(V, H, seed=1, dtype=dtype))
    tokens = torch.arange(N)
    options: dict[str, Any] = {"token_ids": tokens, "vocab_size": WIDTH, "temperature": 0.7}
    options["backend"] = linear_backend
    chosen = select_topk(teacher, K, with_logsumexp=True, **options)
    scored = score_ids(teacher, chosen.ids, **options)
    for name in ("ids", "logits", "token_logits"):
        assert torch.equal(getattr(scored, name), getattr(chosen, name)), name
    for name in ("logsumexp", "tail_logsumexp"):
        torch.testing.assert_close(
            getattr(scored, name), getattr(chosen, name), rtol=1e-6, atol=1e-6
        )
    assert scored.temperature == chosen.temperature


def test_a_students_support_is_scored_for_a_loss_on_it(linear_backend: str) -> None:
    student, teacher = normal(N, V), normal(N, V, seed=1)
    chosen = select_topk(student, K)
    support = score_ids(teacher, chosen.ids, backend=linear_backend)
    for outside in ("renormalize", "bucket"):
        options: dict[str, Any] = {"outside": outside, "backend": linear_backend}
        found = topk_divergence(student, support, **options)
        direct = topk_divergence(student, teacher, K, support="student", **options)
        torch.testing.assert_close(found, direct, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("rows", [(), (0,), (2, 3), (2, 0)])
@pytest.mark.parametrize("head", [False, True])
def test_rows_have_any_number_of_dimensions(
    rows: tuple[int, ...], head: bool, linear_backend: str
) -> None:
    hidden, weight = integers(*rows, H), integers(V, H, seed=1)
    ids = torch.arange(4).expand(*rows, 4)
    teacher: Any = LinearLogits(hidden, weight) if head else hidden @ weight.t()
    found = score_ids(teacher, ids, backend=linear_backend)
    assert found.ids.shape == found.logits.shape == (*rows, 4)
    assert found.logsumexp is not None
    assert found.logsumexp.shape == rows
    assert torch.equal(found.logits, (hidden @ weight.t())[..., :4])


def test_every_id_leaves_no_tail(linear_backend: str) -> None:
    found = score_ids(normal(N, 7), torch.arange(7).flip(0).expand(N, 7), backend=linear_backend)
    assert found.tail_logsumexp is not None
    assert found.tail_logsumexp.tolist() == [-torch.inf] * N


def test_nothing_has_a_graph_and_float64_stays(linear_backend: str) -> None:
    leaf = normal(N, V).requires_grad_()
    found = score_ids(leaf * 2, given(), backend=linear_backend)
    assert not any(getattr(found, name).requires_grad for name in FIELDS[:4])
    if not INTERPRETED:
        assert score_ids(leaf.double(), given()).logits.dtype == torch.float64


@pytest.mark.skipif(INTERPRETED, reason="compiles")
def test_compiled_as_eager() -> None:
    hidden, weight = integers(N, H), integers(V, H, seed=1)

    def call(hidden: Tensor, ids: Tensor) -> TopK:
        return score_ids(LinearLogits(hidden, weight), ids)

    found, wanted = (
        torch.compile(call, fullgraph=True, backend="aot_eager")(hidden, given()),
        call(hidden, given()),
    )
    for name in FIELDS[:4]:
        assert torch.equal(getattr(found, name), getattr(wanted, name))


LOGITS = normal(N, V)


@pytest.mark.parametrize(
    ("call", "error", "message"),
    [
        (lambda: score_ids(LOGITS, given().float()), TypeError, "ids"),
        (lambda: score_ids(LOGITS, given().tolist()), TypeError, "ids"),
        (lambda: score_ids(LOGITS, given()[:2]), ValueError, "ids"),
        (lambda: score_ids(LOGITS, given()[0]), ValueError, "ids"),
        (lambda: score_ids(LOGITS.long(), given()), TypeError, "logits"),
        (lambda: score_ids(LOGITS, given(), temperature=0.0), ValueError, "temperature"),
        (lambda: score_ids(LOGITS, given(), vocab_size=0), ValueError, "vocab_size"),
        (lambda: score_ids(LOGITS, given(), mask=torch.ones(N + 1) > 0), ValueError, "mask"),
        (lambda: score_ids(LOGITS, given(), token_ids=given()), ValueError, "token_ids"),
        (lambda: score_ids(LOGITS, given(), backend="none"), ValueError, "backend"),
        (
            lambda: score_ids(LinearLogits(normal(2, H), normal(V, H)), given()),
            ValueError,
            "ids",
        ),
    ],
)
def test_what_is_refused(call: Callable[[], object], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        call()

"""Bad input: a clear error that says what was given, what is allowed and what to do."""

from __future__ import annotations

import importlib.util
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from effort import some

from opd_kernels import (
    EntryGradient,
    LinearLogits,
    TopK,
    TopKReverseKL,
    backends,
    linear_topk_rkl,
    sampled_token_loss,
    select_topk,
    token_logprobs,
    topk_divergence,
    topk_rkl,
)
from opd_kernels._arguments import Allowed
from opd_kernels._autograd import Request
from opd_kernels.backends import cpu, cuda

S, T = torch.randn(4, 50), torch.randn(4, 50)
SUPPORT = TopK(torch.zeros(4, 3, dtype=torch.int32), torch.zeros(4, 3))
IDS, ENTRIES = SUPPORT.ids, SUPPORT.logits

# name: (call, error, fragments of the message: the given, the allowed or the remedy)
BAD: dict[str, tuple[Callable[[], Any], type[Exception], list[str]]] = {
    "student not a tensor": (lambda: topk_rkl([1.0], T), TypeError, ["list", "tensor"]),
    "teacher not a tensor": (lambda: topk_rkl(S, None), TypeError, ["NoneType", "tensor"]),
    "integer logits": (lambda: topk_rkl(S.long(), T), TypeError, ["int64", "float32"]),
    "complex logits": (lambda: topk_rkl(S, T + 0j), TypeError, ["complex64", "float32"]),
    "float8 logits": (
        lambda: topk_rkl(S, T.to(torch.float8_e5m2)),
        TypeError,
        ["float8", "float()"],
    ),
    "scalar logits": (lambda: topk_rkl(S[0, 0], T), ValueError, ["scalar", "(..., V)"]),
    "rows differ": (lambda: topk_rkl(S, T[:3]), ValueError, ["(3,)", "(4,)", "equal"]),
    "rows of a support differ": (lambda: topk_rkl(S, SUPPORT[:2]), ValueError, ["(2,)", "(4,)"]),
    "device differs": (lambda: topk_rkl(S, T.to("meta")), ValueError, ["meta", "cpu", "move"]),
    "support's device": (lambda: topk_rkl(S, SUPPORT.to("meta")), ValueError, ["meta", "cpu"]),
    "last stride": (lambda: topk_rkl(S.T[:4], T[:, :4]), ValueError, ["50", "contiguous()"]),
    "k zero": (lambda: topk_rkl(S, T, 0), ValueError, ["k is 0", "1 to", "50"]),
    "k negative": (lambda: select_topk(T, -1), ValueError, ["k is -1", "50"]),
    "k above vocabulary": (lambda: topk_rkl(S, T, 51), ValueError, ["k is 51", "50"]),
    "k a float": (lambda: topk_rkl(S, T, 3.0), TypeError, ["float", "int"]),
    "k differs from support": (
        lambda: topk_rkl(S, SUPPORT, 4),
        ValueError,
        ["4", "width 3", "leave"],
    ),
    "mask shape": (
        lambda: topk_rkl(S, T, mask=torch.ones(4, 1) > 0),
        ValueError,
        ["(4, 1)", "(4,)"],
    ),
    "mask floating": (lambda: topk_rkl(S, T, mask=torch.ones(4)), TypeError, ["float32", "weight"]),
    "mask a list": (lambda: topk_rkl(S, T, mask=[True] * 4), TypeError, ["list", "tensor"]),
    "weight shape": (
        lambda: topk_rkl(S, T, weight=torch.ones(4, 1)),
        ValueError,
        ["(4, 1)", "(4,)"],
    ),
    "weight integer": (
        lambda: topk_rkl(S, T, weight=torch.ones(4).int()),
        TypeError,
        ["int32", "mask"],
    ),
    "normalizer beyond a float": (
        lambda: topk_rkl(S, T, normalizer=10**400),
        ValueError,
        ["normalizer", "1329 bits"],
    ),
    "clip beyond a float": (
        lambda: sampled_token_loss(S, S, S, clip=10**400),
        ValueError,
        ["clip", "1329 bits"],
    ),
    "vocab_size beyond ids": (
        lambda: topk_rkl(S, T, vocab_size=2**70),
        ValueError,
        [f"vocab_size is {2**70}", "to 2147483647"],
    ),
    "validate beyond ids": (lambda: SUPPORT.validate(2**31), ValueError, ["to 2147483647"]),
    "banned ids sparse": (
        lambda: topk_rkl(S, T, banned_ids=torch.tensor([1]).to_sparse()),
        TypeError,
        ["banned_ids is torch.sparse_coo", "to_dense()"],
    ),
    "int8 weight": (
        lambda: linear_topk_rkl(S, T.to(torch.int8), T),
        TypeError,
        ["student_weight", "int8", "dequantise it with its scales"],
    ),
    "float8 weight": (
        lambda: LinearLogits(S, T.to(torch.float8_e4m3fn)),
        TypeError,
        ["LinearLogits weight", "float8", "dequantise it with its scales"],
    ),
    "normalizer with sum": (
        lambda: topk_rkl(S, T, reduction="sum", normalizer=3.0),
        ValueError,
        ["'sum'", "mean"],
    ),
    "normalizer not 0-d": (
        lambda: topk_rkl(S, T, normalizer=torch.ones(1)),
        ValueError,
        ["(1,)", "0-d"],
    ),
    "normalizer a string": (lambda: topk_rkl(S, T, normalizer="all"), TypeError, ["str", "number"]),
    "reduction unknown": (
        lambda: topk_rkl(S, T, reduction="avg"),
        ValueError,
        ["'avg'", "none, sum, mean"],
    ),
    "temperature zero": (lambda: topk_rkl(S, T, temperature=0.0), ValueError, ["0.0", "above 0"]),
    "temperature negative": (lambda: topk_rkl(S, T, temperature=-1), ValueError, ["-1", "above 0"]),
    "temperature nan": (
        lambda: topk_rkl(S, T, temperature=float("nan")),
        ValueError,
        ["nan", "finite"],
    ),
    "temperature inf": (
        lambda: topk_rkl(S, T, temperature=float("inf")),
        ValueError,
        ["inf", "finite"],
    ),
    "teacher temperature": (
        lambda: topk_rkl(S, T, teacher_temperature=0),
        ValueError,
        ["teacher_temperature", "above 0"],
    ),
    "temperature shape": (
        lambda: topk_rkl(S, T, temperature=torch.ones(3)),
        ValueError,
        ["temperature", "(3,)", "(4,)"],
    ),
    "temperature with gradient": (
        lambda: topk_rkl(S, T, temperature=torch.ones(4, requires_grad=True)),
        ValueError,
        ["detach()"],
    ),
    "temperature a string": (lambda: topk_rkl(S, T, temperature="1"), TypeError, ["str", "number"]),
    "vocab_size zero": (lambda: topk_rkl(S, T, vocab_size=0), ValueError, ["0", "1 or more"]),
    "vocab_size a float": (lambda: topk_rkl(S, T, vocab_size=5.0), TypeError, ["float", "int"]),
    "banned floats": (
        lambda: topk_rkl(S, T, banned_ids=torch.ones(2)),
        TypeError,
        ["float32", "int32"],
    ),
    "banned 2-D": (
        lambda: topk_rkl(S, T, banned_ids=torch.ones(2, 2).long()),
        ValueError,
        ["(2, 2)", "one dim"],
    ),
    "inplace on a leaf": (
        lambda: topk_rkl(S.clone().requires_grad_(), T, inplace_grad=True),
        ValueError,
        ["leaf", "False"],
    ),
    "inplace on a leaf of token_logprobs": (
        lambda: token_logprobs(S.clone().requires_grad_(), torch.arange(4), inplace_grad=True),
        ValueError,
        ["the logits", "a leaf", "False"],
    ),
    "inplace on expanded": (
        lambda: topk_rkl(S[:1].expand(4, 50), T, inplace_grad=True),
        ValueError,
        ["expanded", "False"],
    ),
    "backend unknown": (
        lambda: topk_rkl(S, T, backend="tpu"),
        ValueError,
        ["'tpu'", "'cpu'", "'reference'"],
    ),
    "inplace on a view of a leaf": (
        lambda: topk_rkl(
            S.clone().requires_grad_().view(2, 2, 50), T.view(2, 2, 50), inplace_grad=True
        ),
        ValueError,
        ["view of", "leaf", "False"],
    ),
    "inplace on overlapping rows": (
        lambda: topk_rkl(S.flatten().unfold(0, 50, 10), torch.randn(16, 50), inplace_grad=True),
        ValueError,
        ["overlap", "(10, 1)", "False"],
    ),
    "temperature that float32 cannot hold": (
        lambda: topk_rkl(S, T, temperature=1e-50),
        ValueError,
        ["1e-50", "1.18e-38"],
    ),
    "temperature beyond floats": (
        lambda: topk_rkl(S, T, temperature=10**400),
        ValueError,
        ["beyond what a float holds"],
    ),
    "normalizer complex": (
        lambda: topk_rkl(S, T, normalizer=torch.tensor(8j)),
        TypeError,
        ["complex64", "real"],
    ),
    "normalizer's device": (
        lambda: topk_rkl(S, T, normalizer=torch.tensor(8.0, device="meta")),
        ValueError,
        ["meta", "cpu"],
    ),
    "banned a list of floats": (
        lambda: topk_rkl(S, T, banned_ids=[9.7]),
        TypeError,
        ["float32", "int32"],
    ),
    "banned a list of flags": (
        lambda: topk_rkl(S, T, banned_ids=[True, False]),
        TypeError,
        ["bool", "int32"],
    ),
    "banned one int": (lambda: topk_rkl(S, T, banned_ids=5), TypeError, ["5", "sequence"]),
    "empty vocabulary": (lambda: topk_rkl(S[:, :0], T), ValueError, ["(4, 0)", "1 or more"]),
    "sparse logits": (lambda: topk_rkl(S, T.to_sparse()), TypeError, ["sparse_coo", "to_dense()"]),
    "backend not a name": (lambda: topk_rkl(S, T, backend=3), TypeError, ["int", "name or None"]),
    "backend empty": (lambda: topk_rkl(S, T, backend=""), ValueError, ["''", "'reference'"]),
    "the Function with a limit beyond the vocabulary": (
        lambda: TopKReverseKL.apply(S, T, 5, Request(allowed=Allowed(10**9), backend="cpu")),
        ValueError,
        ["limit", "vocabulary"],
    ),
    "the Function with rows of another shape": (
        lambda: TopKReverseKL.apply(S.view(2, 2, 50), T, 5),
        ValueError,
        ["(4,)", "(2, 2)"],
    ),
    "the Function with one row of float64 for all": (
        lambda: TopKReverseKL.apply(S.double(), T[:1].double(), 5),
        ValueError,
        ["(1,)", "(4,)"],
    ),
    "the Function with ids of another shape": (
        lambda: TopKReverseKL.apply(S.double(), T[:, :5], 5, Request(torch.zeros(1, 5).int())),
        ValueError,
        ["ids", "(1, 5)", "(4, 5)"],
    ),
    "the Function with integers": (
        lambda: TopKReverseKL.apply(S.int(), T, 5),
        ValueError,
        ["int32", "float32"],
    ),
    "the Function with complex numbers": (
        lambda: TopKReverseKL.apply(S, T.to(torch.complex64), 5),
        ValueError,
        ["complex64", "float32"],
    ),
    "the Function with a negative k": (
        lambda: TopKReverseKL.apply(S.double(), T, -1),
        ValueError,
        ["k is -1", "1 or more"],
    ),
    "float64 on the native backend": (
        lambda: topk_rkl(S.double(), T, backend="cpu"),
        ValueError,
        ["float64", "reference"],
    ),
    "k above the kernels": (
        lambda: select_topk(torch.randn(1, 2000), 1025, backend="cpu"),
        ValueError,
        ["1025", "1024"],
    ),
    "adding to a list": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_([1.0]),
        TypeError,
        ["list", "grad"],
    ),
    "adding to integers": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S.long()),
        TypeError,
        ["grad", "int64", "float32"],
    ),
    "adding across the rows": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(torch.zeros(50, 4).T),
        ValueError,
        ["grad", "stride 4", "gradients are made"],
    ),
    "adding to rows that overlap": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(torch.zeros(1, 50).expand(4, 50)),
        ValueError,
        ["overlap", "(0, 1)", "contiguous()"],
    ),
    "adding to what requires grad": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S.clone().requires_grad_()),
        ValueError,
        ["grad requires grad", "grad.detach()"],
    ),
    "ids not a tensor": (
        lambda: EntryGradient([[1]], ENTRIES).add_to_(S),
        TypeError,
        ["ids", "list", "TopKReverseKL.apply"],
    ),
    "ids of 64 bits": (
        lambda: EntryGradient(IDS.long(), ENTRIES).add_to_(S),
        TypeError,
        ["ids", "int64", "allowed is int32", "TopKReverseKL.apply"],
    ),
    "entry_grad of 16 bits": (
        lambda: EntryGradient(IDS, ENTRIES.half()).add_to_(S),
        TypeError,
        ["entry_grad", "float16", "float32 and float64"],
    ),
    "entries of other rows": (
        lambda: EntryGradient(IDS[:3], ENTRIES).add_to_(S),
        ValueError,
        ["ids", "(3, 3)", "(4,)", "these rows"],
    ),
    "entries of no rows": (
        lambda: EntryGradient(IDS[0, 0], ENTRIES[0]).add_to_(S[0]),
        ValueError,
        ["ids", "()", "1 or more"],
    ),
    "no entries": (
        lambda: EntryGradient(IDS, ENTRIES[:, :0]).add_to_(S),
        ValueError,
        ["entry_grad", "(4, 0)", "1 or more"],
    ),
    "entries of two calls": (
        lambda: EntryGradient(IDS, ENTRIES[:, :2]).add_to_(S),
        ValueError,
        ["(4, 3)", "(4, 2)", "one call"],
    ),
    "entries' device": (
        lambda: EntryGradient(IDS.to("meta"), ENTRIES).add_to_(S),
        ValueError,
        ["ids is on meta", "grad is on cpu", "move"],
    ),
    "entries with gradient": (
        lambda: EntryGradient(IDS, ENTRIES.clone().requires_grad_()).add_to_(S),
        ValueError,
        ["entry_grad.detach()"],
    ),
    "upstream a number": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S, 0.5),
        TypeError,
        ["upstream", "float", "one per row"],
    ),
    "upstream integer": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S, torch.ones(4).int()),
        TypeError,
        ["upstream", "int32", "float()"],
    ),
    "upstream shape": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S, torch.ones(())),
        ValueError,
        ["upstream", "()", "grad's leading shape (4,)"],
    ),
    "dense entries of other rows": (
        lambda: EntryGradient(IDS, ENTRIES[:2]).dense(7),
        ValueError,
        ["entry_grad", "(2, 3)", "leading shape of ids, (4,)"],
    ),
    "dense upstream shape": (
        lambda: EntryGradient(IDS, ENTRIES).dense(7, upstream=torch.ones(())),
        ValueError,
        ["upstream", "()", "ids' leading shape (4,)"],
    ),
    "dense upstream's device": (
        lambda: EntryGradient(IDS, ENTRIES).dense(7, upstream=torch.ones(4, device="meta")),
        ValueError,
        ["upstream is on meta", "ids is on cpu"],
    ),
    "upstream with gradient": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S, torch.ones(4, requires_grad=True)),
        ValueError,
        ["upstream.detach()"],
    ),
    "upstream's device": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S, torch.ones(4, device="meta")),
        ValueError,
        ["upstream is on meta", "grad is on cpu"],
    ),
    "adding in float64 on the native backend": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S.double(), backend="cpu"),
        ValueError,
        ["float64", "reference"],
    ),
    "adding on a backend that is not a name": (
        lambda: EntryGradient(IDS, ENTRIES).add_to_(S, backend=3),
        TypeError,
        ["int", "name or None"],
    ),
}


@pytest.mark.parametrize("name", list(BAD))
def test_bad_input_says_what_and_what_to_do(name: str) -> None:
    call, error, fragments = BAD[name]
    with pytest.raises(error) as caught:
        call()
    for fragment in fragments:
        assert re.search(re.escape(fragment), str(caught.value)), str(caught.value)


@pytest.mark.parametrize("bad", [0.0, -1.0, float("nan"), float("inf"), 1e-50])
def test_temperatures_that_cannot_be_checked_make_nan_in_their_rows(
    backend: str, bad: float
) -> None:
    temperature = torch.tensor([1.0, bad, 1.0, 2.0], dtype=torch.float64)
    loss = topk_rkl(S, T, 5, temperature=temperature, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [False, True, False, False]


FLAGS: dict[str, Callable[[Any], Any]] = {
    "inplace_grad": lambda flag: topk_rkl(S * 1, T, 5, inplace_grad=flag),
    "with_logsumexp": lambda flag: select_topk(T, 5, with_logsumexp=flag),
    "return_token_logprobs": lambda flag: topk_divergence(
        S, T, 5, token_ids=torch.arange(4), return_token_logprobs=flag
    ),
}


@pytest.mark.parametrize("name", FLAGS)
@pytest.mark.parametrize("flag", [torch.tensor(True), torch.tensor([0]), 1, None, "no", [True]])
def test_flags_are_true_or_false(name: str, flag: object) -> None:
    with pytest.raises(TypeError, match=rf"{name.split()[0]} is a \w+, expected True or False"):
        FLAGS[name](flag)
    for allowed in (False, np.bool_(True)):
        FLAGS[name](allowed)


STATISTICS: dict[str, Callable[[Any], Any]] = {
    "logits": lambda names: topk_rkl(S, T, 5, return_stats=names),
    "a member": lambda names: topk_divergence(S, T, 5, outside="bucket", return_stats=names),
    "a head": lambda names: linear_topk_rkl(S, T, T[:, :4], 3, return_stats=names),
}


def test_token_log_probs_need_tokens_and_logits() -> None:
    tokens = torch.zeros(S.shape[0], dtype=torch.int64)
    with pytest.raises(ValueError, match="return_token_logprobs=True needs token_ids"):
        topk_divergence(S, T, 5, return_token_logprobs=True)
    with pytest.raises(ValueError, match="token_ids"):
        token_logprobs(S, tokens[:-1])
    with pytest.raises(TypeError, match="token_ids"):
        token_logprobs(S, tokens.float())
    with pytest.raises(ValueError, match="'triton'"):
        token_logprobs(S, tokens, backend="triton")


@pytest.mark.parametrize("call", STATISTICS.values(), ids=STATISTICS)
def test_statistics_are_a_flag_or_names(call: Callable[[Any], Any]) -> None:
    for wrong in (torch.tensor(True), 1, None, "student_mass", {"student_mass"}):
        with pytest.raises(
            TypeError, match=r"return_stats is a \w+, expected True, False or names"
        ):
            call(wrong)
    for unknown in ("mass", "mask", True):
        with pytest.raises(ValueError, match=rf"{unknown!r}, allowed are 'teacher_mass', 'stud"):
            call(["valid_k", unknown])
    assert isinstance(call(np.bool_(False)), torch.Tensor)
    for names in (np.bool_(True), ["valid_k"], ("valid_k", "valid_k")):
        assert call(names)[1].valid_k is not None


def test_numpy_numbers_are_numbers() -> None:
    expected = topk_rkl(S, T, 5, temperature=2.0, normalizer=3)
    given = topk_rkl(S, T, np.int64(5), temperature=np.float32(2), normalizer=np.float64(3))
    assert torch.equal(given, expected)


def test_a_normalizer_may_be_beyond_int64() -> None:
    losses = (
        lambda n: topk_rkl(S, T, 5, normalizer=n),
        lambda n: linear_topk_rkl(S, T, T[:, :4], 3, normalizer=n),
        lambda n: sampled_token_loss(S, S, S, normalizer=n),
    )
    for loss in losses:
        assert torch.equal(loss(2**70), loss(float(2**70)))


@pytest.mark.parametrize("name", some(("e4m3fn", "e5m2", "e4m3fnuz", "e5m2fnuz", "e8m0fnu")))
def test_temperatures_and_weights_of_eight_bits_are_what_they_hold(backend: str, name: str) -> None:
    narrow = torch.tensor([1.0, 2.0, 0.5, 4.0]).to(getattr(torch, f"float8_{name}"))
    for option in ("temperature", "teacher_temperature", "weight"):
        given, expected = (
            topk_rkl(S, T, 5, reduction="none", backend=backend, **{option: tensor})
            for tensor in (narrow, narrow.float())
        )
        assert torch.equal(given, expected)


def test_k_of_one_warns_that_the_loss_is_zero() -> None:
    for teacher in (T, TopK(SUPPORT.ids[:, :1], SUPPORT.logits[:, :1])):
        k = 1 if teacher is T else None
        with pytest.warns(UserWarning, match="identically 0"):
            assert topk_rkl(S, teacher, k) == 0


def test_a_missing_module_is_named_with_the_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu.backend, "module", None)
    monkeypatch.setattr(cpu.backend, "import_error", "No module named _C")
    with pytest.raises(ValueError, match=r"compiled module is missing.*compiler.*reinstall"):
        topk_rkl(S, T, backend="cpu")


@pytest.mark.skipif(not cpu.instruction_sets(), reason="the CPU kernels are not built")
def test_a_wrong_instruction_set_names_its_variable_and_the_allowed_ones(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("OPD_KERNELS_CPU_ISA", "foo")
    loaded = importlib.util.module_from_spec(cpu.__spec__)
    cpu.__spec__.loader.exec_module(loaded)
    allowed = ", ".join(cpu.instruction_sets())
    message = f"OPD_KERNELS_CPU_ISA is 'foo', allowed on this CPU and build are {allowed};"
    with pytest.raises(ValueError, match=re.escape(message)):
        loaded.backend.select(torch.zeros(1, 9), 3, Allowed(9))


def test_without_the_module_the_reference_runs_and_says_once_why(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = topk_rkl(S, T, 5, backend="reference")
    monkeypatch.setattr(cpu.backend, "module", None)
    monkeypatch.setattr(cpu.backend, "import_error", "No module named _C")
    monkeypatch.setattr(cuda, "DEVICE", "cuda")  # and not emulated
    backends._warn_if_slow.cache_clear()
    with pytest.warns(UserWarning, match="slowly.*compiler"):
        assert torch.equal(topk_rkl(S, T, 5), expected)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        topk_rkl(S, T, 5)
    backends._warn_if_slow.cache_clear()


def test_bad_input_leaves_the_inputs_alone() -> None:
    student, teacher = S.clone(), T.clone()
    for call, _, _ in BAD.values():
        with pytest.raises((TypeError, ValueError)):
            call()
    assert torch.equal(S, student)
    assert torch.equal(T, teacher)

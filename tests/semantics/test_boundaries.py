"""What reaches a kernel's pointers: anything else is refused before, in Python and in C++."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from effort import INTERPRETED, some
from torch.utils import _pytree as pytree

from opd_kernels import (
    TopK,
    TopKReverseKL,
    _ops,
    linear_topk_rkl,
    select_topk,
    topk_rkl,
)
from opd_kernels._arguments import Allowed, Background, Objective, Temperature
from opd_kernels._autograd import Request
from opd_kernels.backends import cpu, cuda
from opd_kernels.backends.native import Native
from opd_kernels.divergences import reverse_kl

ops = torch.ops.opd_kernels
N, V, K = 6, 50, 8
# What Python refuses before any kernel, for all backends alike.
in_python = pytest.mark.skipif(INTERPRETED, reason="no kernel runs but for what is compared")


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, V, generator=generator) for _ in range(2))


# A support that was mapped over


@in_python
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.int32, torch.bool])
@pytest.mark.parametrize("form", ["logits", "hidden states"])
def test_a_support_whose_tensors_were_converted_is_refused(
    dtype: torch.dtype, form: str, backend: str
) -> None:
    student, teacher = pair()
    support = select_topk(teacher, K, backend=backend)
    converted = pytree.tree_map(lambda tensor: tensor.to(dtype), support)
    losses = {
        "logits": lambda: topk_rkl(student, converted, backend=backend),
        "hidden states": lambda: linear_topk_rkl(student, torch.ones(V, V), converted),
    }
    with pytest.raises(TypeError, match=r"TopK (ids|logits) have dtype"):
        losses[form]()


def test_a_support_of_anything_but_tensors_is_refused() -> None:
    student, teacher = pair()
    support = select_topk(teacher, K)
    shapes = pytree.tree_map(lambda tensor: tuple(tensor.shape), support)
    with pytest.raises(TypeError, match="TopK ids is a tuple"):
        topk_rkl(student, shapes)
    with pytest.raises(TypeError, match="TopK ids is a list, expected a tensor; lists go to"):
        TopK([[1]], [[0.1]])
    with pytest.raises(TypeError, match=r"TopK logsumexp have dtype torch\.bool"):
        TopK(support.ids, support.logits, torch.ones(N, dtype=torch.bool))
    with pytest.raises(TypeError, match=r"TopK logits is torch\.sparse_coo"):
        TopK(support.ids, support.logits.to_sparse())
    with pytest.raises(ValueError, match="logsumexp on meta; move one"):
        TopK(support.ids, support.logits, torch.ones(N, device="meta"))


# The public Function, whose arguments nobody has checked


def apply(backend: str, **changed: Any) -> torch.Tensor:
    allowed = Allowed(V, changed.pop("banned", None), changed.pop("mask", None))
    objective = Objective(**{name: Temperature(1.0, rows) for name, rows in changed.items()})
    request = Request(None, allowed, objective, False, backend)
    return TopKReverseKL.apply(*pair(), K, request)[0]


@in_python
@pytest.mark.parametrize("name", ["temperature", "teacher_temperature", "mask"])
def test_what_has_no_element_for_each_row_is_refused(name: str, backend: str) -> None:
    whole = torch.ones(N, dtype=torch.bool if name == "mask" else torch.float32)
    for tensor in (whole[0], whole[:-1], whole[None]):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            apply(backend, **{name: tensor})
    assert apply(backend, **{name: whole}).isfinite().all()


def test_a_limit_beyond_the_vocabulary_is_refused(backend: str) -> None:
    for limit in (V + 1, 10**9, -1):
        request = Request(allowed=Allowed(limit), backend=backend)
        with pytest.raises(ValueError, match=f"limit is {limit}"):
            TopKReverseKL.apply(*pair(), K, request)
        with pytest.raises(ValueError, match=f"limit is {limit}"):
            _ops.gather(pair()[0], torch.zeros(N, K).int(), Allowed(limit), backend)


def test_an_integer_mask_is_no_mask(backend: str) -> None:
    with pytest.raises(TypeError, match=r"mask is torch.int64, expected bool"):
        apply(backend, mask=torch.full((N,), 256))


@pytest.mark.parametrize("name", ["student", "teacher"])
def test_rows_across_the_memory_are_refused_or_read_right(name: str, backend: str) -> None:
    sides = dict(zip(("student", "teacher"), pair(), strict=True))
    request = Request(backend=backend)
    expected = TopKReverseKL.apply(*sides.values(), K, request)
    sides[name] = sides[name].T.contiguous().T
    if backend == "reference":
        found = TopKReverseKL.apply(*sides.values(), K, request)
        assert all(map(torch.equal, found, expected))
        return
    with pytest.raises(ValueError, match="must be adjacent"):
        TopKReverseKL.apply(*sides.values(), K, request)


@in_python
@pytest.mark.parametrize(
    "name",
    [
        "teacher",
        "allowed_mask",
        "objective_temperature_rows",
        "objective_teacher_temperature_rows",
        "allowed_banned",
        "objective_weights",
    ],
)
def test_tensors_elsewhere_are_refused(name: str, backend: str) -> None:
    student, teacher = pair()
    arguments = {
        "student": student,
        "teacher": teacher,
        "k": K,
        "allowed_limit": V,
        "allowed_banned": torch.zeros(8, dtype=torch.uint8),
        "allowed_mask": torch.ones(N, dtype=torch.bool),
        "objective_temperature_value": 1.0,
        "objective_temperature_rows": torch.ones(N),
        "objective_teacher_temperature_value": 1.0,
        "objective_teacher_temperature_rows": torch.ones(N),
    }
    arguments |= {
        f"objective_divergence_{field}": value for field, value in reverse_kl()._asdict().items()
    }
    weights = torch.tensor([1.0, 0, 0, 0]).expand(N, 4)
    arguments |= {"objective_weights": weights, "objective_outside": "renormalize"}
    arguments |= {"backend": backend}
    assert ops.select_divergence(**arguments)[0].isfinite().all()
    # The dispatcher traces a call with a meta tensor: the results are memory nobody has written.
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        ops.select_divergence(**arguments | {name: arguments[name].to("meta")})


@pytest.mark.parametrize(
    "name", ["teacher", "mask", "temperature", "teacher_temperature", "banned"]
)
def test_operators_refuse_tensors_elsewhere_themselves(name: str, backend: str) -> None:
    student, teacher = pair()
    rows = {"mask": torch.ones(N, dtype=torch.bool), "banned": torch.zeros(8, dtype=torch.uint8)}
    rows |= {"temperature": torch.ones(N), "teacher_temperature": torch.ones(N), "teacher": teacher}
    rows |= {name: rows[name].to("meta")}
    allowed = Allowed(V, rows["banned"], rows["mask"])
    objective = Objective(
        Temperature(1.0, rows["temperature"]), Temperature(1.0, rows["teacher_temperature"])
    )
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        _ops.OPERATORS["select_divergence"].impl(
            student, rows["teacher"], K, allowed, objective, backend
        )


@pytest.mark.parametrize("name", ["scatter", "scatter_add_", "gather_dot", "read_linear"])
def test_operators_trace_no_call_whose_tensors_are_apart(name: str, backend: str) -> None:
    ids, entries, hidden = torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, K), torch.ones(N, 4)
    meta = torch.ones(N, device="meta")
    arguments = {
        "scatter": (entries, ids, meta, V, torch.float32, backend),
        "scatter_add_": (torch.zeros(N, V), entries, ids, meta, backend),
        "gather_dot": (hidden, torch.ones(V, 4), meta, ids, V, None, None, backend),
        "read_linear": (
            hidden, torch.ones(V, 4), meta, 1.0, None, K, V, None, None, 0, 1.0, None, None, False,
            None, backend,
        ),
    }  # fmt: skip
    with pytest.raises(ValueError, match="is on meta"):
        getattr(ops, name)(*arguments[name])


@pytest.mark.parametrize(
    "banned",
    [
        torch.zeros(8),
        torch.zeros(1, dtype=torch.int64),
        torch.zeros(16, dtype=torch.uint8)[::2],
        torch.zeros(16, dtype=torch.uint8)[1:9],
        torch.zeros(1, 8, dtype=torch.uint8),
        torch.zeros(7, dtype=torch.uint8),
        torch.zeros(0, dtype=torch.uint8),
    ],
    ids=["float", "int64", "strided", "misaligned", "rows", "part of a word", "empty"],
)
def test_banned_ids_that_are_no_bitmap_are_refused(banned: torch.Tensor, backend: str) -> None:
    with pytest.raises(ValueError, match="the bitmap of banned ids is"):
        apply(backend, banned=banned)
    head = torch.ones(N, 4), torch.ones(V, 4), None
    with pytest.raises(ValueError, match="the bitmap of banned ids is"):
        ops.gather_dot(*head, torch.zeros(N, K, dtype=torch.int32), V, banned, None, backend)


@pytest.mark.parametrize("shape", [(3,), (V, 1), (), (V + 1,)])
def test_a_bias_that_is_not_of_the_weight_is_refused(shape: tuple[int, ...], backend: str) -> None:
    head = torch.ones(N, 4), torch.ones(V, 4), torch.ones(shape)
    with pytest.raises(ValueError, match="bias has shape"):
        ops.gather_dot(*head, torch.zeros(N, K, dtype=torch.int32), V, None, None, backend)
    with pytest.raises(ValueError, match="bias has shape"):
        ops.read_linear(
            *head, 1.0, None, K, V, None, None, 0, 1.0, None, None, False, None, backend
        )


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_of_a_heads_logits_are_refused(dtype: torch.dtype, backend: str) -> None:
    upstream, ids = torch.ones(N, K, dtype=dtype), torch.zeros(N, K, dtype=torch.int32)
    with pytest.raises(TypeError, match="upstream has dtype"):
        ops.gather_dot_hidden(upstream, ids, torch.ones(V, 4), torch.float32, backend)
    with pytest.raises(TypeError, match="upstream has dtype"):
        ops.gather_dot_weight(upstream, ids, torch.ones(N, 4), V, torch.float32, backend)


# What backward gets from saved-tensor hooks


@in_python
@pytest.mark.parametrize(
    ("kind", "dtype"),
    [("ids", torch.int64), ("entry_grad", torch.float16), ("entry_grad", torch.bfloat16)],
)
@pytest.mark.parametrize("inplace", [False, True])
def test_saved_tensors_that_a_hook_converted_are_refused(
    kind: str, dtype: torch.dtype, inplace: bool, backend: str
) -> None:
    student, teacher = pair()
    leaf = student.requires_grad_()
    wanted = torch.int32 if kind == "ids" else torch.float32

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        small = tensor.shape == (N, K) and tensor.dtype == wanted
        return tensor.to(dtype) if small else tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = topk_rkl(leaf * 1, teacher, K, inplace_grad=inplace, backend=backend)
    with pytest.raises(TypeError, match=f"{kind} has dtype {dtype}, allowed"):
        loss.backward()


@pytest.mark.parametrize("name", ["scatter", "scatter_", "scatter_add_"])
def test_entries_that_do_not_fit_are_refused(name: str, backend: str) -> None:
    ids, entries = torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, K)
    upstream, out = torch.ones(N), torch.zeros(N, V)

    def call(**changed: torch.Tensor) -> None:
        given = {"entry_grad": entries, "ids": ids, "upstream": upstream} | changed
        if name == "scatter":
            ops.scatter(*given.values(), V, torch.float32, backend)
        elif name == "scatter_":
            _ops.scatter_(out, *given.values(), Background(), backend)
        else:
            ops.scatter_add_(out, *given.values(), backend)

    call()
    for changed, error in (
        ({"ids": ids.long()}, TypeError),
        ({"entry_grad": entries.half()}, TypeError),
        ({"entry_grad": entries[:, 1:]}, ValueError),
        ({"upstream": upstream[1:]}, ValueError),
        ({"upstream": upstream[0]}, ValueError),
    ):
        with pytest.raises(error):
            call(**changed)


# Values


@pytest.mark.parametrize(
    "dtype", some((torch.float16, torch.bfloat16, torch.float32, torch.float64), 2)
)
@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan, 0.0, -1.0])
def test_a_temperature_that_is_not_allowed_makes_nan_in_every_dtype(
    dtype: torch.dtype, value: float, backend: str
) -> None:
    student, teacher = pair()
    temperature = torch.ones(N, dtype=dtype)
    temperature[2] = value
    loss = topk_rkl(student, teacher, K, temperature=temperature, reduction="none", backend=backend)
    assert loss.isnan().tolist() == [row == 2 for row in range(N)]


# The compiled modules


def calls(backend: Native) -> list[tuple[Any, ...]]:
    """What a module must not take, integers as values or floats as ids: operator and arguments."""
    floats, ints = torch.zeros(N, V), torch.zeros(N, V, dtype=torch.int32)
    values, ids = torch.zeros(N, K), torch.zeros(N, K, dtype=torch.int32)
    memory = torch.zeros(N, K).data_ptr()
    rows = [backend._rows(tensor) for tensor in (floats, ints, values, ids)]
    floats, ints, values, ids = rows
    allowed, objective = backend._allowed(Allowed(V), N), backend._objective(Objective())
    results = memory, memory, memory
    return [
        ("select", ints, allowed, K, memory, memory),
        ("gather", ints, ids, allowed, memory, memory),
        ("gather", floats, values, allowed, memory, memory),
        ("select_divergence", ints, floats, allowed, K, objective, *results),
        ("select_divergence", floats, ints, allowed, K, objective, *results),
        ("entry_divergence", floats, values, values, allowed, objective, *results),
        ("entry_divergence", floats, ids, ids, allowed, objective, *results),
        ("scatter", ints, *results, K, "clear"),
    ]


NATIVES = {"cpu": cpu.backend, **({"cuda": cuda.backend} if cuda.DEVICE == "cpu" else {})}


@pytest.mark.parametrize("name", NATIVES)
def test_compiled_modules_take_values_as_floats_and_ids_as_integers(name: str) -> None:
    for operator, *arguments in calls(NATIVES[name]):
        with pytest.raises(ValueError, match="integers"):
            NATIVES[name]._launch(operator, torch.device("cpu"), *arguments)


def test_operators_refuse_a_support_without_entries(backend: str) -> None:
    ids, values, allowed = torch.zeros(N, 0, dtype=torch.int32), torch.zeros(N, 0), Allowed(4)
    hidden = torch.ones(N, 4)
    calls = (
        lambda: _ops.gather(hidden, ids, allowed, backend),
        lambda: _ops.gather_dot(hidden, hidden.new_ones(4, 4), None, ids, allowed, backend),
        lambda: _ops.entry_divergence(hidden, values, ids, allowed, Objective(), backend),
    )
    for call in calls:
        with pytest.raises(ValueError, match=r"ids have shape \(\d+, 0\), expected 1 or more"):
            call()

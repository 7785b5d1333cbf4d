"""What reaches a kernel's pointers: anything else is refused before, in Python and in C++."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch.utils import _pytree as pytree

from opd_kernels import TopK, TopKReverseKL, _ops, linear_topk_rkl, select_topk, topk_rkl
from opd_kernels.backends import _native, cpu, cuda

ops = torch.ops.opd_kernels
N, V, K = 6, 50, 8


def pair() -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return tuple(torch.randn(N, V, generator=generator) for _ in range(2))


# A support that was mapped over


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
    student, teacher = pair()
    arguments = {
        "student": student,
        "anchor": student[..., :0],
        "teacher": teacher,
        "teacher_ids": None,
        "mask": None,
        "row_temperature": None,
        "row_teacher_temperature": None,
        "banned": None,
        "temperature": 1.0,
        "teacher_temperature": 1.0,
        "k": K,
        "limit": V,
        "inplace": False,
        "backend": backend,
    }
    return TopKReverseKL.apply(*(arguments | changed).values())[0]


@pytest.mark.parametrize("name", ["row_temperature", "row_teacher_temperature", "mask"])
def test_what_has_no_element_for_each_row_is_refused(name: str, backend: str) -> None:
    whole = torch.ones(N, dtype=torch.bool if name == "mask" else torch.float32)
    for tensor in (whole[0], whole[:-1], whole[None]):
        with pytest.raises(ValueError, match=f"{name} has shape"):
            apply(backend, **{name: tensor})
    assert apply(backend, **{name: whole}).isfinite().all()


@pytest.mark.parametrize(
    "name", ["teacher", "mask", "row_temperature", "row_teacher_temperature", "banned"]
)
def test_tensors_elsewhere_are_refused(name: str, backend: str) -> None:
    student, teacher = pair()
    arguments = {
        "student": student,
        "teacher": teacher,
        "teacher_ids": None,
        "k": K,
        "limit": V,
        "banned": torch.zeros(8, dtype=torch.uint8),
        "mask": torch.ones(N, dtype=torch.bool),
        "temperature": 1.0,
        "row_temperature": torch.ones(N),
        "teacher_temperature": 1.0,
        "row_teacher_temperature": torch.ones(N),
        "backend": backend,
    }
    assert _ops._divergence(**arguments)[0].isfinite().all()
    elsewhere = arguments | {name: arguments[name].to("meta")}
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        _ops._divergence(**elsewhere)
    # The dispatcher traces a call with a meta tensor: the results are memory nobody has written.
    with pytest.raises(ValueError, match=f"{name} is on meta"):
        ops.divergence(**elsewhere)


@pytest.mark.parametrize("name", ["scatter", "scatter_add_", "gather_dot", "select_linear"])
def test_operators_trace_no_call_whose_tensors_are_apart(name: str, backend: str) -> None:
    ids, entries, hidden = torch.zeros(N, K, dtype=torch.int32), torch.zeros(N, K), torch.ones(N, 4)
    meta = torch.ones(N, device="meta")
    arguments = {
        "scatter": (entries, ids, meta, V, torch.float32, backend),
        "scatter_add_": (torch.zeros(N, V), entries, ids, meta, backend),
        "gather_dot": (hidden, torch.ones(V, 4), meta, ids, V, None, None, backend),
        "select_linear": (
            hidden, torch.ones(V, 4), meta, 1.0, None, K, V, None, None, False, backend,
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
        ops.select_linear(*head, 1.0, None, K, V, None, None, False, backend)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_gradients_of_a_heads_logits_are_refused(dtype: torch.dtype, backend: str) -> None:
    upstream, ids = torch.ones(N, K, dtype=dtype), torch.zeros(N, K, dtype=torch.int32)
    with pytest.raises(TypeError, match="upstream has dtype"):
        ops.gather_dot_hidden(upstream, ids, torch.ones(V, 4), torch.float32, backend)
    with pytest.raises(TypeError, match="upstream has dtype"):
        ops.gather_dot_weight(upstream, ids, torch.ones(N, 4), V, torch.float32, backend)


# What backward gets from saved-tensor hooks


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
        else:
            getattr(ops, name)(out, *given.values(), backend)

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


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
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


def rows(module: Any, tensor: torch.Tensor) -> Any:
    return _native._rows(module, tensor)


def cpu_call(name: str, **arguments: Any) -> None:
    getattr(cpu._C, name)(threads=1, instruction_set=cpu.INSTRUCTION_SET, **arguments)


def calls(module: Any) -> list[tuple[str, Callable[[], dict[str, Any]]]]:
    """What a module must not take: integers as values, floats as ids."""
    floats, ints = torch.zeros(N, V), torch.zeros(N, V, dtype=torch.int32)
    values, ids = torch.zeros(N, K), torch.zeros(N, K, dtype=torch.int32)
    memory = torch.zeros(N, K).data_ptr()
    allowed, temperature = module.Allowed(V), module.Temperature(1.0)
    out = {"loss": memory, "out_ids": memory, "entry_grad": memory}
    both = {"temperature": temperature, "teacher_temperature": temperature}

    def divergence(student: torch.Tensor, teacher: torch.Tensor, given: Any) -> dict[str, Any]:
        return {
            "student": rows(module, student),
            "teacher": rows(module, teacher),
            "ids": None if given is None else rows(module, given),
            "allowed": allowed,
            "k": K,
            **both,
            **out,
        }

    entries = {"ids": memory, "entry_grad": memory, "upstream": memory, "k": K, "mode": "clear"}
    select = {"allowed": allowed, "k": K, "ids": memory, "values": memory}
    return [
        ("select", lambda: {"logits": rows(module, ints), **select}),
        ("divergence", lambda: divergence(ints, floats, None)),
        ("divergence", lambda: divergence(floats, ints, None)),
        ("divergence", lambda: divergence(floats, values, values)),
        ("divergence", lambda: divergence(floats, ids, ids)),
        ("scatter", lambda: {"out": rows(module, ints), **entries}),
    ]


@pytest.mark.parametrize("name", ["cpu", "cuda"])
def test_compiled_modules_take_values_as_floats_and_ids_as_integers(name: str) -> None:
    if name == "cuda" and cuda.DEVICE != "cpu":
        pytest.skip("the kernels are not emulated in this run")
    module = cpu._C if name == "cpu" else cuda._C
    backend = cpu if name == "cpu" else cuda
    for function, arguments in calls(module):
        with pytest.raises(ValueError, match="integers"):
            backend._launch(function, torch.device("cpu"), **arguments())

"""Operators that PyTorch knows by name, made of functions of values that travel whole.

A value such as ``Allowed`` is a named tuple. PyTorch's schema is flat: ``register`` derives it from
the function's types, and takes values apart and puts them together again.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple, get_type_hints

import torch
from torch import Tensor

from opd_kernels._arguments import (
    Allowed,
    Background,
    Head,
    Objective,
    Question,
    Reading,
    Tail,
    Tails,
    Temperature,
    Wanted,
)
from opd_kernels._checks import check_buffer, check_same_device
from opd_kernels.divergences import Divergence

# What all rows share, which vmap cannot map.
_SHARED = {
    "banned": "banned_ids",
    "weight": "a head's weight (student_weight, or that of a LinearLogits)",
    "bias": "a head's bias (student_bias, or that of a LinearLogits)",
}


def mapped(info: Any, in_dims: Sequence[Any], args: Sequence[Any], names: Sequence[str]) -> Any:
    """The arguments with their mapped dimension as one more leading dimension."""
    return [
        _leading(arg, dim, name, info) for arg, dim, name in zip(args, in_dims, names, strict=True)
    ]


def _leading(arg: Any, dim: Any, name: str, info: Any) -> Any:
    if isinstance(arg, tuple):
        fields: Any = arg
        return type(arg)(*mapped(info, dim, arg, fields._fields))
    if name in _SHARED:
        if dim is not None:
            raise ValueError(
                f"{_SHARED[name]} cannot be mapped by vmap: all rows of a call share one; map the "
                "rest with in_dims None there, or call the loss for each and torch.stack the losses"
            )
        return arg
    if not isinstance(arg, Tensor):
        return arg
    return arg.expand(info.batch_size, *arg.shape) if dim is None else arg.movedim(dim, 0)


def _mapped_out(out: Tensor, dim: int | None, info: Any) -> Tensor:
    """What ``scatter_add_`` adds to: it must be mapped, without overlap."""
    if dim is None:
        raise ValueError("grad is not mapped by vmap, but what is added to it is; map grad as well")
    return check_buffer(out.movedim(dim, 0))


_LIBRARY = torch.library.Library("opd_kernels", "DEF")
_TAGS = (torch.Tag.pt2_compliant_tag, torch.Tag.needs_exact_strides)
_TYPES = {
    Tensor: "Tensor",
    Tensor | None: "Tensor?",
    int: "SymInt",
    float: "float",
    float | None: "float?",
    float | Tensor: "float",  # a divergence's weight; rows have theirs in ``Objective.weights``
    bool: "bool",
    str: "str",
    torch.dtype: "ScalarType",
}
_WHOLE = (
    Allowed,
    Background,
    Divergence,
    Head,
    Objective,
    Question,
    Reading,
    Tail,
    Tails,
    Temperature,
    Wanted,
)


class Operator(NamedTuple):
    """``impl``, the shapes of its results for tracing, their names, whether vmap may map rows.

    An argument ``out`` is written to.
    """

    impl: Callable[..., Any]
    fake: Callable[..., Any]
    results: str
    by_rows: bool = False


def register(name: str, record: Operator) -> Callable[..., Any]:
    """Defines an operator; returns it as a function of values that travel whole."""
    hints = get_type_hints(record.impl)
    hints.pop("return")
    leaves = dict(leaf for item in hints.items() for leaf in _leaves(*item))
    names = tuple(leaves)
    schema = ", ".join(
        f"Tensor(a!) {leaf}" if leaf == "out" else f"{_TYPES[hint]} {leaf}"
        for leaf, hint in leaves.items()
    )
    _LIBRARY.define(f"{name}({schema}) -> ({record.results})", tags=_TAGS)
    overload = getattr(torch.ops.opd_kernels, name).default
    # As source text, so that a call costs what it would if somebody had written it out.
    whole = ", ".join(_whole(*item) for item in hints.items())
    apart = ", ".join(field for item in hints.items() for field in _apart(*item))
    types = {hint.__name__: hint for hint in _WHOLE}
    together = eval(f"lambda {', '.join(names)}: ({whole},)", types)
    impl = eval(f"lambda {', '.join(names)}: impl({whole})", types | {"impl": record.impl})
    call = eval(f"lambda {', '.join(hints)}: overload({apart})", {"overload": overload})

    def fake(*args: Any, **kwargs: Any) -> Any:
        named = dict(zip(names, args, strict=False)) | kwargs
        tensors = {key: value for key, value in named.items() if isinstance(value, Tensor)}
        first = next(iter(tensors.values()))
        # One meta tensor is enough for the dispatcher to trace a call, whose results would then be
        # memory that nobody has written.
        for key, tensor in tensors.items():
            if tensor.device != first.device:
                check_same_device(tensor, first.device, key, "the other tensors are")
        return record.fake(*together(**named))

    def by_rows(info: Any, in_dims: tuple[Any, ...], *values: Any) -> tuple[Any, Any]:
        args, dims = together(*values), together(*in_dims)
        moved = mapped(info, dims, args, tuple(hints))
        if "out" in hints:
            moved[0] = _mapped_out(args[0], dims[0], info)
            call(*moved)
            return None, None
        results = call(*moved)
        return results, 0 if isinstance(results, Tensor) else (0,) * len(results)

    _LIBRARY.impl(name, impl, "CompositeExplicitAutograd")
    torch.library.register_fake(f"opd_kernels::{name}", fake, lib=_LIBRARY)
    if record.by_rows:
        torch.library.register_vmap(f"opd_kernels::{name}", by_rows, lib=_LIBRARY)
    return call


def _leaves(name: str, hint: Any) -> Iterator[tuple[str, Any]]:
    """(name, type) of the arguments of the flat schema that an argument becomes."""
    if hint not in _WHOLE:
        yield name, hint
        return
    for field, inner in get_type_hints(hint).items():
        yield from _leaves(f"{name}_{field}", inner)


def _whole(name: str, hint: Any) -> str:
    """The expression that puts an argument together: Allowed(allowed_limit, ...)."""
    if hint not in _WHOLE:
        return name
    fields = (_whole(f"{name}_{field}", inner) for field, inner in get_type_hints(hint).items())
    return f"{hint.__name__}({', '.join(fields)})"


def _apart(path: str, hint: Any) -> Iterator[str]:
    """The expressions of the leaves of an argument: allowed[0], ..."""
    if hint not in _WHOLE:
        yield path
        return
    for i, inner in enumerate(get_type_hints(hint).values()):
        yield from _apart(f"{path}[{i}]", inner)

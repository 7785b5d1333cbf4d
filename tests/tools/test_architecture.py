"""Which module imports which, and how many arguments a function takes: docs/design.md, checked."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

import opd_kernels

PACKAGE = Path(opd_kernels.__file__).parent
FILES = sorted(PACKAGE.rglob("*.py"))
# What a module may import of the package. Modules that are not named here are free.
VALUES = {"_arguments", "divergences"}
ALLOWED = {
    "divergences": set(),
    "_arguments": {"divergences"},
    "_checks": {"divergences"},
    "_ordering": set(),
    "_payload": set(),
    "_signature": set(),
    "reference": {"_ordering", "backends", *VALUES},
    "support": {"_checks", "_ordering", "_payload", *VALUES},
    "head": {"_checks", *VALUES},
    "debugging": {"_checks", "_ordering", *VALUES},
    "_library": {"_checks", *VALUES},
    "_operands": {"_checks", *VALUES},
    "_linear_ops": {"_checks", "_library", "_operands", "backends", "debugging", *VALUES},
    "_ops": {"_checks", "_library", "_linear_ops", "_operands", "backends", "debugging", *VALUES},
    "_autograd": {"_checks", "_library", "_ops", "_signature", "backends", *VALUES},
    "_linear_autograd": {
        "_autograd", "_library", "_ops", "_signature", "backends", *VALUES,
    },
    "_shard_autograd": {"_autograd", "_checks", "_linear_autograd", "_ops", *VALUES},
    "distributed": {"_checks", "head", "support", *VALUES},
    "_collectives": {"backends", "debugging", "distributed"},
    "_shards": {
        "_collectives", "_linear_autograd", "_ops", "_ordering", "_shard_autograd", "backends",
        "distributed", "head", *VALUES,
    },
    # Of distributed a type only.
    "options": {"_checks", "backends", "debugging", "distributed", *VALUES},
    "selection": {
        "_checks", "_collectives", "_ops", "_ordering", "_shards", "distributed", "head", "options",
        "support", *VALUES,
    },
    "stats": {"_ordering", *VALUES},
    "sides": {
        "_autograd", "_ops", "_ordering", "_shards", "debugging", "distributed", "head", "options",
        "selection", "stats", "support", *VALUES,
    },
    "linear": {
        "_autograd", "_linear_autograd", "_ops", "_ordering", "_shards", "distributed", "head",
        "options", "sides", "stats", *VALUES,
    },
    "entries": {
        "_autograd", "_checks", "_collectives", "_linear_autograd", "_shards", "backends",
        "distributed", "head", "linear", "options", "selection", "sides", "stats", "support",
        *VALUES,
    },
    "backends": VALUES,
}  # fmt: skip


def name_of(file: Path) -> str:
    """The first part of a module's name within the package."""
    return file.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imported(file: Path) -> Iterator[str]:
    """Full names of what a file imports of the package."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name.startswith("opd_kernels"))
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opd_kernels"):
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("name", ALLOWED)
def test_a_module_imports_what_the_design_says(name: str) -> None:
    found = {
        module.split(".")[1] for file in FILES if name_of(file) == name for module in imported(file)
    }
    assert found - {name} <= ALLOWED[name]


def test_backends_do_not_import_each_other() -> None:
    kinds = {"cpu", "cuda", "triton"}
    for file in (PACKAGE / "backends").rglob("*.py"):
        own = set(file.relative_to(PACKAGE / "backends").parts) | {file.stem}
        for module in imported(file):
            assert not (set(module.split(".")) & kinds) - own, f"{file} imports {module}"


def positional(file: Path) -> Iterator[tuple[str, int]]:
    """(function, how many arguments it takes by position)."""
    for node in ast.walk(ast.parse(file.read_text())):
        if isinstance(node, ast.FunctionDef):
            jitted = any("jit" in ast.unparse(mark) for mark in node.decorator_list)
            if not jitted:
                yield node.name, len(node.args.posonlyargs) + len(node.args.args)


def test_no_function_takes_more_than_seven_arguments_by_position() -> None:
    long = {
        f"{file.relative_to(PACKAGE)}: {name}": count
        for file in FILES
        for name, count in positional(file)
        if count > 7
    }
    assert not long

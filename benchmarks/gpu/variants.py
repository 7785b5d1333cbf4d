"""The CUDA kernels with one choice changed at a time: built once, switched at run time.

    python benchmarks/gpu/variants.py FOLDER [ARCH]    # builds the module; prints where it is

``variants.cu`` holds the choices. A run on a GPU times them beside "product", in turn, and decides
what reading could not. Neither nvcc nor a GPU nor torch is needed to import this file.
"""

from __future__ import annotations

import importlib.util
import runpy
import shlex
import subprocess
import sys
import sysconfig
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

if TYPE_CHECKING:
    import torch
    from torch import Tensor

    from opd_kernels.backends.native import Native

ROOT = Path(__file__).resolve().parents[2]
SOURCE = Path(__file__).resolve().with_name("variants.cu")
MODULE = "_cuda_variants"
# (multiprocessors, bytes of shared memory of each, clusters of 2, 3, ... 8 blocks at once)
Properties = tuple[int, int, tuple[int, ...]]


@dataclass(frozen=True)
class Variant:
    """One choice that differs from the product's.

    ``predicted`` is the time beside the product's in percent, least and most, of the part that the
    variant changes, for 8192 x 151936 bfloat16 and K = 64 on an H100. ``complete`` says whether
    the loss and the gradients are computed, and not only a part of the work's results.
    """

    decides: str
    predicted: tuple[float, float]
    part: str = "forward"  # or "backward"
    complete: bool = True


VARIANTS = {
    "product": Variant("what all others are compared with", (0, 0)),
    "stream": Variant(
        "what a row costs beyond its read: group keys alone are made", (-6, -3), complete=False
    ),
    "select": Variant(
        "what the divergence costs: ids and values alone are made", (-2, -1), complete=False
    ),
    "groups_64": Variant("whether smaller groups, read again, pay for more keys", (0.5, 1.5)),
    "threads_256": Variant("whether blocks at fewer stages overlap less", (0, 1)),
    "threads_512": Variant("the same, with 2 blocks a multiprocessor", (0.5, 3)),
    "threads_1024": Variant("the same, with 1 block: nothing hides its choosing", (3, 6)),
    "loads_cached": Variant("whether L2 keeps lines for the groups read again", (-0.5, 0.5)),
    "loads_past_l1": Variant("whether loads that leave L1 alone are faster", (-0.5, 0.5)),
    "one_chunk": Variant("whether loads of groups in flight at once pay", (0, 1)),
    "pieces_256k": Variant("whether a gradient's pieces should be larger", (-1, 1), "backward"),
    "stores_streaming": Variant("whether zeros should leave L2 first", (-1, 2), "backward"),
}
NAMES = tuple(VARIANTS)


def build(
    folder: Path, arch: str = "90a", include: str | None = None, suffix: str | None = None
) -> Path:
    """Compiles the module for one architecture, with setup.py's flags; returns where it is.

    ``include`` (the folder of Python.h) and ``suffix`` (as ``sysconfig`` has it in ``EXT_SUFFIX``)
    are those of another Python than the running one.
    """
    import setuptools

    with mock.patch.object(setuptools, "setup"):
        commands = runpy.run_path(str(ROOT / "setup.py"))
    module = commands["cuda_module"]()
    compile = [word for word in module.nvcc if not word.startswith("-gencode")]
    compile += [*commands["gencode"]([arch]), *includes(include)]
    link = commands["compiler"](), commands["quoted"](module.link)
    target = f"{MODULE}{suffix or sysconfig.get_config_var('EXT_SUFFIX')}"
    lines = [
        "rule compile",
        f"  command = {commands['quoted'](compile)} -MMD -MF $out.d -c $in -o $out",
        "  depfile = $out.d",
        "  deps = gcc",
        "rule link",
        f"  command = {link[0]} -shared $in {link[1]} -o $out",
        f"build variants.o: compile {SOURCE}",
        f"build {target}: link variants.o",
        "",
    ]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "build.ninja").write_text("\n".join(lines))
    subprocess.run([*commands["ninja_command"](), "--quiet"], cwd=folder, check=True)
    return folder / target


def includes(python: str | None = None) -> list[str]:
    """Where pybind11 and Python have their headers."""
    import pybind11

    folders = pybind11.get_include(), python or sysconfig.get_paths()["include"]
    return [word for folder in folders for word in ("-isystem", folder)]


class Variants:
    """The variants of a module that was built."""

    def __init__(self, module: Any, properties: Callable[[int], Properties] | None = None) -> None:
        """Takes a device's properties from the product unless told otherwise."""
        self._module = module
        self._properties = properties

    def select_divergence(
        self, variant: str, student: Tensor, teacher: Tensor, k: int
    ) -> tuple[Tensor, Tensor, Tensor]:
        """(loss, ids, entry gradients); a variant that is not complete sets some of them."""
        from opd_kernels._arguments import Allowed, Objective

        allowed = Allowed(min(student.shape[-1], teacher.shape[-1]))
        backend = self._backend(variant)
        return backend.select_divergence(student, teacher, k, allowed, Objective())

    def scatter_(
        self, variant: str, out: Tensor, entry_grad: Tensor, ids: Tensor, upstream: Tensor
    ) -> None:
        """The dense gradient into memory that holds anything."""
        self._backend(variant).scatter_(out, entry_grad, ids, upstream)

    def _backend(self, variant: str) -> Native:
        from opd_kernels.backends.native import Native

        if variant not in VARIANTS:
            raise ValueError(f"there is no variant {variant!r}; there are {', '.join(NAMES)}")
        module, device_of = self._module, self._device

        class Backend(Native):
            def _launch(self, operator: str, device: torch.device, *arguments: Any) -> None:
                how = module.Variant(variant, device_of(device))
                getattr(module, operator)(how, *arguments)

        return Backend(module)

    def _device(self, device: Any) -> Any:
        import torch

        index, stream = 0, 0
        if device.type == "cuda":
            index = torch.cuda.current_device() if device.index is None else device.index
            stream = torch.cuda.current_stream(device).cuda_stream
        properties = self._properties
        if properties is None:
            from opd_kernels.backends import cuda

            properties = cuda._properties
        return self._module.Device(index, *properties(index), stream)


def load(path: Path, properties: Callable[[int], Properties] | None = None) -> Variants:
    """The variants of a module that ``build`` made."""
    spec = importlib.util.spec_from_file_location(MODULE, path)
    if spec is None or spec.loader is None:
        raise ImportError(f"{path} is no module")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return Variants(module, properties)


def main() -> None:
    """Builds the module in a folder."""
    if len(sys.argv) not in (2, 3):
        raise SystemExit(f"usage: {shlex.join(['python', sys.argv[0]])} FOLDER [ARCH]")
    print(build(Path(sys.argv[1]), *sys.argv[2:]))


if __name__ == "__main__":
    main()

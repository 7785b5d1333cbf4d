"""The kernels' variants for measuring compute what the product does, bit by bit, and compile."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path
from types import ModuleType

import cubins
import emulated
import pytest
import torch
from emulation.build import FLAGS, build
from test_cuda import BF16, FP32, rows, same

from opd_kernels._arguments import Allowed, Objective
from opd_kernels.backends import cuda

FILE = Path(__file__).resolve().parents[2] / "benchmarks" / "gpu" / "variants.py"


def module() -> ModuleType:
    spec = importlib.util.spec_from_file_location("variants", FILE)
    assert spec is not None
    assert spec.loader is not None
    found = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = found  # dataclasses look there
    spec.loader.exec_module(found)
    return found


variants = module()
FORWARD = [name for name, variant in variants.VARIANTS.items() if variant.part == "forward"]
emulation = pytest.mark.skipif(cuda.DEVICE != "cpu", reason="the kernels are not emulated here")


@pytest.fixture(scope="module")
def built() -> variants.Variants:
    kind = emulated.KIND if emulated.KIND in FLAGS else "plain"
    (path,) = build(kind, variants.MODULE, (FILE.with_suffix(".cu"),)).glob("*.so")
    gpu = emulated.MULTIPROCESSORS, cuda.backend.module.shared_bytes(0), (0,) * 7
    return variants.load(path, lambda index: gpu)


def test_there_are_few_variants_and_the_product_is_among_them() -> None:
    assert variants.NAMES[0] == "product"
    assert len(variants.NAMES) <= 12
    for name, variant in variants.VARIANTS.items():
        assert variant.part in ("forward", "backward")
        assert variant.predicted[0] <= variant.predicted[1], name


@emulation
@pytest.mark.parametrize("variant", FORWARD)
@pytest.mark.parametrize(("vocab", "k"), [(5000, 64), (20_001, 64), (3000, 300)])
def test_a_variant_has_the_product_s_bits(
    variant: str, vocab: int, k: int, built: variants.Variants
) -> None:
    # Ties, too many candidates, and a row whose values all differ.
    teacher, student = rows(3, vocab, offset=3), rows(3, vocab, BF16, seed=1)
    teacher[0].round_()
    teacher[1].sign_()
    expected = cuda.backend.select_divergence(student, teacher, k, Allowed(vocab), Objective())
    ours = built.select_divergence(variant, student, teacher, k)
    if variants.VARIANTS[variant].complete:
        assert same([*ours], [*expected])
    elif variant == "select":
        assert same([ours[1]], [expected[1]])
        assert same([ours[2]], [teacher.float().gather(1, expected[1].long())])
    else:
        assert variant == "stream"
        assert not same([*ours], [*expected])


@emulation
@pytest.mark.parametrize("variant", variants.NAMES)
def test_a_gradient_has_the_product_s_bits(variant: str, built: variants.Variants) -> None:
    outs = [rows(2, 150_000, offset=5) for _ in range(2)]
    ids = torch.stack([torch.randperm(150_000)[:64] for _ in outs[0]]).int()
    entries, upstream = torch.randn(ids.shape), torch.randn(2)
    cuda.backend.scatter_(outs[0], entries, ids, upstream)
    built.scatter_(variant, outs[1], entries, ids, upstream)
    assert torch.equal(*outs)


@emulation
def test_what_variants_do_not_take_raises(built: variants.Variants) -> None:
    student, teacher = rows(1, 300, FP32), rows(1, 300, FP32)
    with pytest.raises(ValueError, match="in bfloat16"):
        built.select_divergence("product", student, teacher, 9)
    with pytest.raises(ValueError, match="no variant 'fast'"):
        built.select_divergence("fast", student, teacher.bfloat16(), 9)
    with pytest.raises(ValueError, match="in bfloat16"):
        built.scatter_("product", student, torch.ones(1, 1), torch.zeros(1, 1).int(), torch.ones(1))


def test_importing_needs_neither_torch_nor_nvcc() -> None:
    code = f"import runpy, sys; runpy.run_path({str(FILE)!r}); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True, env={"PATH": ""})


@pytest.mark.skipif(not cubins.available(), reason="there is no nvcc")
def test_variants_compile_for_an_h100_without_spills() -> None:
    source = FILE.with_suffix(".cu")
    codes = cubins.listed(source, cubins.FOLDER / "variants", "90a", variants.includes())
    names = [code.name for code in codes if "support" not in code.name]
    assert len(names) == 8  # stream, select, four divergences, two gradients
    for code in codes:
        assert (code.stack, code.local) == (0, 0), code.name
        assert code.registers <= 64, code.name
        assert not code.opcodes("LDL", "STL"), code.name

    def opcodes(kernel: str, tuning: str, prefix: str) -> list[str]:
        (code,) = (code for code in codes if kernel in code.name and tuning in code.name)
        return code.opcodes(prefix)

    assert {"LDG.E.EF.128"} == wide(opcodes("divergence", "Product", "LDG"))
    assert {"LDG.E.128"} == wide(opcodes("divergence", "CachedLoads", "LDG"))
    assert {"LDG.E.NA.128.CONSTANT"} == wide(opcodes("divergence", "LoadsPastL1", "LDG"))
    counts = [len(opcodes("divergence", name, "LDG.E.EF.128")) for name in ("OneChunk", "Product")]
    assert counts[0] == counts[1] - 2 * 3  # where groups are listed, and where they are stored
    assert {"STG.E.128"} == wide(opcodes("scatter", "Product", "STG"))
    assert {"STG.E.EF.128"} == wide(opcodes("scatter", "StreamingStores", "STG"))


def wide(opcodes: list[str]) -> set[str]:
    """Those that move 16 bytes."""
    return {opcode for opcode in opcodes if ".128" in opcode}

"""What nvcc makes of the CUDA kernels: registers, local memory, widths of loads, blocks that fit.

``python tests/helpers/cubins.py`` prints the numbers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import NamedTuple

import cubins
import pytest
import sass
from emulation.plan import GPUS, plan

pytestmark = pytest.mark.skipif(not cubins.available(), reason="there is no nvcc")

ROWS, WIDTH = 8192, 151936
# Threads that a multiprocessor holds: as many as the plan counts on where k is what it usually is,
# and enough to cover the latency of memory in any case.
PLANNED, LEAST = 1024, 256
BYTES_IN_FLIGHT = 32 * 1024
TILES_AT_ONCE = 8  # of 16 bytes for a thread
CHUNKS_AT_ONCE = 4  # the same, of groups that are read again
# Instructions of the streaming loop, which is two loads of tiles, whole or not, and five steps of
# maxima, none of which needs all: what they are and a tenth more.
STREAMING = {"Float16": 230, "BFloat16": 230, "Float32": 260}
# What the sum of integers in shared memory becomes; floats, whose order tells, become others.
ATOMICS = {"ATOMS.ADD", "ATOMS.POPC.INC"}
BRANCHES = ("BRA", "BRX", "BSSY", "BSYNC", "WARPSYNC", "CALL", "RET", "EXIT")


def check(code: sass.Code) -> None:
    check_memory_and_calls(code)
    if code.name.startswith(("select", "divergence")):
        check_streaming(code)
        check_rereading(code)
    if code.name.startswith("scatter"):
        check_clearing(code)


def check_memory_and_calls(code: sass.Code) -> None:
    what = f"{code.name}: {code.stack} bytes of stack, {code.local} local, {code.shared} shared"
    assert (code.stack, code.local, code.shared) == (0, 0, 0), what
    assert not code.opcodes("LDL", "STL"), what
    assert not code.calls(), f"{code.name}: {code.calls()}"
    atomics = {op for op in code.opcodes("ATOM", "RED") if not op.startswith("REDUX")}
    assert atomics <= ATOMICS, f"{code.name}: {atomics}"


def check_streaming(code: sass.Code) -> None:
    """The loop over a row has all loads of a turn, 16 bytes each, in flight before it needs one."""
    body, kind = cubins.streaming_loop(code), code.name.split("<")[1].rstrip(">")
    assert body, f"{code.name}: no loop over a row"
    loop = [instruction.opcode for instruction in body]
    loads = {op for op in loop if op.startswith(("LDG", "LD."))}
    assert all(op.endswith(".128") for op in loads), f"{code.name}: {loads}"
    maxima = [op for op in loop if cubins.is_maximum(op)]
    assert all(is_packed(op, kind) for op in maxima), f"{code.name}: {maxima}"
    first = loop.index(maxima[0])
    assert not loads & set(loop[first:]), f"{code.name}: a maximum before a load"
    for path in straight(body):
        # Of two short paths the compiler makes one, with guards.
        for guard, count in Counter(i.guard for i in path if i.opcode in loads).items():
            assert count == TILES_AT_ONCE, f"{code.name}: {count} loads at once {guard}"
    assert len(body) <= STREAMING[kind], f"{code.name}: {len(body)} instructions"


def check_rereading(code: sass.Code) -> None:
    """The groups' chunks are loaded all at once, in one straight run, where they are read again.

    That is where they are listed and, if they are too many, where they are stored. Only the
    divergence asks for the student's values before it needs them.
    """
    streaming = set(cubins.streaming_loop(code))
    at_once = [
        loads
        for path in straight(list(code.instructions))
        if (loads := [i for i in path if i.opcode == "LDG.E.EF.128" and i not in streaming])
        and len(loads) > 1
    ]
    counts = [len(loads) for loads in at_once]
    assert counts == [CHUNKS_AT_ONCE] * 2, f"{code.name}: {counts} loads at once of what is listed"
    for first, *others in at_once:
        used = {register(first), *map(register, others)}
        assert len(used) == CHUNKS_AT_ONCE, f"{code.name}: loads at once that share registers"
    prefetches = bool(code.opcodes("CCTL.E.PF2"))
    assert prefetches == code.name.startswith("divergence"), f"{code.name}: prefetches {prefetches}"


def register(load: sass.Instruction) -> str:
    """Where what is loaded goes."""
    return load.operands.split(",")[0].strip()


def straight(body: list[sass.Instruction]) -> Iterator[list[sass.Instruction]]:
    """What lies between branches."""
    path: list[sass.Instruction] = []
    for instruction in body:
        if instruction.opcode.startswith(BRANCHES):
            yield path
            path = []
        else:
            path.append(instruction)
    yield path


def is_packed(opcode: str, kind: str) -> bool:
    """Whether a maximum is of two halves at once, or of floats where there are no halves."""
    name, *modifiers = opcode.split(".")
    if kind == "Float32":
        return name in {"FMNMX", "FMNMX3"} and "NAN" in modifiers
    bfloat = any(modifier.startswith("BF16") for modifier in modifiers)
    return name in {"HMNMX2", "VHMNMX"} and "NAN" in modifiers and bfloat == (kind == "BFloat16")


def check_clearing(code: sass.Code) -> None:
    """The loops that only store do so by 16 bytes."""
    clearing = [
        [op for op in loop if op.startswith(("ST.", "STG"))]
        for loop in code.loops()
        if any(op.startswith(("ST.", "STG")) for op in loop)
        and not any(op.startswith(("LD.", "LDG")) for op in loop)
    ]
    assert clearing, f"{code.name}: no loop of stores"
    for stores in clearing:
        assert all(op.startswith("STG") and op.endswith(".128") for op in stores), stores


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[int, str], sass.Code]:
    return cubins.compiled()


@pytest.fixture(params=cubins.ARCHITECTURES)
def on_arch(
    request: pytest.FixtureRequest, kernels: dict[tuple[int, str], sass.Code]
) -> tuple[int, dict[str, sass.Code]]:
    """An architecture and the kernels compiled for it."""
    arch = request.param
    found = {name: code for (its, name), code in kernels.items() if its == arch}
    assert len(found) == 11
    return arch, found


OnArch = tuple[int, dict[str, sass.Code]]


def test_kernels_load_and_store_as_they_should_and_call_nothing(on_arch: OnArch) -> None:
    for code in on_arch[1].values():
        check(code)


@pytest.mark.parametrize("itemsize", [2, 4])
@pytest.mark.parametrize("k", [32, 64, 128, 1024])
def test_planned_blocks_fit_a_multiprocessor(on_arch: OnArch, itemsize: int, k: int) -> None:
    arch, found = on_arch
    cut = plan(ROWS, WIDTH, k, itemsize, GPUS[arch])
    assert (cut.tiles_at_once, cut.chunks_at_once) == (TILES_AT_ONCE, CHUNKS_AT_ONCE)
    for name, code in found.items():
        if name.startswith(("select", "divergence")) and cubins.itemsize(code) == itemsize:
            assert code.registers <= 64, name  # a block may have 1024 threads
            blocks = sass.resident_blocks(arch, cut.threads, code.registers, cut.shared)
            what = f"{name}: {blocks} blocks of {cut.threads} threads"
            assert blocks * cut.threads >= PLANNED, what
            assert blocks * cut.threads * 16 * TILES_AT_ONCE >= BYTES_IN_FLIGHT, what


@pytest.mark.parametrize("k", [32, 64, 128, 1024])
def test_small_blocks_fill_more_than_half_a_multiprocessor(on_arch: OnArch, k: int) -> None:
    arch, found = on_arch
    cut = plan(ROWS, WIDTH, k, 2, GPUS[arch])
    for name, code in found.items():
        if name.startswith(("gather", "scatter", "support")):
            # A large support is limited by shared memory, and its rows by how far ids lie apart.
            shared = cut.support_shared if name.startswith("support") else 0
            least = PLANNED if shared < 8 * 1024 else LEAST
            blocks = sass.resident_blocks(arch, 128, code.registers, shared)
            assert blocks * 128 >= least, f"{name}: {blocks} blocks of {code.registers} registers"


# Whether the checks would notice


class Change(NamedTuple):
    """A change of the sources, and what a check says of it."""

    file: str
    before: str
    after: str
    kernel: str
    says: str


ENTRY = "float value = upstream * args.entry_grad[row * args.k + i];"
CHANGES = {
    "spilled registers": Change(
        "select.cuh",
        "__launch_bounds__(kMaxThreads, 1)",
        "__launch_bounds__(kMaxThreads, 2)",
        "select_kernel<BFloat16>",
        "bytes of stack",
    ),
    "narrow loads": Change(
        "tuning.cuh",
        "return __ldcs(address);",
        "const auto* at = reinterpret_cast<const uint2*>(address);"
        "const uint2 a = __ldcs(at), b = __ldcs(at + 1);"
        "return uint4{a.x, a.y, b.x, b.y};",
        "select_kernel<BFloat16>",
        "LDG.E.EF.64",
    ),
    "one chunk of what is listed at a time": Change(
        "tuning.cuh",
        "static constexpr int kChunksAtOnce = 4;",
        "static constexpr int kChunksAtOnce = 1;",
        "select_kernel<BFloat16>",
        "loads at once of what is listed",
    ),
    "scalar maxima": Change(
        "device.cuh",
        'asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(larger) : "r"(a), "r"(b));',
        "const float x = fmaxf(BFloat16::widen(a & 0xffff), BFloat16::widen(b & 0xffff));"
        "const float y = fmaxf(BFloat16::widen(a >> 16), BFloat16::widen(b >> 16));"
        "larger = (float_to_bits(x) >> 16) | (float_to_bits(y) & 0xffff0000u);",
        "select_kernel<BFloat16>",
        "FMNMX",
    ),
    "narrow stores": Change(
        "tuning.cuh",
        "*address = value;",
        "auto* half = reinterpret_cast<uint2*>(address); half[0] = half[1] = uint2{0, 0};",
        "scatter_kernel<BFloat16>",
        "STG.E.64",
    ),
    "atomics": Change(
        "scatter.cuh",
        ENTRY,
        ENTRY + " atomicAdd(const_cast<float*>(args.upstream), value);",
        "scatter_kernel<BFloat16>",
        "RED.*F32",
    ),
    "a print": Change(
        "scatter.cuh",
        ENTRY,
        ENTRY + ' printf("%d", i);',
        "scatter_kernel<BFloat16>",
        "stack",
    ),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_worse_kernel_is_noticed(name: str) -> None:
    change = CHANGES[name]
    folder = cubins.FOLDER / "worse" / name.replace(" ", "_")
    for path in [*cubins.CSRC.glob("c*/*.h"), *cubins.CSRC.glob("cuda/*.cu*")]:
        text = path.read_text()
        if path.name == change.file:
            assert text.count(change.before) == 1
            text = text.replace(change.before, change.after)
        cubins.write(folder / "csrc" / path.relative_to(cubins.CSRC), text)
    source = change.kernel.split("_")[0]
    code = cubins.compiled(folder / "csrc", folder, (90,), (source,))[90, change.kernel]
    with pytest.raises(AssertionError, match=change.says):
        check(code)

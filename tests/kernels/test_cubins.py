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
TILES_WITH_TAIL = 4
CHUNKS_AT_ONCE = 4  # the same, of groups that are read again
# Instructions of the streaming loop, which is two loads of tiles, whole or not, and five steps of
# maxima, none of which needs all: what they are and a tenth more.
STREAMING = {"Float16": 230, "BFloat16": 230, "Float32": 260}
# Of the loops over a gradient's background: instructions for 16 bytes, 10 for a half, and (loads,
# stores) of a turn.
BACKGROUND = 80
BACKGROUND_TURNS = {(4, 4), (1, 1), (4, 2), (2, 1)}
# With a tail: the same for 32 elements, or 16, of which each takes five instructions more, or seven
# with the entropy.
WITH_TAIL = {
    "false, Float16": 435, "false, BFloat16": 435, "false, Float32": 335,
    "true, Float16": 540, "true, BFloat16": 540, "true, Float32": 400,
}  # fmt: skip
# What the sum of integers in shared memory becomes; floats, whose order tells, become others.
ATOMICS = {"ATOMS.ADD", "ATOMS.POPC.INC"}
BRANCHES = ("BRA", "BRX", "BSSY", "BSYNC", "WARPSYNC", "CALL", "RET", "EXIT")


def check(code: sass.Code) -> None:
    check_memory_and_calls(code)
    if code.name.startswith(("select", "divergence")):
        check_streaming(code)
        check_rereading(code, 2)
    if code.name.startswith("tail"):
        check_streaming(code)
        check_exponentials(code)
        check_rereading(code, 3)
    if code.name.startswith("scatter"):
        check_clearing(code)
    if code.name.startswith("background"):
        check_background(code)


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
    tiles, most = (TILES_WITH_TAIL, WITH_TAIL) if kind in WITH_TAIL else (TILES_AT_ONCE, STREAMING)
    assert body, f"{code.name}: no loop over a row"
    loop = [instruction.opcode for instruction in body]
    loads = {op for op in loop if op.startswith(("LDG", "LD."))}
    assert all(op.endswith(".128") for op in loads), f"{code.name}: {loads}"
    maxima = [op for op in loop if cubins.is_maximum(op)]
    if kind.startswith("true, "):  # each distance below a maximum is clamped
        maxima = maxima[: -loop.count("MUFU.EX2")] if "Float32" in kind else maxima
        maxima = [op for op in maxima if "Float32" in kind or not op.startswith("FMNMX")]
    assert all(is_packed(op, kind.split()[-1]) for op in maxima), f"{code.name}: {maxima}"
    first = loop.index(maxima[0])
    assert not loads & set(loop[first:]), f"{code.name}: a maximum before a load"
    for path in straight(body):
        # Of two short paths the compiler makes one, with guards.
        for guard, count in Counter(i.guard for i in path if i.opcode in loads).items():
            assert count == tiles, f"{code.name}: {count} loads at once {guard}"
    assert len(body) <= most[kind], f"{code.name}: {len(body)} instructions"


def check_exponentials(code: sass.Code) -> None:
    """One instruction for each exponential of the streaming loop, and nothing that scales it."""
    loop = [instruction.opcode for instruction in cubins.streaming_loop(code)]
    elements = TILES_WITH_TAIL * 16 // cubins.itemsize(code)
    assert loop.count("MUFU.EX2") == elements, code.name
    with_entropy = "true" in code.name
    products = [op for op in loop if op.startswith(("FMUL", "FFMA"))]
    assert len(products) <= elements * (2 if with_entropy else 1), f"{code.name}: {products}"


def check_rereading(code: sass.Code, places: int) -> None:
    """The groups' chunks are loaded all at once, in one straight run, where they are read again.

    That is where they are listed, where they are stored if they are too many, and where a tail's
    sums leave ids out. Only the divergence asks for the student's values before it needs them.
    """
    streaming = set(cubins.streaming_loop(code))
    at_once = [
        loads
        for path in straight(list(code.instructions))
        if (loads := [i for i in path if i.opcode == "LDG.E.EF.128" and i not in streaming])
        and len(loads) > 1
    ]
    counts = [len(loads) for loads in at_once]
    assert counts == [CHUNKS_AT_ONCE] * places, (
        f"{code.name}: {counts} loads at once of what is listed"
    )
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


def check_background(code: sass.Code) -> None:
    """Loops with powers of 2 read and write 16 bytes at a time, with few instructions.

    All loads of a turn are in flight before one is needed. Where logits and gradient are aligned
    differently, a chunk is cut out of two.
    """
    chunk, loads_of_turn = 16 // cubins.itemsize(code), set()
    for body in code.bodies():
        loop = [instruction.opcode for instruction in body]
        if "MUFU.EX2" not in loop:
            continue
        loads = [op for op in loop if op.startswith(("LDG", "LD."))]
        stores = [op for op in loop if op.startswith(("STG", "ST."))]
        memory = {"LDG.E.EF.128", "STG.E.128"}
        assert {*loads, *stores} == memory, f"{code.name}: {loads} {stores}"
        elements = len(stores) * chunk
        assert loop.count("MUFU.EX2") == elements
        assert len(loads) in (len(stores), 2 * len(stores))
        assert not set(loads) & set(loop[loop.index("MUFU.EX2") :]), f"{code.name}: a load too late"
        loads_of_turn.add((len(loads), len(stores)))
        if len(stores) > 1:
            used = len(body) / len(stores)
            assert used <= BACKGROUND, f"{code.name}: {used} instructions a chunk"
    what = f"{code.name}: loads and stores of turns {loads_of_turn}"
    assert loads_of_turn == BACKGROUND_TURNS, what


@pytest.fixture(scope="module")
def kernels() -> dict[tuple[int, str], sass.Code]:
    return cubins.built()


@pytest.fixture(params=cubins.ARCHITECTURES)
def on_arch(
    request: pytest.FixtureRequest, kernels: dict[tuple[int, str], sass.Code]
) -> tuple[int, dict[str, sass.Code]]:
    """An architecture and the kernels compiled for it."""
    arch = request.param
    found = {name: code for (its, name), code in kernels.items() if its == arch}
    assert len(found) == 22
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
    assert cut.tiles_at_once_with_tail == TILES_WITH_TAIL
    for name, code in found.items():
        tiles, shape = TILES_AT_ONCE, (cut.threads, cut.shared)
        if name.startswith("tail"):
            of_tail = cut.with_entropy if "true" in name else cut.with_tail
            tiles, shape = TILES_WITH_TAIL, (of_tail.threads, of_tail.shared)
        elif not name.startswith(("select", "divergence")):
            continue
        if cubins.itemsize(code) == itemsize:
            assert code.registers <= 64, name  # a block may have 1024 threads
            threads, shared = shape
            blocks = sass.resident_blocks(arch, threads, code.registers, shared)
            what = f"{name}: {blocks} blocks of {threads} threads"
            assert blocks * threads >= PLANNED, what
            assert blocks * threads * 16 * tiles >= BYTES_IN_FLIGHT, what


@pytest.mark.parametrize("k", [32, 64, 128, 1024])
def test_small_blocks_fill_more_than_half_a_multiprocessor(on_arch: OnArch, k: int) -> None:
    arch, found = on_arch
    cut = plan(ROWS, WIDTH, k, 2, GPUS[arch])
    for name, code in found.items():
        if name.startswith(("gather", "scatter", "background", "support", "full")):
            # A large support is limited by shared memory, and its rows by how far ids lie apart.
            # The others take less than 512 bytes more than the reverse KL.
            given = name.startswith(("support", "full"))
            shared = cut.support_shared + 512 if given else 0
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
    "a background by half of a chunk": Change(
        "background.cuh",
        "Tuning::store(to + i * kBackgroundThreads, background.of_chunk(chunks[i]));",
        "{const uint4 a = background.of_chunk(chunks[i]);"
        "auto* half = reinterpret_cast<uint2*>(to + i * kBackgroundThreads);"
        "half[0] = uint2{a.x, a.y}; half[1] = uint2{a.z, a.w};}",
        "background_kernel<BFloat16>",
        "STG.E.64",
    ),
    "a background with an exact exponential": Change(
        "background.cuh",
        "power_of_2((z - middle) * factor) * scale",
        "exp2f((z - middle) * factor) * scale",
        "background_kernel<BFloat16>",
        "instructions a chunk",
    ),
    "a chunk of a background at a time": Change(
        "background.cuh",
        "constexpr int kTurns = kShifted ? 2 : 4,",
        "constexpr int kTurns = 1,",
        "background_kernel<BFloat16>",
        "loads and stores of turns",
    ),
    "a tail that scales its exponentials": Change(
        "tail.cuh",
        "const float power = power_of_2(below * factor_);",
        "const float power = power_of_2(below * factor_ * 0.5f);",
        "tail_kernel<false, Float32>",
        "FMUL",
    ),
    "groups of a tail that are waited for one by one": Change(
        "tail.cuh",
        "if (row.is_whole(chunk)) loaded[j] = row.load_whole(chunk);",
        "if (row.is_whole(chunk)) loaded[j] = row.load_whole(chunk); __syncwarp();",
        "tail_kernel<false, BFloat16>",
        "loads at once of what is listed",
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
    source = folder / "csrc" / "cuda" / f"{change.kernel.split('_')[0]}.cu"
    found = [cubins.named(code, 90) for code in cubins.listed(source, folder, "90", [])]
    (code,) = (code for code in found if code.name == change.kernel)
    with pytest.raises(AssertionError, match=change.says):
        check(code)

"""The steps of a run on a GPU, in the order of what they are worth.

A step is a function of measure.py, in a process that imported everything before its turn came, or
a command. Neighbours that are ``beside`` run at the same time; the others have the GPU for
themselves, because they time. Estimates are for 16 cores and an H100 and not measured yet.
"""

from __future__ import annotations

from dataclasses import dataclass, field

# What a part may take in all, in seconds; ``--seconds`` says otherwise.
SECONDS = {1: 360.0, 2: 240.0}
SANITIZER_EXIT = 99
TOOLS = ("memcheck", "racecheck", "synccheck")
BACKENDS = ("cuda", "triton")
PIECES = ("few rows", "many rows")
WIDTHS = (16, 64, 1024)  # the K with which every kernel is run first
OUTSIDE = ("renormalize", "truncate", "bucket", "generalize", "sample")
HEADS = "hidden states"
FAMILY_WIDTH = 64
# How pytest picks the tests of a dtype; the K for which the differential suite runs Triton.
DTYPES = {"float32": "float32", "float16": "float16 and not bfloat16", "bfloat16": "bfloat16"}
DIFFERENTIAL_WIDTHS = (1, 64, 1024)
TRITON_PIECES = {
    "real shapes": "real_shapes",
    "sanitized": "sanitized",
    "selection": "(selection or few_rows or row_does_not)",
}
# Or the suite's conftest.py puts an emulation in the place of the CUDA backend.
NO_EMULATION = {"OPD_KERNELS_EMULATED": "none"}
SELF = ("{python}", "benchmarks/gpu", "--device", "{device}")
RAW = ("{python}", "benchmarks/gpu/raw.py", "--device", "{device}")
GPU_TESTS = (
    "tests/kernels/test_gpu.py",
    "tests/kernels/test_gpu_family.py",
    "tests/kernels/test_gpu_linear.py",
    "tests/kernels/test_gpu_shards.py",
)
SANITIZER_OPTIONS = ("--error-exitcode", str(SANITIZER_EXIT))
PYTEST = ("{python}", "-m", "pytest", "-p", "no:cacheprovider", "-vv", "-rfEs", "--tb=short")


@dataclass(frozen=True)
class Step:
    """Something to run, what it takes in seconds, and after how many it is stopped.

    In a command {python}, {device}, {work} (the folder of logs) and {sanitizer} are filled in.
    """

    name: str
    estimate: float
    limit: float
    measure: str = ""
    command: tuple[str, ...] = ()
    environment: dict[str, str] = field(default_factory=dict)
    beside: bool = False
    needs_gpu: bool = False
    counts: bool = False  # a run that says it tested nothing has failed
    fatal: bool = False  # nothing after it makes sense if it fails
    proves: str = ""  # a backend that hangs or loses the GPU here is not measured later


def runs(piece: str, backend: str, k: int) -> Step:
    """Every kernel of a backend on small inputs, against float64."""
    command = (*SELF, "--correct", f"{piece},{backend},{k}")
    name = f"runs: {backend}, K={k}, {piece}"
    return Step(name, 40, 60, command=command, beside=True, proves=backend)


def family(backend: str, outside: str) -> Step:
    """Every member with one treatment of what is outside of the support, against float64."""
    command = (*SELF, "--correct", f"{outside},{backend},{FAMILY_WIDTH}")
    return Step(f"family: {backend}, {outside}", 30, 60, command=command, beside=True)


def gpu_tests(file: str, backend: str, label: str = "", some: str = "") -> Step:
    """The tests on GPU tensors of one backend, or some of them."""
    others = " and ".join(f"not {name}" for name in BACKENDS if name != backend)
    return Step(
        ", ".join(filter(None, (f"tests: {file}", backend, label))),
        estimate=80,
        limit=110,
        command=(
            *PYTEST,
            f"tests/kernels/{file}.py",
            "-k",
            " and ".join(filter(None, (others, some))),
        ),
        environment=NO_EMULATION | {"OPD_KERNELS_GPU_BACKENDS": ",".join(BACKENDS)},
        beside=True,
        needs_gpu=True,
        counts=True,
    )


def triton_tests() -> tuple[Step, ...]:
    """Those of Triton, which mostly compile, in pieces beside each other."""
    rest = " and ".join(f"not {some}" for some in TRITON_PIECES.values())
    pieces = TRITON_PIECES | {"the rest": rest}
    return tuple(gpu_tests("test_gpu", "triton", *piece) for piece in pieces.items())


def sanitized(tool: str) -> Step:
    """compute-sanitizer on the CUDA kernels, called with raw pointers."""
    return Step(
        f"{tool}: cuda",
        estimate=30,
        limit=75,
        command=("{sanitizer}", "--tool", tool, *SANITIZER_OPTIONS, *RAW),
        beside=True,
        needs_gpu=True,
    )


def differential(backend: str, dtype: str) -> Step:
    """The differential suite with a backend's tensors on the device; of Triton fewer kernels."""
    some = DTYPES[dtype]
    if backend == "triton":
        some += f" and ({' or '.join(f'triton-{k}-' for k in DIFFERENTIAL_WIDTHS)})"
    return Step(
        f"differential: {backend}, {dtype}",
        estimate=60,
        limit=90,
        command=(*PYTEST, "tests/semantics/test_differential.py", "-k", f"{backend} and {some}"),
        environment={"OPD_KERNELS_TEST_DEVICE": "{device}"},
        beside=True,
        needs_gpu=True,
        counts=True,
    )


def fuzz(backend: str, minutes: float = 0.5) -> Step:
    """The fuzzer on a backend."""
    command = ("{python}", "-m", "opd_kernels.fuzz", "--backend", backend, "--device", "{device}")
    return Step(
        f"fuzz: {backend}",
        estimate=60 * minutes + 10,
        limit=60 * minutes + 40,
        command=(*command, "--minutes", str(minutes), "--output", "{work}"),
        beside=True,
        needs_gpu=True,
        counts=True,
    )


def capture(backend: str) -> Step:
    """A process whose first launch is captured into a graph."""
    return Step(
        f"first launch captured: {backend}",
        estimate=15,
        limit=45,
        command=("{python}", "benchmarks/gpu/capture.py", backend),
        beside=True,
        needs_gpu=True,
    )


PACKAGE = Step("package", 10, 150, command=(*SELF, "--package"), fatal=True)
MACHINE = Step("machine", 4, 30, measure="machine")
# In part 2 most is in Triton's cache already.
WARM = Step("warm: triton", 20, 75, command=(*SELF, "--warm"), beside=True)
HEADLINE = Step("headline", 25, 60, measure="headline")
# With torch, whose allocations then have ends of their own: minutes.
SANITIZED_TRITON = Step(
    "memcheck: triton",
    estimate=200,
    limit=600,
    command=(
        *("{sanitizer}", "--tool", "memcheck", "--report-api-errors", "no", *SANITIZER_OPTIONS),
        *(*PYTEST, *GPU_TESTS, "-k", "sanitized and triton"),
    ),
    environment=NO_EMULATION | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"},
    beside=True,
    needs_gpu=True,
    counts=True,
)

PARTS: dict[int, tuple[Step, ...]] = {
    1: (
        PACKAGE,
        MACHINE,
        *(runs(piece, name, k) for name in BACKENDS for k in WIDTHS for piece in PIECES),
        WARM,
        HEADLINE,
        Step("few rows", 12, 60, measure="few_rows"),
        Step("host", 5, 30, measure="host"),
        Step("headline, other K", 25, 60, measure="other_widths"),
        Step("variants: cuda", 20, 60, measure="cuda_variants"),
        Step("variants: triton", 10, 60, measure="triton_variants"),
        Step("linear", 35, 75, measure="linear_headline"),
        Step("variants: linear", 15, 60, measure="linear_variants"),
        Step("profile", 35, 75, measure="profile"),
        gpu_tests("test_gpu", "cuda"),
        *triton_tests(),
        gpu_tests("test_gpu_linear", "triton"),
        *(gpu_tests("test_gpu_family", name) for name in BACKENDS),
    ),
    2: (
        PACKAGE,
        MACHINE,
        *(family(backend, outside) for backend in BACKENDS for outside in OUTSIDE),
        family("triton", HEADS),
        WARM,
        HEADLINE,
        Step("family", 25, 60, measure="family"),
        Step("family, eager peers", 10, 45, measure="family_peers"),
        Step("full softmaxes from hidden states", 15, 60, measure="full_heads"),
        Step("raw pointers: cuda", 5, 30, command=RAW, beside=True),
        *map(sanitized, TOOLS),
        *(differential(backend, dtype) for backend in BACKENDS for dtype in DTYPES),
        *map(fuzz, BACKENDS),
        Step("family, compiled peers", 30, 90, measure="compiled_family_peers"),
        Step("shapes", 30, 75, measure="shapes"),
        # With more time than a part is given by default.
        *map(capture, BACKENDS),
        gpu_tests("test_gpu_shards", "cuda"),
        Step("unusual rows", 25, 60, measure="unusual"),
        Step("careful eager", 12, 45, measure="careful_eager"),
        Step("compiled peers", 40, 90, measure="compiled_peers"),
        Step("naive eager", 20, 90, measure="naive_eager"),
        Step("more shapes", 60, 300, measure="more_shapes"),
        Step("linear, everything", 240, 900, measure="linear_everything"),
        SANITIZED_TRITON,
    ),
}


def groups(steps: tuple[Step, ...]) -> list[list[Step]]:
    """The steps in order; those that run at the same time together."""
    together: list[list[Step]] = []
    for step in steps:
        if step.beside and together and together[-1][0].beside:
            together[-1].append(step)
        else:
            together.append([step])
    return together


def estimate(group: list[Step], slots: int) -> float:
    """Seconds that a group takes on so many cores."""
    total = sum(step.estimate for step in group)
    return max(total / slots, max(step.estimate for step in group))

"""One suite for every backend: a test that takes ``backend`` runs on each that this machine has.

The CUDA backend is among them, its kernels emulated (emulated.py). Under ``TRITON_INTERPRET=1``
such tests alone run, on the Triton backend. Guard bands surround all that these two allocate. With
``OPD_KERNELS_TEST_DEVICE=cuda`` such tests alone run, on the backends that serve that device.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator
from pathlib import Path

import bridge
import emulated
import guards
import pytest
import torch
from effort import INTERPRETED, examples
from hypothesis import HealthCheck, settings

from opd_kernels import backends
from opd_kernels.backends import cpu, cuda, triton

# Tests against a trainer's own package run in that trainer's environment: `make test-peers`.
collect_ignore = [] if "OPD_KERNELS_PEER" in os.environ else ["peers"]

CPU = torch.device("cpu")
# A call that every backend takes on its device.
FLOAT32 = (torch.device(bridge.DEVICE or "cpu"), (torch.float32,), 1)

if emulated.POSSIBLE and not INTERPRETED and not bridge.DEVICE:
    emulated.install()

# Programs that tests start find the helpers, too.
HELPERS = str(Path(bridge.__file__).parent)
os.environ["PYTHONPATH"] = os.pathsep.join(filter(None, [HELPERS, os.environ.get("PYTHONPATH")]))

settings.register_profile(
    "suite",
    max_examples=examples(100),
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("suite")


def names_of_backends() -> list[str]:
    """Those that the suite runs on."""
    names = [name for name in backends.MODULES if backends.load(name).refusal(*FLOAT32) is None]
    if bridge.DEVICE:
        return [name for name in names if name != "cpu"]
    return ["triton"] if INTERPRETED else names


def pytest_configure() -> None:
    # A suite that silently tests the reference alone would be worth nothing.
    reason = cpu.backend.unavailable()
    if reason is not None:
        raise pytest.UsageError(f"the native CPU backend is not there: {reason}")
    # A sanitized run has to test the sanitized build and no other.
    wanted = os.environ.get("OPD_KERNELS_EXPECT", "")
    file = cpu.backend.module.__file__
    if wanted not in file:
        raise pytest.UsageError(f"the tests run on {file}, expected it under {wanted}")
    warnings.filterwarnings("ignore", message="k=1: a support of one entry")
    warnings.filterwarnings("ignore", message='reverse KL with outside="truncate"')
    if bridge.DEVICE:
        if names_of_backends() == ["reference"]:
            raise pytest.UsageError(f"no kernels for {bridge.DEVICE}: {triton.refusal(*FLOAT32)}")
        try:
            bridge.build(torch.device(bridge.DEVICE))
        except (RuntimeError, AssertionError) as error:
            raise pytest.UsageError(f"the device {bridge.DEVICE} is not there: {error}") from error


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        import interpreter

        interpreter.speed_up()
    if INTERPRETED or bridge.DEVICE:
        wanted = {"backend", "linear_backend", "kernel_backend"}
        wanted |= {"careful"} if INTERPRETED else set()
        kept = [item for item in items if wanted & set(getattr(item, "fixturenames", ()))]
        if bridge.DEVICE:
            kept = [item for item in kept if item.originalname not in bridge.LEFT_OUT]
        config.hook.pytest_deselected(items=[item for item in items if item not in kept])
        items[:] = kept


LINEAR = [name for name in names_of_backends() if backends.takes_hidden_states(name)]


def names_of_kernels() -> list[str]:
    """The backends with kernels, the CPU's by instruction set."""
    sets = [f"cpu {name}" for name in cpu.instruction_sets() if "cpu" in names_of_backends()]
    return sets + [name for name in names_of_backends() if name not in ("cpu", "reference")]


@pytest.fixture(params=names_of_kernels())
def kernel_backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[backends.Backend]:
    """A backend's kernels; every instruction set of the CPU's."""
    name, _, instruction_set = request.param.partition(" ")
    if instruction_set:
        monkeypatch.setattr(cpu, "INSTRUCTION_SET", instruction_set)
    for found in _named(name):
        yield backends.load(found)


SORTED = "triton, sorted ids"


@pytest.fixture(params=[*LINEAR, *([SORTED] if "triton" in LINEAR else [])])
def linear_backend(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> Iterator[str]:
    """The name of a backend that serves float32 on the CPU, hidden states as well."""
    if request.param == SORTED:
        monkeypatch.setattr(triton.configs, "SORTED_DOTS", True)
    yield from _named(request.param.split(",")[0])


@pytest.fixture(params=names_of_backends())
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that serves float32 on the CPU."""
    yield from _named(request.param)


def _named(name: str) -> Iterator[str]:
    backends.resolve(name, CPU, (torch.float32,), 1)
    guarded = {"triton": (triton.common, "empty"), "cuda": (cuda.backend, "_empty")}.get(name)
    if guarded is None or bridge.DEVICE:
        yield name
        return
    with guards.around_allocations(*guarded):
        yield name


@pytest.fixture(params=cpu.instruction_sets())
def instruction_set(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Every instruction set of the CPU backend that this machine can run, one after the other."""
    monkeypatch.setattr(cpu, "INSTRUCTION_SET", request.param)
    return str(request.param)


@pytest.fixture
def threads() -> int:
    """Restores the number of threads that a test changes."""
    before = torch.get_num_threads()
    yield before
    torch.set_num_threads(before)


@pytest.fixture
def one_thread(threads: int) -> Iterator[None]:
    """For models that are tiny; the test's random numbers stay its own."""
    torch.set_num_threads(1)
    with torch.random.fork_rng(devices=[]):
        yield

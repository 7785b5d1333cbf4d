"""One suite for every backend: a test that takes ``backend`` runs on each that this machine has.

Under ``TRITON_INTERPRET=1`` those tests alone run, on the Triton backend, with guard bands around
everything that it allocates.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator

import pytest
import torch
from effort import INTERPRETED, examples
from hypothesis import HealthCheck, settings

from opd_kernels import backends
from opd_kernels.backends import cpu

CPU = torch.device("cpu")

settings.register_profile(
    "suite",
    max_examples=examples(100),
    deadline=None,
    derandomize=False,
    print_blob=True,
    suppress_health_check=list(HealthCheck),
)
settings.load_profile("suite")

BACKENDS = ["triton"] if INTERPRETED else [name for name in backends.MODULES if name != "triton"]


def pytest_configure() -> None:
    # A suite that silently tests the reference alone would be worth nothing.
    reason = cpu.unavailable()
    if reason is not None:
        raise pytest.UsageError(f"the native CPU backend is not there: {reason}")
    # A sanitized run has to test the sanitized build and no other.
    wanted = os.environ.get("OPD_KERNELS_EXPECT", "")
    if wanted not in cpu._C.__file__:
        raise pytest.UsageError(f"the tests run on {cpu._C.__file__}, expected it under {wanted}")
    warnings.filterwarnings("ignore", message="k=1: a support of one entry")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if INTERPRETED:
        import interpreter

        interpreter.speed_up()
        others = [item for item in items if "backend" not in getattr(item, "fixturenames", ())]
        config.hook.pytest_deselected(items=others)
        items[:] = [item for item in items if item not in others]


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Iterator[str]:
    """The name of a backend that serves float32 on the CPU."""
    name: str = request.param
    backends.resolve(name, CPU, (torch.float32,), 1)
    if not INTERPRETED:
        yield name
        return
    import guards

    with guards.around_allocations():
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

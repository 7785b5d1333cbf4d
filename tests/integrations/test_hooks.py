"""What adapters to trainers share, and that none imports its trainer before it is called."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from opd_kernels import VocabShard, integrations
from opd_kernels.divergences import forward_kl, jsd, reverse_kl
from opd_kernels.integrations._hooks import check_parameters, generalized_jsd, megatron_shard

# Modules: the package ``trl`` extends a class of its trainer. verl loads its plugin itself.
FILES = Path(integrations.__file__).parent.glob("[!_]*.py")
ADAPTERS = sorted(f"opd_kernels.integrations.{p.stem}" for p in FILES if p.stem != "verl_plugin")
TRAINERS = ("megatron", "nemo_rl", "swift", "transformers", "trl", "verl")
# Prints each module of a trainer that is looked for, installed or not.
LOOKED_FOR = f"""
import importlib, sys

class Note:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {TRAINERS}:
            print(name)

sys.meta_path.insert(0, Note())
for name in sys.argv[1:]:
    importlib.import_module(name)
"""


def test_adapters_import_no_trainer() -> None:
    assert len(ADAPTERS) >= 5
    command = [sys.executable, "-c", LOOKED_FOR, *ADAPTERS]
    found = subprocess.run(command, check=True, capture_output=True, text=True)
    assert found.stdout == ""


def test_other_parameters_are_named_beside_the_expected_ones() -> None:
    def function(a: int, *, b: int = 0) -> None: ...

    check_parameters(function, ("a", "b"), "X 1.0")
    with pytest.raises(ImportError, match=r"takes \['a', 'b'\], expected \['a'\].*with X 1\.0"):
        check_parameters(function, ("a",), "X 1.0")


def test_beta_0_is_the_forward_kl_and_1_the_reverse() -> None:
    assert generalized_jsd(0) == forward_kl()
    assert generalized_jsd(1) == reverse_kl()
    assert generalized_jsd(0.25) == jsd(0.25)


@pytest.mark.parametrize(("vocab_size", "expected"), [(None, 400), (390, 390)])
def test_megatrons_columns(
    vocab_size: int | None, expected: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = SimpleNamespace(
        get_tensor_model_parallel_world_size=lambda: 4,
        get_tensor_model_parallel_rank=lambda: 2,
        get_tensor_model_parallel_group=lambda: None,
    )
    monkeypatch.setitem(sys.modules, "megatron.core.parallel_state", state)
    assert megatron_shard(100, vocab_size) == VocabShard(200, expected)
    state.get_tensor_model_parallel_world_size = lambda: 1
    assert megatron_shard(100, vocab_size) is None

"""``integrations.swift`` against ms-swift 4.6.0: where it is right its numbers, else float64's."""

from __future__ import annotations

import ast
import copy
import math
import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from pages import ROOT
from peer_checks import assert_agree, bound, graded
from ranks import as_rank, run_ranks
from swift.rlhf_trainers import gkd_loss as peer
from swift.rlhf_trainers.gkd_loss import TeacherOutput
from torch import Tensor

from opd_kernels.integrations import swift

# ms-swift's Megatron code imports one name of it, for context parallelism.
BRIDGE = ModuleType("mcore_bridge")
BRIDGE.split_cp_inputs = None
sys.modules.setdefault("mcore_bridge", BRIDGE)

OWN, OWN_TO_TOPK = peer.gkd_loss, TeacherOutput.to_topk
B, T, V, K = 3, 40, 300, 16
IGNORED = -100
BETAS = (0, 0.25, 0.5, 1)


def logits(seed: int, *shape: int) -> Tensor:
    return 3 * torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def some_labels() -> Tensor:
    """Shifted: a prompt of other length in each row, and the last position."""
    place = torch.arange(T)
    masked = (place < torch.tensor([[20], [0], [9]])) | (place == T - 1)
    return torch.ones(B, T, dtype=torch.long).masked_fill(masked, IGNORED)


def served(labels: Tensor | None) -> TeacherOutput:
    """A server's entries; some rows have none, because the server's text was shorter."""
    logprobs, ids = logits(1, B, T, V).log_softmax(-1).topk(K)
    logprobs[:, -4:], ids[:, -4:] = -math.inf, 0
    return TeacherOutput(topk_logprobs=logprobs, topk_indices=ids, labels=labels)


def doubled(teacher: TeacherOutput) -> TeacherOutput:
    """For ms-swift's own function in float64."""
    found = copy.copy(teacher)
    for name in ("topk_logprobs", "full_logits"):
        if getattr(found, name) is not None:
            setattr(found, name, getattr(found, name).double())
    return found


def both(
    student: Tensor, teacher: TeacherOutput, labels: Tensor, beta: float, temperature: float
) -> list[tuple[Tensor, list[Tensor]]]:
    """Sum and gradient: the adapter's, ms-swift's, and those of ms-swift's formula in float64."""
    calls = (swift.gkd_loss, student, teacher), (OWN, student, teacher)
    exact = (OWN, student.double(), doubled(teacher))
    return [
        graded(lambda x, f=f, y=y: f(x, y, labels, beta, temperature)[0], x)
        for f, x, y in (*calls, exact)
    ]


@pytest.fixture
def installed(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the trainer on transformers, with the adapter put in."""
    trainer = as_it_was(monkeypatch)
    swift.install()
    return trainer


def as_it_was(monkeypatch: pytest.MonkeyPatch) -> Any:
    """The module of the trainer on transformers, loaded, with ms-swift's own functions."""
    trainer = import_module("swift.rlhf_trainers.gkd_trainer")
    for module in (peer, trainer):
        monkeypatch.setattr(module, "gkd_loss", OWN)
    monkeypatch.setattr(TeacherOutput, "to_topk", OWN_TO_TOPK)
    return trainer


def test_the_importers_are_all_modules_that_import_the_loss_by_name() -> None:
    """And none of them passes more than six arguments by position."""
    root = Path(peer.__file__).parents[1]
    found = set()
    for file in root.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and "gkd_loss" in [x.name for x in node.names]:
                found.add(".".join(file.relative_to(root.parent).with_suffix("").parts))
            if isinstance(node, ast.Call) and getattr(node.func, "id", None) == "gkd_loss":
                assert len(node.args) <= 6
    assert found == set(swift.IMPORTERS)


def test_install_meets_the_parameters_it_knows(installed: Any) -> None:
    assert installed.gkd_loss is peer.gkd_loss is swift.gkd_loss
    assert TeacherOutput.to_topk is not OWN_TO_TOPK
    shards = import_module("swift.megatron.trainers.gkd_utils")

    gathers = (peer.default_gather, shards.tp_gather_topk)
    assert [f"{f.__module__}.{f.__qualname__}" for f in gathers] == [swift.WHOLE, swift.SHARDS]


def test_a_plugin_file_puts_the_loss_into_the_loaded_trainer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """``--external_plugins``, as the page has it."""
    trainer = as_it_was(monkeypatch)
    monkeypatch.setattr(sys, "path", [*sys.path])
    page = (ROOT / "docs" / "recipes" / "ms-swift.md").read_text(encoding="utf-8")
    file = tmp_path / "opd.py"
    file.write_text(page.partition("```python no-run\n")[2].partition("```")[0], encoding="utf-8")
    import_module("swift.utils").import_external_file(str(file))
    assert trainer.gkd_loss is peer.gkd_loss is swift.gkd_loss


@pytest.mark.parametrize("temperature", [1.0, 0.7, 2.5])
@pytest.mark.parametrize("beta", BETAS)
def test_sum_gradient_and_count_of_a_servers_entries(beta: float, temperature: float) -> None:
    student, labels = logits(0, B, T, V), some_labels()
    teacher = served(labels.clone())
    ours, theirs, exact = both(student, teacher, labels, beta, temperature)
    error = bound(student, teacher.topk_logprobs, temperature=temperature)
    assert_agree(ours, exact, error)
    assert_agree(ours, theirs, 2 * error)
    counts = [f(student, teacher, labels, beta, temperature)[1] for f in (swift.gkd_loss, OWN)]
    assert counts[0] == counts[1]
    assert (counts[0].dtype, counts[0].shape) == (counts[1].dtype, counts[1].shape)


@pytest.mark.parametrize("beta", BETAS)
def test_a_teacher_with_another_prompt(beta: float) -> None:
    """Self-distillation with a teacher's view: the response lies elsewhere."""
    labels = some_labels()
    longer = torch.full((B, T + 9), IGNORED)
    for row, count in enumerate((labels != IGNORED).sum(1).tolist()):
        longer[row, 3 * row : 3 * row + count] = 1
    logprobs, ids = logits(1, B, T + 9, V).log_softmax(-1).topk(K)
    teacher = TeacherOutput(topk_logprobs=logprobs, topk_indices=ids, labels=longer)
    student = logits(0, B, T, V)
    ours, theirs, exact = both(student, teacher, labels, beta, 1.0)
    assert_agree(ours, exact, bound(student, logprobs))
    assert_agree(ours, theirs, 2 * bound(student, logprobs))


@pytest.mark.parametrize("beta", BETAS)
def test_the_trainers_own_step_with_a_local_teacher(beta: float, installed: Any) -> None:
    """``GKDTrainer._compute_jsd_loss``: it shifts labels and takes the top-K of whole logits."""
    trainer = SimpleNamespace(gkd_logits_topk=K, beta=beta, temperature=1.5)
    student, whole, labels = logits(0, B, T, V), logits(1, B, T, V), some_labels()

    def step(x: Tensor) -> Tensor:
        teacher = TeacherOutput(full_logits=whole.to(x.dtype), labels=labels.clone())
        return installed.GKDTrainer._compute_jsd_loss(trainer, x, teacher, labels)

    ours = graded(step, student)
    installed.gkd_loss, TeacherOutput.to_topk = OWN, OWN_TO_TOPK
    theirs, exact = graded(step, student), graded(step, student.double())
    share = 1 / int((labels.roll(-1, 1) != IGNORED).sum())
    error = bound(student, whole, temperature=1.5)
    assert_agree(ours, exact, error, share)
    assert_agree(ours, theirs, 2 * error, share)


def test_without_a_topk_it_is_ms_swifts_own_loss_bit_by_bit() -> None:
    student, labels = logits(0, B, T, V), some_labels()
    teacher = TeacherOutput(full_logits=logits(1, B, T, V), labels=labels)
    ours, theirs, _ = both(student, teacher, labels, 0.5, 1.5)
    assert torch.equal(ours[0], theirs[0])
    assert torch.equal(ours[1][0], theirs[1][0])


# What is wrong in ms-swift.


@pytest.mark.parametrize(("beta", "wrong"), [(0, math.nan), (0.5, math.nan), (1, math.inf)])
def test_a_partly_infinite_row_gives_ms_swift_inf_or_nan(beta: float, wrong: float) -> None:
    student, labels = logits(0, B, T, V), some_labels()
    teacher = served(labels)
    teacher.topk_logprobs[1, 3, -2:] = -math.inf
    ours, theirs, _ = both(student, teacher, labels, beta, 1.0)
    torch.testing.assert_close(theirs[0], torch.tensor(wrong), equal_nan=True)
    assert theirs[1][0].isnan().any() == (beta == 1)
    # Its formula in float64 on the rows apart: K entries each, and K - 2 in that one.
    alone = labels.masked_fill(torch.ones_like(labels, dtype=torch.bool), IGNORED)
    alone[1, 3] = 1
    rest = labels.clone()
    rest[1, 3] = IGNORED
    narrow = TeacherOutput(
        topk_logprobs=teacher.topk_logprobs[..., :-2], topk_indices=teacher.topk_indices[..., :-2]
    )
    teacher.labels = None
    exact = graded(
        lambda x: (
            OWN(x, doubled(teacher), rest, beta, 1.0)[0]
            + OWN(x, doubled(narrow), alone, beta, 1.0)[0]
        ),
        student.double(),
    )
    assert_agree(ours, exact, bound(student, teacher.topk_logprobs))


@pytest.mark.parametrize("beta", BETAS)
def test_bfloat16_logits_are_computed_in_bfloat16_by_ms_swift(beta: float) -> None:
    student, labels = logits(0, B, T, V).bfloat16(), some_labels()
    logprobs, ids = logits(1, B, T, V).bfloat16().topk(K)  # a local teacher's logits
    teacher = TeacherOutput(topk_logprobs=logprobs, topk_indices=ids, labels=labels)
    ours, theirs, exact = both(student, teacher, labels, beta, 1.0)
    error = bound(student, logprobs)
    assert_agree(ours, exact, error)
    assert ours[0].dtype == torch.float32
    assert theirs[0].dtype == torch.bfloat16
    gradient, expected = theirs[1][0].double(), exact[1][0]
    allowed = torch.finfo(torch.bfloat16).eps * expected.abs() + 4 * error
    assert ((gradient - expected).abs() > allowed).any()


def test_ids_beyond_the_students_vocabulary_stop_ms_swift() -> None:
    """A teacher with more columns than the student, as padded vocabularies have."""
    student, labels = logits(0, B, T, V - 20), some_labels()
    teacher = served(labels)
    with pytest.raises(RuntimeError, match="out of bounds"):
        OWN(student, teacher, labels, 0.5, 1.0)
    absent = copy.copy(teacher)
    absent.topk_logprobs = teacher.topk_logprobs.masked_fill(
        teacher.topk_indices >= V - 20, -math.inf
    )
    ours = [
        graded(lambda x, y=y: swift.gkd_loss(x, y, labels, 0.5, 1.0)[0], student)
        for y in (teacher, absent)
    ]
    assert torch.equal(ours[0][0], ours[1][0])
    assert torch.equal(ours[0][1][0], ours[1][1][0])


def test_other_numbers_of_rows_stop_ms_swift() -> None:
    student, labels = logits(0, B, T, V), some_labels()
    teacher = served(labels.clone())
    teacher.labels[0, 25] = IGNORED
    with pytest.raises(AssertionError, match="Label count mismatch"):
        OWN(student, teacher, labels, 0.5, 1.0)
    assert swift.gkd_loss(student, teacher, labels, 0.5, 1.0)[0].isnan()


# Tensor parallelism: Megatron's own groups and ms-swift's own gather, on two ranks.


def on_ranks(rank: int) -> dict[str, Any]:
    """How far sums and gradients of shards are from ms-swift's, and from the whole rows'."""
    from megatron.core import parallel_state
    from swift.megatron.trainers.gkd_utils import tp_gather_topk

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=2)
    labels, found = some_labels(), {}
    teacher, width = served(labels.clone()), V // 2
    whole = logits(0, B, T, V)
    columns = slice(rank * width, (rank + 1) * width)
    for beta in BETAS:
        sums, gradients = [], []
        for function in (swift.gkd_loss, OWN):
            total, (gradient,) = graded(
                lambda x, f=function, b=beta: f(x, teacher, labels, b, 1.5, tp_gather_topk)[0],
                whole[..., columns].contiguous(),
            )
            sums.append(total)
            gradients.append(gradient)
        exact, (expected,) = graded(
            lambda x, b=beta: OWN(x, doubled(teacher), labels, b, 1.5)[0], whole.double()
        )
        found[str(beta)] = {
            "sums": [(x - exact).abs().item() for x in sums],
            "gradients": [(x - expected[..., columns]).abs().max().item() for x in gradients],
            "largest": expected[..., columns].abs().max().item(),
        }
    dist.barrier()
    return found


def test_shards_of_two_ranks_give_the_whole_rows_sum_and_gradient(tmp_path: Path) -> None:
    found = run_ranks(__file__, tmp_path, 2)
    error = bound(logits(0, B, T, V), served(None).topk_logprobs, temperature=1.5)
    for rank in found:
        assert set(rank) == {str(beta) for beta in BETAS}
        for each in rank.values():
            assert max(each["sums"]) <= error * B * T
            assert max(each["gradients"]) <= 4 * error
            assert each["largest"] > 1000 * error


if __name__ == "__main__":
    as_rank(on_ranks, 2)

"""The study of the sampled background: its closed forms against every token, and its whole path."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest
import torch
from torch import Tensor

from opd_kernels import (
    LinearLogits,
    sampled_token_advantages,
    sampled_token_loss,
    topk_divergence,
)

STUDIES = Path(__file__).resolve().parents[2] / "studies"
ROWS, VOCAB, WIDTH, K = 6, 11, 5, 3


def load(monkeypatch: pytest.MonkeyPatch, name: str) -> ModuleType:
    monkeypatch.syspath_prepend(str(STUDIES))
    return importlib.import_module(name)


@pytest.fixture
def estimators(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "background.estimators")


@pytest.fixture
def moments(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "background.moments")


@pytest.fixture
def pairs(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "background.pair")


@pytest.fixture
def study(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    return load(monkeypatch, "sampled_background")


def with_background(divergence: str, outside: str, logits: Tensor, log_q: Tensor, y: Tensor):
    # The head is the identity, so that a hidden state's gradient is that of its logits.
    student = LinearLogits(logits, torch.eye(VOCAB, dtype=torch.float64))
    return topk_divergence(
        student,
        log_q,
        k=K,
        divergence=divergence,
        outside=outside,
        background="sampled",
        token_ids=y,
        reduction="sum",
    )


def with_sample(logits: Tensor, log_q: Tensor, y: Tensor) -> Tensor:
    return topk_divergence(logits, log_q, k=K, outside="sample", token_ids=y, reduction="sum")


def with_policy_loss(log_old: Tensor, logits: Tensor, log_q: Tensor, y: Tensor) -> Tensor:
    new, teacher, old = (
        x.gather(-1, y[:, None])[:, 0] for x in (logits.log_softmax(-1), log_q, log_old)
    )
    advantages = sampled_token_advantages(teacher[:, None], old[:, None])[:, 0]
    return sampled_token_loss(new, old, advantages, reduction="sum")


def of_every_token(loss: Callable[..., Tensor], log_p: Tensor, log_q: Tensor) -> Tensor:
    """The gradients by the logits, (V, N, V)."""
    rows = []
    for token in range(VOCAB):
        logits = log_p.clone().requires_grad_()
        loss(logits, log_q, torch.full((ROWS,), token)).backward()
        rows.append(logits.grad)
    return torch.stack(rows)


@pytest.mark.parametrize(
    "case",
    [
        ("reverse_kl", "bucket"),
        ("forward_kl", "truncate"),
        ("reverse_kl", "generalize"),
        "sample",
        "sampled token",
        "sampled token of a stale policy",
    ],
    ids=str,
)
def test_mean_and_noise_are_those_of_the_packages_gradients_over_all_tokens(
    estimators: ModuleType, case: str | tuple[str, str]
) -> None:
    generator = torch.Generator().manual_seed(0)
    draw = partial(torch.randn, generator=generator, dtype=torch.float64)
    log_p, log_q = (draw(ROWS, VOCAB).log_softmax(-1) for _ in range(2))
    log_old = (log_p + 0.3 * draw(ROWS, VOCAB)).log_softmax(-1)
    head = draw(VOCAB, WIDTH)
    made = log_old if case == "sampled token of a stale policy" else log_p
    if isinstance(case, tuple):
        estimator = estimators.sampled_background(
            log_p, log_q, k=K, divergence=case[0], outside=case[1]
        )
        loss = partial(with_background, *case)
    elif case == "sample":
        estimator, loss = estimators.sampled_outside(log_p, log_q, k=K), with_sample
    else:
        estimator = estimators.sampled_token(log_p, log_q, made)
        loss = partial(with_policy_loss, made)
    gradients = of_every_token(loss, log_p, log_q)
    p = log_p.exp()
    nucleus = estimators.nucleus(log_p, 0.7)
    close = partial(torch.testing.assert_close, rtol=1e-9, atol=1e-12)
    for weights in (p, nucleus, log_old.exp()):
        close(estimator.mean(weights), torch.einsum("nv,vnj->nj", weights, gradients))
    for found, rows in zip(estimator.noise(head), (gradients, gradients @ head), strict=True):
        mean = torch.einsum("nv,vnj->nj", p, rows)
        close(found, torch.einsum("nv,vn->n", p, (rows - mean).square().sum(-1)))


def test_the_nucleus_is_that_of_the_rollouts(estimators: ModuleType) -> None:
    transformers = pytest.importorskip("transformers")
    logits = torch.randn(20, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = transformers.TopPLogitsWarper(0.9)(None, 3 * logits).softmax(-1)
    torch.testing.assert_close(estimators.nucleus((3 * logits).log_softmax(-1), 0.9), expected)


def test_squares_are_those_of_the_gradients_summed_over_a_prompts_rows(
    moments: ModuleType, pairs: ModuleType
) -> None:
    pair = pairs.random_pair()
    pair = pairs.Pair(*(x.double() if x.is_floating_point() else x for x in vars(pair).values()))
    generator = torch.Generator().manual_seed(1)
    rows = torch.randn(len(pair.student), len(pair.head), generator=generator, dtype=torch.float64)
    squares = moments.Squares.of(rows, pair)
    of_prompts = [pair.prompt == i for i in range(6)]
    weights = torch.stack([rows[some].T @ pair.student[some] for some in of_prompts])
    products = torch.einsum("ivh,jvh->ij", weights, weights)
    torch.testing.assert_close(squares.head, products)
    hidden = torch.stack([(rows[some] @ pair.head).square().sum() for some in of_prompts])
    torch.testing.assert_close(squares.hidden, hidden)
    logits = torch.stack([rows[some].square().sum() for some in of_prompts])
    torch.testing.assert_close(squares.logits, logits)


def test_a_batch_that_is_all_prompts_has_the_squared_norm_of_their_sum(
    moments: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = torch.randn(6, 9, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    squares = moments.Squares(torch.ones(6).double(), torch.ones(6).double(), weights @ weights.T)
    monkeypatch.setattr(moments, "BATCH", 6)
    found = squares.resampled(torch.ones(1, 6, dtype=torch.float64))
    torch.testing.assert_close(found["head"].item(), weights.sum(0).square().sum().item() / 6)


def test_the_bias_is_that_of_the_other_policy_and_nothing_for_the_student_itself(
    estimators: ModuleType, moments: ModuleType, pairs: ModuleType
) -> None:
    pair = pairs.random_pair()
    make = partial(estimators.sampled_background, k=8, divergence="reverse_kl", outside="bucket")
    measurement = moments.Measurement(pair, 0.7)
    bias = measurement.moments(make).bias
    slope = make(measurement.log_p, measurement.log_q).slope
    draws = {"top_p": measurement.nucleus, "stale": measurement.log_old.exp()}
    for name, draw in draws.items():
        # The rows are kept in float32.
        expected = (slope * (draw - measurement.log_p.exp())).square().sum()
        torch.testing.assert_close(bias[name].logits.sum(), expected, rtol=1e-5, atol=0)
    pair.stale = pair.student
    same = moments.Measurement(pair, 1.0)
    for makes in ((make,), (estimators.sampled_token, estimators.sampled_token)):
        found = same.moments(*makes)
        for squares in found.bias.values():
            assert (squares.logits < 1e-12 * found.signal.logits).all()


def test_a_smoke_run_writes_what_a_report_prints(
    study: ModuleType, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert study.main(["--smoke"]) == 0
    folder = tmp_path / "demo_output" / "sampled_background"
    table = (folder / "table.md").read_text()
    (folder / "table.md").unlink()
    assert study.main(["--report", "--output", str(folder)]) == 0
    assert (folder / "table.md").read_text() == table
    assert table.count("| sampled token |") == 6
    assert "nan" not in table


def test_the_results_in_the_repository_give_their_table(study: ModuleType) -> None:
    folder = STUDIES / "results" / "sampled_background"
    rows = study.read(folder / "figures.csv")
    assert {row["k"] for row in rows} == {"32", "8"}
    assert study.report(rows) == (folder / "table.md").read_text()


def test_a_report_without_results_names_the_missing_file(
    study: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert study.main(["--report", "--output", str(tmp_path)]) == 2
    assert "figures.csv" in capsys.readouterr().err

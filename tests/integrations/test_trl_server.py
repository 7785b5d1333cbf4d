"""``TopKDistillationTrainer`` with a teacher behind a server, and the example that runs either."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from teacher_http import Teacher, model_logprobs, serving

pytest.importorskip("trl", reason="the trainer needs TRL")

from tiny_trl import (
    PROMPTS,
    K,
    assert_same_parameters,
    config,
    hand_written_step,
    llama,
    logged,
    tokenizer,
    trainer,
)
from transformers import LlamaForCausalLM

from opd_kernels.integrations.server import (
    TeacherServer,
    TeacherServerError,
    TeacherUnavailableError,
)
from opd_kernels.integrations.trl import trainer as adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.fixture
def served() -> Iterator[tuple[Teacher, LlamaForCausalLM]]:
    model = llama(1).eval()
    with serving(model_logprobs(model)) as teacher:
        yield teacher, model


@pytest.mark.parametrize("hidden", [True, False], ids=["hidden", "logits"])
@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_a_server_gives_the_gradients_of_the_teacher_in_process(
    tmp_path: Path, served: tuple[Teacher, Any], api: str, hidden: bool
) -> None:
    teacher, model = served
    student = llama(0)
    expected_loss, expected = hand_written_step(student, model)
    args = config(
        tmp_path,
        shuffle_dataset=False,
        use_hidden_states=hidden,
        teacher_server_url=teacher.url,
        teacher_server_model="teacher",
        teacher_server_api=api,
    )
    trained = trainer(student, None, args)
    trained.train()
    assert logged(trained, "loss") == pytest.approx([expected_loss], rel=1e-4)
    assert_same_parameters(student, expected)
    assert len(teacher.requests) == 4  # each sequence of the step once
    assert 0 < logged(trained, "teacher_mass")[0] <= 1


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_temperatures_apply_to_a_servers_log_probs(
    tmp_path: Path, served: tuple[Teacher, Any], api: str
) -> None:
    teacher, model = served
    student = llama(0)
    options = {"temperature": 0.7, "teacher_temperature": 1.3}
    _, expected = hand_written_step(student, model, outside="renormalize", **options)
    args = config(
        tmp_path,
        shuffle_dataset=False,
        loss="renormalize",
        teacher_server_url=teacher.url,
        teacher_server_api=api,
        **options,
    )
    trainer(student, None, args).train()
    assert_same_parameters(student, expected)


def test_images_with_a_server_are_refused(
    tmp_path: Path, served: tuple[Teacher, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    generate = adapter.DistillationTrainer._generate_and_score_completions
    monkeypatch.setattr(
        adapter.DistillationTrainer,
        "_generate_and_score_completions",
        lambda self, inputs: generate(self, inputs) | {"pixel_values": torch.zeros(4, 3, 8, 8)},
    )
    args = config(tmp_path, teacher_server_url=served[0].url)
    with pytest.raises(ValueError, match="has images"):
        trainer(llama(0), None, args).train()


def test_stop_ids_are_not_compared_with_those_that_a_server_does_not_tell(
    tmp_path: Path, served: tuple[Teacher, Any]
) -> None:
    student = llama(0)
    student.generation_config.eos_token_id = [1, 40]
    args = config(tmp_path, teacher_server_url=served[0].url)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="student and teacher")
        trainer(student, None, args, teacher_processing_class=tokenizer())


def test_time_out_and_retries_reach_the_servers_client(
    tmp_path: Path, served: tuple[Teacher, Any]
) -> None:
    teacher, _ = served
    teacher.script = [1.0]
    options = {"teacher_server_url": teacher.url, "teacher_server_timeout": 0.2}
    args = config(tmp_path, teacher_server_retries=0, **options)
    with pytest.raises(TeacherUnavailableError, match="timed out"):
        trainer(llama(0), None, args).train()


@pytest.mark.parametrize("parallel", [1, 4])
def test_parallel_reaches_the_servers_client(
    tmp_path: Path, served: tuple[Teacher, Any], parallel: int
) -> None:
    teacher, _ = served
    teacher.script = [0.3] * 4
    args = config(tmp_path, teacher_server_url=teacher.url, teacher_server_parallel=parallel)
    trainer(llama(0), None, args).train()
    assert teacher.most_at_once == parallel


def test_masked_tokens_take_no_part_with_a_server(
    tmp_path: Path, served: tuple[Teacher, Any]
) -> None:
    teacher, model = served
    student = llama(0)
    _, expected = hand_written_step(
        student, model, counted=lambda response: [token != 1 for token in response]
    )
    args = config(tmp_path, shuffle_dataset=False, masked_ids=[1])
    server = TeacherServer(teacher.url, k=K)
    trainer(student, None, args, teacher_server=server).train()
    assert_same_parameters(student, expected)


def test_a_position_without_entries_raises(tmp_path: Path, served: tuple[Teacher, Any]) -> None:
    teacher, _ = served

    def forget(answer: dict) -> dict:
        answer["choices"][0]["prompt_logprobs"][-1] = None
        return answer

    teacher.change = forget
    server = TeacherServer(teacher.url, k=K)
    with pytest.raises(TeacherServerError, match=r"no 6 entries for 4 of \d+ tokens"):
        trainer(llama(0), None, config(tmp_path), teacher_server=server).train()


def test_masking_failures_leaves_out_what_failed_and_divides_by_the_rest(
    tmp_path: Path, served: tuple[Teacher, Any]
) -> None:
    teacher, model = served
    student = llama(0)
    _, expected = hand_written_step(student, model, PROMPTS[1:4])
    teacher.script = [(500, "broken")]
    server = TeacherServer(teacher.url, k=K, retries=0, parallel=1, on_failure="mask")
    args = config(tmp_path, shuffle_dataset=False)
    with pytest.warns(UserWarning, match="left out 1 of 4 .*sequence 0.*broken"):
        trainer(student, None, args, teacher_server=server).train()
    assert_same_parameters(student, expected)


@pytest.mark.parametrize("behind", ["in process", "behind a server"])
def test_the_example_runs(
    tmp_path: Path,
    served: tuple[Teacher, Any],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    behind: str,
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    import distill_trl

    teacher, _ = served
    teacher.logprobs = model_logprobs(distill_trl.tiny_model(2))
    server = ["--teacher-server", teacher.url] if behind == "behind a server" else []
    options = ["--batch", "2", "--accumulation", "2", "--k", "8", "--masked-tokens", "<eos>"]
    distill_trl.main(["--smoke", "--output", str(tmp_path), *options, *server])
    assert len(teacher.requests) == (12 if server else 0)
    assert "student_mass" in capsys.readouterr().out
    LlamaForCausalLM.from_pretrained(tmp_path)


def test_the_example_says_what_is_missing(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.syspath_prepend(Path(__file__).resolve().parents[2] / "examples")
    import distill_trl

    with pytest.raises(SystemExit):
        distill_trl.main(["--student", "somewhere"])
    assert "--dataset, --teacher or --teacher-server is missing" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distill_trl.main(["--smoke", "--teacher", "a", "--teacher-server", "http://b"])
    assert "--teacher and --teacher-server are both given" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        distill_trl.main(["--smoke", "--teacher", "a", "--teacher-model", "b"])
    assert "--teacher-model needs --teacher-server" in capsys.readouterr().err


def test_a_batch_of_which_nothing_is_scored_raises_even_where_failures_are_masked(
    tmp_path: Path, served: tuple[Teacher, Any]
) -> None:
    teacher, _ = served
    teacher.script = [(500, "broken")] * 4
    server = TeacherServer(teacher.url, k=K, retries=0, on_failure="mask")
    trained = trainer(llama(0), None, config(tmp_path), teacher_server=server)
    with (
        pytest.warns(UserWarning, match="left out 4 of 4"),
        pytest.raises(TeacherServerError, match=r"none of the batch's \d+ response tokens"),
    ):
        trained.train()


@pytest.mark.parametrize("options", [{"banned_ids": [*range(40)]}, {"vocab_size": 40}, {}])
def test_entries_of_a_server_that_are_not_replaced_are_told(
    tmp_path: Path, served: tuple[Teacher, Any], options: dict
) -> None:
    args = config(tmp_path, teacher_server_url=served[0].url, **options)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        trained = trainer(llama(0), None, args)
        trained.train()
    told = any("dropped and not replaced" in str(warning.message) for warning in caught)
    assert told == bool(options)
    assert (logged(trained, "valid_k")[0] < K) == bool(options)

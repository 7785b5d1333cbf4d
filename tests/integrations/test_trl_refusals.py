"""What ``TopKDistillationTrainer`` and its options refuse."""

from __future__ import annotations

from pathlib import Path

import pytest

pytest.importorskip("trl", reason="the trainer needs TRL")

from tiny_trl import K, V, config, llama, trainer
from trl import DistillationConfig

from opd_kernels.integrations.server import TeacherServer
from opd_kernels.integrations.trl import TopKDistillationConfig
from opd_kernels.integrations.trl import trainer as adapter

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"beta": 0.5}, "beta is 0.5"),
        ({"k": 0}, "k is 0"),
        (
            {"k": 1, "loss": "renormalize"},
            "k is 1, allowed is 2 or more; one entry has no gradient",
        ),
        ({"k": 2.5}, "k is 2.5, expected an int"),
        ({"stats_steps": "8"}, "stats_steps is '8', expected an int"),
        ({"masked_tokens": "<"}, "masked_tokens is '<', expected a list"),
        ({"stats_steps": -1}, "stats_steps is -1"),
        ({"vocab_size": 0}, "vocab_size is 0"),
        ({"k": True}, "k is True, expected an int"),
        ({"vocab_size": 40.5}, "vocab_size is 40.5, expected an int"),
        ({"masked_ids": [3, 5.9]}, "masked_ids has 5.9, expected ints"),
        ({"banned_ids": [3, 5.9]}, "banned_ids has 5.9, expected ints"),
        ({"banned_ids": ["5"]}, "banned_ids has '5', expected ints"),
        ({"masked_ids": [3, -1]}, "masked_ids has -1"),
        ({"banned_ids": [-100, 3]}, "banned_ids has -100"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"teacher_temperature": 0.0}, "teacher_temperature is 0.0"),
        ({"teacher_server_model": "x"}, "teacher_server_model needs teacher_server_url"),
        ({"teacher_server_retries": 9}, "teacher_server_retries needs teacher_server_url"),
    ],
)
def test_options_that_are_not_allowed(tmp_path: Path, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(tmp_path, **options)


def test_defaults_are_the_papers_with_a_bucket() -> None:
    args = TopKDistillationConfig("unused", use_cpu=True)
    assert (args.k, args.temperature, args.top_p) == (32, 1.0, 0.9)
    assert (args.divergence, args.support, args.loss) == ("reverse_kl", "teacher", "bucket")


def test_one_teacher_and_no_more(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="given as nothing"):
        trainer(llama(0), None, config(tmp_path))
    server = TeacherServer("http://127.0.0.1:9", k=K)
    with pytest.raises(ValueError, match="teacher_model and teacher_server,"):
        trainer(llama(0), llama(1), config(tmp_path), teacher_server=server)
    named = config(tmp_path, teacher_model_name_or_path="somewhere")
    with pytest.raises(ValueError, match=r"teacher_model and args\.teacher_model_name_or_path,"):
        trainer(llama(0), llama(1), named)
    both = config(tmp_path, teacher_server_url="http://127.0.0.1:9")
    with pytest.raises(ValueError, match=r"teacher_server and args\.teacher_server_url,"):
        trainer(llama(0), None, both, teacher_server=server)
    with pytest.raises(ValueError, match=r"asks for 6 entries, args\.k is 7"):
        trainer(llama(0), None, config(tmp_path, k=7), teacher_server=server)


def test_a_server_has_full_softmaxes_at_temperature_1_alone(tmp_path: Path) -> None:
    url = {"teacher_server_url": "http://127.0.0.1:9"}
    for options in ({"temperature": 0.7}, {"teacher_temperature": 0.7}):
        args = config(tmp_path, **url, **options)
        with pytest.raises(
            ValueError, match=r"'bucket' needs .* the teacher's is 0\.7; set teacher"
        ):
            trainer(llama(0), None, args)
        trainer(llama(0), None, config(tmp_path, loss="renormalize", **url, **options))
    trainer(llama(0), None, config(tmp_path, temperature=0.7, teacher_temperature=1.0, **url))


@pytest.mark.parametrize(
    "options",
    [{"teacher_model_init_kwargs": {"dtype": "bfloat16"}}, {"teacher_model_revision": "main"}],
)
def test_options_for_loading_are_refused_beside_a_teacher_that_is_loaded(
    tmp_path: Path, options: dict
) -> None:
    with pytest.raises(ValueError, match="loaded by name, teacher_model is given"):
        trainer(llama(0), llama(1), config(tmp_path, **options))


def test_a_teacher_that_shares_what_the_student_trains_is_refused(tmp_path: Path) -> None:
    student, teacher = llama(0), llama(1)
    with pytest.raises(ValueError, match=r"shares \d+ parameters with the student"):
        trainer(student, student, config(tmp_path))
    student.lm_head = teacher.lm_head
    with pytest.raises(ValueError, match=r"shares 1 parameters.*lm_head\.weight"):
        trainer(student, teacher, config(tmp_path))
    student.lm_head.requires_grad_(False)
    trainer(student, teacher, config(tmp_path))
    assert student.model.embed_tokens.weight.requires_grad


@pytest.mark.parametrize(
    ("options", "allowed"),
    [
        ({"k": 60}, 50),
        ({"k": 47, "banned_ids": [3, 3, 7, 49, 50, 63, 1000]}, 47),
        ({"k": 48, "banned_ids": [3, 3, 7, 49, 50, 63, 1000]}, 47),
        ({"k": 10, "vocab_size": 9}, 9),
        ({"banned_ids": [*range(V)]}, 0),
    ],
)
def test_a_k_beyond_the_ids_that_can_be_selected_is_refused_before_any_step(
    tmp_path: Path, options: dict, allowed: int
) -> None:
    teacher, args = llama(1, vocab_size=50), config(tmp_path, **options)
    if args.k <= allowed:
        trainer(llama(0), teacher, args)
        return
    with pytest.raises(ValueError, match=f"k is {args.k}, allowed is at most {allowed},"):
        trainer(llama(0), teacher, args)


def test_another_config_is_refused(tmp_path: Path) -> None:
    plain = DistillationConfig(str(tmp_path), use_cpu=True)
    with pytest.raises(TypeError, match="a DistillationConfig, expected a TopKDistillationConfig"):
        trainer(llama(0), llama(1), plain)


def test_a_trl_without_the_hooks_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(adapter.DistillationTrainer, "_get_last_hidden_state")
    with pytest.raises(ImportError, match=r"has no .*_get_last_hidden_state.*install trl==1.16.0"):
        trainer(llama(0), llama(1), config(tmp_path))

"""``TeacherServer`` against a server on this machine: alignment, failures, formats."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Iterator
from email.utils import formatdate
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from teacher_http import Teacher, serving
from torch import Tensor

from opd_kernels import select_topk

pytest.importorskip("requests", reason="a teacher behind a server needs requests")

from opd_kernels.integrations import server as client
from opd_kernels.integrations.server import (
    TeacherServer,
    TeacherServerError,
    TeacherUnavailableError,
)

V, K = 40, 5
TABLE = torch.randn(V, V, generator=torch.Generator().manual_seed(0))
SEQUENCES = [[3, 8, 1, 30, 2], [7, 7], [9, 4, 5]]


def logprobs(tokens: list[int]) -> Tensor:
    """A row depends on all tokens up to its own, as a causal model's."""
    return TABLE[torch.tensor(tokens)].cumsum(0).log_softmax(-1)


@pytest.fixture
def teacher() -> Iterator[Teacher]:
    with serving(logprobs) as teacher:
        yield teacher


def ask(teacher: Teacher, **options: object) -> TeacherServer:
    options = {"k": K, "timeout": 5.0, "backoff": 0.0} | options
    return TeacherServer(teacher.url, "teacher", **options)  # type: ignore[arg-type]


def positions_of(answer: dict) -> list:
    return answer["choices"][0]["prompt_logprobs"]


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_entries_lie_beside_the_logits_that_predict_their_token(teacher: Teacher, api: str) -> None:
    topk, mask = ask(teacher, api=api).topk(SEQUENCES)
    assert topk.shape == mask.shape == (3, 5)
    assert topk.k == K
    for row, tokens in enumerate(SEQUENCES):
        expected = select_topk(logprobs(tokens), K)
        last = len(tokens) - 1
        assert mask[row].tolist() == [True] * last + [False] * (5 - last)
        assert torch.equal(topk.ids[row, :last], expected.ids[:last])
        torch.testing.assert_close(topk.logits[row, :last], expected.logits[:last])
        assert (topk.ids[row, last:] == -1).all()


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_rows_before_the_start_have_no_entries(teacher: Teacher, api: str) -> None:
    whole = ask(teacher, api=api).topk(SEQUENCES)
    topk, mask = ask(teacher, api=api).topk(SEQUENCES, starts=[3, 2, 1])
    kept = torch.tensor([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [1, 1, 0, 0, 0]]).bool()
    assert torch.equal(mask, kept)
    assert torch.equal(topk.ids, whole.topk.ids.masked_fill(~kept[..., None], -1))


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_what_is_asked(teacher: Teacher, api: str) -> None:
    server = ask(teacher, api=api, api_key="secret", extra={"priority": 3}, parallel=1)
    server.topk([[4, 5, 6]], starts=[2])
    ((path, body, headers),) = teacher.requests
    assert headers["Authorization"] == "Bearer secret"
    assert body.pop("priority") == 3
    if api == "vllm":
        assert path == "/v1/completions"
        assert body == {
            "model": "teacher",
            "prompt": [4, 5, 6],
            "max_tokens": 1,
            "temperature": 1.0,
            "prompt_logprobs": K,
        }
    else:
        assert path == "/generate"
        assert body == {
            "input_ids": [4, 5, 6],
            "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
            "return_logprob": True,
            "top_logprobs_num": K,
            "logprob_start_len": 1,
        }


@pytest.mark.parametrize("suffix", ["", "/", "/v1", "/v1/"])
def test_base_url_may_end_in_v1(teacher: Teacher, suffix: str) -> None:
    TeacherServer(teacher.url + suffix, "teacher", K).topk([[1, 2]])
    assert teacher.requests[0][0] == "/v1/completions"


def test_tokens_that_are_tensors_are_sent_as_numbers(teacher: Teacher) -> None:
    from_tensors = ask(teacher).topk([torch.tensor(tokens) for tokens in SEQUENCES])
    assert torch.equal(from_tensors.topk.ids, ask(teacher).topk(SEQUENCES).topk.ids)


def test_a_sequence_of_one_token_needs_no_request(teacher: Teacher) -> None:
    topk, mask = ask(teacher).topk([[3]])
    assert not mask.any()
    assert (topk.ids == -1).all()
    assert not teacher.requests


def test_requests_run_in_parallel_and_answers_keep_their_order(teacher: Teacher) -> None:
    teacher.script = [0.3, 0.2, 0.1, 0.1]  # the first request is answered last
    sequences = [[i, i + 1, i + 2] for i in range(12)]
    topk, _ = ask(teacher, parallel=4).topk(sequences)
    assert teacher.most_at_once == 4
    for row, tokens in enumerate(sequences):
        assert torch.equal(topk.ids[row, :2], select_topk(logprobs(tokens), K).ids[:2])


def test_ids_may_be_written_token_id(teacher: Teacher) -> None:
    expected = ask(teacher).topk(SEQUENCES)

    def rename(answer: dict) -> dict:
        named = [p and {f"token_id:{i}": v for i, v in p.items()} for p in positions_of(answer)]
        answer["choices"][0]["prompt_logprobs"] = named
        return answer

    teacher.change = rename
    assert torch.equal(ask(teacher).topk(SEQUENCES).topk.ids, expected.topk.ids)


def test_the_sent_token_is_dropped_where_it_is_not_among_the_best(teacher: Teacher) -> None:
    tokens = [0, int(logprobs([0])[0].argmin()), 1]
    counts = []

    def count(answer: dict) -> dict:
        counts.extend(len(position) for position in positions_of(answer)[1:])
        return answer

    teacher.change = count
    topk, _ = ask(teacher).topk([tokens])
    assert counts[0] == K + 1
    assert tokens[1] not in topk.ids[0, 0]
    assert torch.equal(topk.ids[0, 0], select_topk(logprobs(tokens), K).ids[0])


def test_positions_without_entries_are_absent_and_others_stay_in_place(teacher: Teacher) -> None:
    whole = ask(teacher).topk([SEQUENCES[0]])

    def thin(answer: dict) -> dict:
        positions = positions_of(answer)
        positions[2] = None
        positions[3] = dict(list(positions[3].items())[:K])
        return answer

    teacher.change = thin
    topk, mask = ask(teacher).topk([SEQUENCES[0]])
    assert 30 not in whole.topk.ids[0, 2]  # so that position 3 has K entries, one too many
    assert mask[0].tolist() == [True, False, False, True, False]
    assert (topk.ids[0, 1:3] == -1).all()
    assert torch.equal(topk.ids[0, [0, 3]], whole.topk.ids[0, [0, 3]])


@pytest.mark.parametrize("ranks", [True, False], ids=["ranks", "no ranks"])
def test_a_server_that_caps_the_entries_raises(teacher: Teacher, ranks: bool) -> None:
    def cap(answer: dict) -> dict:
        for at, position in enumerate(positions_of(answer)[1:], 1):
            best = sorted(position, key=lambda i: -position[i]["logprob"])[: K - 2]
            kept = {i: position[i] for i in {str(SEQUENCES[0][at]), *best}}
            positions_of(answer)[at] = kept if ranks else {i: kept[i]["logprob"] for i in kept}
        return answer

    teacher.change = cap
    with pytest.raises(TeacherServerError, match=rf"sequence 0.* of {K} entries.*--max-logprobs"):
        ask(teacher, on_failure="mask").topk([SEQUENCES[0]])


def sglang_lists(answer: dict) -> tuple[list, list]:
    meta = answer["meta_info"]
    return meta["input_top_logprobs"], meta["input_token_logprobs"]


def positions_by(api: str, answer: dict) -> list:
    return positions_of(answer) if api == "vllm" else sglang_lists(answer)[0]


WITHOUT = {
    "null": lambda position: None,
    "sentinels": lambda position: (
        {i: {"logprob": -9999.0} for i in position}
        if isinstance(position, dict)
        else [[-9999.0, *entry[1:]] for entry in position]
    ),
}


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("form", WITHOUT)
def test_an_answer_without_entries_raises(teacher: Teacher, api: str, form: str) -> None:
    def forget(answer: dict) -> dict:
        positions = positions_by(api, answer)
        positions[1:] = map(WITHOUT[form], positions[1:])
        return answer

    teacher.change = forget
    message = r"POST http.*sequence 0 \(5 tokens.*no entries at any of the 3 positions from 2 on; "
    message += {"vllm": '.*"prompt_logprobs"', "sglang": '.*"top_logprobs_num"'}[api]
    for on_failure in ("raise", "mask"):
        with pytest.raises(TeacherServerError, match=message) as caught:
            ask(teacher, api=api, on_failure=on_failure).topk([SEQUENCES[0]], starts=[2])
        assert not isinstance(caught.value, TeacherUnavailableError)


def test_an_sglang_server_that_caps_the_entries_gets_its_own_advice(teacher: Teacher) -> None:
    def cap(answer: dict) -> dict:
        for position in sglang_lists(answer)[0][1:]:
            del position[2:]
        return answer

    teacher.change = cap
    with pytest.raises(TeacherServerError, match=f"2 of {K} entries.*top_logprobs_num") as caught:
        ask(teacher, api="sglang").topk([SEQUENCES[0]])
    assert "vLLM" not in str(caught.value)
    assert "--max-logprobs" not in str(caught.value)
    teacher.script = [(400, {"message": "top_logprobs_num must be positive"})]
    with pytest.raises(TeacherServerError, match="must be positive") as caught:
        ask(teacher, api="sglang").topk([SEQUENCES[0]])
    assert "vLLM" not in str(caught.value)


@pytest.mark.parametrize(
    "echo",
    [None, 5, "ab", [], [-0.5], [-0.5, None, "a"], [-0.5, "1"], [-0.5, True], [-0.5, 1.0], {}],
)
def test_an_echo_that_is_none_raises_with_the_requests_context(
    teacher: Teacher, echo: object
) -> None:
    def spoil(answer: dict) -> dict:
        sglang_lists(answer)[1][2] = echo
        return answer

    teacher.change = spoil
    message = (
        r"POST http.*sequence 0 \(5 tokens.*input_token_logprobs has .* at position 2, expected"
    )
    with pytest.raises(TeacherServerError, match=message):
        ask(teacher, api="sglang").topk([SEQUENCES[0]])


SPOILED: dict[str, tuple[str, Any, str]] = {
    "rank of text": ("vllm", {"1": {"logprob": -0.5, "rank": "3"}}, "has rank '3', expected"),
    "rank true": ("vllm", {"1": {"logprob": -0.5, "rank": True}}, "has rank True, expected"),
    "text": ("vllm", {"1": -0.5, " a": -0.7}, "names a token ' a'.*return_tokens_as_token_ids"),
    "digits of text": ("vllm", {"1": -0.5, " 1": -0.7}, "names a token ' 1', expected its id"),
    "log-prob": ("vllm", {"1": {"logprob": "high"}}, "'high' as a log-prob"),
    "beyond int32": ("vllm", {"1": -0.5, str(2**31): -0.5}, "2147483648 is beyond int32"),
    "without the sent token": ("vllm", {}, "no entry for token 1.*not those of the sequence"),
    "a number": ("vllm", 1.0, "a position of the payload is 1.0, a float"),
    "SGLang's text": ("sglang", [[-0.5, " a", None]], "names a token ' a'.*SGLang's /generate"),
    "SGLang's null": ("sglang", [[-0.5, None, " a"]], "names a token None.*SGLang's /generate"),
    "a flat list": ("sglang", [-0.5, 1, None], r"a position .* is \[-0.5, 1, None\]"),
    "a list of numbers": ("sglang", [-0.5], r"a position .* is \[-0.5\]"),
    "an echo": ("sglang", [[None, 1, None], [-0.5, 2, None]], "begins with .*input_top_logprobs"),
}


@pytest.mark.parametrize("case", SPOILED)
def test_a_position_that_cannot_be_read_raises_with_the_requests_context(
    teacher: Teacher, case: str
) -> None:
    api, position, message = SPOILED[case]

    def spoil(answer: dict) -> dict:
        positions_by(api, answer)[2] = position
        return answer

    teacher.change = spoil
    field = {"vllm": "prompt_logprobs", "sglang": "input_top_logprobs"}[api]
    where = rf"POST http.*sequence 0 \(5 tokens.*{field} (at position 2: )?.*{message}"
    with pytest.raises(TeacherServerError, match=where) as caught:
        ask(teacher, api=api).topk([SEQUENCES[0]])
    assert "position 2" in str(caught.value)
    if api == "sglang":
        assert "vLLM" not in str(caught.value)


TEXT = st.sampled_from(["1", " 1", "token_id:2", "a", "id", "token", "logprob", "rank"])
LEAF = st.one_of(st.none(), st.booleans(), st.integers(-2, 3), st.just(2**70), st.floats(), TEXT)
JSON = st.recursive(
    LEAF,
    lambda node: st.one_of(
        st.lists(node, max_size=3),
        st.dictionaries(TEXT | st.just("top_logprobs"), node, max_size=3),
        st.tuples(LEAF, LEAF, st.none()).map(list),
    ),
    max_leaves=8,
)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@settings(max_examples=150, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(positions=st.lists(JSON, min_size=2, max_size=2), echo=JSON, whole=st.booleans())
def test_whatever_is_answered_is_read_or_raises_with_the_requests_context(
    monkeypatch: pytest.MonkeyPatch, api: str, positions: list, echo: Any, whole: bool
) -> None:
    if api == "vllm":
        answer: Any = {"choices": [{"prompt_logprobs": [None, *positions]}]}
    else:
        echoes = [[None, 1, None], [-0.5, 2, None], echo if whole else [-0.5, 3, None]]
        lists = {"input_top_logprobs": [None, *positions], "input_token_logprobs": echoes}
        answer = {"meta_info": lists}
    server = TeacherServer("http://teacher", k=2, api=api)
    monkeypatch.setattr(server, "_answer", lambda *_: answer)
    try:
        topk, mask = server.topk([[1, 2, 3]])
    except TeacherServerError as error:
        assert str(error).startswith("POST http://teacher/")  # noqa: PT017
    else:
        assert mask.any()
        assert (topk.ids[mask] >= -1).all()


NAMED = {
    "id": lambda i, value, rank: {"id": i, "text": "1", "logprob": value},
    "token_id": lambda i, value, rank: {"token_id": i, "logprob": value, "rank": rank},
    "token": lambda i, value, rank: {"token": f"token_id:{i}", "logprob": value, "bytes": None},
}


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("form", NAMED)
def test_entries_may_have_names(teacher: Teacher, api: str, form: str) -> None:
    expected = ask(teacher, api=api).topk(SEQUENCES)

    def rename(answer: dict) -> dict:
        positions = positions_by(api, answer)
        for at, position in enumerate(positions[1:], 1):
            if api == "vllm":
                entries = [(int(i), v["logprob"], v["rank"]) for i, v in position.items()]
            else:
                entries = [(i, value, rank) for rank, (value, i, _) in enumerate(position, 1)]
            positions[at] = [NAMED[form](*entry) for entry in entries]
        return answer

    teacher.change = rename
    assert torch.equal(ask(teacher, api=api).topk(SEQUENCES).topk.ids, expected.topk.ids)


def test_sglang_positions_with_fewer_entries_count_as_without(teacher: Teacher) -> None:
    def thin(answer: dict) -> dict:
        answer["meta_info"]["input_top_logprobs"][2].pop()
        return answer

    teacher.change = thin
    _, mask = ask(teacher, api="sglang").topk([SEQUENCES[0]])
    assert mask[0].tolist() == [True, False, True, True, False]


def test_answers_without_ranks_are_read_by_their_number(teacher: Teacher) -> None:
    expected = ask(teacher).topk(SEQUENCES)

    def plain(answer: dict) -> dict:
        values = [p and {i: v["logprob"] for i, v in p.items()} for p in positions_of(answer)]
        answer["choices"][0]["prompt_logprobs"] = values
        return answer

    teacher.change = plain
    assert torch.equal(ask(teacher).topk(SEQUENCES).topk.ids, expected.topk.ids)


def test_clamped_minus_infinity_is_absent(teacher: Teacher) -> None:
    def clamp(answer: dict) -> dict:
        for position in positions_of(answer)[1:]:
            *_, last = position
            position[last]["logprob"] = -9999.0
        return answer

    teacher.change = clamp
    topk, mask = ask(teacher).topk([[1, 2, 3]])
    assert mask[0].tolist() == [True, True, False]
    assert (topk.logits[topk.ids >= 0] > -100).all()


@pytest.mark.parametrize("status", [429, 500, 501, 502, 503, 504, 529])
def test_busy_and_failing_servers_are_asked_again(teacher: Teacher, status: int) -> None:
    teacher.script = [(status, {"message": "later"})] * 2
    topk, _ = ask(teacher, retries=2).topk([[1, 2, 3]])
    assert len(teacher.requests) == 3
    assert torch.equal(topk.ids[0, :2], select_topk(logprobs([1, 2, 3]), K).ids[:2])


@pytest.fixture
def pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The seconds between attempts, which take no time."""
    pauses: list[float] = []

    class Impatient(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            pauses.append(timeout or 0.0)
            return self.is_set()

    monkeypatch.setattr(client, "Event", Impatient)
    return pauses


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        ("7", 7),
        (60, pytest.approx(60, abs=10)),  # a date so many seconds from now
        (-60, 2),
        ("1", 2),
        ("soon", 2),
        ("Mon, 01 Jan 99999 00:00:00 GMT", 2),
        ("Mon, 01 Jan 99999999999999999999 00:00:00 GMT", 2),
        ("86400", 120),
    ],
)
def test_retry_after_is_obeyed_within_bounds(
    teacher: Teacher, pauses: list[float], header: str | int, expected: Any
) -> None:
    if isinstance(header, int):
        header = formatdate(time.time() + header, usegmt=True)
    teacher.script = [(429, {}, {"Retry-After": header})]
    ask(teacher, retries=1, backoff=2.0).topk([[1, 2, 3]])
    assert pauses == [expected]


def test_pauses_double_up_to_two_minutes(teacher: Teacher, pauses: list[float]) -> None:
    teacher.script = [(503, "")] * 9
    ask(teacher, retries=9, backoff=1.0).topk([[1, 2, 3]])
    assert pauses == [1, 2, 4, 8, 16, 32, 64, 120, 120]


HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"
FAILURES: dict[str, Any] = {
    "closed before the headers": lambda _: None,
    "silent after the headers": lambda file: (
        file.write(HEAD + b"Content-Length: 99\r\n\r\n"),
        time.sleep(0.6),
    ),
    "cut body": lambda file: file.write(HEAD + b'Content-Length: 99\r\n\r\n{"choices"'),
    "cut chunks": lambda file: file.write(
        HEAD + b'Transfer-Encoding: chunked\r\n\r\na\r\n{"choices"\r\n'
    ),
    "cut JSON": (200, '{"choices": [{"prompt_'),
    "a number beyond all": (200, '{"choices": ' + "9" * 5000 + "}"),
    "a gateway's page": (200, "<html>gateway</html>"),
    "error object": (200, {"object": "error", "message": "engine died", "code": 500}),
    "nested error object": (200, {"error": {"message": "busy", "code": "429"}}),
}


@pytest.mark.parametrize("failure", FAILURES)
def test_every_part_of_an_exchange_is_tried_again(teacher: Teacher, failure: str) -> None:
    teacher.script = [FAILURES[failure]] * 2
    topk, _ = ask(teacher, retries=2, timeout=0.3).topk([[1, 2, 3]])
    assert len(teacher.requests) == 3
    assert torch.equal(topk.ids[0, :2], select_topk(logprobs([1, 2, 3]), K).ids[:2])


@pytest.mark.parametrize("failure", FAILURES)
def test_failures_without_end_raise_or_mask(teacher: Teacher, failure: str) -> None:
    teacher.script = [FAILURES[failure]] * 4
    with pytest.raises(TeacherUnavailableError, match=r"sequence 0 \(3 tokens.*after all retries"):
        ask(teacher, retries=1, timeout=0.3).topk([[1, 2, 3]])
    with pytest.warns(UserWarning, match="left out 1 of 1 sequences.*after all retries"):
        ask(teacher, retries=1, timeout=0.3, on_failure="mask").topk([[1, 2, 3]])
    assert len(teacher.requests) == 4


@pytest.mark.parametrize(
    "answer",
    [
        {"object": "error", "message": "no such model", "code": 404},
        {"error": {"message": "no such model", "code": "model_not_found"}},
        {"error": "no such model"},
        {"error": {"message": "no such model", "code": "\u0665\u0660\u0660"}},
        {"error": {"message": "no such model", "code": "9" * 5000}},
    ],
)
def test_error_objects_that_will_not_pass_raise_at_once(teacher: Teacher, answer: Any) -> None:
    teacher.script = [(200, answer)]
    with pytest.raises(TeacherServerError, match=r"answered 40[04]: .*no such model") as caught:
        ask(teacher).topk([[1, 2, 3]])
    assert not isinstance(caught.value, TeacherUnavailableError)
    assert len(teacher.requests) == 1


def test_a_netrc_does_not_replace_the_key(
    teacher: Teacher, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "netrc").write_text("machine 127.0.0.1 login me password pw")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    ask(teacher, api_key="secret").topk([[1, 2]])
    assert teacher.requests[0][2]["Authorization"] == "Bearer secret"


@pytest.mark.parametrize("status", [429, 500])
def test_the_last_failure_raises_with_the_servers_message(teacher: Teacher, status: int) -> None:
    teacher.script = [(status, {"message": "on fire"})] * 3
    with pytest.raises(TeacherUnavailableError, match=f"3 tokens.*{status}: .*on fire"):
        ask(teacher, retries=2).topk([[1, 2, 3]])
    assert len(teacher.requests) == 3


def test_a_refused_request_raises_at_once_with_the_servers_message(teacher: Teacher) -> None:
    message = "Requested prompt logprobs of 32, which is greater than max allowed: 20"
    teacher.script = [(400, {"error": {"message": message}})]
    with pytest.raises(TeacherServerError, match=f"400: .*{message}.*--max-logprobs") as caught:
        ask(teacher).topk([[1, 2, 3]])
    assert not isinstance(caught.value, TeacherUnavailableError)
    assert len(teacher.requests) == 1


def test_another_refusal_has_no_hint(teacher: Teacher) -> None:
    teacher.script = [(404, {"message": "The model `teacher` does not exist."})]
    with pytest.raises(TeacherServerError, match="does not exist") as caught:
        ask(teacher).topk([[1, 2, 3]])
    assert "max-logprobs" not in str(caught.value)


def test_a_time_out_is_retried(teacher: Teacher) -> None:
    teacher.script = [1.0]
    topk, _ = ask(teacher, timeout=0.2, retries=1).topk([[1, 2, 3]])
    assert len(teacher.requests) == 2
    assert (topk.ids[0, :2] >= 0).all()


def test_time_outs_without_end_raise(teacher: Teacher) -> None:
    teacher.script = [0.6, 0.6]
    with pytest.raises(TeacherUnavailableError, match=r"sequence 0 \(3 tokens.*timed out"):
        ask(teacher, timeout=0.1, retries=1).topk([[1, 2, 3]])


def test_nobody_there_raises() -> None:
    with socket.socket() as unused:
        unused.bind(("127.0.0.1", 0))
        url = f"http://127.0.0.1:{unused.getsockname()[1]}"
    with pytest.raises(TeacherUnavailableError, match="after all retries"):
        TeacherServer(url, retries=1, backoff=0.0).topk([[1, 2, 3]])


def test_masking_failures_warns_and_leaves_the_sequence_without_entries(teacher: Teacher) -> None:
    teacher.script = [(500, "broken")] * 2
    server = ask(teacher, retries=1, parallel=1, on_failure="mask")
    with pytest.warns(UserWarning, match="left out 1 of 3 .*sequence 0.*500: broken") as caught:
        _, mask = server.topk(SEQUENCES)
    assert mask.sum(-1).tolist() == [0, 1, 2]
    assert [warning.filename for warning in caught] == [__file__]


def test_an_error_waits_neither_for_other_requests_nor_for_their_retries(teacher: Teacher) -> None:
    teacher.script = [1.5, (503, "busy", {"Retry-After": "30"}), (400, "no"), *[(400, "no")] * 9]
    started = time.monotonic()
    with pytest.raises(TeacherServerError, match="400: no"):
        ask(teacher, parallel=3).topk([[1, 2, 3]] * 12)
    assert time.monotonic() - started < 1.2
    time.sleep(0.1)
    assert len(teacher.requests) < 12


def test_masking_failures_does_not_hide_refusals(teacher: Teacher) -> None:
    teacher.script = [(400, "no")]
    with pytest.raises(TeacherServerError, match="400: no"):
        ask(teacher, on_failure="mask", parallel=1).topk(SEQUENCES)


@pytest.mark.parametrize("api", ["vllm", "sglang"])
@pytest.mark.parametrize("drop", [0, -1])
def test_another_number_of_positions_raises(teacher: Teacher, api: str, drop: int) -> None:
    def shorten(answer: dict) -> dict:
        if api == "vllm":
            positions_of(answer).pop(drop)
        else:
            answer["meta_info"]["input_top_logprobs"].pop(drop)
        return answer

    teacher.change = shorten
    with pytest.raises(TeacherServerError, match=r"4 positions in \w+, expected 5"):
        ask(teacher, api=api).topk([SEQUENCES[0]])


@pytest.mark.parametrize("api", ["vllm", "sglang"])
def test_positions_that_are_off_by_one_raise(teacher: Teacher, api: str) -> None:
    def shift(answer: dict) -> dict:
        lists = [positions_of(answer)] if api == "vllm" else list(answer["meta_info"].values())
        for positions in lists:
            positions[1:] = [*positions[2:], positions[1]]
        return answer

    teacher.change = shift
    with pytest.raises(TeacherServerError, match=r"sequence 0.*not those of the sequence"):
        ask(teacher, api=api).topk([[3, 8, 1, 30, 2]])


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        ({"choices": [{"text": "hello"}]}, r"no choices\.0\.prompt_logprobs: .*hello"),
        ({"choices": []}, "no choices"),
        ([], "no choices"),
        ({"choices": [{"prompt_logprobs": [None, 1.0, 2.0]}]}, "position 1: .* a float"),
        ({"choices": [{"prompt_logprobs": 7}]}, "no positions"),
        ({"choices": [{"prompt_logprobs": "abc"}]}, "no positions"),
    ],
)
def test_other_answers_raise(teacher: Teacher, answer: object, message: str) -> None:
    teacher.script = [(200, answer)]
    with pytest.raises(TeacherServerError, match=message):
        ask(teacher).topk([[1, 2, 3]])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 0}, "k is 0"),
        ({"retries": -1}, "retries is -1"),
        ({"backoff": -1}, "backoff is -1"),
        ({"parallel": 0}, "parallel is 0"),
        ({"timeout": 0}, "timeout is 0"),
        ({"timeout": float("inf")}, "timeout is inf"),
        ({"backoff": float("nan")}, "backoff is nan"),
        ({"base_url": None}, "base_url is None"),
        ({"extra": {"priority": float("nan")}}, "extra is .*expected fields of JSON"),
        ({"api": "tgi"}, "'vllm', 'sglang'"),
        ({"on_failure": "ignore"}, "'raise', 'mask'"),
        ({"base_url": "localhost:8000"}, "http://"),
    ],
)
def test_options_that_are_not_allowed(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TeacherServer(**{"base_url": "http://localhost", **options})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"k": 2.5}, "k is a float"),
        ({"k": True}, "k is a bool"),
        ({"retries": 1.5}, "retries is a float"),
        ({"parallel": "8"}, "parallel is a str"),
        ({"extra": {"stop": {1}}}, "extra is .*expected fields of JSON: .*set"),
        ({"extra": 3}, "extra is 3, expected"),
    ],
)
def test_options_of_another_kind(options: dict, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        TeacherServer("http://localhost", **options)


@pytest.mark.parametrize(
    ("sequences", "starts", "message"),
    [
        ([[1, 2], [3, 5.9]], None, r"sequence 1 has 5\.9 at position 1, expected an int"),
        ([[1, 2.0]], None, r"sequence 0 has 2\.0 at position 1"),
        (torch.tensor([[1.0, 5.9]]), None, r"sequence 0 has 1\.0 at position 0"),
        ([np.array([1.0, 2.0])], None, "sequence 0 has np.float64"),
        ([[1, True]], None, "sequence 0 has True at position 1"),
        (torch.tensor([[True, True]]), None, "sequence 0 has True at position 0"),
        ([[1, "5"]], None, "sequence 0 has '5' at position 1"),
        (["15"], None, "sequence 0 is '15', expected a list"),
        ([1, 2], None, "sequence 0 is 1, expected a list"),
        (torch.tensor([1, 2]), None, "sequence 0 is 1, expected a list"),
        ([{"input_ids": [1, 2]}], None, "sequence 0 is .*input_ids"),
        ([[1, None]], None, "sequence 0 has None at position 1"),
        ([[1, 2, 3]], [1.5], r"starts has 1\.5 at position 0"),
        ([[1, 2, 3]], 1, "starts is 1, expected a list"),
    ],
)
def test_sequences_of_another_kind_are_not_rounded(
    teacher: Teacher, sequences: Any, starts: Any, message: str
) -> None:
    with pytest.raises(TypeError, match=message):
        ask(teacher).topk(sequences, starts=starts)
    assert not teacher.requests


@pytest.mark.parametrize("token", [-1, -100, 2**31, 2**70])
def test_tokens_out_of_range_are_not_sent(teacher: Teacher, token: int) -> None:
    with pytest.raises(
        ValueError, match=rf"sequence 1 has {token} at position 2, allowed.*padding"
    ):
        ask(teacher).topk([[1, 2], [1, 2, token]])
    assert not teacher.requests


def test_k_of_any_integer_type_is_sent(teacher: Teacher) -> None:
    assert ask(teacher, k=np.int64(3)).topk([[1, 2]]).topk.k == 3


@pytest.mark.parametrize(
    ("sequences", "starts", "message"),
    [([], None, "empty"), ([[1, 2]], [0], "1 or more"), ([[1, 2]], [1, 1], "1 sequences")],
)
def test_sequences_that_are_not_allowed(
    teacher: Teacher, sequences: list, starts: list | None, message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        ask(teacher).topk(sequences, starts=starts)


def test_request_bodies_are_json_numbers_for_any_integer_type(teacher: Teacher) -> None:
    ask(teacher).topk([np.array([1, 2, 3])])
    assert json.loads(json.dumps(teacher.requests[0][1]["prompt"])) == [1, 2, 3]

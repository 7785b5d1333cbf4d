"""``TeacherServer``: an inference server's top-K log-probs of given tokens, as a ``TopK``."""

from __future__ import annotations

import json
import math
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from functools import partial
from threading import Event
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from opd_kernels._checks import DEFAULT_K, check_int
from opd_kernels._payload import Entries, integer, read_position, shown
from opd_kernels.support import SENTINEL, TopK

try:
    import requests
    from requests.adapters import HTTPAdapter
    from urllib3.exceptions import InvalidHeader
    from urllib3.util import Retry
except ImportError as error:
    raise ImportError(
        f"a teacher behind a server needs requests ({error}): pip install requests"
    ) from error

__all__ = ["Scored", "TeacherServer", "TeacherServerError", "TeacherUnavailableError"]

RETRIED = frozenset({429, *range(500, 600)})
CONNECT_SECONDS = 10.0
MAX_ID = np.iinfo(np.int32).max
NOTHING = read_position(None)  # the entries of a position that has none
PAUSE_SECONDS = 120.0  # the longest between two attempts
SHOWN_CHARACTERS = 500
# Errors that may pass: scoring a sequence a second time does no harm.
TRANSIENT = (
    requests.ConnectionError,
    requests.Timeout,
    requests.exceptions.ChunkedEncodingError,
    requests.exceptions.ContentDecodingError,
)


class TeacherServerError(RuntimeError):
    """The server refused a request, or its answer does not fit what was sent."""


class TeacherUnavailableError(TeacherServerError):
    """No answer after all retries: connection, time-out, status 429 or 5xx, or broken JSON."""


class _PassingError(Exception):
    """A failure that may pass; ``pause``: seconds that the server asks to wait for."""

    def __init__(self, reason: str, pause: float = 0.0) -> None:
        super().__init__(reason)
        self.pause = pause


class Scored(NamedTuple):
    """A scored batch: ``topk`` (B, T), and ``mask`` bool (B, T), True where a row has entries."""

    topk: TopK
    mask: Tensor


class _Api(NamedTuple):
    """How a kind of server is asked for the tokens from ``start`` on, and how it answers.

    ``positions`` takes one element per token from ``start`` on out of ``field`` of the answer;
    ``read_position`` reads it. ``has_sent`` says that each element lists the token that was sent.
    The others are advice: ``few`` if there are fewer than {k} entries, ``none`` if there are none,
    ``text`` if tokens are text, ``refused`` if the server's error mentions logprobs.
    """

    path: str
    body: Callable[[TeacherServer, list[int], int], dict[str, Any]]
    positions: Callable[[Any, list[int], int], list[Any]]
    field: str
    has_sent: bool
    few: str
    none: str
    text: str
    refused: str


class TeacherServer:
    """A client that asks an inference server for the K most likely tokens at given positions.

    One request per sequence, ``parallel`` of them at a time. The prompt is the whole sequence as
    token ids, so nothing is tokenised anew; the server generates one token, which is not used.

    Formats, by ``api``:

    - ``"vllm"``: POST ``/v1/completions`` with ``prompt_logprobs``, as vLLM answers it:
      ``choices[0].prompt_logprobs`` holds one element per token, None for the first, else a mapping
      from token id to ``{"logprob": ..., "rank": ...}`` with the K best and the token that was
      sent, which is dropped where it is not among the K best. vLLM refuses K above its
      ``--max-logprobs``, 20 by default, and sequences that leave no room for the generated token in
      ``--max-model-len``.
    - ``"sglang"``: POST ``/generate`` with ``return_logprob``, ``top_logprobs_num`` and
      ``logprob_start_len``, as SGLang answers it: ``meta_info.input_top_logprobs`` and
      ``meta_info.input_token_logprobs`` hold one element per token from there on, the first None.

    Both compute these log-probs at temperature 1, whatever the request says.

    Args:
        base_url: ``http://host:8000``, with or without ``/v1``.
        model: the name under which the server serves the teacher; None where it serves one.
        k: entries per position; 32 (the paper's).
        api: "vllm" or "sglang".
        timeout: seconds without a byte from the server before a request counts as failed; a server
            that goes on sending is waited for.
        retries: further attempts after a failed connection, a time-out, an answer that is cut off
            or is not JSON, and status 429 or 5xx, be it in an error object that comes with status
            200. Other statuses and error objects raise at once.
        backoff: seconds before the first retry, doubled for each further one; longer where the
            server's Retry-After says so, never more than 120. A silent server thus holds a sequence
            for at most (retries + 1) * (10 + timeout) + retries * 120 seconds.
        parallel: requests at a time.
        api_key: sent as a bearer token.
        extra: further fields of the request's body.
        on_failure: what becomes of a sequence that stays without answer after all retries:
            "raise", or "mask": a warning, and a sequence without entries.

    A position for which the server gives fewer than K entries counts as one without entries. Where
    no position of a sequence has K, the server caps them, and that is an error; so is an answer
    without entries at any position.

    Errors: ``TypeError`` for options and tokens of another kind, such as a token 5.9;
    ``ValueError`` for options and sequences that are not allowed; ``TeacherUnavailableError`` after
    the last retry; ``TeacherServerError`` for a request that the server refuses, its message passed
    on, for an answer that cannot be read or names tokens as text, for one with another number of
    positions than were sent or for other tokens, so that entries are never one position off, for
    one without entries, and for a server that caps K. They name the URL, the sequence and the
    position.

    Example::

        with TeacherServer("http://localhost:8000", "Qwen/Qwen3-8B", k=32) as server:
            topk, mask = server.topk([[1, 5, 7, 2], [1, 9, 2]])
        loss = topk_rkl(student_logits, topk, mask=mask)  # (2, 4, V)
    """

    def __init__(
        self,
        base_url: str,
        model: str | None = None,
        k: int = DEFAULT_K,
        *,
        api: str = "vllm",
        timeout: float = 120.0,
        retries: int = 4,
        backoff: float = 1.0,
        parallel: int = 8,
        api_key: str | None = None,
        extra: Mapping[str, Any] | None = None,
        on_failure: str = "raise",
    ) -> None:
        """Checks the options; connects to nothing yet."""
        _check_choice(api, tuple(APIS), "api")
        _check_choice(on_failure, ("raise", "mask"), "on_failure")
        for count, name in ((k, "k"), (retries, "retries"), (parallel, "parallel")):
            check_int(count, name)
        for value, least, name in (
            (k, 1, "k"),
            (retries, 0, "retries"),
            (backoff, 0, "backoff"),
            (parallel, 1, "parallel"),
        ):
            if not least <= value < math.inf:
                raise ValueError(f"{name} is {value}, allowed is {least} or more")
        if not 0 < timeout < math.inf:
            raise ValueError(f"timeout is {timeout} seconds, allowed is more than 0")
        if not str(base_url).startswith(("http://", "https://")):
            raise ValueError(f"base_url is {base_url!r}, expected http://... or https://...")
        try:
            json.dumps(dict(extra or {}), allow_nan=False)
        except (TypeError, ValueError) as error:
            raise type(error)(
                f"extra is {shown(extra)}, expected fields of JSON: {error}"
            ) from None
        self.model, self.k, self.on_failure = model, int(k), on_failure
        self._api, self._timeout, self._extra = APIS[api], timeout, dict(extra or {})
        self._parallel, self._retries, self._backoff = parallel, retries, backoff
        self.url = base_url.rstrip("/").removesuffix("/v1") + self._api.path
        self._session = requests.Session()
        if api_key is not None:
            self._session.auth = partial(_with_token, api_key)
        for scheme in ("http://", "https://"):
            self._session.mount(scheme, HTTPAdapter(pool_maxsize=parallel))

    def topk(
        self,
        sequences: Sequence[Sequence[int]],
        *,
        starts: Sequence[int] | None = None,
        device: torch.device | str | None = None,
    ) -> Scored:
        """The teacher's entries beside the logits of a batch.

        Row t of sequence b is the teacher's distribution of token t + 1 after the tokens up to t:
        it belongs to the student's logits at position t. The last row of a sequence has no entries;
        shorter sequences are padded on the right with rows that have none.

        Args:
            sequences: B sequences of token ids, prompt and response together, without padding.
            starts: per sequence the first token that is to be scored, 1 or more, for instance the
                length of the prompt; rows before ``starts[b] - 1`` have no entries then.
            device: where the result goes; the CPU without one.

        Returns ``Scored``: the ``TopK`` (B, T) of width k, T being the longest length, and the bool
        mask (B, T) of the rows that have entries.
        """
        batch = [_tokens(sequence, index) for index, sequence in enumerate(sequences)]
        firsts = [1] * len(batch) if starts is None else _integers(starts, "starts")
        if not batch:
            raise ValueError("sequences is empty, expected one or more")
        if len(firsts) != len(batch) or min(firsts) < 1:
            raise ValueError(
                f"starts is {firsts}, expected one number of 1 or more for each of the "
                f"{len(batch)} sequences"
            )
        pool, stop = ThreadPoolExecutor(min(self._parallel, len(batch))), Event()
        sent = enumerate(zip(batch, firsts, strict=True))
        futures = [pool.submit(self._rows, stop, i, *sequence) for i, sequence in sent]
        try:
            for future in as_completed(futures):
                if not self._may_be_left_out(future.exception()):
                    future.result()
        finally:
            # After an error nothing is waited for: requests under way end by themselves.
            stop.set()
            pool.shutdown(wait=False, cancel_futures=True)
        failures = [error for future in futures if (error := future.exception()) is not None]
        if failures:
            warnings.warn(
                f"left out {len(failures)} of {len(batch)} sequences, the first: {failures[0]}",
                stacklevel=2,
            )
        rows = [
            [NOTHING] * len(tokens) if future.exception() else future.result()
            for tokens, future in zip(batch, futures, strict=True)
        ]
        ids, logprobs = ([[entries[i] for entries in row] for row in rows] for i in (0, 1))
        topk = TopK.from_logprobs(logprobs, ids, k=self.k, device=device)
        return Scored(topk, (topk.ids >= 0).any(-1))

    def score(
        self,
        input_ids: Tensor,
        *,
        attention_mask: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> Scored:
        """The teacher's entries of a padded batch, as ``distill_loss`` asks for them.

        Args:
            input_ids: (B, T); padding on the left, on the right or on both sides.
            attention_mask: (B, T), 0 on padding; without one nothing is.
            mask: (B, T), the tokens whose entries are wanted; without one all.

        Returns ``Scored`` on the device of ``input_ids``: the ``TopK`` (B, T), whose row t is of
        position t, and the bool mask (B, T) of the *tokens* that have entries. Where a wanted token
        has none, ``TeacherServerError``, or with ``on_failure="mask"`` False in that mask.
        """
        tokens = input_ids.cpu()
        real = torch.ones_like(tokens) if attention_mask is None else attention_mask.cpu()
        real = real.bool()
        wanted = real if mask is None else mask.cpu().bool() & real
        rows = [row[kept].tolist() for row, kept in zip(tokens, real, strict=True)]
        starts = [_first(row[kept]) for row, kept in zip(wanted, real, strict=True)]
        topk, scored = self.topk(rows, starts=starts)
        ids = torch.full((*tokens.shape, topk.k), -1, dtype=topk.ids.dtype)
        logprobs = torch.full(ids.shape, -torch.inf)
        found = torch.zeros_like(real)
        for b, row in enumerate(rows):
            first = int(real[b].int().argmax()) if row else 0
            columns = slice(first, first + len(row))
            if not real[b, columns].all():
                raise ValueError(
                    f"attention_mask has padding between the tokens of sequence {b}, expected it "
                    "on the left and on the right only"
                )
            ids[b, columns], logprobs[b, columns] = (
                topk.ids[b, : len(row)],
                topk.logits[b, : len(row)],
            )
            found[b, first + 1 : first + len(row)] = scored[b, : max(len(row) - 1, 0)]
        # The first token of a sequence has nothing before it.
        missing = wanted & ~found & (real.cumsum(-1) > 1)
        if missing.any() and self.on_failure == "raise":
            raise TeacherServerError(
                f"the server has no {self.k} entries for {int(missing.sum())} of "
                f"{int(wanted.sum())} tokens; "
                'TeacherServer(on_failure="mask") leaves such tokens out'
            )
        sums = torch.where(found.roll(-1, 1), 0.0, torch.nan)
        return Scored(TopK(ids, logprobs, sums).to(input_ids.device), found.to(input_ids.device))

    def close(self) -> None:
        """Closes the connections."""
        self._session.close()

    def __enter__(self) -> TeacherServer:
        """The server, which leaves its connections open until the end of the block."""
        return self

    def __exit__(self, *_: object) -> None:
        """Closes the connections."""
        self.close()

    def _may_be_left_out(self, error: BaseException | None) -> bool:
        return self.on_failure == "mask" and isinstance(error, TeacherUnavailableError)

    def _rows(self, stop: Event, index: int, tokens: list[int], start: int) -> list[Entries]:
        """One element per token of a sequence: the entries that belong to its logits.

        Every error of a request gets its context here.
        """
        if start >= len(tokens):
            return [NOTHING] * len(tokens)
        try:
            answer = self._answer(stop, self._api.body(self, tokens, start))
            scored = self._scored(answer, tokens, start)
        except TeacherServerError as error:
            raise type(error)(
                f"POST {self.url} for sequence {index} ({len(tokens)} tokens, k={self.k}): {error}"
            ) from error
        return [*[NOTHING] * (start - 1), *scored, NOTHING]

    def _scored(self, answer: Any, tokens: list[int], start: int) -> list[Entries]:
        """The entries of the positions from ``start`` on; none if fewer than k are of the best."""
        api, rows, counts = self._api, [], []
        for position, node in enumerate(api.positions(answer, tokens, start), start):
            try:
                entries = read_position(node, api.text)
                counts.append(_count_best(node, len(entries[0]), self.k))
            except (TypeError, ValueError) as error:
                raise TeacherServerError(f"{api.field} at position {position}: {error}") from error
            if api.has_sent and node is not None and tokens[position] not in entries[0]:
                raise TeacherServerError(
                    f"{api.field} has no entry for token {tokens[position]}, which was sent at "
                    f"position {position}: its positions are not those of the sequence"
                )
            rows.append(entries)
        if 0 < max(counts) < self.k:
            raise TeacherServerError(
                f"the server gives at most {max(counts)} of {self.k} entries at a position; "
                f"{api.few.format(k=self.k)}"
            )
        complete = [
            entries if count >= self.k else NOTHING
            for entries, count in zip(rows, counts, strict=True)
        ]
        if not any(map(_is_present, complete)):
            raise TeacherServerError(
                f"{api.field} has no entries at any of the {len(rows)} positions from {start} on; "
                f"{api.none}"
            )
        return complete

    def _answer(self, stop: Event, body: dict[str, Any]) -> Any:
        """The server's answer; retries failures that may pass, until ``stop`` is set."""
        attempt = 0
        while True:
            try:
                return self._exchange(body)
            except _PassingError as failure:
                if attempt == self._retries or stop.is_set():
                    raise TeacherUnavailableError(
                        f"failed after all retries: {failure}"
                    ) from failure
                pause = max(failure.pause, self._backoff * 2**attempt)
            stop.wait(min(pause, PAUSE_SECONDS))
            attempt += 1

    def _exchange(self, body: dict[str, Any]) -> Any:
        try:
            response = self._session.post(
                self.url, json=body | self._extra, timeout=(CONNECT_SECONDS, self._timeout)
            )
        except TRANSIENT as error:
            raise _PassingError(str(error)) from error
        except requests.RequestException as error:
            raise TeacherServerError(str(error)) from error
        status, answer = response.status_code, None
        if status == requests.codes.ok:
            try:
                answer = response.json()
            except (ValueError, RecursionError):
                raise _PassingError(
                    f"answered {_text(response)!r}, expected JSON; is this an inference server?"
                ) from None
            status = _status_inside(answer)
        if status in RETRIED:
            raise _PassingError(f"answered {status}: {_text(response)}", _retry_after(response))
        if status != requests.codes.ok:
            text = _text(response)
            hint = self._api.refused.format(k=self.k) if "logprobs" in text else ""
            raise TeacherServerError(f"answered {status}: {text}{hint}")
        return answer


def _first(wanted: Tensor) -> int:
    """The first token of a sequence that is to be scored; its length if none is."""
    return max(int(wanted.int().argmax()), 1) if wanted.any() else max(len(wanted), 1)


def _tokens(sequence: Any, index: int) -> list[int]:
    """The token ids of a sequence, as JSON has them."""
    tokens = _integers(sequence, f"sequence {index}")
    for position, token in enumerate(tokens):
        if not 0 <= token <= MAX_ID:
            raise ValueError(
                f"sequence {index} has {token} at position {position}, allowed are token ids from "
                f"0 to {MAX_ID}; leave padding out"
            )
    return tokens


def _integers(values: Any, name: str) -> list[int]:
    """The values as ints; raises for anything but integers, also for text of digits."""
    values = values.tolist() if isinstance(values, Tensor) else values
    if isinstance(values, (str, Mapping)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {shown(values)}, expected a list of ints")
    found = []
    for position, value in enumerate(values):
        number = integer(value)
        if number is None:
            raise TypeError(f"{name} has {shown(value)} at position {position}, expected an int")
        found.append(number)
    return found


def _with_token(token: str, request: Any) -> Any:
    """The request with a bearer token, which a ``.netrc`` does not replace."""
    request.headers["Authorization"] = f"Bearer {token}"
    return request


def _text(response: Any) -> str:
    """The beginning of an answer, as an error shows it."""
    return str(response.content[:SHOWN_CHARACTERS].decode(errors="replace"))


def _status_inside(answer: Any) -> int:
    """The status of an error object; 200 if the answer is no error object."""
    if not isinstance(answer, Mapping):
        return 200
    error = answer if answer.get("object") == "error" else answer.get("error")
    if error is None:
        return 200
    code = str(error.get("code")) if isinstance(error, Mapping) else ""
    return int(code) if re.fullmatch("[0-9]{3}", code) else 400


def _retry_after(response: Any) -> float:
    try:
        return Retry().get_retry_after(response.raw) or 0.0
    except (InvalidHeader, ValueError, OverflowError):
        return 0.0


def _count_best(node: Any, count: int, k: int) -> int:
    """How many of a position's ``count`` entries are among the k best; without ranks all are."""
    entries = node.values() if isinstance(node, Mapping) else node or ()
    ranks = [entry.get("rank") for entry in entries if isinstance(entry, Mapping)]
    for rank in ranks:
        if isinstance(rank, bool) or not isinstance(rank, (int, float, type(None))):
            raise TypeError(f"an entry has rank {shown(rank)}, expected a number")
    return count - sum(rank is not None and rank > k for rank in ranks)


def _is_present(entries: Entries) -> bool:
    """Whether a position has an entry that counts."""
    ids, logprobs = entries
    return bool(((ids >= 0) & ~(logprobs <= SENTINEL)).any())


def _check_choice(value: str, allowed: tuple[str, ...], name: str) -> None:
    if value not in allowed:
        raise ValueError(f"{name} is {value!r}, allowed are {', '.join(map(repr, allowed))}")


def _vllm_body(server: TeacherServer, tokens: list[int], start: int) -> dict[str, Any]:
    model = {} if server.model is None else {"model": server.model}
    return model | {
        "prompt": tokens,
        "max_tokens": 1,
        "temperature": 1.0,
        "prompt_logprobs": server.k,
    }


def _vllm_positions(answer: Any, tokens: list[int], start: int) -> list[Any]:
    positions = _field(answer, "choices", 0, "prompt_logprobs")
    _check_count(positions, len(tokens), "prompt_logprobs")
    return positions[start:]


def _sglang_body(server: TeacherServer, tokens: list[int], start: int) -> dict[str, Any]:
    return {
        "input_ids": tokens,
        "sampling_params": {"max_new_tokens": 1, "temperature": 1.0},
        "return_logprob": True,
        "top_logprobs_num": server.k,
        # The first position of the answer has no entries, so it is the one before ``start``.
        "logprob_start_len": start - 1,
    }


def _sglang_positions(answer: Any, tokens: list[int], start: int) -> list[Any]:
    positions = _field(answer, "meta_info", "input_top_logprobs")
    echoed = _field(answer, "meta_info", "input_token_logprobs")
    sent = tokens[start - 1 :]
    _check_count(positions, len(sent), "input_top_logprobs")
    _check_count(echoed, len(sent), "input_token_logprobs")
    for position, (token, entry) in enumerate(zip(sent, echoed, strict=True), start - 1):
        given = integer(entry[1]) if isinstance(entry, list) and len(entry) > 1 else None
        if given is None:
            raise TeacherServerError(
                f"input_token_logprobs has {shown(entry)} at position {position}, expected "
                "[logprob, id, text]; is this SGLang's /generate?"
            )
        # SGLang echoes the vocabulary's last id as 0.
        if given not in (token, 0):
            raise TeacherServerError(
                f"input_token_logprobs has token {given} at position {position}, where {token} was "
                "sent: its positions are not those of the sequence"
            )
    return positions[1:]


def _field(answer: Any, *path: str | int) -> Any:
    """The part of the answer at a path."""
    node = answer
    for step in path:
        try:
            node = node[step]
        except (KeyError, IndexError, TypeError):
            node = None
        if node is None:
            shown = ".".join(map(str, path))
            raise TeacherServerError(
                f"the answer has no {shown}: {str(answer)[:SHOWN_CHARACTERS]}; does the server "
                "speak this format? (api)"
            )
    return node


def _check_count(positions: Any, expected: int, name: str) -> None:
    if not isinstance(positions, list) or len(positions) != expected:
        count = len(positions) if isinstance(positions, list) else "no"
        raise TeacherServerError(
            f"the answer has {count} positions in {name}, expected {expected}: one for each token"
        )


APIS = {
    "vllm": _Api(
        "/v1/completions",
        _vllm_body,
        _vllm_positions,
        field="prompt_logprobs",
        has_sent=True,
        few="vLLM serves at most --max-logprobs, 20 by default: start it with {k}",
        none='does the server know "prompt_logprobs", and does a proxy pass it on?',
        text="vLLM's prompt_logprobs are by token id: is this vLLM? Where a proxy writes them as "
        'text, try extra={"return_tokens_as_token_ids": True}',
        refused=" (vLLM serves at most --max-logprobs entries, 20 by default: start it with {k})",
    ),
    "sglang": _Api(
        "/generate",
        _sglang_body,
        _sglang_positions,
        field="input_top_logprobs",
        has_sent=False,
        few='SGLang gives as many as "top_logprobs_num" says: does `extra` or a proxy change it, '
        "or has the teacher fewer than {k} ids?",
        none='does a proxy pass on "return_logprob", "top_logprobs_num" and "logprob_start_len"?',
        text="SGLang's /generate gives (logprob, id, text): is this SGLang, or does a proxy change "
        "its answers?",
        refused="",
    ),
}

"""A server on this machine that answers as vLLM or SGLang do, from a model's own logits."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import torch
from torch import Tensor

Logprobs = Callable[[list[int]], Tensor]


def model_logprobs(model: torch.nn.Module) -> Logprobs:
    """Log-probs (T, V) of a model of transformers at every position."""

    @torch.no_grad()
    def logprobs(tokens: list[int]) -> Tensor:
        return model(torch.tensor([tokens])).logits[0].float().log_softmax(-1)

    return logprobs


def vllm_answer(body: dict[str, Any], logprobs: Logprobs) -> dict[str, Any]:
    tokens, k = body["prompt"], body["prompt_logprobs"]
    rows = logprobs(tokens)
    positions: list[Any] = [None]
    for at in range(1, len(tokens)):
        row = rows[at - 1]
        # The sent token comes first, with its rank in the whole vocabulary.
        ranks = {tokens[at]: int((row >= row[tokens[at]]).sum())}
        ranks |= {i: rank for rank, i in enumerate(row.topk(k).indices.tolist(), 1)}
        positions.append(
            {str(i): {"logprob": row[i].item(), "rank": rank} for i, rank in ranks.items()}
        )
    return {"choices": [{"index": 0, "text": "", "prompt_logprobs": positions}]}


def sglang_answer(body: dict[str, Any], logprobs: Logprobs) -> dict[str, Any]:
    tokens, start = body["input_ids"], body["logprob_start_len"]
    rows = logprobs(tokens)
    top: list[Any] = [None]
    echoed: list[Any] = [[None, tokens[start], None]]
    for at in range(start + 1, len(tokens)):
        values, ids = rows[at - 1].topk(body["top_logprobs_num"])
        top.append([[v, i, None] for v, i in zip(values.tolist(), ids.tolist(), strict=True)])
        echoed.append([rows[at - 1, tokens[at]].item(), tokens[at], None])
    return {"meta_info": {"input_token_logprobs": echoed, "input_top_logprobs": top}}


class Teacher:
    """What the server does and has seen; ``script`` is answered first, one entry per request.

    An entry is (status, answer) or (status, answer, headers), a number of seconds to sleep, or a
    function that is given the connection's file and writes the answer itself.
    """

    def __init__(self, logprobs: Logprobs) -> None:
        self.logprobs = logprobs
        self.script: list[Any] = []
        self.change: Callable[[dict[str, Any]], Any] = lambda answer: answer
        self.requests: list[tuple[str, dict[str, Any], dict[str, str]]] = []
        self.most_at_once = 0
        self._now, self._lock = 0, threading.Lock()
        self.url = ""

    def answer(self, path: str, body: dict[str, Any], headers: dict[str, str]) -> Any:
        with self._lock:
            self.requests.append((path, body, headers))
            self._now += 1
            self.most_at_once = max(self.most_at_once, self._now)
            scripted = self.script.pop(0) if self.script else None
        try:
            if isinstance(scripted, (int, float)):
                time.sleep(scripted)
            elif scripted is not None:
                return scripted
            make = {"/v1/completions": vllm_answer, "/generate": sglang_answer}.get(path)
            if make is None:
                return 404, {"detail": "Not Found"}
            return 200, self.change(make(body, self.logprobs))
        finally:
            with self._lock:
                self._now -= 1


@contextmanager
def serving(logprobs: Logprobs) -> Iterator[Teacher]:
    """A ``Teacher`` at ``teacher.url`` until the end of the block."""
    teacher = Teacher(logprobs)

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            reply = teacher.answer(self.path, body, dict(self.headers))
            if callable(reply):
                reply(self.wfile)
                return
            status, answer, *more = reply
            content = answer if isinstance(answer, str) else json.dumps(answer)
            try:
                self.send_response(status)
                for name, value in dict(*more).items():
                    self.send_header(name, value)
                self.send_header("Content-Length", str(len(content.encode())))
                self.end_headers()
                self.wfile.write(content.encode())
            except BrokenPipeError:
                pass  # the client has stopped waiting

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    teacher.url = f"http://127.0.0.1:{server.server_port}"
    try:
        yield teacher
    finally:
        server.shutdown()
        server.server_close()
        thread.join()

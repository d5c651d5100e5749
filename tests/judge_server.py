"""A chat server on loopback that answers as a judge should, or fails by script; and chains with known labels.

It reads lensteer's question format only as text: lines `[n] sentence`.
"""

from __future__ import annotations

import json
import re
import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

LABELS = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)


def sentence_of(label: str, i: int) -> str:
    return f"{label.replace('-', ' ').capitalize()} is what happens in line {i} of this."


def truth(sentence: str) -> str:
    return next(label for label in LABELS if sentence.startswith(label.replace("-", " ").capitalize()))


def make_chain(labels: Sequence[str], name: str = "a"):
    """A trace, character by character, that thinks one sentence for each label."""
    from lensteer.tasks import Task
    from lensteer.traces import Trace

    text = " ".join(sentence_of(label, i) for i, label in enumerate(labels))
    response = f"<think>\n{text}\n</think>\n\nThe answer is {name}."
    size = len(response)
    return Trace(
        Task(name, "planted", "train", f"What is {name}?"), "", response, (0,), (0,) * size, tuple(range(size)), True
    )


def make_chains(n: int, length: int = 12):
    return [make_chain([LABELS[(i + j * j) % 6] for j in range(length)], f"chain{i}") for i in range(n)]


@dataclass
class Say:
    """One response: a message's text, or else `body`; `half` closes the connection in the middle of it."""

    text: str = ""
    status: int = 200
    body: bytes | None = None
    headers: dict[str, str] = field(default_factory=dict)
    delay: float = 0.0
    half: bool = False
    finish: str = "stop"

    def content(self) -> bytes:
        if self.body is not None:
            return self.body
        if self.status != 200:
            return json.dumps({"error": {"message": self.text or "planted trouble", "type": "planted"}}).encode()
        choice = {
            "index": 0,
            "message": {"role": "assistant", "content": self.text},
            "finish_reason": self.finish,
        }
        usage = {"prompt_tokens": 100, "completion_tokens": 10, "total_tokens": 110}
        return json.dumps(
            {
                "id": "x",
                "object": "chat.completion",
                "created": 0,
                "model": "m",
                "choices": [choice],
                "usage": usage,
            }
        ).encode()


Action = Callable[[list[str]], Say]


def entries(labels: dict[int, str]) -> str:
    return json.dumps({"labels": [{"n": n, "label": label} for n, label in labels.items()]})


def true_labels(sentences: list[str]) -> dict[int, str]:
    return {n: truth(sentence) for n, sentence in enumerate(sentences, 1)}


def right(sentences: list[str]) -> Say:
    return Say(entries(true_labels(sentences)))


def always(say: Say) -> Action:
    return lambda sentences: say


class JudgeServer:
    """`with JudgeServer(first, second) as server`: one action per request, then `otherwise`.

    Attributes:
        payloads: what was asked, as it came in.
        asked: the numbered sentences of each.
        times: when each came in.
        keys: its Authorization header.
        max_in_flight: most requests at a time.
    """

    def __init__(self, *script: Action, otherwise: Action = right) -> None:
        self.script, self.otherwise = script, otherwise
        self.payloads: list[dict] = []
        self.asked: list[list[str]] = []
        self.times: list[float] = []
        self.keys: list[str | None] = []
        self.in_flight = self.max_in_flight = 0
        self._lock = threading.Lock()
        self._closing = threading.Event()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                server.handle(self, payload)

            def log_message(self, *args) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> JudgeServer:
        threading.Thread(target=self._http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *args) -> None:
        self._closing.set()
        self._http.shutdown()
        self._http.server_close()

    def handle(self, handler: BaseHTTPRequestHandler, payload: dict) -> None:
        sentences = re.findall(r"^\[\d+\] (.*)$", payload["messages"][-1]["content"], re.MULTILINE)
        with self._lock:
            number = len(self.payloads)
            self.payloads.append(payload)
            self.asked.append(sentences)
            self.times.append(time.monotonic())
            self.keys.append(handler.headers["Authorization"])
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
        try:
            say = (self.script[number] if number < len(self.script) else self.otherwise)(sentences)
            self._closing.wait(say.delay)
            content = say.content()
        finally:
            with self._lock:  # before the answer: a client that has it may ask the next at once
                self.in_flight -= 1
        try:
            handler.send_response(say.status)
            headers = {"Content-Type": "application/json", "Content-Length": str(len(content))}
            if say.status >= 429:
                headers["Retry-After"] = "0.02"  # shorter than the client's own back-off
            for name, value in (headers | say.headers).items():
                handler.send_header(name, value)
            handler.end_headers()
            handler.wfile.write(content[: len(content) // 2] if say.half else content)
        except OSError:
            pass  # the client has gone

    @property
    def n(self) -> int:
        return len(self.payloads)

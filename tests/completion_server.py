"""A server on loopback that continues token ids as vLLM does (`return_token_ids`), with a model of lensteer's.

with CompletionServer(model) as server:
    Served(Endpoint(url=server.url))
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from chat_server import ChatServer
from lensteer.generation import forced_logits, generate


class CompletionServer(ChatServer):
    """`change` gets each answer before it is sent, with the number of the request, and may return a status instead."""

    def __init__(self, model: Any, change: Callable[[int, dict[str, Any]], Any] | None = None) -> None:
        super().__init__(self._continued, ["m"])
        self.model, self.change, self._running = model, change, threading.Lock()

    def __enter__(self) -> CompletionServer:
        super().__enter__()
        return self

    def _continued(self, asked: dict[str, Any]) -> Any:
        number = len(self.payloads)
        ids = asked["prompt"]
        with self._running:  # a model runs one batch at a time
            (written,) = generate(
                self.model, [ids], max_new_tokens=asked["max_tokens"], temperature=asked["temperature"],
                top_p=asked["top_p"], seeds=[asked["seed"]],
            )  # fmt: skip
            logits = forced_logits(self.model, [ids], [written.ids])[0].log_softmax(-1)
        scores = [float(row[token]) for row, token in zip(logits, written.ids, strict=True)]
        choice = dict(
            index=0, text="", finish_reason="stop" if written.finished else "length", prompt_token_ids=ids,
            token_ids=list(written.ids), logprobs={"token_logprobs": scores} if "logprobs" in asked else None,
        )  # fmt: skip
        answer = {"id": "x", "object": "text_completion", "created": 0, "model": "m", "choices": [choice]}
        return answer if self.change is None else self.change(number, answer)

"""An OpenAI-compatible server on loopback that answers as a test says: `with ChatServer(say, ["m"]) as server`."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

#: From a request's payload to a text, to a whole answer, or to a status and a message.
Say = Callable[[dict[str, Any]], "str | dict[str, Any] | tuple[int, str]"]


class ChatServer:
    """Attributes: `payloads`, what was asked; `url`, with `/v1`; `delay`, seconds before each answer."""

    def __init__(self, say: Say, models: list[str] | None = None, delay: float = 0.0, reasoning: str = "") -> None:
        self.say, self.models, self.delay, self.reasoning = say, models, delay, reasoning
        self.payloads: list[dict[str, Any]] = []
        self.in_flight = self.max_in_flight = 0
        self._lock = threading.Lock()
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                listed = [
                    {"id": name, "object": "model", "created": 0, "owned_by": "x"} for name in server.models or ()
                ]
                server.send(self, *((404, {}) if server.models is None else (200, {"object": "list", "data": listed})))

            def do_POST(self) -> None:
                payload = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with server._lock:
                    server.payloads.append(payload)
                    server.in_flight += 1
                    server.max_in_flight = max(server.max_in_flight, server.in_flight)
                time.sleep(server.delay)
                said = server.say(payload)
                with server._lock:
                    server.in_flight -= 1
                if isinstance(said, tuple):
                    server.send(self, said[0], {"error": {"message": said[1]}})
                    return
                if isinstance(said, dict):
                    server.send(self, 200, said)
                    return
                message = {"role": "assistant", "content": said}
                if server.reasoning:
                    message["reasoning_content"] = server.reasoning
                choice = {"index": 0, "message": message, "finish_reason": "stop"}
                server.send(
                    self,
                    200,
                    {"id": "x", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]},
                )

            def log_message(self, *args: Any) -> None:
                pass

        self._http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_address[1]}/v1"

    def __enter__(self) -> ChatServer:
        threading.Thread(target=self._http.serve_forever, kwargs=dict(poll_interval=0.02), daemon=True).start()
        return self

    def __exit__(self, *args: Any) -> None:
        self._http.shutdown()
        self._http.server_close()

    @staticmethod
    def send(handler: BaseHTTPRequestHandler, status: int, values: Any) -> None:
        content = json.dumps(values).encode()
        try:
            handler.send_response(status)
            handler.send_header("Content-Type", "application/json")
            handler.send_header("Content-Length", str(len(content)))
            handler.send_header("Retry-After", "0.02")
            handler.end_headers()
            handler.wfile.write(content)
        except OSError:
            pass  # the client has gone

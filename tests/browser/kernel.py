"""A second line into a running kernel, to ask it what the page ought to show."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from jupyter_client import BlockingKernelClient


class Kernel:
    """Runs code in the kernel of a notebook that is open elsewhere."""

    def __init__(self, client: BlockingKernelClient) -> None:
        self._client = client

    def run(self, code: str) -> str:
        """Run lines; what they print."""
        printed: list[str] = []

        def heard(message: dict[str, Any]) -> None:
            if message["msg_type"] == "stream":
                printed.append(message["content"]["text"])

        reply = self._client.execute_interactive(code, store_history=False, timeout=180, output_hook=heard)
        assert reply["content"]["status"] == "ok", "\n".join(reply["content"].get("traceback", []))
        return "".join(printed)

    def value(self, expression: str) -> Any:
        """What an expression is, as JSON values."""
        return json.loads(self.run(f"import json; print(json.dumps({expression}))").splitlines()[-1])


@contextlib.contextmanager
def only_kernel(runtime: Path) -> Iterator[Kernel]:
    """The one kernel whose connection file is in a folder."""
    (path,) = runtime.glob("kernel-*.json")
    client = BlockingKernelClient(connection_file=str(path))
    client.load_connection_file()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=60)
        yield Kernel(client)
    finally:
        client.stop_channels()

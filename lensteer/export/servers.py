"""A server on this machine, started by a command of the user's and ended when it is no longer needed."""

from __future__ import annotations

import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager

from lensteer.errors import LensteerError


@contextmanager
def started(*command: str, seconds: float = 300.0) -> Iterator[str]:
    """Start an OpenAI-compatible server on a free port of this machine, wait until it answers, and end it afterwards.

    Args:
        command: the program and its arguments; "PORT" in any of them becomes the port.
        seconds: to wait.

    Yields:
        its URL, for an `Endpoint`.

    Raises:
        LensteerError: a program that is not there, that ends at once (with the last lines that it wrote), or that does
            not answer in time.
    """
    if not any("PORT" in part for part in command):
        raise LensteerError(f"{' '.join(command)!r}: write PORT where the server takes its port")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    words = [part.replace("PORT", port) for part in command]
    said = tempfile.TemporaryFile()  # a pipe that nobody reads would fill up and stop the server
    try:
        process = subprocess.Popen(words, stdout=subprocess.DEVNULL, stderr=said)
    except OSError as error:
        said.close()
        raise LensteerError(f"{words[0]!r} cannot be started ({error}): install it, or give its path") from error
    url, until = f"http://127.0.0.1:{port}/v1", time.monotonic() + seconds
    try:
        while not _answers(url):
            if process.poll() is not None:
                said.seek(0)
                last = said.read()[-600:].decode(errors="replace").strip()
                raise LensteerError(f"{' '.join(words)!r} ended with status {process.returncode}: {last}")
            if time.monotonic() > until:
                raise LensteerError(f"{' '.join(words)!r} does not answer at {url} after {seconds:g} seconds")
            time.sleep(0.25)
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.close()


def _answers(url: str) -> bool:
    try:
        urllib.request.urlopen(f"{url}/models", timeout=5).close()
    except urllib.error.HTTPError:
        return True  # transformers serve cannot list models where there is no cache of the hub
    except OSError:
        return False
    return True

"""Notebook servers on loopback, each with folders and a token of its own. None outlives its `with` block."""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

#: On a busy machine a server and its kernel take a while.
PATIENCE = 180.0

_SETTINGS = {
    "docmanager-extension/plugin": {"autosave": False},
    "apputils-extension/notification": {"fetchNews": "false", "checkForUpdates": False, "doNotDisturbMode": True},
}


@dataclass(frozen=True)
class Server:
    """A server that answers.

    Attributes:
        url: without the token.
        token: of this run.
        folder: everything that it writes.
    """

    url: str
    token: str
    folder: Path


@contextlib.contextmanager
def jupyter_lab(folder: Path, root: Path) -> Iterator[Server]:
    """JupyterLab on the notebooks in `root`, with none of the user's settings."""
    names = ["JUPYTER_CONFIG_DIR", "JUPYTER_DATA_DIR", "JUPYTER_RUNTIME_DIR", "IPYTHONDIR"]
    names += ["JUPYTERLAB_SETTINGS_DIR", "JUPYTERLAB_WORKSPACES_DIR"]
    dirs = {name: folder / name.lower() for name in names}
    for path in dirs.values():
        path.mkdir(parents=True, mode=0o700)
    for name, values in _SETTINGS.items():
        path = dirs["JUPYTERLAB_SETTINGS_DIR"] / "@jupyterlab" / f"{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(values))
    command = ["jupyterlab", "--no-browser", "--allow-root", "--ServerApp.ip=127.0.0.1", "--ServerApp.port_retries=0"]
    command += [f"--ServerApp.root_dir={root}", "--LabApp.expose_app_in_browser=True"]
    command += ["--ServerApp.port={port}", "--IdentityProvider.token={token}"]
    with _serving(command, folder, {**os.environ, **{k: str(v) for k, v in dirs.items()}}, "api") as server:
        yield server


@contextlib.contextmanager
def marimo_app(folder: Path, app: Path) -> Iterator[Server]:
    """A marimo notebook, as an app."""
    command = ["marimo", "--quiet", "run", str(app), "--headless", "--host=127.0.0.1"]
    command += ["--port={port}", "--token", "--token-password={token}"]
    places = {name: str(folder / name.lower()) for name in ("XDG_CONFIG_HOME", "XDG_STATE_HOME", "XDG_CACHE_HOME")}
    with _serving(command, folder, {**os.environ, **places}, "health") as server:
        yield server


@contextlib.contextmanager
def _serving(command: Sequence[str], folder: Path, environment: dict[str, str], probe: str) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = Server(f"http://127.0.0.1:{port}/", secrets.token_hex(16), folder)
    filled = [part.format(port=port, token=server.token) for part in command]
    with (folder / "server.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", *filled],
            env=environment,
            cwd=folder,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
        )
    try:
        _until_it_answers(server, probe, process)
        yield server
    finally:
        _end(process)


def _until_it_answers(server: Server, probe: str, process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + PATIENCE
    while time.monotonic() < deadline and process.poll() is None:
        with contextlib.suppress(OSError), urllib.request.urlopen(server.url + probe, timeout=10):
            return
        time.sleep(0.2)
    raise AssertionError(f"the server does not answer:\n{(server.folder / 'server.log').read_text()[-3000:]}")


def _end(process: subprocess.Popen[bytes]) -> None:
    """Ask a server to end its kernels and itself, then insist. A kernel that is left alone ends by itself, too."""
    for ask in (process.terminate, process.kill):
        ask()
        with contextlib.suppress(subprocess.TimeoutExpired):
            process.wait(30)
            return

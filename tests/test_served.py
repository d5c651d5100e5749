"""Real servers on loopback, end to end: the effect that `verify` finds at them, beside that of the hooked model."""

from __future__ import annotations

import json
import math
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

import lensteer as ls
from gguf_models import write_model
from lensteer import models
from lensteer.export.verification import look_at

pytestmark = pytest.mark.slow

BEHAVIOR, LAYER, COEFFICIENT = "uncertainty-estimation", 6, 0.8
TASKS = 16


@contextmanager
def served(*command: str) -> Iterator[str]:
    """A server's URL, once it answers; `PORT` in the command becomes a free port. It is ended afterwards."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    url = f"http://127.0.0.1:{port}/v1"
    said = tempfile.TemporaryFile()  # a pipe that nobody reads would fill up and stop the server
    process = subprocess.Popen([part.replace("PORT", port) for part in command], stdout=subprocess.DEVNULL, stderr=said)
    try:
        for _ in range(1200):
            if process.poll() is not None:
                said.seek(0)
                pytest.fail(f"{command[:3]} ended with {process.returncode}: {said.read()[-2000:]!r}")
            try:
                urllib.request.urlopen(f"{url}/models", timeout=5).close()
                break
            except urllib.error.HTTPError:
                break  # it is up: transformers serve cannot list models where there is no cache of the hub
            except OSError:
                time.sleep(0.25)
        else:
            pytest.fail(f"{command[:3]} does not answer at {url}")
        yield url
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        said.close()


@pytest.fixture(scope="module")
def plan(organism) -> ls.SteeringPlan:
    chains = ls.generate_traces(organism, ls.load_tasks(split="train", n=60), temperature=1.0)
    vectors = ls.fit_vectors(organism, ls.annotate(chains, ls.grammar), window="onset")
    return ls.SteeringPlan(vectors[BEHAVIOR], LAYER, COEFFICIENT)


@pytest.fixture(scope="module")
def hooked(organism, plan):
    """What the same tasks give with the plan hooked into the model, as a look."""
    tasks = ls.load_tasks(split="test", n=TASKS)
    sides = []
    for own in (plan, None):
        if own is None:
            traces = ls.generate_traces(organism, tasks, temperature=1.0, max_new_tokens=300)
        else:
            with own.on(organism):
                traces = ls.generate_traces(organism, tasks, temperature=1.0, max_new_tokens=300)
        found = {}
        for trace in ls.annotate(traces, ls.grammar):
            hits = sum(span.label == BEHAVIOR for span in trace.spans)
            found[trace.task.id] = (hits, len(trace.spans) + trace.n_unparsed)
        sides.append(found)
    return look_at(1, "", {name: (*sides[0][name], *sides[1][name]) for name in sides[0]}, None)


def check(plan, hooked, steered: str, unsteered: str, out: Path, names: tuple[str, str] = ("", "")) -> None:
    """The served effect is there, and no further from the hooked one than one in a thousand would be by chance."""
    asking = ls.export.Asking(n_samples=2, temperature=1.0, max_new_tokens=300)
    found = ls.export.verify(
        plan,
        ls.export.Endpoint(url=steered, model=names[0], concurrency=2, timeout=300.0),
        ls.load_tasks(split="test", n=TASKS),
        ls.grammar,
        out,
        unsteered=ls.export.Endpoint(url=unsteered, model=names[1], concurrency=2, timeout=300.0),
        asking=asking,
    )
    (look,) = found.looks
    print(f"\nhooked: {hooked.unsteered:.3f} to {hooked.steered:.3f}, change {hooked.change:.3f}\n{found}")
    assert found.there
    errors = [(change.high - change.low) / 3.92 for change in (look.change, hooked.change)]
    assert abs(look.change.value - hooked.change.value) < 3.3 * math.hypot(*errors)


def test_llama_cpps_server_with_a_control_vector(organism, plan, hooked, tmp_path):
    """llama-cpp-python's OpenAI-compatible server."""
    for package in ("llama_cpp", "fastapi", "uvicorn", "gguf"):
        pytest.importorskip(package, reason=f"{package} is not installed: no llama.cpp server is started")
    model = str(write_model(models.ORGANISM, tmp_path / "organism.gguf"))
    vector = str(ls.export.gguf(plan, tmp_path / "uncertainty.gguf", model=organism))
    script = str(Path(__file__).with_name("llama_server.py"))
    with (
        served(sys.executable, script, model, "PORT", vector) as steered,
        served(sys.executable, script, model, "PORT") as unsteered,
    ):
        check(plan, hooked, steered, unsteered, tmp_path / "out")


def test_transformers_serve(organism, plan, hooked, tmp_path):
    """Hugging Face's own server, with a steered checkpoint."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} is not installed: transformers serve does not start")
    folder = tmp_path / "steered"
    ls.export.checkpoint(plan, folder, model=organism)
    plain = Path(shutil.copytree(models.ORGANISM, tmp_path / "plain"))
    for own in (folder, plain):  # it samples only from checkpoints that say so, whatever temperature is asked for
        path = own / "generation_config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | {"do_sample": True}))
    program = str(Path(sys.executable).with_name("transformers"))
    if not os.path.exists(program):
        pytest.skip("no command `transformers` beside Python")
    with served(program, "serve", "--host", "127.0.0.1", "--port", "PORT", "--device", "cpu") as url:
        check(plan, hooked, url, url, tmp_path / "out", (str(folder), str(plain)))

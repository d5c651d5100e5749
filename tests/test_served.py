"""Real servers on loopback, end to end: the effect that `verify` finds at them, beside that of the hooked model."""

from __future__ import annotations

import math
import os
import sys
from pathlib import Path

import pytest

import lensteer as ls
from gguf_models import write_model
from lensteer import models
from lensteer.export.verification import look_at

pytestmark = pytest.mark.slow

BEHAVIOR, LAYER, COEFFICIENT = "uncertainty-estimation", 6, 0.8
TASKS = 16


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
        ls.export.started(sys.executable, script, model, "PORT", vector) as steered,
        ls.export.started(sys.executable, script, model, "PORT") as unsteered,
    ):
        check(plan, hooked, steered, unsteered, tmp_path / "out")


def test_transformers_serve(organism, plan, hooked, tmp_path):
    """Hugging Face's own server, with a steered checkpoint."""
    for package in ("fastapi", "uvicorn", "openai"):
        pytest.importorskip(package, reason=f"{package} is not installed: transformers serve does not start")
    folder = tmp_path / "steered"
    ls.export.checkpoint(plan, folder, model=organism)
    program = str(Path(sys.executable).with_name("transformers"))
    if not os.path.exists(program):
        pytest.skip("no command `transformers` beside Python")
    with ls.export.started(program, "serve", "--host", "127.0.0.1", "--port", "PORT", "--device", "cpu") as url:
        check(plan, hooked, url, url, tmp_path / "out", (str(folder), str(models.ORGANISM)))

"""`lensteer benchmark`: what plans cost on a benchmark, beside the unsteered model."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lensteer.cli.options import (
    Device,
    DeviceMap,
    Dtype,
    Model,
    Revision,
    Seed,
    System,
    Tasks,
    Template,
    Thought,
    tasks_for,
)
from lensteer.errors import LensteerError
from lensteer.evaluation import benchmark as measure_benchmark
from lensteer.export import load_plan
from lensteer.generation.jobs import Sampling
from lensteer.models import load_model
from lensteer.tasks import describe_tasks, load_tasks

ANSWERS, RESULT = "answers.jsonl", "benchmark.json"


def benchmark(
    plan: Annotated[
        list[str],
        typer.Option(help="A folder that `lensteer export folder` wrote, or one on the hub as user/repo; repeatable."),
    ],
    out: Annotated[Path, typer.Option(help="Folder of answers and figures; the same command resumes in it.")],
    model: Model = None,
    tasks: Tasks = None,
    split: Annotated[str, typer.Option(help="Of the tasks: test (held out), dev, train or all.")] = "test",
    n_tasks: Annotated[int | None, typer.Option(help="At most so many.", show_default="all of the split")] = None,
    suffix: Annotated[
        str, typer.Option(help="Appended to every task, in every condition.", show_default="nothing")
    ] = "",
    system: System = "",
    n: Annotated[int, typer.Option("--n", help="Answers per task; more than one needs --temperature.")] = 1,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="As in `lensteer run`.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Answers per batch.")] = 128,
    thinking: Annotated[bool, typer.Option(help="Let the template open a thought, if it supports both.")] = True,
    dtype: Dtype = "float32",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    thought: Thought = "auto",
    template: Template = None,
    seed: Seed = 0,
) -> None:
    """Ask a benchmark's tasks unsteered and with each plan: right, unread and truncated answers, length."""
    names = [Path(source).resolve().name for source in plan]
    if len(set(names)) < len(names):
        raise LensteerError(f"two plans have the same name: {names}; give folders of different names")
    source = tasks_for(model, tasks)
    asked = load_tasks(source, split=None if split == "all" else split, n=n_tasks)
    if (said := describe_tasks(source)) is not None:
        typer.echo(f"tasks: {said}")
    loaded = load_model(
        model,
        dtype=dtype,
        device=device,
        device_map=device_map,
        revision=revision,
        thought=thought,
        template=template,
    )
    plans = {name: load_plan(given, loaded) for name, given in zip(names, plan, strict=True)}
    typer.echo(f"{1 + len(plans)} conditions × {len(asked)} tasks × {n}, at most {max_new_tokens} tokens")
    found = measure_benchmark(
        loaded,
        asked,
        plans,
        Sampling(n, temperature, seed, max_new_tokens, batch_size, thinking, top_p, system=system),
        suffix=suffix,
        seed=seed,
        path=out / ANSWERS,
        progress=True,
    )
    found.save(out / RESULT)
    typer.echo(f"{found}\nfigures: {(out / RESULT).resolve()}")

"""`lensteer doctor`: what a model is, what works on it, and what a full run would cost, here or on GPUs."""

from __future__ import annotations

from dataclasses import replace
from typing import Annotated

import typer

from lensteer.cli.options import Device, DeviceMap, Dtype, Model, Revision, Template, Thought
from lensteer.doctor import diagnose
from lensteer.errors import LensteerError
from lensteer.models import load_model
from lensteer.pipeline import ORGANISM, RunConfig
from lensteer.planner import SHAPES, Gpus, plan_run, shape_of


def doctor(
    model: Model = None,
    dtype: Dtype = "float32",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    thought: Thought = "auto",
    template: Template = None,
    plan: Annotated[
        str | None,
        typer.Option(
            help=f"Load nothing; plan memory, time and files of a run on GPUs for a size ({', '.join(SHAPES)}) or a "
            "checkpoint's folder, in bfloat16. Each number says whether it is computed, measured or extrapolated.",
            show_default="none",
        ),
    ] = None,
    n_tasks: Annotated[int, typer.Option(help="With --plan: tasks that chains are generated on.")] = RunConfig.n_train,
    tokens: Annotated[int, typer.Option(help="With --plan: tokens of every chain.")] = RunConfig.train_tokens,
    gpus: Annotated[int, typer.Option(help="With --plan: number of GPUs.")] = Gpus.n,
    gpu_memory: Annotated[float, typer.Option(help="With --plan: GB of each GPU.")] = Gpus.memory,
    gpu_tflops: Annotated[float, typer.Option(help="With --plan: dense 16-bit TFLOP/s of each.")] = Gpus.tflops,
    gpu_bandwidth: Annotated[float, typer.Option(help="With --plan: TB/s of each one's memory.")] = Gpus.bandwidth,
) -> None:
    """Examine a model: facts, checks of its passes, each feature tried, time and memory of a full run."""
    if plan is not None:
        if n_tasks < 1 or tokens < 1:
            raise LensteerError(f"{n_tasks} tasks, {tokens} tokens: give positive numbers")
        sizes = replace(RunConfig(), n_train=n_tasks, train_tokens=tokens, max_new_tokens=tokens)
        typer.echo(str(plan_run(shape_of(plan), sizes, Gpus(gpus, gpu_memory, gpu_tflops, gpu_bandwidth))))
        return
    config = ORGANISM if model is None else RunConfig()
    found = diagnose(
        load_model(
            model,
            dtype=dtype,
            device=device,
            device_map=device_map,
            revision=revision,
            thought=thought,
            template=template,
        ),
        config=config,
    )
    typer.echo(str(found))
    if not found.ok:
        raise typer.Exit(1)

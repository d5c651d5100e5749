"""`lensteer doctor`: what a model is, what works on it, and what a full run would cost."""

from __future__ import annotations

import typer

from lensteer.cli.options import Device, DeviceMap, Dtype, Model, Revision, Template, Thought
from lensteer.doctor import diagnose
from lensteer.models import load_model
from lensteer.pipeline import ORGANISM, RunConfig


def doctor(
    model: Model = None,
    dtype: Dtype = "float32",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    thought: Thought = "auto",
    template: Template = None,
) -> None:
    """Examine a model: facts, checks of its passes, each feature tried, time and memory of a full run."""
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

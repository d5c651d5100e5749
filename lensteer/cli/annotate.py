"""`lensteer annotate`: the stage of a run, and `annotate fit`, which trains a classifier on annotated chains."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lensteer.cli.groups import Commands
from lensteer.cli.options import Device, DeviceMap, Dtype, Revision, Seed
from lensteer.models import load_model
from lensteer.pipeline import Run, fit_annotator, run_stage

annotating = typer.Typer(cls=Commands, invoke_without_command=True, no_args_is_help=True)


@annotating.callback()
def annotate(out: Annotated[Path | None, typer.Option(help="The run's folder.")] = None) -> None:
    """The stage 'annotate' of a run that `lensteer traces` started; `annotate fit` trains a classifier."""
    if out is not None:
        run_stage(Run.open(out, progress=True), "annotate")


@annotating.command()
def fit(
    chains: Annotated[list[Path], typer.Option(help="Annotated chains: traces, or the published format; repeatable.")],
    out: Annotated[Path, typer.Option(help="The classifier's file, for `--annotator classifier --classifier FILE`.")],
    abstain: Annotated[float, typer.Option(help="Probability below which a sentence stays unlabeled.")] = 0.0,
    layer: Annotated[
        int | None,
        typer.Option(help="Layer of --model whose residual stream is read, too.", show_default="none: text alone"),
    ] = None,
    model: Annotated[
        str | None,
        typer.Option(
            help="The model of the chains, as `lensteer run` takes it.", show_default="none; with --layer the organism"
        ),
    ] = None,
    dtype: Dtype = "float32",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    seed: Seed = 0,
) -> None:
    """Train a sentence classifier on annotated chains, and report how well it does on held-out chains."""
    loaded = None
    if model is not None or layer is not None:
        loaded = load_model(model, dtype=dtype, device=device, device_map=device_map, revision=revision)
    found = fit_annotator(chains, out, abstain=abstain, model=loaded, layer=layer, seed=seed)
    for name in ("macro_f1", "kappa"):
        low, high = found[f"{name}_low"], found[f"{name}_high"]
        typer.echo(f"{name}: {found[name]:.3f} [{low:.3f}, {high:.3f}] on held-out chains")
    typer.echo(f"{found['n_chains']} chains, {found['n_sentences']} spans: {out.resolve()}")

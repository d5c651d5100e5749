"""`lensteer cache`: fit a cache vector from contrastive examples, and measure the effect of one edit with it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lensteer.cli.groups import COMMANDS, Commands
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
    numbers,
    tasks_for,
)
from lensteer.pipeline import MANIFEST, CacheFit, CacheRun, Run, cache_fit, cache_run, render_report

caching = typer.Typer(cls=Commands, no_args_is_help=True, help=COMMANDS["cache"])


@caching.command()
def fit(
    out: Annotated[Path, typer.Option(help="The vector's file, such as think.safetensors.")],
    model: Model = None,
    records: Annotated[
        str,
        typer.Option(
            help="'organism', 'builtin' (100 written records) or a JSONL file, such as GSM8K's own.",
            show_default="builtin; for the organism: organism",
        ),
    ] = "",
    style: Annotated[str, typer.Option(help="Which wording of the records' steps.")] = "stepwise",
    against: Annotated[
        str | None, typer.Option(help="Another style to compare it with.", show_default="no steps at all")
    ] = None,
    n: Annotated[int, typer.Option(help="Contrastive pairs.")] = 100,
    shots: Annotated[int, typer.Option(help="Solved examples in each prompt.")] = 2,
    neighbors: Annotated[str, typer.Option(help="Choice of examples: random, tfidf or embedding.")] = "random",
    position: Annotated[
        str, typer.Option(help="Slot of the cache: last_prompt, offset_token or an index.")
    ] = "last_prompt",
    system: System = "",
    dtype: Dtype = "float32",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    thought: Thought = "auto",
    template: Template = None,
    seed: Seed = 0,
) -> None:
    """Fit a cache vector: mean keys and values of prompts with steps less those without."""
    config = CacheFit(
        model, records, style, against, n, shots, neighbors, position, dtype, device, seed, device_map, revision,
        system, thought, template,
    )  # fmt: skip
    cache_fit(config, out, typer.echo)


@caching.command()
def run(
    vector: Annotated[Path, typer.Argument(help="From `lensteer cache fit`.")],
    out: Annotated[Path, typer.Option(help="A folder; a run's folder adds the figures to its report.")],
    model: Model = None,
    tasks: Tasks = None,
    suffix: Annotated[
        str, typer.Option(help="Appended to every task, in every condition.", show_default="nothing")
    ] = "",
    system: System = "",
    c_values: Annotated[str, typer.Option(help="Coefficients to choose from, on dev tasks.")] = "0.5,1,2,4,8",
    c_keys: Annotated[float, typer.Option(help="Coefficient of the keys; 0 edits the values alone.")] = 0.0,
    unit: Annotated[
        str, typer.Option(help="Coefficient 1: as long as the slot's own values (norm), or the difference itself.")
    ] = "norm",
    n_dev: Annotated[int, typer.Option(help="Dev tasks.")] = 40,
    n_test: Annotated[int, typer.Option(help="Held-out tasks.")] = 100,
    n_controls: Annotated[int, typer.Option(help="Random vectors of the same length.")] = 20,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 1.0,
    max_new_tokens: Annotated[int, typer.Option(help="Most tokens of an answer.")] = 400,
    batch_size: Annotated[int, typer.Option(help="Answers per batch.")] = 128,
    dtype: Dtype = "float32",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    thought: Thought = "auto",
    template: Template = None,
    seed: Seed = 0,
) -> None:
    """Edit one slot of each prompt's cache, and compare the effect with random vectors and a prompted baseline."""
    config = CacheRun(
        str(vector), model, tasks_for(model, tasks), suffix, numbers(c_values), c_keys, unit, n_dev, n_test,
        n_controls, temperature, max_new_tokens, batch_size, dtype, device, seed, device_map, revision, system,
        thought, template,
    )  # fmt: skip
    cache_run(config, out, typer.echo)
    if (out / MANIFEST).exists() and "report" in (opened := Run.open(out)).stages:
        render_report(opened)
        typer.echo(f"report: {opened.path('report.html').resolve()}")

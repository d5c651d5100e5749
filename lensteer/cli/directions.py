"""`lensteer directions`: from a file of contrastive pairs to a file of vectors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lensteer.cli.options import Device, DeviceMap, Dtype, Model, Revision, Seed, System
from lensteer.contrast import FORMATS, POSITIONS, complete_pairs, fit_directions, load_pairs, with_system
from lensteer.errors import LensteerError
from lensteer.models import load_model
from lensteer.vectors.constructions import PAIR_CONSTRUCTIONS


def directions(
    pairs: Annotated[str, typer.Argument(help="A file of pairs, or 'politeness', a written set.")],
    out: Annotated[Path, typer.Option(help="The vectors' file, such as polite.safetensors.")],
    model: Model = None,
    format: Annotated[
        str | None, typer.Option(help=f"One of {', '.join(FORMATS)}.", show_default="by the first entry")
    ] = None,
    label: Annotated[
        str | None, typer.Option(help="The concept's name, if pairs have none.", show_default="the file's name")
    ] = None,
    raw: Annotated[bool, typer.Option("--raw", help="Texts already contain their template, or need none.")] = False,
    system: System = "",
    complete: Annotated[
        int, typer.Option(help="Most tokens that the model writes where a pair has no completion; 0 for none.")
    ] = 0,
    position: Annotated[
        str | None,
        typer.Option(
            help=f"Where pairs are read: {', '.join(POSITIONS)}, an index or token:WORDS.",
            show_default="as in the pairs; else answer, or last_prompt without completions",
        ),
    ] = None,
    construction: Annotated[str, typer.Option(help=f"One of {', '.join(PAIR_CONSTRUCTIONS)}.")] = "difference",
    n_controls: Annotated[int, typer.Option(help="Control vectors of each kind.")] = 20,
    n_bootstrap: Annotated[int, typer.Option(help="Replicates on resampled pairs.")] = 0,
    batch_size: Annotated[int, typer.Option(help="Texts per batch.")] = 16,
    dtype: Dtype = "float32",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
    seed: Seed = 0,
) -> None:
    """Fit a direction per concept and layer from pairs of texts that differ in it."""
    if raw and system:
        raise LensteerError(f"--raw with --system {system!r}: raw texts hold theirs, leave one of the two out")
    loaded_pairs = with_system(load_pairs(pairs, format, label=label, raw=raw or None), system)
    loaded = load_model(model, dtype=dtype, device=device, device_map=device_map, revision=revision)
    if complete:
        loaded_pairs = complete_pairs(loaded, loaded_pairs, max_new_tokens=complete, seed=seed)
    vectors = fit_directions(
        loaded,
        loaded_pairs,
        position=position,
        construction=construction,
        n_controls=n_controls,
        n_bootstrap=n_bootstrap,
        seed=seed,
        batch_size=batch_size,
    )
    vectors.save(out)
    for name in vectors:
        typer.echo(f"{name}: {vectors.counts[name]} pairs, {len(vectors.layers)} layers, {vectors.recipe}")
    typer.echo(f"vectors: {out.resolve()}")

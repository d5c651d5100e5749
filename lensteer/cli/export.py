"""`lensteer export KIND`: a run's plan, or a plan's folder, as files that other software serves."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lensteer.cli.options import Device, DeviceMap, Dtype, Model, Revision
from lensteer.errors import LensteerError
from lensteer.expressions import parse_scope
from lensteer.models import load_model
from lensteer.pipeline import Run, evaluated_plan
from lensteer.steering.cache import CACHE_UNITS

if TYPE_CHECKING:
    from lensteer.steering import Plan

#: Forms whose logits are compared when they are written.
CHECKED = ("checkpoint", "hf", "cache")
#: Files for engines that are not run here; see docs/engines.md.
ENGINES = ("gguf", "easysteer", "vllm-lens", "rhizonymph", "svec", "lm-eval")
KINDS = ("folder", *CHECKED, *ENGINES)
SIGNS = {"up": 1, "down": -1}


def export(
    kind: Annotated[str, typer.Argument(help=f"One of {', '.join(KINDS)}; see docs/serving.md and docs/engines.md.")],
    out: Annotated[Path, typer.Option(help="A new or an empty folder; a file for gguf, svec and JSON.")],
    run: Annotated[Path | None, typer.Option(help="A finished run's folder, whose model is taken, too.")] = None,
    behavior: Annotated[str | None, typer.Option(help="Of the run.", show_default="its only one")] = None,
    sign: Annotated[str, typer.Option(help="up: the direction added; down: taken away.")] = "up",
    plan: Annotated[
        str | None, typer.Option(help="A plan's folder, or one on the hub as user/repo, instead of a run.")
    ] = None,
    vector: Annotated[
        Path | None, typer.Option(help="For cache: the file that `lensteer cache fit` wrote, instead of a run.")
    ] = None,
    c_values: Annotated[float, typer.Option(help="For cache: the coefficient of the values.")] = 1.0,
    unit: Annotated[str, typer.Option(help=f"For cache: of the coefficient, {' or '.join(CACHE_UNITS)}.")] = "norm",
    scope: Annotated[
        str | None,
        typer.Option(help="Other positions than the plan's.", show_default="the plan's"),
    ] = None,
    orthogonalize: Annotated[
        bool,
        typer.Option("--orthogonalize", help="For checkpoint: a projection in all matrices up to its layer."),
    ] = False,
    weights: Annotated[
        str | None, typer.Option(help="For checkpoint: dtype of the weights.", show_default="the checkpoint's")
    ] = None,
    base_model: Annotated[str, typer.Option(help="The model's name on the hub, for the card.")] = "",
    push: Annotated[
        str | None, typer.Option(help="For folder: a repository on the hub to upload it to, as user/repo.")
    ] = None,
    model: Model = None,
    dtype: Dtype = "float32",
    device: Device = None,
    device_map: DeviceMap = None,
    revision: Revision = None,
) -> None:
    """Write a plan for what serves the model; forms that run here are compared with the hooked model."""
    if kind not in KINDS:
        raise LensteerError(f"no export {kind!r}: choose one of {', '.join(KINDS)}")
    if sign not in SIGNS:
        raise LensteerError(f"--sign {sign}: choose one of {', '.join(SIGNS)}")
    given = [name for name, value in (("--run", run), ("--plan", plan), ("--vector", vector)) if value is not None]
    if len(given) != 1 or (kind == "cache") != (vector is not None):
        wanted = "--vector FILE" if kind == "cache" else "--run FOLDER or --plan FOLDER"
        raise LensteerError(f"lensteer export {kind} with {', '.join(given) or 'no plan'}: give {wanted}")
    from lensteer import export as exports

    loading: dict[str, Any] = dict(dtype=dtype, device=device, device_map=device_map, revision=revision)
    if run is not None:
        opened = Run.open(run)
        found: Plan = _of_run(opened, behavior, SIGNS[sign], scope)
        loaded = opened.model
    else:
        loaded = load_model(model, **loading)
        if vector is not None:
            from lensteer.cache_steering import CachePlan, CacheVector

            found = CachePlan(CacheVector.load(vector, loaded), c_values, unit=unit)
        else:
            found = _scoped(exports.load_plan(str(plan), loaded), scope)
    if kind == "folder":
        path = exports.folder(found, out, model=loaded, base_model=base_model)
        typer.echo(f"plan: {path.resolve()}")
        if push is not None:
            typer.echo(f"on the hub: {exports.push_to_hub(path, push)}")
        return
    if kind in ENGINES:
        path = getattr(exports, kind.replace("-", "_"))(found, out, model=loaded)
        typer.echo(f"{kind}: {path.resolve()}; no engine was run: see `lensteer verify`")
        return
    if kind == "checkpoint":
        done: Any = exports.checkpoint(
            found, out, model=loaded, dtype=weights, orthogonalize=orthogonalize, base_model=base_model
        )
    else:
        done = (exports.hf if kind == "hf" else exports.cache)(found, out, model=loaded, base_model=base_model)
    typer.echo(
        f"logits differ from the hooked model's by at most {done.difference:.2g} (allowed: {done.tolerance:.2g}); "
        f"steering changes them by up to {done.effect:.3g}"
    )
    typer.echo(f"{kind}: {done.path.resolve()}")


def _of_run(run: Run, behavior: str | None, sign: int, scope: str | None) -> Plan:
    if behavior is None:
        if len(run.config.behaviors) != 1:
            raise LensteerError(f"{str(run.folder)!r} steered {list(run.config.behaviors)}: give --behavior")
        (behavior,) = run.config.behaviors
    return _scoped(evaluated_plan(run, behavior, sign), scope)


def _scoped(plan: Plan, scope: str | None) -> Plan:
    from lensteer.export.edits import rescoped

    return plan if scope is None else rescoped(plan, parse_scope(scope))

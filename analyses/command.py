"""The command line of analyses whose options are the fields of their `Config`."""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Mapping
from dataclasses import fields, replace
from pathlib import Path
from typing import Any, get_args, get_origin, get_type_hints

from lensteer.pipeline import DEMO, STAGES, Run, run_stage


def small_run(folder: Path) -> Path:
    """A run on the organism up to its coefficients, at the size of a test: chains, vectors, layers, coefficients."""
    sizes: dict[str, Any] = dict(
        n_train=16, n_dev=4, n_test=4, n_controls=2, n_score_controls=2, score_chains=4, max_spans=5
    )
    behaviors = ("backtracking", "uncertainty-estimation")
    run = Run.open(folder, replace(DEMO, **sizes, layers=(4,), coefficients=(0.5,), behaviors=behaviors))
    for stage in list(STAGES)[: list(STAGES).index("evaluate")]:
        run_stage(run, stage)
    return folder


def command(analysis: Mapping[str, Any], width: int = 1200) -> None:
    """Run an analysis from the command line. If its `Config` has a `run`, that is the folder of a finished run.

    Args:
        analysis: the globals of its module: `Config`, `main`, `smoke`, `table`, `to_json` and `figure`.
        width: of the figure's file, in pixels before scaling.
    """
    parser = argparse.ArgumentParser(
        description=analysis["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = get_type_hints(analysis["Config"])
    for option in fields(analysis["Config"]):
        name, kind = f"--{option.name.replace('_', '-')}", kinds[option.name]
        if option.name == "run":
            parser.add_argument(name, type=Path, help="without it, --smoke makes a small one")
        elif get_origin(kind) is tuple:
            parser.add_argument(name, type=get_args(kind)[0], nargs="+", default=option.default)
        else:  # of `int | None`, the type
            parser.add_argument(name, type=(get_args(kind) or (kind,))[0], default=option.default)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given: dict[str, Any] = {
        name: tuple(v) if isinstance(v, list) else v for name, v in vars(parser.parse_args()).items()
    }
    small, out, picture = (given.pop(name) for name in ("smoke", "json", "figure"))
    if "run" in given and given["run"] is None and not small:
        parser.error("give --run, the folder of a finished run, or --smoke")
    with tempfile.TemporaryDirectory() as made:
        if "run" in given:
            given["run"] = given["run"] or small_run(Path(made) / "run")
        config = analysis["Config"](**given)
        found = analysis["main"](analysis["smoke"](config) if small else config)
    print(analysis["table"](found))
    if out:
        out.write_text(analysis["to_json"](found))
    if picture:
        analysis["figure"](found).write_image(picture, width=width)

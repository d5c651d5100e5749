"""Which window and which negatives give vectors that steer? Every recipe and layer, down and up, on dev tasks.

For each recipe, layer and behavior: the change of the behavior's sentence share when its vector is added at -c and +c
against no steering, same tasks and seeds. A recipe serves if down is below 0 and up above 0.

Example: python analyses/windows_and_negatives.py --n-train 150 --n-dev 40 --coefficient 0.5 --json windows.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import lensteer as ls
from lensteer.directions import Recipe
from lensteer.evaluation import Arm, Sampling, run_arms, summarize
from lensteer.vectors import BehaviorVectors, fit_recipes

RECIPES = (
    Recipe("onset", "spans"),
    Recipe("onset", "same_trace"),
    Recipe("onset", "rest"),
    Recipe("onset", "all"),
    Recipe("onset±2", "spans"),
    Recipe("span", "spans"),
    Recipe("span", "all"),  # the paper's text
    Recipe("published", "all"),  # the paper's code
)


@dataclass(frozen=True)
class Config:
    """Model, sizes, strength and layers; None means the organism, and all layers."""

    model: str | None = None
    n_train: int = 150
    n_dev: int = 40
    coefficient: float = 0.5
    layers: tuple[int, ...] | None = None
    scope: str = "thinking"
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One recipe at one layer for one behavior: changes of its sentence share, and how many chains stay readable."""

    recipe: str
    layer: int
    behavior: str
    down: float
    up: float
    right_way: bool
    parsed: float


def main(config: Config) -> list[Row]:
    """Run every recipe; returns a row per recipe, layer and behavior."""
    model = ls.load_model(config.model)
    sampling = Sampling(1, 1.0, config.seed, 400, 256)
    train = ls.load_tasks(split="train", n=config.n_train)
    traces = ls.annotate(ls.generate_traces(model, train, temperature=1.0, seed=config.seed, batch_size=256))
    tasks = ls.load_tasks(split="dev", n=config.n_dev)
    layers = config.layers or tuple(range(ls.models.n_layers(model)))
    scope = {"thinking": ls.thinking, "everywhere": ls.everywhere, "onsets": ls.onsets}[config.scope]
    rows = []
    for vectors in fit_recipes(model, traces, RECIPES):
        for layer in layers:
            rows += _at(model, tasks, vectors, layer, config.coefficient, scope, sampling)
    return rows


def _at(
    model,
    tasks: list[ls.Task],
    vectors: BehaviorVectors,
    layer: int,
    coefficient: float,
    scope: ls.PositionScope,
    sampling: Sampling,
) -> list[Row]:
    arms = [Arm("unsteered")]
    for behavior in ls.STEERED:
        for kind, sign in (("down", -1), ("up", 1)):
            arms.append(Arm(f"{behavior}/{kind}", ls.SteeringPlan(vectors[behavior], layer, sign * coefficient, scope)))
    records = run_arms(model, tasks, arms, sampling)
    site = dict.fromkeys(ls.STEERED, layer)
    found = summarize(records, site, dict.fromkeys(site, coefficient), sampling.n_samples, scope.name)
    parsed = {arm.arm: arm.parsed for arm in found.arms}
    rows = []
    for b in ls.STEERED:
        down, up = found.effect(b, "down").change, found.effect(b, "up").change
        worst = min(parsed[f"{b}/down"], parsed[f"{b}/up"])
        rows.append(Row(str(vectors.recipe), layer, b, down, up, down < 0 < up, worst))
    return rows


def table(rows: list[Row]) -> str:
    """Per recipe: cells that go the right way, mean span from down to up, mean readability."""
    lines = ["recipe | right way | mean up - down | parsed (worst of both) |", "---|---|---|---|"]
    for name in dict.fromkeys(r.recipe for r in rows):
        mine = [r for r in rows if r.recipe == name]
        right, span = sum(r.right_way for r in mine), np.mean([r.up - r.down for r in mine])
        lines.append(f"{name} | {right}/{len(mine)} | {span:+.3f} | {np.mean([r.parsed for r in mine]):.2f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--n-train", type=int, default=150)
    parser.add_argument("--n-dev", type=int, default=40)
    parser.add_argument("--coefficient", type=float, default=0.5)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--scope", default="thinking")
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    given["layers"] = tuple(given["layers"]) if given["layers"] else None
    result = main(Config(**given))
    print(table(result))
    if out:
        out.write_text(json.dumps([asdict(r) for r in result], indent=1))

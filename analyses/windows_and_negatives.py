"""Which window and which negatives give vectors that steer? Every recipe and layer, down and up, on dev tasks.

For each recipe, layer and behavior its vector is added at -c and +c, same tasks and seeds in all conditions. The
effect is up - down, the difference of the behavior's sentence shares. A cell goes the right way if down is below the
unsteered share and up above it. Intervals and the paired difference from the first recipe are from a bootstrap over
tasks.

Example: python analyses/windows_and_negatives.py --n-train 150 --n-dev 40 --coefficient 0.5 --json windows.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

import lensteer as ls
from lensteer.evaluation import Condition, Record, ResampledShares, estimate_of, run_conditions
from lensteer.generation.jobs import Sampling
from lensteer.statistics import Estimate
from lensteer.vectors import Recipe, fit_recipes

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
    """Model, sizes, coefficient, layers (None: all), and the file from which a killed run resumes.

    At coefficient 1 a vector is as long as the mean activation.
    """

    model: str | None = None
    n_train: int = 150
    n_dev: int = 40
    coefficient: float = 0.5
    layers: tuple[int, ...] | None = None
    scope: str = "onsets"
    seed: int = 0
    resume: Path | None = None


@dataclass(frozen=True)
class Row:
    """One recipe over all layers and behaviors; `ahead` is the first recipe's mean minus this one's, paired."""

    recipe: str
    effect: Estimate
    ahead: Estimate
    right_way: int
    cells: int
    parsed: float
    by_layer: dict[int, float]


def main(config: Config) -> list[Row]:
    """Run every recipe; returns a row per recipe."""
    model = ls.load_model(config.model)
    train = ls.load_tasks(split="train", n=config.n_train)
    traces = ls.annotate(
        ls.generate_traces(model, train, temperature=1.0, seed=config.seed, batch_size=256), ls.grammar
    )
    tasks = ls.load_tasks(split="dev", n=config.n_dev)
    layers = config.layers or tuple(range(ls.models.n_layers(model)))
    scope = {"thinking": ls.thinking, "everywhere": ls.everywhere, "onsets": ls.onsets}[config.scope]
    conditions = [Condition("unsteered", kind="unsteered")]
    for vectors in fit_recipes(model, traces, RECIPES):
        for layer in layers:
            for b in ls.STEERED:
                for kind, sign in (("down", -1), ("up", 1)):
                    plan = ls.SteeringPlan(vectors[b], layer, sign * config.coefficient, scope, unit="mean_norm")
                    conditions.append(Condition(f"{vectors.recipe}/{layer}/{b}/{kind}", plan))
    sampling = Sampling(1, 1.0, config.seed, 400, 256)
    return rows(
        run_conditions(model, tasks, conditions, sampling, path=config.resume, progress=True, annotator=ls.grammar),
        layers,
        config.seed,
    )


def rows(records: list[Record], layers: tuple[int, ...], seed: int = 0) -> list[Row]:
    """Aggregate records into rows. Shares are ratios of sums over tasks, so chains are weighted by length."""
    shares = ResampledShares(records, seed=seed)
    spans, right = {}, {}
    for recipe in map(str, RECIPES):
        cells = [(layer, b) for layer in layers for b in ls.STEERED]
        down, up = ({(at, b): shares.of(f"{recipe}/{at}/{b}/{kind}", b) for at, b in cells} for kind in ("down", "up"))
        spans[recipe] = {cell: up[cell] - down[cell] for cell in cells}
        right[recipe] = sum(down[cell][0] < shares.of("unsteered", cell[1])[0] < up[cell][0] for cell in cells)
    means = {recipe: np.mean(list(found.values()), axis=0) for recipe, found in spans.items()}
    result = []
    for recipe, mean in means.items():
        ahead = means[str(RECIPES[0])] - mean
        parsed = [r.parsed for r in records if r.condition.startswith(f"{recipe}/")]
        result.append(
            Row(
                recipe,
                estimate_of(mean),
                estimate_of(ahead),
                int(right[recipe]),
                len(spans[recipe]),
                float(np.mean(parsed)),
                {layer: float(np.mean([spans[recipe][layer, b][0] for b in ls.STEERED])) for layer in layers},
            )
        )
    return result


def table(found: list[Row]) -> str:
    """One line per recipe."""
    lines = ["recipe | right way | up - down | first recipe ahead by | parsed | by layer |", "---|---|---|---|---|---|"]
    for r in found:
        layers = " ".join(f"{layer}: {value:+.2f}" for layer, value in r.by_layer.items())
        lines.append(
            f"{r.recipe} | {r.right_way}/{r.cells} | {r.effect:+.3f} | {r.ahead:+.3f} | {r.parsed:.3f} | {layers} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--n-train", type=int, default=150)
    parser.add_argument("--n-dev", type=int, default=40)
    parser.add_argument("--coefficient", type=float, default=0.5)
    parser.add_argument("--layers", type=int, nargs="*")
    parser.add_argument("--scope", default="onsets")
    parser.add_argument("--resume", type=Path)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    given["layers"] = tuple(given["layers"]) if given["layers"] else None
    result = main(Config(**given))
    print(table(result))
    if out:
        out.write_text(json.dumps([asdict(r) for r in result], indent=1))

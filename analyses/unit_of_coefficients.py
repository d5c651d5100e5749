"""Which unit makes a coefficient comparable across layers, behaviors and models?

A unit transfers if the coefficient that reaches a given KL is about the same across layers and models. The scores by
layer of finished runs (exact, at the run's small coefficient) give, to second order, the coefficient that reaches a KL
of 0.1 nats at the next token, in each of five units: the difference of means itself; the length of the behaviors'
median difference at the layer; the length of the layer's mean activation; length 1; and the spread of the spans'
activations along the direction. The result is the spread of these coefficients: the standard deviation of their
natural logarithm over layers and behaviors within a model, and between models.

    python analyses/unit_of_coefficients.py RUN [RUN ...]

A run needs the stages up to `attribute`, with control vectors (`--n-score-controls`), whose covariance gives the
spread.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

import lensteer as ls
from lensteer.attribution import LayerScores
from lensteer.vectors import BehaviorVectors

BUDGET = 0.1
UNITS = ("difference", "median difference", "mean activation", "length 1", "spread")


@dataclass(frozen=True)
class Config:
    """Folders of runs; the outer eighths of the layers, which are rarely steered, are left out."""

    runs: tuple[str, ...]
    outer: float = 0.125


@dataclass(frozen=True)
class Result:
    """Coefficients by model, behavior, layer and unit, and their spread."""

    coefficients: pd.DataFrame

    def scatter(self) -> pd.DataFrame:
        """Per unit: SD of the log within models (pooled), of the models' means, and of everything together."""
        logs = self.coefficients.assign(log=np.log(self.coefficients["coefficient"]))
        rows = []
        for unit in UNITS:
            own = logs[logs["unit"] == unit]
            by_model = own.groupby("model")["log"]
            within = float(np.sqrt((by_model.var() * by_model.count()).sum() / len(own)))
            row = dict(unit=unit, median=float(np.exp(own["log"].median())), within=within)
            rows.append({**row, "between": float(by_model.mean().std()), "all": float(own["log"].std())})
        return pd.DataFrame(rows)


def main(config: Config) -> Result:
    """Read the runs."""
    rows = []
    for folder in map(Path, config.runs):
        name = json.loads((folder / "run.json").read_text())["model"]["name"]
        scores = LayerScores.load(folder / "scores.json")
        vectors = BehaviorVectors.load(folder / "vectors.safetensors")
        if scores.coefficient_unit != "difference" or vectors.controls is None:
            raise ls.LensteerError(
                f"{folder}: scores in {scores.coefficient_unit!r} or no control vectors; run it again"
            )
        cut = config.outer * scores.n_layers
        for label in scores.labels:
            for i, layer in enumerate(scores.layers):
                kl = float(scores.mean[scores.row(label), i])
                if not cut <= layer < scores.n_layers - cut or not kl > 0:
                    continue
                direction = vectors[label]
                length = float(direction.at(layer).norm())
                draws = vectors.controls.covariance_matched[:, vectors.layers.index(layer)].double()
                spread = float((draws @ (direction.at(layer).double() / length)).square().mean().sqrt())
                own = abs(scores.coefficient) * (BUDGET / kl) ** 0.5  # in multiples of the difference
                there = [float(vectors[b].at(layer).norm()) for b in scores.labels]
                lengths = (
                    length,
                    float(np.median(there)),
                    float(direction.scaled(layer, "mean_norm").norm()),
                    1.0,
                    spread,
                )
                rows += [
                    dict(model=name, behavior=label, layer=layer, unit=unit, coefficient=own * length / each)
                    for unit, each in zip(UNITS, lengths, strict=True)
                ]
    return Result(pd.DataFrame(rows))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+")
    found = main(Config(tuple(parser.parse_args().runs)))
    print(found.coefficients.groupby(["unit", "model"])["coefficient"].median().unstack().round(3).to_string())
    print(found.scatter().round(3).to_string(index=False))

"""How much of what a behavior's vector does would a vector of shuffled labels do, and by which recipe least?

Labels are shuffled among the sentences of each chain and vectors fitted as before: what they have in common (that
sentences are held against all tokens, that some chains have more of a behavior than others) has nothing to do with the
behavior. Compared are recipes, by the cosine of each vector with the mean of its shuffled twins, and on dev tasks by
the change of the behavior's share when the vector, and when shuffled twins of the same length, are added.

Example: python analyses/shared_direction.py --run RUN-FOLDER --json FILE
(the folder of a finished `lensteer run`; about 15 minutes on two cores for mini-R1)
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lensteer.directions import Recipe
from lensteer.evaluation import Arm, run_arms
from lensteer.pipeline.chains import annotators_of
from lensteer.pipeline.run import SCOPES, Run
from lensteer.selection import Site
from lensteer.statistics import Ratio, bootstrap_interval
from lensteer.steering import SteeringPlan
from lensteer.traces import load_traces
from lensteer.vectors.fitting import fit_recipes


@dataclass(frozen=True)
class Config:
    """A finished run's folder, recipes as (window, negatives), shuffled twins a behavior, and the length added."""

    run: Path
    recipes: tuple[tuple[str, str], ...] = (("span", "all"), ("span", "spans"), ("onset", "spans"))
    n_shuffled: int = 2
    length: float = 25.0
    seed: int = 1


def main(config: Config) -> dict[str, Any]:
    """Flat figures by recipe and behavior."""
    run = Run.open(config.run)
    c, site = run.config, Site.load(run.path("site.json"))
    traces = load_traces(run.path("annotated.jsonl"))
    recipes = [Recipe(*recipe) for recipe in config.recipes]
    fitted = fit_recipes(run.model, traces, recipes, n_controls=config.n_shuffled, seed=config.seed)
    arms = [Arm("unsteered", kind="unsteered")]
    found: dict[str, Any] = {"length": config.length, "n_shuffled": config.n_shuffled}
    scope = SCOPES[c.scope]
    for (window, negatives), vectors in zip(config.recipes, fitted, strict=True):
        recipe = f"{window}-{negatives}"
        for label, layer in site.items():
            twins = vectors.random("shuffled", label)
            own, mean = vectors[label].at(layer), torch.stack([twin.at(layer) for twin in twins]).mean(0)
            found[f"{recipe}.{label}.length"] = float(own.norm())
            found[f"{recipe}.{label}.shuffled_length"] = float(np.mean([twin.at(layer).norm() for twin in twins]))
            found[f"{recipe}.{label}.cosine_with_shuffled"] = float(torch.cosine_similarity(own, mean, dim=0))
            arms.append(
                Arm(f"{recipe}/{label}/up", SteeringPlan(vectors[label], layer, config.length, scope, unit="unit"))
            )
            for i, twin in enumerate(twins):
                arms.append(Arm(f"{recipe}/{label}/{i}", SteeringPlan(twin, layer, config.length, scope, unit="unit")))
    name, annotator = next(iter(annotators_of(run).items()))
    found["annotator"] = name
    records = run_arms(
        run.model,
        run.tasks("dev"),
        arms,
        run.sampling(1),
        annotator=annotator,
        path=run.path("shared-direction.jsonl"),
        progress=True,
    )
    by_arm: dict[str, list[Any]] = {arm.name: [] for arm in arms}
    for record in records:
        by_arm[record.arm].append(record)

    def share(arms: list[str], label: str) -> Ratio:
        rows = [by_arm[arm] for arm in arms]  # the same tasks in the same order
        counts = np.array([[(r.sentences.get(label, 0), r.n_sentences) for r in arm] for arm in rows], dtype=float)
        return Ratio(*counts.sum(0).T)

    for (window, negatives), label in ((recipe, label) for recipe in config.recipes for label in site):
        recipe, plain = f"{window}-{negatives}", share(["unsteered"], label)
        kinds = {"up": [f"{recipe}/{label}/up"]}
        kinds["shuffled"] = [f"{recipe}/{label}/{i}" for i in range(config.n_shuffled)]
        for kind, chosen in kinds.items():
            change = bootstrap_interval(share(chosen, label), plain, seed=config.seed)
            ends = {"change": change.estimate, "low": change.low, "high": change.high}
            found |= {f"{recipe}.{label}.{kind}.{end}": float(value) for end, value in ends.items()}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--length", type=float, default=25.0)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = main(Config(options.run, length=options.length))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")

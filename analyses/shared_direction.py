"""How much of a vector's effect does a vector of shuffled labels have, and does it help to subtract spans?

Labels are shuffled among the sentences of each chain and vectors fitted as before: what these have in common (sentences
are contrasted with all tokens, some chains have more of a behavior than others) is unrelated to the behavior. The run's
vectors, whose negatives are "all" tokens, are compared with the same for negatives "spans": by the cosine of each
vector with the mean of its shuffled versions, and on dev tasks by the change of the behavior's share when the vector,
or shuffled versions of the same norm, are added.

Nothing is refitted: a mean over all spans is the mean of the behaviors' means, weighted by their spans, so that
v(b, spans) = v(b, all) - sum over b' of n(b') / n * v(b', all), for shuffled labels, too.

Example: python analyses/shared_direction.py --run RUN-FOLDER --json FILE
(the folder of a finished `lensteer run` with negatives "all"; about 8 minutes on two cores for mini-R1)
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.attribution.selection import SelectedLayers
from lensteer.evaluation import Condition, by_condition, run_conditions
from lensteer.pipeline.chains import annotators_of
from lensteer.pipeline.run import SCOPES, Run
from lensteer.statistics import Ratio, bootstrap_interval
from lensteer.steering import SteeringPlan
from lensteer.vectors import BehaviorVectors, Direction


@dataclass(frozen=True)
class Config:
    """A finished run's folder, shuffled versions per behavior, and the norm of what is added."""

    run: Path
    n_shuffled: int = 2
    length: float = 25.0
    seed: int = 1


NEGATIVES = ("all", "spans")


def directions(vectors: BehaviorVectors, label: str, layer: int, negatives: str) -> Float[Tensor, "twin d_model"]:
    """A behavior's vector at a layer, then its shuffled versions."""
    assert vectors.controls is not None, "the run has no control vectors"
    at = vectors.layers.index(layer)
    every = torch.cat([vectors.raw[None], vectors.controls.shuffled])[:, :, at].double()  # twin behavior d_model
    own = every[:, vectors.labels.index(label)]
    counts = torch.tensor([vectors.counts[b] for b in vectors.labels], dtype=torch.float64)
    shared = torch.einsum("tbd,b->td", every, counts / counts.sum())
    return own if negatives == "all" else own - shared


def main(config: Config) -> dict[str, Any]:
    """Flat figures by negatives and behavior."""
    run = Run.open(config.run)
    c, layers = run.config, SelectedLayers.load(run.path("layers.json"))
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    assert vectors.recipe.negatives == "all", "the run's negatives are not all tokens"
    conditions = [Condition("unsteered", kind="unsteered")]
    found: dict[str, Any] = {"length": config.length, "n_shuffled": config.n_shuffled}
    for negatives in NEGATIVES:
        for label, layer in layers.items():
            own, *twins = directions(vectors, label, layer, negatives)
            path, mean = f"{negatives}.{label}", torch.stack(twins).mean(0)
            found[f"{path}.length"] = float(own.norm())
            found[f"{path}.shuffled_length"] = float(torch.stack(twins).norm(dim=-1).mean())
            found[f"{path}.cosine_with_shuffled"] = float(torch.cosine_similarity(own, mean, dim=0))
            for i, vector in enumerate([own, *twins[: config.n_shuffled]]):
                direction = Direction(f"{label}-{i}", vector.float()[None], torch.ones(1), (layer,))
                plan = SteeringPlan(direction, layer, config.length, SCOPES[c.scope], unit="unit")
                conditions.append(Condition(f"{negatives}/{label}/{i}", plan))
    name, annotator = next(iter(annotators_of(run).items()))
    found["annotator"] = name
    records = run_conditions(
        run.model,
        run.tasks("dev"),
        conditions,
        run.sampling(1),
        annotator=annotator,
        path=run.path("shared-direction.jsonl"),
        progress=True,
    )
    grouped = by_condition(records, conditions)

    def share(conditions: list[str], label: str) -> Ratio:
        rows = [grouped[condition] for condition in conditions]  # the same tasks in the same order
        counts = np.array(
            [[(r.sentences.get(label, 0), r.n_sentences) for r in condition] for condition in rows], dtype=float
        )
        return Ratio(*counts.sum(0).T)

    for negatives, label in product(NEGATIVES, layers):
        plain, names = share(["unsteered"], label), [f"{negatives}/{label}/{i}" for i in range(1 + config.n_shuffled)]
        kinds = {"up": names[:1], "shuffled": names[1:]}
        for kind, chosen in kinds.items():
            change = bootstrap_interval(share(chosen, label), plain, seed=config.seed)
            ends = {"change": change.value, "low": change.low, "high": change.high}
            found |= {f"{negatives}.{label}.{kind}.{end}": float(value) for end, value in ends.items()}
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

"""At which layer does each behavior's vector act? The paper's figure with intervals, control vectors and chosen layer.

Scores every layer by `fisher`, along with 200 control vectors of each pool in the same pass, and selects a layer by
exact scores. All vectors have the norm of the layer's mean activation. Chains come from a run's folder; without one
the organism generates them.

Example: python analyses/layer_attribution.py --run lensteer-demo --figure layer_attribution.png
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lensteer as ls
from lensteer.attribution import ControlTests, control_tests
from lensteer.pipeline import Run


@dataclass(frozen=True)
class Config:
    """A run's folder, or a model and how many tasks; control vectors of each pool."""

    run: Path | None = None
    model: str | None = None
    n_train: int = 150
    max_spans: int = 200
    n_controls: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Fisher scores with control vectors, their tests, and the layers chosen by exact scores."""

    scores: ls.LayerScores
    tests: ControlTests
    layers: ls.SelectedLayers


def main(config: Config) -> Result:
    """Fit, score and select."""
    name, traces = config.model, None
    if config.run is not None:
        run = Run.open(config.run)
        name, traces = run.config.model, ls.load_traces(run.path("annotated.jsonl"))
    model = ls.load_model(name)
    if traces is None:
        train = ls.load_tasks(split="train", n=config.n_train)
        traces = ls.annotate(
            ls.generate_traces(model, train, temperature=1.0, seed=config.seed, batch_size=256), ls.grammar
        )
    vectors = ls.fit_vectors(model, traces, window="onset", n_controls=config.n_controls, seed=config.seed)
    options: dict[str, Any] = dict(behaviors=ls.STEERED, max_spans=config.max_spans, seed=config.seed, unit="mean_norm")
    scores = ls.attribute(model, traces, vectors, method="fisher", n_controls=config.n_controls, **options)
    exact = ls.attribute(model, traces, vectors, **options)
    return Result(scores, control_tests(scores), ls.select_layers(exact, ls.embedding_overlap(model, vectors)))


def table(result: Result) -> str:
    """Per behavior: the chosen layer, and z and p there against each pool of control vectors."""
    lines = ["behavior | layer | control | z | p | p over all cells |", "---|---|---|---|---|---|"]
    for b, label in enumerate(result.scores.labels):
        i = result.scores.layers.index(result.layers[label])
        for k, kind in enumerate(result.tests.kinds):
            z, p, p_max = (float(x[k, b, i]) for x in (result.tests.z, result.tests.p, result.tests.p_max))
            lines.append(f"{label} | {result.layers[label]} | {kind} | {z:.1f} | {p:.3f} | {p_max:.3f} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--n-train", type=int, default=150)
    parser.add_argument("--n-controls", type=int, default=200)
    parser.add_argument("--figure", type=Path)
    given = vars(parser.parse_args())
    figure = given.pop("figure")
    result = main(Config(**given))
    print(table(result))
    if figure:
        ls.plots.against_controls(result.scores, result.layers).write_image(figure, width=1200, scale=2)

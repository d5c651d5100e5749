"""Are vectors from one teacher's chains similar to those from all teachers' chains, and do they have the same effects?

Vectors are fitted on each file of a run's chains alone, by the run's recipe. Reported are cosines at the run's layers
and, for one file, the effects on the run's held-out tasks, with the run's layer, scope, seeds and added norm.

Example: python analyses/one_teachers_vectors.py --run RUN-FOLDER --alone 0 --json FILE
(the folder of a finished `lensteer run --chains A --chains B ...`; about 20 minutes on two cores for mini-R1)
"""

from __future__ import annotations

import argparse
import json
from dataclasses import dataclass
from itertools import accumulate, combinations
from pathlib import Path
from typing import Any

import torch

from lensteer.attribution.selection import SelectedLayers
from lensteer.evaluation import ChosenCoefficients, evaluate
from lensteer.pipeline.chains import annotators_of
from lensteer.pipeline.run import SCOPES, Run
from lensteer.traces import load_traces
from lensteer.vectors import BehaviorVectors, fit_vectors


@dataclass(frozen=True)
class Config:
    """A finished run's folder, which of its files to steer with, and chains per held-out task."""

    run: Path
    alone: int = 0
    n_samples: int = 4


def cosine(a: BehaviorVectors, b: BehaviorVectors, label: str, layer: int) -> float:
    """Cosine similarity between two vectors of one behavior."""
    return float(torch.cosine_similarity(a[label].at(layer), b[label].at(layer), dim=0))


def main(config: Config) -> dict[str, Any]:
    """Flat figures: cosines, spans, and the effects of one file's vectors."""
    run = Run.open(config.run)
    c, layers, coefficients = (
        run.config,
        SelectedLayers.load(run.path("layers.json")),
        ChosenCoefficients.load(run.path("coefficients.json")),
    )
    traces = load_traces(run.path("annotated.jsonl"))
    ends = list(accumulate(run.stages["traces"]["files"]))
    files = [traces[begin:end] for begin, end in zip([0, *ends], ends, strict=False)]
    everything = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    recipe: dict[str, Any] = dict(window=c.window, negatives=c.negatives)
    own = [fit_vectors(run.model, part, **recipe) for part in files]
    names = [Path(path).name.removesuffix("_annotated_chains.jsonl") for path in c.chains]
    found: dict[str, Any] = {"files": names, "alone": names[config.alone], "n_samples": config.n_samples}
    for label, layer in layers.items():
        for name, vectors in zip(names, own, strict=True):
            found[f"cosine.{label}.{name}.all"] = cosine(vectors, everything, label, layer)
            found[f"spans.{label}.{name}"] = vectors.counts[label]
        for (one, first), (two, second) in combinations(zip(names, own, strict=True), 2):
            found[f"cosine.{label}.{one}.{two}"] = cosine(first, second, label, layer)
    alone = own[config.alone]
    longer = {b: float(everything[b].at(layer).norm() / alone[b].at(layer).norm()) for b, layer in layers.items()}
    pairs = {b: tuple(None if trial is None else trial * longer[b] for trial in coefficients.pairs[b]) for b in layers}
    name, annotator = next(iter(annotators_of(run).items()))
    effects = evaluate(
        run.model,
        run.tasks("test"),
        alone,
        layers,
        pairs,  # type: ignore[arg-type]  # pairs
        scope=SCOPES[c.scope],
        unit=c.unit,
        n_controls=0,
        sampling=run.sampling(config.n_samples),
        annotator={name: annotator},
        margins=run.margins,
        seed=c.seed,
        path=run.path(f"alone-{config.alone}.jsonl"),
        progress=True,
    )
    for effect in effects.effects:
        if effect.unit == "sentences":
            path = f"effect.{effect.behavior}.{effect.kind}"
            for field in ("layer", "coefficient", "length", "share", "base", "change", "low", "high", "p", "p_holm"):
                found[f"{path}.{field}"] = getattr(effect, field)
            found |= {f"{path}.text": effect.text, f"{path}.verdict": effect.verdict}
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--alone", type=int, default=0)
    parser.add_argument("--n-samples", type=int, default=4)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = main(Config(options.run, options.alone, options.n_samples))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1) + "\n")

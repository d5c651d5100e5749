"""Which layer score predicts where steering works? Every score against the measured effect of steering, by layer.

The effect of steering at a layer is E = share(up) - share(down) of a behavior's sentences on dev tasks, each direction
at the coefficient that matches the target KL (95th percentile per token of the steered model's own rollouts). Two
numbers per score: Spearman's correlation with E over layers (mean over behaviors), and regret, how much smaller E is
at the layer with the largest score than at the best layer. Intervals are from a bootstrap over the dev tasks of
E; scores are fixed. `ahead` is the regret of `exact` minus this score's, on the same draws: above 0, it picks better.

Example: python analyses/which_score_predicts_steering.py --models lensteer/organism/weights analyses/organisms/llama \
    --folder which-score --json which-score.json
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import rankdata

import lensteer as ls
from lensteer.attribution import efficiency
from lensteer.calibration import calibrate_many
from lensteer.evaluation import Condition, Record, ResampledShares, estimate_of, run_conditions
from lensteer.files import write_atomically
from lensteer.generation.jobs import Sampling
from lensteer.statistics import Estimate
from lensteer.vectors import BehaviorVectors, probe_accuracy

Array = np.ndarray


@dataclass(frozen=True)
class Config:
    """Models, sizes, the target KL in nats, and the folder from which a killed run resumes."""

    models: tuple[str, ...] = (str(ls.models.ORGANISM),)
    n_train: int = 150
    n_dev: int = 60
    n_prompts: int = 12
    budget: float = 0.15
    max_spans: int = 150
    seed: int = 0
    folder: Path = Path("which-score")


@dataclass(frozen=True)
class Row:
    """One score on one organism (or all of them): estimates with 95 % intervals."""

    organism: str
    score: str
    spearman: Estimate
    regret: Estimate
    ahead: Estimate
    picks: dict[str, int]


@dataclass(frozen=True)
class Measured:
    """Of one organism: E per draw (the first is the data as they are), behavior and layer; and the scores."""

    name: str
    effect: Array
    scores: Mapping[str, Array]


def main(config: Config) -> list[Row]:
    """Measure every organism; returns a row per organism and score, and pooled rows."""
    config.folder.mkdir(parents=True, exist_ok=True)
    return rows([measured(path, config, i) for i, path in enumerate(config.models)])


def measured(path: str, config: Config, number: int = 0) -> Measured:
    """Score every layer of one organism, and steer at every layer."""
    model = ls.load_model(path)
    name = "embedded" if Path(path) == ls.models.ORGANISM else Path(path).name
    train = ls.load_tasks(split="train", n=config.n_train)
    traces = ls.annotate(
        ls.generate_traces(model, train, temperature=1.0, seed=config.seed, batch_size=256), ls.grammar
    )
    vectors = ls.fit_vectors(model, traces, window="onset", behaviors=ls.BEHAVIORS)
    tasks = ls.load_tasks(split="dev", n=config.n_dev)
    plans = _calibrated(model, tasks[: config.n_prompts], vectors, config, config.folder / f"{number}-{name}.json")
    conditions = [Condition(key, plan) for key, plan in plans.items()]
    records = run_conditions(
        model,
        tasks,
        conditions,
        Sampling(1, 1.0, config.seed, 400, 256),
        path=config.folder / f"{number}-{name}.jsonl",
        progress=True,
        annotator=ls.grammar,
    )
    return Measured(
        name, effects(records, vectors.layers, config.seed + number), scores(model, traces, vectors, config)
    )


def _calibrated(
    model, tasks: list[ls.Task], vectors: BehaviorVectors, config: Config, path: Path
) -> dict[str, ls.SteeringPlan]:
    """A plan per direction, layer and sign, at the target KL; cached in a file, because the search takes minutes."""
    plans = {
        f"{b}/{layer}/{kind}": ls.SteeringPlan(vectors[b], layer, sign * 0.4, ls.onsets, unit="mean_norm")
        for b in ls.STEERED
        for layer in vectors.layers
        for kind, sign in (("down", -1), ("up", 1))
    }
    if not path.exists():
        found = calibrate_many(
            model, tasks, list(plans.values()), budget=config.budget, seed=config.seed, progress=True
        )
        values = {key: (c.coefficient, c.kl, c.reached) for key, c in zip(plans, found, strict=True)}
        write_atomically(path, json.dumps(values, indent=1))
    coefficients = json.loads(path.read_text())
    return {key: replace(plan, coefficient=coefficients[key][0]) for key, plan in plans.items()}


def effects(records: list[Record], layers: tuple[int, ...], seed: int = 0) -> Array:
    """E `[draw behavior layer]`: draw 0 is the data, the others resample tasks. Chains are weighted by length."""
    shares = ResampledShares(records, seed=seed)
    effect = [[shares.of(f"{b}/{at}/up", b) - shares.of(f"{b}/{at}/down", b) for at in layers] for b in ls.STEERED]
    return np.array(effect).transpose(2, 0, 1)


def scores(model, traces: list[ls.Trace], vectors: BehaviorVectors, config: Config) -> dict[str, Array]:
    """Every score, `[behavior layer]`, larger meaning a better layer."""
    common: dict[str, Any] = dict(behaviors=ls.STEERED, max_spans=config.max_spans, seed=config.seed)
    options: dict[str, Any] = dict(unit="mean_norm", **common)
    exact = ls.attribute(model, traces, vectors, **options)
    everywhere = ls.attribute(model, traces, vectors, spans="all", **options)
    signed = ls.attribute(model, traces, vectors, method="signed", spans="all", **options)
    overlap, probes = ls.embedding_overlap(model, vectors), probe_accuracy(model, traces, behaviors=ls.BEHAVIORS)
    rows = [vectors.labels.index(b) for b in ls.STEERED]
    return {
        "exact": exact.mean.numpy(),
        "fisher": ls.attribute(model, traces, vectors, method="fisher", **options).mean.numpy(),
        "signed": signed.mean.numpy(),
        "efficiency": efficiency(signed, everywhere).mean.numpy(),
        "published": ls.attribute(model, traces, vectors, method="published", **common).mean.numpy(),
        "low overlap": -overlap.embedding.maximum[rows].numpy(),
        "probe accuracy": probes.mean[[probes.labels.index(b) for b in ls.STEERED]].numpy(),
        "norm ratio": (vectors.raw[rows].norm(dim=-1) / vectors.mean_norm).numpy(),
        "middle layer": np.tile(-np.abs(np.arange(len(vectors.layers)) - (len(vectors.layers) - 1) / 2), (4, 1)),
    }


def rows(organisms: list[Measured]) -> list[Row]:
    """Correlation and regret of every score, per organism and over all of them (means over organisms)."""
    result = []
    pooled: dict[str, list[tuple[Array, Array, Array]]] = {}
    for organism in organisms:
        reference = _regret(organism.effect, organism.scores["exact"])
        for name, score in organism.scores.items():
            regret = _regret(organism.effect, score)
            figures = (_spearman(organism.effect, score), regret, reference - regret)
            spearman, lost, ahead = map(estimate_of, figures)
            pooled.setdefault(name, []).append(figures)
            picks = {b: int(score[i].argmax()) for i, b in enumerate(ls.STEERED)}
            result.append(Row(organism.name, name, spearman, lost, ahead, picks))
    if len(organisms) > 1:
        for name, found in pooled.items():
            means = [np.mean(values, axis=0) for values in zip(*found, strict=True)]
            spearman, lost, ahead = map(estimate_of, means)
            result.append(Row("all", name, spearman, lost, ahead, {}))
    return result


def _spearman(effect: Array, score: Array) -> Array:
    """Per draw, the mean over behaviors of the rank correlation over layers."""
    ranks, wanted = rankdata(effect, axis=-1), rankdata(score, axis=-1)
    ranks, wanted = (r - r.mean(-1, keepdims=True) for r in (ranks, wanted))
    scale = np.sqrt((ranks**2).sum(-1) * (wanted**2).sum(-1))
    return np.divide((ranks * wanted).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0).mean(-1)


def _regret(effect: Array, score: Array) -> Array:
    """Per draw, the mean over behaviors of the best layer's effect less that of the layer with the largest score."""
    picked = np.take_along_axis(effect, score.argmax(-1)[None, :, None], -1)[..., 0]
    return (effect.max(-1) - picked).mean(-1)


def table(found: list[Row]) -> str:
    """One line per organism and score."""
    lines = ["organism | score | Spearman with E | regret | ahead of exact | picks |", "---|---|---|---|---|---|"]
    for r in found:
        figures = [f"{found:+.3f}" for found in (r.spearman, r.regret, r.ahead)]
        picks = ", ".join(f"{b.split('-')[0]} {layer}" for b, layer in r.picks.items())
        lines.append(f"{r.organism} | {r.score} | {' | '.join(figures)} | {picks} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--models", nargs="+", default=[str(ls.models.ORGANISM)])
    parser.add_argument("--n-train", type=int, default=150)
    parser.add_argument("--n-dev", type=int, default=60)
    parser.add_argument("--n-prompts", type=int, default=12)
    parser.add_argument("--budget", type=float, default=0.15)
    parser.add_argument("--folder", type=Path, default=Path("which-score"))
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    result = main(Config(**{**given, "models": tuple(given["models"])}))
    print(table(result))
    if out:
        out.write_text(json.dumps([asdict(r) for r in result], indent=1))

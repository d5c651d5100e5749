"""At which positions does steering work? The same vectors at all, prompt, generated, thinking and other positions.

At every scope each behavior's vector is added and taken away at one layer, same tasks and seeds in all conditions. The
effect is the behavior's share of sentences, added less taken away. Two comparisons use free-running chains: at the same
coefficient, and at coefficients that match a target mean KL(steered || unsteered) per token of the steered model's
rollouts (by default that of the onsets at their coefficient), so that a scope with few positions is not just a weaker
intervention. Two more use given, unsteered chains (`given_chains.py`): only there can the behavior's own spans be
edited, because they are known in advance, and one sentence at a time be left out. Their effect is the log-probability
of the behavior's own sentences, added less taken away, in nats per sentence, and their KL is KL(unsteered || steered).
Intervals, and the paired difference from the onsets (from all sentences, where one is left out), are from a bootstrap
over tasks; chains are weighted by length. The default recipe fits vectors on onsets: others may do best elsewhere.

Example: python analyses/position_ablation.py --run lensteer-demo --json positions.json --figure positions.png
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from given_chains import KINDS, WHOLE, Cell, Setting, edited, forced, left_out, whole_chains

import lensteer as ls
from lensteer.calibration import RolloutKL, calibrate_many, rollout_kl
from lensteer.evaluation import (
    MEAN,
    ChosenCoefficients,
    Condition,
    PositionAblation,
    PositionEffect,
    ResampledShares,
    estimate_of,
    run_conditions,
)
from lensteer.generation.jobs import Sampling
from lensteer.pipeline import Run
from lensteer.pipeline.chains import annotators_of
from lensteer.plots import position_ablation

REFERENCE = ls.onsets.name
Key = tuple[str, str, str]  # scope, behavior, "down" or "up"


@dataclass(frozen=True)
class Config:
    """A run's folder (its vectors, layers, coefficients and dev tasks), or a model to fit vectors on; sizes.

    `coefficient` is for a model without a run, in multiples of the mean activation's length; a run has its own
    coefficients. `first` is the n of "first(n)", `budget` the target KL in nats per token (None: that of the
    onsets), `folder` for finished chains, from which a killed run resumes.
    """

    run: Path | None = None
    model: str | None = None
    n_train: int = 150
    n_dev: int = 40
    n_prompts: int = 12
    coefficient: float = 0.5
    first: int = 16
    budget: float | None = None
    seed: int = 0
    folder: Path | None = None


def main(config: Config) -> PositionAblation:
    """Measure all four comparisons."""
    at = _of_run(config, config.run) if config.run else _fitted(config)
    scopes = [
        ls.everywhere,
        ls.prompt,
        ls.generated,
        ls.thinking,
        ls.sentence_starts,
        ls.onsets,
        ls.first(config.first),
    ]
    plans = {(scope.name, b, kind): at.plan(b, kind, scope) for scope in scopes for b in at.layers for kind in KINDS}
    drawn: dict[str, Any] = dict(temperature=at.sampling.temperature, max_new_tokens=at.sampling.max_new_tokens)
    chains = ls.generate_traces(at.model, at.tasks, seed=at.sampling.seed, **drawn)
    chains = [chain for chain in ls.annotate(chains, at.annotator) if chain.spans]
    prompts, length = at.tasks[: config.n_prompts], min(200, at.sampling.max_new_tokens)
    options: dict[str, Any] = dict(seed=config.seed, batch_size=at.sampling.batch_size, max_new_tokens=length)

    def costs(of: Mapping[Key, ls.SteeringPlan]) -> dict[Key, RolloutKL]:
        return dict(zip(of, rollout_kl(at.model, prompts, list(of.values()), **options), strict=True))

    spent = costs(plans)
    rows = _rows("coefficient", _free(at, config, "coefficient", plans, spent, chains))
    rows += _rows("forced", forced(at, chains, whole_chains(at, scopes, chains), config.seed))
    rows += _rows("left out", forced(at, chains, left_out(at, chains), config.seed), WHOLE)
    budget = config.budget or _pooled([kl for key, kl in spent.items() if key[0] == REFERENCE]).statistic(None)
    # A KL grows with the square of the coefficient, which gives the start of the search.
    near = {key: math.sqrt(budget / max(kl.statistic(None), budget / 100)) for key, kl in spent.items()}
    begin = [replace(plan, coefficient=plan.coefficient * near[key]) for key, plan in plans.items()]
    limits: dict[str, Any] = dict(quantile=None, tolerance=0.15, max_rounds=5, max_coefficient=8.0)
    found = dict(zip(plans, calibrate_many(at.model, prompts, begin, budget=budget, **limits, **options), strict=True))
    plans, reached = {key: c.plan for key, c in found.items()}, {key: c.reached for key, c in found.items()}
    rows += _rows("budget", _free(at, config, "budget", plans, costs(plans), chains, reached))
    return PositionAblation(tuple(rows), REFERENCE, budget, dict(at.layers), len(at.tasks), len(prompts))


def _of_run(config: Config, folder: Path) -> Setting:
    run = Run.open(folder)
    vectors = ls.BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    layers, coefficients = (
        ls.SelectedLayers.load(run.path("layers.json")),
        ChosenCoefficients.load(run.path("coefficients.json")),
    )
    tasks = run.tasks("dev")[: config.n_dev]
    coefficient, unit = coefficients.coefficients, coefficients.coefficient_unit
    annotator = next(iter(annotators_of(run).values()))
    kept = {
        b: layer for b, layer in layers.items() if b in coefficient
    }  # the others have no coefficient that leaves the text readable
    return Setting(run.model, vectors, kept, coefficient, tasks, run.sampling(1), annotator, unit)


def _fitted(config: Config) -> Setting:
    model = ls.load_model(config.model)
    train = ls.load_tasks(split="train", n=config.n_train)
    traces = ls.annotate(
        ls.generate_traces(model, train, temperature=1.0, seed=config.seed, batch_size=256), ls.grammar
    )
    vectors = ls.fit_vectors(model, traces, window="onset")
    options: dict[str, Any] = dict(behaviors=ls.STEERED, max_spans=100, seed=config.seed)
    scores = ls.attribute(model, traces, vectors, unit="mean_norm", **options)
    layers = ls.select_layers(scores, ls.embedding_overlap(model, vectors))
    coefficient, tasks = dict.fromkeys(layers, config.coefficient), ls.load_tasks(split="dev", n=config.n_dev)
    sampling = Sampling(1, 1.0, config.seed, 400, 256)
    return Setting(model, vectors, layers, coefficient, tasks, sampling, unit="mean_norm")


def _free(
    at: Setting,
    config: Config,
    name: str,
    plans: Mapping[Key, ls.SteeringPlan],
    costs: Mapping[Key, RolloutKL],
    chains: Sequence[ls.Trace],
    reached: Mapping[Key, bool] | None = None,
) -> dict[tuple[str, str], Cell]:
    """Cells of free-running chains."""
    path = None if config.folder is None else config.folder / f"{name}.jsonl"
    conditions = [Condition("/".join(key), plan) for key, plan in plans.items()]
    records = run_conditions(
        at.model, at.tasks, conditions, at.sampling, annotator=at.annotator, path=path, progress=True
    )
    shares, cells = ResampledShares(records, seed=config.seed), {}
    for scope, b in dict.fromkeys(key[:2] for key in plans):
        keys = [(scope, b, kind) for kind in KINDS]
        names = ["/".join(key) for key in keys]
        down, up = (plans[key].coefficient for key in keys)
        cells[scope, b] = Cell(
            shares.of(names[1], b) - shares.of(names[0], b),
            tuple(costs[key] for key in keys),
            edited(at, chains, [plans[keys[0]].scope] * len(chains)),
            down,
            up,
            float(np.mean([r.parsed for r in records if r.condition in names])),
            reached is None or all(reached[key] for key in keys),
        )
    return cells


def _pooled(kls: Sequence[RolloutKL]) -> RolloutKL:
    """All tokens of several plans on the same prompts."""
    return RolloutKL(tuple(torch.cat(rows) for rows in zip(*(kl.tokens for kl in kls), strict=True)))


def _rows(comparison: str, cells: Mapping[tuple[str, str], Cell], reference: str = REFERENCE) -> list[PositionEffect]:
    """A row per scope and behavior, and one for the mean over behaviors."""
    if not cells:
        return []
    rows, effects = [], {key: cell.effect for key, cell in cells.items()}
    scopes, labels = (list(dict.fromkeys(names)) for names in zip(*cells, strict=True))
    effects |= {(scope, MEAN): np.mean([effects[scope, b] for b in labels], axis=0) for scope in scopes}
    for scope in scopes:
        for b in [*labels, MEAN]:
            own = [cells[scope, b]] if b != MEAN else [cells[scope, label] for label in labels]
            kl = _pooled([one for cell in own for one in cell.kls])
            rows.append(
                PositionEffect(
                    comparison,
                    scope,
                    b,
                    estimate_of(effects[scope, b]),
                    estimate_of(effects[reference, b] - effects[scope, b]),
                    kl.estimate(None),
                    **{
                        k: float(np.mean([getattr(cell, k) for cell in own]))
                        for k in ("edited", "down", "up", "parsed")
                    },
                    reached=all(cell.reached for cell in own),
                )
            )
    return rows


def table(result: PositionAblation, behavior: str = MEAN) -> str:
    """One line per comparison and scope, of one behavior or their mean; the reference is onsets, or all sentences."""
    lines = [f"{behavior} | scope | effect | below reference by | KL per token | positions | coefficients | parsed |"]
    lines.append("---|---|---|---|---|---|---|---|")
    for r in (r for r in result.rows if r.behavior == behavior):
        kl = f"{r.kl:.4f}{'' if r.reached else ' (not all reached)'}"
        coefficients = f"{r.down:+.2f}, {r.up:+.2f} | {r.parsed:.3f}"
        lines.append(
            f"{r.comparison} | {r.scope} | {r.effect:+.3f} | {r.behind:+.3f} | {kl} | {r.edited:.1f} | {coefficients} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--n-train", type=int, default=150)
    parser.add_argument("--n-dev", type=int, default=40)
    parser.add_argument("--n-prompts", type=int, default=12)
    parser.add_argument("--coefficient", type=float, default=0.5)
    parser.add_argument("--first", type=int, default=16)
    parser.add_argument("--budget", type=float)
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = vars(parser.parse_args())
    out, figure = given.pop("json"), given.pop("figure")
    result = main(Config(**given))
    for behavior in (MEAN, *result.layers):
        print(table(result, behavior), end="\n\n")
    if out:
        out.write_text(json.dumps(asdict(result), indent=1))
    if figure:
        position_ablation(result).write_image(figure, width=1200, scale=2)

"""At which positions does steering work? The same vectors at all, prompt, generated, thinking and other positions.

At every scope each behavior's vector is added and taken away at one layer, same tasks and seeds in all conditions. The
effect is the behavior's share of sentences, added less taken away; or, on a language model with given vectors, added
less unsteered, because its base rates are too low for a fall to be seen. Two comparisons use free-running chains: at
the same coefficient, and at coefficients that match a target mean KL(steered || unsteered) per token of the steered
model's rollouts (by default that of the reference at its coefficient), so that a scope with few positions is not just
a weaker intervention. Two more use given, unsteered chains (`given_chains.py`): only there can the behavior's own
spans be edited, because they are known in advance, and one sentence at a time be left out. Their effect is the
log-probability of the behavior's own sentences, added less taken away, in nats per sentence, and their KL is
KL(unsteered || steered). Intervals, and the paired difference from the reference (from all sentences, where one is left
out), are from a bootstrap over tasks; chains are weighted by length. The default recipe fits vectors on onsets: others
may do best elsewhere.

    python analyses/position_ablation.py --run lensteer-demo --json positions.json --figure positions.png
    python analyses/position_ablation.py --model FOLDER --dtype bfloat16 --vectors span-all.safetensors --layer 15
        --coefficients '{"backtracking": 1.25}' --chains r1.jsonl more.jsonl --reference generated --folder positions

With `--vectors`, the chains' labels teach a classifier, which labels the model's own sentences, and beginnings of the
first file's chains are the given chains.
"""

from __future__ import annotations

import argparse
import json
import math
import pickle
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from given_chains import UNSTEERED, WHOLE, Cases, Cell, Setting, edited, forced, left_out, sub_chains, whole_chains

import lensteer as ls
from lensteer.annotation import fit_classifier
from lensteer.calibration import RolloutKL, calibrate_many, rollout_kl
from lensteer.errors import LensteerError
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
from lensteer.files import digest, write_atomically
from lensteer.generation.jobs import Sampling
from lensteer.pipeline import Run, read_chains
from lensteer.pipeline.chains import annotators_of
from lensteer.plots import position_ablation
from lensteer.statistics import flat

Key = tuple[str, str, str]  # scope, behavior, "down" or "up"
Made = TypeVar("Made")


@dataclass(frozen=True)
class Config:
    """A run's folder (its vectors, layers, coefficients and dev tasks), a model to fit vectors on, or given vectors.

    `coefficient` is for a model without a run, in multiples of the mean activation's length; a run has its own
    coefficients. `first` is the n of "first(n)", `reference` the scope that others are compared with, `budget` the
    target KL in nats per token (None: that of the reference), `max_coefficient` the limit of its search. A killed run
    resumes from `folder`.

    Given vectors have one `layer`, `coefficients` in multiples of each vector and annotated `chains`, of which the
    first `given_tokens` tokens of `n_given` are read, `n_left_out` sentences of each behavior at most (None: all).
    `kl_every`: along given chains, the KL is computed at one token in so many.
    """

    run: Path | None = None
    model: str | None = None
    n_train: int = 150
    n_dev: int = 40
    n_prompts: int = 12
    coefficient: float = 0.5
    first: int = 16
    reference: str = ls.onsets.name
    budget: float | None = None
    max_coefficient: float = 8.0
    seed: int = 0
    folder: Path | None = None
    vectors: Path | None = None
    layer: int = 0
    coefficients: Mapping[str, float] | None = None
    chains: tuple[str, ...] = ()
    dtype: str = "float32"
    tasks: str = "builtin"
    temperature: float = 0.8
    max_new_tokens: int = 100
    n_given: int = 40
    given_tokens: int = 400
    n_left_out: int | None = None
    kl_every: int = 1


def main(config: Config) -> PositionAblation:
    """Measure all four comparisons."""
    at = _of_run(config, config.run) if config.run else _of_vectors(config) if config.vectors else _fitted(config)
    scopes = [
        ls.everywhere,
        ls.prompt,
        ls.generated,
        ls.thinking,
        ls.sentence_starts,
        ls.onsets,
        ls.first(config.first),
    ]
    plans = {(scope.name, b, kind): at.plan(b, kind, scope) for scope in scopes for b in at.layers for kind in at.kinds}
    drawn: dict[str, Any] = dict(temperature=at.sampling.temperature, max_new_tokens=at.sampling.max_new_tokens)

    def unsteered() -> list[ls.Trace]:
        chains = ls.generate_traces(at.model, at.tasks, seed=at.sampling.seed, **drawn)
        return [chain for chain in ls.annotate(chains, at.annotator) if chain.spans]

    chains = _kept(config, "unsteered", unsteered)
    given = at.given or chains
    for name, some in (("own", chains), ("given", given)):
        counts = Counter(span.label for chain in some for span in chain.spans)
        print(
            f"{len(some)} {name} unsteered chains: {counts.total()} sentences, { ({b: counts[b] for b in at.layers}) }"
        )
    prompts, length = at.tasks[: config.n_prompts], min(200, at.sampling.max_new_tokens)
    options: dict[str, Any] = dict(seed=config.seed, batch_size=at.sampling.batch_size, max_new_tokens=length)

    def costs(of: Mapping[Key, ls.SteeringPlan]) -> dict[Key, RolloutKL]:
        return dict(zip(of, rollout_kl(at.model, prompts, list(of.values()), **options), strict=True))

    def along(cases: Cases) -> dict[tuple[str, str], Cell]:
        return forced(at, given, cases, config.seed, config.kl_every)

    spent = _kept(config, "costs", lambda: costs(plans))
    rows = _rows("coefficient", _free(at, config, "coefficient", plans, spent, chains), config.reference)
    whole = _kept(config, "forced", lambda: along(whole_chains(at, scopes, given)))
    rows += _rows("forced", whole, config.reference)
    without = _kept(config, "left-out", lambda: along(left_out(at, given, config.n_left_out)))
    rows += _rows("left out", without, WHOLE)
    budget = config.budget or _pooled([kl for key, kl in spent.items() if key[0] == config.reference]).statistic(None)
    # A KL grows with the square of the coefficient, which gives the start of the search.
    near = {key: math.sqrt(budget / max(kl.statistic(None), budget / 100)) for key, kl in spent.items()}
    begin = [replace(plan, coefficient=plan.coefficient * near[key]) for key, plan in plans.items()]
    limits: dict[str, Any] = dict(quantile=None, tolerance=0.15, max_rounds=5, max_coefficient=config.max_coefficient)

    def matched() -> list[tuple[float, bool]]:
        found = calibrate_many(at.model, prompts, begin, budget=budget, **limits, **options)
        return [(c.coefficient, c.reached) for c in found]

    found = dict(zip(plans, _kept(config, "coefficients", matched), strict=True))
    plans = {key: replace(plan, coefficient=found[key][0]) for key, plan in plans.items()}
    spent = _kept(config, "budget-costs", lambda: costs(plans))
    reached = {key: is_reached for key, (_, is_reached) in found.items()}
    rows += _rows("budget", _free(at, config, "budget", plans, spent, chains, reached), config.reference)
    return PositionAblation(
        tuple(rows), config.reference, budget, dict(at.layers), len(at.tasks), len(prompts), at.base
    )


def _kept(config: Config, name: str, make: Callable[[], Made]) -> Made:
    """What a step gives, from the folder if it is there. A file's name holds a digest of the options."""
    if config.folder is None:
        return make()
    options = digest(repr(replace(config, folder=None)).encode())
    path = config.folder / f"{name}-{options}.pickle"
    if not path.exists():
        write_atomically(path, pickle.dumps(make()))
    found: Made = pickle.loads(path.read_bytes())
    return found


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


def _of_vectors(config: Config) -> Setting:
    model = ls.load_model(config.model, dtype=getattr(torch, config.dtype))
    vectors = ls.BehaviorVectors.load(config.vectors, model)
    coefficients = dict(config.coefficients or {})
    if not coefficients or not set(coefficients) <= set(vectors.labels):
        raise LensteerError(f"coefficients {coefficients}: give one for each behavior to steer, of {vectors.labels}")
    annotated = read_chains(config.chains, model)
    given = sub_chains(model, annotated, list(coefficients), config.n_given, config.given_tokens)
    classifier = _kept(config, "classifier", lambda: fit_classifier(annotated, seed=config.seed))
    tasks = ls.load_tasks(config.tasks, split="dev", n=config.n_dev)
    sampling = Sampling(1, config.temperature, config.seed, config.max_new_tokens, 256)
    layers = dict.fromkeys(coefficients, config.layer)
    return Setting(
        model, vectors, layers, coefficients, tasks, sampling, classifier, "difference", base=UNSTEERED, given=given
    )


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
    if at.base == UNSTEERED:
        conditions.append(Condition(UNSTEERED))
    records = run_conditions(
        at.model, at.tasks, conditions, at.sampling, annotator=at.annotator, path=path, progress=True
    )
    shares, cells = ResampledShares(records, seed=config.seed), {}
    for scope, b in dict.fromkeys(key[:2] for key in plans):
        keys = [(scope, b, kind) for kind in at.kinds]
        names = ["/".join(key) for key in keys]
        base, added = [UNSTEERED, *names][-2:]
        down, up = [0.0, *(plans[key].coefficient for key in keys)][-2:]
        steered = [r for r in records if r.condition in names]
        cells[scope, b] = Cell(
            shares.of(added, b) - shares.of(base, b),
            tuple(costs[key] for key in keys),
            edited(at, chains, [plans[keys[0]].scope] * len(chains)),
            down,
            up,
            float(np.mean([r.parsed for r in steered])),
            float(np.mean([r.repetition for r in steered])),
            reached is None or all(reached[key] for key in keys),
        )
    return cells


def _pooled(kls: Sequence[RolloutKL]) -> RolloutKL:
    """All tokens of several plans on the same prompts."""
    return RolloutKL(tuple(torch.cat(rows) for rows in zip(*(kl.tokens for kl in kls), strict=True)))


def _rows(comparison: str, cells: Mapping[tuple[str, str], Cell], reference: str) -> list[PositionEffect]:
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
                        for k in ("edited", "down", "up", "parsed", "repetition")
                    },
                    reached=all(cell.reached for cell in own),
                )
            )
    return rows


def table(result: PositionAblation, behavior: str = MEAN) -> str:
    """One line per comparison and scope, of one behavior or their mean."""
    names = "scope | effect | below reference by | KL per token | positions | coefficients | parsed | repetition"
    lines = [f"{behavior} | {names} |"]
    lines.append("---|---|---|---|---|---|---|---|---|")
    for r in (r for r in result.rows if r.behavior == behavior):
        kl = f"{r.kl:.4f}{'' if r.reached else ' (not all reached)'}"
        coefficients = f"{r.down:+.2f}, {r.up:+.2f} | {r.parsed:.3f} | {r.repetition:.2f}"
        lines.append(
            f"{r.comparison} | {r.scope} | {r.effect:+.3f} | {r.behind:+.3f} | {kl} | {r.edited:.1f} | {coefficients} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    for option in ("run", "vectors", "folder", "json", "figure"):
        parser.add_argument(f"--{option}", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--chains", nargs="+", default=[])
    parser.add_argument("--coefficients", type=json.loads, help="of given vectors, as JSON by behavior")
    for option in ("budget", "n_left_out"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=float if option == "budget" else int)
    for option in ("reference", "dtype", "tasks"):
        parser.add_argument(f"--{option}", default=getattr(Config, option))
    for option in ("coefficient", "temperature", "max_coefficient"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=float, default=getattr(Config, option))
    for option in ("n_train", "n_dev", "n_prompts", "first", "layer", "max_new_tokens", "n_given", "given_tokens"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--kl-every", type=int, default=Config.kl_every)
    options = vars(parser.parse_args())
    out, figure = options.pop("json"), options.pop("figure")
    result = main(Config(**{**options, "chains": tuple(options["chains"])}))
    for behavior in (MEAN, *result.layers):
        print(table(result, behavior), end="\n\n")
    if out:
        lines = ",\n".join(json.dumps(flat(row)) for row in result.rows).replace("NaN", "null")
        about = json.dumps({**asdict(result), "rows": None})[:-1].replace('"rows": null', f'"rows": [\n{lines}\n]')
        out.write_text(about + "}\n", encoding="utf-8")
    if figure:
        position_ablation(result).write_image(figure, width=860)

"""One cache edit or a steered residual stream: which makes the organism think, at what KL, and how steadily?

Prompts request no thinking ("Just the answer."). Both methods are fitted on the same contrastive pairs (solved examples
with and without steps) at the same position, the assistant's header token. Conditions:

- cache: values of that slot are edited once (c_v chosen on dev tasks).
- residual, once: the mean difference of resid_post at that position is added there, at one layer.
- residual, throughout: the same vector is added at every generated position as well as there.

Residual coefficients match the cache edit's KL per token, as closely as the search gets (calibrated on dev prompts,
every layer); the layer is chosen on dev tasks. Controls: the offset token alone, random cache vectors of the same norm,
pairs whose sides are swapped in a random half, and a prompted baseline. Results are from test tasks. Persistence is
KL(steered ‖ unsteered) by token of the steered answers. Coefficient curves are on dev tasks.

Example: python analyses/cache_versus_residual.py --json cache-versus-residual.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import lensteer as ls
from lensteer import models
from lensteer.cache_steering import OFFSET, CachePlan, CacheVector, Pair, contrastive_pairs, fit_cache_vector, swapped
from lensteer.cache_steering.organism import ENDING, JOIN, make_records
from lensteer.calibration import calibrate_many, rollout_kl
from lensteer.evaluation import Condition, Modes, measure_modes
from lensteer.generation.jobs import Sampling
from lensteer.organism.grammar import MODE_CUES
from lensteer.positions import PositionScope
from lensteer.statistics import Ratio, bootstrap_interval
from lensteer.vectors import Direction

JUST_THE_ANSWER, ASK = MODE_CUES[False][1], MODE_CUES[True][0]
BINS = ((0, 1), (1, 2), (2, 5), (5, 20), (20, 60), (60, 400))
header = PositionScope("header", lambda c: c.position == c.prompt_length[:, None] - 2)


@dataclass(frozen=True)
class Config:
    """Model, pairs, coefficients to choose from, and sizes."""

    model: str | None = None
    n_pairs: int = 80
    shots: int = 2
    c_values: tuple[float, ...] = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 10.0)
    c_keys: tuple[float, ...] = (0.0, 0.25, 0.5, 1.0)
    some_pairs: tuple[int, ...] = (1, 5, 20)
    n_prompts: int = 10
    n_dev: int = 24
    n_test: int = 100
    n_controls: int = 20
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Chosen layers, modes on dev (coefficient curves) and test tasks, and KL by token (mean, low, high per bin)."""

    c_values: float
    budget: float
    residual: dict[str, tuple[int, float, float]]
    dev: Modes
    test: Modes
    persistence: dict[str, list[tuple[float, float, float]]]


def pairs_of(model, config: Config, n: int, shots: int) -> list[Pair]:
    """Contrastive pairs in the organism's format."""
    return contrastive_pairs(
        model, make_records(100, seed=config.seed), n=n, shots=shots, ending=ENDING, join=JOIN, seed=config.seed
    )


def keep(found: dict[int, torch.Tensor], layer: int):
    """A hook that keeps the header token's residual."""
    return lambda resid, hook: found.__setitem__(layer, resid[0, -2])


def residual_direction(model, pairs: list[Pair]) -> Direction:
    """Mean difference of resid_post at the header token, positive less negative, at every layer."""
    n = models.n_layers(model)
    total, norms = torch.zeros(n, models.d_model(model)), torch.zeros(n)
    for pair in pairs:
        for text, sign in ((pair.positive, 1.0), (pair.negative, -1.0)):
            ids = torch.tensor([models.encode(model, text)])
            found: dict[int, torch.Tensor] = {}
            with torch.no_grad(), model.hooks(fwd_hooks=[(models.resid_hook(i), keep(found, i)) for i in range(n)]):
                model(ids)
            stacked = torch.stack([found[layer] for layer in range(n)])
            total += sign * stacked / len(pairs)
            norms += stacked.norm(dim=1) / (2 * len(pairs))
    return Direction("steps", total, norms, tuple(range(n)))


def prompt_ids(model, tasks: list[ls.Task]) -> list[list[int]]:
    """The prompts of all conditions, as token ids."""
    return [
        models.encode(model, models.chat_text(model, f"{t.prompt} {JUST_THE_ANSWER}", thinking=False)) for t in tasks
    ]


def persistence(model, prompts: list[list[int]], plan, seed: int) -> list[tuple[float, float, float]]:
    """Mean KL per token within each bin of token numbers, with an interval over prompts."""
    (found,) = rollout_kl(model, prompts, [plan], seed=seed)
    rows = []
    for begin, end in BINS:
        parts = [row[begin:end] for row in found.tokens if len(row) > begin]
        if len(parts) < 2:
            rows.append((float("nan"),) * 3)
            continue
        sums, counts = (np.array([f(part) for part in parts], dtype=float) for f in (lambda p: float(p.sum()), len))
        interval = bootstrap_interval(Ratio(sums, counts), seed=seed)
        rows.append((interval.value, interval.low, interval.high))
    return rows


def trial_conditions(model, vector: CacheVector, config: Config) -> list[Condition]:
    """Coefficients, numbers of pairs, and shots, on dev tasks."""
    conditions = [Condition("unsteered", None, JUST_THE_ANSWER, kind="unsteered")]
    conditions += [Condition(f"c_v={c:g}", CachePlan(vector, c), JUST_THE_ANSWER) for c in config.c_values]
    conditions += [
        Condition(f"c_v=1 c_k={c:g}", CachePlan(vector, 1.0, c), JUST_THE_ANSWER) for c in config.c_keys if c
    ]
    for n, shots in [(n, config.shots) for n in config.some_pairs] + [(config.n_pairs, s) for s in (1, 3)]:
        other = fit_cache_vector(model, pairs_of(model, config, n, shots))
        conditions.append(Condition(f"c_v=1, {n} pairs, {shots} shots", CachePlan(other, 1.0), JUST_THE_ANSWER))
    return conditions


def main(config: Config) -> Result:
    """Fit, choose on dev tasks, measure on test tasks."""
    model = ls.load_model(config.model)
    pairs = pairs_of(model, config, config.n_pairs, config.shots)
    vector = fit_cache_vector(model, pairs)
    sampling = Sampling(1, 1.0, config.seed, 400, 200, thinking=False)
    tasks = ls.load_tasks(split="dev", n=config.n_dev)
    prompts = prompt_ids(model, tasks[: config.n_prompts])
    dev = measure_modes(
        model, tasks, trial_conditions(model, vector, config), sampling, progress=True, annotator=ls.grammar
    )
    best = max(config.c_values, key=lambda c: (dev[f"c_v={c:g}"].accuracy.value, -c))
    cache = CachePlan(vector, best)
    budget = rollout_kl(model, prompts, [cache], seed=config.seed)[0].statistic(None)
    direction = residual_direction(model, pairs)
    scopes = {"residual, once": header, "residual, throughout": header | ls.generated}
    sites = [(name, layer) for name in scopes for layer in range(models.n_layers(model) - 1)]
    calibrated = calibrate_many(
        model,
        prompts,
        [ls.SteeringPlan(direction, layer, 1.0, scopes[name], unit="mean_norm") for name, layer in sites],
        budget=budget,
        quantile=None,
        seed=config.seed,
        progress=True,
    )
    plans = {layers: (c.plan, c.kl) for layers, c in zip(sites, calibrated, strict=True)}
    tried = measure_modes(
        model,
        tasks,
        [Condition(f"{n}/{i}", plan, JUST_THE_ANSWER) for (n, i), (plan, _) in plans.items()],
        sampling,
        progress=True,
        annotator=ls.grammar,
    )
    chosen = {}
    for name in scopes:
        layer = max(
            (i for n, i in sites if n == name),
            key=lambda i: (tried[f"{name}/{i}"].accuracy.value, tried[f"{name}/{i}"].thinks.value),
        )
        chosen[name] = (layer, *plans[name, layer])
    conditions = [
        Condition("unsteered", None, JUST_THE_ANSWER, kind="unsteered"),
        Condition("cache", cache, JUST_THE_ANSWER),
        *(Condition(name, plan, JUST_THE_ANSWER) for name, (_, plan, _) in chosen.items()),
        Condition("prompted baseline", None, ASK, kind="prompted"),
        Condition("offset token alone", None, JUST_THE_ANSWER, OFFSET),
        Condition(
            "swapped sides",
            CachePlan(fit_cache_vector(model, swapped(pairs, seed=config.seed)), best),
            JUST_THE_ANSWER,
        ),
        *(
            Condition(f"random-{i}", CachePlan(vector.random(i), best), JUST_THE_ANSWER, kind="control")
            for i in range(config.n_controls)
        ),
    ]
    test = measure_modes(
        model, ls.load_tasks(split="test", n=config.n_test), conditions, sampling, progress=True, annotator=ls.grammar
    )
    spent = {name: plan for name, (_, plan, _) in chosen.items()} | {"cache": cache}
    held_out = prompt_ids(model, ls.load_tasks(split="test", n=2 * config.n_prompts))
    return Result(
        best,
        budget,
        {name: (layer, plan.coefficient, kl) for name, (layer, plan, kl) in chosen.items()},
        dev,
        test,
        {name: persistence(model, held_out, plan, config.seed) for name, plan in spent.items()},
    )


def table(result: Result) -> str:
    """The test conditions, the coefficient curves, and the KL by token."""

    def line(condition) -> str:
        figures = [condition.thinks, condition.accuracy, condition.parsed, condition.length]
        return " | ".join([condition.condition, *(f"{e:.2f}" for e in figures)])

    lines = [f"c_v = {result.c_values:g}, {result.budget:.3f} nats per token; residual {result.residual}"]
    lines += ["test: condition | thinks | right | parsed | tokens", *map(line, result.test.conditions)]
    lines += ["dev: condition | thinks | right | parsed | tokens", *map(line, result.dev.conditions)]
    lines += [f"KL by token | {' | '.join(f'{a}-{b}' for a, b in BINS)}"]
    for name, rows in result.persistence.items():
        lines.append(" | ".join([name, *(f"{m:.3f} [{low:.3f}, {high:.3f}]" for m, low, high in rows)]))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    for name in ("n_pairs", "shots", "n_prompts", "n_dev", "n_test", "n_controls", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Config(), name))
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    result = main(Config(**given))
    print(table(result))
    if out:
        out.write_text(json.dumps(asdict(result), indent=1))

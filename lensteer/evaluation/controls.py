"""Control vectors of an evaluation: their conditions, and the rank of an effect among them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensteer.calibration import calibrate_many, rollout_kl
from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Condition
from lensteer.evaluation.results import ControlRank
from lensteer.files import read_json, write_json
from lensteer.positions import PositionScope
from lensteer.results import reading, revived
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task
from lensteer.vectors import BehaviorVectors, Direction
from lensteer.vectors.constructions import isotropic

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Random directions; random vectors with the covariance of the spans' activations; the recipe on shuffled labels.
POOLS = ("isotropic", "covariance_matched", "shuffled")
#: The same directions, each with the coefficient at which it spends as much KL per token as the strongest edit.
KL_POOLS = tuple(f"{pool}_kl" for pool in POOLS)
#: Prompts and tokens per rollout that KLs are matched on.
KL_PROMPTS, KL_TOKENS = 8, 60
#: Minimum number of controls for a p-value.
ENOUGH = 99


def control_conditions(
    vectors: BehaviorVectors,
    own: Sequence[Condition],
    *,
    pools: Sequence[str],
    n: int,
    samples: int,
    scope: PositionScope,
    seed: int = 0,
) -> list[Condition]:
    """A condition for each control vector, at every steered layer, as long as the longest edit there.

    Those of `KL_POOLS` get their coefficient from `match_kl`. A pool of shuffled labels cycles through the behaviors,
    so that one pool serves all of them.

    Args:
        vectors: with controls, for pools other than "isotropic".
        own: the conditions that steer along the behaviors' vectors.
        pools: of `POOLS` and `KL_POOLS`.
        n: vectors per pool and layer.
        samples: chains per task.
        scope: positions to steer.
        seed: of the isotropic pool.

    Raises:
        LensteerError: an unknown pool, a negative number, fewer controls than requested, or a condition that does not
            add one vector at every position, so that no control is as long.
    """
    if n < 0:
        raise LensteerError(f"n_controls={n}: give the number of control vectors per pool, 0 for none")
    behaviors = list(dict.fromkeys(condition.behavior for condition in own if condition.behavior in vectors.labels))
    longest: dict[int, float] = {}
    for condition in own:
        if condition.kind in ("down", "up") and condition.plan is not None:
            (edit,) = condition.plan.edits
            if not edit.constant:
                raise LensteerError(
                    f"condition {condition.name!r} does not add one vector (operator {edit.operator!r}, gate "
                    f"{edit.gate}, schedule {edit.schedule}), and controls are as long as what is added: give n=0"
                )
            longest[edit.layer] = max(longest.get(edit.layer, 0.0), edit.length)
    conditions = []
    for layer, length in sorted(longest.items()):
        for pool in pools if n else ():
            for direction in random_directions(vectors, layer, n, pool=pool, behaviors=behaviors, seed=seed):
                plan = SteeringPlan(direction, layer, length, scope, unit="unit")
                name = f"L{layer}/{direction.label}{' at equal KL' if pool in KL_POOLS else ''}"
                conditions.append(Condition(name, plan, kind="control", pool=pool, n_samples=samples))
    return conditions


def match_kl(
    model: TransformerBridge,
    tasks: Sequence[Task],
    own: Sequence[Condition],
    controls: Sequence[Condition],
    *,
    system: str = "",
    path: Path | None = None,
    seed: int = 0,
    progress: bool = False,
) -> list[Condition]:
    """The controls, those of `KL_POOLS` with coefficients that spend the KL of the strongest edit at their layer.

    KL is KL(steered ‖ unsteered) per token of a plan's own rollouts, a mean over `KL_TOKENS` tokens on `KL_PROMPTS`
    tasks. A control that does not reach it keeps the nearest coefficient that was measured.

    Args:
        model: the bridge.
        tasks: those of the evaluation.
        own: the conditions that steer along the behaviors' vectors.
        controls: from `control_conditions`.
        system: the system prompt.
        path: JSON file that keeps the coefficients, so that a resumed evaluation has the same controls.
        seed: of the rollouts.
        progress: show a bar.
    """
    chosen = [c for c in controls if c.pool in KL_POOLS]
    known: dict[str, float] = {}
    if path is not None and path.exists():
        with reading(path):
            known = revived(dict[str, float], read_json(path))
    if set(known) != {c.name for c in chosen}:
        options: dict[str, Any] = dict(max_new_tokens=KL_TOKENS, system=system, seed=seed)
        for layer in dict.fromkeys(c.layer for c in chosen):
            plans = [c.plan for c in own if c.plan is not None and c.layer == layer and c.kind in ("down", "up")]
            spent = rollout_kl(model, tasks[:KL_PROMPTS], plans, **options)
            budget = max(each.statistic(None) for each in spent)
            there = [c for c in chosen if c.layer == layer]
            edits = [edit for c in there if c.plan is not None for edit in c.plan.edits]
            search: dict[str, Any] = dict(max_coefficient=64 * max(edit.length for edit in edits), progress=progress)
            found = calibrate_many(model, tasks[:KL_PROMPTS], edits, budget=budget, quantile=None, **search, **options)
            known |= {c.name: each.coefficient for c, each in zip(there, found, strict=True)}
        if path is not None and chosen:
            write_json(path, known)
    return [
        replace(c, plan=replace(c.plan, coefficient=known[c.name]))
        if c.name in known and isinstance(c.plan, SteeringPlan)
        else c
        for c in controls
    ]


def random_directions(
    vectors: BehaviorVectors,
    layer: int,
    n: int,
    *,
    pool: str = "isotropic",
    behaviors: Sequence[str] = (),
    seed: int = 0,
) -> list[Direction]:
    """Control directions at one layer.

    Args:
        vectors: with controls, for pools other than "isotropic".
        layer: of the vectors.
        n: number of directions.
        pool: of `POOLS`; one of `KL_POOLS` has the directions of the pool that it is named after.
        behaviors: that shuffled labels cycle through; all by default.
        seed: of the isotropic pool.

    Raises:
        LensteerError: an unknown pool, a negative number of them, more than were fitted, or a layer that the vectors
            lack.
    """
    if pool not in (*POOLS, *KL_POOLS):
        raise LensteerError(f"no pool {pool!r} of control vectors: choose from {[*POOLS, *KL_POOLS]}")
    pool = pool.removesuffix("_kl")
    if n < 0 or layer not in vectors.layers:
        raise LensteerError(f"{n} random vectors at layer {layer}: give a number from 0, and one of {vectors.layers}")
    row = vectors.layers.index(layer)
    if pool == "isotropic":
        draws = isotropic(n, len(vectors.layers), vectors.raw.shape[-1], seed=seed).to(vectors.raw)
    else:
        there = 0 if vectors.controls is None else len(getattr(vectors.controls, pool))
        if vectors.controls is None or there < n:
            raise LensteerError(f"{n} {pool} vectors, but {there} were fitted: fit the vectors with n_controls={n}")
        draws = getattr(vectors.controls, pool)[:n]
        if pool == "shuffled":
            turn = [vectors.labels.index(b) for b in vectors.labels if b in (behaviors or vectors.labels)]
            draws = draws[range(n), [turn[i % len(turn)] for i in range(n)]]
    name = "random" if pool == "isotropic" else pool
    norm = vectors.mean_norm[row : row + 1]
    return [Direction(f"{name}-{i}", draw[row : row + 1], norm, (layer,)) for i, draw in enumerate(draws)]


def ranked(
    share: Callable[[str, str], float],
    controls: Sequence[Condition],
    condition: Condition,
    own: Sequence[Condition],
    base: str,
) -> tuple[tuple[ControlRank, ...], list[float], float]:
    """A condition's rank in each pool; all controls' changes; and the p-value of its change among them.

    Args:
        share: of a condition (by name) and a behavior.
        controls: at the condition's layer.
        condition: one that steers along a behavior's vector.
        own: all such conditions, for the largest z over behaviors and signs.
        base: name of the unsteered condition.
    """

    def sign(a: Condition) -> int:
        return -1 if a.kind == "down" else 1

    def change(name: str, behavior: str) -> float:
        return share(name, behavior) - share(base, behavior)

    own_change, found = change(condition.name, condition.behavior), []
    for pool in dict.fromkeys(c.pool for c in controls):
        members = [c for c in controls if c.pool == pool]
        values = np.array([change(c.name, condition.behavior) for c in members])
        z, mean, sd = _z(sign(condition) * own_change, sign(condition) * values)
        p_max = None
        if len(members) >= ENOUGH:
            largest = np.full(len(members), -np.inf)
            for a in own:
                each = sign(a) * np.array([change(c.name, a.behavior) for c in members])
                spread = each.std(ddof=1)
                largest = np.maximum(largest, (each - each.mean()) / spread if spread > 0 else 0.0)
            p_max = float((1 + (largest >= z).sum()) / (1 + len(members)))
        lengths = [abs(c.plan.edits[0].coefficient) for c in members if c.plan is not None]
        found.append(
            ControlRank(
                pool=pool,
                n=len(members),
                length=float(np.median(lengths)),
                low=float(values.min()),
                high=float(values.max()),
                mean=sign(condition) * mean,
                sd=sd,
                z=z,
                rank=1 + _as_far(values, own_change, sign(condition)),
                p_max=p_max,
            )
        )
    null = [change(c.name, condition.behavior) for c in controls]
    exceed = _as_far(np.array(null), own_change, sign(condition)) if null else 0
    return tuple(found), null, (1 + exceed) / (1 + len(null))


def _as_far(values: np.ndarray, own: float, sign: int) -> int:
    """Number of values that go at least as far. NaN counts: a control without sentences counts against the effect."""
    return int(sum(not sign * value < sign * own for value in values))


def _z(own: float, values: np.ndarray) -> tuple[float, float, float]:
    mean = float(values.mean())
    sd = float(values.std(ddof=1)) if len(values) > 1 else math.nan
    return (own - mean) / sd if sd > 0 else math.nan, mean, sd

"""Finds the coefficient that matches a target KL: a guess, then a search on rollouts, all plans in lockstep."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from lensteer import models
from lensteer.arguments import checked
from lensteer.attribution import LayerScores
from lensteer.calibration.rollouts import RolloutKL, rollout_kl
from lensteer.errors import LensteerError
from lensteer.positions import PositionScope, onsets
from lensteer.progress import progress_bar
from lensteer.statistics import Estimate
from lensteer.steering import Steerable, SteeringPlan
from lensteer.steering.operators import IN_UNITS
from lensteer.steering.plans import check_unit
from lensteer.tasks import Task

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Step:
    """One measured coefficient: the statistic that the budget is on, and quantiles of the tokens' KLs, in nats."""

    coefficient: float
    kl: float
    mean: float
    p50: float
    p95: float
    n_tokens: int


@dataclass(frozen=True)
class Calibration:
    """A plan whose coefficient matches a target KL.

    Attributes:
        plan: ready to steer with.
        budget: in nats per token.
        quantile: of the tokens' KLs that the budget is on; None for their mean.
        tolerance: how far the measured KL may be from the budget, as a share of it.
        reached: whether it is within the tolerance. If not, the plan is the nearest that was measured.
        step: the measurement at the plan's coefficient.
        estimate: the statistic that the budget is on, with its 95 % interval over prompts (NaN for a single prompt).
        path: all measurements, in the order of the search.
        n_prompts: prompts rolled out at each step.
        cost: of the whole call, which other plans may have shared: "rounds", "forwards" (decoding steps and
            teacher-forced passes), tokens "generated" and "forced", "seconds".
    """

    plan: SteeringPlan
    budget: float
    quantile: float | None
    tolerance: float
    reached: bool
    step: Step
    estimate: Estimate
    path: tuple[Step, ...]
    n_prompts: int
    cost: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def coefficient(self) -> float:
        """Of the plan, with its sign and in its unit."""
        return self.plan.coefficient

    @property
    def kl(self) -> float:
        """The statistic that the budget is on, as measured at the coefficient."""
        return self.step.kl

    def to_dataframe(self) -> Any:
        """A row per measured coefficient, in the order of the search; `chosen` marks the result."""
        import pandas as pd

        plan = self.plan
        fixed = dict(direction=plan.direction.label, layer=plan.layer, coefficient_unit=plan.unit, budget=self.budget)
        rows = [{**fixed, **vars(step), "chosen": step is self.step, "reached": self.reached} for step in self.path]
        return pd.DataFrame(rows)


#: Largest factor by which a step may leave the measured range.
STRIDE = 8.0
#: A bracket whose ends differ by less than this factor is not searched further: `y` jumps across the target there.
NARROW = 1.01
#: The slope of log y over log x is 2 for a KL at small coefficients; a fitted one is kept between these.
SLOPE, FLATTEST, STEEPEST = 2.0, 1.0, 4.0


@dataclass
class Search:
    """Searches for `x` with `y(x) = target` on the logarithms of both: first for a bracket, then inside it.

    `y` need not be monotone. The bracket is always below the *smallest* `x` that was over the target, so of several
    crossings the lowest coefficient is found, and it always shrinks.

    Attributes:
        target: positive.
        tolerance: largest accepted |y / target − 1|.
        start: the first `x`.
        ceiling: the largest `x` to try.
        steps: the measurements.
    """

    target: float
    tolerance: float
    start: float
    ceiling: float
    steps: list[tuple[float, float]] = field(default_factory=list)

    def reached(self) -> bool:
        """Whether the best step is within the tolerance."""
        return bool(self.steps) and abs(self.steps[self.best()][1] / self.target - 1) <= self.tolerance

    def best(self) -> int:
        """The index of the step whose `y` is nearest to the target, by ratio."""

        def miss(step: int) -> tuple[float, float]:
            x, y = self.steps[step]
            return (abs(math.log(y / self.target)), x) if y > 0 else (math.inf, -x)

        return min(range(len(self.steps)), key=miss)

    def next(self) -> float | None:
        """The next `x` to measure; None if the target is met, jumped across, or out of reach below the ceiling."""
        if self.reached():
            return None
        if not self.steps:
            return min(self.start, self.ceiling)
        over = sorted(step for step in self.steps if step[1] > self.target)
        under = sorted(step for step in self.steps if step[1] <= self.target and (not over or step[0] < over[0][0]))
        if over and under and over[0][0] < NARROW * under[-1][0]:
            return None
        if over and under:
            return self._inside(under[-1], over[0])
        if over:
            return self._beyond(over[0], over[1:2])
        if under[-1][0] >= self.ceiling:
            return None
        return min(self._beyond(under[-1], under[-2:-1]), self.ceiling)

    def _inside(self, low: tuple[float, float], high: tuple[float, float]) -> float:
        """Interpolation, alternating with the middle: every two steps at least halve the bracket."""
        share = 0.5
        if low[1] > 0 and len(self.steps) % 2 == 0:
            share = math.log(self.target / low[1]) / math.log(high[1] / low[1])
        return low[0] * (high[0] / low[0]) ** min(max(share, 0.1), 0.9)

    def _beyond(self, nearest: tuple[float, float], other: list[tuple[float, float]]) -> float:
        """Extrapolation from the step nearest to the target, with the slope to the next nearest."""
        x, y = nearest
        if y <= 0:
            return x * STRIDE
        slope = SLOPE
        if other and other[0][1] > 0:
            slope = math.log(other[0][1] / y) / math.log(other[0][0] / x)
        factor = (self.target / y) ** (1 / min(max(slope, FLATTEST), STEEPEST))
        return x * min(max(factor, 1 / STRIDE), STRIDE)


#: Default start of a search, in multiples of the direction itself (of removing it, for "project_out").
START = 1.0
#: The same of "rotate", in degrees.
START_DEGREES = 5.0
#: Methods whose scores are a KL in nats, or its second order.
KL_METHODS = ("exact", "fisher", "fisher_jvp")


@checked()
def calibrate(
    model: TransformerBridge,
    prompts: Sequence[Task] | Sequence[Sequence[int]],
    direction: Steerable,
    layer: int,
    *,
    budget: float,
    sign: int = 1,
    scope: PositionScope = onsets,
    operator: str = "add",
    unit: str = "difference",
    start: float | LayerScores | None = None,
    quantile: float | None = 0.95,
    tolerance: float = 0.1,
    max_rounds: int = 8,
    max_coefficient: float = 32.0,
    max_new_tokens: int = 200,
    system: str = "",
    seed: int = 0,
    batch_size: int = 256,
    memory: int = 2**30,
) -> Calibration:
    """The coefficient at which steering along one direction at one layer matches a target KL.

    Args:
        model: the bridge.
        prompts: dev tasks, or token ids.
        direction: such as `vectors["backtracking"]`.
        layer: whose output is edited.
        budget: in nats per token.
        sign: 1 adds the direction, -1 subtracts it.
        scope: positions to steer.
        operator: see `SteeringPlan`.
        unit: of the coefficients, see `SteeringPlan`; those of "rotate" are degrees.
        start: the first coefficient to try, without its sign; or scores that predict the KL, see
            `starting_coefficient`. By default the one that adds the direction itself, in any unit.
        quantile: as for `calibrate_many`, like the remaining arguments and errors.
        tolerance: as a share of the budget.
        max_rounds: limit on the search.
        max_coefficient: limit on the coefficient, in `unit`.
        max_new_tokens: per rollout.
        system: the system prompt of tasks.
        seed: for the sampling.
        batch_size: rollouts that run together.
        memory: bytes of a teacher-forced pass, roughly.

    Raises:
        LensteerError: a sign other than 1 and -1, a start that is not positive, an unknown unit, or scores that do not
            apply to this plan.
    """
    if sign not in (1, -1):
        raise LensteerError(f"sign={sign}: give 1 to add the direction or -1 to subtract it")
    _check_budget(budget)
    if isinstance(start, LayerScores):
        if operator != "add":
            raise LensteerError(f"scores are of adding a vector, not of {operator!r}: give a number to start from")
        start = starting_coefficient(start, direction.label, layer, budget, unit)
    if start is not None and not 0 < start < math.inf:
        raise LensteerError(f"start={start}: give a positive, finite coefficient; its sign is `sign`")
    plan = SteeringPlan(direction, layer, 1.0, scope, operator, unit)
    if start is None:
        own = float(direction.at(layer).norm() / plan.vector.norm()) if operator in IN_UNITS else 1.0
        start = START_DEGREES if operator == "rotate" else START * own
    plan = replace(plan, coefficient=sign * start)
    (found,) = calibrate_many(
        model,
        prompts,
        [plan],
        budget=budget,
        quantile=quantile,
        tolerance=tolerance,
        max_rounds=max_rounds,
        max_coefficient=max_coefficient,
        max_new_tokens=max_new_tokens,
        system=system,
        seed=seed,
        batch_size=batch_size,
        memory=memory,
    )
    return found


@checked()
def calibrate_many(
    model: TransformerBridge,
    prompts: Sequence[Task] | Sequence[Sequence[int]],
    plans: Sequence[SteeringPlan],
    *,
    budget: float,
    quantile: float | None = 0.95,
    tolerance: float = 0.1,
    max_rounds: int = 8,
    max_coefficient: float = 32.0,
    max_new_tokens: int = 200,
    system: str = "",
    seed: int = 0,
    batch_size: int = 256,
    memory: int = 2**30,
    progress: bool = False,
) -> list[Calibration]:
    """Calibrate many plans to one budget: each round rolls out all unfinished plans, in shared batches.

    The measure is KL(p_steered ‖ p_unsteered) per token of the steered model's own rollouts, see `rollouts`. It covers
    all generated tokens, edited or not: if a scope edits less than 1 − quantile of them, the quantile is over tokens
    that are affected only through attention. The seed is the same in every round, so that the measured KL is one
    function of the coefficient; another seed gives another, within `low` to `high`.

    A clamp's coefficient is a target, so that its KL does not fall to 0 with it: a budget below the KL of removing the
    direction is not reached.

    Args:
        model: the bridge.
        prompts: dev tasks with distinct ids, or token ids.
        plans: to calibrate. A coefficient's sign is kept, and its absolute value starts the search.
        budget: in nats per token.
        quantile: of the tokens' KLs that the budget is on, in (0, 1); None for their mean.
        tolerance: largest accepted |KL / budget − 1|. A tenth of a KL is a twentieth of a coefficient.
        max_rounds: of the search; when they are spent, the nearest measured coefficient is the result.
        max_coefficient: the largest absolute value to try.
        max_new_tokens: per rollout.
        system: the system prompt of tasks.
        seed: for the sampling; a prompt has the same random numbers under every plan and at every coefficient.
        batch_size: rollouts that run together.
        memory: bytes that a teacher-forced pass may take, roughly.
        progress: show a bar over rounds.

    Returns:
        One for each plan, in their order.

    Raises:
        LensteerError: an impossible budget or number, a plan without a sign, no prompts or an empty one, a layer that
            the model lacks, or a coefficient so large that logits are not finite.
    """
    _check_budget(budget)
    for name, value in (("quantile", quantile), ("tolerance", tolerance)):
        if value is not None and not 0 < value < 1:
            raise LensteerError(f"{name}={value}: give a number between 0 and 1")
    if max_rounds < 1 or not 0 < max_coefficient < math.inf:
        raise LensteerError(
            f"max_rounds={max_rounds}, max_coefficient={max_coefficient}: give positive, finite numbers"
        )
    for plan in plans:
        models.check_layer(model, plan.layer)
        if not plan.coefficient:
            raise LensteerError(
                f"the plan for {plan.direction.label!r} at layer {plan.layer} has coefficient 0: give one with the "
                "sign to steer with, about as large as expected"
            )
    began, cost = time.perf_counter(), Counter[str]()
    searches = [Search(budget, tolerance, abs(plan.coefficient), max_coefficient) for plan in plans]
    paths: list[list[Step]] = [[] for _ in plans]
    best: dict[int, RolloutKL] = {}
    for _ in progress_bar(range(max_rounds), desc="calibrate", unit="round", show=progress):
        wanted = {i: x for i, search in enumerate(searches) if (x := search.next()) is not None}
        if not wanted:
            break
        tried = [replace(plans[i], coefficient=math.copysign(x, plans[i].coefficient)) for i, x in wanted.items()]
        measured = rollout_kl(
            model,
            prompts,
            tried,
            max_new_tokens=max_new_tokens,
            system=system,
            seed=seed,
            batch_size=batch_size,
            memory=memory,
            cost=cost,
        )
        cost["rounds"] += 1
        for (i, x), plan, kl in zip(wanted.items(), tried, measured, strict=True):
            paths[i].append(_step(plan.coefficient, kl, quantile))
            searches[i].steps.append((x, paths[i][-1].kl))
            if searches[i].best() == len(paths[i]) - 1:
                best[i] = kl
    spent: dict[str, int | float] = {**cost, "seconds": time.perf_counter() - began}
    found = []
    for i, (plan, search, path) in enumerate(zip(plans, searches, paths, strict=True)):
        step = path[search.best()]
        found.append(
            Calibration(
                plan=replace(plan, coefficient=step.coefficient),
                budget=budget,
                quantile=quantile,
                tolerance=tolerance,
                reached=search.reached(),
                step=step,
                estimate=best[i].estimate(quantile, seed=seed),
                path=tuple(path),
                n_prompts=len(prompts),
                cost=spent,
            )
        )
    return found


def _step(coefficient: float, kl: RolloutKL, quantile: float | None) -> Step:
    n_tokens = sum(map(len, kl.tokens))
    return Step(
        coefficient, kl.statistic(quantile), kl.statistic(None), kl.statistic(0.5), kl.statistic(0.95), n_tokens
    )


def starting_coefficient(scores: LayerScores, label: str, layer: int, budget: float, unit: str = "difference") -> float:
    """The coefficient at which a layer's score predicts a KL: α₀ = c·√(budget / K), K the score at coefficient c.

    For K = ½c²·Var this is √(2·budget / Var). K is the mean over single, edited positions, so α₀ is a guess for a
    budget on the mean KL of edited tokens. The quantile over all generated tokens is larger or smaller by a factor that
    only a rollout can measure; the search corrects for it after its first step.

    Args:
        scores: of a method in nats, in the same `unit` (what steering adds) and window "onset" (what one
            edited position does to its own next token).
        label: the behavior.
        layer: of the model.
        budget: in nats.
        unit: of the coefficient.

    Raises:
        LensteerError: an unknown unit, scores that are not a KL or not of what steering adds, that lack the behavior or
            layer, or that have no positive value there.
    """
    _check_budget(budget)
    if (scores.coefficient_unit, scores.window) != (check_unit(unit), "onset") or scores.method not in KL_METHODS:
        raise LensteerError(
            f"scores of method {scores.method!r}, unit {scores.coefficient_unit!r} and window {scores.window!r} imply "
            f"no coefficient: give those of one of {list(KL_METHODS)}, {unit!r} and 'onset', or a number to start from"
        )
    if layer not in scores.layers:
        raise LensteerError(f"no score at layer {layer}: these have layers {list(scores.layers)}")
    kl = float(scores.mean[scores.row(label), scores.layers.index(layer)])
    if not kl > 0:
        raise LensteerError(f"the score of {label!r} at layer {layer} is {kl}: give a number to start from")
    return abs(scores.coefficient) * math.sqrt(budget / kl)


def _check_budget(budget: float) -> None:
    if not 0 < budget < math.inf:
        raise LensteerError(f"budget {budget}: give a positive, finite KL in nats, such as 0.1")

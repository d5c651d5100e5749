"""Results of an evaluation: effects by behavior, side effects by condition, and changes by control vectors.

`PositionAblation` compares the same steering at different positions (`analyses/position_ablation.py`).
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import pandas as pd

from lensteer._version import __version__
from lensteer.errors import LensteerError
from lensteer.evaluation.clean_chains import CleanChains
from lensteer.evaluation.margins import TextCheck
from lensteer.evaluation.side_effects import SideEffect
from lensteer.expressions import parse_scope
from lensteer.results import Saved
from lensteer.statistics import Estimate, flat
from lensteer.steering import ControlRange, Evidence, SteeringPlan, TextMeasure
from lensteer.steering.plans import check_unit
from lensteer.vectors import BehaviorVectors

#: A fall is tested only if the unsteered condition has at least this many of the behavior's sentences, on this many
#: tasks.
MIN_EVENTS, MIN_EVENT_TASKS = 12, 10
#: Level of the tests, after Holm's correction over all behaviors and both signs.
LEVEL = 0.05

#: Verdicts on one behavior pushed down or up.
SHOWN, NOT_SHOWN, TOO_RARE = "shown", "not shown", "base rate too low"
WRONG_WAY, AS_RANDOM, BROKEN, NO_COEFFICIENT = (
    "moves the other way",
    "moves as random vectors do",
    "text breaks",
    "no coefficient",
)


@dataclass(frozen=True)
class ControlRank:
    """Rank of one effect among the control vectors of one pool, at the same layer.

    Attributes:
        pool: "isotropic", "covariance_matched" or "shuffled"; with "_kl" at its end, at the KL of the edit instead of
            its length.
        n: control vectors.
        length: of the added control vectors; the steered conditions at the layer add vectors of at most this length.
            The median, for controls of equal KL.
        low: their smallest change of the behavior's share.
        high: their largest.
        mean: of their changes.
        sd: standard deviation of their changes, sampling noise included.
        z: (change - mean) / sd, positive in the intended direction.
        rank: 1 if none of them goes as far in the intended direction, 2 if one does, and so on.
        p_max: share of controls (and the vector itself) whose largest z over all behaviors and signs reaches this z;
            None for fewer than 99 controls.
    """

    pool: str
    n: int
    length: float
    low: float
    high: float
    mean: float
    sd: float
    z: float
    rank: int
    p_max: float | None


@dataclass(frozen=True)
class Effect:
    """One condition's share of one behavior, and its change from the unsteered condition, both with 95 % intervals.

    Attributes:
        behavior: whose share.
        kind: "down", "up" (the behavior's own vector), "prompted" (the prompted baseline) or "forced" (chains that
            begin with given words).
        layer: steered (-1 for the baselines).
        coefficient: signed; 0 for the baselines.
        length: of the added vector.
        unit: of the share, "sentences" or "tokens"; or "score": the mean of a measure over chains.
        annotator: by name; "" is the first.
        share: in this condition.
        base: the unsteered share.
        events: sentences of the behavior in this condition.
        base_events: in the unsteered condition.
        base_event_tasks: tasks of the unsteered condition with at least one.
        change: share - base, paired by task.
        p: two-sided sign-flip test over tasks.
        p_holm: p after Holm's correction over all tests; NaN for an effect that is not tested.
        controls: its rank in each pool.
        control_low: smallest change of the same share by a control vector; `control_high`: the largest; 0 without
            controls.
        p_value: (1 + controls that change it at least as far in the intended direction) / (1 + controls).
        wrong_way: share of tasks that move against the intended direction.
        text: whether the condition's text is no worse than unsteered.
        size: mean over tasks of the change of the task's share, over its standard deviation (Cohen's d_z).
    """

    behavior: str
    kind: str
    layer: int
    coefficient: float
    length: float
    unit: str
    annotator: str
    share: Estimate
    base: Estimate
    events: int
    base_events: int
    base_event_tasks: int
    change: Estimate
    p: float
    p_holm: float
    controls: tuple[ControlRank, ...]
    control_low: float
    control_high: float
    p_value: float
    wrong_way: float
    text: bool | None
    size: float = math.nan

    @property
    def measurable(self) -> bool:
        """Whether the unsteered condition has enough of the behavior to test a fall; a rise can always be tested."""
        enough = self.base_events >= MIN_EVENTS and self.base_event_tasks >= MIN_EVENT_TASKS
        return self.kind != "down" or self.unit == "score" or enough

    @property
    def verdict(self) -> str:
        """As text. "shown": significant after correction, as intended, beyond every control, in readable text."""
        if not self.measurable:
            return TOO_RARE
        if not self.p_holm < LEVEL:  # NaN, too
            return NOT_SHOWN
        if not self.change.value * (-1 if self.kind == "down" else 1) > 0:
            return WRONG_WAY
        if self.text is False:
            return BROKEN
        return SHOWN if all(pool.rank == 1 for pool in self.controls) else AS_RANDOM

    @property
    def shown(self) -> bool:
        """Whether the verdict is "shown"."""
        return self.verdict == SHOWN


@dataclass(frozen=True)
class ConditionSummary:
    """Measurements of a condition's chains, for any behavior. Means over chains; `accuracy` with its 95 % interval.

    Attributes:
        condition: its name.
        kind: of the condition; see `Condition`.
        behavior: that was steered or prompted for; "" for none.
        pool: of the control vector; "" for none.
        layer: steered; -1 for a condition without a residual edit.
        chains: number of chains.
        accuracy: share of right answers among those that can be graded.
        parsed: share that ended, closed their thinking and could be read in every sentence.
        finished: share that ended by themselves.
        length: tokens.
        sentences: per chain.
        sentence_length: tokens per sentence.
        repetition: share of 4-grams that occurred earlier in the text.
        compression: length of the text after compression, as a share.
        nll: nats per token under the unsteered model; None if not measured.
        kl: nats per token between the steered and the unsteered model along the text.
        text: comparison of the text with the unsteered condition's; None for that condition.
        clean: what the plan does to unsteered chains; None where it was not measured.
        coherence: mean of the judge's scores of the text, from 0 to 100; None if not measured.
    """

    condition: str
    kind: str
    behavior: str
    pool: str
    layer: int
    chains: int
    accuracy: Estimate
    parsed: float
    finished: float
    length: float
    sentences: float
    sentence_length: float
    repetition: float
    compression: float
    nll: float | None
    kl: float | None
    text: TextCheck | None = None
    clean: CleanChains | None = None
    coherence: float | None = None


@dataclass(frozen=True)
class Evaluation(Saved):
    """Effects and side effects of steering on held-out tasks.

    Attributes:
        effects: a row per behavior, kind, unit and annotator.
        conditions: a row per condition.
        n_tasks: held out.
        n_samples: chains per task and steered condition.
        n_controls: control vectors per pool and layer.
        control_samples: chains per task and control vector.
        scope: positions that were steered.
        coefficient_unit: what coefficient 1 means.
        annotators: their names, the first one first.
        without_coefficient: (behavior, kind) without a readable coefficient, which were not run.
        side_effects: of every condition but control vectors, on everything that it is not meant to change.

    Raises:
        LensteerError: an unknown unit of coefficients, or no annotator.
    """

    effects: tuple[Effect, ...]
    conditions: tuple[ConditionSummary, ...]
    n_tasks: int
    n_samples: int
    n_controls: int
    control_samples: int
    scope: str
    coefficient_unit: str
    annotators: tuple[str, ...] = ("",)
    without_coefficient: tuple[tuple[str, str], ...] = ()
    side_effects: tuple[SideEffect, ...] = ()

    def __post_init__(self) -> None:
        check_unit(self.coefficient_unit)
        if not self.annotators:
            raise LensteerError("an evaluation without an annotator: name the first, or give an empty name")

    @property
    def behaviors(self) -> tuple[str, ...]:
        """The steered behaviors, in order."""
        named = [*(e.behavior for e in self.effects), *(b for b, _ in self.without_coefficient)]
        return tuple(dict.fromkeys(named))

    @property
    def unit(self) -> str:
        """The unit of the effects with verdicts: scores if there is a measure, else shares of sentences."""
        return "score" if any(e.unit == "score" for e in self.effects) else "sentences"

    def effect(self, behavior: str, kind: str, unit: str | None = None, annotator: str = "") -> Effect:
        """One effect; by default in the unit of the verdicts.

        Raises:
            LensteerError: no such effect.
        """
        unit = self.unit if unit is None else unit
        for effect in self.effects:
            if (effect.behavior, effect.kind, effect.unit, effect.annotator) == (behavior, kind, unit, annotator):
                return effect
        known = sorted({(e.behavior, e.kind, e.unit, e.annotator) for e in self.effects})
        raise LensteerError(f"no effect of {(behavior, kind, unit, annotator)}: there are {known}")

    def verdict(self, behavior: str, kind: str) -> str:
        """The verdict on a behavior pushed down or up, from the measure or the first annotator's share of sentences.

        Raises:
            LensteerError: it was not evaluated.
        """
        return NO_COEFFICIENT if (behavior, kind) in self.without_coefficient else self.effect(behavior, kind).verdict

    def plan(self, vectors: BehaviorVectors, behavior: str, sign: int = 1) -> SteeringPlan:
        """The plan that was evaluated, with its evidence, ready to steer with or to export.

        Args:
            vectors: those that were evaluated.
            behavior: whose direction.
            sign: +1 for the condition "up", -1 for "down".

        Raises:
            LensteerError: no such condition, one that does more than add a vector, or vectors that are not those of the
                evaluation.
        """
        if sign not in (1, -1):
            raise LensteerError(f"sign={sign}: give 1 for the plan that adds, -1 for the one that takes away")
        kind = "up" if sign == 1 else "down"
        if (behavior, kind) in self.without_coefficient:
            raise LensteerError(f"{behavior!r} was not run {kind}: no coefficient left the text readable")
        effect = self.effect(behavior, kind)
        plan = SteeringPlan(
            vectors[behavior], effect.layer, effect.coefficient, parse_scope(self.scope), unit=self.coefficient_unit
        )
        if math.isnan(effect.length):
            raise LensteerError(
                f"the condition of {behavior!r} did not add one vector everywhere (another operator, a gate or a "
                "schedule), and an evaluation does not keep more of it: give exports the plan itself"
            )
        if not math.isclose(plan.length, effect.length, rel_tol=1e-4):
            raise LensteerError(
                f"{behavior!r} at layer {effect.layer} adds {plan.length:.6g} with these vectors, and "
                f"{effect.length:.6g} in the evaluation: give the vectors that were evaluated"
            )
        return replace(plan, evidence=self._evidence(effect, vectors.provenance.get("model")))

    def _evidence(self, effect: Effect, model: Any) -> Evidence:
        own, plain = self._condition(f"{effect.behavior}/{effect.kind}"), self._condition("unsteered")
        prompted = [e for e in self.effects if (e.behavior, e.kind, e.unit, e.annotator) == _key(effect, "prompted")]
        return Evidence(
            model=dict(model) if isinstance(model, Mapping) else {},
            label=effect.behavior,
            sign=-1 if effect.kind == "down" else 1,
            layer=effect.layer,
            coefficient=effect.coefficient,
            coefficient_unit=self.coefficient_unit,
            length=effect.length,
            scope=self.scope,
            unit=effect.unit,
            annotator=self.annotators[0],
            n_tasks=self.n_tasks,
            n_samples=self.n_samples,
            unsteered=effect.base,
            steered=effect.share,
            change=effect.change,
            prompted=prompted[0].share if prompted else None,
            p=effect.p_holm,
            controls=tuple(ControlRange(c.pool, c.n, c.low, c.high, c.rank) for c in effect.controls),
            verdict=effect.verdict,
            readable=effect.text,
            text=tuple(
                TextMeasure(f.name, f.value, f.base, f.limit, f.ok) for f in (own.text.figures if own.text else ())
            ),
            accuracy=own.accuracy,
            unsteered_accuracy=plain.accuracy,
            lensteer=__version__,
        )

    def _condition(self, named: str) -> ConditionSummary:
        """The condition of a name or of a kind."""
        for condition in self.conditions:
            if named in (condition.condition, condition.kind):
                return condition
        raise LensteerError(f"no condition {named!r}: there are {[c.condition for c in self.conditions]}")

    def to_dataframe(self) -> pd.DataFrame:
        """A row per effect, with columns for z and rank in each pool."""
        rows = []
        for e in self.effects:
            row = {**flat(e), "verdict": e.verdict, "shown": e.shown}
            del row["controls"]
            for pool in e.controls:
                row |= {f"{pool.pool}.z": pool.z, f"{pool.pool}.rank": pool.rank}
            rows.append(row)
        return pd.DataFrame(rows)

    def side_effects_dataframe(self) -> pd.DataFrame:
        """A row per condition and thing that it is not meant to change."""
        return pd.DataFrame([flat(each) for each in self.side_effects])

    def conditions_dataframe(self) -> pd.DataFrame:
        """A row per condition."""
        rows = []
        for condition in self.conditions:
            row = {**flat(condition), "text": None if condition.text is None else condition.text.ok}
            clean = row.pop("clean")
            rows.append(row | ({} if clean is None else {f"clean.{name}": v for name, v in flat(clean).items()}))
        return pd.DataFrame(rows)


def _key(effect: Effect, kind: str) -> tuple[str, str, str, str]:
    return effect.behavior, kind, effect.unit, effect.annotator


MEAN = "mean of behaviors"


@dataclass(frozen=True)
class PositionEffect:
    """The effect of one scope on one behavior, or on the mean of all.

    Attributes:
        comparison: "coefficient" and "budget": free generation, with the same coefficient or the same KL at all scopes;
            "forced": teacher forcing on unsteered chains; "left out": the same, steered at all sentences but one.
        scope: its name.
        behavior: whose vector and effect, or `MEAN`.
        effect: the behavior's share of sentences with its vector added less that with it subtracted (or less that of
            unsteered chains, see `PositionAblation.base`); under teacher forcing, added less subtracted, of the
            log-probability of its own sentences in nats per sentence.
        behind: by how much the effect is larger at the reference scope (for "left out", at all sentences), paired by
            task.
        kl: mean KL per token over the signs that were run, in nats, with its interval over prompts or chains; for
            "left out", a chain counts once for each sentence that is measured.
        edited: positions of an unsteered chain that are edited, its prompt's included; a mean over chains.
        down: the coefficient that subtracts (for `MEAN` a mean over behaviors); 0 if nothing was subtracted.
        up: the coefficient that adds.
        parsed: share of steered chains that end and can be read; NaN under teacher forcing.
        repetition: share of their 4-grams that occurred earlier in the chain, a mean; NaN under teacher forcing.
        reached: whether all of its coefficients reach the target KL, if there is one.
    """

    comparison: str
    scope: str
    behavior: str
    effect: Estimate
    behind: Estimate
    kl: Estimate
    edited: float
    down: float
    up: float
    parsed: float
    repetition: float
    reached: bool


@dataclass(frozen=True)
class PositionAblation:
    """The same steering at different positions.

    Attributes:
        rows: of all comparisons.
        reference: the scope that the others are compared with, except for "left out".
        budget: target mean KL per token, in nats.
        layers: behavior → steered layer.
        n_tasks: dev tasks, one chain per condition.
        n_prompts: number of them used for KL over rollouts.
        base: what free-running chains with the vector added are compared with: "down", the vector subtracted, or
            "unsteered".
    """

    rows: tuple[PositionEffect, ...]
    reference: str
    budget: float
    layers: dict[str, int]
    n_tasks: int
    n_prompts: int
    base: str = "down"

    def to_dataframe(self) -> Any:
        """A row per comparison, scope and behavior."""
        import pandas as pd

        return pd.DataFrame([flat(row) for row in self.rows])

"""What an evaluation found: effects by behavior, side effects by condition, and how far control vectors go.

Values only. `PositionAblation` compares the same steering at different positions (`analyses/position_ablation.py`).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pandas as pd

from lensteer.errors import LensteerError
from lensteer.evaluation.text import TextCheck
from lensteer.results import Saved
from lensteer.statistics import Estimate, flat

#: A behavior is pushed down on record only where the unsteered condition has so many of its sentences, on so many
#: tasks.
MIN_EVENTS, MIN_EVENT_TASKS = 12, 10
#: Level of the tests, after Holm's correction over all behaviors and both directions.
LEVEL = 0.05

#: What can be said of one behavior pushed one way.
SHOWN, NOT_SHOWN, TOO_RARE = "shown", "not shown", "base rate too low"
WRONG_WAY, AS_RANDOM, BROKEN, NO_COEFFICIENT = (
    "moves the other way",
    "moves as random vectors do",
    "text breaks",
    "no coefficient",
)


@dataclass(frozen=True)
class ControlRank:
    """How one effect stands among the control vectors of one pool, at the same layer.

    Attributes:
        pool: "isotropic", "covariance_matched" or "shuffled".
        n: control vectors.
        length: of what each of them adds; the steered conditions at the layer add as much or less.
        low: their smallest change of the behavior's share.
        high: their largest.
        mean: of their changes.
        sd: standard deviation of their changes, sampling noise included.
        z: (change - mean) / sd, positive in the wanted direction.
        rank: 1 if none of them goes as far in the wanted direction, 2 if one does, and so on.
        p_max: share of controls (and the vector itself) whose largest z over all behaviors and directions reaches this
            z; None for fewer than 99 controls.
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
    """One condition's share of one behavior, and its change against the unsteered condition, both with 95 % intervals.

    Attributes:
        behavior: whose share.
        kind: "down", "up" (the behavior's own vector) or "prompted" (the prompted baseline).
        layer: steered (-1 where a prompt asks).
        coefficient: signed; 0 where a prompt asks.
        length: of what is added.
        unit: "sentences" or "tokens", of which the share is; "score": the mean of a measure over chains.
        annotator: who counted; "" is the first.
        share: in this condition.
        base: the unsteered share.
        events: sentences of the behavior in this condition.
        base_events: in the unsteered condition.
        base_event_tasks: tasks of the unsteered condition with at least one.
        change: share - base, paired by task.
        p: two-sided sign-flip test over tasks.
        p_holm: the same after Holm's correction over all directions that are tested; NaN for one that is not.
        controls: how it stands in each pool.
        control_low: smallest change of the same share by a control vector, `control_high` the largest; 0 without any.
        p_value: (1 + controls that change it at least as far in the wanted direction) / (1 + controls).
        wrong_way: share of tasks that move against the wanted direction.
        text: whether the condition's text is no worse than unsteered.
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

    @property
    def measurable(self) -> bool:
        """Whether the unsteered condition has enough of the behavior for a fall to be seen; a rise can always be."""
        enough = self.base_events >= MIN_EVENTS and self.base_event_tasks >= MIN_EVENT_TASKS
        return self.kind != "down" or self.unit == "score" or enough

    @property
    def verdict(self) -> str:
        """In words. "shown": significant after correction, the wanted way, beyond every control, in readable text."""
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
    """How a condition's chains fared, whatever the behavior. Means over chains; `accuracy` with its 95 % interval.

    Attributes:
        condition: its name.
        kind: what it is; see `Condition`.
        behavior: that was pushed or asked for; "" for none.
        pool: of which controls it is one; "" for none.
        layer: steered; -1 for a condition without a residual edit.
        chains: how many.
        accuracy: share of right answers among those that can be graded.
        parsed: share that ended, closed their thinking and could be read in every sentence.
        finished: share that ended by themselves.
        length: tokens.
        sentences: per chain.
        sentence_length: tokens per sentence.
        repetition: share of 4-grams that occurred before.
        compression: length of the text after compression, as a share.
        nll: nats per token under the unsteered model; None where it was not measured.
        kl: nats per token between the steered and the unsteered model along the text.
        text: how the text stands beside the unsteered condition's; None for that condition.
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


@dataclass(frozen=True)
class Evaluation(Saved):
    """Effects and side effects of steering on held-out tasks.

    Attributes:
        effects: a row per behavior, kind, unit and annotator.
        conditions: a row per condition.
        n_tasks: held out.
        n_samples: chains per task and own condition.
        n_controls: control vectors per pool and layer.
        control_samples: chains per task and control vector.
        scope: positions that were steered.
        coefficient_unit: what coefficient 1 is.
        annotators: their names, the first one first.
        without_coefficient: (behavior, kind) that no coefficient was found for, so that nothing was run.
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

    @property
    def behaviors(self) -> tuple[str, ...]:
        """Those that were steered, in order."""
        named = [*(e.behavior for e in self.effects), *(b for b, _ in self.without_coefficient)]
        return tuple(dict.fromkeys(named))

    @property
    def unit(self) -> str:
        """Of the effects that verdicts are about: scores where there is a measure, else shares of sentences."""
        return "score" if any(e.unit == "score" for e in self.effects) else "sentences"

    def effect(self, behavior: str, kind: str, unit: str | None = None, annotator: str = "") -> Effect:
        """One effect; without a unit, the one that the verdict is about.

        Raises:
            LensteerError: there is none of that name.
        """
        unit = self.unit if unit is None else unit
        for effect in self.effects:
            if (effect.behavior, effect.kind, effect.unit, effect.annotator) == (behavior, kind, unit, annotator):
                return effect
        known = sorted({(e.behavior, e.kind, e.unit, e.annotator) for e in self.effects})
        raise LensteerError(f"no effect of {(behavior, kind, unit, annotator)}: there are {known}")

    def verdict(self, behavior: str, kind: str) -> str:
        """What can be said of a behavior pushed one way, by the measure, or the first annotator's share of sentences.

        Raises:
            LensteerError: it was not asked for.
        """
        return NO_COEFFICIENT if (behavior, kind) in self.without_coefficient else self.effect(behavior, kind).verdict

    def to_dataframe(self) -> pd.DataFrame:
        """A row per effect; z and rank in each pool have columns of their own."""
        rows = []
        for e in self.effects:
            row = {**flat(e), "verdict": e.verdict, "shown": e.shown}
            del row["controls"]
            for pool in e.controls:
                row |= {f"{pool.pool}.z": pool.z, f"{pool.pool}.rank": pool.rank}
            rows.append(row)
        return pd.DataFrame(rows)

    def conditions_dataframe(self) -> pd.DataFrame:
        """A row per condition."""
        return pd.DataFrame([{**flat(a), "text": None if a.text is None else a.text.ok} for a in self.conditions])


MEAN = "mean of behaviors"


@dataclass(frozen=True)
class PositionEffect:
    """What one choice of positions does for one behavior, or for the mean of them.

    Attributes:
        comparison: "coefficient" and "budget": the model writes freely, with one coefficient at all scopes or with
            those that spend the same KL; "forced": it is led along unsteered chains; "left out": so, too, and steered
            at all sentences but one.
        scope: the positions' name.
        behavior: whose vector and effect, or `MEAN`.
        effect: the behavior's share of sentences with its vector added less that with it taken away; along
            unsteered chains, the same difference of the log-probability of its own sentences, in nats per sentence.
        behind: how much larger the effect is at the reference scope (if left out, at all sentences), paired by task.
        kl: mean KL per token over both signs, in nats, its interval over prompts or
            chains; if left out, a chain counts once for each sentence that is read.
        edited: positions of an unsteered chain that are edited, its prompt's included; a mean over chains.
        down: the coefficient that takes away (for `MEAN` a mean over behaviors).
        up: the coefficient that adds.
        parsed: share of steered chains that end and can be read; NaN along unsteered chains.
        reached: whether all of its coefficients spend the budget, where one was asked for.
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
    reached: bool


@dataclass(frozen=True)
class PositionAblation:
    """The same steering at different positions.

    Attributes:
        rows: of all comparisons.
        reference: the scope that the others are held against, but for "left out".
        budget: mean KL per token that was asked for, in nats.
        layers: behavior → steered layer.
        n_tasks: dev tasks, one chain a condition.
        n_prompts: those of them that rollouts for a KL begin with.
    """

    rows: tuple[PositionEffect, ...]
    reference: str
    budget: float
    layers: dict[str, int]
    n_tasks: int
    n_prompts: int

    def to_dataframe(self) -> Any:
        """A row per comparison, scope and behavior."""
        import pandas as pd

        return pd.DataFrame([flat(row) for row in self.rows])

"""What a condition changes besides its behavior: answers, length, repetition, and the other behaviors."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from lensteer.behaviors import in_order
from lensteer.evaluation.conditions import Condition, Record
from lensteer.evaluation.shares import Part, right_of, share_of
from lensteer.statistics import Estimate, Ratio, bootstrap_interval, sign_flip_test

#: Exchanges of a test: there are many, and none is corrected for their number.
_EXCHANGES = 5000

#: What is compared besides the behaviors: a chain's value and its weight.
MEASURED: dict[str, Part] = {
    "accuracy": right_of,
    "answered": lambda r: (0.0, 0.0) if r.answered is None else (float(r.answered), 1.0),
    "length": lambda r: (float(r.length), 1.0),
    "finished": lambda r: (float(r.finished), 1.0),
    "repetition": lambda r: (r.repetition, 1.0),
}


@dataclass(frozen=True)
class SideEffect:
    """One condition's change of one thing that it is not meant to change, paired by task, with a 95 % interval.

    Attributes:
        condition: its name.
        kind: of the condition, see `Condition`.
        behavior: that was steered or prompted for.
        measured: "accuracy" (share of right answers among chains whose task has an answer), "answered" (an answer can
            be read), "length" (tokens), "finished", "repetition"; or another behavior, whose share of sentences is
            compared.
        base: unsteered.
        change: from it.
        p: two-sided sign-flip test over tasks, not corrected for the number of comparisons.
    """

    condition: str
    kind: str
    behavior: str
    measured: str
    base: Estimate
    change: Estimate
    p: float


def side_effects(
    rows: Mapping[str, Sequence[Record]], conditions: Sequence[Condition], plain: str, *, seed: int = 0
) -> tuple[SideEffect, ...]:
    """Changes of every condition but controls from the unsteered one; what was not measured is left out.

    A behavior's share of sentences is compared in the conditions of all other behaviors: does steering b change b'?

    Args:
        rows: the records by condition.
        conditions: that were run.
        plain: name of the unsteered condition.
        seed: of resamples and exchanges.
    """
    labels = in_order([label for r in rows[plain] for label in r.sentences])
    shares: dict[str, Part] = {label: share_of(label) for label in labels}
    found = []
    for name, part in (MEASURED | shares).items():
        base = _per_task(rows[plain], part)
        assert base.weights is not None
        if (base.weights > 0).sum() < 2:
            continue
        before = bootstrap_interval(base, seed=seed)
        for condition in conditions:
            if condition.kind in ("control", "unsteered") or condition.behavior == name:
                continue
            own = _per_task(rows[condition.name], part)
            if own.weights is None or len(own.values) != len(base.values) or not own.weights.any():
                continue
            change = bootstrap_interval(own, base, seed=seed)
            p = sign_flip_test(own, base, n=_EXCHANGES, seed=seed)
            found.append(SideEffect(condition.name, condition.kind, condition.behavior, name, before, change, p))
    return tuple(found)


def _per_task(records: Sequence[Record], part: Part) -> Ratio:
    """Sums of value and weight, tasks in order."""
    sums: dict[str, list[float]] = {}
    for r in records:
        value, weight = part(r)
        each = sums.setdefault(r.task, [0.0, 0.0])
        each[0] += value
        each[1] += weight
    return Ratio(*np.array([sums[task] for task in sorted(sums)], dtype=np.float64).T)

"""What steering along vectors changes on tasks, beside control vectors as long: shared by analyses of own pairs.

A vector is added and taken away at one layer, with one length, at every position whose logits choose a token of the
answer (`ANSWERING`: at generated tokens alone an answer of one token would not be steered). The controls are of the
same length: drawn with the covariance of the pairs' activations, and fitted on pairs whose sides are swapped at random.
Changes are from the unsteered model, paired by task; intervals are from a bootstrap over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

import lensteer as ls
from lensteer.evaluation import Condition, Record, ResampledShares, estimate_of, run_conditions
from lensteer.evaluation.controls import control_conditions
from lensteer.evaluation.shares import Part
from lensteer.positions import PositionScope
from lensteer.statistics import Estimate
from lensteer.vectors import BehaviorVectors

POOLS = ("covariance_matched", "shuffled")
UNSTEERED = "unsteered"
#: The prompt's last token, and every generated one.
ANSWERING = PositionScope("answering", lambda c: c.position >= c.prompt_length[:, None] - 1)


@dataclass(frozen=True)
class Change:
    """What one vector, pushed one way, changes in one figure.

    Attributes:
        vector: its name.
        length: of the edit.
        sign: 1 for added, -1 for taken away.
        figure: what is measured.
        base: unsteered.
        value: steered.
        change: from unsteered, paired by task.
        low_control: the lowest change among control vectors of that length, NaN without any.
        high_control: the highest.
        rank: 1 + the number of controls whose change is at least as large in absolute value.
        controls: their number.
    """

    vector: str
    length: float
    sign: int
    figure: str
    base: Estimate
    value: Estimate
    change: Estimate
    low_control: float
    high_control: float
    rank: int
    controls: int


def conditions_of(vectors: BehaviorVectors, layer: int, lengths: Sequence[float], n_controls: int) -> list[Condition]:
    """The unsteered condition; with each length every vector added and taken away, and controls of that length.

    Raises:
        LensteerError: a length that is not positive.
    """
    found = [Condition(UNSTEERED, kind="unsteered")]
    for length in lengths:
        if not length > 0:
            raise ls.LensteerError(f"length {length}: give the length of the edit, a positive number")
        own = [
            Condition(
                f"{label}/{kind}/{length:.6g}",
                ls.SteeringPlan(vectors[label], layer, sign * length, ANSWERING, unit="unit"),
                kind=kind,
                behavior=label,
            )
            for label in vectors.labels
            for kind, sign in (("down", -1), ("up", 1))
        ]
        controls = control_conditions(vectors, own, pools=POOLS, n=n_controls, samples=1, scope=ANSWERING)
        found += [*own, *(replace(c, name=f"{c.name}/{length:.6g}") for c in controls)]
    return found


def answers(
    model: Any,
    tasks: Sequence[ls.Task],
    conditions: Sequence[Condition],
    sampling: ls.Sampling,
    folder: Path | None,
    measures: Mapping[str, Callable[[ls.Trace], float]],
) -> list[Record]:
    """The records of all conditions; answers are kept in the folder, if there is one."""
    if folder is not None:
        folder.mkdir(parents=True, exist_ok=True)
    path = None if folder is None else folder / "answers.jsonl"
    return run_conditions(model, tasks, conditions, sampling, measures=measures, path=path, progress=True)


def changes_of(
    records: Sequence[Record], conditions: Sequence[Condition], figures: Mapping[str, Part], seed: int = 0
) -> tuple[Change, ...]:
    """A change per figure, vector, length and sign; a figure that no chain has is left out."""
    shares = ResampledShares(records, seed=seed)
    found = []
    for figure, part in figures.items():
        base = shares.ratio(UNSTEERED, part)
        if np.isnan(base[0]):
            continue
        n = len({r.task for r in records if r.condition == UNSTEERED and part(r)[1]})
        for c in conditions:
            if c.kind in ("down", "up") and c.plan is not None:
                length = _length(c)
                same = [x.name for x in conditions if x.kind == "control" and _as_long(x, length)]
                others = [float(shares.ratio(name, part)[0] - base[0]) for name in same]
                value = shares.ratio(c.name, part)
                before, after, change = (estimate_of(draws, n) for draws in (base, value, value - base))
                rank = 1 + sum(not abs(x) < abs(change.value) for x in others)
                low, high = (min(others), max(others)) if others else (np.nan, np.nan)
                sign = 1 if c.kind == "up" else -1
                found.append(
                    Change(c.behavior, length, sign, figure, before, after, change, low, high, rank, len(others))
                )
    return tuple(found)


def _length(condition: Condition) -> float:
    return abs(condition.plan.edits[0].coefficient)  # of unit vectors


def _as_long(condition: Condition, length: float) -> bool:
    return math.isclose(_length(condition), length, rel_tol=1e-3)  # a control's is a norm, which is rounded


def lines_of(changes: Sequence[Change]) -> list[str]:
    """A line of a table per change."""
    lines = ["vector | pushed by | figure | unsteered | steered | change | controls | rank"]
    for c in changes:
        lines.append(
            f"{c.vector} | {c.sign * c.length:+.3g} | {c.figure} | {c.base.value:.3f} | {c.value.value:.3f} | "
            f"{c.change:+.3f} | {c.low_control:+.3f} to {c.high_control:+.3f} | {c.rank} of {c.controls + 1}"
        )
    return lines


def beyond(change: Mapping[str, object]) -> bool:
    """Whether the interval of a change of a loaded JSON file excludes 0, and no control goes as far."""
    estimate = change["change"]
    assert isinstance(estimate, Mapping)
    return bool(estimate["low"] > 0 or estimate["high"] < 0) and change["rank"] == 1

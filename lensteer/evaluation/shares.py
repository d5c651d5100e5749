"""Shares of sentences, and other ratios, in every condition: on the observed tasks and on shared resamples of them.

For statistics across conditions, such as a mean over many of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Record
from lensteer.statistics import Estimate, drawn_counts, percentile_interval

Part = Callable[[Record], tuple[float, float]]
"""What a chain adds to both sums of a ratio. A chain without a value adds (0, 0)."""


def right_of(r: Record) -> tuple[float, float]:
    """For the share of right answers; a chain whose answer is not definite adds nothing."""
    return (0.0, 0.0) if r.correct is None else (float(r.correct), 1.0)


def share_of(behavior: str, annotator: str | None = None) -> Part:
    """For a behavior's share of sentences, by the first annotator or by a further one."""

    def part(r: Record) -> tuple[float, float]:
        found = r.by(annotator)
        return float(found.sentences.get(behavior, 0)), float(found.n_sentences)

    return part


class ResampledShares:
    """Σ sentences of a behavior / Σ sentences, per draw of tasks: chains are weighted by length. Other ratios, too.

    Args:
        records: the same tasks in every condition. The number of chains per task may differ between conditions.
        n: draws, in addition to the first, which is the observed data.
        seed: of the draws.

    Raises:
        LensteerError: conditions with different tasks, or fewer than two tasks.
    """

    def __init__(self, records: Sequence[Record], *, n: int = 2000, seed: int = 0) -> None:
        self._conditions: dict[str, list[Record]] = {}
        for record in records:
            self._conditions.setdefault(record.condition, []).append(record)
        tasks = {frozenset(r.task for r in found) for found in self._conditions.values()}
        if len(tasks) != 1 or len(*tasks) < 2:
            raise LensteerError(
                f"{len(self._conditions)} conditions on {len(tasks)} sets of tasks: give records of the same tasks, 2 "
                "or more"
            )
        self._tasks = {task: i for i, task in enumerate(sorted(*tasks))}
        self._draws = np.vstack([np.ones(len(self._tasks)), drawn_counts(len(self._tasks), n, seed)])

    def of(self, condition: str, behavior: str, annotator: str | None = None) -> Float[np.ndarray[Any, Any], " draw"]:
        """The share of one behavior in one condition, by the first annotator or by a further one.

        Raises:
            LensteerError: no such condition, or no such annotator.
        """
        return self.ratio(condition, share_of(behavior, annotator))

    def ratio(self, condition: str, part: Part) -> Float[np.ndarray[Any, Any], " draw"]:
        """Σ of the first over Σ of the second number that `part` gives for each chain; NaN where the latter is 0.

        Raises:
            LensteerError: no such condition.
        """
        if condition not in self._conditions:
            raise LensteerError(f"no condition {condition!r}: there are {', '.join(map(repr, self._conditions))}")
        sums = np.zeros((len(self._tasks), 2))
        for record in self._conditions[condition]:
            sums[self._tasks[record.task]] += part(record)
        hits, total = (self._draws @ sums).T
        return np.asarray(np.divide(hits, total, out=np.full(hits.shape, np.nan), where=total != 0))


def estimate_of(draws: Float[np.ndarray[Any, Any], " draw"], n_tasks: int = 0) -> Estimate:
    """A statistic of such shares: its value on the first draw, and its 95 % interval over the others."""
    return percentile_interval(draws[0], draws[1:], n_tasks)


def rank_correlation(
    x: Float[np.ndarray[Any, Any], " item"], drawn: Float[np.ndarray[Any, Any], "draw item"]
) -> Float[np.ndarray[Any, Any], " draw"]:
    """Spearman's correlation of fixed values with those of every draw; NaN where one side has a single value."""
    from scipy.stats import rankdata  # takes a second to import

    ranks = rankdata(drawn, axis=1)
    a, b = ranks - ranks.mean(1, keepdims=True), rankdata(x) - (len(x) + 1) / 2
    spread = np.sqrt((a**2).sum(1) * (b**2).sum())
    return np.asarray(np.divide(a @ b, spread, out=np.full(len(a), np.nan), where=spread != 0))

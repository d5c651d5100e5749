"""Shares of sentences in every condition, on the observed tasks and on shared resamples of them.

For statistics across conditions, such as a mean over many of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Record
from lensteer.statistics import Estimate, drawn_counts, percentile_interval


class ResampledShares:
    """Σ sentences of a behavior / Σ sentences, per draw of tasks: chains are weighted by length.

    Args:
        records: of one call of `run_conditions`: the same tasks in the same order in every condition.
        n: draws, in addition to the first, which is the observed data.
        seed: of the draws.

    Raises:
        LensteerError: conditions with different tasks, or fewer than two chains per condition.
    """

    def __init__(self, records: Sequence[Record], *, n: int = 2000, seed: int = 0) -> None:
        self._conditions: dict[str, list[Record]] = {}
        for record in records:
            self._conditions.setdefault(record.condition, []).append(record)
        tasks = {tuple(r.task for r in found) for found in self._conditions.values()}
        if len(tasks) != 1 or len(*tasks) < 2:
            raise LensteerError(
                f"{len(self._conditions)} conditions on {len(tasks)} lists of tasks: give one run's records, "
                "of 2 tasks or more"
            )
        names, unit = np.unique(next(iter(tasks)), return_inverse=True)
        self._weights = np.vstack([np.ones(len(names)), drawn_counts(len(names), n, seed)])[:, unit]

    def of(self, condition: str, behavior: str) -> Float[np.ndarray[Any, Any], " draw"]:
        """The share of one behavior in one condition.

        Raises:
            LensteerError: no such condition.
        """
        if condition not in self._conditions:
            raise LensteerError(f"no condition {condition!r}: there are {', '.join(map(repr, self._conditions))}")
        hits = np.array([r.sentences.get(behavior, 0) for r in self._conditions[condition]])
        shares: Float[np.ndarray[Any, Any], " draw"] = self._weights @ hits
        return shares / (self._weights @ np.array([r.n_sentences for r in self._conditions[condition]]))


def estimate_of(draws: Float[np.ndarray[Any, Any], " draw"], n_tasks: int = 0) -> Estimate:
    """A statistic of such shares: its value on the first draw, and its 95 % interval over the others."""
    return percentile_interval(draws[0], draws[1:], n_tasks)

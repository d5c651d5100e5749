"""Power of a planned evaluation, from unsteered base rates on dev tasks: reported before hours are spent."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Record
from lensteer.evaluation.results import LEVEL, MIN_EVENT_TASKS, MIN_EVENTS

#: Power: the share of runs in which a change of the stated size is detected.
POWER = 0.8


@dataclass(frozen=True)
class Power:
    """The change of one behavior that an evaluation can detect, as a share of sentences or a measure's mean score.

    Attributes:
        behavior: whose sentences.
        base: its share or mean score on the dev tasks, unsteered.
        events: its expected number of sentences in the unsteered condition of the evaluation; NaN for scores, like
            `tasks`.
        tasks: expected number of tasks with at least one.
        design: design effect: variance of the share relative to that of independent sentences.
        rise: the smallest share after pushing up that is detected in 80 % of the runs.
        fall: the largest share after pushing down that is detected; NaN if even 0 would not be.
        down: whether a fall can be tested: enough events on enough tasks.
    """

    behavior: str
    base: float
    events: float
    tasks: float
    design: float
    rise: float
    fall: float
    down: bool


def power(
    records: Sequence[Record], behaviors: Sequence[str], *, n_tasks: int, n_samples: int, n_tests: int | None = None
) -> list[Power]:
    """Base rates of an unsteered condition on dev tasks, and the power of an evaluation that follows from them.

    With M sentences in each condition, shares p and q and a design effect d, the standard error of their difference is
    √(d (p(1−p) + q(1−q)) / M); a difference is detected in 80 % of the runs if it is (z₁ + z₂) times that, with z₁ from
    the two-sided level after Bonferroni's correction for `n_tests` and z₂ from the power. This is an approximation:
    rare events are not Gaussian. For scores, p(1−p) is replaced by their variance over chains, assumed equal when
    steered.

    Args:
        records: of the unsteered condition.
        behaviors: that will be steered.
        n_tasks: of the evaluation.
        n_samples: its chains per task and condition.
        n_tests: by default two per behavior.

    Raises:
        LensteerError: the records have no sentence.
    """
    from scipy.stats import norm

    if records and records[0].scores:
        z = float(norm.isf(LEVEL / 2 / (n_tests or 2 * len(behaviors))) + norm.isf(1 - POWER))
        return [_power_of_scores(records, behavior, n_tasks * n_samples, z) for behavior in behaviors]
    sentences = sum(r.n_sentences for r in records)
    if not sentences:
        raise LensteerError(f"{len(records)} unsteered chains without a sentence: annotate longer chains")
    z = float(norm.isf(LEVEL / 2 / (n_tests or 2 * len(behaviors))) + norm.isf(1 - POWER))
    size = n_tasks * n_samples * sentences / len(records)
    found = []
    for behavior in behaviors:
        events = sum(r.sentences.get(behavior, 0) for r in records)
        base, design = events / sentences, _design(records, behavior)

        def gap(other: float, base: float = base, design: float = design) -> float:
            spread = base * (1 - base) + other * (1 - other)
            return abs(other - base) - z * math.sqrt(design * spread / size)

        rises = [x for x in np.geomspace(max(base, 1e-4), 1.0, 400) if x > base and gap(x) >= 0]
        falls = [x for x in np.linspace(0, base, 400) if gap(x) >= 0]
        expected = base * size
        tasks = n_tasks * (1 - math.exp(-expected / n_tasks / design))
        found.append(
            Power(
                behavior,
                base,
                expected,
                tasks,
                design,
                float(min(rises, default=math.nan)),
                float(max(falls, default=math.nan)),
                expected >= MIN_EVENTS and tasks >= MIN_EVENT_TASKS,
            )
        )
    return found


def _power_of_scores(records: Sequence[Record], behavior: str, n_chains: int, z: float) -> Power:
    by_task: dict[str, list[float]] = {}
    for r in records:
        by_task.setdefault(r.task, []).append(r.scores[behavior])
    values = np.array([value for scores in by_task.values() for value in scores])
    base, variance = float(values.mean()), float(values.var(ddof=1)) if len(values) > 1 else math.nan
    means = np.array([np.mean(scores) for scores in by_task.values()])
    per_task = len(values) / len(means)
    design = max(1.0, float(means.var(ddof=1)) * per_task / variance) if len(means) > 1 and variance > 0 else 1.0
    gap = z * math.sqrt(2 * design * variance / n_chains)
    return Power(behavior, base, math.nan, math.nan, design, base + gap, base - gap, True)


def _design(records: Sequence[Record], behavior: str) -> float:
    """Variance of the share over tasks as a multiple of the binomial one, at least 1."""
    sums: dict[str, list[float]] = {}
    for r in records:
        each = sums.setdefault(r.task, [0.0, 0.0])
        each[0] += r.sentences.get(behavior, 0)
        each[1] += r.n_sentences
    hits, whole = np.array(list(sums.values())).T
    share = hits.sum() / whole.sum()
    if len(hits) < 2 or not 0 < share < 1:
        return 1.0
    residual = hits - share * whole
    variance = float((residual**2).sum() * len(hits) / (len(hits) - 1))
    return max(1.0, variance / float(share * (1 - share) * whole.sum()))


def to_rows(found: Sequence[Power]) -> list[dict[str, Any]]:
    """As JSON-ready values; NaN becomes None."""
    return [{k: None if isinstance(v, float) and math.isnan(v) else v for k, v in asdict(row).items()} for row in found]

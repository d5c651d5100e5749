"""How a behavior's share follows the coefficient: rank correlation, slope, linear range, and odd and even parts.

If a direction carries a behavior, the change is odd in the coefficient: adding raises, subtracting lowers. A change
that is even, the same for both signs, is a disturbance that any vector of that length may cause.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float

from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Record
from lensteer.evaluation.shares import Part, ResampledShares, estimate_of, rank_correlation, right_of, share_of
from lensteer.statistics import Array, Estimate

#: Signed coefficients, 0 included, below which there is no curve.
MIN_POINTS = 3


@dataclass(frozen=True)
class DosePoint:
    """One coefficient of a curve, with 95 % intervals over tasks.

    Attributes:
        coefficient: signed; 0 is unsteered.
        share: of the behavior's sentences; or the mean score, if a measure is tested.
        change: share less the unsteered share, paired by task.
        accuracy: change of the share of right answers, paired by task; NaN if no task has an answer.
        readable: whether the text is no worse than unsteered.
    """

    coefficient: float
    share: Estimate
    change: Estimate
    accuracy: Estimate
    readable: bool


@dataclass(frozen=True)
class DoseResponse:
    """The response of one behavior's share to the coefficient of its own vector, with 95 % intervals over tasks.

    Attributes:
        behavior: whose vector and share.
        layer: steered.
        points: by coefficient, 0 included.
        spearman: rank correlation of coefficient and share over all points.
        slope: change of the share per unit of coefficient: least squares through the unsteered share, over the points
            of the linear range (over all, if there is none).
        linear: the largest absolute coefficient up to which no point differs from that line beyond its interval; 0 if
            every such range has one that does. With few tasks this says little: intervals are wide.
        at: the absolute coefficient of `odd` and `even`: the largest whose both signs are readable, else the largest
            with both signs.
        odd: (share at +`at` less share at -`at`) / 2.
        even: their mean less the unsteered share. A share near 0 cannot fall, and its even part is the larger for it.
        breaks: the smallest absolute coefficients down and up at which the text breaks; None if none does.
        accuracy_falls: the same for a fall of accuracy whose interval excludes 0.
    """

    behavior: str
    layer: int
    points: tuple[DosePoint, ...]
    spearman: Estimate
    slope: Estimate
    linear: float
    at: float
    odd: Estimate
    even: Estimate
    breaks: tuple[float | None, float | None]
    accuracy_falls: tuple[float | None, float | None]


def dose_response(
    records: Mapping[float, Sequence[Record]],
    readable: Mapping[float, bool],
    behavior: str,
    layer: int,
    *,
    seed: int = 0,
) -> DoseResponse:
    """The curve of one behavior from the chains of every coefficient, on the same tasks.

    Args:
        records: the chains by signed coefficient; 0 is the unsteered condition.
        readable: by coefficient other than 0, whether the text is no worse than unsteered.
        behavior: whose share, or score if the records have scores.
        layer: that was steered.
        seed: of the resamples, the same for all coefficients.

    Raises:
        LensteerError: no unsteered chains, fewer than two other coefficients, none with both signs, or other tasks.
    """
    coefficients = sorted(records)
    both = sorted({abs(c) for c in coefficients if c and -c in records})
    if 0.0 not in records or len(coefficients) < MIN_POINTS or not both:
        raise LensteerError(
            f"coefficients {coefficients}: a curve needs 0, the unsteered condition, and at least one with both signs"
        )
    rows = [r for c in coefficients for r in records[c]]
    shares = ResampledShares(rows, seed=seed)
    names = {c: records[c][0].condition for c in coefficients}

    part = _score_of(behavior) if rows[0].scores else share_of(behavior)
    drawn = np.stack([shares.ratio(names[c], part) for c in coefficients], axis=1)
    right = np.stack([shares.ratio(names[c], right_of) for c in coefficients], axis=1)
    zero, n = coefficients.index(0.0), len({r.task for r in rows})
    change, lost = drawn - drawn[:, [zero]], right - right[:, [zero]]
    at_zero = Estimate(0.0, 0.0, 0.0, n)
    points = tuple(
        DosePoint(
            c,
            estimate_of(drawn[:, i], n),
            estimate_of(change[:, i], n) if c else at_zero,
            estimate_of(lost[:, i], n),
            readable.get(c, True),
        )
        for i, c in enumerate(coefficients)
    )
    x = np.array(coefficients)
    linear = next((reach for reach in reversed(both) if _on_a_line(x, change, reach)), 0.0)
    fitted = np.abs(x) <= (linear or math.inf)
    at = max((c for c in both if readable.get(c, True) and readable.get(-c, True)), default=both[-1])
    up, down = change[:, coefficients.index(at)], change[:, coefficients.index(-at)]
    return DoseResponse(
        behavior,
        layer,
        points,
        spearman=estimate_of(rank_correlation(x, drawn), n),
        slope=estimate_of(_slope(x[fitted], change[:, fitted]), n),
        linear=linear,
        at=at,
        odd=estimate_of((up - down) / 2, n),
        even=estimate_of((up + down) / 2, n),
        breaks=_first(points, lambda p: not p.readable),
        accuracy_falls=_first(points, lambda p: p.accuracy.high < 0),
    )


def _score_of(behavior: str) -> Part:
    return lambda r: (float(r.scores[behavior]), 1.0)


def _first(points: Sequence[DosePoint], fails: Callable[[DosePoint], bool]) -> tuple[float | None, float | None]:
    """The smallest absolute coefficient of each sign at which something fails."""
    found = [p.coefficient for p in points if p.coefficient and fails(p)]
    down, up = ([abs(c) for c in found if c * sign > 0] for sign in (-1, 1))
    return min(down, default=None), min(up, default=None)


def _slope(x: Array, change: Float[np.ndarray, "draw point"]) -> Float[np.ndarray, " draw"]:
    """Least squares through the origin: Σ x y / Σ x²."""
    return np.asarray(change @ x / (x @ x))


def _on_a_line(x: Array, change: Float[np.ndarray, "draw point"], reach: float) -> bool:
    """Whether every point up to `reach` lies on the line fitted to these points, within its interval."""
    near = (np.abs(x) <= reach) & (x != 0)
    rest = change[:, near] - _slope(x[near], change[:, near])[:, None] * x[near]
    return not any(estimate_of(column).excludes(0.0) for column in rest.T)

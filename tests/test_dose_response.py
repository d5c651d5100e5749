"""Dose response: planted lines, thresholds and disturbances are recovered, with intervals over tasks."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
from scipy.stats import spearmanr

from lensteer.errors import LensteerError
from lensteer.evaluation import Record, dose_response

B = "backtracking"
LADDER = (-2.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0)


def chains(coefficient, share, *, n_tasks=60, correct=0.8, seed=0, scores=False):
    """Chains of ten sentences on `n_tasks` tasks, whose share of the behavior is `share` on average."""
    rng = random.Random(f"{seed} {coefficient}")
    rows = []
    for t in range(n_tasks):
        own = sum(rng.random() < share for _ in range(10))
        right = rng.random() < correct
        row: dict[str, Any] = dict(
            sentences={B: own}, tokens={B: 4 * own}, n_sentences=10, n_tokens=40, parsed=True, finished=True
        )
        row |= dict(correct=right, length=50, repetition=0.1, scores={B: float(own)} if scores else {})
        rows.append(Record(f"c{coefficient:g}", f"t{t:02d}", 0, **row))
    return rows


def curve(share_of, *, correct=lambda c: 0.8, readable=lambda c: True, **options):
    made = {c: chains(c, share_of(c), correct=correct(c), **options) for c in LADDER}
    return dose_response(made, {c: readable(c) for c in LADDER if c}, B, 4), made


def test_a_planted_line_is_odd_monotone_and_linear():
    found, _ = curve(lambda c: 0.4 + 0.1 * c, n_tasks=200)
    assert found.spearman.value > 0.9
    assert found.spearman.low > 0.6
    assert found.slope.value == pytest.approx(0.1, abs=0.03)
    assert found.slope.excludes(0.0)
    assert found.linear == found.at == 2.0
    assert found.odd.value == pytest.approx(0.2, abs=0.06)
    assert abs(found.even.value) < 0.06
    assert (found.breaks, found.accuracy_falls) == ((None, None), (None, None))


def test_a_disturbance_is_even_and_not_odd():
    found, _ = curve(lambda c: 0.2 + 0.2 * abs(c), n_tasks=200)
    assert abs(found.odd.value) < 0.06
    assert found.even.value == pytest.approx(0.4, abs=0.08)
    assert abs(found.spearman.value) < 0.6
    assert found.linear == 0.0  # no line through zero fits any of it


def test_a_curve_that_saturates_is_linear_only_before():
    found, _ = curve(lambda c: 0.3 + 0.3 * max(-1.0, min(1.0, c)), n_tasks=400)
    assert found.linear == 1.0
    assert found.slope.value == pytest.approx(0.3, abs=0.05)


def test_where_text_and_accuracy_break_is_named_for_each_sign():
    found, _ = curve(
        lambda c: 0.3 + 0.05 * c,
        correct=lambda c: 0.2 if c >= 1 else 0.8,
        readable=lambda c: c > -2,
    )
    assert found.breaks == (2.0, None)
    assert found.accuracy_falls == (None, 1.0)
    assert found.at == 1.0  # the largest coefficient whose both signs can be read
    assert [p.coefficient for p in found.points if not p.readable] == [-2.0]


def test_values_are_those_of_plain_arithmetic():
    found, made = curve(lambda c: 0.3 + 0.1 * c, n_tasks=30)
    shares = [sum(r.sentences[B] for r in made[c]) / (10 * 30) for c in LADDER]
    assert [p.share.value for p in found.points] == pytest.approx(shares)
    assert [p.change.value for p in found.points] == pytest.approx([s - shares[3] for s in shares])
    assert found.spearman.value == pytest.approx(spearmanr(LADDER, shares).statistic)
    near = np.abs(LADDER) <= (found.linear or 9)
    x, y = np.array(LADDER)[near], np.array(shares)[near] - shares[3]
    assert found.slope.value == pytest.approx((x * y).sum() / (x * x).sum())


def test_scores_are_taken_where_there_are_some():
    found, made = curve(lambda c: 0.4 + 0.1 * c, scores=True)
    assert found.points[-1].share.value == pytest.approx(np.mean([r.scores[B] for r in made[2.0]]))


def test_a_flat_curve_has_no_direction():
    found, _ = curve(lambda c: 0.3, n_tasks=100)
    assert abs(found.slope.value) < 0.03
    assert abs(found.odd.value) < 0.06


@pytest.mark.parametrize("kept", [(0.0,), (0.0, 1.0), (0.0, 0.5, 1.0), (-1.0, 1.0)])
def test_too_few_coefficients_are_named(kept):
    made = {c: chains(c, 0.3) for c in kept}
    with pytest.raises(LensteerError, match="a curve needs 0"):
        dose_response(made, {}, B, 4)

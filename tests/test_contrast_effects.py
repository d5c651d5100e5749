"""What vectors of pairs change: planted changes of answers are found, beside controls of the same length."""

from __future__ import annotations

import importlib
import math
import sys
from pathlib import Path

import pytest
import torch

import lensteer as ls
from lensteer.evaluation import Record
from lensteer.evaluation.shares import right_of
from lensteer.positions import Context, TokenTable
from lensteer.statistics import estimate_in

sys.path.append(str(Path(__file__).resolve().parent.parent / "analyses"))  # its modules import one another
contrast_effects = importlib.import_module("contrast_effects")

N = 40
#: No short binary fraction, as measured lengths.
LENGTH = 1.23456789


def answers(condition, right):
    """One answer per task, the first `right` of which are right."""
    return [
        Record(condition, f"t{i:02d}", 0, {}, {}, 0, 0, False, True, i < right, 5, 0.0, scores={}) for i in range(N)
    ]


@pytest.fixture(scope="module")
def conditions(organism):
    vectors = ls.fit_directions(organism, ls.load_pairs("politeness")[:6], layers=[4], n_controls=2)
    return contrast_effects.conditions_of(vectors, 4, [LENGTH, 3.0], 2)


def test_every_length_has_its_own_controls(conditions):
    kinds = [(c.kind, abs(c.plan.edits[0].coefficient)) for c in conditions if c.plan is not None]
    for length in (LENGTH, 3.0):
        of_length = [kind for kind, each in kinds if each == pytest.approx(length)]
        assert sorted(of_length) == ["control"] * 4 + ["down", "up"]
    assert len({c.name for c in conditions}) == len(conditions)
    assert {c.pool for c in conditions if c.kind == "control"} == set(contrast_effects.POOLS)


def test_the_position_whose_logits_begin_the_answer_is_steered():
    table = TokenTable(torch.zeros(1, dtype=torch.bool))
    seen = Context(torch.zeros(1, 6, dtype=torch.long), torch.tensor([1]), torch.tensor([3]), table)
    assert contrast_effects.ANSWERING.mask(seen)[0].tolist() == [False, False, False, True, True, True]
    assert ls.generated.mask(seen)[0].tolist() == [False, False, False, False, True, True]


def test_planted_changes_are_found_and_ranked_among_controls_as_long(conditions):
    right = {"unsteered": 20, "politeness/up/1.23457": 12, "politeness/down/1.23457": 20, "politeness/up/3": 30}
    records = [
        r for c in conditions for r in answers(c.name, right.get(c.name, 21 if c.name.endswith("/1.23457") else 36))
    ]
    found = contrast_effects.changes_of(records, conditions, {"right": right_of, "nothing": lambda r: (0.0, 0.0)})
    assert {c.figure for c in found} == {"right"}  # what no chain has is left out
    by = {(c.length, c.sign): c for c in found}
    up = by[LENGTH, 1]
    assert up.change.value == pytest.approx(-8 / N)
    assert up.change.excludes(0.0)
    assert (up.rank, up.controls, up.low_control) == (1, 4, pytest.approx(1 / N))
    assert by[LENGTH, -1].change.value == 0
    assert by[LENGTH, -1].rank == 5  # all controls go as far
    assert by[3.0, 1].change.value == pytest.approx(10 / N)
    assert by[3.0, 1].rank == 5  # those of length 3, not the shorter ones
    assert len(contrast_effects.lines_of(found)) == 1 + len(found)


def test_without_controls_ranks_say_nothing_and_lengths_are_checked(conditions):
    few = [c for c in conditions if c.kind != "control"]
    records = [r for c in few for r in answers(c.name, 20)]
    assert all(math.isnan(c.low_control) for c in contrast_effects.changes_of(records, few, {"right": right_of}))
    with pytest.raises(ls.LensteerError, match="length 0"):
        contrast_effects.conditions_of(None, 4, [0.0], 1)


def test_beyond_needs_an_interval_without_zero_and_no_control_as_far():
    change = dict(change=dict(value=0.2, low=0.1, high=0.3), rank=1)
    assert contrast_effects.beyond(change)
    assert not contrast_effects.beyond({**change, "rank": 2})
    assert not contrast_effects.beyond({**change, "change": dict(value=0.2, low=-0.1, high=0.3)})
    assert f"{estimate_in(change, 'change'):+.2f}" == "+0.20 [+0.10, +0.30]"

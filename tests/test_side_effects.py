"""Side effects: planted changes of answers, length and other behaviors are found, and nothing else is."""

from __future__ import annotations

import random
from typing import Any

import pytest

from lensteer.evaluation import Condition, Record, side_effects, summarize

B, OTHER = "backtracking", "deduction"


def chains(condition, *, n_tasks=80, correct=0.8, length=60, other=0.3, answer=True):
    rng = random.Random(condition)
    rows = []
    for t in range(n_tasks):
        hits, right = sum(rng.random() < other for _ in range(10)), rng.random() < correct
        row: dict[str, Any] = dict(
            sentences={B: 1, OTHER: hits}, tokens={B: 4, OTHER: 4 * hits}, n_sentences=10, n_tokens=40
        )
        row |= dict(parsed=True, finished=True, correct=right if answer else None, repetition=0.1)
        row |= dict(answered=True if answer else None, length=length + rng.randrange(10))
        rows.append(Record(condition, f"t{t:02d}", 0, **row))
    return rows


CONDITIONS = (
    Condition("unsteered", kind="unsteered"),
    Condition(f"{B}/up", kind="up", behavior=B),
    Condition("L4/isotropic-0", kind="control", pool="isotropic"),
)


def found_of(up, **base):
    rows = {"unsteered": chains("unsteered", **base), f"{B}/up": up, "L4/isotropic-0": chains("L4/isotropic-0")}
    return {e.measured: e for e in side_effects(rows, CONDITIONS, "unsteered")}


def test_planted_changes_are_found_and_their_sizes_recovered():
    found = found_of(chains(f"{B}/up", correct=0.4, length=90, other=0.6))
    assert found["accuracy"].change.value == pytest.approx(-0.4, abs=0.25)
    assert found["accuracy"].change.high < 0
    assert found["length"].change.value == pytest.approx(30, abs=3)
    assert found[OTHER].change.value == pytest.approx(0.3, abs=0.1)
    assert found[OTHER].change.low > 0
    for name in ("accuracy", "length", OTHER):
        assert found[name].p < 0.001
    for name in ("repetition", "finished", "answered"):
        assert found[name].change.value == 0
        assert found[name].p == 1
    assert B not in found  # its own behavior is an effect, not a side effect


def test_nothing_is_found_where_nothing_was_planted():
    found = found_of(chains(f"{B}/up"))
    assert all(e.p > 0.001 for e in found.values())
    assert {e.condition for e in found.values()} == {f"{B}/up"}  # control vectors are not compared


def test_tasks_without_an_answer_leave_accuracy_out():
    found = found_of(chains(f"{B}/up", answer=False), answer=False)
    assert "accuracy" not in found
    assert "answered" not in found
    assert OTHER in found


def test_an_evaluation_has_them():
    rows = [*chains("unsteered"), *chains(f"{B}/up", other=0.6)]
    evaluation = summarize(rows, CONDITIONS[:2])
    by_name = {e.measured: e for e in evaluation.side_effects}
    assert by_name[OTHER].p < 0.001
    frame = evaluation.side_effects_dataframe()
    assert set(frame["measured"]) == set(by_name)
    assert type(evaluation).from_dict(evaluation.to_dict()).to_dict() == evaluation.to_dict()

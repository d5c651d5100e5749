"""Length of answers on GSM8K: pairs from published solutions, rows from answers, refusals, and what is said."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import lensteer as ls
from lensteer.evaluation import Condition, Record
from lensteer.tasks.benchmarks import Solved

sys.path.append(str(Path(__file__).resolve().parent.parent / "analyses"))  # its modules import one another
analysis = importlib.import_module("length_control")

STEPS = "Ann sold 48/2 = 24 clips in May.\nShe sold 48 + 24 = 72 clips, for $0.50*72 = $36.00."


def solved(i=0, steps=STEPS):
    return Solved(ls.Task(f"q{i}", "gsm8k", "dev", f"How many clips did Ann number {i} sell?", "36", "numeric"), steps)


def test_a_solution_in_equations_keeps_the_calculation_alone():
    assert analysis.in_equations(solved()) == "48/2 = 24. 48 + 24 = 72. $0.50*72 = $36.00. The answer is 36."
    pairs = analysis.pairs_of([solved(i) for i in range(4)], 3, seed=0)
    assert len({pair.positive.prompt for pair in pairs}) == 3
    assert all(pair.positive.completion == f"{STEPS}\nThe answer is 36." for pair in pairs)
    with pytest.raises(ls.LensteerError, match="3 pairs, but 1 training questions"):
        analysis.pairs_of([solved(0), solved(1, "It is 36.")], 3, seed=0)


def answers(condition, length, right, finished=30):
    return [
        Record(
            condition, f"t{i:02d}", 0, {}, {}, 0, 0, False, i < finished, i < right, length + i % 5, 0.0, answered=True
        )
        for i in range(30)
    ]


@pytest.fixture(scope="module")
def conditions(organism):
    vectors = ls.fit_directions(organism, ls.load_pairs("politeness")[:6], layers=[4], n_controls=1)
    return analysis.conditions_of(vectors, 4, [2.0], 1)


def test_planted_lengths_and_right_answers_are_rows(conditions):
    planted = {"up": (150, 9), "down": (60, 20), "control": (102, 21), "unsteered": (100, 20)}
    rows = analysis.rows_of([r for c in conditions for r in answers(c.name, *planted[c.kind])], conditions)
    by = {row.kind: row for row in rows if row.kind != "control"}
    assert [row.kind for row in rows].count("control") == 2
    assert by["up"].length.value == pytest.approx(50)
    assert by["up"].accuracy.value == pytest.approx(-11 / 30)
    assert by["up"].accuracy.high < 0
    assert by["down"].length.value == pytest.approx(-40)
    assert by["down"].accuracy.value == 0
    assert (by["up"].coefficient, by["up"].unsteered_finished) == (2.0, 1.0)
    values = json.loads(analysis.to_json("m", rows))
    text, shown = analysis.answer(values)
    assert shown
    assert "2 of 2 edits change the length beyond all control vectors" in text
    assert "Control vectors as long change length by at most 2 tokens." in text
    assert len(analysis.draw(rows).data) == 4
    for row in values["rows"]:
        if row["kind"] == "control":
            row["length"]["value"] = 50.0
    assert not analysis.answer(values)[1]  # a control goes as far as a part of the interval


def test_answers_that_do_not_end_have_no_length(conditions):
    plain = [Condition("unsteered", kind="unsteered"), *conditions[1:]]
    records = [r for c in plain for r in answers(c.name, 100, 20, finished=10)]
    with pytest.raises(ls.LensteerError, match="33% of the unsteered chains end"):
        analysis.rows_of(records, plain)


@pytest.mark.medium
def test_a_small_run_on_the_organism_reaches_the_check(tmp_path):
    for name, n in (("train", 9), ("test", 5)):
        lines = [dict(question=f"{name} {i}: how many clips?", answer=f"{STEPS}\n#### 36") for i in range(n)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    config = analysis.smoke(analysis.OnLanguage(tmp_path, folder=tmp_path / "out"))
    with pytest.raises(ls.LensteerError, match="of the unsteered chains end"):
        analysis.on_language(config)
    assert len((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == 1 + 4 * (1 + 2 + 2)
    with pytest.raises(ls.LensteerError, match="n_questions=9: 5 have 2 steps or fewer"):
        analysis.on_language(analysis.replace(config, n_questions=9))

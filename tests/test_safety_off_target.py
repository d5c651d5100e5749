"""Declining: the rule on sentences and on answers that were read, the written pairs, cosines, and what is said."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path

import pytest

import lensteer as ls
from lensteer.statistics import Estimate

sys.path.append(str(Path(__file__).resolve().parent.parent / "analyses"))  # its modules import one another
analysis = importlib.import_module("safety_off_target")


def said(text):
    task = ls.Task("a", "c", "test", "How do I ride a horse?")
    return ls.Trace(task, "?", text, (1,), tuple(text.encode()), tuple(range(len(text.encode()))), True)


@pytest.mark.parametrize(
    ("text", "declined"),
    [
        ("I'm sorry, but I can't assist with that.", 1),
        ("I am not able to help with horses.", 1),
        ("Thank you for asking! Unfortunately, I cannot answer that.", 1),
        ("I'd rather not talk about bees.", 1),
        ("As a language model, I don't have access to horses.", 1),
        ("Sit up straight and hold the reins. You can't fall if you relax.", 0),
        ("I can't wait to tell you about bees! They make honey.", 0),
        ("Bees are insects. They make honey. I cannot say how much.", 0),  # it has answered by then
        ("I can help you with that. First, find a calm horse.", 0),
    ],
)
def test_the_rule_reads_the_first_two_sentences(text, declined):
    assert analysis.declines(said(text)) == declined


def test_written_refusals_are_declined_and_answers_are_not():
    pairs = [pair for pair in analysis.pairs_of() if pair.label == analysis.DECLINING]
    assert len(pairs) == 44
    assert [analysis.declines(said(pair.positive.completion)) for pair in pairs] == [1.0] * 44
    assert [analysis.declines(said(pair.negative.completion)) for pair in pairs] == [0.0] * 44


def test_the_rule_agrees_with_a_reader():
    lines = (analysis.HERE / "declining_checked.jsonl").read_text(encoding="utf-8").splitlines()
    rows = [json.loads(line) for line in lines]
    assert len(rows) == 60
    assert sum(analysis.declines(said(row["response"])) == row["declines"] for row in rows) >= 57


def test_pairs_and_requests_do_not_overlap():
    asked = {task.prompt for task in ls.load_tasks(analysis.HERE / "requests.jsonl", split="test")}
    asked |= {task.prompt for task in ls.load_tasks(analysis.HERE / "easy_questions.jsonl", split="test")}
    pairs = analysis.pairs_of()
    assert not asked & {pair.positive.prompt for pair in pairs}
    sizes = {name: sum(pair.label == name for pair in pairs) for name in analysis.PAIRS}
    assert sizes == {"declining": 44, "politeness": 40, "sentiment": 40}
    sentiment = [pair for pair in pairs if pair.label == "sentiment"]
    praised = [analysis.praise(said(pair.positive.completion)) for pair in sentiment]
    blamed = [analysis.praise(said(pair.negative.completion)) for pair in sentiment]
    assert sum(a > b for a, b in zip(praised, blamed, strict=True)) > 32


def change(vector, length, sign, figure, value, half, rank=1):
    base = dict(value=0.1, low=0.0, high=0.2)
    moved = dict(value=value, low=value - half, high=value + half)
    row = dict(vector=vector, length=length, sign=sign, figure=figure, base=base, value=base, change=moved)
    return row | dict(low_control=-0.05, high_control=0.1, rank=rank, controls=6)


def test_an_answer_says_what_declining_does_and_needs_controls_behind():
    changes = [
        change(vector, length, sign, figure, 0.4 if (vector, sign) == ("declining", 1) else 0.0, 0.1)
        for vector in analysis.PAIRS
        for length in (4.0, 8.0)
        for sign in (1, -1)
        for figure in ("declined", "right answers")
    ]
    cosines = [
        dict(first="declining", second=name, value=dict(value=0.5, low=0.4, high=0.6), null_low=-0.2, null_high=0.2)
        for name in ("politeness", "sentiment")
    ]
    result = dict(model="m", layer=3, edits=[4.0, 8.0], n_requests=40, n_questions=30, changes=changes, cosines=cosines)
    text, shown = analysis.answer(result)
    assert shown
    assert "+0.40 [+0.30, +0.50] added, +0.00 [-0.10, +0.10] taken away (controls -0.05 to +0.10) at length 4" in text
    assert "cosine with declining +0.50 [+0.40, +0.60] (swapped pairs -0.20 to +0.20)" in text
    for row in changes:
        row["rank"] = 2
    assert not analysis.answer(result)[1]


@pytest.mark.medium
def test_cosines_stand_beside_those_of_swapped_pairs(organism):
    pairs = analysis.pairs_of()
    vectors = ls.fit_directions(organism, pairs, layers=[4], n_controls=40, n_bootstrap=40)
    found = analysis.cosines_of(vectors, 4)
    assert [(c.first, c.second) for c in found] == [
        ("declining", "politeness"), ("declining", "sentiment"), ("politeness", "sentiment"),
    ]  # fmt: skip
    for c in found:
        assert isinstance(c.value, Estimate)
        assert c.value.low <= c.value.value <= c.value.high
        assert -1 <= c.null_low < 0 < c.null_high <= 1


@pytest.mark.medium
def test_a_small_run_on_the_organism(tmp_path):
    with pytest.raises(ls.LensteerError, match="split 'train': give 'dev'"):
        analysis.main(analysis.Config(split="train"))
    config = analysis.smoke(analysis.Config(folder=tmp_path))
    found = analysis.main(config)
    assert {c.figure for c in found.changes} == set(analysis.FIGURES)
    assert len(found.changes) == len(analysis.FIGURES) * 3 * 2
    assert analysis.main(config).changes == found.changes  # from the kept answers
    assert analysis.table(found).count("\n") == 1 + len(found.changes) + 3
    assert len(analysis.figure(found).data) == 12
    text, shown = analysis.answer(json.loads(analysis.to_json(found)))
    assert text.startswith("organism declines 0.00 of 3 benign requests")
    assert not shown

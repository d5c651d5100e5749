"""Spans that are reproduced from their onsets: planted continuations, and the organism, whose grammar is known."""

from __future__ import annotations

import dataclasses

import pytest

import lensteer as ls
from lensteer import models
from lensteer.annotation import stability
from lensteer.annotation.stability import Stability, stable_spans
from lensteer.errors import LensteerError
from lensteer.generation import Generated
from lensteer.generation.jobs import trace_of

pytestmark = pytest.mark.medium

DOUBT, KNOW, TURN = "Maybe B is not right.", "We know B goes with C.", "Hmm, drop B and use C again."
#: Label → sentences, of which the continuations at each place are drawn.
SAID = {"uncertainty-estimation": DOUBT, "adding-knowledge": KNOW, "backtracking": TURN}


def chain(model, sentences, number=0) -> ls.Trace:
    """A chain of the organism with these sentences, annotated by its grammar."""
    task = ls.load_tasks(split="dev", n=number + 1)[number]
    prompt = models.chat_text(model, task.prompt)
    ids = models.encode(model, " ".join(sentences))
    response, offsets = models.decode_offsets(model.tokenizer, ids)
    trace = ls.Trace(task, prompt, response, tuple(models.encode(model, prompt)), tuple(ids), tuple(offsets), False)
    return ls.annotate([trace], ls.grammar)[0]


@pytest.fixture
def planned(monkeypatch, organism):
    """Continuations as planned, by the tokens before them."""
    plan: dict[tuple[int, ...], list[str]] = {}

    def resume(model, jobs, sampling, **options):
        made = []
        for job in jobs:
            said = plan[job.prompt_ids][job.sample]
            made.append(trace_of(model, job, Generated(tuple(models.encode(model, said)), False)))
        return made

    monkeypatch.setattr(stability, "resume_jobs", resume)
    return plan


def test_shares_rows_and_the_filter_are_those_of_the_continuations(organism, planned):
    trace = chain(organism, [DOUBT, KNOW, TURN, DOUBT])
    assert [span.label for span in trace.spans] == [*SAID, "uncertainty-estimation"]
    first, second, _, fourth = trace.spans
    before = [trace.ids[: span.start] for span in trace.spans]
    planned[before[0]] = [DOUBT, DOUBT, KNOW, TURN]
    planned[before[1]] = [f" {KNOW}"] * 3 + [f" {DOUBT}"]
    planned[before[2]] = [f" {DOUBT}", f" {KNOW}", f" {TURN}", "\n</think>\n\nC"]  # the thought ends: no sentence
    planned[before[3]] = [f" {DOUBT} {KNOW}", f" {DOUBT}", " Maybe B", f" {TURN}"]  # one is cut off
    (kept,), report = stable_spans(organism, [trace], ls.grammar, n=4, threshold=0.5, truth=ls.grammar)
    assert report.shares == ((0.5, 0.75, 0.25, 0.5),)
    assert kept.spans == (first, second, fourth)
    assert kept.response_ids == trace.response_ids
    rows = {row.label: row for row in report.rows}
    doubt = rows["uncertainty-estimation"]
    assert (doubt.n_spans, doubt.n_kept) == (2, 2)
    assert doubt.reproduced.value == pytest.approx(0.5)
    assert doubt.elsewhere.value == pytest.approx(0.25)  # one of four at each of two places
    assert rows["backtracking"].kept.value == 0
    assert rows["backtracking"].right_dropped.value == 1
    assert rows["adding-knowledge"].right_kept.value == 1
    assert report.unstable.value == pytest.approx(0.25)
    assert list(report.to_dataframe()["label"]) == [row.label for row in report.rows]
    (some,), part = stable_spans(organism, [trace], ls.grammar, n=4, threshold=0.5, behaviors=["backtracking"])
    assert some.spans == (first, second, fourth)  # the others are not tested
    assert [share == share for share in part.shares[0]] == [False, False, True, False]


def test_wrong_labels_of_a_keyword_are_left_out_where_the_model_does_not_repeat_them(organism, planned):
    """A planted annotator takes every "Hmm" for doubt; the model goes on as it did, so the wrong one is not stable."""

    @ls.labeling(*ls.BEHAVIORS)
    def keyword(traces):
        return [
            [dataclasses.replace(s, label="uncertainty-estimation") if "Hmm" in s.text else s for s in sentences]
            for sentences in ls.grammar(traces)
        ]

    traces = [ls.annotate([chain(organism, [DOUBT, KNOW, TURN], number)], keyword)[0] for number in range(3)]
    for trace in traces:
        right, other, wrong = (trace.ids[: span.start] for span in trace.spans)
        planned[right] = [DOUBT, DOUBT, KNOW, DOUBT]
        planned[other] = [f" {KNOW}"] * 4
        planned[wrong] = [f" {TURN}", " Let us leave B for C.", " No, return to C.", " Actually C was better."]
    kept, report = stable_spans(organism, traces, keyword, n=4, truth=ls.grammar)
    (doubt,) = [row for row in report.rows if row.label == "uncertainty-estimation"]
    assert (doubt.n_spans, doubt.n_kept) == (6, 3)
    assert (doubt.right_kept.value, doubt.right_dropped.value) == (1, 0)
    assert [len(trace.spans) for trace in kept] == [2, 2, 2]


def test_on_the_organism_the_first_sentence_is_certain_and_runs_are_resumed(organism, tmp_path, monkeypatch):
    tasks = ls.load_tasks(split="dev", n=3)
    traces = ls.annotate(ls.generate_traces(organism, tasks, temperature=1.0, max_new_tokens=100), ls.grammar)
    options = dict(n=4, max_new_tokens=14, path=tmp_path / "drawn.jsonl")
    kept, report = stable_spans(organism, traces, ls.grammar, **options)
    rows = {row.label: row for row in report.rows}
    # Every chain of the grammar begins with two initializing sentences, and has none later.
    assert rows["initializing"].reproduced.value > 0.8 > 0.2 > rows["initializing"].elsewhere.value
    assert all(0 <= row.kept.low <= row.kept.value <= row.kept.high <= 1 for row in report.rows)
    assert sum(len(trace.spans) for trace in kept) == sum(row.n_kept for row in report.rows)
    monkeypatch.setattr("lensteer.generation.jobs.generate", None)
    again, same = stable_spans(organism, traces, ls.grammar, **options)
    assert again == kept
    report.save(tmp_path / "report.json")
    assert repr(Stability.load(tmp_path / "report.json")) == repr(report) == repr(same)


def test_what_cannot_be_tested_is_an_error(organism):
    trace = chain(organism, [DOUBT])
    with pytest.raises(LensteerError, match=r"no span with one of \['backtracking'\] in 1 traces"):
        stable_spans(organism, [trace], ls.grammar, behaviors=["backtracking"])
    for options in (dict(threshold=0.0), dict(n=0), dict(temperature=0.0)):
        with pytest.raises(LensteerError, match="at least one continuation"):
            stable_spans(organism, [trace], ls.grammar, **options)

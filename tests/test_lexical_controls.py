"""Wordings: their groups, vectors that are fitted on one group, and shares of the other."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

import lensteer as ls
from lensteer.evaluation import MEAN, Counts, Record
from lensteer.pipeline import Run
from lensteer.traces import load_traces
from scripts import load

ROOT = Path(__file__).resolve().parent.parent
B = "backtracking"


def test_wordings_of_sentences():
    analysis = load("lexical_controls")
    assert analysis.form("Wait, B fails, back to exit.") == ["Wait, _ fails, back to _."]
    assert analysis.cues("But wait,  Maybe I’m not sure.") == ["wait", "maybe", "not sure"]
    assert analysis.cues("Let’s see, wait.") == ["let's see", "wait"]
    assert analysis.cues("Another thing: awaited.") == ["another"]
    assert analysis.cues("…") == ["…"]


def test_groups_are_as_equal_as_they_get_and_a_sentence_of_both_is_in_neither():
    analysis = load("lexical_controls")
    texts = ["Wait, no."] * 6 + ["Alternatively, 3."] * 4 + ["Maybe 5."] * 3 + ["Hmm."]
    split = analysis.Split.of(texts, analysis.cues)
    assert dict(split.group) == {"wait": "0", "alternatively": "1", "maybe": "1", "hmm": "0"}
    assert split("Wait, hmm, 7.") == "0"
    assert split("Maybe alternatively 7.") == "1"
    assert split("Wait, maybe not.") == analysis.MIXED
    assert split("So, perhaps 7.") in analysis.GROUPS  # unknown wordings
    assert split("So, perhaps 7.") == split("So 8.")


def test_the_annotator_says_the_group():
    analysis = load("lexical_controls")
    split = analysis.Split(lambda text: [text], {"Wait.": "0", "No.": "1"})
    found = [[ls.Sentence(B, "Wait."), ls.Sentence("deduction", "Wait."), ls.Sentence(B, "No.")]]
    labeled = analysis.by_wording(lambda traces: found, {B: split})([])
    assert [sentence.label for sentence in labeled[0]] == [f"{B}/0", "deduction", f"{B}/1"]


def records_of(analysis: ModuleType, counts: dict[str, tuple[int, int, int]]) -> list[Record]:
    """By condition, sentences of both groups of wordings and of neither, of 20; cue words hide half of them."""
    made = []
    for name, each in counts.items():
        of = dict(zip((f"{B}/0", f"{B}/1", f"{B}/{analysis.MIXED}"), each, strict=True))
        others = {
            by: Counts({B: sum(each) // part}, {}, 20, 60)
            for by, part in ((analysis.PLAIN, 1), (analysis.CUES_MASKED, 2), (analysis.RANDOM_MASKED, 1))
        }
        made += [
            Record(name, str(task), 0, of, {}, 20, 60, True, True, True, 80, 0.0, others=others) for task in range(4)
        ]
    return made


def test_what_a_vector_was_fitted_on_is_told_from_what_it_was_not():
    analysis = load("lexical_controls")
    counts = {"unsteered": (1, 1, 0), f"{B}/all": (4, 4, 2), f"{B}/0": (6, 2, 0), f"{B}/1": (3, 4, 0)}
    counts |= {f"{B}/control-0": (1, 2, 0), f"{B}/control-1": (2, 1, 0)}
    (row,) = analysis.rows_of(records_of(analysis, counts), (B,))
    assert row.whole.value == pytest.approx(0.4)
    assert row.full.value == pytest.approx(0.15)
    assert row.seen.value == pytest.approx((0.25 + 0.15) / 2)
    assert row.unseen.value == pytest.approx((0.05 + 0.10) / 2)
    assert row.control.value == pytest.approx(0.025)
    assert row.beyond.low == pytest.approx(0.05)
    assert row.left.value == pytest.approx(0.5)
    assert (row.plain.value, row.masked.value, row.random.value) == pytest.approx((0.4, 0.2, 0.4))


@pytest.mark.medium
def test_a_small_run_on_the_organism_and_its_answer(tmp_path, monkeypatch):
    analysis = load("lexical_controls")
    config = analysis.smoke(analysis.Config(load("command").small_run(tmp_path / "run")))
    result = analysis.main(config)
    assert [row.behavior for row in result.rows] == ["backtracking", "uncertainty-estimation", MEAN]
    assert len(result.groups) == 4
    run = Run.open(config.run)
    vectors = ls.BehaviorVectors.load(run.path("vectors.safetensors"))
    traces = load_traces(run.path("annotated.jsonl"))
    splits = analysis.Split.of(["Wait, B fails, back to C."], analysis.form)
    found = analysis.directions(analysis.span_features(run, [4]), traces, vectors.recipe, B, 4, splits)
    assert torch.allclose(found["all"].at(4), vectors[B].at(4), atol=1e-3)
    for group in result.groups:
        assert group.mixed == 0  # a sentence of the organism has one form
        assert group.cosine_all > 0.9
    monkeypatch.setattr("lensteer.generation.jobs.generate", None)
    monkeypatch.setattr(analysis, "fit_classifier", None)
    assert analysis.main(config) == result  # from its files
    with pytest.raises(ls.LensteerError, match="steers"):
        analysis.main(analysis.replace(config, behaviors=("adding-knowledge",)))
    assert len(analysis.figure(result).data) == 2 * len(result.rows)
    assert analysis.table(result).count("\n") == 2 + len(result.rows) + len(result.groups)
    said, shown = analysis.answer(json.loads(analysis.to_json(result)))
    assert f"{result.rows[-1].unseen:+.3f} on average" in said
    assert shown == (result.rows[-1].unseen.low > 0 and result.rows[-1].beyond.low > 0)


def test_the_answer_of_one_behavior():
    analysis = load("lexical_controls")
    row: dict[str, Any] = {"behavior": B}
    for name in ("full", "unseen", "control", "beyond", "masked", "plain", "random"):
        row |= {name: 0.2, f"{name}_low": 0.1, f"{name}_high": 0.3}
    said, shown = analysis.answer(dict(model="mini-r1", n_tasks=50, rows=[row]))
    assert shown
    assert f"by +0.200 [+0.100, +0.300] of {B} (50 tasks)" in said
    assert f"for {B}." in said
    said, shown = analysis.answer(dict(model="mini-r1", n_tasks=50, rows=[{**row, "beyond_low": -0.1}]))
    assert not shown
    assert "for no behavior." in said

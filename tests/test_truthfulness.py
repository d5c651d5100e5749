"""A direction of truth: statements that words alone cannot tell apart, planted activations, nulls, and what is said."""

from __future__ import annotations

import importlib
import json
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch

import lensteer as ls
from lensteer.contrast.fitting import encode_text

sys.path.append(str(Path(__file__).resolve().parent.parent / "analyses"))  # its modules import one another
analysis = importlib.import_module("truthfulness")

SUBJECTS = ["a"] * 10 + ["b"] * 10 + ["c"] * 10


def planted(size, seed=0, of_subject=0.0):
    """[pair, side, 2 layers, 8]: at layer 1 true statements are further along one direction by `size`."""
    draw = torch.randn(30, 2, 2, 8, generator=torch.Generator().manual_seed(seed))
    draw[:, 0, 1, 0] += size
    draw[:, 0, 1, 1] += torch.tensor([of_subject, -of_subject, 0.0]).repeat_interleave(10)  # turns with the subject
    return draw


def values(activations, read=None, draws=0):
    swaps = np.random.default_rng(0).choice([-1.0, 1.0], size=(draws, 30))
    signs = torch.from_numpy(np.vstack([np.ones(30), swaps]))
    return analysis.wins(activations, activations if read is None else read, SUBJECTS, signs)


def test_a_direction_that_subjects_share_is_read_on_held_out_ones():
    ordered = values(planted(2.5), draws=100)
    flat, found = analysis.aurocs(ordered[0], seed=0)
    assert found.low > 0.8
    assert found.low < found.value < found.high
    assert flat.low < 0.5 < flat.high
    null = np.nanmean(ordered[1:], axis=(2, 3))
    assert null.max() < found.value
    assert abs(null.mean() - 0.5) < 0.05
    assert np.isnan(ordered[0, 1, 0, 10])  # statements of two subjects are not compared
    read_backwards = planted(2.5).flip(1)
    assert analysis.aurocs(values(planted(2.5), read_backwards)[0], seed=0)[1].high < 0.2


def test_a_direction_of_one_subject_alone_is_not():
    found = analysis.aurocs(values(planted(0.0, of_subject=4.0))[0], seed=0)[1]
    assert found.value < 0.6


def test_one_subject_cannot_be_held_out():
    with pytest.raises(ls.LensteerError, match="all pairs are of 'a': one subject is held out"):
        analysis.wins(planted(1.0)[:10], planted(1.0)[:10], SUBJECTS[:10], torch.ones(1, 10))


def test_words_alone_do_not_tell_the_statements_apart():
    pairs, subjects = analysis.truths(7)
    assert len(pairs) == 84
    assert Counter(subjects) == dict.fromkeys(subjects, 12)
    for subject in set(subjects):
        sides = [Counter(), Counter()]
        for pair, each in zip(pairs, subjects, strict=True):
            if each == subject:
                for words, side in zip(sides, (pair.positive, pair.negative), strict=True):
                    words.update(side.completion.rstrip(".").split())
        assert sides[0] == sides[1]
    denied = analysis.negated(pairs[0])
    assert denied.positive.completion == "The capital of France is not Cairo."
    assert denied.negative.completion == "The capital of France is not Paris."
    assert all(pair.positive.completion.count(" is ") == 1 for pair in pairs)


def test_questions_have_an_answer_that_the_grader_reads():
    for split, n in (("dev", 8), ("test", 40)):
        tasks = ls.load_tasks(analysis.HERE / "easy_questions.jsonl", split=split)
        assert len(tasks) == n
        assert all(ls.tasks.values.grade(task, str(task.answer)) for task in tasks)
    letters = Counter(task.answer for task in tasks if task.grader == "choice")
    assert set(letters) == set("ABCD")
    assert max(letters.values()) - min(letters.values()) <= 2


@pytest.mark.medium
def test_the_direction_is_that_of_fit_directions(organism):
    pairs, _ = analysis.truths(2)
    seen = analysis.activations(organism, pairs)
    vectors = ls.fit_directions(organism, pairs)
    torch.testing.assert_close((seen[:, 0] - seen[:, 1]).mean(0), vectors.raw[0], atol=1e-4, rtol=1e-4)
    assert encode_text(organism, pairs[0].positive)[1].n_prompt > 1


@pytest.mark.medium
def test_a_small_run_on_the_organism_says_what_it_found(tmp_path):
    config = analysis.smoke(analysis.Config(folder=tmp_path))
    found = analysis.main(config)
    assert [r.layer for r in found.readings] == list(range(8))
    assert set(found.by_subject) == {"capitals", "animals", "sums"}
    assert analysis.main(config).changes == found.changes  # from the kept answers
    assert analysis.table(found).count("\n") > 8
    assert len(analysis.figure(found).data) >= 6
    values = json.loads(analysis.to_json(found))
    text, shown = analysis.answer(values)
    assert text.startswith("On organism, the direction tells true from false")
    assert not shown  # an organism of worlds of colored things knows no capital


def test_an_answer_needs_both_reading_and_steering():
    best = dict(layer=0, auroc=dict(value=0.9, low=0.8, high=0.95), negated=dict(value=0.7, low=0.6, high=0.8))
    change = dict(
        figure="right answers", sign=-1, length=3.0, base=dict(value=0.6), low_control=-0.05, high_control=0.05, rank=1
    )
    change["change"] = dict(value=-0.2, low=-0.3, high=-0.1)
    result = dict(model="m", readings=[best], best=0, p=0.005, layer=0, n_pairs=84, n_questions=40, changes=[change])
    text, shown = analysis.answer(result)
    assert shown
    assert "AUROC of 0.90 [0.80, 0.95] at layer 0" in text
    assert "by -3 -0.20 [-0.30, -0.10] (controls -0.05 to +0.05)" in text
    assert not analysis.answer({**result, "p": 0.2})[1]
    backwards = {**best, "negated": dict(value=0.2, low=0.1, high=0.3)}
    text, shown = analysis.answer({**result, "readings": [backwards]})
    assert not shown
    assert "so it reads which words go together and not truth" in text
    assert not analysis.answer({**result, "changes": [{**change, "rank": 2}]})[1]

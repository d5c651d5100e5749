"""Stated doubt against errors: the AUROC is that of scikit-learn, and planted relations are recovered."""

from __future__ import annotations

import dataclasses
import json
from typing import Any

import numpy as np
import pytest
from sklearn.metrics import roc_auc_score

import lensteer as ls
from lensteer.evaluation import Record
from lensteer.pipeline import DEMO, STAGES, Run, run_stage
from lensteer.traces import save_traces
from scripts import load

DOUBT = "uncertainty-estimation"


@pytest.fixture(scope="module")
def analysis():
    return load("calibration_under_uncertainty")


def record(condition: str, task: int, doubt: int, correct: bool, *, finished: bool = True, length: int = 50) -> Record:
    return Record(condition, f"t{task:02d}", 0, {DOUBT: doubt}, {}, 10, 40, True, finished, correct, length, 0.1)


def test_auroc_is_the_one_of_scikit_learn_under_weights_and_within_groups(analysis):
    rng = np.random.default_rng(0)
    score, wrong = rng.integers(0, 4, 60).astype(float), rng.random(60) < 0.4
    weight = np.vstack([np.ones(60), rng.poisson(1, 60)])
    found = analysis.auroc(score, wrong, weight)
    assert found == pytest.approx([roc_auc_score(wrong, score, sample_weight=w) for w in weight])
    group = np.arange(60) % 2
    pairs = [
        (score[i] > score[j]) + 0.5 * (score[i] == score[j])
        for i in np.flatnonzero(wrong)
        for j in np.flatnonzero(~wrong)
        if group[i] == group[j]
    ]
    assert analysis.auroc(score, wrong, weight[:1], group)[0] == pytest.approx(np.mean(pairs))
    assert np.isnan(analysis.auroc(score, np.zeros(60, bool), weight)).all()


def test_planted_relations_are_recovered(analysis):
    records = []
    for t in range(40):
        wrong = t % 4 == 0
        records.append(record("unsteered", t, 2 if wrong else t % 4 == 1, not wrong, length=50 + t))
        records.append(record("subtracted", t, 0, not wrong))  # never states doubt
        records.append(record("added", t, 3, t % 2 == 0, finished=t < 30))
    rows = {r.condition: r for r in analysis.rows_of(records, {"unsteered": 0.0, "subtracted": -1.0, "added": 1.0})}
    plain, less, more = rows["unsteered"], rows["subtracted"], rows["added"]
    assert plain.accuracy.value == pytest.approx(0.75)
    assert plain.doubting.value == pytest.approx(0.5)
    assert plain.gap.value == pytest.approx(-0.5)  # half of those that doubt are wrong, none of the others
    assert plain.auroc.value == pytest.approx(1.0)
    assert plain.equal_length.value == pytest.approx(1.0)
    assert 0.4 < plain.length.value < 0.6
    assert np.isnan(less.auroc.value)
    assert np.isnan(less.gap.value)
    assert less.accuracy_change.value == 0
    assert more.n_chains == 30
    assert more.finished.value == pytest.approx(0.75)
    assert more.accuracy_change.value == pytest.approx(-0.25)
    assert more.auroc.value == pytest.approx(0.5)  # all doubt alike
    assert np.isnan(more.gap.value)
    result = analysis.Result("a model", "tasks", "rules", 4, 40, tuple(rows.values()))
    words, shown = analysis.answer(json.loads(analysis.to_json(result)))
    assert shown
    assert "-50.0 [" in words
    assert "AUROC is 0.50" in words
    same = analysis.Result(
        "a model", "tasks", "rules", 4, 40, (plain, less, dataclasses.replace(less, condition="added"))
    )
    assert "the AUROC is not defined" in analysis.answer(json.loads(analysis.to_json(same)))[0]


@pytest.mark.medium
def test_a_small_run_and_given_chains(analysis, tmp_path):
    sizes: dict[str, Any] = dict(
        n_train=24, n_dev=6, n_test=2, n_controls=1, n_score_controls=1, score_chains=4, max_spans=5, quality=2
    )
    small = dataclasses.replace(DEMO, **sizes, layers=(4,), coefficients=(0.1,), behaviors=(DOUBT,))
    run = Run.open(tmp_path / "run", small)
    for stage in list(STAGES)[: list(STAGES).index("select") + 1]:
        run_stage(run, stage)
    config = analysis.Config(run.folder, n_tasks=4)
    found = analysis.main(config)
    assert [row.condition for row in found.rows] == ["unsteered", "subtracted", "added"]
    assert analysis.to_json(analysis.main(config)) == analysis.to_json(found)  # from the kept chains
    assert len(analysis.figure(found).data) == 5
    assert analysis.table(found).count("\n") == 1 + len(found.rows)

    chains = tmp_path / "chains.jsonl"
    save_traces(ls.load_traces(run.path("annotated.jsonl")), chains)
    given = analysis.Config(
        model=str(ls.models.ORGANISM), chains=(str(chains),), tasks="organism", folder=tmp_path / "given",
        n_tasks=3, n_prompts=2, n_chains=12, max_new_tokens=80,
    )  # fmt: skip
    made = analysis.main(given)
    assert made.annotator == "rules"
    assert made.rows[1].coefficient < 0 < made.rows[2].coefficient
    for wrong in (analysis.Config(), analysis.Config(run.folder, model="a model")):
        with pytest.raises(ls.LensteerError, match="give one of them"):
            analysis.main(wrong)
    with pytest.raises(ls.LensteerError, match="without chains or tasks"):
        analysis.main(analysis.Config(model="a model"))

"""The analysis of positions: scopes edit what they say, effects and costs are the planted ones, a run gives its own."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch

import lensteer as ls
from lensteer import plots
from lensteer.calibration import RolloutKL
from lensteer.errors import LensteerError
from lensteer.evaluation import MEAN, Doses, PositionAblation
from lensteer.pipeline import Run, RunConfig
from lensteer.plots import position_ablation
from lensteer.selection import Site
from test_analyses import load

LABEL = "uncertainty-estimation"


@pytest.fixture(scope="module")
def analysis():
    return load("position_ablation")


@pytest.fixture(scope="module")
def chains(organism):
    tasks = ls.load_tasks(split="train", n=14)
    return ls.annotate(ls.generate_traces(organism, tasks, temperature=1.0, max_new_tokens=300))


@pytest.fixture(scope="module")
def vectors(organism, chains):
    return ls.fit_vectors(organism, chains)


def setting(analysis, organism, vectors):
    return analysis.Setting(organism, vectors, {LABEL: 4}, {LABEL: 0.5}, [], analysis.Sampling())


def test_own_spans_are_edited_from_the_token_before_each(analysis, organism, vectors, chains):
    at = setting(analysis, organism, vectors)
    chain = next(c for c in chains if [s.label for s in c.spans].count(LABEL) > 1)
    spans = [span for span in chain.spans if span.label == LABEL]
    assert analysis._edited(at, [chain], [analysis._own(chain, LABEL)]) == sum(s.end - s.start + 1 for s in spans)
    assert analysis._edited(at, [chain], [ls.everywhere]) == len(chain.ids)
    assert analysis._edited(at, [chain], [ls.prompt]) == chain.prompt_length
    assert analysis._edited(at, [chain], [ls.first(7)]) == 7
    without = dataclasses.replace(chain, spans=tuple(s for s in chain.spans if s.label != LABEL))
    assert analysis._edited(at, [without], [analysis._own(without, LABEL)]) == 0


def test_along_given_chains_only_what_follows_an_edit_changes(analysis, organism, vectors, chains):
    at = setting(analysis, organism, vectors)
    plans = {
        ("onsets", LABEL, k): ls.SteeringPlan(vectors[LABEL], 4, 0.5 * s, ls.onsets) for k, s in analysis.KINDS.items()
    }
    found = analysis._forced(at, analysis.Config(), plans, chains[:5])
    assert list(found) == [("onsets", LABEL), (analysis.OWN, LABEL)]
    own = found[analysis.OWN, LABEL]
    for chain, kl in zip(chains[:5], own.kls[1].tokens, strict=True):
        assert len(kl) == len(chain.response_ids)
        onsets = [
            s.onset - chain.prompt_length + 1 for s in chain.spans if s.label == LABEL
        ]  # of the tokens they predict
        before = min(onsets, default=len(kl))
        assert float(kl[:before].abs().sum()) == 0
        assert all(float(kl[max(i, 0)]) > 0 for i in onsets)
    assert found["onsets", LABEL].effect.shape == (2001,)
    assert found["onsets", LABEL].effect[0] > 0.1  # the onset vector makes its own sentences likelier, per sentence
    assert (own.down, own.up) == (-0.5, 0.5)
    nothing = {key: dataclasses.replace(plan, coefficient=0.0) for key, plan in plans.items()}
    cell = analysis._forced(at, analysis.Config(), nothing, chains[:2])["onsets", LABEL]
    assert float(np.abs(cell.effect).max()) == 0
    assert all(float(kl.sum()) == 0 for kls in cell.kls for kl in kls.tokens)


def cells(analysis):
    """Two behaviors at two scopes; effects and costs in whole numbers."""
    draws = np.random.default_rng(0).normal(0, 0.1, 401)
    draws[0] = 0
    kl = RolloutKL((torch.full((2,), 1.0, dtype=torch.float64), torch.full((6,), 3.0, dtype=torch.float64)))
    double = RolloutKL(tuple(2 * row for row in kl.tokens))
    return {
        (scope, b): analysis.Cell(draws + effect, (kl, double), 7.0, -0.5, 0.5, 0.9, reached)
        for scope, b, effect, reached in (
            ("onsets", "a", 4, True),
            ("onsets", "b", 2, True),
            ("prompt", "a", 1, True),
            ("prompt", "b", 0, False),
        )
    }


def test_rows_are_what_the_cells_say(analysis):
    rows = {(r.scope, r.behavior): r for r in analysis._rows("budget", cells(analysis))}
    assert [rows["onsets", b].effect for b in ("a", "b", MEAN)] == [4, 2, 3]
    assert [rows["prompt", b].behind for b in ("a", "b", MEAN)] == [3, 2, 2.5]
    assert rows["prompt", MEAN].behind_low == pytest.approx(2.5)  # paired: what the draws share cancels
    assert rows["prompt", "a"].low < 1 < rows["prompt", "a"].high
    assert all(r.kl == pytest.approx((2 + 18 + 4 + 36) / 16) for r in rows.values())  # over tokens, not prompts
    assert [r.reached for r in rows.values()] == [True, True, True, True, False, False]
    assert (rows["prompt", MEAN].edited, rows["prompt", MEAN].down, rows["prompt", MEAN].parsed) == (7, -0.5, 0.9)


def ablation(analysis) -> PositionAblation:
    rows = [row for name in ("coefficient", "budget", "forced") for row in analysis._rows(name, cells(analysis))]
    rows = [
        dataclasses.replace(row, behavior={"a": LABEL, "b": "backtracking"}.get(row.behavior, MEAN)) for row in rows
    ]
    return PositionAblation(tuple(rows), "onsets", 0.1, {LABEL: 4, "backtracking": 5}, 20, 6)


def test_the_figure_shows_the_rows(analysis):
    result = ablation(analysis)
    figure = position_ablation(result)
    bars = [t for t in figure.data if t.type == "bar"]
    costs = [t for t in figure.data if t.type == "scatter"]
    assert len(bars) == len(costs) == 3 * 3
    bar = next(t for t in bars if t.name == LABEL)
    row = next(r for r in result.rows if r.behavior == LABEL)
    assert (bar.x, bar.y) == (("onsets", "prompt"), (400, 100))  # points
    assert bar.y[0] + bar.error_y.array[0] == pytest.approx(100 * row.high)
    assert bar.y[0] - bar.error_y.arrayminus[0] == pytest.approx(100 * row.low)
    assert bar.marker.color == plots.COLORS[LABEL]
    assert [t.y for t in bars if t.name == LABEL][2] == (4, 1)  # nats
    assert costs[0].y == (row.kl, row.kl)
    assert "nats per token" in bar.customdata[0]
    assert "not reached" in next(t for t in bars if t.name == "backtracking").customdata[1]
    assert "20 dev tasks" in figure.layout.title.text
    frame = result.to_dataframe()
    assert len(frame) == len(result.rows)
    with pytest.raises(LensteerError, match="no rows to draw"):
        position_ablation(dataclasses.replace(result, rows=()))


def test_a_run_gives_vectors_site_and_doses(analysis, organism, vectors, tmp_path, monkeypatch):
    run = Run.open(tmp_path / "run", RunConfig(n_train=2, n_dev=3, n_test=2, max_new_tokens=80))
    assert run.model is not None  # begins the run
    vectors.save(run.path("vectors.safetensors"))
    Site({LABEL: 4}, {LABEL: "planted"}).save(run.path("site.json"))
    Doses({LABEL: 0.45}, (), 0.95, 3).save(run.path("doses.json"))
    seen = {}
    monkeypatch.setattr(analysis, "calibrate_many", short(analysis.calibrate_many, seen))
    config = analysis.Config(run=run.folder, n_dev=2, n_prompts=1, first=4, folder=tmp_path)
    result = analysis.main(config)
    assert (result.layers, result.n_tasks, result.n_prompts) == ({LABEL: 4}, 2, 1)
    rows = {(r.comparison, r.scope): r for r in result.rows if r.behavior == LABEL}
    scopes = ["everywhere", "prompt", "generated", "thinking", "sentence_starts", "onsets", "first(4)"]
    assert [scope for name, scope in rows if name == "coefficient"] == scopes
    assert [scope for name, scope in rows if name == "budget"] == scopes
    assert [scope for name, scope in rows if name == "forced"] == [*scopes, analysis.OWN]
    assert all((r.down, r.up) == (-0.45, 0.45) for (name, _), r in rows.items() if name != "budget")
    assert rows["coefficient", "onsets"].kl == pytest.approx(result.budget) == seen["budget"]
    assert all(r.behind == 0 for (_, scope), r in rows.items() if scope == "onsets")
    assert rows["forced", "first(4)"].edited == 4
    assert math.isnan(rows["forced", "onsets"].parsed)
    assert analysis.table(result).count("\n") == 1 + 7 + 7 + 8
    assert json.loads(json.dumps(dataclasses.asdict(result)))["budget"] == result.budget


def short(calibrate_many, seen):
    """The search, cut short: it has its own tests."""

    def calibrate(*args, **options):
        seen.update(options)
        return calibrate_many(*args, **{**options, "max_rounds": 1})

    return calibrate


def test_without_a_run_vectors_are_fitted_on_the_spot(analysis):
    at = analysis._fitted(analysis.Config(n_train=14, n_dev=2, coefficient=0.3))
    assert set(at.site) == set(at.strength) == set(ls.STEERED)
    assert set(at.strength.values()) == {0.3}
    assert len(at.tasks) == 2

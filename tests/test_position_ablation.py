"""The analysis of positions: scopes edit what they say, effects and costs are the planted ones, a run gives its own."""

from __future__ import annotations

import dataclasses
import json
import math
import sys
from functools import partial

import numpy as np
import pytest
import torch

import lensteer as ls
from lensteer import plots
from lensteer.ablation import leave_one_out
from lensteer.attribution.selection import SelectedLayers
from lensteer.calibration import RolloutKL
from lensteer.errors import LensteerError
from lensteer.evaluation import MEAN, ChosenCoefficients, Margins, PositionAblation
from lensteer.pipeline import Run, RunConfig
from lensteer.plots import position_ablation
from scripts import ROOT, load

pytestmark = pytest.mark.medium  # fits vectors and steers

LABEL = "uncertainty-estimation"


@pytest.fixture(scope="module")
def analysis():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "analyses")  # it takes from its neighbor
        yield load("position_ablation")


@pytest.fixture(scope="module")
def given(analysis):
    return sys.modules["given_chains"]


@pytest.fixture(scope="module")
def chains(organism):
    tasks = ls.load_tasks(split="train", n=14)
    return ls.annotate(ls.generate_traces(organism, tasks, temperature=1.0, max_new_tokens=300), ls.grammar)


@pytest.fixture(scope="module")
def vectors(organism, chains):
    return ls.fit_vectors(organism, chains, window="onset")


def setting(analysis, organism, vectors, layer=4, coefficient=0.5):
    return analysis.Setting(organism, vectors, {LABEL: layer}, {LABEL: coefficient}, [], analysis.Sampling())


def own(chain):
    return [span for span in chain.spans if span.label == LABEL]


def relabeled(chain, chosen):
    """A chain in which one span alone is the behavior's."""
    others = (dataclasses.replace(s, label=LABEL if s == chosen else "deduction") for s in chain.spans)
    return dataclasses.replace(chain, spans=tuple(others))


def test_own_spans_are_edited_from_the_token_before_each(analysis, given, organism, vectors, chains):
    at = setting(analysis, organism, vectors)
    chain = next(c for c in chains if len(own(c)) > 1)
    n_own = sum(s.end - s.start + 1 for s in own(chain))
    assert given.edited(at, [chain], [given._around(own(chain))]) == n_own
    assert given.edited(at, [chain], [ls.everywhere]) == len(chain.ids)
    assert given.edited(at, [chain], [ls.prompt]) == chain.prompt_length
    assert given.edited(at, [chain], [ls.first(7)]) == 7
    assert given.edited(at, [chain], [given._around([])]) == 0


def test_along_given_chains_only_what_follows_an_edit_changes(analysis, given, organism, vectors, chains):
    at, some = setting(analysis, organism, vectors), chains[:5]
    cases = given.whole_chains(at, [ls.onsets], some)
    found = given.forced(at, some, cases)
    assert list(found) == [("onsets", LABEL), (given.OWN, LABEL)]
    cell = found[given.OWN, LABEL]
    for chain, kl in zip(some, cell.kls[1].tokens, strict=True):
        assert len(kl) == len(chain.response_ids)
        onsets = [s.onset - chain.prompt_length + 1 for s in own(chain)]  # of the tokens they predict
        before = min(onsets, default=len(kl))
        assert float(kl[:before].abs().sum()) == 0
        assert all(float(kl[max(i, 0)]) > 0 for i in onsets)
    assert found["onsets", LABEL].effect.shape == (2001,)
    assert found["onsets", LABEL].effect[0] > 0.1  # the onset vector makes its own sentences likelier, per sentence
    assert (cell.down, cell.up) == (-0.5, 0.5)
    cell = given.forced(setting(analysis, organism, vectors, coefficient=0.0), some, cases)["onsets", LABEL]
    assert float(np.abs(cell.effect).max()) == 0
    assert all(float(kl.sum()) == 0 for kls in cell.kls for kl in kls.tokens)


def test_batches_change_nothing(analysis, given, organism, vectors, chains, monkeypatch):
    at, some = setting(analysis, organism, vectors), chains[:3]
    cases = given.whole_chains(at, [ls.thinking], some)
    together = given.forced(at, some, cases)
    monkeypatch.setattr(given, "MAX_LOGITS", 1)
    for key, cell in given.forced(at, some, cases).items():
        np.testing.assert_allclose(cell.effect, together[key].effect, atol=1e-4)
        for alone, kl in zip(cell.kls[0].tokens, together[key].kls[0].tokens, strict=True):
            torch.testing.assert_close(alone, kl, rtol=1e-3, atol=1e-6)


def test_a_sentence_is_left_out_up_to_the_next(analysis, given, organism, vectors, chains):
    at = setting(analysis, organism, vectors)
    chain = next(c for c in chains if any(s in c.spans[4:-1] for s in own(c)))
    gap = next(i for i, s in enumerate(chain.spans) if i > 3 and s.label == LABEL)
    shorter = dataclasses.replace(chain.spans[gap - 1], end=chain.spans[gap - 1].end - 2)
    chain = dataclasses.replace(chain, spans=(*chain.spans[: gap - 1], shorter, *chain.spans[gap:]))  # what is between
    cases, spans = given.left_out(at, [chain]), chain.spans
    n_read = sum(s.label == LABEL for s in spans[4:])
    assert [len(by_chain[0]) for by_chain in cases.values()] == [n_read] * 6
    every = set(range(spans[0].start, spans[-1].end))
    for name, i in (("its own", gap), ("the one before", gap - 1), ("the 2nd before", gap - 2), ("the first", 0)):
        scope, read = cases[f"without {name}", LABEL][0][0]
        assert read == [spans[gap]]
        assert scope == ls.at(every - set(range(spans[i].start, spans[i + 1].start)))
    assert spans[gap].onset not in range(spans[gap - 1].start, spans[gap - 1].end)
    few = dataclasses.replace(chain, spans=spans[gap - 3 :])
    cases = given.left_out(at, [dataclasses.replace(few, spans=few.spans[:4]), chain])
    assert [[len(some) for some in by_chain] for by_chain in cases.values()] == [[0, n_read]] * 6
    few = dataclasses.replace(few, spans=few.spans[:4])
    assert given.left_out(at, [few]) == {}
    assert analysis._rows("left out", {}, given.WHOLE) == []
    few = {key: [len(some) for some in by_chain] for key, by_chain in given.left_out(at, [chain, chain], 1).items()}
    assert list(few.values()) == [[1, 0]] * 6


def test_what_each_sentence_gives_is_missed_without_it(analysis, given, organism, vectors, chains):
    """A last-layer edit changes only its own logits: the first token depends on the sentence before."""
    at = setting(analysis, organism, vectors, organism.cfg.n_layers - 1)
    some = [chain for chain in chains if any(s.label == LABEL for s in chain.spans[4:])][:3]
    cases = dict(given.left_out(at, some))
    for name, ends in (("first token", lambda s: (s.onset, s.start)), ("others", lambda s: (s.start, s.end - 1))):
        scopes = [[(ls.at(range(*ends(span))), [span]) for _, (span,) in row] for row in cases[given.WHOLE, LABEL]]
        cases[name, LABEL] = scopes
    found = given.forced(at, some, cases)
    effect = {name: cell.effect for (name, _), cell in found.items()}
    rows = {r.scope: r for r in analysis._rows("left out", found, given.WHOLE) if r.behavior == LABEL}
    assert effect["first token"][0] > 0.1
    lost = {name: effect[given.WHOLE] - effect[name] for name in effect}
    np.testing.assert_allclose(lost["without the one before"], effect["first token"], atol=1e-4)
    np.testing.assert_allclose(lost["without its own"], effect["others"], atol=1e-4)
    for name in ("without the 2nd before", "without the 3rd before", "without the first"):
        np.testing.assert_allclose(lost[name], 0, atol=1e-4)
        assert rows[name].kl.value < rows[given.WHOLE].kl.value
    assert rows[given.WHOLE].behind.value == rows[given.WHOLE].behind.high == 0
    assert rows["without the one before"].behind.value == pytest.approx(effect["first token"][0], abs=1e-4)
    assert rows["without the one before"].behind.low > 0


def test_leaving_one_out_agrees_with_the_librarys(analysis, given, organism, vectors, chains):
    at = setting(analysis, organism, vectors)
    chain, i = next((c, i) for c in chains for i, s in enumerate(c.spans[:-1]) if i > 3 and s.label == LABEL)
    chain = relabeled(chain, chain.spans[i])
    spans, (span,) = chain.spans, own(chain)
    ends = [s.start for s in spans[1:]] + [spans[-1].end]
    groups = {f"{k}": range(s.start, end) for k, (s, end) in enumerate(zip(spans, ends, strict=True))}
    cases = dict(given.left_out(at, [chain]))
    kept = [p for name, group in groups.items() for p in group if name != f"{i + 1}"]
    cases["without the next", LABEL] = [[(ls.at(kept), [span])]]
    effect = {name: cell.effect for (name, _), cell in given.forced(at, [chain], cases).items()}
    assert all(np.ptp(draws) == 0 for draws in effect.values())  # a chain is resampled as a whole

    def steered(coefficient, positions):
        return ls.SteeringPlan(vectors[LABEL], 4, coefficient, ls.at(positions))

    targets = range(span.start, span.end)
    ranked = [
        leave_one_out(organism, chain, partial(steered, coefficient), groups, targets=targets)
        for coefficient in (0.5, -0.5)
    ]
    assert effect[given.WHOLE][0] == pytest.approx(ranked[0].full - ranked[1].full, abs=1e-3)
    importance = [up - down for up, down in zip(*(one.importance for one in ranked), strict=True)]
    names = ("its own", "the one before", "the 2nd before", "the 3rd before", "the first", "the next")
    for name, left in zip(names, (i, i - 1, i - 2, i - 3, 0, i + 1), strict=True):
        missed = effect[given.WHOLE][0] - effect[f"without {name}"][0]
        assert missed == pytest.approx(importance[left], abs=1e-3)
    assert abs(effect[given.WHOLE][0] - effect["without the next"][0]) < 1e-4
    assert max(importance) == importance[i - 1] > 0.1


def cells(analysis):
    """Two behaviors at two scopes; effects and costs in whole numbers."""
    draws = np.random.default_rng(0).normal(0, 0.1, 401)
    draws[0] = 0
    kl = RolloutKL((torch.full((2,), 1.0, dtype=torch.float64), torch.full((6,), 3.0, dtype=torch.float64)))
    double = RolloutKL(tuple(2 * row for row in kl.tokens))
    return {
        (scope, b): analysis.Cell(draws + effect, (kl, double), 7.0, -0.5, 0.5, 0.9, 0.2, reached)
        for scope, b, effect, reached in (
            ("onsets", "a", 4, True),
            ("onsets", "b", 2, True),
            ("prompt", "a", 1, True),
            ("prompt", "b", 0, False),
        )
    }


def test_rows_are_what_the_cells_say(analysis):
    rows = {(r.scope, r.behavior): r for r in analysis._rows("budget", cells(analysis), "onsets")}
    assert [rows["onsets", b].effect.value for b in ("a", "b", MEAN)] == [4, 2, 3]
    assert [rows["prompt", b].behind.value for b in ("a", "b", MEAN)] == [3, 2, 2.5]
    assert rows["prompt", MEAN].behind.low == pytest.approx(2.5)  # paired: what the draws share cancels
    assert rows["prompt", "a"].effect.low < 1 < rows["prompt", "a"].effect.high
    assert all(r.kl.value == pytest.approx((2 + 18 + 4 + 36) / 16) for r in rows.values())  # over tokens, not prompts
    assert [r.reached for r in rows.values()] == [True, True, True, True, False, False]
    assert (rows["prompt", MEAN].edited, rows["prompt", MEAN].down, rows["prompt", MEAN].parsed) == (7, -0.5, 0.9)
    assert rows["prompt", MEAN].repetition == pytest.approx(0.2)


def ablation(analysis) -> PositionAblation:
    rows = [
        row for name in ("coefficient", "budget", "forced") for row in analysis._rows(name, cells(analysis), "onsets")
    ]
    names = {"onsets": analysis.WHOLE, "prompt": "without its own"}
    others = {(names[scope], b): cell for (scope, b), cell in cells(analysis).items()}
    rows += analysis._rows("left out", others, analysis.WHOLE)
    rows = [
        dataclasses.replace(row, behavior={"a": LABEL, "b": "backtracking"}.get(row.behavior, MEAN)) for row in rows
    ]
    return PositionAblation(tuple(rows), "onsets", 0.1, {LABEL: 4, "backtracking": 5}, 20, 6)


def test_the_figure_shows_the_rows(analysis):
    result = ablation(analysis)
    figure = position_ablation(result)
    bars = [t for t in figure.data if t.type == "bar"]
    costs = [t for t in figure.data if t.type == "scatter"]
    assert len(bars) == len(costs) == 4 * 3
    bar = next(t for t in bars if t.name == LABEL)
    row = next(r for r in result.rows if r.behavior == LABEL)
    assert (bar.x, bar.y) == (("onsets", "prompt"), (400, 100))  # points
    assert bar.y[0] + bar.error_y.array[0] == pytest.approx(100 * row.effect.high)
    assert bar.y[0] - bar.error_y.arrayminus[0] == pytest.approx(100 * row.effect.low)
    assert bar.marker.color == plots.COLORS[LABEL]
    assert [t.y for t in bars if t.name == LABEL][2:] == [(4, 1)] * 2  # nats
    assert [t.x for t in bars if t.name == LABEL][3] == (analysis.WHOLE, "without its own")
    axes = [figure.layout[f"xaxis{n}"] for n in ("", 3, 5, 7)]
    assert [axis.matches for axis in axes] == [None, "x", "x", None]
    assert [axis.showticklabels for axis in axes] == [False, False, True, True]
    assert costs[0].y == (row.kl.value, row.kl.value)
    assert "nats per token" in bar.customdata[0]
    assert "not reached" in next(t for t in bars if t.name == "backtracking").customdata[1]
    assert "20 dev tasks" in figure.layout.title.text
    assert "added − subtracted" in figure.layout.yaxis.title.text
    unsteered = position_ablation(dataclasses.replace(result, base="unsteered"))
    assert "added − unsteered" in unsteered.layout.yaxis.title.text
    frame = result.to_dataframe()
    assert len(frame) == len(result.rows)
    only = dataclasses.replace(result, rows=tuple(row for row in result.rows if row.comparison == "left out"))
    assert position_ablation(only).layout.xaxis.showticklabels
    with pytest.raises(LensteerError, match="no rows to draw"):
        position_ablation(dataclasses.replace(result, rows=()))


def test_a_run_gives_vectors_site_and_coefficients(analysis, given, organism, vectors, tmp_path, monkeypatch):
    run = Run.open(
        tmp_path / "run", RunConfig(tasks="organism", n_train=2, n_dev=3, n_test=2, temperature=1.0, max_new_tokens=80)
    )
    assert run.model is not None  # begins the run
    vectors.save(run.path("vectors.safetensors"))
    SelectedLayers({LABEL: 4}, {LABEL: "planted"}).save(run.path("layers.json"))
    ChosenCoefficients({LABEL: 0.45}, {LABEL: 0.45}, (), Margins(), "difference", 3, 1).save(
        run.path("coefficients.json")
    )
    seen = {}
    monkeypatch.setattr(analysis, "calibrate_many", short(analysis.calibrate_many, seen))
    config = analysis.Config(run=run.folder, n_dev=2, n_prompts=1, first=4, folder=tmp_path)
    result = analysis.main(config)
    assert (result.layers, result.n_tasks, result.n_prompts) == ({LABEL: 4}, 2, 1)
    rows = {(r.comparison, r.scope): r for r in result.rows if r.behavior == LABEL}
    scopes = ["everywhere", "prompt", "generated", "thinking", "sentence_starts", "onsets", "first(4)"]
    assert [scope for name, scope in rows if name == "coefficient"] == scopes
    assert [scope for name, scope in rows if name == "budget"] == scopes
    assert [scope for name, scope in rows if name == "forced"] == [*scopes, given.OWN]
    left_out = [given.WHOLE, *given.LEFT_OUT, given.FIRST]
    assert [scope for name, scope in rows if name == "left out"] == left_out
    assert all((r.down, r.up) == (-0.45, 0.45) for (name, _), r in rows.items() if name != "budget")
    assert rows["coefficient", "onsets"].kl.value == pytest.approx(result.budget) == seen["budget"]
    assert all(r.behind.value == 0 for (_, scope), r in rows.items() if scope in ("onsets", given.WHOLE))
    whole = rows["left out", given.WHOLE]
    for name in left_out[1:]:
        row = rows["left out", name]
        assert row.behind.value == pytest.approx(whole.effect.value - row.effect.value)
        assert row.edited < whole.edited
        assert row.kl.value > 0
    assert rows["forced", "first(4)"].edited == 4
    assert math.isnan(rows["forced", "onsets"].parsed)
    assert analysis.table(result).count("\n") == 1 + 7 + 7 + 8 + 6
    assert json.loads(json.dumps(dataclasses.asdict(result)))["budget"] == result.budget


def test_beginnings_of_given_chains_follow_their_questions(given, organism, chains):
    blank = [dataclasses.replace(c, task=dataclasses.replace(c.task, prompt="")) for c in chains]
    others = [dataclasses.replace(c, sample=1) for c in chains]  # of a second file, which has the questions
    found = given.sub_chains(organism, [*blank, *others], [LABEL], 5, 60)
    assert [len(own(c)) for c in found] == sorted((len(own(c)) for c in found), reverse=True)
    assert len(found) == 5
    assert not any(c.sample for c in found)
    for part in found:
        whole = next(c for c in chains if c.task.id == part.task.id)
        begin = whole.spans[0].start - whole.prompt_length
        assert part.response_ids == whole.response_ids[begin : begin + 60]
        assert whole.response[whole.offsets[begin] :].startswith(part.response)
        assert part.prompt == whole.prompt
        assert len(part.spans) == sum(s.end - whole.prompt_length - begin <= 60 for s in whole.spans)
        for short, long in zip(part.spans, whole.spans, strict=False):
            assert part.ids[short.start : short.end] == whole.ids[long.start : long.end]
            assert part.response[short.char_start : short.char_end] == whole.response[long.char_start : long.char_end]
            assert short.label == long.label
    assert given.sub_chains(organism, blank, [LABEL], 5, 60) == []


def test_given_vectors_are_compared_with_unsteered_chains(analysis, given, vectors, chains, tmp_path, monkeypatch):
    vectors.save(tmp_path / "vectors.safetensors")
    ls.save_traces(chains, tmp_path / "chains.jsonl")
    monkeypatch.setattr(analysis, "calibrate_many", short(analysis.calibrate_many, {}))
    config = analysis.Config(
        model=str(ls.models.ORGANISM),
        vectors=tmp_path / "vectors.safetensors",
        layer=4,
        coefficients={LABEL: 0.45},
        chains=(str(tmp_path / "chains.jsonl"),),
        tasks="organism",
        n_dev=2,
        n_prompts=1,
        first=4,
        max_new_tokens=60,
        reference="generated",
        budget=0.01,
        n_given=3,
        given_tokens=150,
        n_left_out=2,
        kl_every=4,
        folder=tmp_path / "folder",
    )
    result = analysis.main(config)
    assert (result.base, result.reference, result.budget, result.layers) == ("unsteered", "generated", 0.01, {LABEL: 4})
    rows = {(r.comparison, r.scope): r for r in result.rows if r.behavior == LABEL}
    assert all(r.behind.value == 0 for (name, scope), r in rows.items() if scope == "generated")
    for (name, _), r in rows.items():
        assert r.down == {"coefficient": 0, "budget": 0}.get(name, -0.45)
        assert math.isnan(r.repetition) == (name in ("forced", "left out"))
    assert rows["coefficient", "everywhere"].up == rows["forced", given.OWN].up == 0.45
    assert len(list(tmp_path.glob("folder/*.pickle"))) == 7
    for name in ("forced", "rollout_kl", "calibrate_many", "fit_classifier"):
        monkeypatch.delattr(analysis, name)  # all of it is in the folder
    assert repr(analysis.main(config)) == repr(result)
    with pytest.raises(LensteerError, match="for each behavior to steer"):
        analysis.main(dataclasses.replace(config, coefficients={"elsewhere": 1.0}))


def short(calibrate_many, seen):
    """The search, cut short: it has its own tests."""

    def calibrate(*args, **options):
        seen.update(options)
        return calibrate_many(*args, **{**options, "max_rounds": 1})

    return calibrate


def test_without_a_run_vectors_are_fitted_on_the_spot(analysis):
    at = analysis._fitted(analysis.Config(n_train=14, n_dev=2, coefficient=0.3))
    assert set(at.layers) == set(at.coefficient) == set(ls.STEERED)
    assert set(at.coefficient.values()) == {0.3}
    assert len(at.tasks) == 2

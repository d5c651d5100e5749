"""The layer ablation: its statistics on records whose answer is known, and a small run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import lensteer as ls
from lensteer.evaluation import MEAN, Margins, Record
from lensteer.statistics import Estimate
from scripts import load

ROOT = Path(__file__).resolve().parent.parent
BEHAVIORS = ("uncertainty-estimation", "backtracking")


def records_of(counts: dict[str, dict[str, int]], n_tasks: int = 8) -> list[Record]:
    """Of 20 sentences in every chain, those of each behavior by condition; the same on every task."""
    return [
        Record(name, str(task), 0, dict(found), {}, 20, 60, True, True, True, 80, 0.0)
        for name, found in counts.items()
        for task in range(n_tasks)
    ]


def cells_of(counts: dict[str, dict[str, int]]) -> list[tuple[str, str, str]]:
    cells = [tuple(name.split("/")) for name in counts if name != "unsteered"]
    return [(a, b, c) for a, b, c in cells]


def test_the_best_layer_is_the_one_that_the_records_say():
    analysis = load("layer_ablation")
    u, b = BEHAVIORS
    counts = {"unsteered": {u: 4, b: 4}}
    for layer, own, null in ((1, 5, 4), (2, 6, 4), (3, 10, 6)):
        counts |= {f"add/{x}/{layer}": {x: own} for x in BEHAVIORS}
        counts |= {f"add/control-{i}/{layer}": {u: null, b: null} for i in range(2)}
        counts |= {f"project_out/{x}/{layer}": {x: 4 - layer} for x in BEHAVIORS}
    counts |= {f"project_out/{x}/all": {x: 0} for x in BEHAVIORS}
    records, cells = records_of(counts), cells_of(counts)
    best = {(x.operator, x.behavior): x for x in analysis.best_of(records, cells, BEHAVIORS, 2)}
    assert set(best) == {(name, x) for name in ("add", "project_out") for x in (*BEHAVIORS, MEAN)}
    added = best["add", MEAN]
    assert (added.layer, added.chosen) == (3, (3, 3))
    assert (added.effect.value, added.middle.value, added.lead.value) == pytest.approx((0.3, 0.1, 0.2))
    assert (added.held_effect.low, added.held_lead.high, added.held_beyond.value) == pytest.approx((0.3, 0.2, 0.2))
    out = best["project_out", b]
    assert (out.layer, out.effect.value, out.held_beyond) == (3, pytest.approx(0.15), None)  # "all" is no layer
    found = {cell: (Plan(), Estimate(0.01, 0.01, 0.01), True) for cell in cells}
    rows = {(r.operator, r.behavior, r.layer): r for r in analysis.rows_of(records, found, BEHAVIORS, Margins())}
    assert len(rows) == 3 * 3 + 4 * 2  # one line for both control vectors
    assert rows["project_out", b, "all"].change.value == pytest.approx(-0.2)
    assert rows["add", u, "3"].beyond.value == pytest.approx(0.2)
    assert rows["add", "control", "3"].change.value == pytest.approx(0.1)
    assert rows["project_out", u, "1"].length is None


class Plan:
    length = 2.0


def test_a_layer_that_is_best_by_chance_is_not_best_on_the_other_half():
    analysis = load("layer_ablation")
    b = BEHAVIORS[1]
    records = records_of({"unsteered": {b: 4}, "add/backtracking/1": {b: 5}, "add/backtracking/2": {b: 5}}, 4)
    lucky = {("add/backtracking/1", "0"), ("add/backtracking/1", "2"), ("add/backtracking/2", "1")}
    records = [
        Record(r.condition, r.task, 0, {b: 9}, {}, 20, 60, True, True, True, 80, 0.0)
        if (r.condition, r.task) in lucky
        else r
        for r in records
    ]
    cells = [("add", b, "1"), ("add", b, "2")]
    (found,) = analysis.best_of(records, cells, (b,), 2)
    assert found.layer == 1
    assert found.chosen == (1, 2)
    assert found.lead.value == pytest.approx(0.05)
    assert found.held_lead.value < 0  # the even tasks choose 1, which is behind on the odd ones


def test_what_is_asked_wrongly_is_repeated():
    analysis = load("layer_ablation")
    with pytest.raises(ls.LensteerError, match="holds no run"):
        analysis.main(analysis.Config(Path("nowhere")))


@pytest.mark.medium
def test_a_small_run_on_the_organism_and_its_answer(tmp_path, monkeypatch):
    analysis = load("layer_ablation")
    config = analysis.smoke(analysis.Config(load("command").small_run(tmp_path / "run")))
    result = analysis.main(config)
    assert result.middle == 4
    assert len(result.rows) == 3 * (2 + 3)  # behaviors and controls; layers 4 and 6, and for one operator both
    monkeypatch.setattr("lensteer.generation.jobs.generate", None)
    monkeypatch.setattr(analysis, "calibrate_many", None)
    assert analysis.main(config) == result  # from its files
    with pytest.raises(ls.LensteerError, match="other settings"):
        analysis.main(analysis.replace(config, budget=0.02))
    with pytest.raises(ls.LensteerError, match=r"layers \[6\] without 4"):
        analysis.main(analysis.replace(config, layers=(6,)))
    assert len(analysis.figure(result).data) == 3 + 2 * 3 + 3
    assert analysis.table(result).count("\n") == 2 + len(result.rows) + len(result.best)
    values = json.loads(analysis.to_json(result))
    said, _ = analysis.answer(values)
    assert said.count("nats per token") == 1
    assert f"{result.best[-1].held_effect:+.3f}" in said


def test_the_answer_is_shown_only_if_it_holds_on_other_tasks_and_beyond_controls():
    analysis = load("layer_ablation")
    best = dict(operator="add", behavior=MEAN, layer=5, chosen=[5, 5])
    for name in ("effect", "middle", "lead", "held_effect", "held_lead", "held_beyond"):
        best |= {name: 0.2, f"{name}_low": 0.1, f"{name}_high": 0.3}
    result = dict(model="organism", n_tasks=50, budget=0.01, middle=4, best=[best])
    said, shown = analysis.answer(result)
    assert shown
    assert "layer 5 (share of the mean of the behaviors, in the intended direction: +0.200 [+0.100, +0.300]" in said
    assert not analysis.answer({**result, "best": [{**best, "held_beyond_low": -0.1}]})[1]
    assert not analysis.answer({**result, "best": [{**best, "held_effect_low": -0.1}]})[1]

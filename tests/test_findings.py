"""The page of findings is what the results say, and analyses read their own results back."""

from __future__ import annotations

import importlib.util
import json
import re
from pathlib import Path
from typing import Any

import pytest

import lensteer as ls
from lensteer.statistics import Estimate, estimate_in
from scripts import load

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "findings.md"


@pytest.fixture(scope="module")
def findings() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "analyses")  # it imports its neighbors when it is asked
        yield load("findings")


def test_the_page_is_what_the_results_say(findings):
    assert PAGE.read_text("utf-8") == findings.page(findings.findings()), "run analyses/findings.py"


def test_every_answer_has_an_interval_and_its_files(findings):
    for found in findings.findings():
        assert found.question.endswith("?")
        assert found.answer.endswith(".")
        assert re.search(r"\[[+-]?[\d.]+, [+-]?[\d.]+\]", found.answer), found
        assert "nan" not in found.answer
        assert (ROOT / "analyses" / "results" / found.results).exists()


def test_links_of_the_page_lead_somewhere(findings):
    text = PAGE.read_text("utf-8")
    targets = re.findall(r"\]\(([^)#]+)\)", text)
    assert len(targets) > 10
    assert [t for t in targets if not (PAGE.parent / t).exists()] == []
    headings = re.findall(r"^## (\d+)\. (.+)$", text, re.MULTILINE)
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) == {findings.anchor(int(n), q) for n, q in headings}


def test_every_result_of_an_analysis_that_answers_is_on_the_page(findings):
    named = {found.results for found in findings.findings()}
    for analysis in findings.ANALYSES:
        for model in findings.MODELS:
            name = f"{model}_{analysis}.json"
            assert name in named or not (ROOT / "analyses" / "results" / name).exists()


def test_results_that_cannot_be_read_are_named(findings, monkeypatch, tmp_path):
    monkeypatch.setattr(findings, "RESULTS", tmp_path)
    with pytest.raises(ls.LensteerError, match=r"organism_demo_summary\.json.*FileNotFoundError.*lensteer run"):
        findings.findings()
    monkeypatch.setattr(findings, "OLDER", ())
    (tmp_path / "mini_r1_entanglement.json").write_text("{}")
    with pytest.raises(ls.LensteerError, match=r"mini_r1_entanglement\.json.*entanglement writes"):
        findings.findings()


def interval(value: float, low: float, high: float) -> dict[str, float]:
    return {"value": value, "low": low, "high": high, "n": 50, "n_left_out": 0}


@pytest.mark.parametrize(
    ("low", "control", "sound", "shown"),
    [(0.05, 0.01, True, True), (0.05, -0.06, True, False), (-0.01, 0.0, True, False), (0.05, 0.01, False, False)],
)
def test_a_response_is_shown_if_its_odd_part_is_above_its_controls_with_sound_text(
    findings, low, control, sound, shown
):
    def row(vector: str, odd: float) -> dict[str, Any]:
        rest = dict(odd=interval(odd, low, 0.2), even=interval(0.0, -0.01, 0.01), spearman=interval(0.9, 0.8, 1.0))
        points = [dict(coefficient=c, share=dict(value=0.3 + c * odd), readable=sound) for c in (-1.0, 0.0, 1.0)]
        return {"vector": vector, "curve": {"behavior": "backtracking", "at": 1.0, "points": points, **rest}}

    text, found = importlib.import_module("dose_response").answer([row("own", 0.1), row("isotropic-0", control)])
    assert found is shown
    assert f"1 control vectors at most {100 * abs(control):.1f}" in text


def test_operators_and_constructions_say_who_is_ahead(findings):
    def mean(edit: str, *gain: float) -> dict[str, Any]:
        value, low, high = gain
        return dict(edit=edit, effect=0.1, effect_low=0.05, effect_high=0.15, gain=value, gain_low=low, gain_high=high)

    operators = importlib.import_module("operator_ablation")
    means = [mean("add", 0, 0, 0), mean("clamp", -0.02, -0.03, -0.01), mean("rotate", 0.0, -0.01, 0.01)]
    text, shown = operators.answer({"budget": 0.12, "means": means})
    assert shown
    assert "clamp -2.0 [-3.0, -1.0]" in text
    assert "Behind adding: clamp; ahead: none." in text
    assert not operators.answer({"budget": 0.12, "means": [*means, mean("gated add", 0.02, 0.01, 0.03)]})[1]

    constructions = importlib.import_module("construction_ablation")

    def row(name: str, *ahead: float) -> dict[str, Any]:
        value, low, high = ahead
        rest = dict(behavior=constructions.MEAN, effect=0.1, effect_low=0.05, effect_high=0.15)
        return dict(construction=name, ahead=value, ahead_low=low, ahead_high=high, **rest)

    rows = [row("difference", 0, 0, 0), row("pca", 0.05, 0.01, 0.08)]
    text, shown = constructions.answer({"target": 0.1, "n_tasks": 40, "rows": rows})
    assert shown
    assert "pca +5.0 [+1.0, +8.0]. Better than they: none." in text
    assert not constructions.answer({"target": 0.1, "n_tasks": 40, "rows": [*rows, row("lda", -0.05, -0.08, -0.01)]})[1]


def test_cosines_tell_what_else_moves_if_their_correlation_excludes_zero(findings):
    values = dict(on_target=interval(1.0, 0.8, 1.2), off_target=interval(0.3, 0.2, 0.4), controls=interval(0.1, 0, 0.2))
    between = importlib.import_module("entanglement")
    assert between.answer({**values, "correlation": interval(0.5, 0.1, 0.9)})[1]
    assert not between.answer({**values, "correlation": interval(0.5, -0.1, 0.9)})[1]


def test_estimates_are_read_back_in_both_forms():
    estimate = Estimate(0.1, 0.0, 0.2, 5)
    assert estimate_in({"x": 0.1, "x_low": 0.0, "x_high": 0.2}, "x") == Estimate(0.1, 0.0, 0.2)
    assert estimate_in(json.loads(json.dumps({"x": vars(estimate)})), "x") == estimate
    assert 100 * estimate == Estimate(10.0, 0.0, 20.0, 5)
    assert -1 * estimate == Estimate(-0.1, -0.2, 0.0, 5)
    with pytest.raises(ls.LensteerError, match="no estimate 'y' among x, x_low"):
        estimate_in({"x": 0.1, "x_low": 0.0}, "y")

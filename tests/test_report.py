"""Page and summary agree, the page needs nothing from elsewhere, and no text of others becomes markup."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest
import torch

import synthetic
from lensteer.report import render, summary

EVIL = "<script>alert('1')</script><img src=x onerror=\"alert(2)\"> & 'quoted' \"twice\""


class Reader(HTMLParser):
    """What stands on a page: figures by name, words outside figures and scripts, elements with their attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.figures: list[tuple[str, str, str]] = []
        self.words: list[str] = []
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.scripts: list[str] = []
        self._inside: list[str] = []
        self._figure: dict[str, str | None] | None = None
        self._chains = 0
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))
        if tag in ("script", "style", "title"):
            self._inside.append(tag)
        if tag == "data":
            self._figure = dict(attrs)
        if tag == "section":
            self._section = dict(attrs).get("id")

    def handle_endtag(self, tag):
        if tag in ("script", "style", "title"):
            self._inside.pop()
        if tag == "data":
            self._figure = None

    def handle_data(self, data):
        if self._inside:
            if self._inside[-1] == "script":
                self.scripts.append(data)
        elif self._figure is not None:
            self.figures.append((self._figure["title"], self._figure["value"], data))
        elif getattr(self, "_section", "") != "chains":
            self.words.append(data)


@pytest.fixture(scope="module")
def results():
    return synthetic.results()


@pytest.fixture(scope="module")
def page(results):
    return render(results)


def test_summary_is_flat_json_with_finite_numbers(results):
    found = summary(results)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in found.values())


def test_summary_holds_the_results(results):
    found = summary(results)
    effect = results.evaluation.effect("backtracking", "up")
    assert found["effect.backtracking.up.sentences.change"] == effect.change
    assert (
        found["effect.backtracking.up.tokens.share_low"]
        == results.evaluation.effect("backtracking", "up", "tokens").share_low
    )
    assert found["site.backtracking.layer"] == 5
    assert found["scores.backtracking.L5.mean"] == float(results.scores.mean[3, 5])
    assert found["doses.backtracking.coefficient"] == 1.0
    assert found["doses.backtracking.-0.5.share"] == pytest.approx(0.095)
    assert found["cosine.adding-knowledge.example-testing"] == pytest.approx(-0.41)
    assert found["cosine.adding-knowledge.uncertainty-estimation"] is None
    assert found["arm.unsteered.accuracy"] == 0.81
    assert found["arm.backtracking.up.length"] == next(
        a.length for a in results.evaluation.arms if a.arm == "backtracking/up"
    )
    assert found["nearest.backtracking.embedding.1.token"] == "</script>"
    assert found["traces.spans.backtracking"] == 2
    assert found["traces.n"] == 2
    assert found["seconds.total"] == 162.75
    assert found["config.doses"] == "[0.15, 0.3]"


def test_random_arms_are_summed_up_by_layer(results):
    found = summary(results)
    lengths = [a.length for a in results.evaluation.arms if a.arm.startswith("L4/")]
    assert found["random.L4.n"] == 20
    assert (found["random.L4.length.min"], found["random.L4.length.max"]) == (min(lengths), max(lengths))
    assert not any("random-" in name for name in found)


def test_verdicts(results):
    found = summary(results)
    assert [found[f"shown.{b}.verdict"] for b in synthetic.B4] == [
        "not shown",
        "only down",
        "only up",
        "shown in both directions",
    ]
    assert found["shown.backtracking.up"] is True
    assert found["shown.example-testing.up"] is False
    assert (found["shown.n_both"], found["shown.n_behaviors"]) == (1, 4)


def test_every_figure_on_the_page_is_in_the_summary(results, page):
    found, read = summary(results), Reader(page)
    assert len(read.figures) > 250
    for name, value, text in read.figures:
        expected = found[name]
        if isinstance(expected, (str, bool)):
            assert text == value == str(expected)
            continue
        assert float(value) == expected
        number = float(re.sub(r"[^\d.e\-]", "", text.replace("−", "-")))
        shown = expected * (100 if "%" in text else 1)
        assert any(number == pytest.approx(shown * factor, rel=0.02, abs=0.06) for factor in (1, 100)), (name, text)


def test_no_number_on_the_page_comes_from_elsewhere(page):
    """Outside figures: the level of the intervals, and the names of layers."""
    words = " ".join(Reader(page).words)
    assert set(re.findall(r"(?<![\w.])\d[\d.,]*", words)) == {"95"}


def test_the_verdict_table_reads_right(page):
    read = {name: text for name, _, text in Reader(page).figures}
    assert read["effect.backtracking.up.sentences.share"] == "29.4 %"
    assert read["effect.backtracking.down.sentences.change"] == "−8.0"
    assert read["effect.backtracking.up.sentences.null_low"] == "−2.1"
    assert read["shown.backtracking.verdict"] == "shown in both directions"
    assert read["site.backtracking.layer"] == "L5"


def test_the_page_asks_nothing_of_the_network(page):
    read = Reader(page)
    attributes = [(tag, name) for tag, attrs in read.elements for name in attrs]
    assert not [a for a in attributes if a[1] in ("src", "href", "srcset", "poster", "action", "background")]
    assert not {"link", "iframe", "object", "embed", "base", "img"} & {tag for tag, _ in read.elements}
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert "url(" not in style
    assert "@import" not in style
    policy = next(a["content"] for tag, a in read.elements if tag == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")
    assert "http" not in policy


def test_plotly_is_inside_once_and_draws_five_figures(page):
    read = Reader(page)
    assert sum(len(script) > 1_000_000 for script in read.scripts) == 1
    assert sum(a.get("class") == "plotly-graph-div" for _, a in read.elements) == 5
    assert sum("Plotly.newPlot(" in script for script in read.scripts if len(script) < 1_000_000) == 5


def test_text_of_others_is_never_markup():
    results = synthetic.results(
        title=EVIL,
        model={"name": EVIL, "n_layers": 8, "d_model": 192},
        config={EVIL: EVIL, "list": [EVIL]},
        overlap=synthetic.overlap(words=(EVIL, "</script>", "]]>")),
        example=synthetic.trace(EVIL, [("backtracking", 0, 20)], prompt=EVIL),
        steered={f"backtracking/{EVIL}": synthetic.trace(EVIL, [("deduction", 3, 9)], prompt=EVIL)},
        seconds={EVIL: 1.0},
        reference={**summary(synthetic.results()), "model.name": EVIL, "shown.backtracking.verdict": EVIL},
    )
    harmless, read = Reader(render(synthetic.results(reference={}))), Reader(render(results))
    assert "img" not in {tag for tag, _ in read.elements}
    assert sum(tag == "script" for tag, _ in read.elements) == sum(tag == "script" for tag, _ in harmless.elements)
    assert not [name for _, attrs in read.elements for name in attrs if name.startswith("on")]
    assert not [script for script in read.scripts if len(script) < 10**6 and ("<script" in script or "<img" in script)]
    assert ("model.name", EVIL, EVIL) in read.figures


def test_the_page_reads_in_light_dark_and_print(page):
    style = re.search(r"<style>(.*?)</style>", page, re.DOTALL).group(1)
    assert "prefers-color-scheme: dark" in style
    assert "@media print" in style
    assert "max-width: 60rem" in style


def test_the_reference_run_is_shown_and_labelled(results):
    full = summary(results)
    full = {**full, "evaluation.n_tasks": 200, "effect.backtracking.up.sentences.share": 0.777}
    page = render(replace(results, reference=full))
    read = Reader(page)
    own = {name: text for name, _, text in read.figures if not name.startswith("reference.")}
    theirs = {name: text for name, _, text in read.figures if name.startswith("reference.")}
    assert theirs["reference.evaluation.n_tasks"] == "200"
    assert theirs["reference.effect.backtracking.up.sentences.share"] == "77.7 %"
    assert own["effect.backtracking.up.sentences.share"] == "29.4 %"
    assert "committed full run" in page
    assert page.count("full run</td>") == 4


def test_without_a_reference_no_full_run_is_named(page):
    assert "full run" not in page


def test_a_run_with_less_to_show():
    arms = synthetic.evaluation(words=False, n_random=0)
    arms = replace(arms, arms=tuple(replace(a, accuracy=float("nan")) for a in arms.arms))
    scores = synthetic.layer_scores()
    scores.low[:], scores.high[:] = torch.nan, torch.nan
    results = synthetic.results(
        evaluation=arms, scores=scores, example=None, steered={}, traces=[], seconds={}, alignment={}
    )
    assert summary(results)["arm.unsteered.accuracy"] is None
    assert summary(results)["scores.backtracking.L3.low"] is None
    page = render(results)
    assert 'id="chains"' not in page
    assert "nan" not in " ".join(Reader(page).words).lower().replace("nance", "")


def test_chains_stand_side_by_side(page, results):
    assert page.count('<div class="chain">') == 3
    assert page.count(results.example.task.prompt) == 1
    assert "pushed&nbsp;down" in page


def test_the_same_results_make_the_same_page(results, page):
    assert render(results) == page

"""Page and summary agree, the page needs nothing from elsewhere, and no text of others becomes markup."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from dataclasses import asdict, replace
from html.parser import HTMLParser
from typing import Any

import pytest
import torch

import synthetic
from lensteer.evaluation import Margins
from lensteer.evaluation.results import SHOWN
from lensteer.report import Example, render, summary
from lensteer.report.summary import condition_key
from lensteer.statistics import Estimate

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


def plain(page):
    """The words on a page, outside figures and chains."""
    return " ".join(" ".join(Reader(page).words).split())


#: Directions without a coefficient: one of a behavior, and both of another.
LOST = (("adding-knowledge", "down"), ("adding-knowledge", "up"), ("backtracking", "up"))


@pytest.fixture(scope="module")
def results():
    return synthetic.results()


@pytest.fixture(scope="module")
def page(results):
    return render(results)


def _kinds():
    """Results of three kinds, each with the text held to other margins, and their pages."""
    masked = ("rules, cue words masked", "judge")
    conditions = synthetic.evaluation(others=masked)
    yield "story", synthetic.results(evaluation=conditions, controls=synthetic.controls(), cache=synthetic.cache())
    how: dict[str, Any] = dict(margins=Margins())
    conditions = synthetic.evaluation(story=synthetic.NOTHING, **how)
    yield "nothing found", synthetic.results(evaluation=conditions, coefficients=synthetic.coefficients(**how))
    how = dict(margins=Margins(kl=None, compression=None), without=LOST)
    conditions = synthetic.evaluation(words=False, **how)
    yield "no coefficient", synthetic.results(evaluation=conditions, coefficients=synthetic.coefficients(**how))


@pytest.fixture(scope="module")
def made():
    return {name: (found, render(found)) for name, found in _kinds()}


@pytest.fixture(params=["story", "nothing found", "no coefficient"])
def kind(request, made):
    """One of them: results, page."""
    return made[request.param]


def test_summary_is_flat_json_with_finite_numbers(kind):
    found = summary(kind[0])
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert all(value is None or isinstance(value, (bool, int, float, str)) for value in found.values())


def test_summary_holds_the_results(results):
    found = summary(results)
    effect = results.evaluation.effect("backtracking", "up")
    assert found["effect.backtracking.up.sentences.change"] == effect.change.value
    assert found["effect.backtracking.up.sentences.p_holm"] == effect.p_holm
    assert (
        found["effect.backtracking.up.tokens.share_low"]
        == results.evaluation.effect("backtracking", "up", "tokens").share.low
    )
    assert found["effect.backtracking.up.sentences.shuffled.rank"] == effect.controls[2].rank == 1
    assert found["effect.adding-knowledge.down.sentences.p_holm"] is None  # too rare to be tested
    assert found["site.backtracking.layer"] == 5
    assert found["scores.backtracking.L5.mean"] == float(results.scores.mean[3, 5])
    assert (found["doses.backtracking.down"], found["doses.backtracking.up"]) == (1.5, 1.5)
    assert found["doses.backtracking.-0.5.share"] == pytest.approx(0.095)
    assert found["doses.backtracking.-0.5.readable"] is True
    assert (found["doses.margin.parsed"], found["doses.margin.nll"]) == (0.1, None)
    assert found["cosine.adding-knowledge.example-testing"] == pytest.approx(-0.41)
    assert found["cosine.adding-knowledge.uncertainty-estimation"] is None
    assert found["arm.unsteered.accuracy"] == 0.81
    assert found["arm.backtracking.up.length"] == next(
        a.length for a in results.evaluation.conditions if a.condition == "backtracking/up"
    )
    assert found["nearest.backtracking.embedding.1.token"] == "</script>"
    assert found["traces.spans.backtracking"] == 2
    assert found["traces.n"] == 2
    assert found["seconds.total"] == 162.75
    assert found["config.doses"] == "[0.15, 0.3]"
    assert (found["plan.chains.controls"], found["power.adding-knowledge.events"]) == (9000, 9.5)
    assert found["note.0"] == results.notes[0]


def test_control_conditions_are_summed_up_by_layer_and_pool(results):
    found = summary(results)
    lengths = [a.length for a in results.evaluation.conditions if (a.layer, a.pool) == (4, "shuffled")]
    assert found["random.L4.shuffled.n"] == len(lengths) == 20
    assert found["random.L4.shuffled.n_broken"] == 0
    assert (found["random.L4.shuffled.length.min"], found["random.L4.shuffled.length.max"]) == (
        min(lengths),
        max(lengths),
    )
    assert not any("shuffled-" in name for name in found)


def test_verdicts(results):
    found = summary(results)
    assert [found[f"shown.{b}.verdict"] for b in synthetic.B4] == [
        "down: base rate too low; up: moves as random vectors do",
        "down: shown; up: not shown",
        "down: not shown; up: shown",
        "shown in both directions",
    ]
    assert found["shown.backtracking.up"] is True
    assert found["shown.example-testing.up"] is False
    assert (found["shown.n_both"], found["shown.n_behaviors"]) == (1, 4)
    assert (found["shown.n_up"], found["shown.n_down"], found["shown.n_tested"]) == (2, 2, 7)
    assert found["shown.n_down.base rate too low"] == found["shown.n_up.moves as random vectors do"] == 1


def test_every_figure_on_the_page_is_in_the_summary(kind):
    results, page = kind
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


def test_no_number_on_the_page_comes_from_elsewhere(kind):
    """Outside figures: the level of the intervals, 4-grams, and the rank of one vector beside the controls."""
    words = plain(kind[1])
    assert set(re.findall(r"(?<![\w.])\d[\d.,]*", words)) == {"95", "4", "1"}
    assert set(re.findall(r".{20}(?<![\w.])1(?!\w)", words)) == {
        m for m in re.findall(r".{20}(?<![\w.])1(?!\w)", words) if m.endswith((" + 1", " rank 1"))
    }


# --- what the page claims -------------------------------------------------------------------------

FIGURE = r'<data title="([^"]+)" value="([^"]*)">([^<]*)</data>'


def headline(page):
    """The answer: its markup, and its words with the figures in them."""
    (markup,) = re.findall(r'<p class="answer">(.*?)</p>', page, re.DOTALL)
    return markup, re.sub(r"<[^>]*>", "", markup)


def test_the_headline_counts_the_verdicts(kind):
    results, page = kind
    found, (markup, words) = summary(results), headline(page)
    ways = {k: Counter(results.evaluation.verdict(b, k) for b in synthetic.B4) for k in ("down", "up")}
    for way, verdicts in ways.items():
        shown = {b for b in synthetic.B4 if found[f"shown.{b}.{way}"]}
        assert verdicts[SHOWN] == found[f"shown.n_{way}"] == len(shown)
        rest = {v: n for v, n in verdicts.items() if v != SHOWN}
        for verdict, n in rest.items():
            figure = f'<data title="shown.n_{way}.{verdict}" value="{n}">{n}</data> “{verdict}”'
            assert markup.count(figure) == 1
        assert sum(rest.values()) + len(shown) == 4
    rises, falls = (re.search(rf"(\d+) (?:are )?shown to {verb}", words)[1] for verb in ("rise", "fall"))
    assert (int(rises), int(falls)) == (ways["up"][SHOWN], ways["down"][SHOWN])
    titles = [title for title, _, _ in re.findall(FIGURE, markup)]
    assert titles[:4] == ["model.name", "shown.n_behaviors", "shown.n_up", "shown.n_down"]
    assert all(title.startswith("shown.n_") for title in titles[4:])


def cells(page):
    """Verdicts in the table: (behavior, kind) → text, whether it is green."""
    pattern = rf'<span class="verdict( yes)?">{FIGURE}</span>'
    read = {}
    for green, title, _, text in re.findall(pattern, page):
        label, way = re.fullmatch(r"shown\.(.+)\.(up|down)_verdict", title).groups()
        assert (label, way) not in read
        read[label, way] = text, bool(green)
    return read


def test_a_verdict_is_green_only_where_it_is_shown(kind):
    results, page = kind
    found, read = summary(results), cells(page)
    assert set(read) == {(b, way) for b in synthetic.B4 for way in ("down", "up")}
    for (label, way), (text, green) in read.items():
        assert green == found[f"shown.{label}.{way}"] == (results.evaluation.verdict(label, way) == SHOWN)
        assert text == found[f"shown.{label}.{way}_verdict"] == results.evaluation.verdict(label, way)
    assert page.count('class="verdict yes"') == sum(green for _, green in read.values())


def test_where_nothing_is_found_nothing_is_claimed(made):
    results, page = made["nothing found"]
    _, words = headline(page)
    assert re.findall(r"(\S+) (?:are )?shown to", words) == ["0", "0"]
    body = re.sub(r"<style>.*?</style>", "", page, flags=re.DOTALL)
    assert not re.search(r'class="[^"]*\byes\b', body)
    assert "shown in both directions" not in body
    assert {text for text, _ in cells(page).values()} == {"not shown", "base rate too low"}
    assert summary(results)["shown.n_both"] == 0


def test_a_direction_without_coefficient_is_named_and_not_counted(made):
    results, page = made["no coefficient"]
    read = cells(page)
    assert {key for key, (text, _) in read.items() if text == "no coefficient"} == set(LOST)
    assert read["backtracking", "down"] == ("shown", True)
    assert "adding-knowledge" in page  # though it has no condition at all
    found = summary(results)
    assert (found["doses.backtracking.up"], found["doses.backtracking.down"]) == (None, 1.5)
    assert (found["shown.n_up.no coefficient"], found["shown.n_down.no coefficient"], found["shown.n_tested"]) == (
        2,
        1,
        5,
    )
    assert "effect.backtracking.up.sentences.share" not in found


def test_what_parsing_is_stands_only_where_a_grammar_is_the_measure(made):
    for name, (results, page) in made.items():
        words = plain(page)
        grammar = results.coefficients.margins.parsed is not None
        assert grammar == (name == "story")
        assert ("Chains parse if they end, close their thinking, and the grammar can read" in words) == grammar
        assert ("parse" in words) == grammar  # no word of it elsewhere


def side_effects(page):
    """Rows of the table of conditions: its last cell by the condition's path."""
    table = page[page.index("<h3>Side effects</h3>") :]
    rows = re.findall(r"<tr[^>]*>(.*?)</tr>", table[: table.index("</table>")], re.DOTALL)[1:]
    return {
        re.search(r'title="((?:arm|random)\.[^"]+?)\.accuracy(?:\.min)?"', row)[1]: re.sub(
            r"<[^>]*>", "", row[row.rindex("<td") :]
        ).strip()
        for row in rows
    }


def test_the_text_column_says_what_the_check_found(kind):
    results, page = kind
    read, found = side_effects(page), summary(results)
    own = [condition for condition in results.evaluation.conditions if not condition.pool]
    for condition in own:
        path = condition_key(condition.condition)
        expected = "standard" if condition.text is None else "within" if condition.text.ok else "worse"
        assert read[path] == expected
        assert found.get(f"{path}.text") == (None if condition.text is None else condition.text.ok)
        why = f'<data title="{path}.text_why"'
        assert (why in page) == (expected == "worse")
    assert [path for path, text in read.items() if text == "worse"] == ["arm.example-testing.up"]
    assert found["text.n_broken"] == 1
    pools = [path for path in read if path.startswith("random.")]
    assert len(read) == len(own) + len(pools)
    assert {read[path] for path in pools} == {"0 of 20 worse"}


def test_margins_on_the_page_are_those_of_the_coefficients(kind):
    results, page = kind
    stated = set(re.findall(r'<data title="doses\.margin\.(\w+)"', page))
    assert stated == {name for name, value in asdict(results.coefficients.margins).items() if value is not None}


@pytest.mark.parametrize(
    ("token", "mark"), [("\n", "⏎"), ("\n\n", "⏎⏎"), (".\n", ".⏎"), ("\t", "⇥"), ("", "∅"), (" ", "␣"), ("  ", "␣␣")]
)
def test_a_token_that_cannot_be_seen_is_shown_by_a_mark(token, mark):
    results = synthetic.results(overlap=synthetic.overlap(words=(token, " Wait", "\u200b")))
    page = render(results)
    boxes = re.findall(r'<span class="token"><data[^>]*>([^<]*)</data></span>', page, re.DOTALL)
    assert boxes[:3] == [mark, " Wait", "\\u200b"]
    assert all(box.strip() for box in boxes)
    assert summary(results)["nearest.backtracking.embedding.0.token"] == token


def test_warnings_are_on_the_page(results, page):
    assert results.notes[0] in page
    assert '<data title="note.0"' in page
    assert "<h3>Warnings</h3>" in page
    assert "Warnings" not in render(synthetic.results(notes=()))


def test_other_annotators_stand_beside_the_first(made):
    results, page = made["story"]
    read = {name: text for name, _, text in Reader(page).figures}
    assert "<h3>Other annotators" in page
    other = results.evaluation.effect("backtracking", "up", annotator="judge")
    assert read["by.judge.backtracking.up.share"] == f"{100 * other.share.value:.1f} %"
    assert read["by.rules, cue words masked.backtracking.up.base"] == "8.6"
    assert read["annotators.0"] == "rules"
    assert "<h3>Other annotators" not in made["no coefficient"][1]


def test_the_verdict_table_reads_right(page):
    read = {name: text for name, _, text in Reader(page).figures}
    assert read["effect.backtracking.up.sentences.share"] == "29.4 %"
    assert read["effect.backtracking.down.sentences.change"] == "−8.0"
    assert read["effect.backtracking.up.sentences.isotropic.low"] == "−2.1"
    assert read["effect.adding-knowledge.up.sentences.covariance_matched.rank"] == "2"
    assert read["shown.backtracking.up_verdict"] == "shown"
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
        examples=(
            Example("", "unsteered", synthetic.trace(EVIL, [("backtracking", 0, 20)], prompt=EVIL)),
            Example(EVIL, EVIL, synthetic.trace(EVIL, [(EVIL, 3, 9)], prompt=EVIL)),
        ),
        notes=(EVIL,),
        evaluation=synthetic.evaluation(others=(EVIL,)),
        seconds={EVIL: 1.0},
        reference={**summary(synthetic.results()), "model.name": EVIL, "shown.backtracking.up_verdict": EVIL},
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
    assert "max-width: 78rem" in style


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


def test_a_reference_of_an_earlier_version_claims_nothing(results, page):
    """It says whether a behavior was shown, by other rules, and has no verdict in words."""
    full = {name: value for name, value in summary(results).items() if not name.endswith("_verdict")}
    shown = render(replace(results, reference=full))
    assert shown.count("full run</td>") == 4
    assert shown.count('class="verdict yes"') == page.count('class="verdict yes"') == 4


def test_without_a_reference_no_full_run_is_named(page):
    assert "full run" not in page


def test_a_run_with_less_to_show():
    conditions = synthetic.evaluation(words=False, n_controls=0)
    conditions = replace(
        conditions,
        conditions=tuple(replace(a, accuracy=Estimate(math.nan, math.nan, math.nan)) for a in conditions.conditions),
    )
    scores = synthetic.layer_scores()
    scores.low[:], scores.high[:] = torch.nan, torch.nan
    results = synthetic.results(
        annotator={"name": "judge"},
        evaluation=conditions,
        scores=scores,
        examples=(),
        traces=[],
        seconds={},
        alignment={},
        plan={},
        notes=(),
    )
    assert summary(results)["arm.unsteered.accuracy"] is None
    assert summary(results)["scores.backtracking.L3.low"] is None
    page = render(results)
    assert "its accuracy here is unknown" in page
    assert 'id="chains"' not in page
    assert "nan" not in plain(page).lower().replace("nance", "")


def test_chains_stand_side_by_side(page, results):
    assert page.count('<div class="chain">') == 3
    assert page.count(results.examples[0].trace.task.prompt) == 1
    assert "pushed&nbsp;down" in page


def test_the_same_results_make_the_same_page(results, page):
    assert render(results) == page

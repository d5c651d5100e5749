"""Figures show the numbers of the results as they are, with unit, n and interval; markup of chains is safe."""

from __future__ import annotations

import dataclasses
import re
from html import unescape
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
import torch

import synthetic
from lensteer import plots
from lensteer.ablation import ForcedEffect, LeaveOneOut
from lensteer.attention import BehaviorAttention
from lensteer.behaviors import BEHAVIORS
from lensteer.errors import LensteerError
from lensteer.plots.measured import STRAIN_SHOWN
from lensteer.plots.style import CELL_FONT, CONTROL_BAND, DIVERGING, MARKERS, PAPER, TAGS, in_cell, number

PACKAGE = Path(plots.__file__).parent.parent

#: How the three kinds of color blindness see linear RGB: Machado, Oliveira and Fernandes (2009), severity 1.
BLINDNESS = {
    "protan": [[0.152286, 1.052583, -0.204868], [0.114503, 0.786281, 0.099216], [-0.003882, -0.048116, 1.051998]],
    "deutan": [[0.367322, 0.860646, -0.227968], [0.280085, 0.672501, 0.047413], [-0.011820, 0.042940, 0.968881]],
    "tritan": [[1.255528, -0.076749, -0.178779], [-0.078411, 0.930809, 0.147602], [0.004733, 0.691367, 0.303900]],
    "none": np.eye(3).tolist(),
}


def lab(code: str, blindness: str) -> np.ndarray:
    """CIE L*a*b* (D65) of a color as it is seen."""
    rgb = np.array([int(code[i : i + 2], 16) / 255 for i in (1, 3, 5)])
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    seen = np.clip(np.array(BLINDNESS[blindness]) @ linear, 0, 1)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ seen
    x, y, z = np.cbrt(xyz / [0.9505, 1.0, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("blindness", BLINDNESS)
def test_behaviors_can_be_told_apart(blindness):
    seen = {label: lab(code, blindness) for label, code in plots.COLORS.items()}
    distances = {pair: np.linalg.norm(seen[pair[0]] - seen[pair[1]]) for pair in combinations(seen, 2)}
    assert min(distances.values()) > 15


def test_every_behavior_has_its_own_color_marker_and_tag():
    for signs in (plots.COLORS, MARKERS, TAGS):
        assert tuple(signs) == BEHAVIORS
        assert len(set(signs.values())) == len(BEHAVIORS)


def test_colors_are_written_nowhere_else():
    color = re.compile(r"""["' :]#[0-9a-fA-F]{3,8}\b|\b(rgba?|hsla?)\(""")
    found = [
        f"{path.relative_to(PACKAGE)}: {line.strip()}"
        for path in PACKAGE.rglob("*.py")
        if PACKAGE / "plots" not in path.parents
        for line in path.read_text(encoding="utf-8").splitlines()
        if color.search(line)
    ]
    assert found == []


def luminance(rgb) -> float:
    """Relative, of WCAG 2: of 0 to 255."""
    share = np.asarray(rgb) / 255
    return float(np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4) @ [0.2126, 0.7152, 0.0722])


def test_numbers_in_cells_can_be_read():
    stops = [[int(str(code)[i : i + 2], 16) for i in (1, 3, 5)] for _, code in DIVERGING]
    for tone in np.linspace(-1, 1, 401):
        paper = luminance([np.interp(tone, [-1, 0, 1], channel) for channel in zip(*stops, strict=True)])
        cell = in_cell("7", tone)
        assert cell == "7" or PAPER in cell
        ink = luminance([0] * 3 if cell == "7" else [255] * 3)
        assert (max(ink, paper) + 0.05) / (min(ink, paper) + 0.05) >= 4.5
    assert CELL_FONT["color"] == "#000000"
    assert in_cell("undefined", float("nan")) == "undefined"


def test_numbers_have_the_sign_of_axes_and_zero_has_none():
    assert [number(v, "+.2f") for v in (-0.204, -0.004, 0.0, 0.004, 0.204)] == [
        "−0.20",
        "0.00",
        "0.00",
        "0.00",
        "+0.20",
    ]
    assert [number(v) for v in (-0.204, -0.004, 0.204)] == ["−0.20", "0.00", "0.20"]
    assert number(-1.5e-07, ".3g") == "−1.5e−07"


def named(figure, name):
    return next(trace for trace in figure.data if trace.name == name)


def ringed(figure):
    """Points in rings: (x, y) of all traces of open circles."""
    return {
        (x, y)
        for trace in figure.data
        if trace.mode == "markers" and trace.marker.symbol == "circle-open"
        for x, y in zip(trace.x, trace.y, strict=True)
        if x is not None
    }


def test_layer_scores_are_drawn_as_they_are():
    scores, layers = synthetic.layer_scores(), synthetic.layers()
    figure = plots.layer_scores(scores, layers)
    for b, label in enumerate(scores.labels):
        line = named(figure, label)
        assert line.x == scores.layers
        assert list(line.y) == scores.mean[b].tolist()
        assert line.line.color == plots.COLORS[label]
        bounds = zip(scores.low[b].tolist(), scores.high[b].tolist(), strict=True)
        assert [tuple(row[:2]) for row in line.customdata] == list(bounds)
        assert f"n = {scores.n_spans[b]} spans" in line.hovertemplate
        band = next(t for t in figure.data if t.fill == "toself" and t.legendgroup == label)
        assert list(band.y) == [*scores.high[b].tolist(), *reversed(scores.low[b].tolist())]
    wanted = {(layer, float(scores.mean[scores.row(label), layer])) for label, layer in layers.items()}
    assert ringed(figure) == wanted
    assert "nats" in figure.layout.yaxis.title.text
    assert "95 % interval over 64 traces" in figure.layout.yaxis.title.text
    assert ringed(plots.layer_scores(scores)) == set()


def test_layer_scores_say_what_the_noise_floor_swallows():
    scores = synthetic.layer_scores()
    remarks = {row[2] for label in scores.labels for row in named(plots.layer_scores(scores), label).customdata}
    assert remarks == {""}
    noisy = synthetic.layer_scores()
    object.__setattr__(noisy, "noise_floor", 0.05)
    line = named(plots.layer_scores(noisy), "backtracking")
    assert [bool(row[2]) for row in line.customdata] == noisy.below_noise()[noisy.row("backtracking")].tolist()


def test_scores_that_are_undefined_leave_a_gap():
    scores = synthetic.layer_scores()
    scores.mean[0], scores.low[0], scores.high[0] = torch.nan, torch.nan, torch.nan
    assert "NaN" not in plots.layer_scores(scores, synthetic.layers()).to_json()


def test_overlap_shows_both_sides_with_their_tokens():
    overlap, layers = synthetic.overlap(), synthetic.layers()
    figure = plots.overlap(overlap, layers)
    lines = [trace for trace in figure.data if trace.name == "backtracking"]
    row = overlap.labels.index("backtracking")
    assert [list(t.y) for t in lines] == [
        overlap.embedding.maximum[row].tolist(),
        overlap.unembedding.maximum[row].tolist(),
    ]
    assert [t.showlegend for t in lines] == [True, False]
    hover = lines[0].customdata[0]
    assert "' Wait' +0." in hover
    assert "&lt;/script&gt;" in hover
    written = figure.to_html(include_plotlyjs=False, full_html=False)
    assert written.count("</script>") == written.count("<script")
    assert len(ringed(figure)) == 2 * len(layers)


def test_cosines_stand_in_the_cells():
    figure = plots.cosine_matrix(synthetic.cosines())
    (cells,) = figure.data
    assert list(cells.text[0][:3]) == [in_cell("1.00", 1.0), "−0.41", "undefined"]
    assert cells.customdata[0][1] == "−0.41<br>95 % interval −0.51 to −0.31"
    assert cells.x[3] == "backtracking (L5)"
    assert (cells.zmin, cells.zmax) == (-1, 1)
    bare = synthetic.cosines()
    object.__setattr__(bare, "low", None)
    assert plots.cosine_matrix(bare).data[0].customdata[0][1] == "−0.41"
    together = plots.cosine_matrix(dataclasses.replace(synthetic.cosines(), layers=(5,) * 4))
    assert together.data[0].x[3] == "backtracking"
    assert together.layout.title.text == "Cosines between the vectors at layer 5"


@pytest.mark.parametrize("unit", ["sentences", "tokens"])
def test_effects_are_drawn_as_they_are(unit):
    evaluation = synthetic.evaluation()
    figure = plots.effects(evaluation, unit)
    bars = {float(t.x[0]): t for t in figure.data if t.type == "bar"}
    behaviors = list(dict.fromkeys(e.behavior for e in evaluation.effects))
    for group, behavior in enumerate(behaviors):
        for kind, place in (("down", 0), ("up", 2), ("prompted", 3)):
            effect, bar = evaluation.effect(behavior, kind, unit), bars[5 * group + place]
            assert bar.y[0] == effect.share.value
            assert bar.y[0] + bar.error_y.array[0] == pytest.approx(effect.share.high)
            assert bar.y[0] - bar.error_y.arrayminus[0] == pytest.approx(effect.share.low)
            assert bar.marker.color == plots.COLORS[behavior]
            assert "n = 50 tasks × 2 samples" in bar.hovertemplate
        base = evaluation.effect(behavior, "up", unit)
        assert bars[5 * group + 1].y[0] == base.base.value
        band = figure.layout.shapes[group]
        assert (band.y0, band.y1) == (base.base.value + base.control_low, base.base.value + base.control_high)
        assert f"change {100 * effect.change.value:+.1f} points" in bar.hovertemplate
    assert f"share of {unit}" in figure.layout.yaxis.title.text
    assert "95 % interval over 50 tasks" in figure.layout.yaxis.title.text
    assert any("20 control vectors of each kind" in (trace.name or "") for trace in figure.data)


def test_effects_without_words_or_chance():
    evaluation = synthetic.evaluation(words=False, n_controls=0)
    figure = plots.effects(evaluation)
    assert sum(t.type == "bar" for t in figure.data) == 3 * 4
    assert not figure.layout.shapes
    assert not any("control" in (trace.name or "") for trace in figure.data)


def test_effects_of_a_direction_without_coefficient_have_no_bar():
    evaluation = synthetic.evaluation(without=(("backtracking", "up"),), others=("judge",))
    figure = plots.effects(evaluation)
    bars = {float(t.x[0]): t for t in figure.data if t.type == "bar"}
    assert len(bars) == 4 * 4 - 1  # another annotator's shares are no bars either
    assert sorted(x for x in bars if x >= 15) == [15, 16, 18]
    assert bars[16].y[0] == evaluation.effect("backtracking", "down").base.value


def test_effects_of_an_unknown_unit():
    with pytest.raises(LensteerError, match=r"'words': choose one of 'sentences', 'tokens'"):
        plots.effects(synthetic.evaluation(), "words")


def test_multiples_are_colored_by_their_logarithm():
    lift = torch.ones(2, 2, 2, 2)
    lift[0, 0, 0, 1], lift[0, 1, 0, 1], lift[1, 0, 0, 1], lift[1, 1, 0, 1] = 4.0, 0.5, 0.0, torch.nan
    found = BehaviorAttention(
        BEHAVIORS[-2:], (3, 5), lift, lift - 0.1, lift + 0.1, 0.1 * lift, torch.full((2, 2), 9), 4
    )
    figure = plots.head_map(found, ("uncertainty-estimation", "backtracking"), heads=[(5, 1)])
    cells = figure.data[0]
    assert list(cells.z[0]) == [2, -1]
    assert cells.z[1][0] < cells.zmin == -3 == -cells.zmax
    assert cells.z[1][1] is None
    assert cells.colorbar.ticktext[0] == "≤ 0.125"
    assert cells.colorbar.ticktext[-1] == "8"
    assert cells.customdata[0][0].startswith("4<br>95 % interval 3.9 to 4.1")
    assert "square: a chosen head" in figure.layout.title.text
    lift[1, 0, 0, 1] = 1.25
    small = plots.head_map(dataclasses.replace(found, lift=lift), ("uncertainty-estimation", "backtracking"))
    assert (small.data[0].zmin, small.data[0].zmax) == (-2, 2)
    assert "square" not in small.layout.title.text


def test_coefficients_with_the_chosen_ones_marked():
    coefficients = synthetic.coefficients(
        without=(("backtracking", "up"), ("example-testing", "down"), ("example-testing", "up"))
    )
    figure = plots.coefficients(coefficients)
    for label in synthetic.B4:
        share, strain = [t for t in figure.data if t.name == label]
        curve = [d for d in coefficients.curve if d.behavior == label]
        assert list(share.x) == list(strain.x) == [d.coefficient for d in curve]
        assert list(share.y) == [d.share for d in curve]
        assert list(strain.y) == [0.0 if d.text is None else d.text.strain for d in curve]
        assert [y <= 1 for y in strain.y] == [d.readable for d in curve]
        assert "40 dev tasks" in share.hovertemplate
    chosen = {
        (sign * kind[label], d.share)
        for sign, kind in ((-1, coefficients.down), (1, coefficients.up))
        for label in kind
        for d in coefficients.curve
        if (d.behavior, d.coefficient) == (label, sign * kind[label])
    }
    ringed_shares = {
        (x, y)
        for trace in figure.data
        if trace.mode == "markers" and trace.marker.symbol == "circle-open" and trace.yaxis == "y"
        for x, y in zip(trace.x, trace.y, strict=True)
        if x is not None
    }
    assert ringed_shares == chosen
    assert 1.5 not in {x for x, _ in chosen}  # every coefficient of backtracking up breaks the text
    assert figure.layout.shapes[0].y0 == 1
    assert "1 = the difference of means itself" in figure.layout.xaxis2.title.text
    assert "40 dev tasks" in figure.layout.title.text


def test_a_coefficient_says_what_it_breaks_and_a_large_strain_is_cut_off():
    coefficients = synthetic.coefficients()
    huge = dataclasses.replace(coefficients.curve[0], text=synthetic.text_check(coefficients.margins, 40.0))
    figure = plots.coefficients(dataclasses.replace(coefficients, curve=(huge, *coefficients.curve[1:])))
    _, strain = [t for t in figure.data if t.name == huge.behavior]
    assert strain.y[0] == STRAIN_SHOWN
    assert "parsed" in str(strain.customdata[0])
    assert "unsteered 0.98" in str(strain.customdata[0])
    assert "within its margins" in str(strain.customdata[1])


@pytest.mark.parametrize(
    "figure",
    [
        lambda: plots.layer_scores(synthetic.layer_scores()),
        lambda: plots.overlap(synthetic.overlap()),
        lambda: plots.cosine_matrix(synthetic.cosines()),
        lambda: plots.effects(synthetic.evaluation()),
        lambda: plots.coefficients(synthetic.coefficients()),
    ],
)
def test_figures_have_one_template_and_titles(figure):
    layout = figure().layout
    assert layout.template.layout.paper_bgcolor == plots.PAPER
    assert layout.title.text
    assert layout.height


def text_of(markup: str) -> str:
    """What a reader sees of an annotated chain, without the tags in front of the sentences."""
    return unescape(re.sub(r"<[^>]*>", "", re.sub(r"<small.*?</small>", "", markup)))


def test_a_chain_keeps_its_text_and_colors_its_sentences():
    trace = synthetic.trace()
    markup = plots.chain_html(trace, header=False)
    assert text_of(markup) == trace.response
    colored = re.findall(r'<span style="[^"]*solid (#\w+)" title="([^"]+)">', markup)
    assert colored == [(plots.COLORS[span.label], span.label) for span in trace.spans]


def test_a_chain_is_escaped():
    evil = "<script>alert('1')</script> & \"quoted\" <b>Wait</b>"
    trace = synthetic.trace(evil, [("backtracking", 0, 15), ("deduction", 20, len(evil))], prompt=f"Why {evil}")
    markup = plots.chain_html(trace)
    assert "<script" not in markup
    assert "<b>Wait" not in markup
    assert text_of(plots.chain_html(trace, header=False)) == evil
    assert f"Why {evil}" in text_of(markup)


def test_a_chain_of_overlapping_or_no_sentences():
    text = "one two three"
    overlapping = synthetic.trace(text, [("deduction", 0, 7), ("backtracking", 4, 13), ("initializing", 5, 6)])
    assert text_of(plots.chain_html(overlapping, header=False)) == text
    assert "no annotated sentence" in plots.chain_html(synthetic.trace(text, []))


def test_markup_shows_itself_in_notebooks():
    markup = plots.chain_html(synthetic.trace())
    assert isinstance(markup, str)
    assert markup._repr_html_() == markup


def test_the_legend_names_each_behavior_once_in_order():
    names = re.findall(r'title="([^"]+)"', plots.legend_html(["backtracking", "deduction", "backtracking"]))
    assert names == ["deduction", "backtracking"]


def test_scores_beside_controls_show_each_behavior_its_own_band_and_p_values():
    scores = synthetic.layer_scores()
    draws = torch.rand(40, *scores.mean.shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    scores = dataclasses.replace(scores, controls={"covariance_matched": 0.1 * draws, "shuffled": 0.2 * draws})
    figure = plots.against_controls(scores, synthetic.LAYERS)
    bands = [t for t in figure.data if t.fill == "toself" and t.fillcolor == CONTROL_BAND]
    assert len(bands) == len(scores.labels)
    n = len(scores.layers)
    assert bands[0].y[:n] == pytest.approx((0.2 * draws[:, 0]).quantile(0.975, dim=0).tolist())
    outlines = [t for t in figure.data if t.line.dash == "dot"]
    assert all(None in t.y for t in outlines)  # two curves, not an area
    curves = [t for t in figure.data if t.name in scores.labels]
    assert [t.name for t in curves] == list(scores.labels)
    assert "p " in curves[0].customdata[3]
    assert "over all cells" in curves[0].customdata[3]
    with pytest.raises(LensteerError, match="controls=200"):
        plots.against_controls(synthetic.layer_scores())


def test_what_a_plan_does_to_each_token():
    trace = synthetic.trace()
    kl = torch.rand(len(trace.response), generator=torch.Generator().manual_seed(0))
    effect = ForcedEffect(trace.prompt_length, kl, kl - 0.5)
    figure = plots.forced_effect(effect, trace)
    for axis, values in (("y", effect.kl), ("y2", effect.change)):
        drawn = {x: y for bar in figure.data if bar.yaxis == axis for x, y in zip(bar.x, bar.y, strict=True)}
        assert drawn == dict(enumerate(values.tolist(), trace.prompt_length))
    span = next(span for span in trace.spans if span.label == "deduction")
    bar = next(bar for bar in figure.data if bar.name == "deduction")
    assert span.start in bar.x
    assert bar.marker.color == plots.COLORS["deduction"]
    assert f"total KL {effect.total:.3g} nats" in figure.layout.title.text
    stripes = [(shape.x0, shape.x1) for shape in figure.layout.shapes if shape.yref == "y2 domain"]
    assert stripes == [(span.start - 0.5, span.end - 0.5) for span in trace.spans]
    assert [bar.name for bar in figure.data if bar.showlegend] == [bar.name for bar in figure.data if bar.yaxis == "y"]
    with pytest.raises(LensteerError, match="give the trace that was measured"):
        plots.forced_effect(ForcedEffect(trace.prompt_length, kl[1:], kl[1:]), trace)


def test_left_out_groups_stand_in_the_order_of_the_chain():
    found = LeaveOneOut(("b <i>", "a"), ((7, 8), (3,)), 1.5, (1.75, 0.25), "log_prob", (9,))
    (bar,) = plots.leave_one_out(found).data
    assert bar.y == ("a", "b &lt;i&gt;")
    assert bar.x == (1.25, -0.25)
    assert bar.marker.color[0] != bar.marker.color[1]
    assert [tuple(row) for row in bar.customdata] == [(1, 3), (2, 7)]
    figure = plots.leave_one_out(found)
    assert "+1.5 nats" in figure.layout.title.text
    assert "log-probability of the target tokens" in figure.layout.xaxis.title.text

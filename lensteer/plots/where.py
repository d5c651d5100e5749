"""Figures of where a behavior acts: layer scores and their controls, overlap with single tokens, cosines."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.attribution import LayerScores, control_tests
from lensteer.attribution.overlap import SIDES, EmbeddingOverlap
from lensteer.plots.style import (
    CELL_FONT,
    CONTROL_BAND,
    DIVERGING,
    INK,
    MUTED,
    band,
    color_bar,
    curve,
    faint,
    finish,
    in_cell,
    key,
    number,
    rings,
)
from lensteer.vectors.geometry import CosineMatrix


def layer_scores(scores: LayerScores, layers: Mapping[str, int] | None = None) -> go.Figure:
    """The score of every behavior and layer, with its interval as a band, and the selected layers ringed.

    Args:
        scores: of any method; the axis names it and its unit.
        layers: the chosen layers.
    """
    figure = go.Figure()
    noisy = scores.below_noise().tolist()
    for b, label in enumerate(scores.labels):
        mean, low, high = (values[b].tolist() for values in (scores.mean, scores.low, scores.high))
        figure.add_trace(band(label, scores.layers, low, high))
        remarks = ["<br>under ten times the noise floor" if flag else "" for flag in noisy[b]]
        hover = (
            f"<b>{label}</b>, layer %{{x}}<br>{scores.name} %{{y:.3g}} {scores.unit}<br>"
            "95 % interval %{customdata[0]:.3g} to %{customdata[1]:.3g}<br>"
            f"n = {scores.n_spans[b]} spans%{{customdata[2]}}<extra></extra>"
        )
        figure.add_trace(curve(label, scores.layers, mean, hover, list(zip(low, high, remarks, strict=True))))
    if layers is not None:
        chosen = [(b, layer) for b, layer in layers.items() if b in scores.labels and layer in scores.layers]
        means = [float(scores.mean[scores.row(b), scores.layers.index(layer)]) for b, layer in chosen]
        figure.add_trace(rings([(b, layer, mean) for (b, layer), mean in zip(chosen, means, strict=True)]))
        figure.add_trace(key("selected layer", "circle-open", INK))
    figure.update_xaxes(
        title_text=f"layer (output of block; the model has {scores.n_layers})", dtick=_step(scores), zeroline=False
    )
    figure.update_yaxes(
        title_text=f"{scores.name} ({scores.unit})<br>mean over spans, 95 % interval over {scores.n_traces} traces",
        rangemode="tozero",
    )
    return finish(figure, "Effect of each vector on the next token", 470)


def _step(has_layers: LayerScores | EmbeddingOverlap) -> int:
    return 1 if len(has_layers.layers) <= 24 else 4


def overlap(overlap: EmbeddingOverlap, layers: Mapping[str, int] | None = None) -> go.Figure:
    """The largest cosine of every vector with a single token, by layer: input tokens, and next tokens."""
    titles = ("embedding: input token", "unembedding: next token")
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    for column, side in enumerate(SIDES, 1):
        tokens = getattr(overlap, side)
        for b, label in enumerate(overlap.labels):
            words = [
                "<br>".join(
                    f"{escape(repr(text), quote=False)} {cosine:+.2f}"
                    for text, cosine in overlap.nearest(label, layer, side)
                )
                for layer in overlap.layers
            ]
            hover = f"<b>{label}</b>, layer %{{x}}<br>largest cosine %{{y:.3f}}<br>nearest:<br>"
            hover += "%{customdata}<extra></extra>"
            line = curve(label, overlap.layers, tokens.maximum[b].tolist(), hover, words)
            figure.add_trace(line.update(showlegend=column == 1), row=1, col=column)
        if layers is not None:
            chosen = [(b, layer) for b, layer in layers.items() if b in overlap.labels and layer in overlap.layers]
            places = [(overlap.labels.index(b), overlap.layers.index(layer)) for b, layer in chosen]
            heights = [float(tokens.maximum[place]) for place in places]
            points = [(b, layer, height) for (b, layer), height in zip(chosen, heights, strict=True)]
            figure.add_trace(rings(points), row=1, col=column)
    if layers is not None:
        figure.add_trace(key("selected layer", "circle-open", INK), row=1, col=1)
    figure.update_xaxes(title_text="layer", dtick=_step(overlap), zeroline=False)
    figure.update_yaxes(title_text="largest cosine with a token", row=1, col=1)
    figure.update_annotations(font_size=13)
    return finish(figure, "Overlap of each vector with single tokens", 420)


def cosine_matrix(matrix: CosineMatrix) -> go.Figure:
    """Cosines between the behaviors' vectors, with the numbers in the cells and intervals on hover."""
    shared = len(set(matrix.layers)) == 1
    names = [label if shared else f"{label} (L{at})" for label, at in zip(matrix.labels, matrix.layers, strict=True)]
    values = matrix.values.tolist()
    texts = [["undefined" if math.isnan(v) else number(v) for v in row] for row in values]
    bounds = [[""] * len(names) for _ in names]
    if matrix.low is not None and matrix.high is not None:
        level = f"{100 * matrix.level:g} %"
        bounds = [
            [f"<br>{level} interval {number(low)} to {number(high)}" for low, high in zip(*pair, strict=True)]
            for pair in zip(matrix.low.tolist(), matrix.high.tolist(), strict=True)
        ]
    figure = go.Figure(
        go.Heatmap(
            x=names,
            y=names,
            z=values,
            text=[[in_cell(*cell) for cell in zip(*pair, strict=True)] for pair in zip(texts, values, strict=True)],
            texttemplate="%{text}",
            textfont=CELL_FONT,
            customdata=[[t + b for t, b in zip(*pair, strict=True)] for pair in zip(texts, bounds, strict=True)],
            hovertemplate="%{y}<br>%{x}<br>cosine %{customdata}<extra></extra>",
            zmin=-1,
            zmax=1,
            colorscale=DIVERGING,
            colorbar=color_bar("cosine"),
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(showgrid=False, ticks="", tickangle=-30)
    figure.update_yaxes(showgrid=False, ticks="", autorange="reversed")
    where = f"at layer {matrix.layers[0]}" if shared else "(layer of each in brackets)"
    return finish(figure, f"Cosines between the vectors {where}", 120 + 60 * len(names), False)


NAMES = {"covariance_matched": "vectors with the spans' covariance", "shuffled": "vectors of shuffled labels"}
LEVEL = 0.95


def against_controls(scores: LayerScores, layers: Mapping[str, int] | None = None) -> go.Figure:
    """A panel per behavior: its score by layer with 95 % interval, and the middle 95 % of each kind of control vectors.

    Args:
        scores: made with `controls=…`.
        layers: the chosen layers, ringed.

    Raises:
        LensteerError: scores without control vectors.
    """
    tests = control_tests(scores)
    figure = make_subplots(
        1, len(scores.labels), shared_yaxes=True, subplot_titles=scores.labels, horizontal_spacing=0.02
    )
    for b, label in enumerate(scores.labels):
        place = dict(row=1, col=b + 1)
        for kind, draws in scores.controls.items():
            low, high = (draws[:, b].quantile(q, dim=0).tolist() for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
            figure.add_trace(_band(scores, low, high, CONTROL_BAND if kind == "shuffled" else None), **place)
        low, high = scores.low[b].tolist(), scores.high[b].tolist()
        figure.add_trace(_band(scores, low, high, faint(label, 0.25)), **place)
        rows = [
            f"95 % interval {low[i]:.3g} to {high[i]:.3g}<br>"
            + "<br>".join(
                f"{NAMES[kind]}: z {float(tests.z[k, b, i]):.1f}, p {float(tests.p[k, b, i]):.3g}, "
                f"over all cells p {float(tests.p_max[k, b, i]):.3g}"
                for k, kind in enumerate(tests.kinds)
            )
            for i in range(len(scores.layers))
        ]
        hover = f"<b>{label}</b>, layer %{{x}}<br>%{{y:.3g}} {scores.unit}, n = {scores.n_spans[b]} spans<br>"
        hover += "%{customdata}<extra></extra>"
        line = curve(label, scores.layers, scores.mean[b].tolist(), hover, rows)
        figure.add_trace(line.update(showlegend=False), **place)
        if layers is not None and label in layers and layers[label] in scores.layers:
            height = float(scores.mean[b, scores.layers.index(layers[label])])
            figure.add_trace(rings([(label, layers[label], height)]), **place)
    figure.add_trace(key(f"middle 95 % of {tests.n} {NAMES['shuffled']}", "square", CONTROL_BAND), row=1, col=1)
    dotted = key(f"middle 95 % of {tests.n} {NAMES['covariance_matched']}", "square", MUTED)
    figure.add_trace(dotted.update(mode="lines", line=dict(color=MUTED, dash="dot", width=1)), row=1, col=1)
    if layers is not None:
        figure.add_trace(key("selected layer", "circle-open", INK), row=1, col=1)
    figure.update_xaxes(title_text="layer", dtick=1 if len(scores.layers) <= 12 else 4, zeroline=False)
    title = f"{scores.name} ({scores.unit})<br>95 % interval over {scores.n_traces} traces"
    figure.update_yaxes(title_text=title, rangemode="tozero", row=1, col=1)
    figure.update_annotations(font_size=13)
    return finish(figure, "Each behavior's vector and control vectors of the same length", 430)


def _band(scores: LayerScores, low: list[float], high: list[float], fill: str | None) -> go.Scatter:
    """The area between two curves, or only the curves."""
    middle = [] if fill else [None]
    return go.Scatter(
        x=[*scores.layers, *middle, *(reversed(scores.layers) if fill else scores.layers)],
        y=[*high, *middle, *(reversed(low) if fill else low)],
        mode="lines",
        fill="toself" if fill else "none",
        fillcolor=fill,
        line=dict(width=0) if fill else dict(width=1, color=MUTED, dash="dot"),
        hoverinfo="skip",
        showlegend=False,
    )

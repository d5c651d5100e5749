"""Figures of where a behavior acts: layer scores, overlap with single tokens, cosines between vectors."""

from __future__ import annotations

import math
from collections.abc import Mapping
from html import escape

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.attribution import LayerScores
from lensteer.geometry import CosineMatrix
from lensteer.overlap import SIDES, EmbeddingOverlap
from lensteer.plots.style import CELL_FONT, DIVERGING, INK, band, color_bar, curve, finish, in_cell, key, number, rings


def layer_scores(scores: LayerScores, site: Mapping[str, int] | None = None) -> go.Figure:
    """The score of every behavior and layer, with its interval as a band, and the selected layers ringed.

    Args:
        scores: of any method; the axis names it and its unit.
        site: the chosen layers.
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
    if site is not None:
        chosen = [(b, layer) for b, layer in site.items() if b in scores.labels and layer in scores.layers]
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
    return finish(figure, "How much each vector changes the next token", 470)


def _step(has_layers: LayerScores | EmbeddingOverlap) -> int:
    return 1 if len(has_layers.layers) <= 24 else 4


def overlap(overlap: EmbeddingOverlap, site: Mapping[str, int] | None = None) -> go.Figure:
    """The largest cosine of every vector with a single token, by layer: what was read, and what is said next."""
    titles = ("embedding: the word that was read", "unembedding: the word that comes next")
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
        if site is not None:
            chosen = [(b, layer) for b, layer in site.items() if b in overlap.labels and layer in overlap.layers]
            places = [(overlap.labels.index(b), overlap.layers.index(layer)) for b, layer in chosen]
            heights = [float(tokens.maximum[place]) for place in places]
            points = [(b, layer, height) for (b, layer), height in zip(chosen, heights, strict=True)]
            figure.add_trace(rings(points), row=1, col=column)
    if site is not None:
        figure.add_trace(key("selected layer", "circle-open", INK), row=1, col=1)
    figure.update_xaxes(title_text="layer", dtick=_step(overlap), zeroline=False)
    figure.update_yaxes(title_text="largest cosine with a token", row=1, col=1)
    figure.update_annotations(font_size=13)
    return finish(figure, "How much of each vector is just a word", 420)


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

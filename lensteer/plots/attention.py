"""Figures of attention between sentences: one head's heat map, a score of every head, behavior by behavior."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape
from typing import Any

from plotly import graph_objects as go

from lensteer.attention import ELSEWHERE, BehaviorAttention, Head, ReceiverHeads, SentenceAttention
from lensteer.errors import LensteerError
from lensteer.plots.style import (
    CELL_FONT,
    DIVERGING,
    INK,
    PAPER,
    TAGS,
    Number,
    color,
    color_bar,
    finish,
    in_cell,
    marker,
    number,
)

_RISING = [[0.0, DIVERGING[1][1]], [1.0, DIVERGING[2][1]]]
_WIDTH = 90  # characters of a sentence in a hover
_DOUBLINGS = 3  # largest range of colors for multiples: 8 times and an eighth


def sentence_attention(attention: SentenceAttention, layer: int, head: int) -> go.Figure:
    """One head's attention between the sentences of a trace, with the behaviors as colored marks along both axes.

    Colors end at the largest attention to another sentence. Hover over a mark on the left for the attention elsewhere.

    Raises:
        LensteerError: no such layer or head here.
    """
    values = attention.at(layer, head)
    n = len(attention.labels)
    rest = attention.elsewhere[attention.layers.index(layer), head].tolist()
    named = zip(attention.labels, attention.texts, strict=True)
    says = [f"{i} {label}: {_short(text)}" for i, (label, text) in enumerate(named)]
    shown = [[v if j <= i else None for j, v in enumerate(row)] for i, row in enumerate(values.tolist())]
    hover = [[f"from {says[i]}<br>to {says[j]}<br>{attention.lengths[j]} tokens" for j in range(n)] for i in range(n)]
    figure = go.Figure(
        go.Heatmap(
            z=shown,
            customdata=hover,
            hovertemplate="%{customdata}<br>mass %{z:.3f}<extra></extra>",
            zmin=0,
            zmax=float(values.tril(-1).max()) or 1.0,  # the diagonal is largest and would hide the rest
            colorscale=_RISING,
            colorbar=color_bar("attention mass<br>(share of 1)"),
        )
    )
    marks = [*dict.fromkeys(attention.labels)]
    elsewhere = [
        "<br>".join(f"{mass:.3f} on {name}" for name, mass in zip(ELSEWHERE, row, strict=True)) for row in rest
    ]
    for label in marks:
        rows = [i for i, own in enumerate(attention.labels) if own == label]
        said = [f"{says[i]}<br>{elsewhere[i]}<br>{sum(values[i].tolist()):.3f} on sentences" for i in rows]
        figure.add_trace(_marks(label, [-1.0] * len(rows), rows, said, legend=True))
        figure.add_trace(_marks(label, rows, [float(n)] * len(rows), [says[i] for i in rows], legend=False))
    ticks = list(range(0, n, max(1, math.ceil(n / 20))))
    axis = dict(tickvals=ticks, showgrid=False, zeroline=False, constrain="domain")
    figure.update_xaxes(title_text="key sentence (number in the chain)", range=[-1.8, n - 0.4], **axis)
    figure.update_yaxes(title_text="query sentence", range=[n + 0.8, -0.6], scaleanchor="x", **axis)
    title = f"Attention of head {head} of layer {layer}: {escape(attention.trace)}"
    title += "<br><sup>colors end at the largest attention to another sentence</sup>"
    return finish(figure, title, 660)


def head_map(
    found: ReceiverHeads | BehaviorAttention,
    pair: tuple[str, str] | None = None,
    heads: Sequence[Head] = (),
) -> go.Figure:
    """A score of every head: kurtosis of receiver heads, or the lift of one pair of behaviors, with intervals on hover.

    Args:
        found: the scores.
        pair: for `BehaviorAttention`: query and key behavior.
        heads: (layer, head) of chosen ones, to mark with squares.

    Raises:
        LensteerError: a pair for receiver heads, no pair for behaviors, or a pair of unknown behaviors.
    """
    if isinstance(found, ReceiverHeads):
        if pair is not None:
            raise LensteerError(f"pair={pair!r}: receiver heads have one score each; leave the pair out")
        score, low, high = found.kurtosis, found.low, found.high
        name, bar = "excess kurtosis of received attention", "excess<br>kurtosis"
        n = f"n = {found.n_traces} traces"
        title = "kurtosis of the attention that sentences receive"
    else:
        if pair is None or not set(pair) <= set(found.labels):
            raise LensteerError(f"pair={pair!r}: give query and key behavior, two of {list(found.labels)}")
        a, b = (found.labels.index(label) for label in pair)
        score, low, high = (values[..., a, b] for values in (found.lift, found.low, found.high))
        name, bar = "multiple of what positions alone predict", "multiple"
        n = f"n = {int(found.n_pairs[a, b])} pairs of sentences, {found.n_traces} traces"
        title = f"attention from {pair[0]} to {pair[1]}"
    if found.change:
        name, bar, title = f"change of {name}", f"change of<br>{bar}", f"change under steering: {title}"
    rows = [
        [f"{_number(v)}<br>95 % interval {_number(lo)} to {_number(hi)}<br>{n}" for v, lo, hi in zip(*row, strict=True)]
        for row in zip(score.tolist(), low.tolist(), high.tolist(), strict=True)
    ]
    colored = _colored(score.tolist(), bar, found.change, 1 if isinstance(found, BehaviorAttention) else None)
    figure = go.Figure(
        go.Heatmap(
            x=list(range(score.shape[1])),
            y=list(range(len(found.layers))),
            **colored,
            customdata=rows,
            hovertemplate=f"layer %{{text}}, head %{{x}}<br>{name} %{{customdata}}<extra></extra>",
            text=[[str(layer)] * score.shape[1] for layer in found.layers],
            xgap=1,
            ygap=1,
        )
    )
    chosen = [(head, found.layers.index(layer)) for layer, head in heads if layer in found.layers]
    if chosen:
        x, y = zip(*chosen, strict=True)
        for size, paint in ((20, INK), (16, PAPER)):  # one of them is visible on any color
            marker = dict(symbol="square-open", size=size, color=paint, line=dict(width=2))
            figure.add_scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False)
    every = max(1, math.ceil(len(found.layers) / 24))
    figure.update_xaxes(title_text="head", dtick=max(1, math.ceil(score.shape[1] / 24)), showgrid=False, zeroline=False)
    figure.update_yaxes(
        title_text="layer",
        tickvals=list(range(0, len(found.layers), every)),
        ticktext=[str(layer) for layer in found.layers[::every]],
        showgrid=False,
        zeroline=False,
    )
    title = f"{title[0].upper()}{title[1:]}<br><sup>{n}{'; square: a chosen head' if chosen else ''}</sup>"
    return finish(figure, title, 150 + min(24 * len(found.layers), 640), False)


def behavior_attention(found: BehaviorAttention, layer: int, head: int) -> go.Figure:
    """Attention between behaviors at one head, as a multiple of what positions alone predict.

    Cells show the number; a star means that the interval excludes no effect. Interval, mass and pairs on hover.

    Raises:
        LensteerError: no such layer or head here.
    """
    if layer not in found.layers or not 0 <= head < found.lift.shape[1]:
        raise LensteerError(
            f"no head {head} of layer {layer}: these are layers {list(found.layers)} with heads 0 to "
            f"{found.lift.shape[1] - 1}"
        )
    at = found.layers.index(layer)
    lift, low, high, mass = (values[at, head].tolist() for values in (found.lift, found.low, found.high, found.mass))
    none, sign = (0.0, "+") if found.change else (1.0, "")
    colored = _colored(lift, "change of<br>the multiple" if found.change else "multiple", found.change, _DOUBLINGS)
    text, hover = [], []
    for a, query in enumerate(found.labels):
        cells = [_cell(*of, none, sign) for of in zip(lift[a], low[a], high[a], strict=True)]
        tones = [math.nan if v is None else v / colored["zmax"] for v in colored["z"][a]]
        text.append([in_cell(*cell) for cell in zip(cells, tones, strict=True)])
        hover.append(
            [
                f"{query} to {key}<br>{_number(lift[a][b])} (95 % interval {_number(low[a][b])} to "
                f"{_number(high[a][b])})<br>{'change of ' if found.change else ''}mass {_number(mass[a][b])}"
                f"<br>n = {int(found.n_pairs[a, b])} pairs of sentences, {found.n_traces} traces"
                for b, key in enumerate(found.labels)
            ]
        )
    figure = go.Figure(
        go.Heatmap(
            x=[_tinted(TAGS.get(label, label), label) for label in found.labels],
            y=[_tinted(f"{label} ({TAGS.get(label, label)})", label) for label in found.labels],
            **colored,
            text=text,
            texttemplate="%{text}",
            textfont=CELL_FONT,
            customdata=hover,
            hovertemplate="%{customdata}<extra></extra>",
            xgap=2,
            ygap=2,
        )
    )
    figure.update_xaxes(title_text="key behavior", showgrid=False, ticks="")
    figure.update_yaxes(title_text="query behavior", showgrid=False, ticks="", autorange="reversed")
    what = "How steering changes attention" if found.change else "Attention"
    about = "multiples of what distance and position in the chain predict</sup><br><sup>"
    about += f"* 95 % interval over {found.n_traces} traces excludes {none:g}"
    return finish(figure, f"{what} between behaviors: head {head} of layer {layer}<br><sup>{about}</sup>", 480, False)


def _short(text: str) -> str:
    return escape(text if len(text) <= _WIDTH else text[: _WIDTH - 1] + "…", quote=False)


def _marks(label: str, x: Sequence[Number], y: Sequence[Number], said: list[str], *, legend: bool) -> go.Scatter:
    return go.Scatter(
        x=x,
        y=y,
        mode="markers",
        marker=dict(symbol=marker(label), size=9, color=color(label)),
        customdata=said,
        hovertemplate="%{customdata}<extra></extra>",
        name=label,
        legendgroup=label,
        showlegend=legend,
    )


def _tinted(text: str, label: str) -> str:
    return f"<span style='color:{color(label)}'>■</span> {text}"


def _colored(values: list[list[float]], bar: str, change: bool, doublings: int | None) -> dict[str, Any]:
    """Values of a heat map and their colors: diverging from no effect, or rising from the smallest value.

    Multiples are colored by their logarithm (twice and half are equally far from one), at least up to some doublings.
    """
    logs = doublings is not None and not change
    if logs:
        values = [[math.log2(max(v, 2.0**-99)) if math.isfinite(v) else v for v in row] for row in values]
    plain = [[v if math.isfinite(v) else None for v in row] for row in values]
    same: dict[str, Any] = dict(z=plain, colorbar=color_bar(bar))
    if not change and not logs:
        return dict(**same, colorscale=_RISING)
    finite = [v for row in plain for v in row if v is not None]
    most = max(map(abs, finite), default=1.0) or 1.0
    if doublings is not None and logs:
        most = min(max(most, doublings), _DOUBLINGS)
        steps = range(-_DOUBLINGS, _DOUBLINGS + 1)
        ticks = [f"{2.0**step:g}" for step in steps]
        if min(finite, default=0) < -most:
            ticks[0] = f"≤ {ticks[0]}"
        if max(finite, default=0) > most:
            ticks[-1] = f"≥ {ticks[-1]}"
        same["colorbar"] |= dict(tickvals=list(steps), ticktext=ticks)
    return dict(**same, colorscale=DIVERGING, zmin=-most, zmax=most)


def _number(value: float) -> str:
    return f"{value:.3g}" if math.isfinite(value) else "undefined"


def _cell(value: float, low: float, high: float, none: float, sign: str) -> str:
    if not math.isfinite(value):
        return ""
    return f"{number(value, f'{sign}.2f')}{'*' if low > none or high < none else ''}"

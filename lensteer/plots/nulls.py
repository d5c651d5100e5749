"""Figure of layer scores beside those of control vectors: is a behavior's vector more than a vector of its length?"""

from __future__ import annotations

from collections.abc import Mapping

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.attribution import LayerScores, null_tests
from lensteer.plots.style import INK, MUTED, NULL_BAND, curve, faint, finish, key, rings

NAMES = {"covariance_matched": "vectors with the spans' covariance", "shuffled": "vectors of shuffled labels"}
LEVEL = 0.95


def against_nulls(scores: LayerScores, site: Mapping[str, int] | None = None) -> go.Figure:
    """A panel per behavior: its score by layer with 95 % interval, and the middle 95 % of each kind of control vectors.

    Args:
        scores: made with `nulls=…`.
        site: the chosen layers, ringed.

    Raises:
        LensteerError: scores without nulls.
    """
    tests = null_tests(scores)
    figure = make_subplots(
        1, len(scores.labels), shared_yaxes=True, subplot_titles=scores.labels, horizontal_spacing=0.02
    )
    for b, label in enumerate(scores.labels):
        place = dict(row=1, col=b + 1)
        for kind, draws in scores.nulls.items():
            low, high = (draws[:, b].quantile(q, dim=0).tolist() for q in ((1 - LEVEL) / 2, (1 + LEVEL) / 2))
            figure.add_trace(_band(scores, low, high, NULL_BAND if kind == "shuffled" else None), **place)
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
        if site is not None and label in site and site[label] in scores.layers:
            height = float(scores.mean[b, scores.layers.index(site[label])])
            figure.add_trace(rings([(label, site[label], height)]), **place)
    figure.add_trace(key(f"middle 95 % of {tests.n} {NAMES['shuffled']}", "square", NULL_BAND), row=1, col=1)
    dotted = key(f"the same of {tests.n} {NAMES['covariance_matched']}", "square", MUTED)
    figure.add_trace(dotted.update(mode="lines", line=dict(color=MUTED, dash="dot", width=1)), row=1, col=1)
    if site is not None:
        figure.add_trace(key("selected layer", "circle-open", INK), row=1, col=1)
    figure.update_xaxes(title_text="layer", dtick=1 if len(scores.layers) <= 12 else 4, zeroline=False)
    title = f"{scores.name} ({scores.unit})<br>95 % interval over {scores.n_traces} traces"
    figure.update_yaxes(title_text=title, rangemode="tozero", row=1, col=1)
    figure.update_annotations(font_size=13)
    return finish(figure, "Each behavior's vector beside control vectors of its length", 430)


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

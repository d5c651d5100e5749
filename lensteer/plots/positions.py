"""Figure of what steering at different positions does: effects with intervals, their KL beside them."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.errors import LensteerError
from lensteer.evaluation import MEAN, PositionAblation, PositionEffect
from lensteer.plots.style import INK, MARKERS, color, error_bars, finish

LEFT_OUT = "left out"
#: Of each comparison: its name in words, what the effect is, and its unit as a factor and a word.
COMPARISONS: dict[str, tuple[str, str, float, str]] = {
    "coefficient": ("same coefficient", "share added − taken away", 100.0, "points"),
    "budget": ("same KL per token", "share added − taken away", 100.0, "points"),
    "forced": ("along given chains: own sentences' log-probability", "log p, added − taken away", 1.0, "nats"),
    LEFT_OUT: ("given chains, steered at all sentences but one", "log p, added − taken away", 1.0, "nats"),
}


def position_ablation(result: PositionAblation) -> go.Figure:
    """What each choice of positions does, as bars with 95 % intervals, and beside them what KL per token it costs.

    Raises:
        LensteerError: a result without rows.
    """
    shown = [name for name in COMPARISONS if any(row.comparison == name for row in result.rows)]
    if not shown:
        raise LensteerError("no rows to draw: give what `analyses/position_ablation.py` returns")
    # The panel of what is left out has other scopes than those above: a gap leaves room for their names.
    panels: list[str | None] = [*shown]
    if LEFT_OUT in shown[1:]:
        panels.insert(-1, None)
    titles = [text for name in shown for text in (COMPARISONS[name][0], "KL, nats per token")]
    figure = make_subplots(
        rows=len(panels),
        cols=2,
        specs=[[None if name is None else {}] * 2 for name in panels],
        row_heights=[0.2 if name is None else 1.0 for name in panels],
        column_widths=[0.6, 0.4],
        subplot_titles=titles,
        horizontal_spacing=0.1,
        vertical_spacing=0.18 / len(shown),
    )
    for number, name in enumerate(panels, 1):
        if name is None:
            continue
        _, quantity, factor, unit = COMPARISONS[name]
        for behavior in dict.fromkeys(row.behavior for row in result.rows):
            rows = [row for row in result.rows if (row.comparison, row.behavior) == (name, behavior)]
            about = [_about(row, factor, unit) for row in rows]
            places = dict(row=number, col=1), dict(row=number, col=2)
            effects = _range([(row.effect * factor, row.low * factor, row.high * factor) for row in rows])
            costs = _range([(row.kl, row.kl_low, row.kl_high) for row in rows])
            scopes, paint = [row.scope for row in rows], INK if behavior == MEAN else color(behavior)
            same = dict(x=scopes, customdata=about, hovertemplate="%{customdata}<extra></extra>", name=behavior)
            same |= dict(legendgroup=behavior, offsetgroup=behavior)
            bar = go.Bar(**same, **effects, marker_color=paint, showlegend=number == 1)
            figure.add_trace(bar, **places[0])
            sign = dict(symbol=MARKERS.get(behavior, "star"), size=8, color=paint)
            figure.add_trace(go.Scatter(**same, **costs, mode="markers", marker=sign, showlegend=False), **places[1])
        for col, first in enumerate(("x", "x2"), 1):
            shared = None if number == 1 or name == LEFT_OUT else first
            ends = number == len(panels) or panels[number] is None
            figure.update_xaxes(matches=shared, showticklabels=ends, row=number, col=col)
        figure.update_yaxes(title_text=f"{quantity}<br>({unit})", row=number, col=1)
    figure.update_yaxes(type="log", matches="y2", dtick=1, tickformat="~g", zeroline=False, col=2)
    figure.update_xaxes(tickangle=-35, showgrid=False, zeroline=False)
    figure.update_annotations(font_size=13)
    title = f"The same vectors at different positions<br><sup>95 % intervals over {result.n_tasks} dev tasks; "
    title += f"KL of chains that run free over {result.n_prompts} prompts</sup>"
    figure.update_layout(barmode="group", scattermode="group")
    finish(figure, title, 190 + 230 * len(shown) + 85 * (None in panels))
    return figure.update_layout(title=dict(y=1, yanchor="top", pad_t=24), margin_t=85)


def _range(values: Sequence[tuple[float, float, float]]) -> dict[str, Any]:
    """Heights and error bars."""
    mids, lows, highs = zip(*values, strict=True) if values else ((), (), ())
    return dict(y=list(mids), error_y={**error_bars(mids, lows, highs), "thickness": 1.2, "width": 2, "color": INK})


def _about(row: PositionEffect, factor: float, unit: str) -> str:
    effect, low, high = (f"{factor * value:+.3g}" for value in (row.effect, row.low, row.high))
    missed = "" if row.reached else "<br>the KL budget was not reached by all"
    return (
        f"<b>{row.behavior}</b>, {row.scope}<br>{effect} {unit} ({low} to {high})<br>KL {row.kl:.3g} nats per token "
        f"({row.kl_low:.3g} to {row.kl_high:.3g})<br>coefficients {row.down:+.2g} and {row.up:+.2g}, "
        f"{row.edited:.0f} positions a chain{missed}"
    )

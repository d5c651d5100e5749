"""What an endpoint does, look by look."""

from __future__ import annotations

from plotly import graph_objects as go

from lensteer.export.verification import Verification
from lensteer.plots.style import CONTROL_BAND, INK, MUTED, color, error_bars, finish


def looks(found: Verification) -> go.Figure:
    """The change of the behavior's share at each look, with 95 % intervals, and the promised change as a band."""
    figure = go.Figure()
    values, lows, highs = ([getattr(look.change, end) for look in found.looks] for end in ("value", "low", "high"))
    figure.add_scatter(
        x=[look.number for look in found.looks],
        y=values,
        error_y=dict(**error_bars(values, lows, highs), color=INK, thickness=1.5, width=4),
        mode="markers",
        marker=dict(
            size=12,
            color=color(found.behavior),
            symbol=["x" if look.alarm else "circle" for look in found.looks],
        ),
        customdata=[(look.at, look.unsteered.value, look.steered.value, look.change.n) for look in found.looks],
        hovertemplate="look %{x}, %{customdata[0]}<br>%{customdata[1]:.1%} without the plan, %{customdata[2]:.1%} at "
        "the endpoint<br>change %{y:+.1%}<br>%{customdata[3]} tasks<extra></extra>",
        showlegend=False,
    )
    about = "the plan has no evidence"
    if found.promised is not None:
        figure.add_hrect(y0=found.promised.low, y1=found.promised.high, fillcolor=CONTROL_BAND, line_width=0)
        about = "band: the change that the plan's evidence promises"
    figure.add_hline(y=0, line=dict(color=MUTED, width=1))
    figure.update_xaxes(title_text="look", dtick=1, range=[0.5, len(found.looks) + 0.5])
    figure.update_yaxes(title_text=f"change of the share of<br>{found.behavior}", tickformat="+.0%")
    about += "; ×: alarm" * any(look.alarm for look in found.looks)
    return finish(figure, f"{found.model or found.endpoint}: {found.verdict}<br><sup>{about}</sup>", 360)

"""The common style of all figures: colors, markers, the figure template."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any
from zlib import crc32

from plotly import graph_objects as go

from lensteer.behaviors import BEHAVIORS

Number = float | int

#: The steered behaviors have hues of Okabe and Ito's color-blind-safe palette; the two that are not steered are pale.
COLORS: dict[str, str] = {
    "initializing": "#BBBBBB",
    "deduction": "#88CCEE",
    "adding-knowledge": "#009E73",
    "example-testing": "#E69F00",
    "uncertainty-estimation": "#0072B2",
    "backtracking": "#D55E00",
}

#: Markers in addition to colors, for color-blind readers and grayscale print.
MARKERS: dict[str, str] = dict(
    zip(BEHAVIORS, ("circle-open", "x", "circle", "square", "diamond", "triangle-up"), strict=True)
)

#: Tags before annotated sentences, for the same reason.
TAGS: dict[str, str] = dict(zip(BEHAVIORS, ("init", "ded", "know", "ex", "unc", "back"), strict=True))

INK, PAPER, LINE, MUTED = "#1f2933", "#ffffff", "#e1e5ea", "#7b8794"
CONTROL_BAND = "rgba(123, 135, 148, 0.35)"
DIVERGING = [[0.0, "#b35806"], [0.5, "#f7f7f7"], [1.0, "#2166ac"]]
#: Text in cells of `DIVERGING` is black, and white beyond these of its ends at -1 and 1: a contrast of 4.5:1 or more.
CELL_FONT: dict[str, Any] = dict(color="#000000", size=12)
_WHITE_BEYOND = (-0.96, 0.87)

#: The report's page in light and dark mode, as CSS variables. Figures have a white background in both.
PAGE: dict[str, dict[str, str]] = {
    "light": {"ink": INK, "paper": PAPER, "line": LINE, "muted": "#52606d", "soft": "#f5f7fa", "good": "#00664a"},
    "dark": {"ink": "#e4e7eb", "paper": "#14181d", "line": "#3e4c59", "muted": "#9aa5b1", "soft": "#1f2933"}
    | {"good": "#5fd3a8"},
}

FONT = "system-ui, -apple-system, 'Segoe UI', Roboto, 'Helvetica Neue', Arial, sans-serif"
_AXIS = dict(gridcolor=LINE, linecolor=MUTED, zerolinecolor=MUTED, ticks="outside", tickcolor=LINE, automargin=True)
_AXIS |= dict(title=dict(font=dict(size=13), standoff=10))
TEMPLATE = go.layout.Template(
    layout=dict(
        font=dict(family=FONT, size=13, color=INK),
        title=dict(x=0, xref="paper", yref="container", y=1, yanchor="top", pad_t=16, font_size=16),
        paper_bgcolor=PAPER,
        plot_bgcolor=PAPER,
        colorway=list(COLORS.values()),
        xaxis=_AXIS,
        yaxis=_AXIS,
        hoverlabel=dict(align="left", bgcolor=PAPER, bordercolor=MUTED, font=dict(color=INK, family=FONT)),
        legend=dict(orientation="h", x=0, y=0, yref="container", yanchor="bottom", title=dict(text="")),
        margin=dict(l=70, r=20, t=60, b=90),
        bargap=0.15,
    )
)


#: For labels of other schemes; a label has the same one in all figures.
_OTHERS = ("#332288", "#AA4499", "#44AA99", "#882255", "#117733", "#999933", "#CC6677")
_SIGNS = ("triangle-down", "star", "hexagon", "cross", "pentagon", "bowtie", "hourglass")


def color(label: str) -> str:
    """The color of a label; gray if there is none."""
    return COLORS.get(label) or (_OTHERS[crc32(label.encode()) % len(_OTHERS)] if label else MUTED)


def marker(label: str) -> str:
    """The marker of a label in figures."""
    return MARKERS.get(label) or _SIGNS[crc32(label.encode()) % len(_SIGNS)]


def faint(label: str, alpha: float) -> str:
    """The color of a behavior, translucent."""
    code = color(label).lstrip("#")
    return f"rgba({', '.join(str(int(code[i : i + 2], 16)) for i in (0, 2, 4))}, {alpha})"


def in_cell(text: str, tone: float) -> str:
    """Text of a cell of `DIVERGING`, whose ends are -1 and 1, for a trace whose text has `CELL_FONT`."""
    low, high = _WHITE_BEYOND
    return f"<span style='color:{PAPER}'>{text}</span>" if tone < low or tone > high else text


def number(value: float, spec: str = ".2f") -> str:
    """A number with the minus sign of axes, and none on zero."""
    text = f"{value:{spec}}"
    return text.replace("-", "−") if float(text) else text.lstrip("+-")


def finish(figure: go.Figure, title: str, height: int, legend: bool = True) -> go.Figure:
    """Apply the template and a title of one or more lines to a figure; without a legend no room is kept for one."""
    lines = title.count("<br>")
    figure.update_layout(template=TEMPLATE, title_text=title, height=height)
    figure.update_layout(margin=dict(t=60 + 18 * lines, b=90 if legend else 30))
    return figure.update_layout(title_pad_t=28) if lines else figure  # plotly puts the first of several lines higher


def color_bar(title: str) -> dict[str, Any]:
    """A color bar."""
    return dict(title=dict(text=title, font=dict(size=13)), tickfont=dict(size=11), thickness=12, outlinewidth=0)


def curve(label: str, x: Sequence[Number], y: Sequence[Number], hover: str, rows: Sequence[object]) -> go.Scatter:
    """The line of one behavior. `rows` are the customdata of `hover`, one per point."""
    return go.Scatter(
        x=x,
        y=y,
        name=label,
        legendgroup=label,
        mode="lines+markers",
        line=dict(color=color(label), width=2),
        marker=dict(symbol=marker(label), size=8),
        customdata=rows,
        hovertemplate=hover,
        cliponaxis=False,
    )


def band(label: str, x: Sequence[Number], low: Sequence[Number], high: Sequence[Number]) -> go.Scatter:
    """The area between two lines, in the color of a behavior."""
    return go.Scatter(
        x=[*x, *reversed(x)],
        y=[*high, *reversed(low)],
        fill="toself",
        fillcolor=faint(label, 0.16),
        line=dict(width=0),
        mode="lines",
        hoverinfo="skip",
        showlegend=False,
        legendgroup=label,
    )


def error_bars(values: Sequence[Number], lows: Sequence[Number], highs: Sequence[Number]) -> dict[str, Any]:
    """Intervals in plotly's format, without their style."""
    above = [high - value for value, high in zip(values, highs, strict=True)]
    below = [value - low for value, low in zip(values, lows, strict=True)]
    return dict(type="data", symmetric=False, array=above, arrayminus=below)


def rings(points: Sequence[tuple[str, Number, Number]]) -> go.Scatter:
    """Large rings around chosen points: (behavior, x, y)."""
    marker = dict(symbol="circle-open", size=18, color=[color(label) for label, _, _ in points], line=dict(width=3))
    x, y = [x for _, x, _ in points], [y for _, _, y in points]
    return go.Scatter(x=x, y=y, mode="markers", marker=marker, hoverinfo="skip", showlegend=False, cliponaxis=False)


def key(name: str, symbol: str, paint: str) -> go.Scatter:
    """An entry at the end of the legend that no single trace represents."""
    marker = dict(symbol=symbol, size=13, color=paint, line=dict(width=2))
    return go.Scatter(x=[None], y=[None], mode="markers", marker=marker, name=name, legendrank=2000)

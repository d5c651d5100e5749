"""Figures of whole answers: which arms think, how well they answer, and how a KL lasts over an answer's tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.errors import LensteerError
from lensteer.evaluation import Estimate, Modes
from lensteer.plots.style import COLORS, INK, NULL_BAND, error_bars, finish

TITLES = {"thinks": "answers that think", "accuracy": "right answers", "parsed": "answers that parse"}
SHADES = tuple(COLORS[b] for b in ("uncertainty-estimation", "backtracking", "adding-knowledge", "example-testing"))


def modes(found: Modes, figures: Sequence[str] = tuple(TITLES)) -> go.Figure:
    """Dots with 95 % intervals over tasks, a line per arm and a panel per figure; random arms are one gray band.

    Args:
        found: from `measure_modes`; arms of kind "control" are the band.
        figures: which of "thinks", "accuracy" and "parsed".

    Raises:
        LensteerError: an unknown figure, or no arm but controls.
    """
    unknown = [name for name in figures if name not in TITLES]
    if unknown or not figures:
        raise LensteerError(f"no figures {unknown}: choose among {list(TITLES)}")
    arms = [arm for arm in found.arms if arm.kind != "control"]
    drawn = [arm for arm in found.arms if arm.kind == "control"]
    if not arms:
        raise LensteerError("all arms are controls: there is nothing to show beside them")
    shown = make_subplots(1, len(figures), shared_yaxes=True, horizontal_spacing=0.06)
    for column, name in enumerate(figures, 1):
        points: list[tuple[str, Estimate]] = [(a.arm, e) for a in arms if (e := getattr(a, name)) is not None]
        shown.add_scatter(
            x=[e.mean for _, e in points],
            y=[arm for arm, _ in points],
            error_x=dict(
                **error_bars(*([getattr(e, end) for _, e in points] for end in ("mean", "low", "high"))),
                thickness=1.5,
                width=4,
                color=INK,
            ),
            mode="markers",
            marker=dict(size=10, color=SHADES[0]),
            customdata=[(e.low, e.high) for _, e in points],
            hovertemplate=f"<b>%{{y}}</b><br>%{{x:.1%}} {TITLES[name]}, 95 % interval %{{customdata[0]:.1%}} to "
            f"%{{customdata[1]:.1%}}<br>n = {found.n_tasks} tasks × {found.n_samples}<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        chance = [e.mean for e in (getattr(arm, name) for arm in drawn) if e is not None]
        if chance:
            band = dict(fillcolor=NULL_BAND, line_width=0, layer="below")
            shown.add_vrect(x0=min(chance) - 0.01, x1=max(chance) + 0.01, row=1, col=column, **band)
        axis = dict(tickformat=".0%", range=[-0.04, 1.04], zeroline=False, tickvals=[0, 0.5, 1])
        shown.update_xaxes(title_text=TITLES[name], **axis, row=1, col=column)
    shown.update_yaxes(autorange="reversed", categoryorder="array", categoryarray=[arm.arm for arm in arms])
    about = f"95 % intervals over {found.n_tasks} tasks"
    if drawn:
        about += f"; gray: range of {len(drawn)} random vectors of the same length"
    return finish(shown, f"What each edit makes of the answers<br><sup>{about}</sup>", 140 + 34 * len(arms), False)


def kl_by_token(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], bins: Sequence[tuple[int, int]]
) -> go.Figure:
    """KL(steered || unsteered) per token, by how far into the answer: a line per edit, with 95 % intervals.

    Args:
        curves: per edit, mean and 95 % interval of each bin, in nats; NaN where no answer was that long.
        bins: first token and one past the last.

    Raises:
        LensteerError: a curve with another number of points than there are bins.
    """
    shown = go.Figure()
    names = [str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in bins]
    for number, (name, rows) in enumerate(curves.items()):
        if len(rows) != len(bins):
            raise LensteerError(f"{name!r} has {len(rows)} points for {len(bins)} bins: give one per bin")
        means, lows, highs = zip(*rows, strict=True)
        shown.add_scatter(
            x=names,
            y=means,
            error_y=error_bars(means, lows, highs),
            name=name,
            mode="lines+markers",
            line=dict(color=SHADES[number % len(SHADES)], dash=("solid", "dash", "dot", "dashdot")[number % 4]),
            customdata=list(zip(lows, highs, strict=True)),
            hovertemplate=f"<b>{name}</b><br>token %{{x}}: %{{y:.3g}} nats<br>95 % interval "
            "%{customdata[0]:.3g} to %{customdata[1]:.3g}<extra></extra>",
        )
    shown.update_xaxes(title_text="token of the answer", type="category")
    title = "KL(steered ‖ unsteered)<br>nats per token"
    smaller = 13 / 1.25  # plotly draws the tick labels of such an axis larger by this factor
    shown.update_yaxes(title_text=title, type="log", dtick=1, exponentformat="power", tickfont_size=smaller)
    return finish(shown, "How long an edit is felt", 380)

"""Figures of what steering does: effects beside chance and words, and dose curves."""

from __future__ import annotations

from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.errors import LensteerError
from lensteer.evaluation import Doses, Evaluation
from lensteer.plots.style import INK, MUTED, NULL_BAND, PAPER, color, curve, error_bars, finish, key, rings
from lensteer.units import UNIT_WORDS

#: Above this the use of a margin is cut off in the figure.
STRAIN_SHOWN = 3.0


def effects(evaluation: Evaluation, unit: str | None = None) -> go.Figure:
    """Bars: each behavior's share pushed down, left alone, pushed up, prompted for, and what control vectors do.

    Args:
        evaluation: with 95 % intervals over tasks.
        unit: "sentences" or "tokens", of which the share is, or "score"; None is what verdicts are about.

    Raises:
        LensteerError: no effect of that unit.
    """
    unit = evaluation.unit if unit is None else unit
    known = {(e.behavior, e.kind): e for e in evaluation.effects if e.unit == unit and not e.annotator}
    if not known:
        units = sorted({e.unit for e in evaluation.effects})
        raise LensteerError(f"no effect in units of {unit!r}: choose one of {', '.join(map(repr, units))}")
    of, spec, scale, step = ("score", ".3g", 1, "+.3g") if unit == "score" else (f"of {unit}", ".1%", 100, "+.1f")
    figure, ticks, names = go.Figure(), [], []
    about = f"n = {evaluation.n_tasks} tasks × {evaluation.n_samples} samples"
    for group, label in enumerate(dict.fromkeys(behavior for behavior, _ in known)):
        arms = [(kind, known[label, kind]) for kind in ("down", "up", "words") if (label, kind) in known]
        base = arms[0][1]
        left = group * 5.0
        if evaluation.n_random:
            below, above = base.base + base.null_low, base.base + base.null_high
            band = dict(type="rect", fillcolor=NULL_BAND, line=dict(width=0))
            figure.add_shape(band, x0=left - 0.5, x1=left + 2.5, y0=below, y1=above)
        figure.add_annotation(
            x=left + 1.5, y=1, yref="paper", yanchor="bottom", text=f"<b>{label}</b>", showarrow=False, font_size=12
        )
        figure.add_bar(
            x=[left + 1],
            y=[base.base],
            error_y=_bounds(base.base, base.base_low, base.base_high),
            marker=dict(color=PAPER, line=dict(color=color(label), width=2)),
            hovertemplate=f"<b>{label}</b>, unsteered<br>%{{y:{spec}}} {of}, 95 % interval {base.base_low:{spec}} "
            f"to {base.base_high:{spec}}<br>{about}<extra></extra>",
            showlegend=False,
        )
        ticks.append(left + 1)
        names.append("none")
        for kind, effect in arms:
            place = left + {"down": 0, "up": 2, "words": 3}[kind]
            how = "prompted baseline" if kind == "words" else f"L{effect.layer}, coefficient {effect.coefficient:+.2g}"
            figure.add_bar(
                x=[place],
                y=[effect.share],
                error_y=_bounds(effect.share, effect.share_low, effect.share_high),
                marker=dict(
                    color=color(label),
                    opacity=0.45 if kind == "down" else 1,
                    pattern=dict(shape="/" if kind == "words" else ""),
                ),
                hovertemplate=(
                    f"<b>{label}</b>, {kind} ({how})<br>%{{y:{spec}}} {of}, 95 % interval {effect.share_low:{spec}} to "
                    f"{effect.share_high:{spec}}<br>change {scale * effect.change:{step}}"
                    f"{' points' if scale > 1 else ''} ({scale * effect.low:{step}} to {scale * effect.high:{step}})"
                    f"<br>{about}<extra></extra>"
                ),
                showlegend=False,
            )
            ticks.append(place)
            names.append(kind)
    if evaluation.n_random:
        words = f"range of {evaluation.n_random} control vectors of each kind, as long as the longest edit"
        figure.add_trace(key(words, "square", NULL_BAND)).update_layout(showlegend=True)
    figure.update_xaxes(tickvals=ticks, ticktext=names, tickangle=0, showgrid=False, zeroline=False, tickfont_size=10)
    figure.update_yaxes(
        title_text=f"{'mean score' if unit == 'score' else f'share of {unit}'}<br>95 % interval over "
        f"{evaluation.n_tasks} tasks",
        tickformat="" if unit == "score" else ".0%",
        rangemode="tozero",
    )
    return finish(figure, "What steering does to each behavior, on held-out tasks", 470)


def _bounds(value: float, low: float, high: float) -> dict[str, Any]:
    return {**error_bars([value], [low], [high]), "color": INK, "thickness": 1.5, "width": 4}


def doses(doses: Doses) -> go.Figure:
    """Dose curves: each behavior's share, and how much of its margin the text uses, against the signed coefficient."""
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    labels = list(dict.fromkeys(d.behavior for d in doses.curve))
    for label in labels:
        points = sorted((d for d in doses.curve if d.behavior == label), key=lambda d: d.coefficient)
        strengths = [d.coefficient for d in points]
        hover = (
            f"<b>{label}</b>, layer {points[0].layer}, coefficient %{{x:+.2g}}<br>%{{y:.3g}} {{}}<br>"
            "%{customdata}<br>"
            f"n = {doses.n_tasks} dev tasks × {doses.n_samples}<extra></extra>"
        )
        chosen = {-doses.down.get(label, 0.0), doses.up.get(label, 0.0)} - {0.0}
        why = ["" if d.text is None else d.text.why or "text within its margins" for d in points]
        strain = [0.0 if d.text is None else min(d.text.strain, STRAIN_SHOWN) for d in points]
        for row, values, of in ((1, [d.share for d in points], "of sentences"), (2, strain, "of the margin")):
            line = curve(label, strengths, values, hover.replace("{}", of), why)
            figure.add_trace(line.update(showlegend=row == 1), row=row, col=1)
            ends = [(label, c, v) for c, v in zip(strengths, values, strict=True) if c in chosen]
            figure.add_trace(rings(ends), row=row, col=1)
    figure.add_trace(key("chosen coefficient", "circle-open", INK), row=1, col=1)
    figure.add_hline(y=1, line=dict(color=MUTED, dash="dash", width=1), row=2, col=1)
    figure.update_xaxes(title_text=f"coefficient ({UNIT_WORDS[doses.coefficient_unit]})", row=2, col=1)
    figure.update_yaxes(title_text="share of sentences", tickformat=".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="margin used<br>by the text", rangemode="tozero", row=2, col=1)
    about = "dashed: the text is worse than unsteered by the whole of some margin, and counts as broken"
    title = f"How strong: share and text on {doses.n_tasks} dev tasks<br><sup>{about}</sup>"
    return finish(figure, title, 560)

"""Figures of measured steering: effects and controls, coefficient curves, whole answers, and steered positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.behaviors import in_order
from lensteer.errors import LensteerError
from lensteer.evaluation import (
    BASELINES,
    KINDS,
    MEAN,
    Benchmark,
    ChosenCoefficients,
    DoseResponse,
    Evaluation,
    Modes,
    PositionAblation,
    PositionEffect,
)
from lensteer.plots.style import (
    CELL_FONT,
    COLORS,
    CONTROL_BAND,
    DIVERGING,
    INK,
    MARKERS,
    MUTED,
    PAPER,
    color,
    color_bar,
    curve,
    error_bars,
    finish,
    in_cell,
    key,
    number,
    rings,
)
from lensteer.statistics import Estimate
from lensteer.steering.plans import UNIT_WORDS

#: The baselines, as text.
HOW = {"prompted": "prompted baseline", "forced": "chains begin with given words"}
#: The use of a margin is clipped at this value in the figure.
STRAIN_SHOWN = 3.0


def effects(evaluation: Evaluation, unit: str | None = None) -> go.Figure:
    """Bars: each behavior's share pushed down, unsteered, pushed up and in baselines, and the range of control vectors.

    Args:
        evaluation: with 95 % intervals over tasks.
        unit: "sentences" or "tokens" for shares, or "score"; None is the unit of the verdicts.

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
        conditions = [(kind, known[label, kind]) for kind in (*KINDS, *BASELINES) if (label, kind) in known]
        base = conditions[0][1]
        left = group * (6.0 if any(kind == "forced" for _, kind in known) else 5.0)
        if evaluation.n_controls:
            below, above = base.base.value + base.control_low, base.base.value + base.control_high
            band = dict(type="rect", fillcolor=CONTROL_BAND, line=dict(width=0))
            figure.add_shape(band, x0=left - 0.5, x1=left + 2.5, y0=below, y1=above)
        figure.add_annotation(
            x=left + (1.5 if (label, "prompted") in known else 1),
            y=1,
            yref="paper",
            yanchor="bottom",
            text=f"<b>{label}</b>",
            showarrow=False,
            font_size=12,
        )
        figure.add_bar(
            x=[left + 1],
            y=[base.base.value],
            error_y=_bounds(base.base),
            marker=dict(color=PAPER, line=dict(color=color(label), width=2)),
            hovertemplate=f"<b>{label}</b>, unsteered<br>%{{y:{spec}}} {of}, 95 % interval {base.base.low:{spec}} "
            f"to {base.base.high:{spec}}<br>{about}<extra></extra>",
            showlegend=False,
        )
        ticks.append(left + 1)
        names.append("none")
        for kind, effect in conditions:
            change = effect.change
            place = left + {"down": 0, "up": 2, "prompted": 3, "forced": 4 if (label, "prompted") in known else 3}[kind]
            how = HOW.get(kind, f"L{effect.layer}, coefficient {effect.coefficient:+.2g}")
            figure.add_bar(
                x=[place],
                y=[effect.share.value],
                error_y=_bounds(effect.share),
                marker=dict(
                    color=color(label),
                    opacity=0.45 if kind == "down" else 1,
                    pattern=dict(shape={"prompted": "/", "forced": "."}.get(kind, "")),
                ),
                hovertemplate=(
                    f"<b>{label}</b>, {kind} ({how})<br>%{{y:{spec}}} {of}, 95 % interval {effect.share.low:{spec}} to "
                    f"{effect.share.high:{spec}}<br>change {scale * change.value:{step}}"
                    f"{' points' if scale > 1 else ''} ({scale * change.low:{step}} to {scale * change.high:{step}})"
                    f"<br>{about}<extra></extra>"
                ),
                showlegend=False,
            )
            ticks.append(place)
            names.append(kind)
    if evaluation.n_controls:
        words = f"range of {evaluation.n_controls} control vectors of each kind, as long as the longest edit"
        figure.add_trace(key(words, "square", CONTROL_BAND)).update_layout(showlegend=True)
    figure.update_xaxes(tickvals=ticks, ticktext=names, tickangle=0, showgrid=False, zeroline=False, tickfont_size=10)
    figure.update_yaxes(
        title_text=f"{'mean score' if unit == 'score' else f'share of {unit}'}<br>95 % interval over "
        f"{evaluation.n_tasks} tasks",
        tickformat="" if unit == "score" else ".0%",
        rangemode="tozero",
    )
    return finish(figure, "Effect of steering on each behavior, on held-out tasks", 470)


def _bounds(found: Estimate) -> dict[str, Any]:
    return {**error_bars([found.value], [found.low], [found.high]), "color": INK, "thickness": 1.5, "width": 4}


def coefficients(found: ChosenCoefficients) -> go.Figure:
    """Each behavior's share or mean score, and how much of its margin the text uses, by signed coefficient."""
    scored = found.unit == "score"
    quantity, of = ("mean score", "score") if scored else ("share of sentences", "of sentences")
    figure = make_subplots(rows=2, cols=1, shared_xaxes=True, vertical_spacing=0.06, row_heights=[0.6, 0.4])
    labels = list(dict.fromkeys(d.behavior for d in found.curve))
    for label in labels:
        points = sorted((d for d in found.curve if d.behavior == label), key=lambda d: d.coefficient)
        steps = [d.coefficient for d in points]
        hover = (
            f"<b>{label}</b>, layer {points[0].layer}, coefficient %{{x:+.2g}}<br>%{{y:.3g}} {{}}<br>"
            "%{customdata}<br>"
            f"n = {found.n_tasks} dev tasks × {found.n_samples}<extra></extra>"
        )
        chosen = {-found.down.get(label, 0.0), found.up.get(label, 0.0)} - {0.0}
        why = ["" if d.text is None else d.text.why or "text within its margins" for d in points]
        strain = [0.0 if d.text is None else min(d.text.strain, STRAIN_SHOWN) for d in points]
        for row, values, what in ((1, [d.share for d in points], of), (2, strain, "of the margin")):
            line = curve(label, steps, values, hover.replace("{}", what), why)
            figure.add_trace(line.update(showlegend=row == 1), row=row, col=1)
            ends = [(label, c, v) for c, v in zip(steps, values, strict=True) if c in chosen]
            figure.add_trace(rings(ends), row=row, col=1)
    figure.add_trace(key("chosen coefficient", "circle-open", INK), row=1, col=1)
    figure.add_hline(y=1, line=dict(color=MUTED, dash="dash", width=1), row=2, col=1)
    figure.update_xaxes(title_text=f"coefficient ({UNIT_WORDS[found.coefficient_unit]})", row=2, col=1)
    figure.update_yaxes(title_text=quantity, tickformat="" if scored else ".0%", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="margin used<br>by the text", rangemode="tozero", row=2, col=1)
    about = "dashed: above this line the text exceeds a margin and counts as broken"
    title = f"Choice of coefficients: {'score' if scored else 'share'} and text on {found.n_tasks} dev tasks"
    title += f"<br><sup>{about}</sup>"
    return finish(figure, title, 560)


def dose_response(found: Sequence[DoseResponse], scored: bool = False) -> go.Figure:
    """A panel per behavior: its share by signed coefficient, with 95 % intervals over tasks.

    Hollow markers: the text breaks. The dotted line has the slope of the linear range and ends with it; where there is
    no such range, there is no line.

    Args:
        found: curves, such as `ChosenCoefficients.responses`.
        scored: the shares are mean scores.

    Raises:
        LensteerError: no curve.
    """
    if not found:
        raise LensteerError("no curves to draw: give `ChosenCoefficients.responses`, or those of `dose_response`")
    titles = [
        f"{each.behavior}, layer {each.layer}<br><sup>Spearman {number(each.spearman.value)} "
        f"[{number(each.spearman.low)}, {number(each.spearman.high)}]</sup>"
        for each in found
    ]
    shown = make_subplots(1, len(found), subplot_titles=titles, horizontal_spacing=0.25 / len(found))
    spec = ".3g" if scored else ".1%"
    for column, each in enumerate(found, 1):
        paint, points = color(each.behavior), each.points
        base = next(p.share.value for p in points if not p.coefficient)
        ends = [c for c in (-each.linear, each.linear) if points[0].coefficient <= c <= points[-1].coefficient]
        shown.add_scatter(
            x=ends,
            y=[base + each.slope.value * c for c in ends],
            mode="lines",
            line=dict(color=MUTED, width=1.5, dash="dot"),
            hoverinfo="skip",
            showlegend=False,
            row=1,
            col=column,
        )
        values, lows, highs = ([getattr(p.share, end) for p in points] for end in ("value", "low", "high"))
        shown.add_scatter(
            x=[p.coefficient for p in points],
            y=values,
            error_y=dict(**error_bars(values, lows, highs), thickness=1.2, width=3, color=paint),
            mode="lines+markers",
            line=dict(color=paint, width=2),
            marker=dict(
                size=9, color=[paint if p.readable else PAPER for p in points], line=dict(color=paint, width=2)
            ),
            customdata=["text within its margins" if p.readable else "text breaks" for p in points],
            hovertemplate=f"<b>{each.behavior}</b>, coefficient %{{x:+.3g}}<br>%{{y:{spec}}}<br>%{{customdata}}"
            f"<br>n = {points[0].share.n} tasks<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        shown.update_xaxes(title_text="coefficient", row=1, col=column)
        shown.update_yaxes(rangemode="tozero", tickformat="" if scored else ".0%", row=1, col=column)
    shown.update_yaxes(title_text="mean score" if scored else "share of sentences", row=1, col=1)
    shown.update_annotations(font_size=13)
    about = "95 % intervals over tasks; hollow: the text breaks; dotted: slope of the linear range"
    return finish(shown, f"Response to the coefficient<br><sup>{about}</sup>", 400, False).update_layout(margin_t=120)


def entanglement(evaluation: Evaluation) -> go.Figure:
    """Which behaviors each condition moves: changes of shares of sentences in points, its own behavior included.

    Bold: the 95 % interval over tasks excludes 0. Colors are by share of the unsteered rate, up to twice it.

    Raises:
        LensteerError: an evaluation without side effects, such as one of an earlier version.
    """
    changes = {
        (e.condition, e.measured): (e.base, e.change)
        for e in evaluation.side_effects
        if e.kind in (*KINDS, *BASELINES)
        and e.measured not in ("accuracy", "answered", "length", "finished", "repetition")
    }
    if not changes:
        raise LensteerError("no side effects on other behaviors: evaluate again, with an annotator")
    for e in evaluation.effects:
        if e.unit == "sentences" and not e.annotator:
            changes[f"{e.behavior}/{e.kind}", e.behavior] = (e.base, e.change)
    rows = [c.condition for c in evaluation.conditions if any(name == c.condition for name, _ in changes)]
    labels = in_order(label for _, label in changes)
    tones, texts = [], []
    for row in rows:
        cells = [changes.get((row, label)) for label in labels]
        relative = [0.0 if c is None or not c[0].value else c[1].value / c[0].value for c in cells]
        tones.append([max(-1.0, min(1.0, value)) for value in relative])
        texts.append(
            [
                "" if c is None else in_cell(_bold(number(100 * c[1].value, "+.1f"), bool(c[1].excludes())), tone)
                for c, tone in zip(cells, tones[-1], strict=True)
            ]
        )
    shown = go.Figure(
        go.Heatmap(
            z=tones,
            x=labels,
            y=[row.replace("/", ", ") for row in rows],
            text=texts,
            texttemplate="%{text}",
            textfont=CELL_FONT,
            colorscale=DIVERGING,
            zmin=-1,
            zmax=1,
            hovertemplate="<b>%{y}</b><br>%{x}: %{text} points<extra></extra>",
            colorbar=color_bar("change / unsteered share"),
        )
    )
    shown.update_yaxes(autorange="reversed", showgrid=False)
    shown.update_xaxes(showgrid=False, tickangle=-25)
    about = (
        f"change of the share of sentences in points, {evaluation.n_tasks} tasks; bold: the 95 % interval excludes 0"
    )
    return finish(shown, f"What each condition moves<br><sup>{about}</sup>", 200 + 30 * len(rows), False)


def _bold(text: str, bold: bool) -> str:
    return f"<b>{text}</b>" if bold else text


TITLES = {
    "thinks": "answers that think",
    "reasons": "answers that reason",
    "accuracy": "right answers",
    "answered": "an answer can be read",
    "parsed": "answers that parse",
    "finished": "answers that end",
    "repetition": "repeated 4-grams",
}
#: Rows of control vectors, by the first part of their names (`CacheVector.random`, `.controls`).
POOLS = {"random": "isotropic vectors", "spread": "pairs' spread"}
SHADES = tuple(COLORS[b] for b in ("uncertainty-estimation", "backtracking", "adding-knowledge", "example-testing"))


def modes(found: Modes, figures: Sequence[str] = ("thinks", "accuracy", "parsed")) -> go.Figure:
    """Dots with 95 % intervals over tasks, a line per condition, a panel per figure; controls are gray dots by kind.

    Args:
        found: from `measure_modes`; conditions of kind "control" are the gray dots.
        figures: which; the names of `TITLES`.

    Raises:
        LensteerError: an unknown figure, or only control conditions.
    """
    unknown = [name for name in figures if name not in TITLES]
    if unknown or not figures:
        raise LensteerError(f"no figures {unknown}: choose among {list(TITLES)}")
    conditions = [condition for condition in found.conditions if condition.kind != "control"]
    drawn = [condition for condition in found.conditions if condition.kind == "control"]
    if not conditions:
        raise LensteerError("all conditions are controls: there is nothing to compare them with")
    pools = [(c, POOLS.get(c.condition.rsplit("-", 1)[0], "control vectors")) for c in drawn]
    rows = list(dict.fromkeys(row for _, row in pools))
    shown = make_subplots(1, len(figures), shared_yaxes=True, horizontal_spacing=0.06)
    for column, name in enumerate(figures, 1):
        points: list[tuple[str, Estimate]] = [
            (a.condition, e) for a in conditions if (e := getattr(a, name)) is not None
        ]
        shown.add_scatter(
            x=[e.value for _, e in points],
            y=[condition for condition, _ in points],
            error_x=dict(
                **error_bars(*([getattr(e, end) for _, e in points] for end in ("value", "low", "high"))),
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
        controls = [(c.condition, row, e.value) for c, row in pools if (e := getattr(c, name)) is not None]
        shown.add_scatter(
            x=[value for *_, value in controls],
            y=[row for _, row, _ in controls],
            mode="markers",
            marker=dict(size=8, color=MUTED, opacity=0.6),
            customdata=[label for label, *_ in controls],
            hovertemplate=f"<b>%{{customdata}}</b><br>%{{x:.1%}} {TITLES[name]}<extra></extra>",
            showlegend=False,
            row=1,
            col=column,
        )
        axis = dict(tickformat=".0%", range=[-0.04, 1.04], zeroline=False, tickvals=[0, 0.5, 1])
        shown.update_xaxes(title_text=TITLES[name], **axis, row=1, col=column)
    shown.update_yaxes(
        autorange="reversed", categoryorder="array", categoryarray=[c.condition for c in conditions] + rows
    )
    about = f"95 % intervals over {found.n_tasks} tasks"
    if drawn:
        about += "; gray: a dot per control vector of the same length"
    height = 140 + 34 * (len(conditions) + len(rows))
    return finish(shown, f"Answers under each edit<br><sup>{about}</sup>", height, False)


def benchmark(found: Benchmark) -> go.Figure:
    """Right answers, those that can be read, and those that end, as `modes` draws them."""
    return modes(found.modes, ("accuracy", "answered", "finished"))


def kl_by_token(
    curves: Mapping[str, Sequence[tuple[float, float, float]]], bins: Sequence[tuple[int, int]]
) -> go.Figure:
    """KL(steered || unsteered) per token, by position in the answer: a line per edit, with 95 % intervals.

    Args:
        curves: per edit, mean and 95 % interval of each bin, in nats; NaN if no answer was that long.
        bins: first token and one past the last.

    Raises:
        LensteerError: a curve with another number of points than there are bins.
    """
    shown = go.Figure()
    names = [str(a) if b == a + 1 else f"{a} to {b - 1}" for a, b in bins]
    for place, (name, rows) in enumerate(curves.items()):
        if len(rows) != len(bins):
            raise LensteerError(f"{name!r} has {len(rows)} points for {len(bins)} bins: give one per bin")
        means, lows, highs = zip(*rows, strict=True)
        shown.add_scatter(
            x=names,
            y=means,
            error_y=error_bars(means, lows, highs),
            name=name,
            mode="lines+markers",
            line=dict(color=SHADES[place % len(SHADES)], dash=("solid", "dash", "dot", "dashdot")[place % 4]),
            customdata=list(zip(lows, highs, strict=True)),
            hovertemplate=f"<b>{name}</b><br>token %{{x}}: %{{y:.3g}} nats<br>95 % interval "
            "%{customdata[0]:.3g} to %{customdata[1]:.3g}<extra></extra>",
        )
    shown.update_xaxes(title_text="token of the answer", type="category")
    title = "KL(steered ‖ unsteered)<br>nats per token"
    smaller = 13 / 1.25  # plotly draws the tick labels of such an axis larger by this factor
    shown.update_yaxes(title_text=title, type="log", dtick=1, exponentformat="power", tickfont_size=smaller)
    return finish(shown, "KL by position in the answer", 380)


LEFT_OUT = "left out"
#: For each comparison: its title, its effect, and the effect's unit as a factor and a word.
COMPARISONS: dict[str, tuple[str, str, float, str]] = {
    "coefficient": ("same coefficient", "share added − {base}", 100.0, "points"),
    "budget": ("same KL per token", "share added − {base}", 100.0, "points"),
    "forced": ("teacher forcing: own sentences' log-probability", "log p, added − subtracted", 1.0, "nats"),
    LEFT_OUT: ("teacher forcing, steered at all sentences but one", "log p, added − subtracted", 1.0, "nats"),
}


def position_ablation(result: PositionAblation) -> go.Figure:
    """The effect of each scope, as bars with 95 % intervals, next to its KL per token.

    Raises:
        LensteerError: a result without rows.
    """
    shown = [name for name in COMPARISONS if any(row.comparison == name for row in result.rows)]
    if not shown:
        raise LensteerError("no rows to draw: give what `analyses/position_ablation.py` returns")
    # The panel for "left out" has other scopes than those above: a gap leaves room for their names.
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
    for row_number, name in enumerate(panels, 1):
        if name is None:
            continue
        _, quantity, factor, unit = COMPARISONS[name]
        quantity = quantity.format(base="subtracted" if result.base == "down" else result.base)
        for behavior in dict.fromkeys(row.behavior for row in result.rows):
            rows = [row for row in result.rows if (row.comparison, row.behavior) == (name, behavior)]
            about = [_about(row, factor, unit) for row in rows]
            places = dict(row=row_number, col=1), dict(row=row_number, col=2)
            effects, costs = _range([row.effect for row in rows], factor), _range([row.kl for row in rows])
            scopes, paint = [row.scope for row in rows], INK if behavior == MEAN else color(behavior)
            same = dict(x=scopes, customdata=about, hovertemplate="%{customdata}<extra></extra>", name=behavior)
            same |= dict(legendgroup=behavior, offsetgroup=behavior)
            bar = go.Bar(**same, **effects, marker_color=paint, showlegend=row_number == 1)
            figure.add_trace(bar, **places[0])
            sign = dict(symbol=MARKERS.get(behavior, "star"), size=8, color=paint)
            figure.add_trace(go.Scatter(**same, **costs, mode="markers", marker=sign, showlegend=False), **places[1])
        for col, first in enumerate(("x", "x2"), 1):
            shared = None if row_number == 1 or name == LEFT_OUT else first
            ends = row_number == len(panels) or panels[row_number] is None
            figure.update_xaxes(matches=shared, showticklabels=ends, row=row_number, col=col)
        figure.update_yaxes(title_text=f"{quantity}<br>({unit})", row=row_number, col=1)
    figure.update_yaxes(type="log", matches="y2", dtick=1, tickformat="~g", zeroline=False, col=2)
    figure.update_xaxes(tickangle=-35, showgrid=False, zeroline=False)
    figure.update_annotations(font_size=13)
    title = f"The same vectors at different positions<br><sup>95 % intervals over {result.n_tasks} dev tasks; "
    title += f"KL over rollouts from {result.n_prompts} prompts</sup>"
    figure.update_layout(barmode="group", scattermode="group")
    finish(figure, title, 190 + 230 * len(shown) + 85 * (None in panels))
    return figure.update_layout(title=dict(y=1, yanchor="top", pad_t=24), margin_t=85)


def _range(found: Sequence[Estimate], factor: float = 1.0) -> dict[str, Any]:
    """Heights and error bars."""
    mids, lows, highs = ([factor * getattr(e, end) for e in found] for end in ("value", "low", "high"))
    return dict(y=mids, error_y={**error_bars(mids, lows, highs), "thickness": 1.2, "width": 2, "color": INK})


def _about(row: PositionEffect, factor: float, unit: str) -> str:
    effect, low, high = (f"{factor * value:+.3g}" for value in (row.effect.value, row.effect.low, row.effect.high))
    missed = "" if row.reached else "<br>the target KL was not reached by all"
    return (
        f"<b>{row.behavior}</b>, {row.scope}<br>{effect} {unit} ({low} to {high})<br>KL {row.kl.value:.3g} "
        f"nats per token ({row.kl.low:.3g} to {row.kl.high:.3g})<br>coefficients {row.down:+.2g} and {row.up:+.2g}, "
        f"{row.edited:.0f} positions a chain{missed}"
    )

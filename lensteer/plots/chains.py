"""Figures of one chain: sentences in their behavior's color, projections, and a plan's effect on each token."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.ablation import ForcedEffect, LeaveOneOut
from lensteer.behaviors import in_order
from lensteer.errors import LensteerError
from lensteer.plots.style import CELL_FONT, DIVERGING, TAGS, color, color_bar, faint, finish, in_cell, number
from lensteer.traces import Trace
from lensteer.vectors.projections import TokenProjections

_SMALL = "margin: 0 0 0.6em; font-size: 0.9em"


class Html(str):
    """Markup that notebooks render."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def chain_html(trace: Trace, *, header: bool = True) -> Html:
    """A chain with every annotated sentence in its behavior's color, as markup for a page or a notebook.

    Colors are translucent, so that text is readable in light and dark mode; all text is escaped.

    Args:
        trace: annotated.
        header: put the task and a legend above it.
    """
    parts, cursor = [], 0
    for span in sorted(trace.spans, key=lambda s: s.char_start):
        begin = max(span.char_start, cursor)
        if span.char_end > begin:
            parts.append(escape(trace.response[cursor:begin]))
            parts.append(_colored(span.label, trace.response[begin : span.char_end]))
            cursor = span.char_end
    parts.append(escape(trace.response[cursor:]))
    above = ""
    if header:
        legend = legend_html(span.label for span in trace.spans)
        above = f'<p style="{_SMALL}"><b>Task</b> {escape(trace.task.prompt)}</p><p style="{_SMALL}">{legend}</p>'
    text = f'<div style="white-space: pre-wrap; overflow-wrap: anywhere; line-height: 1.7">{"".join(parts)}</div>'
    return Html(f'<div class="chain">{above}{text}</div>')


def legend_html(labels: Iterable[str]) -> Html:
    """The names of behaviors in their colors, each once."""
    entries = (
        f'<span style="white-space: nowrap; margin-right: 0.9em">{_colored(b, b)}</span>' for b in in_order(labels)
    )
    return Html(" ".join(entries) or "no annotated sentence")


def _colored(label: str, text: str) -> str:
    style = f"background: {faint(label, 0.22)}; border-bottom: 2px solid {color(label)}"
    tag = f'<small style="opacity: 0.75; font-size: 0.7em; user-select: none">{escape(TAGS.get(label, label))} </small>'
    return f'<span style="{style}" title="{escape(label)}">{tag}{escape(text)}</span>'


PER_ROW = 10
_WIDTH = 8  # characters that fit into a cell of a figure 700 pixels wide


def token_projections(found: TokenProjections, *, start: int | None = None, n: int = 140) -> go.Figure:
    """A heat map that reads as text: rows of tokens, each over its projection (1: as long as the mean activation).

    Args:
        found: from `projections.token_projections`.
        start: the first token shown; None is the first of the response.
        n: number of tokens.

    Raises:
        LensteerError: no token there.
    """
    begin = found.prompt_length if start is None else start
    chosen = range(begin, min(begin + n, len(found.tokens)))
    if not 0 <= begin or not chosen:
        raise LensteerError(f"start={start}, n={n} shows none of the {len(found.tokens)} tokens")
    rows = [chosen[i : i + PER_ROW] for i in range(0, len(chosen), PER_ROW)]
    values = found.values.tolist()
    pad = [[None] * (PER_ROW - len(row)) for row in rows]
    about = [
        [f"<b>{_shown(found.tokens[i])}</b><br>position {i}" for i in row] + [""] * len(p)
        for row, p in zip(rows, pad, strict=True)
    ]
    most = max(abs(values[i]) for i in chosen) or 1.0
    words = {i: in_cell(_shown(found.tokens[i], _WIDTH), values[i] / most) for i in chosen}
    figure = go.Figure(
        go.Heatmap(
            z=[[values[i] for i in row] + p for row, p in zip(rows, pad, strict=True)],
            text=[[words[i] for i in row] + [""] * len(p) for row, p in zip(rows, pad, strict=True)],
            customdata=about,
            texttemplate="%{text}",
            textfont=CELL_FONT | dict(size=10),
            hovertemplate="%{customdata}<br>projection %{z:.3f}<extra></extra>",
            zmin=-most,
            zmax=most,
            colorscale=DIVERGING,
            colorbar=color_bar("projection"),
            xgap=2,
            ygap=3,
        )
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    title = f"Projection on {found.label} at layer {found.layer}, token by token"
    unit = "1 = length of the layer's mean activation"
    if chosen.stop < len(found.tokens) or begin > found.prompt_length:
        unit += f"; positions {begin} to {chosen.stop - 1} of {found.prompt_length} to {len(found.tokens) - 1}"
    title += f"<br><sup>{unit}</sup>"
    return finish(figure, title, 110 + 30 * len(rows), False).update_layout(margin_l=20)


def _shown(token: str, width: int | None = None) -> str:
    text = token.replace("\n", "⏎").strip() or "␣"
    return escape(text if width is None or len(text) <= width else text[: width - 1] + "…")


NO_LABEL = "no behavior"
_MEASURES = {"kl": "total KL of the chain", "log_prob": "log-probability of the target tokens"}


def forced_effect(effect: ForcedEffect, trace: Trace) -> go.Figure:
    """KL and change of log-probability of every token of a response, in the colors of the sentences' behaviors.

    Args:
        effect: from `lensteer.ablation.forced_effect`.
        trace: the chain that was measured.

    Raises:
        LensteerError: a chain of another length.
    """
    n = len(effect.kl)
    if (effect.prompt_length, n) != (trace.prompt_length, len(trace.response_ids)):
        raise LensteerError(
            f"the effect is of {n} tokens from position {effect.prompt_length} on, trace {trace.id!r} has "
            f"{len(trace.response_ids)} from {trace.prompt_length} on: give the trace that was measured"
        )
    labels = [NO_LABEL] * n
    for span in trace.spans:
        for position in range(span.start, span.end):
            labels[position - trace.prompt_length] = span.label
    ends = (*trace.offsets[1:], len(trace.response))
    texts = [repr(trace.response[a:b]) for a, b in zip(trace.offsets, ends, strict=True)]
    figure = make_subplots(2, 1, shared_xaxes=True, vertical_spacing=0.08)
    for row, values in enumerate((effect.kl.tolist(), effect.change.tolist()), 1):
        for label in dict.fromkeys(labels):
            own = [i for i in range(n) if labels[i] == label]
            figure.add_bar(
                x=[trace.prompt_length + i for i in own],
                y=[values[i] for i in own],
                name=label,
                legendgroup=label,
                showlegend=row == 1,
                marker=dict(color=color(label), line_width=0),
                customdata=[escape(texts[i]) for i in own],
                hovertemplate=f"position %{{x}}, %{{customdata}}<br>{label}<br>%{{y:+.3g}} nats<extra></extra>",
                row=row,
                col=1,
            )
    figure.update_xaxes(title_text="position in the chain", row=2, col=1)
    figure.update_xaxes(showgrid=False, range=[trace.prompt_length - 1, len(trace.ids)])
    figure.update_yaxes(title_text="KL, steered ‖<br>unsteered (nats)", rangemode="tozero", row=1, col=1)
    figure.update_yaxes(title_text="log-probability<br>change (nats)", row=2, col=1)
    stripe = dict(type="rect", y0=0, y1=1, layer="below", line_width=0)
    stripes = [
        dict(**stripe, x0=span.start - 0.5, x1=span.end - 0.5, yref=panel, fillcolor=faint(span.label, 0.16))
        for panel in ("y domain", "y2 domain")
        for span in trace.spans
    ]
    figure.update_layout(shapes=stripes)
    figure.update_layout(barmode="overlay", bargap=0)
    about = f"total KL {effect.total:.3g} nats over {n} tokens of {escape(trace.id)}; stripes: its sentences"
    return finish(figure, f"Effect of the plan on each token<br><sup>{about}</sup>", 460)


def leave_one_out(ranked: LeaveOneOut) -> go.Figure:
    """A bar per group of positions, in the order of the chain: the effect that is lost without it, in nats.

    Args:
        ranked: from `lensteer.ablation.leave_one_out`.
    """
    order = sorted(range(len(ranked.names)), key=lambda i: ranked.groups[i])
    values = [ranked.importance[i] for i in order]
    sizes = [len(ranked.groups[i]) for i in order]
    figure = go.Figure(
        go.Bar(
            x=values,
            y=[escape(ranked.names[i]) for i in order],
            orientation="h",
            marker_color=[DIVERGING[-1][1] if value >= 0 else DIVERGING[0][1] for value in values],
            customdata=[(size, ranked.groups[i][0]) for size, i in zip(sizes, order, strict=True)],
            hovertemplate="<b>%{y}</b><br>%{customdata[0]} positions from %{customdata[1]} on<br>"
            "%{x:+.3g} nats<extra></extra>",
        )
    )
    figure.update_xaxes(title_text=f"lost without it: {_MEASURES[ranked.measure]} (nats)")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, tickmode="linear")
    about = f"steered at all of them: {number(ranked.full, '+.3g')} nats; the bars need not add up to that"
    title = f"Effect of each of {len(order)} groups of positions<br><sup>{about}</sup>"
    return finish(figure, title, 150 + 20 * len(order), legend=False).update_layout(margin_b=60)

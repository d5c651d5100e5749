"""Figures of one chain under teacher forcing: what a plan does to each token, and what each group of positions adds."""

from __future__ import annotations

from html import escape

from plotly import graph_objects as go
from plotly.subplots import make_subplots

from lensteer.ablation import ForcedEffect, LeaveOneOut
from lensteer.errors import LensteerError
from lensteer.plots.style import DIVERGING, color, faint, finish, number
from lensteer.traces import Trace

NO_LABEL = "no behavior"
_MEASURES = {"kl": "total KL of the chain", "log_prob": "log-probability of the target tokens"}


def forced_effect(effect: ForcedEffect, trace: Trace) -> go.Figure:
    """KL and change of log-probability of every token of a response, in the colors of the sentences' behaviors.

    Args:
        effect: from `lensteer.ablation.forced_effect`.
        trace: the chain that it is of.

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
    return finish(figure, f"What the plan does to each token<br><sup>{about}</sup>", 460)


def leave_one_out(ranked: LeaveOneOut) -> go.Figure:
    """A bar per group of positions, in the order of the chain: what the effect misses without it, in nats.

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
    figure.update_xaxes(title_text=f"missed without it: {_MEASURES[ranked.measure]} (nats)")
    figure.update_yaxes(autorange="reversed", type="category", showgrid=False, tickmode="linear")
    about = f"steered at all of them: {number(ranked.full, '+.3g')} nats; the bars need not add up to that"
    title = f"What each of {len(order)} groups of positions adds<br><sup>{about}</sup>"
    return finish(figure, title, 150 + 20 * len(order), legend=False).update_layout(margin_b=60)

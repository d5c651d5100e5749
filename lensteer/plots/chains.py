"""Annotated chains as markup, every sentence in its behavior's color."""

from __future__ import annotations

from collections.abc import Iterable
from html import escape

from lensteer.behaviors import in_order
from lensteer.plots.style import TAGS, color, faint
from lensteer.traces import Trace

_SMALL = "margin: 0 0 0.6em; font-size: 0.9em"


class Html(str):
    """Markup that notebooks show as such."""

    __slots__ = ()

    def _repr_html_(self) -> str:
        return str(self)


def chain_html(trace: Trace, *, header: bool = True) -> Html:
    """A chain with every annotated sentence in its behavior's color, as markup for a page or a notebook.

    Colors are translucent, so that they read on light and on dark paper; all text is escaped.

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

"""Results as JSON-ready values for the page. Text stays text; numbers that are not finite become null."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from lensteer.ablation import ForcedEffect, LeaveOneOut
from lensteer.behaviors import BEHAVIORS, in_order
from lensteer.explorer.state import CHANNELS, MEASURES, OPERATORS, UNIT, Choices, State
from lensteer.plots.style import DIVERGING, PAGE, TAGS, color
from lensteer.steering.plans import UNIT_WORDS
from lensteer.traces import Trace


def numbers(values: Iterable[float] | Tensor, digits: int = 4) -> list[float | None]:
    """Rounded to `digits` significant digits."""
    listed = values.tolist() if isinstance(values, Tensor) else values
    return [float(f"{v:.{digits}g}") if math.isfinite(v) else None for v in listed]


def options_payload(choices: Choices) -> dict[str, Any]:
    """The constants: the available choices, and the styling."""
    vectors, scores = choices.vectors, choices.scores
    curves = {}
    for label in vectors.labels if scores is not None else ():
        assert scores is not None
        if label in scores.labels:
            row = scores.row(label)
            curves[label] = {name: numbers(getattr(scores, name)[row]) for name in ("mean", "low", "high")}
    found = {span.label for trace in choices.traces for span in trace.spans}
    labels = in_order([*BEHAVIORS, *found, *vectors.labels])
    recommended = {b: [float(c)] for b, c in choices.coefficients.items() if math.isfinite(c)}
    return {
        "behaviors": list(vectors.labels),
        "looks": {label: {"color": color(label), "tag": TAGS.get(label, label[:4])} for label in labels},
        "layers": list(vectors.layers),
        "operators": list(OPERATORS),
        "channels": list(CHANNELS if choices.cache_vector is not None else CHANNELS[:1]),
        "measures": list(MEASURES),
        "traces": [{"id": trace.id, "tokens": len(trace.ids)} for trace in choices.traces],
        "curves": curves,
        "curve_layers": [] if scores is None else list(scores.layers),
        "curve_name": "" if scores is None else f"{scores.name} ({scores.unit})",
        "site": dict(choices.layers or {}),
        "recommended": recommended,
        "unit": UNIT_WORDS[UNIT],
        "kl_budget": choices.kl_budget,
        "budgets": {b: [choices.budget_coefficient(b, layer) for layer in vectors.layers] for b in vectors.labels},
        "page": PAGE,
        "down": DIVERGING[0][1],
        "up": DIVERGING[-1][1],
    }


def effect_payload(effect: ForcedEffect, steering: int, milliseconds: float) -> dict[str, Any]:
    """The two strips and their total; `steering` identifies their settings."""
    return {
        "kl": numbers(effect.kl),
        "change": numbers(effect.change),
        "total": effect.total,
        "steering": steering,
        "milliseconds": round(milliseconds, 1),
    }


def condition_payload(trace: Trace, n_given: int, *, running: bool) -> dict[str, Any]:
    """The new part of a continued chain as pieces of text, each with its behavior or an empty string.

    Args:
        trace: the whole chain, annotated as far as it goes.
        n_given: response tokens that were given.
        running: whether more may come, so that a character's missing bytes are not shown yet.
    """
    offsets = (*trace.offsets, len(trace.response))
    cursor, end = offsets[min(n_given, len(offsets) - 1)], len(trace.response)
    if running:
        end = max(cursor, len(trace.response.rstrip("�")))
    pieces: list[tuple[str, str]] = []
    for span in trace.spans:
        begin, stop = max(span.char_start, cursor), min(span.char_end, end)
        if stop > begin:
            pieces += [("", trace.response[cursor:begin]), (span.label, trace.response[begin:stop])]
            cursor = stop
    pieces.append(("", trace.response[cursor:end]))
    return {
        "pieces": [list(piece) for piece in pieces if piece[1]],
        "tokens": len(trace.response_ids) - n_given,
        "finished": trace.finished,
    }


def ranking_payload(ranked: LeaveOneOut) -> dict[str, Any]:
    """Groups by absolute importance, the largest first."""
    order = sorted(range(len(ranked.names)), key=lambda i: -abs(ranked.importance[i]))
    return {
        "groups": [
            {"name": ranked.names[i], "positions": list(ranked.groups[i]), "importance": ranked.importance[i]}
            for i in order
        ],
        "full": ranked.full,
        "measure": ranked.measure,
    }


def settings_payload(
    state: State, trace: Trace, positions: tuple[int, ...], steering: int, code: str
) -> dict[str, Any]:
    """The state; `steering` changes with everything that an effect depends on."""
    cut = trace.prompt_length if state.cut is None else state.cut
    return {**vars(state), "cut": cut, "positions": list(positions), "steering": steering, "code": code}

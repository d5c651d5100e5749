"""Figure of a chain's tokens, each as dark as its residual goes along a direction."""

from __future__ import annotations

from html import escape

from plotly import graph_objects as go

from lensteer.errors import LensteerError
from lensteer.plots.style import DIVERGING, finish
from lensteer.projections import TokenProjections

PER_ROW = 14


def token_projections(found: TokenProjections, *, start: int | None = None, n: int = 140) -> go.Figure:
    """A heat map that reads as text: rows of tokens, each over its projection.

    Args:
        found: from `projections.token_projections`.
        start: the first token shown; None is the first of the response.
        n: how many tokens.

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
    text = [[_shown(found.tokens[i]) for i in row] + [""] * len(p) for row, p in zip(rows, pad, strict=True)]
    where = [[f"{i}" for i in row] + [""] * len(p) for row, p in zip(rows, pad, strict=True)]
    most = max(abs(values[i]) for i in chosen) or 1.0
    figure = go.Figure(
        go.Heatmap(
            z=[[values[i] for i in row] + p for row, p in zip(rows, pad, strict=True)],
            text=text,
            customdata=where,
            texttemplate="%{text}",
            textfont=dict(size=12),
            hovertemplate="<b>%{text}</b><br>position %{customdata}<br>projection %{z:.3f}<extra></extra>",
            zmin=-most,
            zmax=most,
            colorscale=DIVERGING,
            colorbar=dict(
                title=dict(text="projection<br>(1: as long as the<br>mean activation)"), thickness=12, outlinewidth=0
            ),
            xgap=2,
            ygap=3,
        )
    )
    figure.update_xaxes(visible=False)
    figure.update_yaxes(visible=False, autorange="reversed")
    title = f"Along {found.label} at layer {found.layer}, token by token"
    return finish(figure, title, 130 + 34 * len(rows))


def _shown(token: str) -> str:
    return escape(token.replace("\n", "⏎").strip() or "␣")

"""Figure of a chain's tokens, each as dark as its residual goes along a direction."""

from __future__ import annotations

from html import escape

from plotly import graph_objects as go

from lensteer.errors import LensteerError
from lensteer.plots.style import CELL_FONT, DIVERGING, color_bar, finish, in_cell
from lensteer.projections import TokenProjections

PER_ROW = 10
_WIDTH = 8  # characters that fit into a cell of a figure 700 pixels wide


def token_projections(found: TokenProjections, *, start: int | None = None, n: int = 140) -> go.Figure:
    """A heat map that reads as text: rows of tokens, each over its projection (1: as long as the mean activation).

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
    title = f"Along {found.label} at layer {found.layer}, token by token"
    title += "<br><sup>projection of 1: as long as the layer's mean activation</sup>"
    return finish(figure, title, 110 + 30 * len(rows), False).update_layout(margin_l=20)


def _shown(token: str, width: int | None = None) -> str:
    text = token.replace("\n", "⏎").strip() or "␣"
    return escape(text if width is None or len(text) <= width else text[: width - 1] + "…")

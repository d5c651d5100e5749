"""Figures of vector geometry: paths over layers in 2D or 3D, angles along layers, comparison of recipes.

Projections and angles are of directions (vectors of length 1).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.plots.style import LINE, MUTED, PAPER, band, color, curve, finish, marker
from lensteer.vectors import BehaviorVectors

#: For markers that plotly lacks in 3D, or draws as a box.
_SOLID = {"triangle-up": "cross", "x": "square-open"}
#: Sizes of the first and the last layer's marker, to show the direction of a path.
_SIZES = (5.0, 14.0)
_LEVEL, _ENDS = "95 %", (0.025, 0.975)
_COLUMNS = 3


def vector_geometry(vectors: BehaviorVectors, layers: Sequence[int] | None = None, dimensions: int = 2) -> go.Figure:
    """The directions of all behaviors as paths over layers, on the axes with most of their squared length.

    Every vector is scaled to length 1 and projected on the first right singular vectors of them all (behaviors ×
    layers, not centered): the origin stays the origin, opposite directions stay opposite, and a point's distance from
    the origin is the share of its length that is shown.

    Args:
        vectors: of any behaviors.
        layers: to draw, in the order of the path; by default all.
        dimensions: 2 or 3.

    Raises:
        LensteerError: another number of dimensions, a layer that the vectors lack or at which one is zero, or fewer
            directions than dimensions.
    """
    if dimensions not in (2, 3):
        raise LensteerError(f"dimensions={dimensions}: a figure has 2 or 3")
    chosen = tuple(vectors.layers if layers is None else layers)
    units = _units(vectors, vectors.raw, chosen)
    _, sizes, axes = torch.linalg.svd(units.flatten(0, 1), full_matrices=False)
    if len(sizes) < dimensions:
        raise LensteerError(f"{len(sizes)} direction(s) have no {dimensions} axes: give more layers or behaviors")
    shares = (sizes.square() / sizes.square().sum())[:dimensions].tolist()
    points = units @ axes[:dimensions].T
    figure = go.Figure()
    for b, label in enumerate(vectors.labels):
        figure.add_trace(_path(label, points[b], chosen, vectors.counts.get(label)))
    names = [f"axis {i + 1} ({share:.0%} of squared length)" for i, share in enumerate(shares)]
    about = f"vectors of length 1; markers grow from layer {chosen[0]} to layer {chosen[-1]}"
    if dimensions == 3:
        scene = {
            f"{letter}axis": dict(
                title=dict(text=name.split(" of")[0] + ")"), backgroundcolor=PAPER, gridcolor=LINE, dtick=0.5
            )
            for letter, name in zip("xyz", names, strict=True)
        }
        camera = dict(eye=dict(x=1.3, y=1.3, z=0.8), center=dict(x=0, y=0, z=-0.15))
        figure.update_layout(scene=dict(aspectmode="data", camera=camera, **scene))
    else:
        about += "; dotted: directions that lie in this plane"
        figure.add_shape(type="circle", x0=-1, y0=-1, x1=1, y1=1, line=dict(color=MUTED, width=1, dash="dot"))
        figure.update_xaxes(title_text=names[0], range=[-1.1, 1.1], constrain="domain")
        figure.update_yaxes(title_text=names[1], range=[-1.1, 1.1], scaleanchor="x", constrain="domain")
    title = f"Directions of {len(vectors.labels)} behaviors at {len(chosen)} layers<br><sup>{about}</sup>"
    return finish(figure, title, 700).update_layout(title=dict(y=0.965, yanchor="top"))


def layer_angles(vectors: BehaviorVectors) -> go.Figure:
    """How far each behavior's direction rotates from layer to layer, and from the first layer, in degrees.

    With replicates (`fit_vectors(..., n_bootstrap=200)`) bands are percentile intervals over resampled traces.

    Args:
        vectors: at two layers or more.

    Raises:
        LensteerError: a single layer, or one at which a vector is zero.
    """
    layers = vectors.layers
    if len(layers) < 2:
        raise LensteerError(f"vectors at layer {layers[0]} alone: an angle between layers needs two or more")
    units = _units(vectors, vectors.raw, layers)
    draws = None
    if vectors.replicates is not None and len(vectors.replicates):
        draws = _units(vectors, vectors.replicates, layers)
    titles = ("from the previous layer", f"from layer {layers[0]}")
    figure = make_subplots(rows=1, cols=2, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.04)
    for column, (since, title) in enumerate(zip((slice(0, -1), slice(0, 1)), titles, strict=True), 1):
        angles = _degrees(units[:, 1:], units[:, since])
        bounds = None
        if draws is not None:
            turned = _degrees(draws[:, :, 1:], draws[:, :, since])
            bounds = [turned.quantile(q, dim=0) for q in _ENDS]
        for b, label in enumerate(vectors.labels):
            hover = f"<b>{label}</b>, layer %{{x}}<br>%{{y:.1f}}° {title}%{{customdata}}{_spans(vectors, label)}"
            said = [""] * (len(layers) - 1)
            if bounds is not None:
                low, high = (bound[b].tolist() for bound in bounds)
                said = [f"<br>{_LEVEL} interval {lo:.1f}° to {hi:.1f}°" for lo, hi in zip(low, high, strict=True)]
                figure.add_trace(band(label, layers[1:], low, high), row=1, col=column)
            line = curve(label, layers[1:], angles[b].tolist(), f"{hover}<extra></extra>", said)
            figure.add_trace(line.update(showlegend=column == 1), row=1, col=column)
    figure.add_hline(y=90, line=dict(color=MUTED, width=1, dash="dot"))
    figure.add_annotation(x=layers[-1], y=90, text="orthogonal", showarrow=False, yshift=-9, xanchor="right")
    figure.update_xaxes(title_text="layer", dtick=1 if len(layers) <= 24 else 4, zeroline=False)
    figure.update_yaxes(rangemode="tozero", dtick=30)
    interval = f"<br>{_LEVEL} interval over {vectors.n_traces} traces" if draws is not None else ""
    figure.update_yaxes(title_text=f"angle (degrees){interval}", row=1, col=1)
    figure.update_annotations(font_size=13)
    return finish(figure, "Rotation of each direction across layers", 430)


def recipe_comparison(fitted: Mapping[str, BehaviorVectors]) -> go.Figure:
    """The cosine of each behavior's vectors with those of the first set, by layer; a panel for every other set.

    Args:
        fitted: name → vectors of the same model, such as one set per recipe, or per half of the traces.

    Raises:
        LensteerError: fewer than two sets, sets at different layers, or one that has no behavior of the first.
    """
    if len(fitted) < 2:
        raise LensteerError(f"{len(fitted)} set(s) of vectors: give the one to compare with, then others")
    (reference, first), *others = fitted.items()
    for name, vectors in others:
        if vectors.layers != first.layers or not set(vectors.labels) & set(first.labels):
            raise LensteerError(
                f"{name!r} has {list(vectors.labels)} at layers {list(vectors.layers)}, but {reference!r} has "
                f"{list(first.labels)} at {list(first.layers)}: give sets with the same layers"
            )
    n_rows, n_columns = math.ceil(len(others) / _COLUMNS), min(len(others), _COLUMNS)
    figure = make_subplots(
        rows=n_rows,
        cols=n_columns,
        shared_xaxes=True,
        shared_yaxes=True,
        subplot_titles=[name.replace(", ", "<br>") for name, _ in others],
        horizontal_spacing=0.04,
        vertical_spacing=0.13 if n_rows > 1 else 0,
    )
    mine, seen, least = _units(first, first.raw, first.layers), set[str](), 0.0
    for i, (_, vectors) in enumerate(others):
        place = dict(row=i // _COLUMNS + 1, col=i % _COLUMNS + 1)
        theirs = _units(vectors, vectors.raw, vectors.layers)
        for label in (label for label in first.labels if label in vectors.labels):
            pair = mine[first.labels.index(label)], theirs[vectors.labels.index(label)]
            cosines = (pair[0] * pair[1]).sum(-1).tolist()
            hover = f"<b>{label}</b>, layer %{{x}}<br>cosine %{{y:.2f}} with {reference}{_spans(vectors, label)}"
            line = curve(label, vectors.layers, cosines, f"{hover}<extra></extra>", [])
            figure.add_trace(line.update(showlegend=label not in seen), **place)
            seen.add(label)
            least = min(least, *cosines)
    for column in range(1, n_columns + 1):
        figure.update_xaxes(
            title_text="layer", row=n_rows - (column > len(others) - (n_rows - 1) * _COLUMNS), col=column
        )
    figure.update_xaxes(dtick=1 if len(first.layers) <= 12 else 4, zeroline=False)
    figure.update_yaxes(range=[least - 0.06, 1.08], dtick=0.5)
    figure.update_yaxes(title_text="cosine", col=1)
    figure.update_annotations(font_size=13)
    return finish(figure, f"Cosine of every vector with that of “{reference}”", 170 + 210 * n_rows).update_layout(
        margin_t=80
    )


def _units(
    vectors: BehaviorVectors, raw: Float[Tensor, "*some behavior _layer d_model"], layers: Sequence[int]
) -> Float[Tensor, "*some behavior layer d_model"]:
    """Directions of length 1 at some layers, in double precision."""
    if not layers:
        raise LensteerError("no layers to draw: give at least one, or leave them out for all")
    for label in vectors.labels:
        for layer in layers:
            vectors[label].scaled(layer)  # raises for a layer that they lack, and for a vector that is zero
    rows = raw[..., [vectors.layers.index(layer) for layer in layers], :].double()
    return rows / rows.norm(dim=-1, keepdim=True)


def _degrees(
    a: Float[Tensor, "*some layer d_model"], b: Float[Tensor, "*some _layer d_model"]
) -> Float[Tensor, "*some layer"]:
    return torch.rad2deg((a * b).sum(-1).clamp(-1, 1).acos())


def _path(
    label: str, points: Float[Tensor, "layer _axis"], layers: Sequence[int], n_spans: int | None
) -> go.Scatter | go.Scatter3d:
    """One behavior's path through the layers."""
    step = (_SIZES[1] - _SIZES[0]) / max(len(layers) - 1, 1)
    sizes = [_SIZES[0] + step * i for i in range(len(layers))]
    rows = [[layer, length] for layer, length in zip(layers, points.norm(dim=-1).tolist(), strict=True)]
    hover = f"<b>{label}</b>, layer %{{customdata[0]}}<br>%{{customdata[1]:.2f}} of its length is shown"
    hover += "" if n_spans is None else f"<br>n = {n_spans} spans"
    sign = marker(label)
    space = points.shape[1] == 3
    return (go.Scatter3d if space else go.Scatter)(
        **dict(zip("xyz", points.T.tolist(), strict=False)),
        name=label,
        legendgroup=label,
        mode="lines+markers",
        line=dict(color=color(label), width=4 if space else 1.5),
        marker=dict(
            symbol=_SOLID.get(sign, sign) if space else sign,
            size=sizes,
            color=color(label),
        ),
        customdata=rows,
        hovertemplate=f"{hover}<extra></extra>",
    )


def _spans(vectors: BehaviorVectors, label: str) -> str:
    return f"<br>n = {vectors.counts[label]} spans" if label in vectors.counts else ""

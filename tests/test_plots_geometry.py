"""Paths, angles and cosines that were planted are the ones drawn; what cannot be drawn raises a clear error."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

import synthetic
from lensteer import plots
from lensteer.errors import LensteerError
from lensteer.plots.geometry import layer_angles, recipe_comparison, vector_geometry

TURN = 25.0  # degrees


def turning(n_layers=5, width=8, turn=TURN, growth=3.0):
    """Four behaviors; each turns by `turn` degrees a layer in the plane of the first two axes, ever longer."""
    rows = []
    for b in range(4):
        angles = torch.arange(n_layers) * math.radians(turn) + b * math.pi / 2
        lengths = growth ** torch.arange(n_layers)
        rows.append(torch.stack([lengths * angles.cos(), lengths * angles.sin()], -1))
    raw = torch.zeros(4, n_layers, width)
    raw[..., :2] = torch.stack(rows)
    return dataclasses.replace(
        synthetic.vectors(n_layers=n_layers, width=width), raw=raw, layers=tuple(range(10, 10 + n_layers))
    )


def curves(figure, label):
    return [t for t in figure.data if t.name == label]


def test_a_plane_of_directions_is_drawn_as_it_is_whatever_their_lengths():
    figure = vector_geometry(turning())
    assert "axis 1 (" in figure.layout.xaxis.title.text
    shares = [float(a.title.text.split("(")[1].split("%")[0]) for a in (figure.layout.xaxis, figure.layout.yaxis)]
    assert sum(shares) == pytest.approx(100, abs=1)
    (path,) = curves(figure, "backtracking")
    assert [math.hypot(x, y) for x, y in zip(path.x, path.y, strict=True)] == pytest.approx([1] * 5)
    cosines = [x0 * x1 + y0 * y1 for x0, y0, x1, y1 in zip(path.x, path.y, path.x[1:], path.y[1:], strict=False)]
    assert cosines == pytest.approx([math.cos(math.radians(TURN))] * 4)
    opposite = curves(figure, "example-testing")[0]  # half a turn from backtracking
    assert opposite.x == pytest.approx([-x for x in path.x], abs=1e-5)
    assert path.line.color == plots.COLORS["backtracking"]
    assert [row[0] for row in path.customdata] == [10, 11, 12, 13, 14]
    assert "n = 130 spans" in path.hovertemplate
    assert list(path.marker.size) == sorted(path.marker.size)


def test_paths_of_some_layers_in_space():
    vectors = synthetic.vectors()
    figure = vector_geometry(vectors, layers=(2, 5, 7), dimensions=3)
    assert {t.type for t in figure.data} == {"scatter3d"}
    path = curves(figure, "adding-knowledge")[0]
    assert len(path.x) == len(path.y) == len(path.z) == 3
    units = torch.nn.functional.normalize(vectors.raw[:, [2, 5, 7]].double(), dim=-1)
    points = torch.stack([torch.tensor([t.x, t.y, t.z]) for t in figure.data]).mT  # behavior layer axis
    total = torch.linalg.svdvals(units.flatten(0, 1)).square()
    assert float(points.square().sum()) == pytest.approx(float(total[:3].sum()))
    whole = vector_geometry(vectors, dimensions=3)
    assert len(curves(whole, "adding-knowledge")[0].x) == 8


def test_angles_are_the_planted_ones():
    figure = layer_angles(turning())
    step, since = curves(figure, "uncertainty-estimation")
    assert list(step.x) == list(since.x) == [11, 12, 13, 14]
    assert step.y == pytest.approx([TURN] * 4)
    assert since.y == pytest.approx([TURN, 2 * TURN, 3 * TURN, 4 * TURN])
    assert "degrees" in figure.layout.yaxis.title.text
    assert not [t for t in figure.data if t.fill == "toself"]
    assert "n = 120 spans" in step.hovertemplate


def test_angles_have_intervals_where_there_are_replicates():
    vectors = turning()
    noise = torch.randn(60, *vectors.raw.shape, generator=torch.Generator().manual_seed(0))
    scale = vectors.raw.norm(dim=-1, keepdim=True)
    vectors = dataclasses.replace(vectors, replicates=vectors.raw + 0.02 * scale * noise)
    figure = layer_angles(vectors)
    bands = [t for t in figure.data if t.fill == "toself"]
    assert len(bands) == 2 * 4
    for band in bands[:4]:
        high, low = band.y[:4], band.y[:3:-1]
        assert all(lo < TURN + 2 and TURN - 2 < hi and 0 < hi - lo < 15 for lo, hi in zip(low, high, strict=True))
    assert "95 % interval over 300 traces" in figure.layout.yaxis.title.text
    assert "interval" in curves(figure, "backtracking")[0].customdata[0]


def test_recipes_are_held_against_the_first():
    first, same = turning(), turning(growth=1.0)
    other = dataclasses.replace(turning(), raw=-first.raw)
    fewer = dataclasses.replace(first, raw=first.raw[2:], labels=first.labels[2:])
    figure = recipe_comparison(
        {"mine": first, "same": same, "opposite": other, "turned": turning(turn=0), "two": fewer}
    )
    assert [a.text for a in figure.layout.annotations] == ["same", "opposite", "turned", "two"]
    assert "“mine”" in figure.layout.title.text
    lines = curves(figure, "backtracking")
    assert [line.showlegend for line in lines] == [True, False, False, False]
    cosines = [math.cos(math.radians(TURN * i)) for i in range(5)]
    for line, wanted in zip(lines, ([1] * 5, [-1] * 5, cosines, [1] * 5), strict=True):
        assert line.y == pytest.approx(wanted, abs=1e-6)
        assert list(line.x) == [10, 11, 12, 13, 14]
    assert len(curves(figure, "adding-knowledge")) == 3
    assert figure.layout.yaxis.range[0] < -1
    above = recipe_comparison({"mine": first, "same": same}).layout.yaxis.range
    assert -0.1 < above[0] < 0  # nothing is below zero, which is shown all the same


@pytest.mark.parametrize(
    ("draw", "says"),
    [
        (lambda v: vector_geometry(v, dimensions=4), "dimensions=4: a figure has 2 or 3"),
        (lambda v: vector_geometry(v, layers=(3, 99)), r"no vector at layer 99"),
        (lambda v: vector_geometry(v, layers=()), "no layers to draw"),
        (lambda v: vector_geometry(synthetic.vectors(labels=("backtracking",)), layers=(1,)), "give more layers"),
        (lambda v: layer_angles(dataclasses.replace(v, raw=v.raw[:, :1], mean_norm=v.mean_norm[:1], layers=(4,))), "4"),
        (lambda v: layer_angles(dataclasses.replace(v, raw=v.raw * 0)), "is zero at layer 0"),
        (lambda v: recipe_comparison({"only": v}), r"1 set\(s\) of vectors"),
        (lambda v: recipe_comparison({"a": v, "b": turning()}), "'b' has .* give sets with the same layers"),
    ],
)
def test_what_cannot_be_drawn(draw, says):
    with pytest.raises(LensteerError, match=says):
        draw(synthetic.vectors())


@pytest.mark.parametrize("draw", [vector_geometry, layer_angles, lambda v: recipe_comparison({"a": v, "b": v})])
def test_figures_have_the_template_and_a_title(draw):
    layout = draw(synthetic.vectors()).layout
    assert layout.template.layout.paper_bgcolor == plots.PAPER
    assert layout.title.text
    assert layout.height

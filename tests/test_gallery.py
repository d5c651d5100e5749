"""The gallery draws every figure that there is, and writes what it says."""

from __future__ import annotations

import inspect

import pytest

import lensteer as ls
from scripts import ROOT, load


@pytest.fixture
def gallery(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "analyses")  # it takes from its neighbors
    return load("gallery")


def test_every_figure_is_in_the_gallery(gallery):
    functions = {name: getattr(ls.plots, name) for name in ls.plots.__all__ if name != "figure"}  # chooses among them
    figures = {
        name
        for name, function in functions.items()
        if inspect.isfunction(function) and str(inspect.signature(function).return_annotation).endswith("go.Figure")
    }
    assert {"layer_scores", "position_ablation", "vector_geometry"} <= figures
    assert {name.partition("-")[0] for name in gallery.FIGURES} == figures


@pytest.mark.slow
def test_the_gallery_draws_them(gallery, tmp_path):
    names = tuple(name for name in gallery.FIGURES if name != "position_ablation")  # its own test runs that analysis
    small = dict(n_train=24, n_dev=2, max_spans=4, n_draws=9, n_controls=1)
    written = gallery.main(gallery.Config(tmp_path, names, png=False, **small))
    assert [path.stem for path in written] == list(names)
    assert all("Plotly.newPlot" in path.read_text(encoding="utf-8") for path in written)


def test_unknown_figures_are_refused(gallery, tmp_path):
    with pytest.raises(ls.LensteerError, match=r"no figures \['pie'\]: choose among \['layer_scores'"):
        gallery.main(gallery.Config(tmp_path / "new", ("pie",)))
    assert not (tmp_path / "new").exists()

"""Geometry across models: planted directions are separated, shared, and distinct from those of shuffled labels."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch

import lensteer as ls
from test_shift import ROOT, load

N, SENTENCES = 24, 12  # chains, and sentences of each


@pytest.fixture(scope="module")
def analysis():
    return load("cross_model")


def planted(analysis, basis: torch.Tensor, seed: int):
    """Sentences at their behavior's point in layer 1 of 2, whose geometry is that of `basis`; noise in layer 0."""
    generator = torch.Generator().manual_seed(seed)
    label = torch.arange(N * SENTENCES) % len(ls.BEHAVIORS)
    x = torch.randn(len(label), 2, basis.shape[1], generator=generator)
    x[:, 1] += 3 * basis[label]
    return analysis.Read(x, label, torch.arange(N).repeat_interleave(SENTENCES), N)


def test_directions_are_weighted_differences_of_means(analysis):
    seen = planted(analysis, torch.eye(6), 0)
    weights = torch.tensor([[1.0] * N, [2.0] + [0.0] * (N - 1)])
    found = analysis.directions(seen, seen.label, weights)
    first = seen.x[seen.chain == 0], seen.label[seen.chain == 0]
    for row, (x, label) in enumerate([(seen.x, seen.label), first]):
        for b in range(6):
            assert torch.allclose(found[row, b], x[label == b].mean(0) - x.mean(0), atol=1e-4)


def test_planted_layer_separates_and_shuffled_labels_do_not(analysis):
    seen = planted(analysis, torch.eye(6), 0)
    config = analysis.Config(n_bootstrap=30, n_shuffled=5)
    found, every = analysis.measure("a", analysis.LANGUAGE, seen, config)
    assert found.best_depth.value == 1.0
    assert found.separation[1].value == pytest.approx(3 * np.sqrt(6 / 5), abs=0.7)  # means of sides, in deviations
    assert abs(found.separation[0].value) < 0.4
    assert abs(found.shuffled[1]) < 0.5
    assert found.split_half[1] > 0.9 > 0.5 > found.split_half[0]
    assert every["own"].shape == (31, 2, 6, 6)
    assert np.diagonal(every["own"], axis1=2, axis2=3) == pytest.approx(1)


def test_shuffles_stay_within_chains_and_are_the_same_in_all_models(analysis):
    seen = planted(analysis, torch.eye(6), 0)
    for one, other in zip(
        analysis.shuffles(seen, 3, 0), analysis.shuffles(planted(analysis, torch.eye(6), 1), 3, 0), strict=True
    ):
        assert torch.equal(one, other)
        assert not torch.equal(one, seen.label)
        for chain in range(N):
            mine = seen.chain == chain
            assert torch.equal(one[mine].sort().values, seen.label[mine].sort().values)


def test_a_shared_geometry_is_told_from_another(analysis):
    generator = torch.Generator().manual_seed(0)
    basis, others = (torch.randn(6, 8, generator=generator) for _ in range(2))
    turned = basis @ torch.linalg.qr(torch.randn(8, 8, generator=generator)).Q  # the same cosines in other axes
    config = analysis.Config(n_bootstrap=30, n_shuffled=5)
    models, known = [], {}
    for i, (name, each) in enumerate({"a": basis, "b": turned, "c": others}.items()):
        seen = planted(analysis, each, i)
        seen = dataclasses.replace(seen, x=seen.x[:, [1, 1]])  # the middle of two layers is the first
        model, known[name] = analysis.measure(name, analysis.LANGUAGE, seen, config)
        models.append(model)
    pairs = {(p.one, p.other): p for p in analysis.pairs_of(models, known)}
    assert pairs["a", "b"].correlation.value > 0.9 > 0.6 > pairs["a", "c"].correlation.value
    assert pairs["a", "b"].p < 0.01
    mean = pairs["mean", "3"]
    assert mean.correlation.value == pytest.approx(np.mean([pairs[k].correlation.value for k in list(pairs)[:3]]))
    assert mean.inner.value == pytest.approx(np.mean([pairs[k].inner.value for k in list(pairs)[:3]]))
    result = analysis.Result("a recipe", tuple(models), tuple(pairs.values()))
    sentence, shown = analysis.answer(json.loads(analysis.to_json(result)))
    assert isinstance(shown, bool)
    assert "over 3 pair(s)" in sentence
    assert analysis.table(result).count("\n") == 1 + 3 + 3 + 4


@pytest.mark.medium
def test_two_organisms_share_a_geometry(analysis, tmp_path):
    organisms = (str(ls.models.ORGANISM), str(ROOT / "analyses" / "organisms" / "seed1"))
    config = analysis.Config(organisms=organisms, n_own=12, n_bootstrap=10, n_shuffled=2, folder=tmp_path)
    found = analysis.main(config)
    assert [m.name for m in found.models] == ["organism", "seed1"]
    assert found.pairs[0].correlation.value > found.pairs[0].shuffled.value
    assert analysis.to_json(analysis.main(config)) == analysis.to_json(found)  # from the kept activations
    assert len(analysis.figure(found).data) == 2 + 2 * 2
    for wrong, words in (
        (dict(organisms=organisms[:1]), "two or more"),
        (dict(organisms=organisms[:1] * 2), "different names"),
        (dict(models=organisms[:1], organisms=organisms[1:]), "without chains"),
    ):
        with pytest.raises(ls.LensteerError, match=words):
            analysis.main(dataclasses.replace(config, **wrong))

"""Directions without labels: components and planted atoms, and matches that controls do not have."""

from __future__ import annotations

import dataclasses
import random

import pytest
import torch

from lensteer.errors import LensteerError
from lensteer.vectors import BehaviorVectors, Controls, DirectionMatches, Recipe, match_directions, nearest_direction
from lensteer.vectors.constructions import isotropic
from lensteer.vectors.unsupervised import dictionary, principal, unsupervised_directions
from reference import kept_activations, window_positions
from test_activations import make_trace


def planted_codes(n=1500, width=12, n_atoms=4, seed=0):
    """Sums of few of the atoms, with nonnegative weights, and noise."""
    generator = torch.Generator().manual_seed(seed)
    atoms = torch.randn(n_atoms, width, generator=generator, dtype=torch.float64)
    atoms = torch.linalg.qr(atoms.T).Q.T
    used = torch.rand(n, n_atoms, generator=generator) < 0.15
    codes = used * (3 + torch.rand(n, n_atoms, generator=generator, dtype=torch.float64))
    x = codes @ atoms + 0.1 * torch.randn(n, width, generator=generator, dtype=torch.float64)
    return x - x.mean(0), atoms


def nearest(found, wanted):
    """Of each wanted direction, the largest |cosine| with a found one."""
    found, wanted = (t.double() / t.double().norm(dim=-1, keepdim=True) for t in (found, wanted))
    return (wanted @ found.T).abs().amax(1)


def test_components_are_one_standard_deviation_long_and_point_to_the_longer_tail():
    x, _ = planted_codes()
    found, positive = principal(x, 3)
    scale, axes = torch.linalg.svd(x, full_matrices=False)[1:]
    for i in range(3):
        torch.testing.assert_close(found[i].norm(), scale[i] / len(x) ** 0.5)
        assert abs(float(torch.cosine_similarity(found[i], axes[i], dim=0))) == pytest.approx(1)
        scores = x @ found[i]
        assert scores.pow(3).sum() > 0
        assert positive[i] == (scores > 0).sum()


def test_a_dictionary_finds_planted_atoms_and_components_mix_them():
    x, atoms = planted_codes()
    found, active = dictionary(x, 8, 0.5, 0)
    sigma = x.square().mean(0).sqrt()
    assert nearest(found, atoms).min() > 0.9
    assert nearest(principal(x, 4)[0], atoms).mean() < nearest(found, atoms).mean()
    others = isotropic(50, 1, x.shape[1])[:, 0]
    assert nearest(found, others).mean() < 0.8  # what is found is not everything
    assert (active[:4] > 0).all()
    assert sigma.min() > 0
    torch.testing.assert_close(found, dictionary(x, 8, 0.5, 0)[0])


def test_directions_of_a_models_activations(tiny_model, tmp_path):
    model = tiny_model()
    rng = random.Random(0)
    traces = [make_trace(rng, number) for number in range(6)]
    found = unsupervised_directions(model, traces, n=3, window="onset", layers=[1, 2])
    rows = []
    for trace in traces:
        acts = kept_activations(model, trace)
        rows += [acts[:, window_positions(span, "onset", len(trace.ids))].mean(1) for span in trace.spans]
    x = torch.stack(rows)
    for layer in (1, 2):
        axes = torch.linalg.svd(x[:, layer] - x[:, layer].mean(0)).Vh[:3]
        raw = torch.stack([found[label].at(layer) for label in found.labels]).double()
        cosines = torch.cosine_similarity(raw, axes, dim=-1).abs()
        torch.testing.assert_close(cosines, torch.ones(3).double(), rtol=0, atol=1e-3)
    assert found.labels == ("direction-0", "direction-1", "direction-2")
    assert found.recipe == Recipe("onset", "spans", "span", "unsupervised_pca")
    again = unsupervised_directions(model, traces[::-1], n=3, window="onset", layers=[1, 2], batch_size=2)
    torch.testing.assert_close(again.raw, found.raw, rtol=1e-3, atol=1e-5)
    found.save(tmp_path / "found.safetensors")
    assert BehaviorVectors.load(tmp_path / "found.safetensors", model).recipe == found.recipe
    atoms = unsupervised_directions(model, traces, n=4, method="dictionary", window="onset", layers=[1])
    assert atoms.raw.shape == (4, 1, 32)
    relabeled = [
        dataclasses.replace(t, spans=tuple(dataclasses.replace(s, label="deduction") for s in t.spans)) for t in traces
    ]
    blind = unsupervised_directions(model, relabeled, n=3, window="onset", layers=[1, 2])
    assert torch.equal(blind.raw, found.raw)
    for options, message in (
        (dict(method="sae"), "unknown method 'sae': choose one of 'pca', 'dictionary'"),
        (dict(n=30), "n=30 directions of 30 spans with 32 entries each: give 1 to 29"),
        (dict(penalty=0.0), "penalty=0.0: give a positive number"),
    ):
        with pytest.raises(LensteerError, match=message):
            unsupervised_directions(model, traces, **options)
    with pytest.raises(LensteerError, match="no trace has a span"):
        unsupervised_directions(model, [dataclasses.replace(t, spans=()) for t in traces])


def test_a_vector_along_a_direction_is_matched_and_its_controls_are_not(tmp_path):
    width, generator = 64, torch.Generator().manual_seed(0)
    directions = BehaviorVectors(
        isotropic(8, 2, width).float(),
        torch.ones(2),
        tuple(f"direction-{i}" for i in range(8)),
        (3, 4),
        {},
        9,
        Recipe("onset", "spans", "span", "unsupervised_pca"),
    )
    raw = torch.randn(2, 2, width, generator=generator)
    raw[0] = -4 * directions["direction-5"].raw + 0.02 * raw[0]  # planted, with the other sign
    draws = isotropic(99, 2, width, seed=1).float()
    shuffled = torch.randn(99, 2, 2, width, generator=generator)
    replicates = raw + 0.05 * torch.randn(40, 2, 2, width, generator=generator)
    vectors = BehaviorVectors(
        raw,
        torch.ones(2),
        ("backtracking", "deduction"),
        (3, 4),
        {},
        9,
        Recipe(),
        controls=Controls(draws, draws.flip(0), shuffled),
        replicates=replicates,
    )
    found = match_directions(directions, vectors)
    for layer in (3, 4):
        planted, other = found.at("backtracking", layer), found.at("deduction", layer)
        assert planted.direction == "direction-5"
        assert planted.cosine.value < -0.95
        assert planted.cosine.low <= planted.cosine.value + 0.05
        assert planted.cosine.high < -0.8
        assert set(planted.p.values()) == {0.01}
        assert all(abs(other.cosine.value) < 0.6 and p > 0.01 for p in other.p.values())
        assert all(0.1 < chance < 0.7 for chance in planted.chance.values())
        turned = nearest_direction(directions, planted)
        assert torch.cosine_similarity(turned.at(layer), raw[0, layer - 3], dim=0) > 0.95
    assert len(found.to_dataframe()) == 4
    found.save(tmp_path / "matches.json")
    assert DirectionMatches.load(tmp_path / "matches.json").rows == found.rows
    with pytest.raises(LensteerError, match="no match of 'doubt' at layer 3"):
        found.at("doubt", 3)
    with pytest.raises(LensteerError, match="no random controls"):
        match_directions(directions, dataclasses.replace(vectors, controls=None))
    with pytest.raises(LensteerError, match="directions of width 4 and vectors of width 64"):
        match_directions(dataclasses.replace(directions, raw=directions.raw[..., :4]), vectors)

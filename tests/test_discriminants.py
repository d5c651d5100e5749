"""Fisher's discriminant, whitening and components of spans: planted normals, beside differences that miss them."""

from __future__ import annotations

import random

import pytest
import torch
from sklearn.covariance import ledoit_wolf

from lensteer.behaviors import STEERED
from lensteer.errors import LensteerError
from lensteer.vectors import Recipe, fit_vectors
from lensteer.vectors.components import component_normals
from lensteer.vectors.constructions import mean_gaps
from lensteer.vectors.discriminants import discriminants, shrunk_correlations, whitened_differences
from lensteer.vectors.kept import NORMALS, KeptFits
from reference import kept_activations, slow_discriminant, slow_shrunk_covariance, window_positions
from test_activations import make_trace
from test_directions import D_MODEL, LABELS, N_LAYERS, collect, every_result, plant
from test_probes import cosine, two_classes

KEPT = tuple(NORMALS)


def fits(features, recipe, **options) -> KeptFits:
    made = KeptFits(recipe, LABELS, N_LAYERS, D_MODEL, **options)
    for each in features:
        made.add(each)
    return made


def against_rest(labels, n_behaviors=2, base=None):
    """Weights of spans in the positive and the negative mean of every behavior."""
    own = torch.nn.functional.one_hot(labels, n_behaviors).T.double() * (1 if base is None else base)
    return torch.stack([own, own.sum(0) - own])


# --- the directions -------------------------------------------------------------------------------


def test_the_discriminant_is_the_best_normal_where_the_difference_of_means_is_not():
    x, labels, delta, best = two_classes(20_000)
    weights = against_rest(labels)
    found = {name: of(x, weights)[1] for name, of in NORMALS.items()}
    assert cosine(mean_gaps(x, weights)[1], best) < 0.8
    assert cosine(found["lda"], best) > 0.99
    assert cosine(delta, best) < cosine(found["whitened"], best) < cosine(found["lda"], best)
    assert abs(cosine(found["pca"], best)) < 0.8  # the largest variance is elsewhere

    # The classes overlap less along the discriminant than along the difference.
    def separation(normal):
        along = x @ normal
        return (along[labels == 1].mean() - along[labels == 0].mean()) / along[labels == 1].std()

    assert separation(found["lda"]) > 1.2 * separation(delta)


def test_with_equal_noise_in_all_directions_they_are_the_difference():
    generator = torch.Generator().manual_seed(0)
    labels = torch.arange(20_000) % 2
    delta = torch.randn(D_MODEL, generator=generator, dtype=torch.float64)
    x = 0.3 * torch.randn(len(labels), D_MODEL, generator=generator, dtype=torch.float64) + labels[:, None] * delta
    for name in ("lda", "whitened", "pca"):  # a probe's penalty applies after standardization
        normal = NORMALS[name](x, against_rest(labels))[1]
        assert abs(cosine(normal, delta)) > 0.98, name


def test_the_inverse_covariance_of_all_spans_gives_the_discriminant_of_two_classes():
    x, labels, *_ = two_classes(20_000)
    gap = mean_gaps(x, against_rest(labels))
    parallel = torch.linalg.solve(torch.cov(x.T), gap[1])
    assert cosine(discriminants(x, against_rest(labels))[1], parallel) > 0.9999
    assert cosine(whitened_differences(x, against_rest(labels))[1], parallel) < 0.99


@pytest.mark.parametrize("weighting", ["even", "uneven"])
def test_the_discriminant_against_the_slow_one(weighting):
    generator = torch.Generator().manual_seed(3)
    labels = torch.randint(0, 3, (40,), generator=generator)
    mix = torch.randn(5, 5, generator=generator, dtype=torch.float64)
    x = torch.randn(40, 5, generator=generator, dtype=torch.float64) @ mix + labels[:, None] + 10
    base = torch.ones(40) if weighting == "even" else 0.5 + torch.rand(40, generator=generator)
    weights = against_rest(labels, 3, base.double())
    normals = discriminants(x, weights)
    for b in range(3):
        expected = slow_discriminant(x, labels.tolist(), b, base.double())
        unit = normals[b] / normals[b].norm()
        torch.testing.assert_close(unit * (unit @ mean_gaps(x, weights)[b]), expected)
    # ZCA: whitened activations have the identity as their covariance, and the map is symmetric.
    omega = base.double() / base.double().sum()
    centered = x - omega @ x
    covariance = slow_shrunk_covariance(centered, omega)
    values, vectors = torch.linalg.eigh(covariance)
    root = vectors @ torch.diag(values.rsqrt()) @ vectors.T
    torch.testing.assert_close(root @ covariance @ root, torch.eye(5, dtype=torch.float64))
    torch.testing.assert_close(whitened_differences(x, weights), mean_gaps(x, weights) @ root)


def test_the_shrinkage_is_scikit_learns_after_standardization_and_helps_with_few_spans():
    x, labels, _, best = two_classes(20)
    centered = x - x.mean(0)
    correlations, deviations = shrunk_correlations(x, x.mean(0), torch.ones(20).double())
    expected, shrinkage = ledoit_wolf((centered / centered.square().mean(0).sqrt()).numpy(), assume_centered=True)
    assert shrinkage > 0.01
    torch.testing.assert_close(correlations, torch.as_tensor(expected))
    torch.testing.assert_close(deviations, centered.std(0, correction=0))
    halves = [x[labels == side] for side in (0, 1)]
    within = sum(torch.cov(half.T, correction=0) for half in halves) / 2
    plain = torch.linalg.solve(within, halves[1].mean(0) - halves[0].mean(0))
    shrunk = discriminants(x, against_rest(labels))[1]
    wide = torch.randn(20, 64, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert discriminants(wide, against_rest(labels)).isfinite().all()  # fewer spans than entries
    assert plain.isfinite().all()
    assert shrunk.isfinite().all()
    assert cosine(best, shrunk) > 0


def test_a_massive_entry_takes_no_part_and_a_constant_one_has_no_weight():
    x, labels, _, best = two_classes(20_000)
    massive = x.clone()
    massive[:, 0] *= 1000
    weights = against_rest(labels)
    scale = torch.ones(D_MODEL).double()
    scale[0] = 1000
    assert cosine(discriminants(massive, weights)[1] * scale, best) > 0.99
    still = x.clone()
    still[:, 3] = 5.0
    for name in ("lda", "whitened"):
        assert NORMALS[name](still, weights)[1, 3].abs() < 1e-12, name


@pytest.mark.parametrize("name", KEPT)
def test_a_behavior_without_spans_has_no_direction(name):
    x, labels, *_ = two_classes(60)
    found = NORMALS[name](x, against_rest(labels, 3))
    assert found[2].isnan().all()
    assert found[:2].isfinite().all()
    alone = NORMALS[name](x, against_rest(torch.zeros(60, dtype=torch.long), 1))
    assert alone.isnan().all()  # nothing to compare with


def test_a_component_is_the_largest_second_moment_about_the_others():
    generator = torch.Generator().manual_seed(2)
    labels = torch.arange(300) % 3
    x = torch.randn(300, 4, generator=generator, dtype=torch.float64) + 2 * torch.eye(4).double()[labels]
    weights = against_rest(labels, 3)
    for b in range(3):
        rows = x[labels == b] - x[labels != b].mean(0)
        expected = torch.linalg.svd(rows).Vh[0]
        assert abs(cosine(component_normals(x, weights)[b], expected)) == pytest.approx(1)


# --- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token", "span", "trace"])
@pytest.mark.parametrize("negatives", ["spans", "rest", "same_trace"])
@pytest.mark.parametrize("construction", ["lda", "whitened", "pca"])
def test_planted_directions_are_recovered_and_shuffles_lose_them(construction, negatives, aggregation):
    found = fits(plant(), Recipe("onset", negatives, aggregation, construction), n_controls=3)
    vectors, linear = found.difference(), collect(plant(), Recipe("onset", "rest", aggregation)).difference()
    for b in range(3):
        assert torch.all(vectors[b].argmax(-1) == b)
    if negatives != "same_trace":  # a projection of the difference of means
        along = (vectors * linear).sum(-1) / vectors.norm(dim=-1)
        torch.testing.assert_close(vectors.norm(dim=-1), along, rtol=1e-4, atol=1e-4)
    own = found.shuffled()[:, [0, 1, 2], :, [0, 1, 2]]
    assert own.abs().max() < 0.5 * vectors[[0, 1, 2], :, [0, 1, 2]].min()


@pytest.mark.parametrize("construction", ["lda", "whitened", "pca"])
def test_halves_merge_to_the_whole(construction):
    recipe, features, options = (
        Recipe("onset", "rest", "trace", construction),
        plant(12, noise=1.0),
        dict(n_controls=2, n_bootstrap=2, seed=5),
    )
    whole = every_result(fits(features, recipe, **options))
    merged = fits(features[7:], recipe, **options)
    merged.merge(fits(features[:7][::-1], recipe, **options))
    for name, value in every_result(merged).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-6, atol=1e-8, equal_nan=True, msg=name)


def test_constructions_of_a_models_activations(tiny_model):
    model = tiny_model()
    rng = random.Random(0)
    traces = [make_trace(rng, number) for number in range(6)]
    rows, labels = [], []
    for trace in traces:
        acts = kept_activations(model, trace)
        for span in trace.spans:
            rows.append(acts[:, window_positions(span, "onset", len(trace.ids))].mean(1))
            labels.append(span.label)
    vectors = fit_vectors(model, traces, window="onset", construction="lda", layers=[1, 2])
    assert vectors.provenance["versions"].keys() >= {"scikit-learn"}
    for b in vectors.labels:
        for layer in vectors.layers:
            expected = slow_discriminant(torch.stack(rows)[:, layer], labels, b).float()
            torch.testing.assert_close(vectors[b].at(layer), expected, rtol=2e-3, atol=2e-4 * float(expected.norm()))
    assert set(vectors.labels) & set(STEERED)
    assert str(vectors.recipe) == "onset − spans per span, lda"


def test_what_cannot_be_compared_is_an_error():
    for name in KEPT:
        with pytest.raises(LensteerError, match=f"construction '{name}' tells spans from spans"):
            Recipe("onset", "all", "span", name)
    with pytest.raises(LensteerError, match="unknown construction 'fisher': choose one of 'difference', 'logistic'"):
        Recipe("onset", "spans", "span", "fisher")

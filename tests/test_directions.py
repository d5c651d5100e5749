"""Difference of means and its control vectors on synthetic features whose answer is planted."""

from __future__ import annotations

import pytest
import torch

from lensteer.activations import TraceFeatures
from lensteer.errors import LensteerError
from lensteer.statistics import trace_generator
from lensteer.vectors.constructions import AGGREGATIONS, NEGATIVES, ContrastSums, Recipe, contrast_weights, isotropic
from lensteer.vectors.kept import KeptFits

LABELS = ("deduction", "uncertainty-estimation", "backtracking")
N_LAYERS, D_MODEL = 2, 6


def plant(n_traces=60, *, effect=1.0, noise=0.1, confound=0.0, seed=0) -> list[TraceFeatures]:
    """Features in which label `b` adds `effect` to coordinate `b` of every layer.

    Traces rich in backtracking also lie `confound` along coordinate 5, whatever the span: a property of the trace.
    """
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape):
        return torch.randn(*shape, generator=generator)

    made = []
    for number in range(n_traces):
        rich = number % 2
        chances = torch.tensor([3.0, 2.0, 5.0 if rich else 1.0])
        n_spans = int(torch.randint(4, 12, (), generator=generator))
        labels = torch.multinomial(chances, n_spans, replacement=True, generator=generator)
        spans = noise * randn(n_spans, N_LAYERS, D_MODEL)
        spans[torch.arange(n_spans), :, labels] += effect
        spans[:, :, 5] += confound * rich
        spans += 10  # a mean that any difference must lose
        made.append(
            TraceFeatures(
                index=number,
                key=f"trace-{number}",
                labels=tuple(LABELS[i] for i in labels),
                layers=tuple(range(N_LAYERS)),
                spans=spans[None],
                lengths=torch.randint(1, 9, (1, n_spans), generator=generator),
                tokens=spans.mean(0) + noise * randn(N_LAYERS, D_MODEL),
                n_tokens=int(torch.randint(20, 90, (), generator=generator)),
            )
        )
    return made


def collect(features, recipe=None, **options) -> ContrastSums:
    sums = ContrastSums(recipe or Recipe(), LABELS, N_LAYERS, D_MODEL, **options)
    for each in features:
        sums.add(each)
    return sums


def every_result(sums: ContrastSums | KeptFits) -> dict[str, torch.Tensor]:
    return dict(
        difference=sums.difference(),
        shuffled=sums.shuffled(),
        replicates=sums.replicates(),
        covariance_matched=sums.covariance_matched(),
        all_tokens=sums.all_tokens(),
        counts=sums.counts,
    )


# --- the difference -------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", AGGREGATIONS)
@pytest.mark.parametrize("negatives", ["rest", "spans", "all"])
def test_a_planted_direction_is_recovered(negatives, aggregation):
    recipe = Recipe("onset", negatives, aggregation)
    difference = collect(plant(), recipe).difference()
    for b in range(len(LABELS)):
        planted = torch.zeros(N_LAYERS, D_MODEL, dtype=torch.float64)
        planted[:, b] = 1
        others = [i for i in range(3) if i != b]
        assert torch.all(difference[b].argmax(dim=-1) == b)
        torch.testing.assert_close(difference[b, :, 3:], planted[:, 3:], atol=0.1, rtol=0)
        assert torch.all(difference[b][:, others] < 0)


def test_a_property_of_the_trace_is_removed_by_the_same_trace_only():
    features = plant(200, confound=2.0)
    leak = {n: collect(features, Recipe("onset", n, "span")).difference()[2, :, 5].abs() for n in NEGATIVES}
    assert leak["same_trace"].max() < 0.05
    for negatives in ("spans", "rest", "all"):
        assert leak[negatives].min() > 0.3, negatives


def test_weights_of_one_trace_by_hand():
    labels, lengths = torch.tensor([[0, 1, 1]]), torch.tensor([2.0, 3.0, 5.0])

    def weights(negatives, aggregation):
        recipe = Recipe("span", negatives, aggregation)
        return contrast_weights(labels, lengths.double(), 40, 2, recipe)[0].tolist()

    assert weights("spans", "span") == [
        [[1, 0, 0, 0], [0, 1, 1, 0]],
        [[1, 1, 1, 0], [1, 1, 1, 0]],
    ]
    assert weights("rest", "token") == [
        [[2, 0, 0, 0], [0, 3, 5, 0]],
        [[0, 3, 5, 0], [2, 0, 0, 0]],
    ]
    assert weights("all", "token")[1] == [[0, 0, 0, 40], [0, 0, 0, 40]]
    assert weights("all", "span")[1] == weights("all", "trace")[1] == [[0, 0, 0, 1], [0, 0, 0, 1]]
    assert weights("rest", "trace")[1] == [[0, 0.5, 0.5, 0], [1, 0, 0, 0]]
    assert weights("same_trace", "span")[1] == [
        pytest.approx([1 / 3, 1 / 3, 1 / 3, 0]),
        pytest.approx([2 / 3, 2 / 3, 2 / 3, 0]),
    ]
    assert weights("same_trace", "token")[1][1] == pytest.approx([8 * 0.2, 8 * 0.3, 8 * 0.5, 0])


def test_a_behavior_without_spans_is_nan_and_the_others_are_not():
    features = [f for f in plant(30) if "backtracking" not in f.labels]
    assert len(features) > 3
    sums = collect(features, n_bootstrap=2)
    assert sums.counts[2] == 0
    assert sums.difference()[2].isnan().all()
    assert sums.difference()[:2].isfinite().all()


# --- merging --------------------------------------------------------------------------------------


@pytest.mark.parametrize("negatives", NEGATIVES)
def test_halves_merge_to_the_whole_whatever_the_order(negatives):
    features, recipe = plant(20), Recipe("onset", negatives, "trace")
    options = dict(n_controls=3, n_bootstrap=4, seed=5)
    whole = every_result(collect(features, recipe, **options))
    merged = collect(features[13:], recipe, **options)
    merged.merge(collect(features[:13][::-1], recipe, **options))
    assert merged.n_traces == 20
    for name, value in every_result(merged).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-10, atol=1e-10, equal_nan=True, msg=name)


def test_sums_of_another_kind_do_not_merge():
    features = plant(3)
    for options, name in [(dict(seed=1), "seed"), (dict(n_controls=2), "n_controls")]:
        with pytest.raises(LensteerError, match=f"cannot merge sums with {name}"):
            collect(features).merge(collect(features, **options))
    with pytest.raises(LensteerError, match="cannot merge sums with recipe"):
        collect(features).merge(collect(features, Recipe("span")))


# --- control vectors, each beside what it is a null of ------------------------------------------------------


def test_shuffled_labels_lose_the_behavior_and_keep_the_trace():
    sums = collect(plant(200, confound=2.0), n_controls=20)
    truth, shuffled = sums.difference(), sums.shuffled()
    assert shuffled.shape == (20, 3, N_LAYERS, D_MODEL)
    assert not torch.equal(shuffled[0], shuffled[1])
    own = shuffled[:, [0, 1, 2], :, [0, 1, 2]]  # each behavior's own coordinate
    assert own.abs().max() < 0.5 * truth[[0, 1, 2], :, [0, 1, 2]].min()
    # Labels move within a trace only, so that backtracking still comes from traces rich in it.
    assert torch.all((shuffled[:, 2, :, 5] - truth[2, :, 5]).abs() < 0.1)


def test_shuffles_are_as_noisy_as_the_vectors_they_stand_for():
    null = collect(plant(100, effect=0.0, noise=1.0), n_controls=40)
    ratio = null.shuffled().norm(dim=-1).mean(0) / null.difference().norm(dim=-1)
    assert 0.5 < ratio.min() < ratio.max() < 2


def test_covariance_matched_controls_have_the_covariance_of_the_spans():
    features = plant(40, noise=0.5)
    n = 4000
    controls = collect(features, n_controls=n).covariance_matched()
    spans = torch.cat([f.spans[0] for f in features]).double()
    for layer in range(N_LAYERS):
        truth, found = torch.cov(spans[:, layer].T), controls[:, layer].T @ controls[:, layer] / n
        error = ((truth.diagonal()[:, None] * truth.diagonal() + truth**2) / n).sqrt()  # Gaussian vectors'
        # 21 entries a layer: the largest of 42 is beyond 4.5 standard errors in 3 of 10,000 draws.
        assert ((found - truth).abs() < 4.5 * error).all()
        assert not ((torch.eye(D_MODEL) * truth.trace() / D_MODEL - truth).abs() < 4.5 * error).all()
        assert controls[:, layer].mean(0).norm() < 5 * (truth.trace() / n).sqrt()


def test_isotropic_controls_are_uniform_directions():
    draws = isotropic(3000, 2, 8, seed=3)
    torch.testing.assert_close(draws.norm(dim=-1), torch.ones(3000, 2, dtype=torch.float64))
    second = torch.einsum("nli,nlj->lij", draws, draws) / 3000
    assert (second - torch.eye(8) / 8).abs().max() < 0.02
    assert (draws[:, 0] * draws[:, 1]).sum(-1).mean().abs() < 0.04
    assert torch.equal(draws, isotropic(3000, 2, 8, seed=3))
    assert not torch.equal(draws, isotropic(3000, 2, 8, seed=4))


def test_replicates_spread_as_fresh_samples_do():
    options = dict(effect=1.0, noise=1.0)
    bootstrap = collect(plant(40, **options), n_bootstrap=300).replicates()[:, 2].std(0)
    fresh = torch.stack([collect(plant(40, seed=s, **options)).difference()[2] for s in range(1, 31)])
    ratio = bootstrap / fresh.std(0)  # of standard deviations, each known to about 13 %
    assert 0.75 < ratio.mean() < 1.3
    assert 0.5 < ratio.min() < ratio.max() < 1.8


def test_a_replicate_is_the_fit_on_its_resampled_traces():
    features = plant(6)
    replicate = collect(features, n_bootstrap=1).replicates()[0]
    times = [
        int(torch.poisson(torch.ones(1, dtype=torch.float64), generator=trace_generator(0, "bootstrap", f.key)))
        for f in features
    ]
    assert len(set(times)) > 1
    again = collect([f for f, n in zip(features, times, strict=True) for _ in range(n)])
    torch.testing.assert_close(replicate, again.difference())


# --- options --------------------------------------------------------------------------------------


def test_unknown_options_list_the_choices():
    with pytest.raises(LensteerError, match="unknown negatives 'everything': choose one of 'all', 'spans'"):
        Recipe("onset", "everything")
    with pytest.raises(LensteerError, match="unknown aggregation 'task': choose one of 'token', 'span', 'trace'"):
        Recipe("onset", "spans", "task")
    with pytest.raises(LensteerError, match="unknown window"):
        Recipe("first")
    assert Recipe("onset+-2") == Recipe("onset±2")
    with pytest.raises(LensteerError, match="unknown behavior 'backtracking': choose one of 'deduction'"):
        ContrastSums(Recipe(), ["deduction"], N_LAYERS, D_MODEL).add(
            next(f for f in plant(9) if f.labels[0] == "backtracking")
        )

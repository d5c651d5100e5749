"""Logistic probes: the planted normal, what they share with differences of means, and accuracy that cannot leak."""

from __future__ import annotations

import random
from dataclasses import replace

import numpy as np
import pytest
import torch

from lensteer.behaviors import STEERED
from lensteer.errors import LensteerError
from lensteer.statistics import trace_generator
from lensteer.tasks import Task
from lensteer.vectors import Recipe, fit_vectors, probe_accuracy, probes
from lensteer.vectors.kept import KeptFits
from lensteer.vectors.probes import cross_validated, fit_probe
from reference import kept_activations
from test_activations import make_trace
from test_directions import D_MODEL, LABELS, N_LAYERS, collect, every_result, plant

LOGISTIC = Recipe("onset", "rest", "span", "logistic")


def fits(features, recipe=LOGISTIC, **options) -> KeptFits:
    made = KeptFits(recipe, LABELS, N_LAYERS, D_MODEL, **options)
    for each in features:
        made.add(each)
    return made


def two_classes(n, seed=0):
    """Gaussian classes of one covariance, far from round: the best normal is Σ⁻¹δ, and not the difference δ."""
    generator = torch.Generator().manual_seed(seed)
    mix = torch.randn(D_MODEL, D_MODEL, generator=generator, dtype=torch.float64)
    mix[:, 0] *= 4
    labels = torch.arange(n) % 2
    delta = torch.randn(D_MODEL, generator=generator, dtype=torch.float64)
    x = torch.randn(n, D_MODEL, generator=generator, dtype=torch.float64) @ mix.T + labels[:, None] * delta + 7
    return x, labels, delta, torch.linalg.solve(mix @ mix.T, delta)


def cosine(a, b):
    return float(torch.cosine_similarity(a.double(), b.double(), 0))


# --- one probe ------------------------------------------------------------------------------------


def test_the_normal_is_the_best_one_and_its_length_the_log_odds(monkeypatch):
    monkeypatch.setattr(probes, "PENALTY", 1e-6)
    x, labels, delta, best = two_classes(20_000)
    probe = fit_probe(x, (labels == 1).double(), (labels == 0).double())
    assert cosine(probe.weights, best) > 0.99
    assert cosine(delta, best) < 0.8
    # For Gaussian classes the log-odds are linear, with slope Σ⁻¹δ: not only the direction is known.
    torch.testing.assert_close(probe.weights, best, rtol=0.1, atol=0.05 * float(best.norm()))
    swapped = fit_probe(x, (labels == 0).double(), (labels == 1).double())
    torch.testing.assert_close(swapped.weights, -probe.weights, rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("weighting", ["even", "uneven"])
def test_the_fit_minimizes_what_it_says(weighting):
    x, labels, *_ = two_classes(300, seed=1)
    generator = torch.Generator().manual_seed(2)
    base = torch.ones(300) if weighting == "even" else torch.rand(300, generator=generator)
    positive, negative = base.double() * (labels == 1), base.double() * (labels == 0)
    probe = fit_probe(x, positive, negative)
    omega = positive / positive.sum() / 2 + negative / negative.sum() / 2
    mean = (omega[:, None] * x).sum(0)
    sigma = ((omega[:, None] * (x - mean) ** 2).sum(0)).sqrt()
    # Newton's method on the written-out loss.
    w = torch.zeros(D_MODEL + 1, dtype=torch.float64, requires_grad=True)
    z = torch.cat([(x - mean) / sigma, torch.ones(300, 1, dtype=torch.float64)], 1)
    y = 2.0 * labels.double() - 1

    def loss(w):
        return (omega * torch.log1p(torch.exp(-y * (z @ w)))).sum() + probes.PENALTY / 2 * (w[:-1] ** 2).sum()

    for _ in range(20):
        gradient = torch.autograd.functional.jacobian(loss, w)
        w = w - torch.linalg.solve(torch.autograd.functional.hessian(loss, w), gradient)
    torch.testing.assert_close(probe.weights, w[:-1] / sigma, rtol=1e-3, atol=1e-5)
    odds, expected = x @ probe.weights + probe.bias, z @ w
    torch.testing.assert_close(odds, expected, rtol=1e-3, atol=1e-3)


def test_an_empty_class_has_no_probe_and_a_constant_entry_no_weight():
    x, labels, *_ = two_classes(50)
    nobody, everyone = torch.zeros(50).double(), torch.ones(50).double()
    assert fit_probe(x, nobody, everyone) is None
    assert fit_probe(x, everyone, nobody) is None
    x[:, 3] = 5.0
    probe = fit_probe(x, (labels == 1).double(), (labels == 0).double())
    assert probe.weights[3] == 0
    assert probe.weights.isfinite().all()


# --- vectors --------------------------------------------------------------------------------------


@pytest.mark.parametrize("aggregation", ["token", "span", "trace"])
@pytest.mark.parametrize("negatives", ["spans", "rest", "same_trace"])
def test_planted_directions_are_recovered_and_point_to_the_behavior(negatives, aggregation):
    vectors = fits(plant(), Recipe("onset", negatives, aggregation, "logistic")).difference()
    for b in range(3):
        assert torch.all(vectors[b].argmax(-1) == b)
        others = [i for i in range(3) if i != b]
        assert torch.all(vectors[b][:, others] < 0)


@pytest.mark.parametrize("aggregation", ["token", "span", "trace"])
def test_vectors_are_as_long_as_the_gap_of_the_means_along_them(aggregation):
    features = plant(noise=1.0)
    vectors = fits(features, Recipe("onset", "rest", aggregation, "logistic")).difference()
    differences = collect(features, Recipe("onset", "rest", aggregation)).difference()
    along = (vectors * differences).sum(-1) / vectors.norm(dim=-1)
    torch.testing.assert_close(vectors.norm(dim=-1), along)
    assert torch.all(along > 0)
    assert not torch.allclose(vectors, differences, rtol=0.05)


def test_spans_and_rest_are_the_same_to_a_probe():
    features = plant(20, noise=1.0)
    first, second = (fits(features, replace(LOGISTIC, negatives=n)).difference() for n in ("spans", "rest"))
    assert torch.equal(first, second)


def test_a_property_of_the_trace_is_left_out_by_the_same_trace_only():
    features = plant(200, noise=1.0, confound=1.0)
    leak = {
        n: fits(features, replace(LOGISTIC, negatives=n)).difference()[2, :, 5].abs().max()
        for n in ("rest", "same_trace")
    }
    assert leak["same_trace"] < 0.1 < 0.2 < leak["rest"]


def test_halves_merge_to_the_whole():
    features, options = plant(12, noise=1.0), dict(n_controls=2, n_bootstrap=2, seed=5)
    whole = every_result(fits(features, **options))
    merged = fits(features[7:], **options)
    merged.merge(fits(features[:7][::-1], **options))
    for name, value in every_result(merged).items():
        torch.testing.assert_close(value, whole[name], rtol=1e-4, atol=1e-5, equal_nan=True, msg=name)
    for other, name in [
        (fits(features, Recipe("onset", "same_trace", "span", "logistic"), **options), "fits with recipe"),
        (fits(features, n_controls=2, n_bootstrap=3, seed=5), "fits with n_bootstrap"),
        (fits(features, n_controls=2, n_bootstrap=2, seed=6), "sums with seed"),
    ]:
        with pytest.raises(LensteerError, match=f"cannot merge {name}"):
            merged.merge(other)


def test_controls_are_those_of_the_difference_and_shuffles_lose_the_behavior():
    features, options = plant(60), dict(n_controls=5, seed=2)
    found, linear = fits(features, **options), collect(features, **options)
    assert torch.equal(found.covariance_matched(), linear.covariance_matched())
    assert torch.equal(found.all_tokens(), linear.all_tokens())
    assert torch.equal(found.counts, linear.counts)
    own = found.shuffled()[:, [0, 1, 2], :, [0, 1, 2]]
    assert own.abs().max() < 0.5 * found.difference()[[0, 1, 2], :, [0, 1, 2]].min()


def test_a_replicate_is_the_fit_on_its_resampled_traces():
    features = plant(8, noise=1.0)
    replicate = fits(features, n_bootstrap=1).replicates()[0]
    times = [
        int(torch.poisson(torch.ones(1, dtype=torch.float64), generator=trace_generator(0, "bootstrap", f.key)))
        for f in features
    ]
    assert len(set(times)) > 1
    again = fits([f for f, n in zip(features, times, strict=True) for _ in range(n)])
    torch.testing.assert_close(replicate, again.difference(), rtol=1e-3, atol=1e-4)


def test_no_spans_no_vectors_but_nan():
    assert fits([]).difference().isnan().all()
    bare = fits([f for f in plant(30) if "backtracking" not in f.labels])
    assert bare.difference()[2].isnan().all()
    assert bare.difference()[:2].isfinite().all()


def test_what_does_not_fit_is_refused_before_and_on_the_way(monkeypatch, tiny_model):
    with pytest.raises(LensteerError, match=r"100000 spans × 28 layers × d_model 1536 take 19.5 GiB, more than 4.0"):
        probes.check_memory(100_000, 28, 1536)
    features = plant(3)
    monkeypatch.setattr(probes, "MAX_BYTES", D_MODEL * (4 * N_LAYERS + 24) * (len(features[0].labels) + 1))
    with pytest.raises(LensteerError, match="the features of all spans are kept"):
        fits(features)
    rng = random.Random(0)
    traces = [make_trace(rng, i) for i in range(6)]
    for attempt in (
        lambda: fit_vectors(tiny_model("qwen2"), traces, construction="logistic"),
        lambda: probe_accuracy(tiny_model("qwen2"), traces, n_folds=2),
    ):
        with pytest.raises(
            LensteerError, match=r"30 spans × 4 layers × d_model 32 take .* give fewer layers at a time"
        ):
            attempt()


def test_a_probe_against_all_tokens_is_refused():
    with pytest.raises(
        LensteerError, match="construction 'logistic' tells spans from spans, and negatives 'all' are means"
    ):
        Recipe("onset", "all", "span", "logistic")
    with pytest.raises(LensteerError, match="unknown construction 'svm': choose one of 'difference', 'logistic'"):
        Recipe("onset", "rest", "span", "svm")
    assert str(Recipe()) == "onset±3 − spans per span"
    assert str(LOGISTIC) == "onset − rest per span, logistic"


# --- accuracy -------------------------------------------------------------------------------------


def balanced(odds, labels, b):
    called, own = odds > 0, labels == b
    return float(called[own].double().mean() + (~called[~own]).double().mean()) / 2


def stacked(features):
    x = torch.cat([f.spans[0] for f in features])
    labels = torch.tensor([LABELS.index(label) for f in features for label in f.labels])
    groups = torch.tensor([f.index for f in features for _ in f.labels])
    return x, labels, groups


def test_what_can_be_read_is_read():
    x, labels, groups = stacked(plant(40, noise=0.2))
    odds = cross_validated(x, labels, groups, 3)
    assert min(balanced(odds[b, i], labels, b) for b in range(3) for i in range(N_LAYERS)) > 0.95


def test_nothing_leaks_between_spans_of_one_trace():
    """Labels are drawn once per trace, and a trace is known by its activations: what tells them apart is the trace."""
    generator = torch.Generator().manual_seed(0)
    n_traces, n_spans = 240, 6
    home = torch.randn(n_traces, 1, 1, 32, generator=generator)
    x = (home + 0.1 * torch.randn(n_traces, n_spans, 1, 32, generator=generator)).flatten(0, 1)
    labels = torch.randint(2, (n_traces, 1), generator=generator).expand(-1, n_spans).flatten()
    groups = torch.arange(n_traces).repeat_interleave(n_spans)
    honest = balanced(cross_validated(x, labels, groups, 2)[1, 0], labels, 1)
    leaky = balanced(cross_validated(x, labels, torch.arange(len(x)) % 7, 2)[1, 0], labels, 1)
    assert abs(honest - 0.5) < 3.3 * 0.5 / n_traces**0.5
    assert leaky > 0.5 + 4 * 0.5 / n_traces**0.5


def test_a_behavior_of_one_trace_cannot_be_cross_validated():
    x, labels, groups = stacked(plant(10))
    labels = torch.where((labels == 2) & (groups != 4), 0, labels)
    labels[(groups == 4).nonzero()[0]] = 2
    odds = cross_validated(x, labels, groups, 3, n_folds=3)
    assert odds[2].isnan().any()
    assert odds[:2].isfinite().all()
    for n_folds in (1, 11):
        with pytest.raises(LensteerError, match=f"n_folds={n_folds} for spans of 10 tasks: give 2 or more"):
            cross_validated(x, labels, groups, 3, n_folds=n_folds)


@pytest.fixture(scope="module")
def labeled():
    rng = random.Random(4)
    return [make_trace(rng, i, n_spans=8) for i in range(12)]


def test_accuracy_is_the_slow_oracles(tiny_model, labeled):
    from sklearn.linear_model import LogisticRegression
    from sklearn.metrics import balanced_accuracy_score
    from sklearn.model_selection import GroupKFold
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    model = tiny_model("qwen2")
    found = probe_accuracy(model, labeled, layers=[2, 0], behaviors=STEERED, n_folds=3, batch_size=5)
    kept = [kept_activations(model, trace) for trace in labeled]
    rows = [
        (trace.task.id, span.label, acts[:, span.start - 1])
        for trace, acts in zip(labeled, kept, strict=True)
        for span in trace.spans
    ]
    names = np.array([name for _, name, _ in rows])
    agreed = 0
    for i, layer in enumerate((2, 0)):
        x = torch.stack([acts[layer] for *_, acts in rows]).numpy()
        for b, label in enumerate(STEERED):
            called = np.zeros(len(x), dtype=bool)
            for train, test in GroupKFold(3).split(x, groups=[task for task, *_ in rows]):
                own = names[train] == label
                weight = np.where(own, 0.5 / own.sum(), 0.5 / (~own).sum())
                classifier = make_pipeline(StandardScaler(), LogisticRegression(C=1 / probes.PENALTY, tol=1e-6))
                classifier.fit(
                    x[train], own, logisticregression__sample_weight=weight, standardscaler__sample_weight=weight
                )
                called[test] = classifier.predict(x[test])
            truth = balanced_accuracy_score(names == label, called)
            agreed += abs(float(found.mean[b, i]) - truth) < 1e-9
            assert float(found.mean[b, i]) == pytest.approx(truth, abs=0.03)  # a span on the edge may fall either way
            assert found.low[b, i] < truth < found.high[b, i]
    assert agreed >= 6
    assert found.n_spans == tuple((names == label).sum() for label in STEERED)
    assert (found.labels, found.layers, found.n_tasks, found.n_folds) == (STEERED, (2, 0), 12, 3)
    frame = found.to_dataframe()
    row = frame[(frame.behavior == "backtracking") & (frame.layer == 0)].iloc[0]
    assert row["mean"] == float(found.mean[3, 1])
    assert row.n_spans == found.n_spans[3]


def test_two_chains_on_one_task_are_on_one_side(tiny_model):
    """The same chain as two samples: a probe that only identifies traces would have seen every held-out span."""
    rng = random.Random(1)
    traces = []
    for i in range(30):
        trace = make_trace(rng, i, labels=STEERED[:2], n_spans=6)
        traces += [trace, replace(trace, sample=1)]
    model = tiny_model("qwen2")
    honest = probe_accuracy(model, traces, behaviors=STEERED[:2], layers=[3])
    apart = [replace(t, task=Task(f"{t.task.id}/{t.sample}", "random", "train", "?")) for t in traces]
    leaky = probe_accuracy(model, apart, behaviors=STEERED[:2], layers=[3])
    assert float(leaky.mean[0, 0]) > float(honest.mean[0, 0]) + 0.1
    assert honest.n_tasks == 30
    assert honest.low[0, 0] < 0.5 < honest.high[0, 0]


def test_a_behavior_that_is_too_rare_has_no_accuracy(tiny_model, labeled):
    found = probe_accuracy(tiny_model("qwen2"), labeled, layers=[1], n_folds=3)
    assert found.mean[:2].isnan().all()  # the traces hold the steered behaviors only
    assert found.low[:2].isnan().all()
    assert found.mean[2:].isfinite().all()
    assert found.n_spans[:2] == (0, 0)


def test_what_cannot_be_probed_is_refused_by_name(tiny_model, labeled):
    model = tiny_model("qwen2")
    with pytest.raises(LensteerError, match="annotate the traces first"):
        probe_accuracy(model, [replace(t, spans=()) for t in labeled])
    with pytest.raises(LensteerError, match="n_folds=20 for spans of 12 tasks"):
        probe_accuracy(model, labeled, n_folds=20)
    with pytest.raises(LensteerError, match=r"unknown behavior .*: choose one of 'backtracking'"):
        probe_accuracy(model, labeled, behaviors=["backtracking"])
    with pytest.raises(LensteerError, match="no layer 9"):
        probe_accuracy(model, labeled, layers=[9])
    with pytest.raises(LensteerError, match="unknown window 'first'"):
        probe_accuracy(model, labeled, window="first")

"""Accumulators, per-trace seeds and the bootstrap, against plain loops and known sampling distributions."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch

from lensteer.errors import LensteerError
from lensteer.statistics import Ratio, WeightedSums, bootstrap_interval, holm, sign_flip_test, trace_generator


def test_weighted_sums_are_sums():
    generator = torch.Generator().manual_seed(0)
    weights, values = torch.randn(3, 7, generator=generator), torch.randn(7, 2, 5, generator=generator)
    sums = WeightedSums(3, 2, 5)
    sums.add(weights[:, :4], values[:4])
    sums.add(weights[:, 4:], values[4:])
    for row in range(3):
        total = sum(float(weights[row, i]) * values[i].double() for i in range(7))
        torch.testing.assert_close(sums.sums[row], total, rtol=1e-12, atol=1e-12)
        assert float(sums.mass[row]) == pytest.approx(float(weights[row].double().sum()), abs=1e-12)
        torch.testing.assert_close(sums.means()[row], total / sums.mass[row])


def test_sums_merge_and_keep_small_values_beside_large_ones():
    whole, halves = WeightedSums(1, 1, 1), [WeightedSums(1, 1, 1) for _ in range(2)]
    for i in range(1000):
        value = torch.full((1, 1, 1), 1e8 if i % 2 else -1e8) + (8.0 if i == 0 else 0)
        for sums in (whole, halves[i // 500]):
            sums.add(torch.ones(1, 1), value)
    halves[0].merge(halves[1])
    assert float(whole.sums) == float(halves[0].sums) == 8.0  # single precision would have lost it
    assert float(whole.mass) == float(halves[0].mass) == 1000


def test_sums_of_another_shape_do_not_merge():
    with pytest.raises(LensteerError, match=r"\(2, 3, 4\) into \(2, 3, 5\)"):
        WeightedSums(2, 3, 5).merge(WeightedSums(2, 3, 4))


def test_a_trace_has_its_own_random_numbers():
    draws = {
        (seed, purpose, key): tuple(torch.rand(3, generator=trace_generator(seed, purpose, key)).tolist())
        for seed in (0, 1)
        for purpose in ("shuffle", "bootstrap")
        for key in ("a", "b")
    }
    assert len(set(draws.values())) == 8
    again = tuple(torch.rand(3, generator=trace_generator(1, "shuffle", "b")).tolist())
    assert draws[1, "shuffle", "b"] == again


def test_interval_of_a_mean_is_that_of_theory():
    values = np.random.default_rng(0).normal(3, 2, size=400)
    interval = bootstrap_interval(values, n=4000)
    half = 1.96 * values.std() / np.sqrt(400)
    assert interval.value == pytest.approx(values.mean())
    assert interval.low == pytest.approx(values.mean() - half, abs=0.1 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.1 * half)
    assert interval.n == 400
    assert interval.n_left_out == 0


def test_intervals_cover_the_truth_as_often_as_they_say():
    rng = np.random.default_rng(1)
    hits = 0
    for _ in range(300):
        sizes = rng.integers(5, 30, size=60)
        hits_per_unit = rng.binomial(sizes, np.clip(rng.normal(0.3, 0.1, size=60), 0, 1))
        interval = bootstrap_interval(Ratio(hits_per_unit, sizes), n=300, level=0.9)
        hits += bool(interval.low <= 0.3 <= interval.high)
    assert 0.83 <= hits / 300 <= 0.96  # 0.9, four standard errors to either side, less a little for 60 units


def test_a_fraction_is_a_ratio_of_sums():
    interval = bootstrap_interval(Ratio(np.array([1, 0, 9]), np.array([2, 1, 10])))
    assert interval.value == pytest.approx(10 / 13)  # not the mean of 1/2, 0/1 and 9/10


def test_a_paired_difference_is_far_tighter_than_its_sides():
    rng = np.random.default_rng(2)
    task = rng.normal(0, 5, size=100)
    plain, steered = task + rng.normal(0, 0.1, 100), task + 0.2 + rng.normal(0, 0.1, 100)
    paired = bootstrap_interval(steered, plain)
    assert paired.value == pytest.approx((steered - plain).mean())
    assert paired.excludes()
    assert paired.high - paired.low < 0.1
    assert not bootstrap_interval(steered).excludes()
    null = bootstrap_interval(plain, plain)
    assert not null.excludes()
    assert null.low == null.high == 0


def test_columns_are_bootstrapped_together():
    values = np.random.default_rng(3).normal(size=(50, 4, 2))
    interval = bootstrap_interval(values, n=200, seed=7)
    assert np.shape(interval.low) == np.shape(interval.value) == (4, 2)
    one = bootstrap_interval(values[:, 3, 1], n=200, seed=7)
    assert np.asarray(interval.low)[3, 1] == pytest.approx(one.low)
    assert np.asarray(interval.high)[3, 1] == pytest.approx(one.high)


def test_resamples_without_weight_are_left_out_and_counted():
    weights = np.array([1, 0, 0, 0])
    interval = bootstrap_interval(Ratio(np.array([1.0, 0, 0, 0]), weights), n=1000)
    assert interval.n_left_out == pytest.approx(1000 * 0.75**4, abs=60)
    assert interval.low == interval.high == 1
    never = bootstrap_interval(Ratio(np.zeros(4), np.zeros(4)))
    assert never.n_left_out == 1000
    assert np.isnan([never.value, never.low, never.high]).all()


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: bootstrap_interval(np.ones(1)), "1 unit"),
        (lambda: bootstrap_interval(np.ones(3), np.ones(4)), "3 and 4 units"),
        (lambda: bootstrap_interval(np.array([1, np.nan])), "not finite"),
        (lambda: bootstrap_interval(np.ones(3), level=95.0), "level 95"),
        (lambda: bootstrap_interval(Ratio(np.ones(3), np.ones(2))), r"\(3,\) with weights of shape \(2,\)"),
    ],
)
def test_bad_input_is_named(call, message):
    with pytest.raises(LensteerError, match=message):
        call()


def test_sign_flips_agree_with_all_exchanges_counted_out():
    """Ten tasks: all 1024 exchanges, each difference of shares worked out anew."""
    rng = np.random.default_rng(3)
    n = rng.integers(5, 20, (2, 10))
    hits = rng.binomial(n, [[0.3], [0.15]])
    seen, as_far = None, 0
    for exchange in itertools.product((0, 1), repeat=10):
        rows = np.array(exchange)
        own = hits[rows, range(10)].sum() / n[rows, range(10)].sum()
        base = hits[1 - rows, range(10)].sum() / n[1 - rows, range(10)].sum()
        seen = abs(own - base) if seen is None else seen
        as_far += abs(own - base) >= seen - 1e-12
    found = sign_flip_test(Ratio(hits[0], n[0]), Ratio(hits[1], n[1]), n=20000)
    assert found == pytest.approx(as_far / 1024, abs=4 * (as_far / 1024 / 20000) ** 0.5)


def test_sign_flips_keep_their_level_where_events_are_rare():
    """0.8 % in both sides, 50 tasks: at .05 not more than 1 run in 20 beyond chance, where a bootstrap has more."""
    rng, finds = np.random.default_rng(0), 0
    for _ in range(200):
        n = rng.integers(20, 40, (2, 50))
        hits = rng.binomial(n, 0.008)
        finds += sign_flip_test(Ratio(hits[0], n[0]), Ratio(hits[1], n[1]), n=999) <= 0.05
    assert finds <= 21  # 200 x .05 and three standard deviations


def test_sign_flips_of_nothing_and_of_other_sizes():
    zeros, ones = Ratio(np.zeros(8), np.full(8, 9)), Ratio(np.ones(8), np.full(8, 9))
    assert sign_flip_test(zeros, zeros) == 1.0
    assert sign_flip_test(zeros, ones, n=9999) == pytest.approx(2 / 256, abs=0.004)
    with pytest.raises(LensteerError, match="8 and 7 units"):
        sign_flip_test(zeros, Ratio(np.ones(7)))


def test_holm_adjusts_from_the_smallest_on():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert holm([0.6, 0.9]) == [1.0, 1.0]
    assert holm([]) == []

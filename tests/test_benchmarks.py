"""Benchmarks run to the end on small inputs, and their figures are what their tables say."""

from __future__ import annotations

import pytest

from scripts import load


@pytest.mark.medium
def test_the_explorers_benchmark_measures_both_ways_alike():
    pytest.importorskip("anywidget")
    explorer = load("explorer", "benchmarks")
    found = explorer.main(explorer.Config(tokens=80, prompt=20, rounds=1))
    assert found["largest_difference"] < 1e-3
    assert (found["model"], found["middle"]) == ("organism", 4)
    assert all(value > 0 for name, value in found.items() if name.startswith("seconds."))
    rows = explorer.table(found).splitlines()
    assert [row.split()[:2] for row in rows[2:]] == [
        ["first,", "all"],
        ["middle,", "all"],
        ["middle,", "half"],
        ["last,", "all"],
    ]
    assert f"{found['seconds.effect.middle_half']:.3f}" in rows[4]

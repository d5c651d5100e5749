"""How stable vectors are: sums over chains against the library's own vectors, and planted directions."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import ModuleType

import pytest
import torch

import lensteer as ls
from lensteer.pipeline import Run
from scripts import load

ROOT = Path(__file__).resolve().parent.parent


def planted(analysis: ModuleType, n: int, noise: float):
    """Chains of four sentences, two of either label; those of "b" have 1 in the first of 16 dimensions."""
    generator, made = torch.Generator().manual_seed(0), []
    for i in range(n):
        labels = ("a", "b", "b", "a")
        spans = noise * torch.randn(1, 4, 1, 16, generator=generator)
        spans[0, [1, 2], 0, 0] += 1
        ones = torch.ones(1, 4, dtype=torch.long)
        made.append(analysis.TraceFeatures(i, str(i), labels, (0,), spans, ones, spans[0].mean(0), 4))
    return analysis.ChainSums.of(made, analysis.Recipe("onset"), ("a", "b"), {"b": 0}, 10, 0)


def test_a_planted_direction_needs_more_chains_the_more_noise_there_is():
    analysis = load("vector_stability")
    sizes = (3, 5, 10, 20, 40)
    (clear,), (noisy,) = (analysis.rows_of(planted(analysis, 60, x), {"b": 0}, sizes) for x in (0.2, 1.0))
    assert (clear.n_spans, clear.n_chains) == (120, 60)
    assert clear.needed.value <= noisy.needed.value
    assert noisy.needed.low <= noisy.needed.value <= noisy.needed.high
    assert clear.halves.value > noisy.halves.value > noisy.shuffled.high
    assert clear.p == 0
    assert clear.implied > clear.halves.value
    assert clear.own_part.value > 0.9
    assert [p.n for p in clear.curve] == [*sizes, 60]
    assert clear.curve[-1].cosine.value == pytest.approx(1)
    values = [p.cosine.value for p in noisy.curve]
    assert values == sorted(values)


def test_noise_without_a_direction_is_not_told_from_shuffled_labels():
    analysis = load("vector_stability")
    sums = planted(analysis, 40, 1.0)
    blank = analysis.ChainSums(sums.sums[:, 1:], sums.mass[:, 1:], sums.counts)  # the first shuffle as if it were own
    (row,) = analysis.rows_of(blank, {"b": 0}, (5, 20))
    assert row.p > 0.05
    assert abs(row.own_part.value) < 0.3


def test_where_a_curve_reaches_enough():
    analysis = load("vector_stability")
    assert analysis._reached([(5, 0.95), (10, 0.99)]) == 5
    assert analysis._reached([(10, 0.8), (40, 1.0)]) == pytest.approx(20)
    assert analysis._reached([(5, 0.95), (10, 0.8), (40, 1.0)]) == pytest.approx(20)  # for good
    assert analysis._reached([(5, math.nan), (10, 1.0)]) == 10
    assert math.isnan(analysis._reached([(5, 0.1), (10, 0.2)]))


@pytest.mark.medium
def test_sums_give_the_vectors_of_a_run_and_of_its_shuffled_labels(tmp_path, monkeypatch):
    analysis = load("vector_stability")
    config = analysis.smoke(analysis.Config(load("command").small_run(tmp_path / "run"), sizes=(5, 10)))
    result = analysis.main(config)
    run = Run.open(config.run)
    vectors = ls.BehaviorVectors.load(run.path("vectors.safetensors"))
    features = analysis.span_features(run, [4])
    sums = analysis.ChainSums.of(features, vectors.recipe, vectors.labels, {"backtracking": 4}, 2, run.config.seed)
    own, *shuffled = sums.vectors(torch.ones(1, len(features), dtype=torch.float64))[0, :, 0]
    assert torch.allclose(own.float(), vectors["backtracking"].at(4), atol=1e-3)
    for found, known in zip(shuffled, vectors.random("shuffled", "backtracking"), strict=True):
        assert torch.allclose(found.float(), known.at(4), atol=1e-3)
    monkeypatch.setattr(analysis, "stream_features", None)
    assert analysis.main(config) == result  # from its file
    assert len(analysis.figure(result).data) == 4 * len(result.rows)
    values = json.loads(analysis.to_json(result))
    assert [row["behavior"] for row in values["rows"]] == ["backtracking", "uncertainty-estimation"]
    assert analysis.table(result).count("\n") == 2 + len(result.rows) * 4
    said, _ = analysis.answer(values)
    assert said.startswith("On organism (16 chains)")


def test_the_answer_names_the_extremes():
    analysis = load("vector_stability")
    names, rows = ("needed", "halves", "shuffled"), []
    for behavior, needed, halves, shuffled, p in (("backtracking", 20, 0.9, 0.3, 0.0), ("add", 60, 0.7, 0.4, 0.01)):
        row = dict(behavior=behavior, needed_sentences=2 * needed, p=p)
        for name, value in zip(names, (needed, halves, shuffled), strict=True):
            row |= {name: value, f"{name}_low": value, f"{name}_high": value}
        rows.append(row)
    said, shown = analysis.answer(dict(model="organism", n_chains=150, rows=rows))
    assert shown
    assert "from 20 [20, 20] chains (backtracking, 40 sentences) to 60 [60, 60] (add, 120)" in said
    assert "0.70 [0.70, 0.70] (add) to 0.90 [0.90, 0.90] (backtracking)" in said
    rows[0]["p"] = 0.2
    assert not analysis.answer(dict(model="organism", n_chains=150, rows=rows))[1]

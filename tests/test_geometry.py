"""Cosines of planted vectors, and the published table from the published means."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors import safe_open

from lensteer.errors import LensteerError
from lensteer.vectors import BehaviorVectors, Recipe
from lensteer.vectors.fitting import vectors_of
from lensteer.vectors.geometry import CosineMatrix, common_component, cosine_matrix, disattenuated_cosines
from test_directions import LABELS, collect, plant

#: Where the published study steers (R1-Qwen-1.5B). Its other two labels are taken at backtracking's layer.
LAYERS = {"backtracking": 17, "uncertainty-estimation": 18, "example-testing": 15, "adding-knowledge": 18}


def from_rows(rows: torch.Tensor, **options) -> BehaviorVectors:
    means = dict(zip("abcdef", rows, strict=False))
    return BehaviorVectors.from_means(means, torch.zeros_like(rows[0]), **options)


def test_planted_angles():
    rows = torch.tensor([[[1.0, 0], [3, 0]], [[0, 2.0], [0, 5]], [[1, 1], [-2, 0]]])  # behavior layer d_model
    same = cosine_matrix(from_rows(rows), 0)
    assert same.labels == ("a", "b", "c")
    assert same.layers == (0, 0, 0)
    assert [same.at(*p) for p in ("aa", "ab", "ac", "cb")] == pytest.approx([1, 0, 0.5**0.5, 0.5**0.5])
    own = cosine_matrix(from_rows(rows), {"c": 1, "a": 0}, default=1)
    assert own.layers == (0, 1, 1)
    assert [own.at(*p) for p in ("ab", "ac", "bc")] == pytest.approx([0, -1, 0])
    frame = own.to_dataframe()
    assert list(frame.columns) == list(frame.index) == ["a", "b", "c"]
    assert frame.loc["a", "c"] == pytest.approx(-1)
    assert own.low is None


def test_a_site_must_name_layers_that_there_are():
    vectors = from_rows(torch.eye(3)[:, None].repeat(1, 2, 1))
    with pytest.raises(LensteerError, match="layers names no layer for 'b', 'c'"):
        cosine_matrix(vectors, {"a": 1})
    with pytest.raises(LensteerError, match=r"no vector at layer 2: its layers are \[0, 1\]"):
        cosine_matrix(vectors, {"a": 1}, default=2)
    with pytest.raises(LensteerError, match="no behavior 'z' here"):
        cosine_matrix(vectors, 0).at("a", "z")


def fitted(features, **options) -> BehaviorVectors:
    return vectors_of(collect(features, Recipe("onset", "rest"), **options), (0, 1), {})


def test_intervals_hold_the_cosine_of_much_more_data():
    options = dict(effect=0.7, noise=1.0)
    truth = cosine_matrix(fitted(plant(600, seed=9, **options)), 1)
    found = cosine_matrix(fitted(plant(80, **options), n_bootstrap=300), 1)
    assert found.low is not None
    for b in range(3):
        for c in range(b):
            low, value, high = float(found.low[b, c]), float(found.values[b, c]), float(found.high[b, c])
            assert low < value < high
            assert 0.02 < high - low < 0.8
            assert low - 0.1 < float(truth.values[b, c]) < high + 0.1
    assert torch.allclose(found.low.diagonal(), torch.ones(3, dtype=torch.float64))


def test_disattenuated_cosines_undo_noise():
    generator = torch.Generator().manual_seed(0)
    d = 4000
    a, c = torch.randn(2, d, generator=generator)
    truth = torch.stack([a, 0.6 * a + 0.8 * c])[:, None]  # cosine 0.6
    first, second = (from_rows(truth + 1.5 * torch.randn(2, 1, d, generator=generator)) for _ in range(2))
    plain = cosine_matrix(first, 0).at("a", "b")
    assert plain == pytest.approx(0.6 / 3.25, abs=0.05)
    found = disattenuated_cosines(first, second, 0)
    # Products of independent noise have standard error 2.25/√d or so, against ⟨a, a⟩ = 1: 0.6 ± 0.06.
    assert found.at("a", "b") == found.at("b", "a") == pytest.approx(0.6, abs=0.15)
    assert found.at("a", "a") == pytest.approx(1)
    opposite = from_rows(torch.stack([-first.raw[0], first.raw[1]]))
    undefined = disattenuated_cosines(first, opposite, 0)
    assert math.isnan(undefined.at("a", "b"))
    assert undefined.at("b", "b") == pytest.approx(1)
    with pytest.raises(LensteerError, match="halves have behaviors"):
        disattenuated_cosines(first, from_rows(truth[:1]), 0)


def test_what_all_vectors_share():
    rows = torch.tensor([[[1.0, 3.0]], [[-3.0, 3.0]]])
    means = {"a": rows[0] + 5, "b": rows[1] + 5}
    vectors = BehaviorVectors.from_means(means, torch.full((1, 2), 5.0), counts={"a": 3, "b": 1})
    assert common_component(vectors).tolist() == pytest.approx([3 / 50**0.5])
    with pytest.raises(LensteerError, match="no span counts of 'a', 'b'"):
        common_component(from_rows(rows))
    # Negatives "spans" leave nothing that all share.
    fit = vectors_of(collect(plant(), Recipe("onset", "spans")), (0, 1), {})
    assert set(fit.labels) == set(LABELS)
    assert common_component(fit).max() < 1e-6


# --- published means ------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def published(reference_folder) -> tuple[dict[str, torch.Tensor], torch.Tensor, dict[str, int]]:
    with safe_open(str(reference_folder / "r1_qwen_1.5b_mean_activations.safetensors"), "pt") as file:
        means = {name: file.get_tensor(name) for name in file.keys()}
        counts = json.loads(file.metadata()["counts"])
    return means, means.pop("overall"), counts


def test_the_published_cosines(published):
    means, overall, counts = published
    cosines = cosine_matrix(BehaviorVectors.from_means(means, overall, counts=counts), LAYERS, default=17)
    back, unc, ded, add = "backtracking", "uncertainty-estimation", "deduction", "adding-knowledge"
    table = {
        (back, unc): 0.64,
        (back, ded): 0.60,
        (unc, ded): 0.51,
        (add, ded): 0.45,
        (back, add): 0.33,
        (unc, add): 0.19,
        ("initializing", back): 0.36,
    }
    found = {pair: cosines.at(*pair) for pair in table}
    assert found == pytest.approx(table, abs=0.005)


def test_the_published_lengths(published):
    means, overall, counts = published
    frame = BehaviorVectors.from_means(means, overall, counts=counts).to_dataframe()
    ratio = frame.set_index(["behavior", "layer"]).ratio
    found = {label: ratio[label, layer] for label, layer in LAYERS.items()}
    # example-testing is 0.305 and was published as 0.31.
    truth = {
        "backtracking": 0.47,
        "uncertainty-estimation": 0.48,
        "example-testing": 0.31,
        "adding-knowledge": 0.30,
    }
    assert found == pytest.approx(truth, abs=0.006)


def test_the_position_confound_of_the_published_vectors(published):
    means, overall, counts = published
    vectors = BehaviorVectors.from_means(means, overall, counts=counts)
    assert float(common_component(vectors)[17]) == pytest.approx(0.22, abs=0.005)
    # Against the mean of all spans in place of all tokens, the behaviors come apart.
    n = sum(counts[label] for label in means)
    center = torch.stack([counts[label] / n * mean.double() for label, mean in means.items()]).sum(0)
    centered = BehaviorVectors.from_means(means, center.float(), counts=counts)
    assert float(common_component(centered).max()) < 1e-5
    cosines = cosine_matrix(centered, 17)
    assert cosines.at("backtracking", "uncertainty-estimation") == pytest.approx(0.30, abs=0.005)
    assert cosines.at("backtracking", "deduction") == pytest.approx(-0.44, abs=0.005)


def test_alike_behaviors_stand_side_by_side():
    values = torch.eye(4)
    for a, b, cosine in ((0, 2, 0.9), (1, 3, 0.8), (0, 1, -0.2), (2, 3, 0.1)):
        values[a, b] = values[b, a] = cosine
    matrix = CosineMatrix(("a", "b", "c", "d"), (1, 2, 3, 4), values, values - 0.1, values + 0.1)
    found = matrix.ordered()
    at = {label: i for i, label in enumerate(found.labels)}
    assert abs(at["a"] - at["c"]) == abs(at["b"] - at["d"]) == 1
    assert all(found.at(x, y) == matrix.at(x, y) for x in "abcd" for y in "abcd")
    assert dict(zip(found.labels, found.layers, strict=True)) == dict(a=1, b=2, c=3, d=4)
    torch.testing.assert_close(found.values - found.low, torch.full((4, 4), 0.1))

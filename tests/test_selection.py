"""Which layer is chosen from planted scores, and that the reasons are stated."""

from __future__ import annotations

import dataclasses
import json
import math

import pytest
import torch

from lensteer.attribution import LayerScores
from lensteer.attribution.overlap import EmbeddingOverlap, NearestTokens
from lensteer.attribution.selection import SelectedLayers, layer_names, select_layers
from lensteer.errors import LensteerError

FLAT = [0.08] * 8


def scores_of(rows: dict[str, list[float]], half_width: float = 0.01, **changes) -> LayerScores:
    mean = torch.tensor(list(rows.values()), dtype=torch.float64)
    scores = LayerScores(
        labels=tuple(rows),
        layers=tuple(range(mean.shape[1])),
        n_layers=mean.shape[1],
        mean=mean,
        low=mean - half_width,
        high=mean + half_width,
        n_spans=(12,) * len(rows),
        n_traces=5,
        method="exact",
        coefficient=1.0,
        coefficient_unit="mean_norm",
        spans="own",
        noise_floor=1e-9,
    )
    return dataclasses.replace(scores, **changes)


def overlap_of(rows: dict[str, list[float]]) -> EmbeddingOverlap:
    maximum = torch.tensor(list(rows.values()))
    texts = tuple(tuple(("x",) for _ in row) for row in rows.values())
    tokens = NearestTokens(maximum, torch.zeros(*maximum.shape, 1, dtype=torch.long), maximum[..., None], texts)
    return EmbeddingOverlap(tuple(rows), tuple(range(maximum.shape[1])), tokens, tokens)


# The largest score of each behavior is where it must not be chosen: first, or last.
SCORES = scores_of(
    {
        "deduction": [0.9, 0.1, 0.1, 0.2, 0.1, 0.1, 0.1, 0.9],
        "uncertainty-estimation": [0.9, 0.8, 0.1, 0.2, 0.3, 0.1, 0.1, 0.9],
        "backtracking": [0.1, 0.2, 0.3, 0.4, 0.52, 0.51, 0.3, 0.9],
    }
)
OVERLAP = overlap_of(
    {
        "deduction": FLAT,
        "uncertainty-estimation": [0.41, 0.2, *FLAT[2:]],
        "backtracking": FLAT,
    }
)


def test_the_best_of_the_middle_is_chosen():
    layers = select_layers(SCORES, OVERLAP)
    assert dict(layers) == {"uncertainty-estimation": 4, "backtracking": 4}  # the steered ones of those scored
    assert isinstance(layers["backtracking"], int)


def test_words_say_why():
    layers = select_layers(SCORES, OVERLAP)
    assert layers.why["uncertainty-estimation"] == (
        "layer 4 of 8: the largest exact KL (0.3 nats, 95 % interval 0.29 to 0.31, 12 spans) among layers 2 to 6; "
        "layers 0 and 1 left out, because the overlap with the embedding (0.41, 0.20) exceeds 1.2 times the "
        "median over layers (0.08); layer 7 left out, because too few layers follow to use the vector"
    )
    why = layers.why["backtracking"]
    assert "the interval of layer 5 overlaps with it" in why
    assert "no leading layer left out: its overlap with the embedding (0.08) is below 1.2 times" in why
    wide = select_layers(dataclasses.replace(SCORES, low=SCORES.mean - 1, high=SCORES.mean + 1), OVERLAP)
    assert "the intervals of layers 0, 1, 2, 3, 5 and 6 overlap with it" in wide.why["backtracking"]


def test_options_move_the_choice():
    everything = select_layers(SCORES, OVERLAP, drop_leading=False, drop_trailing=0)
    assert dict(everything) == {"uncertainty-estimation": 0, "backtracking": 7}
    assert "left out" not in everything.why["backtracking"]
    without = select_layers(SCORES)
    assert without["uncertainty-estimation"] == 0
    assert "no overlap was given, so no leading layer was left out" in without.why["uncertainty-estimation"]
    first = select_layers(SCORES, drop_leading=1, behaviors=["deduction", "uncertainty-estimation"])
    assert dict(first) == {"deduction": 3, "uncertainty-estimation": 1}
    assert "layer 0 left out by request" in first.why["deduction"]
    assert select_layers(SCORES, OVERLAP, factor=3.0)["uncertainty-estimation"] == 1
    assert select_layers(SCORES, OVERLAP, drop_trailing=0.5)["backtracking"] == 3
    assert select_layers(SCORES, OVERLAP, drop_trailing=4)["backtracking"] == 3


def test_trailing_fraction_is_of_the_model_not_of_the_layers_scored():
    part = dataclasses.replace(
        SCORES,
        layers=(4, 5, 6, 7),
        mean=SCORES.mean[:, 4:],
        low=SCORES.low[:, 4:],
        high=SCORES.high[:, 4:],
    )
    layers = select_layers(part, OVERLAP, drop_trailing=0.25)
    assert dict(layers) == {"uncertainty-estimation": 4, "backtracking": 4}
    assert "layers 6 and 7 left out" in layers.why["backtracking"]
    # 14B: adding-knowledge peaks at layer 46 of 48, which was passed over.
    late = [0.1] * 48
    late[46], late[24] = 0.9, 0.5
    assert select_layers(scores_of({"adding-knowledge": late}))["adding-knowledge"] == 24


def test_doubts_are_said():
    noisy = select_layers(dataclasses.replace(SCORES, noise_floor=0.1))
    assert set(noisy.values()) == {4}
    assert (
        "the middle one, because the scores are under ten times their noise floor (0.1 nats)"
        in noisy.why["backtracking"]
    )
    nan = torch.full_like(SCORES.mean, math.nan)
    alone = select_layers(dataclasses.replace(SCORES, low=nan, high=nan), OVERLAP)
    assert "(0.52 nats, no interval, 12 spans)" in alone.why["backtracking"]


def test_scores_that_cannot_tell_layers_apart_take_the_middle_one():
    """Few spans, intervals that overlap over more than a third of the layers, control vectors that score as much."""
    few = dataclasses.replace(SCORES, n_spans=(9, 9, 9))
    wide = dataclasses.replace(SCORES, low=SCORES.mean - 10, high=SCORES.mean + 10)
    for scores, reason in ((few, "9 spans are too few"), (wide, "layers overlap, so that the scores cannot tell")):
        found = select_layers(scores)
        assert set(found.values()) == {4}
        assert all("layer 4 of 8, the middle one, because" in why and reason in why for why in found.why.values())
    best = select_layers(SCORES)
    for share, layer in ((0.5, 4), (0.0, None)):
        draws = torch.zeros(40, *SCORES.mean.shape, dtype=torch.float64)
        draws += 0.01 * torch.randn(draws.shape, generator=torch.Generator().manual_seed(0))
        draws[: int(share * 40)] += 100
        controls = dataclasses.replace(SCORES, method="fisher", controls={"shuffled": draws})
        found = select_layers(SCORES, controls=controls)
        assert dict(found) == (dict.fromkeys(best, layer) if layer else dict(best))
        assert ("of the shuffled control vectors score as much" in found.why["backtracking"]) is bool(layer)


def test_bad_input_is_refused():
    with pytest.raises(LensteerError, match="unknown behavior 'doubt'"):
        select_layers(SCORES, behaviors=["doubt"])
    with pytest.raises(LensteerError, match="unknown behavior 'backtracking'"):
        select_layers(SCORES, overlap_of({"deduction": FLAT}), behaviors=["backtracking"])
    with pytest.raises(LensteerError, match="pass the overlap of the vectors that were scored"):
        select_layers(SCORES, overlap_of(dict.fromkeys(SCORES.labels, FLAT[:4])))
    with pytest.raises(LensteerError, match="no layer is left for 'uncertainty-estimation'"):
        select_layers(SCORES, OVERLAP, drop_trailing=6)
    for drop in (8, 1.0, -1, -0.5):
        with pytest.raises(LensteerError, match=f"drop_trailing={drop} of 8 layers"):
            select_layers(SCORES, drop_trailing=drop)
    mean = SCORES.mean.clone()
    mean[2] = math.nan
    unseen = dataclasses.replace(SCORES, mean=mean, n_spans=(12, 12, 0))
    with pytest.raises(LensteerError, match=r"'backtracking' has no scores \(0 spans\)"):
        select_layers(unseen)


def test_a_site_is_a_mapping_that_cannot_change():
    layers = select_layers(SCORES, OVERLAP)
    assert list(layers) == ["uncertainty-estimation", "backtracking"]
    assert ("backtracking" in layers, "deduction" in layers, len(layers)) == (True, False, 2)
    with pytest.raises(LensteerError, match="unknown behavior 'deduction': choose one of 'uncertainty-estimation'"):
        layers["deduction"]
    with pytest.raises(TypeError):
        layers.layers["backtracking"] = 5  # type: ignore[index]  # read-only: that is the test
    with pytest.raises(dataclasses.FrozenInstanceError):
        layers.why = {}  # type: ignore[misc]  # frozen: that is the test
    with pytest.raises(LensteerError, match="reasons for"):
        SelectedLayers({"backtracking": 3}, {})


def test_a_site_survives_its_file(tmp_path):
    layers = select_layers(SCORES, OVERLAP)
    path = tmp_path / "layers.json"
    layers.save(path)
    assert SelectedLayers.load(path) == layers
    assert SelectedLayers.from_dict(json.loads(json.dumps(layers.to_dict()))).why == layers.why
    for damage in ("", "[]", "{}", json.dumps({**layers.to_dict(), "layers": dict.fromkeys(layers, "high")})):
        path.write_text(damage)
        with pytest.raises(LensteerError, match=r"layers\.json.*`save` of a SelectedLayers"):
            SelectedLayers.load(path)
    with pytest.raises(LensteerError, match=r"cannot read .*missing\.json"):
        SelectedLayers.load(tmp_path / "missing.json")


def test_layers_in_words():
    assert layer_names([]) == "no layers"
    assert layer_names([3]) == "layer 3"
    assert layer_names([3, 4]) == "layers 3 and 4"
    assert layer_names([3, 4, 5]) == "layers 3 to 5"
    assert layer_names([1, 4, 5]) == "layers 1, 4 and 5"

"""Results that are saved as JSON come back as they were, whatever their fields hold."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.attribution import LayerScores
from lensteer.errors import LensteerError
from lensteer.results import Saved
from lensteer.statistics import Estimate


@dataclass(frozen=True)
class Inner:
    name: str
    share: Estimate
    text: str | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Kept(Saved):
    rows: tuple[Inner, ...]
    pair: tuple[str, int]
    by_name: Mapping[str, float]
    grid: Float[Tensor, "a b"]
    draws: dict[str, Float[Tensor, " draw"]]
    limit: float
    maybe: float | None = None
    count: int | float = 0
    notes: dict[str, object] = field(default_factory=dict)


def kept() -> Kept:
    estimates = Estimate(0.1, 0.0, 0.2, 9), Estimate(math.nan, math.nan, math.inf)
    return Kept(
        (Inner("a", estimates[0], "ok"), Inner("b", estimates[1])),
        ("x", 3),
        {"y": math.nan, "z": -math.inf},
        torch.tensor([[1.0, math.nan], [math.inf, 2.0]]),
        {"k": torch.tensor([1.5], dtype=torch.float64)},
        math.inf,
        None,
        7,
        {"deep": [1, {"er": "text"}]},
    )


def test_every_kind_of_field_comes_back(tmp_path):
    kept().save(tmp_path / "deep" / "kept.json")
    json.loads((tmp_path / "deep" / "kept.json").read_text(), parse_constant=pytest.fail)  # strict JSON
    found, wanted = Kept.load(tmp_path / "deep" / "kept.json"), kept()
    assert repr(found) == repr(wanted)
    assert isinstance(found.rows[1].share.value, float)
    assert math.isnan(found.rows[1].share.value)
    assert found.rows[1].share.high == math.inf
    assert found.rows[0] == wanted.rows[0]
    assert (found.grid.dtype, found.draws["k"].dtype) == (torch.float32, torch.float64)
    torch.testing.assert_close(found.grid, wanted.grid, equal_nan=True)
    assert found.to_dict() == wanted.to_dict()


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"kind": "Other"}, "no Kept of version 1: its 'kind' and 'version' are .'Other', 1."),
        ({"version": 2}, "'version' are .'Kept', 2."),
        ({"limit": "much"}, "this Kept cannot be read .ValueError: could not convert"),
        ({"pair": ["x"]}, "this Kept cannot be read"),
        ({"pair": ["x", "3"]}, "'3' is no int"),
        ({"extra": 1}, "unknown fields .'extra'."),
        ({"rows": None}, "None is no list"),
        ({"rows": [{"name": "a"}]}, "missing fields .'share'."),
    ],
)
def test_what_is_not_such_a_result_is_refused(change, words, tmp_path):
    path = tmp_path / "kept.json"
    path.write_text(json.dumps({**kept().to_dict(), **change}))
    with pytest.raises(LensteerError, match=rf"(?s)kept\.json.*{words}.*`save` of a Kept"):
        Kept.load(path)
    missing = {name: value for name, value in kept().to_dict().items() if name not in ("maybe", "notes", "count")}
    assert Kept.from_dict(missing).count == 0


@pytest.mark.usefixtures("without_shape_checks")
def test_axes_of_one_name_are_equally_long():
    scores: dict[str, Any] = dict(labels=("a", "b"), layers=(0, 1), n_layers=2, n_spans=(1, 1), n_traces=1)
    scores |= dict(method="exact", coefficient=1.0, coefficient_unit="unit", spans="own")
    scores |= {name: torch.ones(2, 2) for name in ("mean", "low", "high")}
    whole = LayerScores(**scores).to_dict()
    assert LayerScores.from_dict(whole).labels == ("a", "b")
    for changes, message in (
        (dict(n_spans=[1]), r"LayerScores\.n_spans has 1 entries, where the axis behavior has 2"),
        (dict(layers=[0]), r"LayerScores\.mean is float32\[2, 2\]: give a tensor of float .*layer 1"),
        (dict(low={"dtype": "int64", "values": [[1, 1], [1, 1]]}), r"LayerScores\.low is int64"),
    ):
        with pytest.raises(LensteerError, match=message):
            LayerScores.from_dict(whole | changes)

"""Every analysis runs on the organism, small, and its figures have the shape of its question."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import shutil
import sys
from pathlib import Path
from types import ModuleType

import pytest

import lensteer as ls

ANALYSES = Path(__file__).resolve().parent.parent / "analyses"


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"analysis_{name}", ANALYSES / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # dataclasses look their module up
    spec.loader.exec_module(module)
    return module


def test_windows_and_negatives_ranks_every_recipe_on_the_same_chains(tmp_path):
    analysis = load("windows_and_negatives")
    config = analysis.Config(n_train=24, n_dev=4, layers=(4,), resume=tmp_path / "records.jsonl")
    rows = analysis.main(config)
    assert [r.recipe for r in rows] == [str(r) for r in analysis.RECIPES]
    assert rows[0].ahead == (0, 0, 0)  # of itself
    for row in rows:
        assert row.low <= row.mean <= row.high
        assert row.cells == 4
        assert row.by_layer[4] == pytest.approx(row.mean)
    assert analysis.main(config) == rows  # from the records, not from new chains
    assert json.loads(json.dumps([dataclasses.asdict(r) for r in rows]))[0]["right_way"] == rows[0].right_way
    assert analysis.table(rows).count("\n") == 1 + len(rows)


def test_rows_are_what_the_records_say():
    analysis = load("windows_and_negatives")
    shares = {"unsteered": 2, "down": 1, "up": 5}
    records = []
    for arm, kind in [("unsteered", "unsteered")] + [
        (f"{recipe}/0/{b}/{kind}", kind) for recipe in analysis.RECIPES for b in ls.STEERED for kind in ("down", "up")
    ]:
        for task in range(3):
            counts = dict.fromkeys(ls.BEHAVIORS, shares[kind])
            records.append(
                analysis.Record(arm, str(task), 0, counts, counts, 20, 60, kind != "up", True, True, 80, 0.0)
            )
    rows = analysis.rows(records, (0,))
    assert all((r.mean, r.low, r.high) == pytest.approx((0.2, 0.2, 0.2)) for r in rows)
    assert all((r.right_way, r.cells, r.parsed) == (4, 4, 0.5) for r in rows)


def test_the_card_measures_a_checkpoint_and_says_so_beside_it(tmp_path):
    analysis = load("organism_card")
    folder = tmp_path / "weights"
    shutil.copytree(ls.models.ORGANISM, folder)
    card = analysis.main(analysis.Config(str(folder), n=6))
    analysis.write_card(folder, card)
    text = (folder / "README.md").read_text()
    for label, figure, _ in analysis.rows(card):
        assert f"| {label} | {figure} |" in text
    assert "--seed 0" in text

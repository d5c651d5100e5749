"""Damaged inputs are read or refused; `benchmarks/fuzz.py` tries a million of them outside CI."""

from __future__ import annotations

import json
from pathlib import Path
from types import ModuleType

import pytest

import lensteer as ls
from scripts import load

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def fuzz() -> ModuleType:
    pytest.importorskip("gguf", reason="gguf is not installed")
    return load("fuzz", "benchmarks")


@pytest.mark.medium
def test_ten_thousand_damaged_inputs_are_read_or_refused(fuzz, tmp_path):
    rows = fuzz.main(620, tmp_path)
    assert sum(row.inputs for row in rows) >= 10_000
    assert {path.name: path.read_text() for path in tmp_path.glob("findings/*.txt")} == {}
    for row in rows:
        assert (row.inputs, row.findings) == (row.read + row.refused, 0)
        assert row.read > 0 or row.inputs < 100  # what is damaged is close enough to what is valid


@pytest.mark.parametrize("runs", [False, pytest.param(True, marks=pytest.mark.medium)])
def test_every_seed_is_valid(fuzz, runs, tmp_path):
    for name, target in fuzz.targets(tmp_path, runs=runs).items():
        for seed in target.seeds:
            path = tmp_path / f"seed{fuzz.SUFFIX.get(name, '.txt')}"
            assert fuzz.tried(target, seed, path) == ("read", ""), name


def test_what_is_neither_read_nor_refused_is_kept_and_a_killed_run_goes_on(fuzz, tmp_path, monkeypatch):
    def read(path: Path) -> None:
        data = path.read_bytes()
        if data.startswith(b"x"):
            raise ls.LensteerError("refused")
        assert len(data) < 12

    own = fuzz.Target(read, [b"x123456789", b"abcdefghijk"], named=False)
    monkeypatch.setattr(fuzz, "targets", lambda folder: {"own one": own})
    (first,) = fuzz.main(40, tmp_path)
    assert first.read + first.refused + first.findings == first.inputs == 40
    kept = sorted((tmp_path / "findings").glob("*.txt"))
    assert len(kept) == first.findings > 0
    assert "AssertionError" in kept[0].read_text()
    (whole,) = fuzz.main(80, tmp_path)
    (at_once,) = fuzz.main(80, tmp_path / "at-once")
    assert (whole.read, whole.refused, whole.findings) == (at_once.read, at_once.refused, at_once.findings)
    assert json.loads((tmp_path / "state.json").read_text())["own one"]["inputs"] == 80
    assert fuzz.table([whole]).splitlines()[-1].startswith("all | 80 |")
    with pytest.raises(ls.LensteerError, match="no target 'other': choose from own one"):
        fuzz.main(1, tmp_path, ["other"])

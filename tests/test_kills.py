"""A run that is killed at random moments ends with the artifacts of an unharmed one (`benchmarks/kills.py`)."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from scripts import load

ROOT = Path(__file__).resolve().parent.parent


@pytest.mark.slow
def test_two_kills_leave_no_trace(tmp_path):
    kills = load("kills", "benchmarks")
    found = kills.main(2, tmp_path)
    assert len(found.kills) == 2
    assert found.finished
    assert found.different == ()
    assert kills.main(2, tmp_path).kills == found.kills  # goes on from its state
    assert "files that differ: none" in kills.table(found)
    spoiled = dataclasses.replace(found, different=("run-0/summary.json",))
    assert "run-0/summary.json" in kills.table(spoiled)
    (tmp_path / "unharmed" / "layers.json").write_text("{}")
    assert kills.artifacts(tmp_path / "unharmed") != kills.artifacts(tmp_path / found.finished[0])

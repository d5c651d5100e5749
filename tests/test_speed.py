"""The benchmarks against peers: what their ratios mean, how they go on, and a run of each at the size of a test."""

from __future__ import annotations

import json
import math
import sys
import time

import pytest
import torch

from scripts import ROOT, load


@pytest.fixture(scope="module")
def sides():
    return load("sides", "benchmarks")


def test_a_ratio_is_of_the_same_round(sides):
    row = sides.compare("a_vs_b", "cell", 100, [1.0, 2.0, 4.0], [3.0, 2.0, 6.0], 1.5)
    assert (row.ours, row.theirs) == (2.0, 3.0)
    assert (row.low, row.ratio, row.high, row.rounds) == (1.0, 1.5, 3.0, 3)
    slow = sides.compare("a_vs_c", "cell", 100, [1.0, 1.0], [0.5, 0.9], 1.0)
    said = sides.table([row, slow], {"cell": {"missing": {"repeng": "not run: no environment"}}}).splitlines()
    assert "| 2 | 3 | 1.50 | 1.00 to 3.00 (3) | 1.5 met |" in said[2]
    assert "0.70 | 0.50 to 0.90 (2) | 1 MISSED |" in said[3]
    assert said[4] == "cell: repeng not run: no environment"


def test_sides_take_turns_and_go_on_after_whole_rounds(sides):
    ran = []

    def side(name):
        return lambda: ran.append(name) or float(len(ran))

    every = {name: side(name) for name in "ab"}
    seconds = {"a": [9.0, 9.0], "b": [9.0]}  # killed between the two
    assert len(list(sides.take_turns(every, seconds, 3, math.inf))) == 2
    assert ran == ["a", "b", "b", "a"]
    assert seconds == {"a": [9.0, 1.0, 4.0], "b": [9.0, 2.0, 3.0]}
    assert list(sides.take_turns(every, seconds, 3, math.inf)) == []
    assert list(sides.take_turns(every, seconds, 9, time.monotonic() - 1)) == []
    assert len(ran) == 4


def test_a_peer_without_an_environment_is_named(sides, tmp_path):
    with sides.workers(tmp_path, {}) as (running, missing):
        assert running == {}
        assert set(missing) == set(sides.PEERS)


@pytest.mark.medium
def test_a_worker_that_ends_says_why(sides, tmp_path):
    peer = sides.Peer(sys.executable, "nnsight", tmp_path / "no-request.json")
    with pytest.raises(RuntimeError, match=r"(?s)nnsight has ended: .*no-request\.json"):
        peer.wait()
    peer.close()


def test_window_sums_are_by_hand():
    worker = load("peer_worker", "benchmarks")
    layers = [torch.arange(8.0).view(4, 2), torch.ones(4, 2)]
    # The means of positions 0 and 1 are 1 and 2, that of position 3 is 6 and 7.
    assert worker.window_sums(layers, [[0, 2], [3, 4]]).tolist() == [[7.0, 9.0], [2.0, 2.0]]


@pytest.mark.medium
def test_collection_runs_on_the_organism(tmp_path):
    collection = load("collection", "benchmarks")
    config = collection.smoke(collection.Config(json=tmp_path / "a.json"))
    (cell,) = collection.main(config).values()
    assert {len(values) for values in cell["seconds"].values()} == {2}
    assert set(cell["missing"]) == set(collection.sides.PEERS)
    assert 0 <= cell["padding"] < 0.1
    written = json.loads((tmp_path / "a.json").read_text())
    assert [row["name"] for row in written["rows"]] == [
        "collection_vs_bare_forward",
        "collection_vs_published",
        "collection_vs_transformerlens_cache",
        "collection_with_50_controls_vs_bare_forward",
    ]
    again = collection.main(config)
    assert next(iter(again.values()))["seconds"] == cell["seconds"]  # nothing is measured twice
    assert len(collection.sides.figure(collection.rows_of(again), "t").data[0].x) == 4


@pytest.mark.medium
def test_generation_runs_on_the_organism_and_all_sides_write_the_same(tmp_path):
    generation = load("generation", "benchmarks")
    (cell,) = generation.main(generation.smoke(generation.Config(json=tmp_path / "a.json"))).values()
    assert cell["tokens"] == 8
    assert cell["same_tokens"] == {"hooked_bridge": 1.0, "unhooked_bridge": 1.0}
    names = [row["name"] for row in json.loads((tmp_path / "a.json").read_text())["rows"]]
    assert names[: len(generation.SCOPES)] == [f"steered_vs_hf_unsteered, {scope}" for scope in generation.SCOPES]
    assert names[-1] == "hooked_vs_unhooked_bridge"


def test_peers_have_their_versions_pinned(sides):
    for library in sides.PEERS:
        text = (ROOT / "analyses" / "peers" / f"requirements-{library}.txt").read_text()
        assert any(line.startswith(f"{library}==") for line in text.splitlines())


@pytest.mark.slow
def test_a_run_is_compared_stage_by_stage():
    benchmark = load("end_to_end", "benchmarks")
    found = benchmark.main(benchmark.smoke(benchmark.Config()))
    assert set(found["ratio"]) == {"traces", "vectors", "attribute", "evaluate"}
    for stage, ratio in found["ratio"].items():
        assert ratio == found["seconds.published"][stage] / found["seconds.lensteer"][stage]

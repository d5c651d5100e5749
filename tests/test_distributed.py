"""Ray actors: the results of one process, also when actors die or a trace is broken; bad input is refused clearly.

Tests that start Ray skip where it is not installed. Functions that actors run are local ones: those are pickled by
value, while an actor could not import this module.
"""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lensteer as ls
from lensteer import distributed
from lensteer.attribution import attribute
from lensteer.cli import app
from lensteer.distributed import ActorOptions, Actors
from lensteer.errors import LensteerError
from lensteer.evaluation import Condition, run_conditions
from lensteer.files import read_json, read_jsonl, write_json, write_jsonl
from lensteer.generation.jobs import Sampling, generate_traces
from lensteer.generation.parallel import pool_on, pooled, run_batches, shards
from lensteer.pipeline import ORGANISM, Run, complete, run_stage
from lensteer.positions import onsets
from lensteer.steering import SteeringPlan
from lensteer.tasks import load_tasks
from lensteer.vectors import BehaviorVectors, fit_vectors

SMALL = replace(
    ORGANISM,
    n_train=24,
    n_dev=4,
    n_test=3,
    n_samples=1,
    train_tokens=200,
    max_new_tokens=300,
    batch_size=8,
    max_spans=4,
    coefficients=(0.2,),
    n_controls=2,
    n_score_controls=3,
)
TWO = ActorOptions(n=2)
needs_ray = [pytest.mark.slow, pytest.mark.skipif(distributed.importlib.util.find_spec("ray") is None, reason="no Ray")]


def needing_ray(test):
    for mark in needs_ray:
        test = mark(test)
    return test


def close(there, here):
    """Up to the rounding of sums over other batches."""
    assert (there - here).abs().max() <= 1e-5 * here.abs().max()


# What connects to Ray by itself stands before what shares the connection of the module.


@needing_ray
def test_a_run_on_two_actors_has_the_artifacts_of_one_process(tmp_path):
    """All stages; then one with a broken trace."""
    one, two = (Run.open(tmp_path / name, SMALL) for name in ("one", "two"))
    complete(one)
    said = []
    two.announce = said.append
    with two.on_actors(TWO):
        complete(two, said.append)
    assert two.pool is None
    assert sum("2 actor(s) with the model" in line for line in said) == 1
    for name in ("traces.jsonl", "annotated.jsonl", "plan.jsonl"):
        assert two.path(name).read_bytes() == one.path(name).read_bytes(), name
    there, here = (BehaviorVectors.load(run.path("vectors.safetensors")) for run in (two, one))
    assert (there.counts, there.provenance) == (here.counts, here.provenance)
    close(there.raw, here.raw)
    for name in ("coefficients.jsonl", "evaluation.jsonl"):  # the first line is a digest of the vectors' digits
        lines = [run.path(name).read_text().splitlines()[1:] for run in (two, one)]
        assert lines[0] == lines[1], name
        assert lines[0]
    figures = [json.loads(run.path("summary.json").read_text()) for run in (one, two)]
    assert set(figures[0]) == set(figures[1])
    for name, value in figures[0].items():
        if isinstance(value, float):
            near = pytest.approx(value, rel=1e-3, abs=1e-5, nan_ok=True)
            assert figures[1][name] == near or "second" in name or "minute" in name, name
        else:
            assert figures[1][name] == value, name

    again = tmp_path / "again"
    shutil.copytree(two.folder, again)
    manifest = read_json(again / "run.json")
    manifest["stages"] = {name: manifest["stages"][name] for name in ("traces", "annotate")}
    write_json(again / "run.json", manifest)
    rows = [row for _, row in read_jsonl(again / "annotated.jsonl")]
    broken = rows[3]
    broken["response_ids"] = [10**6] * len(broken["response_ids"])  # no such token
    write_jsonl(again / "annotated.jsonl", rows)
    third = Run.open(again)
    with third.on_actors(TWO):
        run_stage(third, "vectors")
    ((_, row),) = read_jsonl(again / "set_aside.jsonl")
    assert (row["stage"], row["name"]) == ("vectors", f"{broken['task']['id']}/{broken['sample']}")
    assert "the token id 1000000" in row["error"]
    assert any("set 1 chain(s) aside" in note and row["name"] in note for note in third.notes)
    assert sum(third.stages["vectors"]["spans"].values()) == sum(two.stages["vectors"]["spans"].values()) - len(
        broken["spans"]
    )


@needing_ray
def test_the_command_takes_ray_with_and_without_an_address(tmp_path):
    out = tmp_path / "run"
    options = ["--small", "--n-train", "4", "--train-tokens", "10", "--actors", "1"]
    command = [sys.executable, "-m", "lensteer", "traces", "--out", str(out), *options, "--ray"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    assert "1 actor(s) with the model on 1 CPU core(s) and 0 GPU(s) each" in done.stdout
    assert len((out / "traces.jsonl").read_text().splitlines()) == 4
    many = [*command[:-1], "--ray", "local", "--out", str(tmp_path / "other"), "--cpus-per-actor", "10000"]
    done = subprocess.run(many, capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    assert "1 actor(s) of 10000 CPU core(s) and 0 GPU(s) each: there is room for 0 on 1 machine(s)" in done.stderr
    assert not (tmp_path / "other").exists()


@pytest.fixture(scope="module")
def traces(organism):
    tasks = load_tasks("organism", split="train", n=24)
    found = generate_traces(organism, tasks, temperature=1.0, max_new_tokens=200, batch_size=8)
    return ls.annotate(found, ls.grammar)


@pytest.fixture(scope="module")
def two_actors(organism):
    said = []
    with Actors(None, {}, TWO, said.append) as actors:
        yield actors, said


@pytest.fixture
def actors(organism, two_actors):
    with pooled(organism, two_actors[0]):
        two_actors[0].aside.clear()
        two_actors[1].clear()
        yield two_actors


@needing_ray
def test_pools_are_left_out_while_a_plan_is_on(organism, actors, random_direction):
    assert pool_on(organism) is actors[0]
    with SteeringPlan(random_direction(organism), 1).on(organism):
        assert pool_on(organism) is None
        assert shards(organism, [1, 2]) == [[1, 2]]
    with pytest.raises(LensteerError, match="a pool on this model already"), pooled(organism, actors[0]):
        pass


@needing_ray
def test_scores_and_evaluated_chains_are_those_of_one_process(organism, traces, actors):
    tasks = load_tasks("organism", split="test", n=6)

    def measured():
        vectors = fit_vectors(organism, traces, window="onset", negatives="spans", n_controls=3, n_bootstrap=2)
        exact = attribute(organism, traces, vectors, max_spans=10)
        fisher = attribute(organism, traces, vectors, method="fisher", n_controls=3, max_spans=10)
        plan = SteeringPlan(vectors["backtracking"], 2, 1.0, onsets)
        conditions = [Condition("off"), Condition("on", plan)]
        sampling = Sampling(1, 1.0, 0, 120, 4)
        return (
            vectors,
            exact,
            fisher,
            run_conditions(organism, tasks, conditions, sampling, annotator=ls.grammar, quality=6),
        )

    there = measured()
    assert len(actors[0]._live) == 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lensteer.generation.parallel._pools", {})
        here = measured()
    assert there[0].counts == here[0].counts
    assert there[0].provenance == here[0].provenance
    for name in ("raw", "mean_norm", "replicates"):
        close(getattr(there[0], name), getattr(here[0], name))
    close(there[0].controls.shuffled, here[0].controls.shuffled)
    for mine, theirs in zip(there[1:3], here[1:3], strict=True):
        torch.testing.assert_close(mine.mean, theirs.mean, rtol=1e-3, atol=1e-6)  # of vectors that differ by rounding
        assert (mine.n_spans, mine.n_traces) == (theirs.n_spans, theirs.n_traces)
    assert [r.sentences for r in there[3]] == [r.sentences for r in here[3]]
    assert [r.kl for r in there[3]] == pytest.approx([r.kl for r in here[3]], abs=1e-5)


@needing_ray
def test_an_actor_killed_within_a_stage_is_replaced_and_its_batch_counts_once(organism, actors, tmp_path):
    tasks = load_tasks("organism", split="train", n=24)
    generated = partial(generate_traces, organism, tasks, temperature=1.0, max_new_tokens=120, batch_size=4)
    victims = actors[0].pids()

    def kill(fresh):
        if victims:
            os.kill(victims.pop(), 9)

    there = generated(path=tmp_path / "there.jsonl", inspect=kill)  # both, after the first and the second batch
    assert sum("died and is replaced" in line for line in actors[1]) >= 1
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lensteer.generation.parallel._pools", {})
        assert generated(path=tmp_path / "here.jsonl") == there
    assert (tmp_path / "there.jsonl").read_bytes() == (tmp_path / "here.jsonl").read_bytes()
    assert actors[0].aside == []


@needing_ray
def test_results_come_once_and_in_order_whatever_dies(organism, actors, tmp_path):
    def run(model, batch):
        for item in batch:
            if item in (5, 6) and not Path(f"{tmp_path}/{item}").exists():
                Path(f"{tmp_path}/{item}").touch()
                os.kill(os.getpid(), 9)
        return [item * 10 for item in batch]

    batches = [[0, 1], [2, 3], [4, 5, 6], [7]]
    assert list(run_batches(organism, run, batches)) == [(b, [10 * i for i in b]) for b in batches]
    assert {path.name for path in tmp_path.iterdir()} == {"5", "6"}


@needing_ray
def test_an_item_that_fails_or_kills_is_set_aside_alone(organism, actors):
    def run(model, batch):
        if 37 in batch:
            os.kill(os.getpid(), 9)
        if 3 in batch:
            raise ValueError("three is broken")
        return list(batch)

    batches = [[*range(i, i + 4)] for i in range(0, 36, 4)] + [[36, 37]]
    found = [item for part, result in run_batches(organism, run, batches, name="item {}".format) for item in result]
    assert found == [i for i in range(38) if i not in (3, 37)]
    assert {(a.name, a.error.split("(")[0]) for a in actors[0].aside} == {
        ("item 3", "ValueError: three is broken"),
        ("item 37", "2 actors died over it "),
    }
    with pytest.raises(LensteerError, match=r"^ValueError: three is broken$"):  # without names, nothing is set aside
        list(run_batches(organism, run, batches))


@needing_ray
def test_a_mistake_that_is_in_all_items_ends_the_work(organism, actors):
    def run(model, batch):
        raise LensteerError("layer 99 is not there")

    with pytest.raises(LensteerError, match=r"5 of 40 items failed, so far, the last one 'item \d+': layer 99"):
        list(run_batches(organism, run, [list(range(20)), list(range(20))], name="item {}".format))

    def die(model, batch):
        os.kill(os.getpid(), 9)

    with pytest.raises(LensteerError, match=r"5 actors died one after another, the last one: ActorDiedError"):
        list(run_batches(organism, die, [[i] for i in range(100)]))


@needing_ray
def test_a_broken_trace_is_left_out_of_vectors_and_scores(organism, traces, actors):
    broken = replace(traces[4], response_ids=(10**6,) * len(traces[4].response_ids))
    others = [*traces[:4], *traces[5:]]
    vectors = fit_vectors(organism, [*traces[:4], broken, *traces[5:]], window="onset", negatives="spans")
    scores = attribute(organism, [*traces[:4], broken, *traces[5:]], vectors, layers=[1, 2])
    assert [aside.name for aside in actors[0].aside] == [broken.id] * 2
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lensteer.generation.parallel._pools", {})
        without = fit_vectors(organism, others, window="onset", negatives="spans")
        fewer = attribute(organism, others, without, layers=[1, 2])
    assert (vectors.counts, vectors.n_traces, vectors.provenance) == (
        without.counts,
        without.n_traces,
        without.provenance,
    )
    close(vectors.raw, without.raw)
    assert (scores.n_spans, scores.n_traces) == (fewer.n_spans, fewer.n_traces)
    torch.testing.assert_close(scores.mean, fewer.mean, rtol=1e-3, atol=1e-6)


@needing_ray
def test_a_model_that_an_actor_cannot_load_or_another_one_is_said(organism, actors, tiny_checkpoint, monkeypatch):
    taken = Actors("/no/such/model", {}, TWO)
    actors[0].pids()
    monkeypatch.setattr(distributed, "PLACE", 2.0)
    with pytest.raises(LensteerError, match=r"0 of 2 actors got a place within 2 s.*others use the cluster"):
        list(taken.run(lambda model, batch: batch, [[1]], None))
    monkeypatch.undo()
    for actor in list(actors[0]._live):
        actors[0]._end(actor)
    with pytest.raises(LensteerError, match=r"an actor cannot load the model: there is no '/no/such/model'"):
        list(taken.run(lambda model, batch: batch, [[1]], None))
    other = Actors(str(tiny_checkpoint()), {}, TWO)
    other._identity = ls.models.fingerprint(organism).to_dict()
    with pytest.raises(LensteerError, match=r"an actor loaded another model from .* which differs in .*weights"):
        list(other.run(lambda model, batch: batch, [[1]], None))
    assert taken._live == other._live == []
    with pytest.raises(LensteerError, match="connected to Ray already"), Actors(None):
        pass
    with pytest.raises(LensteerError, match=r"3 actor\(s\) of 1 CPU core\(s\) and 2 GPU\(s\) each: .*room for 0"):
        _ = Actors(None, {}, ActorOptions(n=3, gpus=2.0)).n


@needing_ray
def test_an_address_that_nobody_answers_at_is_said_at_once():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(LensteerError, match=f"nothing answers at the Ray address '{address}'"):
        distributed._check_answers(ActorOptions(address))


def test_without_ray_the_extra_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(distributed.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(LensteerError, match=r"Ray is not installed: it is the extra ray \(pip"):
        Actors(None).__enter__()
    result = CliRunner().invoke(app, ["run", "--out", str(tmp_path / "run"), "--small", "--ray"])
    assert result.exit_code == 1
    assert "Ray is not installed" in result.output
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(n=0), "0 actors: give at least 1"),
        (dict(gpus=-1.0), "-1.0 GPUs per actor"),
        (dict(gpus=1.5), "1.5 GPUs per actor: give 0, a part of one such as 0.5, or a whole number"),
        (dict(cpus=0), "0 CPU cores per actor"),
        (dict(address="ray://head:10001"), "Ray's client .* is not supported"),
        (dict(address="head"), "Ray address 'head': give 'local'"),
    ],
)
def test_options_that_cannot_be_are_refused(options, message):
    with pytest.raises(LensteerError, match=message):
        ActorOptions(**options)
    assert ActorOptions("10.0.0.1:6379").host_and_port == ("10.0.0.1", 6379)
    assert ActorOptions("[fe80::1]:6379").host_and_port == ("fe80::1", 6379)


def test_options_of_actors_need_ray(tmp_path):
    result = CliRunner().invoke(app, ["run", "--out", str(tmp_path / "run"), "--small", "--actors", "2"])
    assert result.exit_code == 1
    assert "are of --ray: give it, too" in " ".join(result.output.split())
    assert not (tmp_path / "run").exists()

"""`lensteer export`: from a run or a plan's folder to files, with the run's evidence; refusals in one line."""

from __future__ import annotations

import json
import re
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

import lensteer as ls
from lensteer import models
from lensteer.cli import app
from lensteer.cli.export import ENGINES, KINDS
from lensteer.errors import LensteerError
from lensteer.export import load_plan
from lensteer.files import write_jsonl
from lensteer.pipeline import Run, RunConfig, evaluated_plan
from lensteer.traces import Trace
from test_plain_exports import cache_vector
from test_plan_files import B, evaluation_of, vectors_of

PAGES = Path(__file__).parent.parent / "docs"
DOCS = (PAGES / "serving.md").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tiny_checkpoint, tiny_model, tmp_path_factory):
    """A run's folder as it is after its evaluation, with figures made up."""
    model = tiny_model("llama")
    folder = tmp_path_factory.mktemp("runs") / "run"
    config = RunConfig(model=str(tiny_checkpoint("llama")), behaviors=(B,), thought="<think>", scope="everywhere")
    opened = Run.open(folder, config)
    vectors = vectors_of(model)
    folder.mkdir()
    vectors.save(opened.path("vectors.safetensors"))
    evaluation_of(vectors).save(opened.path("evaluation.json"))
    task = ls.Task("1", "request", "test", "Tell me about bees.")
    rows = []
    for behavior, kind, text in (("", "unsteered", "They fly."), (B, "up", "Wait, they fly."), (B, "down", "Yes.")):
        trace = Trace(task, "prompt", text, (1,), (2,), (0,), True)
        rows.append({"behavior": behavior, "kind": kind, "trace": asdict(trace)})
    write_jsonl(opened.path("examples.jsonl"), rows)
    opened.model_id, opened.stages = models.fingerprint(model).to_dict(), {"evaluate": {"seconds": 1.0}}
    opened.write()
    return folder


def called(*words):
    return CliRunner().invoke(app, ["export", *map(str, words)])


def test_a_runs_plan_has_what_the_run_measured(run):
    found = evaluated_plan(Run.open(run), B)
    assert found.measured is not None
    (sample,) = found.measured.samples
    assert (sample.task, sample.unsteered, sample.steered) == ("Tell me about bees.", "They fly.", "Wait, they fly.")
    assert found.measured.sampling["temperature"] == 0.8
    assert found.measured.annotator == "rules"
    with pytest.raises(LensteerError, match="it steered"):
        evaluated_plan(Run.open(run), "adding-knowledge")
    unfinished = Run.open(run)
    del unfinished.stages["evaluate"]
    with pytest.raises(LensteerError, match="no evaluation yet"):
        evaluated_plan(unfinished, B)


@pytest.mark.medium
def test_from_a_run_to_a_folder_to_a_checkpoint(run, tiny_checkpoint, tmp_path):
    made = called("folder", "--run", run, "--out", tmp_path / "plan", "--base-model", "someone/tiny")
    assert made.exit_code == 0, made.output
    card = (tmp_path / "plan" / "README.md").read_text()
    assert "    Wait, they fly." in card
    assert "20.0 % [15.0 %, 25.0 %]" in card
    plan = load_plan(tmp_path / "plan")
    assert plan.identity() == evaluated_plan(Run.open(run), B).identity()
    options = ["--plan", tmp_path / "plan", "--model", tiny_checkpoint("llama")]
    for kind in ("checkpoint", "hf"):
        done = called(kind, *options, "--out", tmp_path / kind)
        assert done.exit_code == 0, done.output
        assert "logits differ from the hooked model's by at most" in done.output
        assert "Verdict: **shown**" in (tmp_path / kind / "README.md").read_text()
    other = called("hf", *options, "--scope", "generated", "--out", tmp_path / "generated")
    assert other.exit_code == 0, other.output
    assert "Measured at the scope `everywhere`**" in (tmp_path / "generated" / "README.md").read_text()


@pytest.mark.medium
def test_files_for_engines_hold_the_runs_plan(run, tmp_path):
    pytest.importorskip("gguf")
    endings = {"gguf": "v.gguf", "svec": "v.svec", "lm-eval": "folder"}
    for kind in ENGINES:
        path = tmp_path / kind / endings.get(kind, "spec.json")
        path.parent.mkdir()
        done = called(kind, "--run", run, "--out", path)
        assert done.exit_code == 0, done.output
        assert "no engine was run" in done.output
        assert path.exists()
    found = ls.export.read_control_vector(tmp_path / "gguf" / "v.gguf")
    plan = evaluated_plan(Run.open(run), B)
    torch.testing.assert_close(found.plan().edits[0].vector, plan.coefficient * plan.vector)
    refused = called("easysteer", "--run", run, "--scope", "onsets", "--out", tmp_path / "no.json")
    assert refused.exit_code == 1
    assert "onsets" in refused.stderr
    assert not (tmp_path / "no.json").exists()


@pytest.mark.medium
def test_a_cache_recipe(tiny_checkpoint, tiny_model, tmp_path):
    cache_vector(tiny_model("llama")).save(tmp_path / "think.safetensors")
    done = called(
        "cache",
        "--vector",
        tmp_path / "think.safetensors",
        "--model",
        tiny_checkpoint("llama"),
        "--unit",
        "difference",
        "--out",
        tmp_path / "r",
    )
    assert done.exit_code == 0, done.output
    assert (tmp_path / "r" / "steer_cache.py").exists()


def test_wrong_calls_say_what_would_be_right(run, tmp_path):
    out = ["--out", tmp_path / "no"]
    wrong = [
        (["pickle", *out], "no export 'pickle': choose one of folder, checkpoint"),
        (["hf", *out], "with no plan: give --run FOLDER or --plan FOLDER"),
        (["hf", "--run", run, "--plan", "x", *out], "with --run, --plan: give"),
        (["cache", "--run", run, *out], "give --vector FILE"),
        (["hf", "--run", run, "--sign", "left", *out], "--sign left: choose one of up, down"),
        (["hf", "--run", run, "--behavior", "calm", *out], "no behavior 'calm'"),
        (["hf", "--run", tmp_path, *out], "holds no run"),
        (["hf", "--run", run, "--sign", "down", *out], "no coefficient left the text readable"),
    ]
    for words, said in wrong:
        done = called(*words)
        assert done.exit_code == 1
        assert said in done.stderr, done.stderr
        assert "Traceback" not in done.output
    assert not (tmp_path / "no").exists()


def test_the_page_names_every_kind_and_key(run, tmp_path):
    both = DOCS + (PAGES / "engines.md").read_text(encoding="utf-8")
    assert set(re.findall(r"^lensteer export ([\w-]+)", both, re.MULTILINE)) == set(KINDS)
    plan = evaluated_plan(Run.open(run), B)
    path = ls.export.folder(plan, tmp_path / "plan")
    config = json.loads((path / "steering_config.json").read_text())
    for key in (*config, *config["edits"][0]):
        assert f"`{key}`" in DOCS, key

"""A run in its folder: every stage once, in order, whatever stops it; and no folder taken for another."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest

from lensteer.behaviors import STEERED
from lensteer.errors import LensteerError
from lensteer.pipeline import DEMO, STAGES, Run, RunConfig, complete, load_results, run_stage
from lensteer.traces import load_traces, save_traces

ROOT = Path(__file__).resolve().parent.parent
SMALL = RunConfig(
    n_train=24,
    n_dev=2,
    n_test=3,
    n_samples=1,
    max_new_tokens=80,
    batch_size=8,
    max_spans=4,
    doses=(0.2,),
    min_parsed=0.0,
    n_random=2,
    n_nulls=3,
)
ARTIFACTS = {
    "run.json", "traces.jsonl", "annotated.jsonl", "annotator.json", "vectors.safetensors", "scores.json",
    "nulls.json", "overlap.json", "site.json", "doses.jsonl", "doses.json", "evaluation.jsonl", "evaluation.json",
    "examples.jsonl", "summary.json", "report.html",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run from end to end, and what it announced."""
    folder, said = tmp_path_factory.mktemp("run") / "deep" / "run", []
    assert complete(Run.open(folder, SMALL), said.append) == folder / "report.html"
    return folder, said


@pytest.fixture
def folder(finished, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def artifacts(folder):
    """What a run made, without the times that it took."""
    found = {name: (folder / name).read_bytes() for name in ARTIFACTS - {"run.json", "report.html"}}
    for name in ("scores.json", "nulls.json", "summary.json"):
        values = json.loads(found[name])
        values.pop("cost", None)
        found[name] = {k: v for k, v in values.items() if "seconds" not in k}
    return found


# --- a run from end to end ------------------------------------------------------------------------


def test_every_stage_leaves_its_artifacts_and_says_so(finished):
    folder, said = finished
    assert {p.name for p in folder.iterdir()} == ARTIFACTS
    assert said == [f"{name} ..." for name in STAGES]
    manifest = json.loads((folder / "run.json").read_text())
    assert list(manifest["stages"]) == list(STAGES)
    assert all(facts["seconds"] >= 0 for facts in manifest["stages"].values())
    assert manifest["stages"]["traces"]["chains"] == 24
    assert manifest["stages"]["evaluate"]["chains"] == 3 * manifest_arms(manifest)
    assert manifest["model"]["name"] == "organism"
    assert Run.open(folder).config == SMALL
    assert Run.open(folder, SMALL).stages == manifest["stages"]


def manifest_arms(manifest):
    layers = manifest["stages"]["select"]["layers"]
    assert set(layers) == set(STEERED)
    return 1 + 3 * len(layers) + 2 * len(set(layers.values()))


def test_stages_that_are_done_are_not_redone(folder, monkeypatch):
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda run, name=name: pytest.fail(f"{name} was redone"))
    before = {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()}
    said = []
    assert complete(Run.open(folder, SMALL), said.append) == folder / "report.html"
    assert said == [f"{name}: done already" for name in STAGES]
    assert {p.name: (p.stat().st_mtime_ns, p.read_bytes()) for p in folder.iterdir()} == before


def test_only_what_is_missing_is_done(folder, finished, monkeypatch):
    run, calls = Run.open(folder), []
    for name in ("evaluate", "report"):
        del run.stages[name]
    run.write()
    for name, stage in list(STAGES.items()):
        monkeypatch.setitem(STAGES, name, lambda run, name=name, stage=stage: calls.append(name) or stage(run))
    complete(Run.open(folder))
    assert calls == ["evaluate", "report"]
    assert artifacts(folder) == artifacts(finished[0])


def test_chains_without_any_steered_behavior_end_the_run_early(folder):
    run = Run.open(folder)
    traces = [
        replace(t, spans=tuple(s for s in t.spans if s.label not in STEERED))
        for t in load_traces(run.path("annotated.jsonl"))
    ]
    save_traces(traces, run.path("annotated.jsonl"))
    del run.stages["vectors"]
    with pytest.raises(LensteerError, match=r"sentences of .*'deduction'.* only, and of none that is steered"):
        run_stage(run, "vectors")


def test_two_processes_do_not_work_on_one_run(folder, tmp_path):
    ours, code = Run.open(folder), "import sys, time; from lensteer.pipeline import Run"
    code += "; run = Run.open(sys.argv[1]); lock = run.locked(); lock.__enter__(); print(flush=True); time.sleep(60)"
    del ours.stages["report"]
    with subprocess.Popen([sys.executable, "-c", code, folder], stdout=subprocess.PIPE) as other:
        try:
            other.stdout.readline()
            with pytest.raises(LensteerError, match="another process is at work on"):
                run_stage(ours, "report")
            with Run(tmp_path / "another", SMALL).locked():
                assert "report" not in ours.stages
        finally:
            other.kill()
    run_stage(ours, "report")
    assert "report" in Run.open(folder).stages


def test_the_summary_is_valid_json_with_the_verdicts(finished):
    summary = json.loads((finished[0] / "summary.json").read_text(), parse_constant=pytest.fail)
    assert {f"shown.{b}.{what}" for b in STEERED for what in ("up", "down", "verdict")} <= set(summary)
    assert (summary["evaluation.n_tasks"], summary["evaluation.n_random"], summary["traces.n"]) == (3, 2, 24)
    assert summary["shown.n_behaviors"] == len(STEERED)
    shown = Run.open(finished[0]).stages["evaluate"]["shown"]
    assert {name for name in shown if not name.endswith("words")} == {
        f"{b}/{kind}" for b in STEERED for kind in ("up", "down") if summary[f"shown.{b}.{kind}"]
    }


def test_the_report_loads_nothing_from_elsewhere(finished):
    page = (finished[0] / "report.html").read_text(encoding="utf-8")
    assert page.lstrip().lower().startswith("<!doctype html>")
    assert not re.search(r"<script[^>]*\ssrc\s*=", page, re.IGNORECASE)
    markup = re.sub(r"(<script\b[^>]*>).*?</script>", r"\1</script>", page, flags=re.DOTALL | re.IGNORECASE)
    assert not re.search(r"<(link|iframe|img|object|embed|base)\b", markup, re.IGNORECASE)
    assert not re.search(r"(src|href|srcset|data|action)\s*=\s*[\"']?\s*(https?:|//|file:)", markup, re.IGNORECASE)
    assert not re.search(r"@import|url\(", markup, re.IGNORECASE)
    for label in STEERED:
        assert label in markup


def test_results_are_read_back(finished):
    results = load_results(Run.open(finished[0]))
    assert len(results.traces) == 24
    assert set(results.site) == set(STEERED) == set(results.doses.coefficients)
    assert results.example.task.split == "test"
    assert len(results.steered) == 2


# --- stages in order ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", list(STAGES)[1:])
def test_a_stage_names_those_that_it_needs(name, tmp_path):
    before = list(STAGES)[: list(STAGES).index(name)]
    run = Run(tmp_path / "run", SMALL)
    with pytest.raises(LensteerError, match=re.escape(str(before))):
        run_stage(run, name)
    run.stages = {stage: {} for stage in before[1:]}
    with pytest.raises(LensteerError, match=re.escape("needs ['traces']")):
        run_stage(run, name)
    assert not run.folder.exists()


def test_an_unknown_stage_lists_them(tmp_path):
    with pytest.raises(LensteerError, match=r"no stage 'nonsense'.*'attribute'"):
        run_stage(Run(tmp_path, SMALL), "nonsense")


@pytest.mark.parametrize(
    ("stage", "name", "data", "words"),
    [
        ("annotate", "traces.jsonl", None, "no file"),
        ("annotate", "traces.jsonl", b"", "is empty"),
        ("vectors", "annotated.jsonl", b'{"task": 1}\n', "line 1"),
        ("attribute", "vectors.safetensors", None, "no vectors"),
        ("attribute", "vectors.safetensors", b"\x08\x00", "truncated"),
        ("select", "scores.json", b"{", "scores.json"),
        ("select", "overlap.json", None, "overlap.json"),
        ("evaluate", "site.json", b"[]", "site"),
        ("evaluate", "doses.json", b"null", "doses.json"),
        ("report", "evaluation.json", b"null", "evaluation.json"),
        ("report", "examples.jsonl", b'{"arm": "unsteered", "trace": {}}\n', "line 1"),
    ],
)
def test_an_artifact_that_is_gone_or_broken_is_named(stage, name, data, words, folder):
    run = Run.open(folder)
    for later in list(STAGES)[list(STAGES).index(stage) :]:
        del run.stages[later]
    (folder / name).unlink() if data is None else (folder / name).write_bytes(data)
    with pytest.raises(LensteerError, match=words):
        run_stage(run, stage)
    assert stage not in run.stages


# --- killed ---------------------------------------------------------------------------------------

DRIVER = """
import sys
from lensteer import cli
from lensteer.cli import commands
from lensteer.pipeline import RunConfig
commands.DEMO = RunConfig(**{config!r})
sys.argv = ["lensteer", "demo", "--out", {out!r}]
cli.main()
"""


def stopped(folder, name, n_lines, how):
    """Run the demo in a process of its own until a file has so many lines, and stop it there."""
    code = DRIVER.format(config=SMALL.__dict__, out=str(folder))
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    path, end = folder / name, time.monotonic() + 120
    try:
        while not path.exists() or path.read_bytes().count(b"\n") < n_lines:
            assert process.poll() is None, process.stderr.read()
            assert time.monotonic() < end
            time.sleep(0.005)
        process.send_signal(how)
        return process.wait(60), process.stderr.read()
    finally:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_kills_and_ctrl_c_lose_at_most_a_batch(finished, tmp_path):
    folder = tmp_path / "run"
    assert stopped(folder, "traces.jsonl", 8, signal.SIGKILL)[0] == -signal.SIGKILL
    first = (folder / "traces.jsonl").read_bytes()
    with (folder / "traces.jsonl").open("ab") as file:  # as if the kill had come in the middle of a write
        file.write((finished[0] / "traces.jsonl").read_bytes()[len(first) :][:300])
    code, said = stopped(folder, "traces.jsonl", 16, signal.SIGINT)
    assert code == 130
    assert said.rstrip().endswith("stopped; the same command goes on from here")
    assert "Traceback" not in said
    assert (folder / "traces.jsonl").read_bytes().startswith(first)
    assert list(Run.open(folder).stages) == []
    assert stopped(folder, "evaluation.jsonl", 20, signal.SIGKILL)[0] == -signal.SIGKILL
    assert list(Run.open(folder).stages) == list(STAGES)[:5]
    begun = (folder / "evaluation.jsonl").read_bytes()
    assert (folder / "evaluation.json").exists() is False
    complete(Run.open(folder, SMALL))
    assert (folder / "evaluation.jsonl").read_bytes().startswith(begun[: begun.rfind(b"\n") + 1])
    assert artifacts(folder) == artifacts(finished[0])


# --- whose folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize("change", [{"seed": 1}, {"n_test": 4}, {"doses": (0.3,)}, {"model": "elsewhere"}])
def test_a_folder_of_another_run_is_refused(change, folder):
    before = (folder / "run.json").read_bytes()
    with pytest.raises(LensteerError, match="holds another run") as error:
        Run.open(folder, replace(SMALL, **change))
    ((name, _),) = change.items()
    assert f"{name!r}: {getattr(SMALL, name)!r}" in str(error.value)
    assert (folder / "run.json").read_bytes() == before


def test_what_is_no_run_is_refused_and_left_alone(tmp_path):
    (tmp_path / "thesis.tex").write_text("all of it")
    for place in (tmp_path, tmp_path / "thesis.tex"):
        with pytest.raises(LensteerError, match="is no run"):
            Run.open(place, SMALL)
    for place in (tmp_path, tmp_path / "none"):
        with pytest.raises(LensteerError, match="holds no run"):
            Run.open(place)
    assert [p.name for p in tmp_path.iterdir()] == ["thesis.tex"]


@pytest.mark.parametrize(
    "data",
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"config": {"doses": 3}}', b'{"config": {"doses": [], "x": 1}}',
     b'{"config": {"doses": [0.2]}, "stages": 7, "model": {}}'],
)  # fmt: skip
def test_a_corrupt_manifest_is_named(data, tmp_path):
    (tmp_path / "run.json").write_bytes(data)
    for config in (SMALL, None):
        with pytest.raises(LensteerError, match=r"run\.json cannot be read"):
            Run.open(tmp_path, config)
    assert (tmp_path / "run.json").read_bytes() == data


def test_another_model_in_the_same_place_is_refused(tiny_checkpoint, tmp_path):
    place = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint(), place)
    config = replace(SMALL, model=str(place))
    for _ in range(2):  # the same one again is the same
        assert Run.open(tmp_path / "run", config).model.cfg.n_layers == 4
    shutil.rmtree(place)
    shutil.copytree(tiny_checkpoint(seed=1), place)
    with pytest.raises(LensteerError, match=r"differs from it in.*weights"):
        run_stage(Run.open(tmp_path / "run", config), "traces")


def test_vectors_of_another_model_are_refused(folder, tiny_checkpoint, tmp_path):
    run = Run.open(tmp_path / "other", replace(SMALL, model=str(tiny_checkpoint())))
    run.stages = {name: {} for name in ("traces", "annotate", "vectors")}
    run.folder.mkdir()
    shutil.copy(folder / "vectors.safetensors", run.folder)
    with pytest.raises(LensteerError, match="model"):
        run_stage(run, "attribute")


# --- refused before anything is written -----------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"scope": "nowhere"}, "no scope 'nowhere'.*'thinking'"),
        ({"window": "sideways"}, "sideways"),
        ({"negatives": "nothing"}, "nothing"),
        ({"tasks": "none.jsonl"}, r"none\.jsonl"),
        ({"n_dev": 0}, "n=0"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"temperature": -1.0}, "temperature -1.0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(change, words, tmp_path):
    with pytest.raises(LensteerError, match=words):
        Run.open(tmp_path / "run", replace(SMALL, **change))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("{}\nnot JSON\n", "line 1"), ('{"id": "a", "category": "c", "split": "train", "prompt": "?"}\n',
                                                     "no task of split 'dev'")],
)  # fmt: skip
def test_bad_task_files_are_refused_before_anything_is_written(text, words, tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(text)
    with pytest.raises(LensteerError, match=words):
        Run.open(tmp_path / "run", replace(SMALL, tasks=str(tasks)))
    assert not (tmp_path / "run").exists()


def test_a_mistyped_model_leaves_the_folder_free(tmp_path):
    run = Run.open(tmp_path / "run", replace(SMALL, model=str(tmp_path / "none")))
    with pytest.raises(LensteerError, match="cannot load model"):
        run_stage(run, "traces")
    assert not (tmp_path / "run").exists()
    assert Run.open(tmp_path / "run", DEMO).stages == {}


def test_a_model_without_chat_template_is_refused(tiny_checkpoint, tmp_path):
    place = tmp_path / "checkpoint"
    shutil.copytree(tiny_checkpoint(), place)
    for path in place.glob("chat_template*"):
        os.remove(path)
    settings = json.loads((place / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (place / "tokenizer_config.json").write_text(json.dumps(settings))
    with pytest.raises(LensteerError, match="no chat template"):
        run_stage(Run.open(tmp_path / "run", replace(SMALL, model=str(place))), "traces")

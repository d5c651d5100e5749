"""A run in its folder: every stage once, in order, whatever stops it; and no folder taken for another."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from markupsafe import escape

from lensteer.behaviors import STEERED
from lensteer.errors import LensteerError
from lensteer.evaluation import GRAMMAR_MARGINS
from lensteer.files import SEAL, read_json, read_jsonl, read_tensors
from lensteer.pipeline import DEMO, ORGANISM, STAGES, Run, complete, load_results, run_stage
from lensteer.traces import load_traces, save_traces

pytestmark = pytest.mark.medium  # one run from end to end is made for the file

ROOT = Path(__file__).resolve().parent.parent
SMALL = replace(
    ORGANISM,
    n_train=48,
    n_dev=4,
    n_test=3,
    n_samples=1,
    train_tokens=100,
    max_new_tokens=300,
    batch_size=16,
    max_spans=4,
    coefficients=(0.2,),
    n_controls=2,
    n_score_controls=3,
)
ARTIFACTS = {
    "run.json", "traces.jsonl", "annotated.jsonl", "annotator.json", "vectors.safetensors", "scores.json",
    "controls.json", "overlap.json", "layers.json", "plan.jsonl", "plan.json", "coefficients.jsonl",
    "coefficients.json", "evaluation.jsonl", "evaluation.json", "examples.jsonl", "summary.json", "report.html",
}  # fmt: skip


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The folder of a run from end to end, and what it announced."""
    folder, said = tmp_path_factory.mktemp("run") / "deep" / "run", []
    assert complete(Run.open(folder, SMALL), said.append) == folder / "report.html"
    return folder, said


def plan_of(folder):
    return json.loads((folder / "plan.json").read_text())


@pytest.fixture
def folder(finished, tmp_path):
    """A copy to break."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def artifacts(folder):
    """What a run made, without the times that it took."""
    found = {name: (folder / name).read_bytes() for name in ARTIFACTS - {"run.json", "report.html"}}
    for name in ("scores.json", "controls.json", "summary.json", "plan.json"):
        values = json.loads(found[name])
        values.pop("cost", None), values.pop(SEAL, None)
        found[name] = {k: v for k, v in values.items() if "second" not in k and "minutes" not in k}
    return found


# --- a run from end to end ------------------------------------------------------------------------


def test_every_stage_leaves_its_artifacts_and_says_so(finished):
    folder, said = finished
    assert {p.name for p in folder.iterdir()} == ARTIFACTS
    assert [line for line in said if not line.startswith("plan: ")] == [f"{name} ..." for name in STAGES]
    manifest = json.loads((folder / "run.json").read_text())
    assert list(manifest["stages"]) == list(STAGES)
    assert all(facts["seconds"] >= 0 for facts in manifest["stages"].values())
    assert manifest["stages"]["traces"]["chains"] == 48
    assert manifest["stages"]["evaluate"]["chains"] == 3 * manifest_conditions(manifest)
    assert manifest["model"]["name"] == "organism"
    assert Run.open(folder).config == SMALL
    assert Run.open(folder, SMALL).stages == manifest["stages"]


def manifest_conditions(manifest):
    """Unsteered, prompted, steered with a coefficient, and two control vectors of each pool at each layer."""
    selected = manifest["stages"]["select"]
    layers = selected["layers"]
    assert set(layers) == set(STEERED)
    assert set(selected["down"]) | set(selected["up"]) <= set(STEERED)
    assert set(selected["down"].values()) | set(selected["up"].values())
    steered = {layers[b] for kind in ("down", "up") for b in selected[kind]}
    return 1 + len(layers) + len(selected["down"]) + len(selected["up"]) + 2 * 3 * len(steered)


def test_the_plan_is_said_before_anything_long_is_begun(finished):
    folder, said = finished
    plan = plan_of(folder)
    place = said.index("select ...")
    told = said[place + 1 : said.index("evaluate ...")]
    assert len(told) == 1 + len(STEERED)
    assert all(line.startswith("plan: ") for line in told)
    assert f"{plan['chains']['controls']} chains (controls)" in told[0]
    assert [row["behavior"] for row in plan["power"]] == list(Run.open(folder).stages["select"]["layers"])
    layers = Run.open(folder).stages["select"]["layers"]
    coefficients = json.loads((folder / "coefficients.json").read_text())
    n = len(set(layers.values()))
    assert plan["chains"] == {"coefficients": 4 * (1 + 2 * 4), "own": 3 * (1 + 3 * 4), "controls": 3 * 2 * 3 * n}
    assert (folder / "coefficients.jsonl").read_bytes().count(b"\n") == 1 + plan["chains"]["coefficients"]
    if len(coefficients["down"]) == len(coefficients["up"]) == 4:
        ran = Run.open(folder).stages["evaluate"]["chains"]
        assert ran == plan["chains"]["own"] + plan["chains"]["controls"]
    assert plan["minutes"] > 0
    summary = json.loads((folder / "summary.json").read_text())
    for row in plan["power"]:
        assert summary[f"power.{row['behavior']}.events"] == row["events"]
        # three tasks are too few for a fall of anything, and the run says so
        assert (row["down"], any(note.startswith(row["behavior"]) for note in Run.open(folder).notes)) == (False, True)


def test_a_plan_that_is_made_again_keeps_its_speed(folder, monkeypatch):
    """Chains that are read back take no time: a rate from them would predict minutes instead of hours."""
    before, run = plan_of(folder), Run.open(folder)
    for name in ("select", "evaluate", "report"):
        del run.stages[name]
    run_stage(run, "select")
    assert plan_of(folder) == before


def test_warnings_are_kept_and_shown(finished):
    run = Run.open(finished[0])
    results, page = load_results(run), (finished[0] / "report.html").read_text(encoding="utf-8")
    assert tuple(run.notes) == results.notes
    assert any("a fall is tested from" in note for note in run.notes)
    for note in run.notes:
        assert escape(note) in page


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
    assert (summary["evaluation.n_tasks"], summary["evaluation.n_random"], summary["traces.n"]) == (3, 2, 48)
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
    assert len(results.traces) == 48
    assert set(results.layers) == set(STEERED) == set(results.coefficients.pairs)
    assert results.coefficients.margins == GRAMMAR_MARGINS == Run.open(finished[0]).margins
    assert results.evaluation.coefficient_unit == results.coefficients.coefficient_unit == "difference"
    by_task = {}
    for behavior, kind, trace in results.examples:
        assert trace.task.split == "test"
        by_task.setdefault(trace.task.id, []).append(kind)
        assert (behavior in STEERED) is (kind != "unsteered")
    assert len(by_task) == 3
    assert all(kinds[0] == "unsteered" and set(kinds[1:]) <= {"down", "up"} for kinds in by_task.values())
    assert any(len(kinds) > 1 for kinds in by_task.values())


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
        ("evaluate", "layers.json", b"[]", "layers"),
        ("evaluate", "coefficients.json", b"null", "coefficients.json"),
        ("report", "evaluation.json", b"null", "evaluation.json"),
        ("report", "plan.json", b"{", "plan.json"),
        ("report", "examples.jsonl", b'{"behavior": "", "kind": "unsteered", "trace": {}}\n', "line 1"),
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


READ: dict[str, Callable[[Path], Any]] = {".json": read_json, ".jsonl": read_jsonl, ".safetensors": read_tensors}


def contains(found, original):
    """Whether nothing of the original is missing or different; a flip in the name of a digest adds an entry."""
    if isinstance(original, dict):
        return isinstance(found, dict) and all(n in found and contains(found[n], v) for n, v in original.items())
    if isinstance(original, (list, tuple)):
        return len(found) == len(original) and all(map(contains, found, original))
    return torch.equal(found, original) if isinstance(original, torch.Tensor) else found == original


@pytest.mark.parametrize("name", sorted(ARTIFACTS - {"summary.json", "report.html"}))
def test_a_flipped_bit_is_noticed_or_changes_nothing(name, finished, tmp_path):
    whole, read = (finished[0] / name).read_bytes(), READ[Path(name).suffix]
    original, path, rng, refusals = read(finished[0] / name), tmp_path / name, random.Random(name), []
    for _ in range(60):
        damaged = bytearray(whole)
        damaged[rng.randrange(len(whole))] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        try:
            assert contains(read(path), original)
        except LensteerError as error:
            refusals.append(str(error))
        assert path.read_bytes() == damaged
    assert len(refusals) > 40
    assert all(name in said for said in refusals)


def test_a_flipped_bit_in_a_half_done_stage_stops_it(folder):
    """Its chains are used again, and they still are chains."""
    run, path = Run.open(folder), folder / "evaluation.jsonl"
    del run.stages["evaluate"], run.stages["report"]
    lines = path.read_bytes().split(b"\n")
    lines[3] = re.sub(rb'"response": "(.)', lambda m: m[0][:-1] + bytes([m[0][-1] ^ 1]), lines[3])
    path.write_bytes(damaged := b"\n".join(lines))
    with pytest.raises(LensteerError, match=r"evaluation\.jsonl, line 4 does not match"):
        complete(run)
    assert path.read_bytes() == damaged


def test_what_a_kill_left_of_a_write_is_removed(folder):
    run = Run.open(folder)
    del run.stages["report"]
    (folder / "report.html.12345.tmp").write_text("<ht")
    run_stage(run, "report")
    assert {p.name for p in folder.iterdir()} == ARTIFACTS


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
    assert stopped(folder, "traces.jsonl", 16, signal.SIGKILL)[0] == -signal.SIGKILL
    first = (folder / "traces.jsonl").read_bytes()
    with (folder / "traces.jsonl").open("ab") as file:  # as if the kill had come in the middle of a write
        file.write((finished[0] / "traces.jsonl").read_bytes()[len(first) :][:300])
    code, said = stopped(folder, "traces.jsonl", 32, signal.SIGINT)
    assert code == 130
    assert said.rstrip().endswith("stopped; the same command resumes from here")
    assert "Traceback" not in said
    assert (folder / "traces.jsonl").read_bytes().startswith(first)
    assert list(Run.open(folder).stages) == []
    assert stopped(folder, "coefficients.jsonl", 20, signal.SIGKILL)[0] == -signal.SIGKILL
    assert list(Run.open(folder).stages) == list(STAGES)[:4]
    speed = plan_of(folder)["tokens_per_second"]
    assert stopped(folder, "evaluation.jsonl", 20, signal.SIGKILL)[0] == -signal.SIGKILL
    assert plan_of(folder)["tokens_per_second"] == speed
    assert list(Run.open(folder).stages) == list(STAGES)[:5]
    begun = (folder / "evaluation.jsonl").read_bytes()
    assert (folder / "evaluation.json").exists() is False
    complete(Run.open(folder, SMALL))
    assert (folder / "evaluation.jsonl").read_bytes().startswith(begun[: begun.rfind(b"\n") + 1])
    assert artifacts(folder) == artifacts(finished[0])


# --- whose folder ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"n_test": 4},
        {"coefficients": (0.3,)},
        {"model": "elsewhere"},
        {"unit": "unit"},
        {"top_p": 0.9},
        {"prefill": "Okay"},
        {"layers": (4,)},
        {"behaviors": ("backtracking",)},
        {"annotators": ("rules",)},
        {"control_samples": 2},
        {"margins": "text"},
    ],
)
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
    [b"", b"{", b"[]", b"null", b"{}", b"\xff\xfe", b'{"config": {"unit": "unit", "coefficients": 3}}',
     b'{"config": {"unit": "unit", "coefficients": [], "x": 1}}',
     b'{"config": {"unit": "unit", "coefficients": [0.2]}, "stages": 7}',
     json.dumps({"config": asdict(SMALL), "model": {}, "notes": [], "stages": 7}).encode()],
)  # fmt: skip
def test_a_corrupt_manifest_is_named(data, tmp_path):
    (tmp_path / "run.json").write_bytes(data)
    for config in (SMALL, None):
        with pytest.raises(LensteerError, match=r"run\.json'? (cannot be read|holds no JSON object)"):
            Run.open(tmp_path, config)
    assert (tmp_path / "run.json").read_bytes() == data


def test_a_run_of_the_old_unit_is_refused_by_name(folder):
    """Its coefficients were multiples of the mean activation's length: nothing of it may be taken for a coefficient."""
    values = json.loads((folder / "run.json").read_text())
    del values["config"]["unit"], values[SEAL]  # it wrote none
    values["lensteer"] = "0.0.7"
    (folder / "run.json").write_text(json.dumps(values))
    before = (folder / "run.json").read_bytes()
    for config in (SMALL, None):
        with pytest.raises(
            LensteerError, match=r"begun by lensteer 0\.0\.7.*mean activation's length: begin a new run"
        ):
            Run.open(folder, config)
    assert (folder / "run.json").read_bytes() == before


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
        ({"n_dev": 0}, "n_dev=0"),
        ({"n_dev": 1}, "n_dev=1: give a number from 2"),
        ({"n_test": 1}, "n_test=1: give a number from 2"),
        ({"n_train": 0}, "n=0"),
        ({"n_controls": -1}, "n_controls=-1"),
        ({"control_samples": 0}, "control_samples=0"),
        ({"coefficients": ()}, "coefficients"),
        ({"coefficients": (0.5, 0.0)}, r"coefficients \[0.5, 0.0\]"),
        ({"unit": "furlong"}, "no unit 'furlong'.*'difference'"),
        ({"margins": "wide"}, "no margins 'wide'"),
        ({"behaviors": ("daydreaming",)}, "daydreaming"),
        ({"behaviors": ()}, "at least one behavior"),
        ({"layers": (3, 4)}, r"layers \[3, 4\].*one for each"),
        ({"annotators": ("rules", "rules")}, "give each once"),
        ({"annotators": ("oracle",)}, "no annotator 'oracle'"),
        ({"annotators": ("classifier",)}, "without chains to fit it on"),
        ({"chains": ("none.jsonl",)}, "no file 'none.jsonl'"),
        ({"classifier": "none"}, r"\['grammar'\] with classifier='none'"),
        ({"top_p": 0.0}, "top_p=0.0"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"temperature": -1.0}, "temperature -1.0"),
    ],
)
def test_impossible_settings_are_refused_before_anything_is_written(change, words, tmp_path):
    with pytest.raises(LensteerError, match=words):
        Run.open(tmp_path / "run", replace(SMALL, **change))
    assert list(tmp_path.iterdir()) == []


def test_a_layer_that_the_model_lacks_leaves_no_folder(tmp_path):
    run = Run.open(tmp_path / "run", replace(SMALL, layers=(99,)))
    with pytest.raises(LensteerError, match="no layer 99: this model has layers 0 to 7"):
        run_stage(run, "traces")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("name", "edit", "stage", "words"),
    [
        ("annotated.jsonl", lambda row: row | {"spans": []}, "vectors", r"annotated\.jsonl.* no trace has a span"),
        ("plan.json", lambda row: row | {"tokens_per_second": 0}, "select", r"plan\.json .*0 tokens per second"),
        ("layers.json", lambda row: row | {"layers": {}, "why": {}}, "report", r"layers\.json has no layer"),
    ],
)
def test_an_edited_artifact_stops_the_next_stage_by_name(folder, name, edit, stage, words):
    path = folder / name
    rows = [json.loads(line) for line in path.read_text().splitlines()] if name.endswith("l") else [read_json(path)]
    rows = [edit({key: value for key, value in row.items() if key != SEAL}) for row in rows]
    path.write_text("\n".join(map(json.dumps, rows)))
    run = Run.open(folder)
    for later in list(STAGES)[list(STAGES).index(stage) :]:
        del run.stages[later]
    with pytest.raises(LensteerError, match=words):
        run_stage(run, stage)


@pytest.mark.parametrize(
    ("text", "words"),
    [("", "is empty"), ("{}\nnot JSON\n", "line 1"), ('{"id": "a", "category": "c", "split": "train", "prompt": "?"}\n',
                                                     "no task of split 'dev'")],
)  # fmt: skip
def test_bad_task_files_are_refused_before_anything_is_written(text, words, tmp_path):
    tasks = tmp_path / "tasks.jsonl"
    tasks.write_text(text)
    with pytest.raises(LensteerError, match=words):
        Run.open(tmp_path / "run", replace(SMALL, tasks=str(tasks), n_train=1))
    assert not (tmp_path / "run").exists()


def test_fewer_tasks_than_asked_for_are_refused_before_anything_is_written(tmp_path):
    """Using only what exists would silently run a smaller experiment than requested."""
    tasks, rows = tmp_path / "tasks.jsonl", []
    for split, n in (("train", 5), ("dev", 4), ("test", 2)):
        rows += [dict(id=f"{split}-{i}", category="c", split=split, prompt=f"{split} {i}?") for i in range(n)]
    tasks.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = replace(SMALL, tasks=str(tasks), annotators=("rules",), n_train=5, n_dev=4, n_test=3)
    with pytest.raises(LensteerError, match=r"3 tasks of split 'test'.*which has 2: ask for --n-test 2"):
        Run.open(tmp_path / "run", config)
    with pytest.raises(LensteerError, match=r"6 tasks of split 'train'.*has 5"):
        Run.open(tmp_path / "run", replace(config, n_test=2, n_train=6))
    assert not (tmp_path / "run").exists()
    assert len(Run.open(tmp_path / "run", replace(config, n_test=2)).tasks("test")) == 2


def test_a_mistyped_model_leaves_the_folder_free(tmp_path):
    run = Run.open(tmp_path / "run", replace(SMALL, model=str(tmp_path / "none")))
    with pytest.raises(LensteerError, match=r"there is no .*none.: give a GGUF file, the folder of a checkpoint"):
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

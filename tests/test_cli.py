"""The command line: what it offers, and that what a user can mend is one line."""

from __future__ import annotations

import importlib.metadata
import json
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from lensteer import cli
from lensteer.pipeline import DEMO, STAGES, Run, RunConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def lensteer(monkeypatch, capsys):
    """Call the command line in this process: exit code, what went to stdout and what to stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lensteer", *map(str, words)])
        monkeypatch.setenv("TERM", "dumb")
        capsys.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as stop:
            code = stop.code or 0
        out, err = capsys.readouterr()
        assert "Traceback" not in out + err
        return code, out, err

    return call


def faked(monkeypatch):
    """Stages that only say that they were called."""
    calls = []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda run, name=name: calls.append((name, run)) or {})
    return calls


def test_help_names_every_command(lensteer):
    code, out, _ = lensteer("--help")
    assert code == 0
    for name in ("demo", "run", *STAGES):
        assert re.search(rf"\b{name}\b", out)
        code, text, _ = lensteer(name, "--help")
        assert code == 0
        assert "--out" in text


def test_the_module_and_the_script_are_the_command_line():
    done = subprocess.run(
        [sys.executable, "-m", "lensteer", "--help"], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0
    assert "demo" in done.stdout
    assert "Traceback" not in done.stderr
    (script,) = [e for e in importlib.metadata.entry_points(group="console_scripts") if e.name == "lensteer"]
    assert script.load() is cli.main


@pytest.mark.parametrize("words", [["nonsense"], ["run"], ["run", "--out"], ["demo", "--nonsense"], ["traces", "x"]])
def test_a_command_that_is_not_there_is_no_traceback(words, lensteer):
    code, out, err = lensteer(*words)
    assert code == 2
    assert "Error" in err or "error" in err
    assert out == ""


def test_demo_and_run_do_every_stage_and_say_where_the_report_is(lensteer, monkeypatch, tmp_path):
    calls = faked(monkeypatch)
    code, out, _ = lensteer("demo", "--out", tmp_path / "demo")
    assert code == 0
    assert [name for name, _ in calls] == list(STAGES)
    assert calls[0][1].config == DEMO
    for name in ("report.html", "summary.json"):
        assert str((tmp_path / "demo" / name).resolve()) in out
    code, out, _ = lensteer("demo", "--out", tmp_path / "demo")
    assert out.count("done already") == len(STAGES) == len(calls)


def test_options_reach_the_run(lensteer, monkeypatch, tmp_path):
    calls = faked(monkeypatch)
    lensteer("run", "--out", tmp_path / "a")
    assert calls[-1][1].config == RunConfig()
    options = ["--model", "some/model", "--window", "span", "--negatives", "all", "--scope", "generated", "--seed", "7"]
    for number, command in enumerate(("run", "traces")):
        code, _, _ = lensteer(command, "--out", tmp_path / f"b{number}", "--small", *options)
        assert code == 0
        config = calls[-1][1].config
        assert (config.model, config.window, config.negatives) == ("some/model", "span", "all")
        assert (config.scope, config.seed, config.n_train) == ("generated", 7, DEMO.n_train)
        assert config.tasks == "builtin"  # the organism's are of no use to another model
    lensteer("run", "--out", tmp_path / "c", *options, "--tasks", "organism")
    assert calls[-1][1].config.tasks == "organism"


def test_a_stage_a_command_makes_the_same_run(lensteer, monkeypatch, tmp_path):
    calls = faked(monkeypatch)
    for number, name in enumerate(STAGES):
        code, out, _ = lensteer(name, "--out", tmp_path / "run")
        assert code == 0
        assert len(calls) == number + 1
        assert calls[-1][0] == name
    assert "report.html" in out
    assert list(Run.open(tmp_path / "run", RunConfig()).stages) == list(STAGES)
    lensteer("vectors", "--out", tmp_path / "run")
    assert len(calls) == len(STAGES)


def one_line(result, *words):
    code, _, err = result
    assert code == 1
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    for word in words:
        assert str(word) in err


def test_mistakes_are_one_line_and_leave_nothing(lensteer, monkeypatch, tmp_path):
    out = tmp_path / "run"
    empty = tmp_path / "empty.jsonl"
    empty.write_text("")
    one_line(lensteer("vectors", "--out", out), out, "no run")
    one_line(lensteer("run", "--out", out, "--scope", "nowhere"), "nowhere", "thinking")
    one_line(lensteer("run", "--out", out, "--window", "sideways"), "sideways")
    one_line(lensteer("traces", "--out", out, "--negatives", "nothing"), "nothing")
    one_line(lensteer("run", "--out", out, "--tasks", tmp_path / "none.jsonl"), "none.jsonl")
    one_line(lensteer("run", "--out", out, "--tasks", empty), "empty")
    one_line(lensteer("run", "--out", empty), empty, "no run")
    assert not out.exists()


@pytest.mark.parametrize("name", ["none/such", "no such name"])
def test_an_unknown_model_is_one_line(name, lensteer, tmp_path):
    code, _, err = lensteer("run", "--out", tmp_path / "run", "--model", name)
    assert code == 1
    assert f"error: cannot load model {name!r}" in err.splitlines()[-1]
    assert not (tmp_path / "run").exists()


def test_folders_of_others_are_one_line(lensteer, monkeypatch, tmp_path):
    faked(monkeypatch)
    lensteer("traces", "--out", tmp_path / "run")
    one_line(lensteer("run", "--out", tmp_path / "run", "--seed", 1), "another run", "'seed': 0")
    one_line(lensteer("demo", "--out", tmp_path / "run"), "another run", "n_train")
    one_line(lensteer("report", "--out", tmp_path / "run"), "needs", "annotate", "evaluate")
    one_line(lensteer("run", "--out", tmp_path), "no run of lensteer")
    (tmp_path / "run" / "run.json").write_text("{")
    one_line(lensteer("annotate", "--out", tmp_path / "run"), "run.json", "cannot be read")


def test_what_the_disk_refuses_is_one_line(lensteer, monkeypatch, tmp_path):
    def full(run):
        raise OSError(28, "No space left on device")

    monkeypatch.setitem(STAGES, "traces", full)
    one_line(lensteer("demo", "--out", tmp_path / "run"), "No space left")


def test_ctrl_c_says_how_to_go_on(lensteer, monkeypatch, tmp_path):
    calls = faked(monkeypatch)
    monkeypatch.setitem(STAGES, "vectors", lambda run: signal.raise_signal(signal.SIGINT))
    code, _, err = lensteer("demo", "--out", tmp_path / "run")
    assert code == 130
    assert err.strip() == "stopped; the same command goes on from here"
    assert [name for name, _ in calls] == ["traces", "annotate"]
    monkeypatch.setitem(STAGES, "vectors", lambda run: calls.append(("vectors", run)) or {})
    assert lensteer("demo", "--out", tmp_path / "run")[0] == 0
    assert [name for name, _ in calls] == list(STAGES)
    assert list(json.loads((tmp_path / "run" / "run.json").read_text())["stages"]) == list(STAGES)


def test_an_error_of_our_own_keeps_its_traceback(monkeypatch, tmp_path):
    def broken(run):
        raise RuntimeError("ours")

    monkeypatch.setitem(STAGES, "traces", broken)
    monkeypatch.setattr(sys, "argv", ["lensteer", "demo", "--out", str(tmp_path / "run")])
    with pytest.raises(RuntimeError, match="ours"):
        cli.main()

"""The command line: what it offers, and that what a user can mend is one line."""

from __future__ import annotations

import importlib.metadata
import json
import os
import re
import signal
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest

from lensteer import cli
from lensteer.cli import commands
from lensteer.pipeline import DEMO, DEMO_REAL, ORGANISM, STAGES, Run, RunConfig

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def lensteer(monkeypatch, capsys):
    """Call the command line in this process: exit code, what went to stdout and what to stderr."""

    def call(*words):
        monkeypatch.setattr(sys, "argv", ["lensteer", *map(str, words)])
        monkeypatch.setenv("TERM", "dumb")
        capsys.readouterr()
        code: str | int = 0
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


@pytest.mark.medium
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


#: Every option of a run with a value of its own: words, and what they are in the config.
OPTIONS = {
    "--behaviors": ("backtracking, adding-knowledge", "behaviors", ("backtracking", "adding-knowledge")),
    "--layers": ("3,5", "layers", (3, 5)),
    "--window": ("onset", "window", "onset"),
    "--negatives": ("rest", "negatives", "rest"),
    "--scope": ("everywhere_but_first", "scope", "everywhere_but_first"),
    "--unit": ("mean_norm", "unit", "mean_norm"),
    "--coefficients": ("0.25,1", "coefficients", (0.25, 1.0)),
    "--temperature": ("0.6", "temperature", 0.6),
    "--top-p": ("0.95", "top_p", 0.95),
    "--prefill": ("Okay, ", "prefill", "Okay, "),
    "--system": ("Be brief.", "system", "Be brief."),
    "--n-train": ("11", "n_train", 11),
    "--n-dev": ("12", "n_dev", 12),
    "--n-test": ("13", "n_test", 13),
    "--n-samples": ("5", "n_samples", 5),
    "--control-samples": ("3", "control_samples", 3),
    "--n-controls": ("4", "n_controls", 4),
    "--n-score-controls": ("6", "n_score_controls", 6),
    "--train-tokens": ("77", "train_tokens", 77),
    "--max-new-tokens": ("88", "max_new_tokens", 88),
    "--batch-size": ("9", "batch_size", 9),
    "--seed": ("7", "seed", 7),
    "--dtype": ("bfloat16", "dtype", "bfloat16"),
    "--device": ("cpu", "device", "cpu"),
    "--device-map": ("auto", "device_map", "auto"),
    "--revision": ("main", "revision", "main"),
    "--thought": ("[THINK]", "thought", "[THINK]"),
    "--template": ("chat.jinja", "template", "chat.jinja"),
}
FLAGS = {"--kl-controls": "kl_controls", "--coherence": "coherence"}


@pytest.mark.medium
@pytest.mark.parametrize("command", ["run", "traces"])
def test_options_reach_the_run(command, lensteer, monkeypatch, tmp_path):
    calls = faked(monkeypatch)
    monkeypatch.setenv("LENSTEER_JUDGE_MODEL", "some-judge")  # of --coherence
    words = [word for option, (text, _, _) in OPTIONS.items() for word in (option, text)]
    cases: list[tuple[list[str], RunConfig, dict[str, Any]]] = [
        ([], ORGANISM, {"model": None}),
        (["--small"], DEMO, {"model": None}),
        (["--model", "some/model"], RunConfig(), {"model": "some/model"}),
        (["--small", "--model", "some/model"], DEMO_REAL, {"model": "some/model"}),
        (["--model", "some/model", "--tasks", "organism"], ORGANISM, {"model": "some/model"}),
    ]
    for options, base, what in cases:
        plain, full = (tmp_path / f"{len(calls)}-{kind}" for kind in ("plain", "full"))
        code, _, err = lensteer(command, "--out", plain, *options)
        assert code == 0, err
        assert calls[-1][1].config == replace(base, **what)  # no option of its own changes anything
        code, _, err = lensteer(command, "--out", full, *options, *words, *FLAGS)
        assert code == 0, err
        expected: dict[str, Any] = {name: value for _, name, value in OPTIONS.values()}
        expected |= dict.fromkeys(FLAGS.values(), True)
        assert calls[-1][1].config == replace(base, **what, **expected)
    known = {f.name for f in fields(RunConfig)}
    given = {"model", "tasks", "chains", "pairs", "pair_format", "annotators", "measure", "classifier"}
    given |= {*(name for _, name, _ in OPTIONS.values()), *FLAGS.values()}
    assert known - given == {"dev_samples", "max_spans", "score_chains", "score_coefficient", "margins", "quality"}


def test_options_that_are_given_several_times(lensteer, monkeypatch, tmp_path):
    calls = faked(monkeypatch)
    files = [tmp_path / name for name in ("a.jsonl", "b.jsonl")]
    for file in files:
        file.touch()
    words = ["--chains", files[0], "--chains", files[1], "--annotator", "rules", "--annotator", "classifier"]
    assert lensteer("run", "--out", tmp_path / "run", "--model", "some/model", *words)[0] == 0
    config = calls[-1][1].config
    assert config.chains == tuple(map(str, files))
    assert config.annotators == ("rules", "classifier")


def test_help_names_the_defaults_of_both_kinds_of_model(lensteer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    text = re.sub(r"\W+", " ", lensteer("run", "--help")[1])
    sizes = [config.n_samples for config in (RunConfig(), DEMO_REAL, ORGANISM, DEMO)]
    words = "n_samples default {} small {} organism {} small {}".format(*sizes)
    assert words.removeprefix("n_samples ") in text


def test_the_demo_on_a_model_of_ones_own(lensteer, monkeypatch, tmp_path):
    calls, chains = faked(monkeypatch), tmp_path / "chains.jsonl"
    chains.write_text('{"text": "Hmm."}\n')
    code, _, err = lensteer("demo", "--out", tmp_path / "a", "--model", "some/model", "--chains", chains)
    assert code == 0, err
    assert calls[-1][1].config == replace(DEMO_REAL, model="some/model", chains=(str(chains),))
    one_line(lensteer("demo", "--out", tmp_path / "b", "--chains", chains), "--chains without --model")


def test_a_stage_a_command_makes_the_same_run(lensteer, monkeypatch, tmp_path):
    calls = faked(monkeypatch)
    for number, name in enumerate(STAGES):
        code, out, _ = lensteer(name, "--out", tmp_path / "run")
        assert code == 0
        assert len(calls) == number + 1
        assert calls[-1][0] == name
    assert "report.html" in out
    assert list(Run.open(tmp_path / "run", ORGANISM).stages) == list(STAGES)
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
    one_line(lensteer("run", "--out", out, "--coefficients", "1,two"), "'1,two'", "0.5,1,2")
    one_line(lensteer("run", "--out", out, "--coefficients", "1,-2"), "[1.0, -2.0]", "positive")
    one_line(lensteer("run", "--out", out, "--layers", "3,x"), "'3,x'", "whole numbers")
    one_line(lensteer("run", "--out", out, "--layers", "3,4"), "[3, 4]", "one for each")
    one_line(lensteer("run", "--out", out, "--behaviors", "daydreaming"), "daydreaming", "backtracking")
    one_line(lensteer("run", "--out", out, "--n-dev", 101), "101 tasks of split 'dev'", "--n-dev 100")
    one_line(lensteer("run", "--out", out, "--n-test", 1), "n_test=1")
    one_line(lensteer("run", "--out", out, "--top-p", 0), "top_p=0")
    one_line(lensteer("run", "--out", out, "--unit", "furlong"), "'furlong'", "difference")
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
    assert err.strip() == "stopped; the same command resumes from here"
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


@pytest.mark.parametrize("command", ["run", "traces"])
def test_help_says_what_the_judge_needs_and_costs(command, lensteer, monkeypatch):
    monkeypatch.setenv("COLUMNS", "300")
    text = " ".join(re.sub(r"[│╭╮╰╯─]", " ", lensteer(command, "--help")[1]).split())
    for word in (
        "LENSTEER_JUDGE_MODEL",
        "LENSTEER_JUDGE_URL",
        "LENSTEER_JUDGE_KEY",
        "extra `judge`",
        "costs thousands",
    ):
        assert word in text


def test_a_judge_without_a_model_is_refused_before_any_work(lensteer, monkeypatch, tmp_path):
    for name in ("LENSTEER_JUDGE_MODEL", "LENSTEER_JUDGE_URL", "OPENAI_BASE_URL"):
        monkeypatch.delenv(name, raising=False)
    words = ("--model", "some/model", "--annotator", "rules", "--annotator", "judge")
    one_line(lensteer("run", "--out", tmp_path / "run", *words), "no model for the judge", "LENSTEER_JUDGE_MODEL")
    assert not (tmp_path / "run").exists()


def every_command(command, name=""):
    for word, inner in getattr(command, "commands", {}).items():
        yield from every_command(inner, f"{name} {word}")
    if name:
        yield name.strip(), command


def test_the_list_of_commands_is_what_they_are():
    from typer.main import get_group

    whole = get_group(commands.app).commands
    assert {name: command.get_short_help_str(200) for name, command in whole.items()} == cli.COMMANDS


def test_version(lensteer):
    assert lensteer("--version") == (0, f"lensteer {importlib.metadata.version('lensteer')}\n", "")


@pytest.mark.parametrize(
    ("words", "found"),
    [("lensteer tr", {"traces"}), ("lensteer d", {"demo", "directions", "doctor"}), ("lensteer x", set())],
)
def test_a_shell_completes_commands_without_importing_them(words, found):
    code = "import sys; from lensteer import cli\ntry:\n    cli.main()\nfinally:\n    print('torch' in sys.modules)"
    asked = dict(_LENSTEER_COMPLETE="complete_bash", COMP_WORDS=words, COMP_CWORD="1")
    run = subprocess.run(
        [sys.executable, "-c", f"import sys; sys.argv = ['lensteer']; {code}"],
        capture_output=True, text=True, env=os.environ | asked, cwd=ROOT, timeout=120,
    )  # fmt: skip
    *completed, heavy = run.stdout.split()
    assert (set(completed), heavy) == (found, "False")


def test_every_option_has_a_help_text_that_leaves_its_default_to_the_brackets():
    from typer.main import get_command

    for name, command in every_command(get_command(commands.app)):
        for option in command.params:
            if option.name == "help" or option.param_type_name == "argument":
                continue
            text = option.help or ""
            assert text.endswith("."), (name, option.name)
            assert "default" not in text.lower(), (name, option.name)  # it stands in brackets, in one form

"""The README's commands, code and links work."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
#: Runs on a task file of ours, each with what follows the command's name; lines may end in a backslash.
OWN_RUNS = re.findall(r"^lensteer run (--out \S+ .*--tasks analyses/(?:.*\\\n)*.*)$", README, re.MULTILINE)


def test_the_two_commands_open_the_readme():
    language, text = BLOCKS[0]
    assert language == "bash"
    targets = re.findall(r"^make (\w+)", text, re.MULTILINE)
    assert targets == ["demo", "test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in targets)


@pytest.mark.slow
def test_the_ten_lines_run(capsys):
    ten, *more = [text for language, text in BLOCKS if language == "python" and "smol" not in text]
    assert len([line for line in ten.splitlines() if line.strip()]) <= 11
    names = {}
    for code in (ten, *more):  # what comes later builds on it
        exec(compile(re.sub(r"n=\d+", "n=12", code), "README.md", "exec"), names)
    assert "layer" in capsys.readouterr().out


@pytest.mark.slow
def test_a_behavior_of_ones_own_runs_from_pairs_to_a_measured_effect(real_model):
    model = real_model("smollm2")
    (code,) = [text for language, text in BLOCKS if language == "python" and "smol" in text]
    assert len([line for line in code.splitlines() if line.strip()]) <= 12
    assert code.count('ls.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")') == 1
    code = code.replace('ls.load_model("HuggingFaceTB/SmolLM2-135M-Instruct")', "given")
    names = {"given": model, "ls": __import__("lensteer")}
    exec(compile(code, "README.md", "exec"), names)
    found = names["found"]
    assert found.unit == "score"
    assert found.effect("politeness", "up").change.value > found.effect("politeness", "down").change.value


@pytest.mark.parametrize("options", OWN_RUNS)
def test_runs_on_behaviors_of_ones_own_are_accepted(options, monkeypatch, tmp_path):
    """Up to the first stage, which would load the model."""
    from typer.testing import CliRunner

    from lensteer.cli import app
    from lensteer.pipeline import STAGES

    begun = []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda run: begun.append(run.config) or {})
    words = options.replace("\\\n", " ").split()
    words[words.index("--out") + 1] = str(tmp_path / "run")
    monkeypatch.chdir(ROOT)
    result = CliRunner().invoke(app, ["run", *words])
    assert result.exit_code == 0, result.output
    assert len(begun) == len(STAGES)
    assert begun[0].measure or begun[0].annotators


def test_both_kinds_of_such_runs_are_there():
    assert ["--pairs" in options for options in OWN_RUNS] == [True, False]


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`lensteer (\w+)", README))))
def test_commands_exist(command):
    from typer.testing import CliRunner

    from lensteer.cli import app

    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()

"""The README's commands, code and links work."""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pytest

from test_real_runs import SMALL, write_chains

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"```(\w+)\n(.*?)```", README, re.DOTALL)
#: Runs on a task file of ours, each with what follows the command's name; lines may end in a backslash.
OWN_RUNS = re.findall(r"^lensteer run (--out \S+ .*--tasks analyses/(?:.*\\\n)*.*)$", README, re.MULTILINE)
#: Every call of the command line as words, in order.
COMMANDS = [
    shlex.split(line, comments=True)[1:]
    for language, text in BLOCKS
    if language == "bash"
    for line in text.replace("\\\n", " ").splitlines()
    if line.startswith("lensteer ")
]
R1 = "deepseek-ai/DeepSeek-R1-Distill-Qwen-1.5B"
R1_COMMANDS = [words for words in COMMANDS if R1 in words or "annotated.jsonl" in words]


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


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """An otherwise empty folder with the files that the README takes for granted, to be called in."""
    write_chains(tmp_path / "annotated.jsonl")
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(1319)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    shutil.copytree(ROOT / "analyses", tmp_path / "analyses", ignore=shutil.ignore_patterns("figures", "results"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def called(words):
    from typer.testing import CliRunner

    from lensteer.cli import app

    result = CliRunner().invoke(app, words)
    assert result.exit_code == 0, (words, result.output)
    return result.output


@pytest.mark.medium
def test_all_commands_are_accepted_in_their_order_in_one_folder(folder, monkeypatch):
    """Stages are not run. Two runs with different settings and one --out would be refused."""
    from lensteer.pipeline import STAGES

    begun, edits = [], []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda run: begun.append(run) or {})
    for name in ("cache_fit", "cache_run"):
        monkeypatch.setattr(f"lensteer.cli.cache.{name}", lambda config, out, say: edits.append(config))
    monkeypatch.setattr("lensteer.cli.cache.render_report", lambda run: {})
    for words in COMMANDS:
        called(words)
    runs = list(dict.fromkeys(run.folder for run in begun))
    assert runs == [Path(name) for name in ("lensteer-demo", "r1", "r1-own", "r1-gsm8k", "polite", "advice")]
    assert len(begun) == len(runs) * len(STAGES)  # none was 'done already'
    assert len(edits) == 2
    by_name = {run.folder.name: run for run in begun}
    assert by_name["r1"].annotators == ("classifier", "rules")
    assert by_name["r1-own"].config.chains == ()


@pytest.mark.slow
def test_the_commands_for_a_model_of_ones_own_run_as_written(folder, tiny_checkpoint):
    """In their order, in one folder, at small sizes: on mini-R1 where the model's own chains are used, else random."""
    real = Path(os.environ.get("LENSTEER_REAL") or "none") / "mini-r1"
    if not real.is_dir():
        pytest.skip("LENSTEER_REAL has no mini-r1")
    assert [words[0] for words in R1_COMMANDS] == ["run", "annotate", "run", "run"]
    for words in R1_COMMANDS:
        checkpoint = tiny_checkpoint("qwen2", opens_thinking=True) if "--chains" in words else real
        small = [*SMALL, "--n-controls", "1", "--n-score-controls", "0"]
        small = small if words[0] == "run" else []
        output = called([str(checkpoint) if word == R1 else word for word in words] + small)
    assert "tasks: 'gsm8k.jsonl' is read as GSM8K" in output
    summaries = {}
    for name in ("r1", "r1-own", "r1-gsm8k"):
        summaries[name] = json.loads((folder / name / "summary.json").read_text())
        assert summaries[name]["annotator.name"] == "classifier"
    against = {name: found["annotator.against"] for name, found in summaries.items()}
    assert against["r1"] == against["r1-gsm8k"] == "labels of questions that it was not fitted on, in turn"
    assert against["r1-own"] == "annotated chains that it was not fitted on, in turn"
    chains = (folder / "r1-own" / "traces.jsonl").read_text().splitlines()
    assert len(chains) == 4  # --n-train: generated, not given
    assert "Put the final answer after" in (folder / "r1-gsm8k" / "run.json").read_text()


@pytest.mark.parametrize("command", sorted(set(re.findall(r"`lensteer (\w+)", README))))
def test_commands_exist(command):
    from typer.testing import CliRunner

    from lensteer.cli import app

    assert CliRunner().invoke(app, [command, "--help"]).exit_code == 0


@pytest.mark.parametrize("link", re.findall(r"\]\((?!http)([^)]+)\)", README))
def test_links_lead_somewhere(link):
    assert (ROOT / link).exists()


def test_the_tables_of_what_to_choose_are_in_the_results():
    text = (ROOT / "docs" / "choices.md").read_text(encoding="utf-8")
    found = json.loads((ROOT / "analyses" / "results" / "mini_r1_choices.json").read_text(encoding="utf-8"))
    names = {"onset±3 − spans": "onset3-spans", "exact KL, coefficient .1": "exact at 0.1", "Fisher": "fisher"}
    means = {row["recipe"]: row for row in found["means"] if row["scope"] == "generated"}
    scores = {row["score"]: row for row in found["scores"]}
    checked = 0
    for line in text.splitlines():
        name, *cells = (cell.strip().replace("*", "") for cell in line.strip("| ").split("|"))
        bare = names.get(name, name.split(" (")[0].replace(" − ", "-"))
        row, fields = (
            (means[bare], ("change", "rules", "masked"))
            if bare in means
            else (scores.get(bare, {}), ("spearman", "regret", "ahead"))
        )
        for field, cell in zip(fields if row else (), cells, strict=False):
            numbers = [float(n.replace("−", "-")) for n in re.findall(r"[−+]?\.\d+", cell)]
            truth = [row[field], row[f"{field}_low"], row[f"{field}_high"]]
            assert numbers == pytest.approx(truth[: len(numbers)], abs=0.0051 if field == "spearman" else 0.0006), line
            checked += len(numbers)
    assert checked > 40

"""`ls.benchmark` and `lensteer benchmark`: counts, left-out tasks, resuming, and what is refused."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from typer.testing import CliRunner

import lensteer as ls
from lensteer.cli import app

pytestmark = pytest.mark.medium  # answers of the organism


def call(*words, code=0):
    result = CliRunner().invoke(app, ["benchmark", *map(str, words)])
    assert result.exit_code == code, result.output
    return result.output


@pytest.fixture(scope="module")
def plan(random_direction):
    def make(model, coefficient=1.0):
        return ls.SteeringPlan(random_direction(model, 3, 12.0), 3, coefficient, ls.generated)

    return make


@pytest.fixture(scope="module")
def tasks():
    return ls.load_tasks("organism", split="test", n=10)


def test_counts_agree_with_the_answers_themselves(organism, plan, tasks):
    steered = plan(organism, 20.0)
    found = ls.benchmark(organism, tasks, {"pushed": steered}, ls.Sampling(temperature=0.0, max_new_tokens=400))
    assert [c.condition for c in found.modes.conditions] == ["unsteered", "pushed"]
    for name, own in (("unsteered", None), ("pushed", steered)):
        traces = ls.generate_traces(organism, tasks, max_new_tokens=400, plans=[own] * len(tasks))
        right, read = sum(t.correct for t in traces), sum(t.answer is not None for t in traces)
        ended = sum(t.finished for t in traces)
        wanted = dict(right=right, wrong=read - right, unread=10 - read, truncated=10 - ended)
        assert found.counts(name) == wanted
        assert found[name].length.value == sum(len(t.response_ids) for t in traces) / 10
    worse = found["pushed"].changes["accuracy"].value
    assert worse == found["pushed"].accuracy.value - found["unsteered"].accuracy.value
    assert worse < 0  # the plan is one that breaks answers, so that counts differ
    rows = found.to_dataframe().set_index("condition")
    assert rows.loc["pushed", "accuracy_change"] == worse
    assert rows.loc["pushed", "truncated"] > rows.loc["unsteered", "truncated"]
    assert "of 10 right" in str(found)
    assert len(found.plot().data) == 6  # a panel for right, read and ended answers


def test_a_coefficient_of_zero_changes_nothing(organism, plan, tasks):
    found = ls.benchmark(organism, tasks[:4], {"nothing": plan(organism, 0.0)})
    assert found.counts("nothing") == found.counts("unsteered")
    assert found["nothing"].changes["length"].value == 0
    assert found["nothing"].p["accuracy"] == 1


def test_tasks_without_an_answer_are_left_out_and_counted(organism, plan, tasks):
    open_ended = [ls.Task("open", "essay", "test", "Describe a garden."), replace(tasks[9], id="ungraded", grader=None)]
    asked = [*tasks[:3], *open_ended]
    found = ls.benchmark(organism, asked, {}, ls.Sampling(temperature=0.0, max_new_tokens=20))
    assert (found.modes.n_tasks, found.n_left_out, found.n_answers) == (3, 2, 3)
    assert "left out: 2 without a definite answer" in str(found)
    with pytest.raises(ls.LensteerError, match="1 of 3 tasks have an answer"):
        ls.benchmark(organism, [tasks[0], *open_ended], {})


def test_a_plan_may_not_be_named_unsteered(organism, plan, tasks):
    with pytest.raises(ls.LensteerError, match="'unsteered', which is the model without a plan"):
        ls.benchmark(organism, tasks, {"unsteered": plan(organism)})


def test_the_command_writes_figures_and_resumes(organism, plan, tmp_path):
    for name, coefficient in (("weak", 0.0), ("strong", 6.0)):
        ls.export.folder(plan(organism, coefficient), tmp_path / name, model=organism)
    words = ["--plan", tmp_path / "weak", "--plan", tmp_path / "strong", "--out", tmp_path / "out", "--n-tasks", 4]
    words += ["--max-new-tokens", 60]
    told = call(*words)
    assert "3 conditions × 4 tasks × 1, at most 60 tokens" in told
    found = ls.Benchmark.load(tmp_path / "out" / "benchmark.json")
    assert [c.condition for c in found.modes.conditions] == ["unsteered", "weak", "strong"]
    assert found.counts("weak") == found.counts("unsteered")
    assert found.model.name == "organism"
    lines = (tmp_path / "out" / "answers.jsonl").read_text().splitlines()
    assert len(lines) == 1 + 3 * 4
    (tmp_path / "out" / "answers.jsonl").write_text("\n".join(lines[:5]) + "\n")  # killed after four answers
    call(*words)
    assert ls.Benchmark.load(tmp_path / "out" / "benchmark.json") == found
    assert sorted((tmp_path / "out" / "answers.jsonl").read_text().splitlines()) == sorted(lines)
    assert "holds another experiment" in call(*words, "--suffix", "Be brief.", code=1)


def test_mistakes_are_one_line(organism, plan, tiny_checkpoint, tmp_path):
    import shutil

    ls.export.folder(plan(organism), tmp_path / "mine", model=organism)
    shutil.copytree(tmp_path / "mine", tmp_path / "copies" / "mine")
    (tmp_path / "odd.jsonl").write_text(json.dumps({"premise": "It rains.", "hypothesis": "It is wet."}) + "\n")
    gsm8k = tmp_path / "gsm8k.jsonl"
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(10)]
    gsm8k.write_text("".join(json.dumps(row) + "\n" for row in rows))
    out = ["--out", tmp_path / "out"]
    for words, said in (
        (["--plan", tmp_path / "none"], "none"),
        (["--plan", tmp_path / "mine", "--tasks", tmp_path / "odd.jsonl"], "which are of no known format"),
        (["--plan", tmp_path / "mine", "--plan", tmp_path / "copies" / "mine"], "two plans have the same name"),
        (["--plan", tmp_path / "mine", "--split", "half"], "no split 'half'"),
        (["--plan", tmp_path / "mine", "--n", 3], "3 greedy samples"),
        (
            ["--plan", tmp_path / "mine", "--model", tiny_checkpoint(), "--tasks", gsm8k],
            "a plan of 'organism'",
        ),
    ):
        assert said in call(*words, *out, code=1).splitlines()[-1], words
    assert not (tmp_path / "out").exists()


def test_gsm8k_as_published_is_read(organism, plan, tmp_path):
    """The organism cannot read it: every answer counts, none is right."""
    ls.export.folder(plan(organism, 0.0), tmp_path / "plan", model=organism)
    rows = [{"question": f"What is {i} + 1?", "answer": f"It is {i + 1}.\n#### {i + 1}"} for i in range(20)]
    (tmp_path / "gsm8k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["--plan", tmp_path / "plan", "--tasks", tmp_path / "gsm8k.jsonl", "--out", tmp_path / "out"]
    told = call(*words, "--split", "all", "--max-new-tokens", 4)
    assert "is read as GSM8K" in told
    found = ls.Benchmark.load(tmp_path / "out" / "benchmark.json")
    assert sum(n for name, n in found.counts("unsteered").items() if name != "truncated") == found.n_answers == 20
    assert found.counts("unsteered")["unread"] == 20
    assert torch.isfinite(torch.tensor(found["plan"].changes["accuracy"].value))

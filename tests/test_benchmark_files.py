"""A file of a public benchmark is tasks: it is recognized, read and split; other files are named with their keys."""

from __future__ import annotations

import random
from collections import Counter

import pytest
from typer.testing import CliRunner

import lensteer as ls
from lensteer.cli import app
from lensteer.errors import LensteerError
from lensteer.pipeline import STAGES, Run, RunConfig, run_stage
from lensteer.tasks import describe_tasks, grade, load_benchmark
from lensteer.tasks.benchmarks import FORMATS
from test_benchmarks_as_tasks import flat, gsm8k, nested, parquet, piqa, write


def math(i: int) -> dict:
    solution = rf"Add them. We get $\boxed{{\frac{{{i + 1}}}{{7}}}}$."
    return {"problem": f"What is {i}/7 + 1/7?", "level": "Level 1", "type": "Algebra", "solution": solution}


def math500(i: int) -> dict:
    return {"problem": f"What is x + {i}?", "solution": "See.", "answer": f"x + {i}", "subject": "Algebra"}


def aime(i: int) -> dict:
    return {"id": i, "problem": f"Find {i}.", "answer": i}


def mmlu(i: int) -> dict:
    return {"question": f"Which is {i}?", "subject": "s", "choices": [f"{i}{k}" for k in "abcd"], "answer": i % 4}


def mmlu_pro(i: int) -> dict:
    options = [f"{i}{k}" for k in range(10)]
    row = {"question_id": i, "question": f"Which is {i}?", "options": options, "category": "law"}
    return row | {"answer": "ABCDEFGHIJ"[i % 10], "answer_index": i % 10}


def commonsense(i: int) -> dict:
    return flat(i, labels="ABCDE", concept="number")


def commonsense_nested(i: int) -> dict:
    row = nested(i, labels="ABCDE")
    return {**row, "question": {**row["question"], "question_concept": "number"}}


#: Every published form: how its file is named, and the answer and grader of record 3.
FORMS = {
    gsm8k: ("GSM8K", "1003", "numeric"),
    math: ("MATH", r"\frac{4}{7}", "numeric"),
    math500: ("MATH", "x + 3", "exact"),
    aime: ("MATH", "3", "numeric"),
    flat: ("ARC", "D", "choice"),
    nested: ("ARC", "D", "choice"),
    commonsense: ("CommonsenseQA", "D", "choice"),
    commonsense_nested: ("CommonsenseQA", "D", "choice"),
    mmlu: ("MMLU", "D", "choice"),
    mmlu_pro: ("MMLU", "D", "choice"),
    piqa: ("PIQA", "B", "choice"),
}


@pytest.mark.parametrize("make", FORMS, ids=lambda make: make.__name__)
def test_every_published_form_is_recognized_read_and_split(make, tmp_path):
    path = write(tmp_path / "file.jsonl", map(make, range(50)))
    title, answer, grader = FORMS[make]
    how = "30 train, 10 dev, 10 test tasks, by a hash of each question, as it names no splits"
    assert describe_tasks(path) == f"{str(path)!r} is read as {title}: {how}."
    tasks = ls.load_tasks(path)
    assert Counter(task.split for task in tasks) == {"train": 30, "dev": 10, "test": 10}
    assert len({task.id for task in tasks}) == 50
    found = {task.prompt.split("\n")[0]: task for task in tasks}
    row = make(3)
    asked = row.get("problem") or row.get("goal") or row["question"]
    task = found[asked["stem"] if isinstance(asked, dict) else asked]
    assert (task.answer, task.grader) == (answer, grader)
    assert grade(task, f"So the answer is {answer}.") is True
    assert grade(task, "So the answer is 17.5.") is False
    if grader == "choice":
        assert "\n(A) " in task.prompt


def test_what_is_recognized_is_what_is_tested():
    assert {title for title, _, _ in FORMS.values()} == {form.title for form in FORMATS}


def test_a_questions_split_does_not_depend_on_its_place(tmp_path):
    rows = [gsm8k(i) for i in range(100)]
    before = ls.load_tasks(write(tmp_path / "a.jsonl", rows))
    random.Random(0).shuffle(rows)
    after = ls.load_tasks(write(tmp_path / "b.jsonl", rows + rows[:20]))  # some twice
    assert {(t.prompt, t.split) for t in before} == {(t.prompt, t.split) for t in after}
    assert list(dict.fromkeys(t.prompt for t in before)) == list(dict.fromkeys(t.prompt for t in after))


def test_the_first_of_a_split_are_of_all_parts_of_a_file(tmp_path):
    rows = [{**mmlu(i), "question": f"{'easy' if i < 250 else 'hard'} {i}?"} for i in range(500)]
    for split in ("train", "dev", "test"):
        first = ls.load_tasks(write(tmp_path / "a.jsonl", rows), split=split, n=40)
        assert 10 <= sum("easy" in task.prompt for task in first) <= 30


def test_dev_is_that_of_load_benchmark(tmp_path):
    path = write(tmp_path / "test.jsonl", map(gsm8k, range(60)))
    theirs, ours = load_benchmark("gsm8k", path, split="dev"), ls.load_tasks(path, split="dev")
    assert sorted(theirs, key=lambda task: task.id) == sorted(ours, key=lambda task: task.id)


def test_splits_that_records_name_are_kept(tmp_path):
    names = ("train", "train", "validation", "test")
    rows = [{**gsm8k(i), "split": names[i % 4]} for i in range(20)]
    path = write(tmp_path / "a.jsonl", rows)
    tasks = ls.load_tasks(path)
    assert Counter(task.split for task in tasks) == {"train": 10, "dev": 5, "test": 5}
    assert {int(task.answer) % 4 for task in tasks if task.split == "dev"} == {2}
    assert "10 train, 5 dev, 5 test tasks, which its records name." in describe_tasks(path)
    with pytest.raises(LensteerError, match=r"a\.jsonl, line 2 names no split, and others of the file do"):
        ls.load_tasks(write(tmp_path / "a.jsonl", [rows[0], gsm8k(30)]))
    with pytest.raises(LensteerError, match=r"line 2: split 'auxiliary' is none of .*'validation'"):
        ls.load_tasks(write(tmp_path / "a.jsonl", [rows[0], {**gsm8k(30), "split": "auxiliary"}]))


def test_parquet_says_the_same_as_jsonl(tmp_path):
    rows = [mmlu(i) for i in range(20)]
    lines = write(tmp_path / "lines" / "a.jsonl", rows)
    assert ls.load_tasks(parquet(tmp_path / "table" / "a.parquet", rows)) == ls.load_tasks(lines)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"text": "Hi", "n": 3}, r"line 1 has the keys \['n', 'text'\], .*give tasks \(id, category, split, prompt\)"),
        ({"prompt": "How many?", "answer": "3"}, r"has the keys \['answer', 'prompt'\].*GSM8K \(question, answer"),
        ({"question": "How many?"}, r"\['question'\].*PIQA \(goal.*MATH \(problem, and answer or solution\).*MMLU \("),
        (
            {"question": "How many?", "answer": "3"},
            r"\['answer', 'question'\].*answer ending in '#### 18'\)",
        ),
        ({"problem": "How many?", "solution": "Three."}, r"no answer, and its solution has no \\boxed\{…\}: 'Three.'"),
        ({**mmlu(1), "answer": 4}, "answer 4 has to be a letter of ABCD, or a number from 0"),
        ({**mmlu(1), "answer": -1}, "answer -1 has to be a letter"),
        ({**mmlu(1), "answer": "1a"}, "answer '1a' has to be a letter"),
        ({**mmlu(1), "choices": []}, "2 to 26 options"),
        ({"id": "a", "category": "b", "split": "dev"}, r"missing \['prompt'\]"),
    ],
)
def test_a_file_of_neither_kind_is_named_with_its_keys(row, said, tmp_path):
    with pytest.raises(LensteerError, match=said):
        ls.load_tasks(write(tmp_path / "a.jsonl", [row]))


def test_tasks_of_ones_own_and_written_ones_need_no_word():
    assert describe_tasks("organism") is describe_tasks("builtin") is None


@pytest.mark.medium
def test_a_run_on_gsm8k_says_which_questions_it_takes(reference_folder, tiny_checkpoint, tmp_path, monkeypatch):
    path = reference_folder / "gsm8k" / "test.jsonl"
    said: list[str] = []
    config = RunConfig(
        model=str(tiny_checkpoint()), tasks=str(path), n_train=2, n_dev=2, n_test=2, train_tokens=2, batch_size=2
    )
    run = Run.open(tmp_path / "run", config)
    run.announce = said.append
    run_stage(run, "traces")
    words = f"{str(path)!r} is read as GSM8K: 793 train, 263 dev, 263 test tasks, by a hash of each question"
    assert said[0].startswith(f"tasks: {words}")
    assert Run.open(tmp_path / "run").notes[0].startswith(f"Tasks: {words}")
    tasks = {split: {task.prompt for task in ls.load_tasks(path, split=split)} for split in ("train", "dev", "test")}
    assert {len(set.union(*tasks.values())), sum(map(len, tasks.values()))} == {1319}
    asked = [trace.task for trace in ls.load_traces(tmp_path / "run" / "traces.jsonl")]
    assert {task.prompt for task in asked} <= tasks["train"]
    assert all(task.grader == "numeric" for task in asked)


@pytest.mark.parametrize("command", ["run", "traces"])
def test_the_commands_take_a_benchmarks_file(command, tmp_path, monkeypatch):
    begun = []
    for name in STAGES:
        monkeypatch.setitem(STAGES, name, lambda run: begun.append(run) or {})
    path = write(tmp_path / "gsm8k.jsonl", map(gsm8k, range(30)))
    words = ["--out", str(tmp_path / "run"), "--tasks", str(path), "--model", "some/model"]
    result = CliRunner().invoke(app, [command, *words, "--n-train", "18", "--n-dev", "6", "--n-test", "6"])
    assert result.exit_code == 0, result.output
    assert {task.split for task in begun[0].tasks("dev")} == {"dev"}
    result = CliRunner().invoke(app, [command, "--out", str(tmp_path / "b"), *words[2:]])
    assert result.exit_code == 1
    assert "which has 18: ask for --n-train 18" in " ".join(result.output.split())

"""Tasks from the grammar and from files, and grading: forgiving of form, strict of value."""

from __future__ import annotations

import json

import pytest

import lensteer as ls
from lensteer.tasks import Task, final_answer, grade

ROW = {"id": "a", "category": "logic", "split": "dev", "prompt": "How many?", "answer": "42", "grader": "exact"}


def task(answer: str | None = "42", grader: str | None = "exact") -> Task:
    return Task("a", "logic", "dev", "How many?", answer, grader)


def write(path, *rows):
    path.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
    return path


@pytest.mark.parametrize(
    "response",
    [
        "Answer: 42",
        "Answer: 42.<|im_end|>",
        "42 it may be.\n</think>\n\nAnswer:  42 .\n",
        "Answer: 7</think>Answer: 42",
        "the answer is 42.",
        "The final answer is: 42",
        "ANSWER:\n42",
        "**Answer:** 42",
        "**Answer: 42**",
        "**Final answer:**\n\n\\boxed{42}",
        "The answer is $\\boxed{42}$.",
        'Answer: "42"',
        "Answer: 41. No.\nAnswer: 42",
    ],
)
def test_the_form_of_an_answer_is_forgiven(response):
    assert grade(task(), response) is True


@pytest.mark.parametrize(
    "response",
    [
        "Answer: 43",
        "Answer: 4 2",
        "Answer: 42, or 43",
        "Answer: -42",
        "Answer: 420",
        "Answer: 42. Or is it 43?",
        "42",
        "Answer:",
        "",
        "Answer: 42\nAnswer: 43",
        "Answer: 42</think>",
        "Answer: 42</think>I do not know.",
        "My answers are 42",
        "unanswered: 42",
    ],
)
def test_its_value_is_not(response):
    assert grade(task(), response) is False


def test_words_are_compared_without_case_and_spacing():
    assert grade(task("the  Old bridge"), "Answer: The old\tbridge.") is True
    assert grade(task("the old bridge"), "Answer: old bridge") is False


def test_no_definite_answer_is_no_grade():
    assert grade(task(None), "Answer: 42") is None
    assert grade(task(grader=None), "Answer: 42") is None


def test_the_last_answer_counts_and_there_may_be_none():
    assert final_answer("Answer: B.\nNo.\nAnswer: C.<|im_end|>") == "C."
    assert final_answer("I am not sure of this answer.") is None


def test_the_organisms_tasks_come_by_split_and_number():
    dev = ls.load_tasks(split="dev")
    assert len(dev) == 100
    assert {t.split for t in dev} == {"dev"}
    assert ls.load_tasks(split="dev", n=3) == dev[:3]
    assert len(ls.load_tasks()) == 600
    assert ls.load_tasks(split="dev", n=1000) == dev


def test_a_file_of_tasks(tmp_path):
    rows = [ROW, ROW | {"id": "b", "split": "test"}, {k: ROW[k] for k in ("category", "split", "prompt")} | {"id": "c"}]
    rows[1]["prompt"] = "Line\u2028separator, \x85 and naïve 数"
    path = tmp_path / "tasks.jsonl"
    path.write_text("\n" + "\n\n".join(json.dumps(row, ensure_ascii=False) for row in rows) + "\n", encoding="utf-8")
    tasks = ls.load_tasks(path)
    assert [t.id for t in tasks] == ["a", "b", "c"]
    assert tasks[1].prompt == rows[1]["prompt"]
    assert tasks[2].answer is None
    assert [t.to_dict() for t in tasks[:2]] == rows[:2]
    assert ls.load_tasks(str(path), split="test") == tasks[1:2]
    assert ls.load_tasks(path, n=2) == tasks[:2]


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ([], "tasks.jsonl is empty"),
        (["", "  "], "tasks.jsonl is empty"),
        ([ROW, '{"id": "b", '], 'line 2 is not JSON.*\'?{"id": "b", '),
        ([ROW, "[1]"], "line 2 is not a JSON object"),
        ([ROW, ROW], "two tasks have the same id"),
        ([{k: v for k, v in ROW.items() if k != "prompt"}], r"line 1: .*missing \['prompt'\]"),
        ([ROW | {"prompt": 5}], r"line 1: .*missing \['prompt'\]"),
        ([ROW | {"difficulty": 3}], r"unknown \['difficulty'\]"),
        ([ROW | {"answer": 42}], "line 1: answer 42 is no text"),
        ([ROW | {"grader": "vibes"}], "line 1: no grader 'vibes'.*exact"),
        ([ROW | {"grader": ["exact"]}], r"line 1: grader \['exact'\] is no text"),
    ],
)
def test_a_bad_file_is_refused_by_line(rows, words, tmp_path):
    with pytest.raises(ls.LensteerError, match=words):
        ls.load_tasks(write(tmp_path / "tasks.jsonl", *rows))


def test_bytes_that_are_no_text_are_refused_by_line(tmp_path):
    path = tmp_path / "tasks.jsonl"
    path.write_bytes(json.dumps(ROW).encode() + b'\n{"id": "\xff"}\n')
    with pytest.raises(ls.LensteerError, match="line 2 is not JSON"):
        ls.load_tasks(path)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"split": "validation"}, "no split 'validation': choose one of .*'dev'"),
        ({"n": 0}, "n=0"),
        ({"source": "no/such/file.jsonl"}, "no/such/file.jsonl"),
    ],
)
def test_impossible_requests_are_refused(options, words):
    with pytest.raises(ls.LensteerError, match=words):
        ls.load_tasks(**options)


def test_a_split_without_tasks_is_refused(tmp_path):
    with pytest.raises(ls.LensteerError, match="no task of split 'train'"):
        ls.load_tasks(write(tmp_path / "tasks.jsonl", ROW), split="train")

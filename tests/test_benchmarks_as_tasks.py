"""Public benchmarks: every published form is read, splits never meet, corrupt records are named, answers read out."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace
from types import ModuleType
from typing import Any

import pytest

import lensteer as ls
from lensteer import models
from lensteer.cache_steering import Record, contrastive_pairs
from lensteer.cache_steering.pairs import benchmark_records
from lensteer.errors import LensteerError
from lensteer.evaluation.choice import graded, letter, read_out
from lensteer.generation.jobs import generate_traces
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task, grade
from lensteer.tasks.benchmarks import load_benchmark
from lensteer.traces import Trace

NAMES = ("gsm8k", "arc_challenge", "commonsense_qa", "piqa")


def gsm8k(i: int) -> dict:
    steps = f"Ada has {i} + 1000 = <<{i}+1000={i + 1000}>>{i + 1000} beads.\nShe keeps them."
    return {"question": f"Ada has {i} beads and finds 1000. How many has she?", "answer": f"{steps}\n#### 1,{i:03d}"}


def flat(i: int, *, labels: str = "ABCD", concept: str | None = None) -> dict:
    """The hub's form; the right option is number i modulo how many there are."""
    row: dict[str, Any] = {"id": f"q{i}", "question": f"Which one is {i}?", "answerKey": labels[i % len(labels)]}
    row["choices"] = {"text": [f"one of {i}, number {k}" for k in range(len(labels))], "label": list(labels)}
    return row | ({"question_concept": concept} if concept else {})


def nested(i: int, *, labels: str = "ABCD") -> dict:
    """The authors' form of the same question."""
    row = flat(i, labels=labels)
    choices = [dict(zip(("text", "label"), pair, strict=True)) for pair in zip(*row["choices"].values(), strict=True)]
    return {**row, "question": {"stem": row["question"], "choices": choices}, "choices": None}


def piqa(i: int) -> dict:
    return {"goal": f"Open jar {i}.", "sol1": "Turn the lid.", "sol2": "Turn the jar over.", "label": i % 2}


MAKERS = {
    "gsm8k": gsm8k,
    "arc_challenge": flat,
    "commonsense_qa": lambda i: flat(i, labels="ABCDE", concept="number"),
    "piqa": piqa,
}


def write(path, rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def parquet(path, rows):
    pytest.importorskip("pyarrow", reason="parquet needs pyarrow")
    import pandas as pd

    path.parent.mkdir(parents=True, exist_ok=True)
    pd.DataFrame(rows).to_parquet(path)
    return path


def both(name, source):
    return load_benchmark(name, source, split="dev"), load_benchmark(name, source)


def by_prompt(tasks):
    return {task.prompt: task.answer for task in tasks}


def test_gsm8k(tmp_path):
    dev, test = both("gsm8k", write(tmp_path / "test.jsonl", map(gsm8k, range(10))).parent)
    task = next(task for task in dev + test if " 7 " in task.prompt)
    assert task == Task("gsm8k-test-00008", "gsm8k", task.split, gsm8k(7)["question"], "1007", "numeric")
    assert grade(task, "She has 1,007 beads. The answer is 1007.") is True
    assert grade(task, "The answer is 1008.") is False


@pytest.mark.parametrize("labels", ["ABCD", "1234", "ABC", "12345"])
@pytest.mark.parametrize("make", [flat, nested])
def test_arc_in_both_forms_with_letters_and_digits(tmp_path, make, labels):
    write(tmp_path / "ARC-Challenge-Test.jsonl", (make(i, labels=labels) for i in range(10)))
    write(tmp_path / "ARC-Challenge-Dev.jsonl", (make(i, labels=labels) for i in range(10, 14)))
    dev, test = both("arc_challenge", tmp_path)
    assert [task.id for task in test] == [f"arc_challenge-q{i}" for i in range(10)]
    assert [task.split for task in dev] == ["dev"] * 4
    right = 7 % len(labels)
    assert test[7].prompt.split("\n") == [
        "Which one is 7?",
        *(f"({letter}) one of 7, number {k}" for k, letter in enumerate("ABCDE"[: len(labels)])),
    ]
    assert (test[7].answer, test[7].grader) == ("ABCDE"[right], "choice")
    assert grade(test[7], f"Answer: ({'abcde'[right]})") is True
    assert grade(test[7], f"Answer: ({'ABCDE'[right - 1]})") is False


@pytest.mark.parametrize("make", [flat, nested])
def test_commonsense_qa_reports_on_its_validation_part(tmp_path, make):
    write(tmp_path / "train_rand_split.jsonl", (make(i, labels="ABCDE") for i in range(8)))
    write(tmp_path / "dev_rand_split.jsonl", (make(i, labels="ABCDE") for i in range(8, 12)))
    hidden = [{k: v for k, v in make(i, labels="ABCDE").items() if k != "answerKey"} for i in range(12, 15)]
    write(tmp_path / "test_rand_split_no_answers.jsonl", hidden)
    dev, test = both("commonsense_qa", tmp_path)
    assert [task.answer for task in test] == list("DEAB")
    assert len(dev) == 8
    with pytest.raises(LensteerError, match=r"no_answers\.jsonl, line 1 has no answerKey: a hidden answer"):
        load_benchmark("commonsense_qa", tmp_path / "test_rand_split_no_answers.jsonl")


def test_piqa_takes_labels_from_a_column_or_from_a_file_beside(tmp_path):
    write(tmp_path / "column" / "train.jsonl", map(piqa, range(6)))
    write(tmp_path / "column" / "valid.jsonl", map(piqa, range(6, 9)))
    beside = tmp_path / "beside"
    for name, numbers in (("train", range(6)), ("dev", range(6, 9))):
        write(beside / f"{name}.jsonl", ({k: v for k, v in piqa(i).items() if k != "label"} for i in numbers))
        (beside / f"{name}-labels.lst").write_text("".join(f"{i % 2}\n" for i in numbers))
    assert both("piqa", tmp_path / "column") == both("piqa", beside)
    dev, test = both("piqa", beside)
    assert dev[1].prompt == "Open jar 1.\n(A) Turn the lid.\n(B) Turn the jar over."
    assert [task.answer for task in dev] == list("ABABAB")
    assert [task.id for task in test] == [f"piqa-validation-{i:05d}" for i in (1, 2, 3)]
    (beside / "dev-labels.lst").write_text("0\n1\n")
    with pytest.raises(LensteerError, match=r"dev-labels\.lst has 2 labels for the 3 records"):
        load_benchmark("piqa", beside)
    (beside / "dev-labels.lst").unlink()
    with pytest.raises(LensteerError, match=r"dev\.jsonl, line 1 has no label, and there is no file of labels"):
        load_benchmark("piqa", beside)


@pytest.mark.parametrize("name", NAMES)
def test_parquet_says_the_same_as_jsonl(tmp_path, name):
    rows = [MAKERS[name](i) for i in range(12)]
    lines = write(tmp_path / "lines" / "train.jsonl", rows)
    table = parquet(tmp_path / "table" / "train.parquet", rows)
    assert both(name, table) == both(name, lines)


def test_shards_are_one_part(tmp_path):
    parquet(tmp_path / "train-00000-of-00002.parquet", [gsm8k(i) for i in range(4)])
    parquet(tmp_path / "test-00000-of-00001.parquet", [gsm8k(i) for i in range(4, 7)])
    with pytest.raises(LensteerError, match="all its shards"):
        load_benchmark("gsm8k", tmp_path)
    parquet(tmp_path / "train-00001-of-00002.parquet", [gsm8k(i) for i in range(7, 9)])
    dev, test = both("gsm8k", tmp_path)
    assert [task.answer for task in dev] == ["1000", "1001", "1002", "1003", "1007", "1008"]
    assert len({task.id for task in dev}) == 6
    assert [task.answer for task in test] == ["1004", "1005", "1006"]


def test_parquet_without_pyarrow_says_what_to_install(tmp_path, monkeypatch):
    path = parquet(tmp_path / "train.parquet", [gsm8k(0)])

    def lacking(*args, **options):
        raise ImportError("no pyarrow")

    monkeypatch.setattr("pandas.read_parquet", lacking)
    with pytest.raises(LensteerError, match="pip install pyarrow"):
        load_benchmark("gsm8k", path)


@pytest.mark.parametrize("name", NAMES)
def test_one_file_is_a_fifth_dev_and_four_fifths_test(tmp_path, name):
    rows = [MAKERS[name](i) for i in range(103)]
    dev, test = both(name, write(tmp_path / "anything.jsonl", rows))
    assert (len(dev), len(test)) == (20, 83)
    assert len({task.id for task in dev + test}) == 103
    assert {task.prompt for task in dev} & {task.prompt for task in test} == set()
    other = [{**row, **({"id": f"new{i}"} if "id" in row else {})} for i, row in enumerate(reversed(rows + rows[:30]))]
    again = both(name, write(tmp_path / "reversed.jsonl", other))  # in another order, some twice: still the same sides
    assert [by_prompt(tasks) for tasks in again] == [by_prompt(dev), by_prompt(test)]


def test_draws_are_seeded_nested_and_stay_in_their_split(tmp_path):
    path = write(tmp_path / "all.jsonl", map(gsm8k, range(100)))
    dev, test = both("gsm8k", path)
    ten, twenty = (load_benchmark("gsm8k", path, n=n, seed=3) for n in (10, 20))
    assert ten == twenty[:10] == load_benchmark("gsm8k", path, n=10, seed=3)
    assert ten != load_benchmark("gsm8k", path, n=10, seed=4)
    for seed in range(5):
        assert set(load_benchmark("gsm8k", path, split="dev", n=15, seed=seed)) <= set(dev)
        assert set(load_benchmark("gsm8k", path, n=15, seed=seed)) <= set(test)
    assert Counter(load_benchmark("gsm8k", path, n=1000)) == Counter(test)


def test_a_folder_as_published_is_read_whole_and_its_other_files_are_passed_over(tmp_path):
    write(tmp_path / "train.jsonl", map(gsm8k, range(7)))
    write(tmp_path / "test.jsonl", map(gsm8k, range(7, 12)))
    write(tmp_path / "train_socratic.jsonl", map(gsm8k, range(3)))
    write(tmp_path / "example_model_solutions.jsonl", [{"question": "?"}])
    dev, test = both("gsm8k", tmp_path)
    assert (len(dev), len(test)) == (7, 5)
    write(tmp_path / "train_old.jsonl", map(gsm8k, range(3)))
    with pytest.raises(LensteerError, match=r"train part \['train.jsonl', 'train_old.jsonl'\]"):
        load_benchmark("gsm8k", tmp_path)


def test_arc_chooses_on_validation_before_training_questions(tmp_path):
    for part, numbers in (("Train", range(9)), ("Dev", range(9, 12)), ("Test", range(12, 14))):
        write(tmp_path / f"ARC-Challenge-{part}.jsonl", map(nested, numbers))
    assert len(load_benchmark("arc_challenge", tmp_path, split="dev")) == 3
    (tmp_path / "ARC-Challenge-Dev.jsonl").unlink()
    assert len(load_benchmark("arc_challenge", tmp_path, split="dev")) == 9
    (tmp_path / "ARC-Challenge-Test.jsonl").rename(tmp_path / "valid.jsonl")
    with pytest.raises(LensteerError, match="no file for 'test' of arc_challenge: that is its test part"):
        load_benchmark("arc_challenge", tmp_path)


def changed(row: dict, **values) -> dict:
    return {**row, **values}


@pytest.mark.parametrize(
    ("name", "row", "said"),
    [
        ("gsm8k", {"question": "How many?"}, "'answer' has to be a text, it is None; the record has"),
        ("gsm8k", changed(gsm8k(1), question=["How many?"]), "'question' has to be a text"),
        ("gsm8k", changed(gsm8k(1), answer="It is 18."), "has to end in '#### 18' or similar, it is 'It is 18.'"),
        ("gsm8k", changed(gsm8k(1), answer="Steps.\n####"), "has to end in '#### 18' or similar"),
        ("gsm8k", changed(gsm8k(1), answer="Steps.\n#### many"), "cannot read the answer 'many'"),
        ("arc_challenge", changed(flat(1), answerKey="E"), "'E' has to be one of the labels, which are"),
        ("arc_challenge", changed(flat(1), answerKey=""), "no answerKey: a hidden answer"),
        ("arc_challenge", changed(flat(1), choices=None), "choices need a text and a label each, they are None"),
        ("arc_challenge", changed(flat(1), choices={"text": ["a"], "label": ["A", "B"]}), "a text and a label each"),
        ("arc_challenge", changed(flat(1), choices={"text": ["a", None], "label": ["A", "B"]}), "2 to 26 options"),
        ("arc_challenge", changed(flat(1), choices={"text": ["a", "b"], "label": ["B", "B"]}), "one of the labels"),
        ("arc_challenge", changed(nested(1), question={"choices": []}), "'stem' has to be a text"),
        ("arc_challenge", changed(nested(1), question={"stem": "?", "choices": ["a"]}), "a text and a label each"),
        ("commonsense_qa", changed(flat(1), question=" "), "'question' has to be a text"),
        ("commonsense_qa", changed(flat(1), id="q0"), "has the id 'q0' of .*line 1: give every record its own"),
        ("piqa", changed(piqa(1), sol2=None), "'sol2' has to be a text"),
        ("piqa", changed(piqa(1), label=2), r"label '2' is neither 0 \(sol1\) nor 1 \(sol2\)"),
        ("piqa", changed(piqa(1), label=-1), "no label, and there is no file of labels next to it: a hidden answer"),
        ("piqa", [1], "is not a JSON object"),
    ],
)
def test_corrupt_and_hidden_records_are_named_with_file_and_line(tmp_path, name, row, said):
    good = MAKERS[name](0)
    path = write(tmp_path / "broken.jsonl", [good, row])
    for split in ("dev", "test"):
        with pytest.raises(LensteerError, match=rf"(?s)broken\.jsonl, line 2\b.*{said}"):
            load_benchmark(name, path, split=split)


def test_a_corrupt_row_of_a_table_and_a_corrupt_table(tmp_path):
    path = parquet(tmp_path / "train.parquet", [gsm8k(0), changed(gsm8k(1), answer="It is 18.")])
    with pytest.raises(LensteerError, match=r"train\.parquet, row 2"):
        load_benchmark("gsm8k", path)
    path.write_bytes(b"PAR1 and no more")
    with pytest.raises(LensteerError, match="no parquet file"):
        load_benchmark("gsm8k", path)
    with pytest.raises(LensteerError, match=r"train\.parquet is empty"):
        load_benchmark("gsm8k", parquet(path, [gsm8k(0)][:0]))


def test_what_a_user_gets_wrong(tmp_path):
    path = write(tmp_path / "one.jsonl", [gsm8k(0)])
    for arguments, options, said in (
        (("gsm", path), {}, r"no benchmark 'gsm': choose one of \['gsm8k'"),
        (("gsm8k", path), dict(split="train"), "no split 'train' of a benchmark: choose 'dev' or 'test'"),
        (("gsm8k", path), dict(n=0), "n=0"),
        (("gsm8k", path), {}, "has one question"),
        (("gsm8k", tmp_path / "two.jsonl"), {}, "no file or folder"),
        (("gsm8k", tmp_path), {}, r"holds \['one.jsonl'\]: give a file, or a folder of files whose names say test or"),
    ):
        with pytest.raises(LensteerError, match=said):
            load_benchmark(*arguments, **options)


def stand_in(load_dataset):
    module = ModuleType("datasets")
    vars(module)["load_dataset"] = load_dataset
    return module


def test_the_hub_is_asked_for_the_right_part(monkeypatch):
    asked = []

    def load_dataset(hub, config, *, split, revision):
        asked.append((hub, config, split, revision))
        name = {"gsm8k": "gsm8k", "ai2_arc": "arc_challenge", "piqa": "piqa"}.get(hub.split("/")[1], "commonsense_qa")
        return [MAKERS[name](i) for i in range(3)]

    monkeypatch.setitem(sys.modules, "datasets", stand_in(load_dataset))
    found = {(name, split): load_benchmark(name, split=split) for name in NAMES for split in ("dev", "test")}
    assert asked == [
        ("openai/gsm8k", "main", "train", None),
        ("openai/gsm8k", "main", "test", None),
        ("allenai/ai2_arc", "ARC-Challenge", "validation", None),
        ("allenai/ai2_arc", "ARC-Challenge", "test", None),
        ("tau/commonsense_qa", None, "train", None),
        ("tau/commonsense_qa", None, "validation", None),
        ("ybisk/piqa", None, "train", "refs/convert/parquet"),
        ("ybisk/piqa", None, "validation", "refs/convert/parquet"),
    ]
    assert [task.id for task in found["piqa", "test"]] == [f"piqa-validation-{i:05d}" for i in (1, 2, 3)]
    assert {len(tasks) for tasks in found.values()} == {3}


def test_without_a_hub_or_its_library(monkeypatch):
    def unreachable(*args, **options):
        raise ConnectionError("no route to the hub")

    monkeypatch.setitem(sys.modules, "datasets", stand_in(unreachable))
    with pytest.raises(LensteerError, match=r"cannot load the test part of openai/gsm8k .*no route"):
        load_benchmark("gsm8k")
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(LensteerError, match="pip install datasets"):
        load_benchmark("gsm8k")


def test_records_carry_the_steps_of_dev_questions_alone(tmp_path, tiny_model):
    write(tmp_path / "train.jsonl", map(gsm8k, range(8)))
    write(tmp_path / "test.jsonl", map(gsm8k, range(8, 12)))
    records = benchmark_records("gsm8k", tmp_path)
    steps = "Ada has 3 + 1000 = 1003 beads.\nShe keeps them."
    assert records[3] == Record(gsm8k(3)["question"], {"stepwise": steps}, "1003")
    dev, test = both("gsm8k", tmp_path)
    assert [record.question for record in records] == [task.prompt for task in dev]
    assert {record.question for record in records} & {task.prompt for task in test} == set()
    pair = contrastive_pairs(tiny_model("qwen2"), records, n=1, shots=3)[0]
    assert "beads.\nShe keeps them. The answer is 100" in pair.positive
    assert "keeps them" not in pair.negative
    assert "<<" not in pair.positive
    with pytest.raises(LensteerError, match="only 'gsm8k' publishes"):
        benchmark_records("piqa", write(tmp_path / "piqa.jsonl", map(piqa, range(8))))


def choice_task(answer="B", options="ABCD"):
    lines = [f"({letter}) number {k}" for k, letter in enumerate(options)]
    return Task("t", "c", "test", "\n".join(["Which one?", *lines]), answer, "choice")


@pytest.mark.parametrize(
    ("text", "read"),
    [
        ("B) number 1", "B"),
        ("B", "B"),
        (" (B).", "B"),
        ("b) number 1", "B"),
        ("B. number 1", "B"),
        ("B, because", "B"),
        ("B<|im_end|>", "B"),
        ("D) or (A)", "D"),
        ("E) none of these", None),
        ("I think it is B", None),
        ("b is right", None),
        ("Both of them", None),
        ("A's number", None),
        ("number 1)", None),
        ("", None),
    ],
)
def test_the_letter_that_a_text_begins_with(text, read):
    assert letter(text, choice_task()) == read


def test_any_letter_counts_where_the_prompt_lists_no_options():
    assert letter(" W.", Task("t", "c", "test", "Which exit?", "W", "choice")) == "W"


def hand_made(model, task, response, *, finished=True, opens_thinking=False):
    """A trace with a given response, as a generation would leave it: the end token is its last."""
    prompt = models.chat_text(model, task.prompt) + ("<think>\n" if opens_thinking else "")
    end = sorted(models.end_ids(model))[-1:] if finished else []
    ids = (*models.encode(model, response), *end)
    text, offsets = models.decode_offsets(model.tokenizer, ids)
    return Trace(task, prompt, text, tuple(models.encode(model, prompt)), ids, tuple(offsets), finished)


@pytest.mark.parametrize(
    ("response", "number"),
    [
        ("First 3, then 4. So it is 18.", "18"),
        ("It costs $1,234.50.", "1234.50"),
        ("7 - 12 = -5, so -5 degrees", "-5"),
        ("from 5-7", None),
        ("That is \\boxed{1080}.", "1080"),
        ("He has .5 left", "0.5"),
        ("No idea.", None),
        ("<think>\nIt may be 12.\n</think>\n\nIt is 13.", "13"),
        ("<think>\nIt may be 12.\n</think>\n\nI can't tell.", None),
        ("<think>\nIt may be 12", None),
    ],
)
def test_a_number_is_read_outside_of_the_thought(tiny_model, response, number):
    model = tiny_model("qwen2")
    task = Task("t", "c", "test", "How many of 99?", "18", "numeric")
    trace = hand_made(model, task, response)
    assert trace.answer == number
    assert read_out(model, [trace]) == [number]


def test_graded_tells_unread_from_wrong():
    tasks = [choice_task("B"), choice_task("B"), choice_task("B")]
    tasks += [Task(str(i), "c", "test", "How many?", "1080", "numeric") for i in range(3)]
    assert graded(tasks, ["B", "C", None, "1080", "1080.4", None]) == [True, False, None, True, False, None]
    with pytest.raises(LensteerError, match="1 answers for 6 tasks"):
        graded(tasks, ["B"])
    with pytest.raises(LensteerError, match="no definite answer"):
        graded([Task("t", "c", "test", "Why?")], ["B"])


def test_a_choice_that_a_response_states_is_not_asked_for_again(tiny_model, monkeypatch):
    import lensteer.evaluation.choice as module

    def asked(*args, **options):
        raise AssertionError("nothing is to be decoded")

    monkeypatch.setattr(module, "generate", asked)
    model = tiny_model("qwen2")
    traces = [hand_made(model, choice_task("B"), text) for text in ("The answer is C.", "So it is option B.", "(A)")]
    assert read_out(model, traces) == ["C", "B", "A"]
    assert graded([trace.task for trace in traces], ["C", "B", "A"]) == [trace.correct for trace in traces]


@pytest.mark.parametrize("family", ["qwen2", "llama", "gemma3"])
def test_what_is_decoded_follows_the_response_and_the_lead_in(tiny_model, monkeypatch, family):
    """The very ids, without end tokens, an open thought closed; what random weights then say is read by the rules."""
    import lensteer.evaluation.choice as module

    model = tiny_model(family)
    asked, made = [], []

    def watched(model, prompts, **options):
        asked.extend(prompts)
        made.extend(generate(model, prompts, **options))
        return made[-len(prompts) :]

    generate = module.generate
    monkeypatch.setattr(module, "generate", watched)
    task = choice_task()
    traces = [
        hand_made(model, task, "It is the first."),
        hand_made(model, task, "It is the first.", finished=False),
        hand_made(model, task, "<think>\nIt is the"),
        hand_made(model, task, "It is the", opens_thinking=True),
        hand_made(model, task, "It is.\n</think>\n\nDone.", opens_thinking=True),
    ]
    answers = read_out(model, traces, max_new_tokens=4, batch_size=2)
    tails = ["\nThe answer is ("] * 2 + ["\n</think>\n\nThe answer is ("] * 2 + ["\nThe answer is ("]
    for trace, ids, tail in zip(traces, asked, tails, strict=True):
        written = [i for i in trace.response_ids if i not in models.end_ids(model)]
        assert ids == [*trace.prompt_ids, *written, *models.encode(model, tail)]
    assert asked[0] == asked[1]
    assert [len(result.ids) <= 4 for result in made] == [True] * 5
    texts = [models.decode_offsets(model.tokenizer, result.ids)[0] for result in made]
    assert answers == [letter(text, task) for text in texts]
    assert read_out(model, traces, max_new_tokens=4) == answers


def test_reading_is_unsteered_and_says_what_it_cannot_read(tiny_model, random_direction):
    model = tiny_model("qwen2")
    trace = hand_made(model, choice_task(), "It is the first.")
    with SteeringPlan(random_direction(model), 1, 0.5).on(model), pytest.raises(LensteerError, match="a plan is on"):
        read_out(model, [trace])
    with pytest.raises(LensteerError, match="batch_size=0"):
        read_out(model, [trace], batch_size=0)
    with pytest.raises(LensteerError, match="the grader 'exact': give 'choice' or 'numeric'"):
        read_out(model, [replace(trace, task=replace(trace.task, grader="exact"))])
    assert read_out(model, []) == []


@pytest.mark.medium
def test_the_organism_is_read_as_it_answers_even_where_it_never_got_to_answer(organism):
    tasks = [replace(task, grader="choice") for task in ls.load_tasks(split="test", n=8)]
    traces = generate_traces(organism, tasks, max_new_tokens=400)
    answered = [i for i, trace in enumerate(traces) if trace.correct is not None and "Answer: " in trace.response]
    own = [traces[i].response.rpartition("Answer: ")[2][0] for i in answered]
    assert len(answered) >= 6
    found = read_out(organism, traces, lead_in="Answer:")
    assert [found[i] for i in answered] == own
    right = graded(tasks, found)
    assert [right[i] for i in answered] == [traces[i].correct for i in answered]
    cut = []
    for i in answered:
        n = sum(offset < traces[i].response.find("\n</think>") for offset in traces[i].offsets)
        text, offsets = models.decode_offsets(organism.tokenizer, traces[i].response_ids[:n])
        ids = traces[i].response_ids[:n]
        cut.append(replace(traces[i], response=text, response_ids=ids, offsets=tuple(offsets), finished=False))
    again = read_out(organism, cut, lead_in="Answer:")
    assert sum(a == b for a, b in zip(again, own, strict=True)) >= len(own) - 1
    assert {trace.correct for trace in cut} == {False}

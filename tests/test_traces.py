"""Traces: exact token ids, files that survive a kill, and chains that are independent of their batch."""

from __future__ import annotations

import contextlib
import dataclasses
import json
from typing import Any

import pytest

import lensteer as ls
from lensteer import models
from lensteer.generation import Generated, generate
from lensteer.generation.jobs import Job, chain_seed, trace_of
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task
from lensteer.traces import Trace, load_traces, save_traces

QUESTIONS = ["Is it right?", "For example, take three. Why?", "naïve 🤔?", "So?", "The next step\u2028is what?"]
TASKS = [Task(f"t{i}", "logic", "dev", text, "42", "exact") for i, text in enumerate(QUESTIONS)]
OPTIONS: dict[str, Any] = dict(n_samples=2, temperature=1.5, max_new_tokens=10, batch_size=4)


@pytest.fixture
def model(tiny_model):
    return tiny_model("llama", opens_thinking=True)


def make(response: str, prompt: str = "<|im_start|>assistant\n<think>\n", prefill: str = "") -> Trace:
    return Trace(TASKS[0], prompt + prefill, response, (1,), (2,), (0,), True, prefill=prefill)


# --- what a trace is -----------------------------------------------------------------------------


def test_a_trace_holds_the_very_ids_and_their_text(model):
    traces = ls.generate_traces(model, TASKS, **OPTIONS)
    assert [t.id for t in traces] == [f"t{i}/{s}" for i in range(5) for s in range(2)]
    for trace in traces:
        chat = models.chat_text(model, trace.task.prompt)
        assert trace.prompt == chat
        assert list(trace.prompt_ids) == models.encode(model, chat)
        (again,) = generate(
            model,
            [trace.prompt_ids],
            max_new_tokens=10,
            temperature=1.5,
            seeds=[chain_seed(0, trace.task.id, trace.sample)],
        )
        assert trace.response_ids == again.ids
        assert trace.response == model.tokenizer.decode(list(again.ids))
        assert trace.ids[trace.prompt_length :] == trace.response_ids
        assert len(trace.offsets) == len(trace.response_ids)
        assert trace.finished == (trace.response_ids[-1] in models.end_ids(model))


@pytest.mark.parametrize(
    ("trace", "thought"),
    [
        (make("I am.</think>So."), "I am."),
        (make("I am"), "I am"),
        (make("I am.</think>So.", prompt="assistant\n"), ""),
        (make("<think>I am.</think>So.<think>No</think>", prompt="assistant\n"), "I am."),
        (make("Oh<think>I am", prompt="assistant\n"), "I am"),
        (make("So.", prompt="assistant\n<think>\n\n</think>\n\n"), ""),
        (make(" I am.</think>So.", prefill="Wait,"), " I am."),  # the prompt ends within the thought
        (make("I am.</think>So.", prompt="<think>old</think>B<|im_end|>assistant\n<think>\n"), "I am."),
        (make("So.", prompt="<think>old</think>B<|im_end|>assistant\n"), ""),
    ],
)
def test_what_is_thought(trace, thought):
    begin, end = trace.thinking
    assert trace.response[begin:end] == thought


@pytest.mark.parametrize(
    ("trace", "correct"),
    [
        (make("So.</think>Answer: 42"), True),
        (make("Answer: 42</think>Answer: 43"), False),
        (make("Maybe the answer is 42"), False),  # cut off while it thought
        (make("Answer: 42", prompt="assistant\n"), True),
        (make(" 42.<|im_end|>", prompt="assistant\n", prefill="Answer:"), True),
        (make(" 43.", prompt="assistant\n", prefill="Answer:"), False),
        (make(" So.</think>Answer: 42", prefill="The answer is 41."), True),
    ],
)
def test_what_is_right(trace, correct):
    assert trace.correct is correct


def test_offsets_of_the_organisms_tokens(organism):
    text = "First look at B. Maybe B is not right.\n</think>\n\nAnswer: C.<|im_end|>"
    ids = models.encode(organism, text)
    trace = trace_of(organism, Job(TASKS[0], 0, "p", (1,)), Generated(tuple(ids), True))
    assert trace.response == text
    expected = organism.tokenizer(text, return_offsets_mapping=True).offset_mapping
    assert list(trace.offsets) == [begin for begin, _ in expected]


# --- files ---------------------------------------------------------------------------------------


def test_json_and_back(model, tmp_path):
    traces = ls.generate_traces(model, TASKS, **OPTIONS)
    spanned = dataclasses.replace(
        traces[0],
        spans=(ls.Span("backtracking", 30, 32, 1, 4),),
        n_unparsed=2,
        prefill="🤔\u2028\x85 so",
        finished=True,
    )
    traces = [spanned, *traces[1:]]
    path = tmp_path / "deep" / "traces.jsonl"
    save_traces(traces, path)
    assert load_traces(path) == traces
    save_traces(traces[:1], path)
    assert load_traces(path) == traces[:1]
    assert [p.name for p in path.parent.iterdir()] == ["traces.jsonl"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        (dict(spans=(ls.Span("x", 1, 999, 0, 1),)), "a span of t0/0 ends at token 999 and character 1, and there are"),
        (dict(spans=(ls.Span("x", 1, 2, 0, 999),)), "ends at token 2 and character 999"),
        (dict(offsets=()), "t0/0 has 0 offsets for 10 tokens"),
        (dict(offsets=(0,) * 9 + (-1,)), "give the place of each token in the response, in order"),
        (dict(offsets=(0,) * 9 + (999,)), "has 10 offsets for 10 tokens and"),
        (dict(sample=-1), "t0/-1 has a negative id, sample or number"),
        (dict(n_unparsed=-1), "t0/0 has a negative id, sample or number"),
        (dict(prompt_ids=(-1,)), "t0/0 has a negative id, sample or number"),
    ],
)
def test_what_is_not_of_its_text_is_refused(changes, words, model):
    (trace,) = ls.generate_traces(model, TASKS[:1], max_new_tokens=10)
    with pytest.raises(ls.LensteerError, match=words):
        dataclasses.replace(trace, **changes)


def spoil(line: str, **changes) -> str:
    return json.dumps(json.loads(line) | changes)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda line: "", "is empty"),
        (lambda line: line + "\n" + line[:40], "line 2 is not JSON"),
        (lambda line: line + "\nnull", "line 2 is not a JSON object"),
        (lambda line: spoil(line, offsets=[0]), "line 1: t0/0 has 1 offsets for 10 tokens"),
        (lambda line: spoil(line, response_ids=["x"]), "line 1 cannot be read .*'x' is no int"),
        (lambda line: spoil(line, task=[]), "line 1 cannot be read"),
        (lambda line: spoil(line, mood="good"), "line 1 cannot be read .*mood"),
        (lambda line: spoil(line, spans=[{"label": "x"}]), "line 1 cannot be read .*missing fields"),
        (lambda line: json.dumps({"id": "t0"}), "line 1 cannot be read .*task"),
    ],
)
def test_a_bad_file_is_refused_by_line(change, words, model, tmp_path):
    path = tmp_path / "traces.jsonl"
    (trace,) = ls.generate_traces(model, TASKS[:1], max_new_tokens=10)
    line = json.dumps(dataclasses.asdict(dataclasses.replace(trace, response_ids=(5,) * 10, offsets=(0,) * 10)))
    path.write_text(change(line) + "\n")
    with pytest.raises(ls.LensteerError, match=words):
        load_traces(path)


def test_no_file_is_named(tmp_path):
    with pytest.raises(ls.LensteerError, match=r"nowhere\.jsonl"):
        load_traces(tmp_path / "nowhere.jsonl")


# --- resuming ------------------------------------------------------------------------------------


@pytest.mark.medium
def test_a_killed_run_resumes_at_every_byte(model, tmp_path, monkeypatch):
    """Cut within the last line or between lines: nothing lost, nothing twice, the same file as if never killed."""
    path = tmp_path / "traces.jsonl"
    whole = ls.generate_traces(model, TASKS[:3], path=path, **OPTIONS)
    data = path.read_bytes()
    assert load_traces(path) == sorted(whole, key=lambda t: (t.sample, t.task.id))
    last = data.rstrip(b"\n").rfind(b"\n") + 1

    ran = []
    monkeypatch.setattr(
        "lensteer.generation.jobs.generate", lambda m, prompts, **o: ran.append(prompts) or memory(prompts, o)
    )
    known = {(t.prompt_ids, chain_seed(0, t.task.id, t.sample)): t for t in whole}

    def memory(prompts, options):
        """The same chains again, without the time it takes to make them."""
        found = [known[tuple(p), seed] for p, seed in zip(prompts, options["seeds"], strict=True)]
        return [Generated(t.response_ids, t.finished) for t in found]

    for cut in range(last, len(data)):
        path.write_bytes(data[:cut])
        assert ls.generate_traces(model, TASKS[:3], path=path, **OPTIONS) == whole
        assert path.read_bytes() == data
    assert len(ran) == len(data) - last  # one batch each
    assert ls.generate_traces(model, TASKS[:3], path=path, **OPTIONS) == whole
    assert len(ran) == len(data) - last  # all done: nothing runs


def test_a_batch_cut_short_is_made_again_whole_and_equal(model, tmp_path):
    path = tmp_path / "traces.jsonl"
    whole = ls.generate_traces(model, TASKS, path=path, **OPTIONS)
    data = path.read_bytes()
    lines = data.splitlines(keepends=True)
    for kept in (0, 1, 4, 6, 9):
        path.write_bytes(b"".join(lines[:kept]) + lines[kept][:20])
        assert ls.generate_traces(model, TASKS, path=path, **OPTIONS) == whole
        assert path.read_bytes() == data


def test_an_interrupted_run_keeps_its_finished_batches(model, tmp_path, monkeypatch):
    path = tmp_path / "traces.jsonl"
    calls = []

    def interrupted(*args, **options):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return generate(*args, **options)

    monkeypatch.setattr("lensteer.generation.jobs.generate", interrupted)
    with pytest.raises(KeyboardInterrupt):
        ls.generate_traces(model, TASKS, path=path, **OPTIONS)
    assert len(load_traces(path)) == 8
    resumed = ls.generate_traces(model, TASKS, path=path, **OPTIONS)
    assert len(calls) == 4
    assert resumed == ls.generate_traces(model, TASKS, **OPTIONS)


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"temperature": 1.0},
        {"max_new_tokens": 9},
        {"prefill": "So"},
        {"rewrite": lambda task: task.prompt + " Be careful."},
        {"tasks": [dataclasses.replace(TASKS[0], prompt="Another?")]},
        {"tasks": [dataclasses.replace(TASKS[0], id="other")]},
        {"model": "another"},
        {"plans": "one"},
        {"on": True},
    ],
    ids=lambda change: next(iter(change)),
)
def test_a_file_of_another_run_is_refused(change, model, tiny_model, random_direction, tmp_path):
    path = tmp_path / "traces.jsonl"
    ls.generate_traces(model, TASKS[:1], path=path, **OPTIONS)
    data = path.read_bytes()
    plan = SteeringPlan(random_direction(model), 1, 0.5)
    options = OPTIONS | change
    context = plan.on(model) if options.pop("on", False) else contextlib.nullcontext()
    if "plans" in options:
        options["plans"] = [plan]
    if options.pop("model", None):
        model = tiny_model("llama", opens_thinking=True, seed=1)
    tasks = options.pop("tasks", TASKS[:1])
    with pytest.raises(ls.LensteerError, match=r"traces\.jsonl holds chains of another run \(such as t0/0\)"), context:
        ls.generate_traces(model, tasks, path=path, **options)
    assert path.read_bytes() == data


def test_a_run_may_grow(model, tmp_path):
    path = tmp_path / "traces.jsonl"
    ls.generate_traces(model, TASKS[:2], path=path, **OPTIONS | {"n_samples": 1})
    grown = ls.generate_traces(model, TASKS[:3], path=path, **OPTIONS | {"batch_size": 2})
    assert [(t.id, t.response) for t in grown] == [
        (t.id, t.response) for t in ls.generate_traces(model, TASKS[:3], **OPTIONS)
    ]


# --- chains --------------------------------------------------------------------------------------


@pytest.mark.parametrize("batch_size", [1, 3, 100])
def test_a_chain_is_the_same_in_any_company(batch_size, model, random_direction):
    plans = [SteeringPlan(random_direction(model), 2, 0.5, ls.generated), None] * 2 + [None]
    options = OPTIONS | {"batch_size": batch_size}
    traces = ls.generate_traces(model, TASKS, plans=plans, **options)
    alone = [
        trace
        for task, plan in zip(reversed(TASKS), reversed(plans), strict=True)
        for trace in reversed(ls.generate_traces(model, [task], plans=[plan], **options))
    ]
    assert traces == alone[::-1]
    assert traces[0] != ls.generate_traces(model, TASKS[:1], **options)[0]


def test_samples_and_seeds_differ_and_task_ids_decide(model):
    one, two = ls.generate_traces(model, TASKS[:1], **OPTIONS)
    assert one.response_ids != two.response_ids
    assert ls.generate_traces(model, TASKS[:1], seed=1, **OPTIONS)[0].response_ids != one.response_ids
    renamed = dataclasses.replace(TASKS[0], id="renamed")
    assert ls.generate_traces(model, [renamed], **OPTIONS)[0].response_ids != one.response_ids
    seeds = {chain_seed(seed, task, sample) for seed in range(9) for task in ("a", "a/1", "b") for sample in range(9)}
    assert len(seeds) == 243
    assert all(0 <= seed < 2**64 for seed in seeds)


def test_what_is_put_into_the_models_mouth_and_whether_it_thinks(organism):
    (task,) = ls.load_tasks(split="dev", n=1)
    (direct,) = ls.generate_traces(organism, [task], thinking=False, prefill="Answer:", max_new_tokens=3)
    assert direct.prompt.endswith("assistant\nAnswer:")
    assert direct.thinking == (0, 0)
    assert list(direct.prompt_ids) == models.encode(organism, direct.prompt)
    (asked,) = ls.generate_traces(organism, [task], rewrite=lambda t: t.prompt + " Be careful.", max_new_tokens=3)
    assert " Be careful.<|im_end|>" in asked.prompt
    assert asked.prompt.endswith("<think>\n")
    assert asked.thinking[0] == 0
    assert asked.task == task


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"tasks": []}, "no tasks"),
        ({"n_samples": 0}, "n_samples=0"),
        ({"max_new_tokens": -1}, "max_new_tokens=-1"),
        ({"batch_size": 0}, "batch_size=0"),
        ({"n_samples": 2, "temperature": 0.0}, "2 greedy samples"),
        ({"temperature": -1.0}, "temperature -1"),
        ({"plans": [None]}, "1 plans for 2 tasks"),
    ],
)
def test_impossible_requests_are_refused(change, words, model):
    options = OPTIONS | {"tasks": TASKS[:2]} | change
    with pytest.raises(ls.LensteerError, match=words):
        ls.generate_traces(model, options.pop("tasks"), **options)


def test_two_tasks_of_one_id_cannot_share_a_file(model, tmp_path):
    twice = [TASKS[0], dataclasses.replace(TASKS[1], id="t0")]
    with pytest.raises(ls.LensteerError, match="same id"):
        ls.generate_traces(model, twice, path=tmp_path / "traces.jsonl", max_new_tokens=2)

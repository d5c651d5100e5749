"""Whose marks, which marks: `Trace.thinking` and the scope `thinking` say the same of the same text."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import lensteer as ls
from lensteer import models
from lensteer.annotation.annotators import unlabeled
from lensteer.forward import left_padded
from lensteer.generation import Generated, generate
from lensteer.generation.jobs import Job, trace_of
from lensteer.pipeline.stages import check_thoughts
from lensteer.tasks import Task

KNOWN = [*models.MARKS.values()]
PLAN = ("<plan>", "</plan>")


@pytest.fixture
def marked(tiny_model, monkeypatch):
    """A model whose tokenizer has no mark as one token, with marks set by hand."""

    def make(marks, template=None):
        model = tiny_model("qwen2")
        if template is not None:
            monkeypatch.setattr(model.tokenizer, "chat_template", template)
        monkeypatch.setitem(vars(model.tokenizer), "thought_marks", None)  # the model is shared
        models.set_thought_marks(model, "auto" if marks is None else marks)
        return model

    return make


def written(model, question: str, response: str, prefill: str = "", thinking: bool = True) -> ls.Trace:
    """What a trace is if the model writes this response."""
    prompt = models.chat_text(model, question, thinking=thinking) + prefill
    ids = tuple(models.encode(model, response))
    task = Task("q", "given", "dev", question, "7", "numeric")
    job = Job(task, 0, prompt, tuple(models.encode(model, prompt)), prefill)
    return trace_of(model, job, Generated(ids, False))


def in_scope(model, trace: ls.Trace) -> list[bool]:
    """Which response tokens the scope selects."""
    mask = ls.thinking.mask(left_padded(model, [trace.ids], [trace.prompt_length]))[0].tolist()
    return mask[trace.prompt_length :]


def agree(model, trace: ls.Trace) -> None:
    """The scope selects the tokens of the thought; those of a mark may go either way."""
    begin, end = trace.thinking
    first = 0 if trace.opened or not end else trace.response.find(trace.marks[0])
    ends = [*trace.offsets[1:], len(trace.response)]
    for at, stop, chosen in zip(trace.offsets, ends, in_scope(model, trace), strict=True):
        if begin <= at and stop <= end:
            assert chosen, trace.response[at:stop]
        elif (not trace.opened and stop <= first) or at >= end + len(trace.marks[1]):
            assert not chosen, trace.response[at:stop]


@pytest.mark.parametrize("marks", [*KNOWN, PLAN], ids=lambda marks: marks[0])
@pytest.mark.parametrize("opened", [True, False])
def test_a_question_may_name_the_marks(marks, opened, marked):
    opens, closes = marks
    model = marked(marks, TEMPLATE + (OPENS.replace("MARK", opens) if opened else ""))
    question = f"What does {opens} mean? And {closes}? Or {opens}"
    start = "" if opened else opens
    trace = written(model, question, f"{start} Hmm. It is 7.{closes}\nThe answer is 7.")
    assert trace.opened is opened
    assert trace.response[slice(*trace.thinking)].strip() == "Hmm. It is 7."
    assert trace.correct
    agree(model, trace)
    # Without a thought, nothing is one.
    if not opened:
        direct = written(model, question, "The answer is 7.")
        assert direct.thinking == (0, 0)
        assert direct.correct
        assert not any(in_scope(model, direct))


@pytest.mark.parametrize("marks", [*KNOWN, PLAN], ids=lambda marks: marks[0])
def test_a_repeated_mark_is_not_part_of_the_first_sentence(marks, marked):
    opens, closes = marks
    model = marked(marks, TEMPLATE + OPENS.replace("MARK", opens))
    trace = written(model, "How many?", f"{opens}\n{opens} First. Then.{closes} 7")
    assert trace.response[slice(*trace.thinking)] == " First. Then."
    assert [sentence.text for sentence in unlabeled([trace])[0]] == ["First.", "Then."]
    agree(model, trace)


@pytest.mark.parametrize("marks", KNOWN, ids=lambda marks: marks[0])
def test_the_template_says_which_marks(marks, marked):
    assert models.thought_marks(marked(None, TEMPLATE + OPENS.replace("MARK", marks[0]))) == marks
    split = "{%- set last = message['content'].split('MARK') -%}".replace("MARK", marks[1])
    assert models.thought_marks(marked(None, TEMPLATE.replace("BODY", split))) == marks


def test_a_template_without_marks_is_of_a_model_that_marks_none(marked):
    model = marked(None, TEMPLATE)
    assert models.thought_marks(model) == models.UNMARKED
    trace = written(model, "How many <think> are there?", "Seven days. Twice. So 14.\nThe answer is 7.")
    assert trace.thinking == (0, len(trace.response))
    assert trace.closed
    assert trace.correct
    assert all(in_scope(model, trace))
    ended = trace_of(
        model,
        Job(trace.task, 0, trace.prompt, trace.prompt_ids),
        Generated((*trace.response_ids, model.tokenizer.eos_token_id), True),
    )
    assert ended.thinking == (0, len(trace.response))  # not the token that ends it


@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]")])
def test_a_template_that_opens_a_thought_closes_it_for_a_direct_answer(marks, marked):
    opens, closes = marks
    model = marked(None, TEMPLATE + OPENS.replace("MARK", opens))
    with pytest.warns(UserWarning, match="thinking=False"):
        text = models.chat_text(model, "How many?", thinking=False)
    assert text.endswith(f"{opens}\n\n{closes}\n\n")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trace = written(model, f"How many {opens}?", "The answer is 7.", thinking=False)
    assert trace.thinking == (0, 0)
    assert trace.correct
    assert not any(in_scope(model, trace))


@pytest.mark.parametrize(
    ("name", "marks"),
    [
        ("auto", None),
        ("none", ("", "")),
        ("[THINK]", ("[THINK]", "[/THINK]")),
        ("<plan> </plan>", PLAN),
    ],
)
def test_marks_by_name(name, marks):
    assert models.named_marks(name) == marks


@pytest.mark.parametrize("name", ["", "<plan>", "a b c", "same same"])
def test_an_unknown_name_is_refused(name, marked):
    with pytest.raises(ls.LensteerError, match="thought marks"):
        models.named_marks(name)


@pytest.mark.parametrize("marks", [("<a>", ""), ("<a>", "<a>")])
def test_marks_that_cannot_be_told_apart_are_refused(marks, marked):
    with pytest.raises(ls.LensteerError, match="thought marks"):
        marked(marks)


def test_a_trace_of_before_reads_as_it_did():
    values = dict(
        task=dict(id="q", category="k", split="dev", prompt="?"), prompt="?<think>\n", response="So.</think>7",
        prompt_ids=[1], response_ids=[2, 3], offsets=[0, 3], finished=True,
    )  # fmt: skip
    trace = ls.Trace.from_dict(values)
    assert trace.thinking == (0, 3)
    assert ls.Trace.from_dict({**values, "marks": ["[A]", "[B]"]}).marks == ("[A]", "[B]")


def test_chains_without_a_thought_are_noticed_in_the_first_batch(marked, tmp_path):
    tasks = [Task(f"t{i}", "given", "train", f"How many are {i}?") for i in range(6)]
    path = tmp_path / "traces.jsonl"
    for marks, template, said in (
        (("[THINK]", "[/THINK]"), TEMPLATE, r"none of the 2 chains .*'\[THINK\]'.*--thought none"),
        (models.UNMARKED, TEMPLATE, None),
        (None, TEMPLATE + OPENS.replace("MARK", "<think>"), None),
    ):
        path.unlink(missing_ok=True)
        model = marked(marks, template)

        def run(model=model, marks=marks) -> list[ls.Trace]:
            return ls.generate_traces(
                model,
                tasks,
                max_new_tokens=4,
                batch_size=2,
                path=path,
                inspect=lambda new: check_thoughts(model, new),
            )

        if said is None:
            assert len(run()) == 6
        else:
            with pytest.raises(ls.LensteerError, match=said):
                run()
            assert len(path.read_text().splitlines()) == 2  # the first batch is kept, and no other was begun


def test_chains_that_mark_a_thought_unasked_are_noticed(marked):
    model = marked("none", TEMPLATE)
    traces = [written(model, "How many?", f"<think>\nSo {i}.\n</think>\n7") for i in range(3)]
    with pytest.raises(ls.LensteerError, match=r"all 3 chains .*'<think>'.*--thought '<think>'"):
        check_thoughts(model, traces)
    check_thoughts(model, [*traces, written(model, "How many?", "Seven.")])


def test_a_template_from_a_file(tiny_checkpoint, tmp_path):
    file = tmp_path / "chat.jinja"
    file.write_text(TEMPLATE + OPENS.replace("MARK", "[THINK]"))
    model = ls.load_model(tiny_checkpoint("qwen2", seed=3), template=file)
    assert models.chat_text(model, "Hi").endswith("[THINK]\n")
    assert models.thought_marks(model) == ("[THINK]", "[/THINK]")
    for text in ("{% for x %}", "no prompt", None):
        if text is None:
            file.unlink()
        else:
            file.write_text(text)
        with pytest.raises(ls.LensteerError, match=r"chat template .*chat\.jinja"):
            ls.load_model(tiny_checkpoint("qwen2", seed=3), template=file)


#: Each message between marks of its own, then the assistant's header; BODY stands for what a template does else.
TEMPLATE = (
    "{%- for message in messages -%}BODY<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{%- endfor -%}{%- if add_generation_prompt -%}<|im_start|>assistant\n{%- endif -%}"
).replace("BODY", "{#- BODY -#}")
OPENS = "{%- if add_generation_prompt -%}{{ '\n' }}MARK{{ '\n' }}{%- endif -%}"

pieces = st.lists(st.sampled_from(["OPEN", "CLOSE", " So", ".", "\n", " <", ">", "think", "[asst]"]), max_size=12)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(asked=pieces, said=pieces, opened=st.booleans(), prefill=st.sampled_from(["", "OPEN Ok", "OPEN CLOSE Ok", "Ok"]))
@pytest.mark.parametrize("marks", [("<think>", "</think>"), ("[THINK]", "[/THINK]"), PLAN], ids=lambda m: m[0])
def test_trace_and_scope_are_one_definition(marks, marked, asked, said, opened, prefill):
    model = marked(marks, TEMPLATE + (OPENS.replace("MARK", marks[0]) if opened else ""))

    def text(parts: str) -> str:
        return parts.replace("OPEN", marks[0]).replace("CLOSE", marks[1])

    trace = written(model, "?" + text("".join(asked)), "x" + text("".join(said)), text(prefill))
    agree(model, trace)
    ids = torch.tensor([trace.ids])
    assert ids.shape[1] == len(trace.prompt_ids) + len(trace.response_ids)


def test_a_shared_prefill_knows_whose_a_mark_is(marked, random_direction):
    """The header's last token is not in the pass that equal prompts share: a mark before it is the question's."""
    model = marked(PLAN, "{{ messages[0]['content'] }}{% if add_generation_prompt %} Reply:{% endif %}")
    prompt = models.encode(model, models.chat_text(model, f"What does {PLAN[0]} mean, and why is it written so?"))
    assert models.header(model) == "Reply:"
    plan = ls.SteeringPlan(random_direction(model, length=1.0), 1, 4.0, ls.thinking, unit="unit")
    options: dict[str, Any] = dict(max_new_tokens=12, temperature=0.0)
    (unsteered,) = generate(model, [prompt], seeds=[0], **options)
    (alone,) = generate(model, [prompt], seeds=[0], plans=[plan], **options)
    together = generate(model, [prompt] * 2, seeds=[0, 1], plans=[plan] * 2, **options)
    beside = generate(model, [prompt] * 2, seeds=[0, 1], plans=[plan, None], **options)
    on_all = left_padded(model, [prompt])
    assert not ls.thinking.mask(on_all).any()  # no thought is open
    assert [*together, *beside] == [alone] * 4
    assert alone == unsteered  # and none is opened
    with plan.on(model):
        assert generate(model, [prompt] * 2, seeds=[0, 1], **options) == [alone] * 2

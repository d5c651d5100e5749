"""Chains as plain text: marks of other templates are mapped onto the model's, or refused by name."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

import lensteer as ls
from lensteer import models
from lensteer.behaviors import Span
from lensteer.pipeline import Run, RunConfig
from lensteer.pipeline.chains import read_chains
from lensteer.pipeline.stages import score_chains
from lensteer.traces import save_traces
from lensteer.transcripts import has_labels, plain_parts, read_transcripts

THOUGHT, ANSWER = "Hmm, two weeks.  Wait, that is not right.  It is 14.", "The answer is 14."
QUESTION = "How many days are in two weeks?"
#: One chain, as each template writes it.
FORMS = {
    "deepseek": f"<｜begin▁of▁sentence｜><｜User｜>{QUESTION}<｜Assistant｜><think>\n{THOUGHT}\n</think>\n\n{ANSWER}"
    "<｜end▁of▁sentence｜>",
    "chatml": f"<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\n{QUESTION}<|im_end|>\n"
    f"<|im_start|>assistant\n<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<|im_end|>\n",
    "llama": f"<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\n{QUESTION}<|eot_id|>"
    f"<|start_header_id|>assistant<|end_header_id|>\n\n<think>\n{THOUGHT}\n</think>\n\n{ANSWER}<|eot_id|>",
    "gemma": f"<bos><start_of_turn>user\n{QUESTION}<end_of_turn>\n<start_of_turn>model\n<reasoning>\n{THOUGHT}\n"
    f"</reasoning>\n\n{ANSWER}<end_of_turn>\n",
    "mistral": f"<s>[SYSTEM_PROMPT]Be brief.[/SYSTEM_PROMPT][INST]{QUESTION}[/INST][THINK]{THOUGHT}[/THINK]{ANSWER}"
    "</s>",
    "gpt-oss": f"<|start|>user<|message|>{QUESTION}<|end|><|start|>assistant<|channel|>analysis<|message|>{THOUGHT}"
    f"<|end|><|start|>assistant<|channel|>final<|message|>{ANSWER}<|return|>",
    "seed": f"[INST]{QUESTION}[/INST]<seed:think>{THOUGHT}</seed:think>{ANSWER}",
}
ROWS = {name: {"text": text} for name, text in FORMS.items()} | {
    "plain": {"question": QUESTION, "response": f"<think>\n{THOUGHT}\n</think>\n\n{ANSWER}"},
    "messages": {
        "messages": [
            {"role": "user", "content": QUESTION},
            {"role": "assistant", "content": f"<think>{THOUGHT}</think>{ANSWER}"},
        ]
    },
}


def written(tmp_path, *rows) -> str:
    path = tmp_path / "chains.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


@pytest.fixture
def marked(tiny_model, monkeypatch):
    def make(marks: str, opens: bool = True):
        model = tiny_model("llama", opens_thinking=opens)
        monkeypatch.setitem(vars(model.tokenizer), "thought_marks", None)  # the model is shared
        models.set_thought_marks(model, marks)
        return model

    return make


@pytest.mark.parametrize("form", ROWS)
@pytest.mark.parametrize(("marks", "opens"), [("<think>", True), ("<think>", False), ("[THINK]", False)])
def test_a_chain_reads_as_if_the_model_had_written_it(form, marks, opens, marked, tmp_path):
    model = marked(marks, opens)
    (trace,) = read_chains(written(tmp_path, ROWS[form]), model)
    assert trace.response[slice(*trace.thinking)].strip() == THOUGHT
    assert trace.response.endswith(ANSWER)
    assert trace.marks == models.thought_marks(model)
    assert trace.task.prompt == QUESTION
    assert trace.finished
    assert QUESTION in trace.prompt
    assert trace.prompt_ids == tuple(models.encode(model, trace.prompt))
    assert models.decode_offsets(model.tokenizer, trace.response_ids) == (trace.response, list(trace.offsets))
    assert plain_parts(trace) == (THOUGHT, ANSWER)
    assert not trace.spans
    (annotated,) = ls.annotate([trace], ls.rules)
    assert [annotated.response[span.char_start : span.char_end] for span in annotated.spans] == THOUGHT.split("  ")


@pytest.mark.parametrize("form", ROWS)
def test_a_model_that_marks_no_thought_reads_it_without_marks(form, marked, tmp_path):
    model = marked("none", False)
    (trace,) = read_chains(written(tmp_path, ROWS[form]), model)
    assert trace.response == f"{THOUGHT}\n\n{ANSWER}"
    assert trace.thinking == (0, len(trace.response))


@pytest.mark.parametrize("form", ROWS)
def test_without_a_model_the_marks_stay(form, tmp_path):
    (trace,) = read_chains(written(tmp_path, ROWS[form]))
    assert trace.response[slice(*trace.thinking)].strip() == THOUGHT
    assert len(trace.response_ids) == len(trace.response)


@pytest.mark.parametrize(
    ("row", "words"),
    [
        ({"text": "<|unknown_turn|>user: Hi<|unknown_turn|>model: So."}, r"line 1 holds '<\|unknown_turn\|>'"),
        ({"text": FORMS["chatml"] + "<|im_start|>user\nAnd three?"}, r"'<\|im_start\|>'"),
        ({"text": 3}, r"\['text'\]"),
        ({"messages": [{"role": "user", "content": "Hi"}]}, "assistant"),
    ],
)
def test_what_is_not_known_is_refused_by_name(row, words, tmp_path, marked):
    with pytest.raises(ls.LensteerError, match=words):
        read_transcripts(written(tmp_path, row), marked("<think>"))


def test_a_chain_without_marks_is_a_thought(marked, tmp_path):
    (trace,) = read_chains(
        written(tmp_path, {"id": "a", "prompt": QUESTION, "text": THOUGHT}), marked("[THINK]", False)
    )
    assert trace.response == f"[THINK]\n{THOUGHT}"
    assert trace.response[slice(*trace.thinking)].strip() == THOUGHT
    assert not trace.finished
    assert trace.task.id == "a"


def test_labels_are_noticed(tmp_path):
    assert not has_labels(written(tmp_path, ROWS["deepseek"]))
    assert has_labels(written(tmp_path, ROWS["deepseek"], {"response": "a", "annotated": '["deduction"] a'}))
    assert not has_labels(tmp_path / "none.jsonl")


def test_chains_without_labels_are_labeled_by_the_rules(tmp_path):
    plain = written(tmp_path, ROWS["deepseek"])
    assert Run(tmp_path, RunConfig(model="some/model", chains=(plain,))).annotators == ("rules",)
    labeled = written(tmp_path, {"response": "So.", "annotated": '["deduction"] So.'})
    assert Run(tmp_path, RunConfig(model="some/model", chains=(labeled,))).annotators == ("classifier", "rules")


def test_a_run_goes_on_with_its_annotators_where_its_files_are_gone(tmp_path):
    folder, path = tmp_path / "run", written(tmp_path, {"response": "So.", "annotated": '["deduction"] So.'})
    folder.mkdir()
    save_traces(read_chains(path), folder / "traces.jsonl")
    (tmp_path / "chains.jsonl").unlink()
    assert Run(folder, RunConfig(model="some/model", chains=(path,))).annotators == ("classifier", "rules")


def test_chains_for_scores_have_every_behavior_that_any_chain_has(tmp_path):
    rows = [{"question": str(i), "response": f"So {i}."} for i in range(20)]
    traces = read_transcripts(written(tmp_path, *rows))
    rare = {3: "backtracking", 4: "deduction", 17: "adding-knowledge"}
    traces = [replace(t, spans=(Span(rare[i], 1, 3, 0, 2),) if i in rare else ()) for i, t in enumerate(traces)]
    chosen = score_chains(traces, 5, ["deduction", "backtracking", "adding-knowledge", "uncertainty-estimation"])
    assert [trace.task.prompt for trace in chosen] == ["0", "4", "8", "12", "16", "3", "17"]


@pytest.mark.medium
@pytest.mark.parametrize("name", ["r1_distill_qwen_1.5b", "qwen3_4b_thinking"])
def test_real_chains_with_the_marks_of_their_templates(name, real_model, reference_folder):
    path = reference_folder / "crest" / f"{name}_math_chains.jsonl"
    model = real_model("mini-r1")
    traces = read_chains(path, model)
    assert len(traces) == 100
    for trace in traces:
        assert trace.opened
        assert trace.prompt.endswith("<think>\n")
        assert "Question: " in trace.prompt
        assert "<｜" not in trace.prompt + trace.response
        assert "im_start" not in trace.response
        assert trace.thinking[0] == 0
        assert trace.response[slice(*trace.thinking)].strip()


def test_parts_that_are_not_there_are_empty(tmp_path):
    texts = (f"<think>\n{THOUGHT}", f"<think>\n{THOUGHT}\n</think>\n", f"{ANSWER}<|im_end|>\n")
    chains = read_chains(written(tmp_path, *({"text": text} for text in texts)))
    assert [plain_parts(trace) for trace in chains] == [(THOUGHT, ""), (THOUGHT, ""), ("", ANSWER)]

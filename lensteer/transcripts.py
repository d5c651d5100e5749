"""Chains as plain text, of any model: their marks of turns and thought are mapped onto those of this model."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.files import read_jsonl
from lensteer.tasks import Task
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Where published templates begin a response, and what they write around a user's and a system message.
_TURNS = (
    ("<｜Assistant｜>", "<｜User｜>", ""),  # DeepSeek
    ("<|im_start|>assistant\n", "<|im_start|>user\n", "<|im_start|>system\n"),  # ChatML: Qwen, SmolLM, ...
    (
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "<|start_header_id|>user<|end_header_id|>\n\n",
        "<|start_header_id|>system<|end_header_id|>\n\n",
    ),  # Llama 3
    ("<start_of_turn>model\n", "<start_of_turn>user\n", ""),  # Gemma
    ("[/INST]", "[INST]", "[SYSTEM_PROMPT]"),  # Mistral
    ("<|assistant|>", "<|user|>", "<|system|>"),  # Phi
    ("<|start|>assistant", "<|start|>user<|message|>", "<|start|>system<|message|>"),  # gpt-oss
)
#: What begins a text or ends a message there, and says nothing.
_ENDS = (
    *("<｜begin▁of▁sentence｜>", "<｜end▁of▁sentence｜>", "<|im_end|>", "<|endoftext|>", "<|begin_of_text|>"),
    *("<|eot_id|>", "<|end_of_text|>", "<bos>", "<eos>", "<end_of_turn>", "<s>", "</s>", "[/SYSTEM_PROMPT]"),
    *("<|end|>", "<|return|>", "<|start|>assistant", "<|start|>", "<|channel|>final<|message|>"),
)
_FOREIGN = re.compile(r"<[|｜][^<>|｜\s]{1,40}[|｜]>")
_QUESTIONS, _RESPONSES = ("prompt", "question", "problem"), ("text", "response", "output", "generation", "completion")


def is_transcript(row: Mapping[str, Any]) -> bool:
    """Whether a line is a chain as plain text."""
    return "prompt_ids" not in row and ("messages" in row or any(name in row for name in _RESPONSES))


def has_labels(path: str | Path) -> bool:
    """Whether a file of chains holds labels: the published annotation format, or traces with spans."""
    return Path(path).is_file() and any("annotated" in row or row.get("spans") for _, row in read_jsonl(Path(path)))


def read_transcripts(path: str | Path, model: TransformerBridge | None = None) -> list[Trace]:
    """Traces, without labels, from a JSONL file of chains as plain text.

    A line holds "text", "response", "output", "generation" or "completion": a response, with the question in "prompt",
    "question" or "problem", or a whole conversation with the marks of a published chat template. Or it holds
    "messages", a list of roles and contents. The question is put into this model's chat template and the marks of the
    thought become this model's (none, for a model that marks none), so that the chain reads as if it had written it.

    Args:
        path: the file. An "id" names the task.
        model: the bridge. Without one the text stays as it is, and each character is a token with the id 0.

    Raises:
        LensteerError: no such file, a line of another form, or marks of a template that is not known.
    """
    traces = []
    for i, (number, row) in enumerate(read_jsonl(Path(path))):
        where = f"{path}, line {number}"
        system, question, response = _turns(row, where)
        task = Task(str(row.get("id", f"{Path(path).stem}-{i:03}")), "given", "train", question)
        traces.append(_trace(task, system, response, model, where))
    return traces


def plain_parts(trace: Trace) -> tuple[str, str]:
    """The thought and the answer of a chain as plain text, without the marks of thoughts and messages.

    Either is empty if there is none. Without marks of a thought the whole response is the answer.
    """
    begin, end = trace.thinking if trace.marks[0] else (0, 0)
    said = trace.response[end:] if trace.marks[0] else trace.response
    return trace.response[begin:end].strip(), _plain(said.removeprefix(trace.marks[1]))


def _turns(row: Mapping[str, Any], where: str) -> tuple[str, str, str]:
    """System prompt, question and response of a line."""
    if isinstance(row.get("messages"), list):
        said = {str(m.get("role")): str(m.get("content")) for m in row["messages"] if isinstance(m, dict)}
        if "assistant" not in said:
            raise LensteerError(f"{where} has 'messages' of {sorted(said)}: give one of the assistant, too")
        return said.get("system", ""), said.get("user", ""), said["assistant"]
    name = next((name for name in _RESPONSES if isinstance(row.get(name), str)), None)
    if name is None:
        raise LensteerError(f"{where} has {sorted(row)}: give a text as one of {list(_RESPONSES)}, or 'messages'")
    text = row[name]
    asked = next((row[key] for key in _QUESTIONS if isinstance(row.get(key), str)), "")
    for assistant, user, system in _TURNS:
        before, found, response = text.partition(assistant)
        if found:
            before, _, question = before.rpartition(user)
            return _plain(before.rpartition(system)[2] if system else before), _plain(question) or asked, response
    return "", asked, text


def _plain(text: str) -> str:
    """A text without the marks that begin and end messages."""
    for mark in _ENDS:
        text = text.replace(mark, "")
    return text.strip()


def _trace(task: Task, system: str, response: str, model: TransformerBridge | None, where: str) -> Trace:
    theirs = models.marks_in(response)
    marks = theirs if model is None else models.thought_marks(model)
    opens, closes = theirs
    thought, closed, answer = response.partition(closes) if closes else ("", "", response)
    if closes and not closed:
        thought, answer = response, ""
    thought, answer = thought.replace(opens, "", 1).strip() if opens else thought, _plain(answer)
    if odd := _FOREIGN.search(thought + answer):
        raise LensteerError(
            f"{where} holds {odd[0]!r}, a mark of a template that is not known here: leave it out, or give the chain "
            "as 'messages'"
        )
    prompt = task.prompt if model is None else _asked(model, system, task.prompt)
    opened = bool(marks[0]) and (model is None or models.opens_thought(model, prompt))
    begun = opened or not marks[0]
    ended = f"\n{marks[1]}\n\n" if marks[1] else "\n\n"
    text = ("" if begun else f"{marks[0]}\n") + thought + (f"{ended}{answer}" if closed else answer)
    ids: Sequence[int] = [0] * len(text)
    offsets: Sequence[int] = range(len(text))
    if model is not None:
        ids = models.encode(model, text)
        text, offsets = models.decode_offsets(model.tokenizer, ids)
    return Trace(
        task=task,
        prompt=prompt,
        response=text,
        prompt_ids=tuple(models.encode(model, prompt)) if model is not None else (0,),
        response_ids=tuple(ids),
        offsets=tuple(offsets),
        finished=bool(closed),
        marks=marks,
        opened=opened,
    )


def _asked(model: TransformerBridge, system: str, question: str) -> str:
    """The question in the model's template; a system prompt that the template does not take goes before it."""
    if not model.tokenizer.chat_template:
        return f"{system}\n{question}\n".lstrip()
    try:
        return models.chat_text(model, question, system=system)
    except LensteerError:
        return models.chat_text(model, f"{system}\n{question}".strip())

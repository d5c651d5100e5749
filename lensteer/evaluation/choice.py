"""Reads a benchmark's answers off responses; a choice that a response doesn't state is asked for once more.

- What a response states by itself is read by the rule of `Trace.answer`, so that `Trace.correct` and this agree.
- A choice that it doesn't state is asked for, as Belitsky et al. do (arXiv 2507.08799): after what the model wrote (its
  end token left out, a thought that is still open closed) a fixed lead-in is put on a line of its own, and a few tokens
  are decoded, greedily and without any steering. What they begin with is the answer if it is one letter, and one of
  those that the prompt offers as "(A) ...".

A response that gives neither is unread: None, which is not the same as wrong, though accuracy counts it so.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.generation import generate
from lensteer.steering import active_plans
from lensteer.tasks import GRADERS, Task
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

LEAD_IN = "The answer is ("

_LETTER = re.compile(r"\s*\(?(?:([A-Za-z])\s*\)|([A-Z])(?![\w'’]))")
_OFFERED = re.compile(r"^\(([A-Z])\) ", re.MULTILINE)


def read_out(
    model: TransformerBridge,
    traces: Sequence[Trace],
    *,
    lead_in: str = LEAD_IN,
    max_new_tokens: int = 10,
    batch_size: int = 32,
) -> list[str | None]:
    """The answer of each trace in its task's grader's form: a capital letter, a number, or None if there is none.

    Args:
        model: the bridge, with no plan on: traces may be steered, reading them is unsteered.
        traces: of tasks with the grader "choice" or "numeric".
        lead_in: what a choice that was not stated is asked for with.
        max_new_tokens: decoded after it.
        batch_size: traces that are read together.

    Raises:
        LensteerError: a plan is on, an impossible number, or a task with another grader.
    """
    if active_plans(model):
        raise LensteerError("a plan is on: answers are read unsteered, so call read_out after the `with` block")
    if batch_size < 1:
        raise LensteerError(f"batch_size={batch_size}: give a positive number")
    for task in (trace.task for trace in traces):
        if task.grader not in ("choice", "numeric"):
            raise LensteerError(f"task {task.id!r} has the grader {task.grader!r}: give 'choice' or 'numeric' tasks")
    answers = [trace.answer for trace in traces]
    asked = [i for i, trace in enumerate(traces) if trace.task.grader == "choice" and answers[i] is None]
    for begin in range(0, len(asked), batch_size):
        batch = asked[begin : begin + batch_size]
        prompts = [_question(model, traces[index], lead_in) for index in batch]
        for index, made in zip(batch, generate(model, prompts, max_new_tokens=max_new_tokens), strict=True):
            text, _ = models.decode_offsets(model.tokenizer, made.ids)
            answers[index] = letter(text, traces[index].task)
    return answers


def graded(tasks: Sequence[Task], answers: Sequence[str | None]) -> list[bool | None]:
    """Whether each extracted answer is right; None if none could be read.

    Raises:
        LensteerError: numbers of answers and tasks that differ, or a task without a definite answer.
    """
    if len(tasks) != len(answers):
        raise LensteerError(f"{len(answers)} answers for {len(tasks)} tasks: give one per task")
    right: list[bool | None] = []
    for task, answer in zip(tasks, answers, strict=True):
        if task.answer is None or task.grader is None:
            raise LensteerError(f"task {task.id!r} has no definite answer: only graded tasks can be right or wrong")
        right.append(None if answer is None else GRADERS[task.grader](answer, task.answer))
    return right


def letter(text: str, task: Task) -> str | None:
    """The letter that a text begins with, "B", "(B)", "b)" or "B.", if the task's prompt offers it."""
    found = _LETTER.match(text)
    if found is None:
        return None
    named, offered = (found[1] or found[2]).upper(), _OFFERED.findall(task.prompt)
    return named if named in offered or not offered else None


def _question(model: TransformerBridge, trace: Trace, lead_in: str) -> list[int]:
    """The original ids of prompt and response, then those of the lead-in."""
    written, ends = list(trace.response_ids), models.end_ids(model)
    while written and written[-1] in ends:
        written.pop()
    begin, end = trace.thinking
    is_open = bool(trace.marks[1]) and end > begin and end == len(trace.response)
    tail = f"\n{trace.marks[1]}\n\n{lead_in}" if is_open else f"\n{lead_in}"
    return [*trace.prompt_ids, *written, *models.encode(model, tail)]

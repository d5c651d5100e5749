"""Traces: what a model wrote on a task, token by token."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from lensteer import models
from lensteer.arguments import checked, typed
from lensteer.behaviors import Span, axis_of
from lensteer.errors import LensteerError
from lensteer.files import check_text, jsonl_text, read_jsonl, unseal, write_given
from lensteer.results import reading, revived
from lensteer.tasks import Task, grade, read_answer


@dataclass(frozen=True)
class Trace:
    """One generated response, with its prompt.

    Attributes:
        task: that the prompt states.
        prompt: the prompt's text, chat template included.
        response: what was generated, as text, special tokens kept.
        prompt_ids: token ids of the prompt, exactly as run.
        response_ids: token ids of the response, exactly as generated.
        offsets: where in `response` each response token starts.
        finished: whether the model ended the response itself.
        sample: which of the samples on this task.
        spans: annotated behaviors, in order (empty before annotation).
        n_unparsed: sentences of the chain that no annotator could label; they stay in every denominator.
        prefill: the end of the prompt, where it begins the assistant's answer.
        run: digest of the model, plans, seed and numbers it came from; detects a file of another run.
        marks: what opens and what closes its thought; two empty texts if the whole response is the chain.
        opened: whether the prompt leaves a thought open; None: if its last mark opens one.

    Raises:
        LensteerError: a lone surrogate in a text or a label, which no file could hold; a negative number; offsets or
            spans that are not of this text and these tokens.
    """

    task: Task
    prompt: str
    response: str
    prompt_ids: tuple[int, ...]
    response_ids: tuple[int, ...]
    offsets: tuple[int, ...]
    finished: bool
    sample: int = 0
    spans: tuple[Span, ...] = ()
    n_unparsed: int = 0
    prefill: str = ""
    run: str = ""
    marks: models.Marks = (models.OPEN_THINKING, models.CLOSE_THINKING)
    opened: bool | None = None

    def __post_init__(self) -> None:
        typed(self)
        for name in ("prompt", "response", "prefill"):
            check_text(getattr(self, name), f"the {name} of {self.id}")
        for label in {span.label for span in self.spans}:
            check_text(label, f"a label of {self.id}")
        if min((*self.ids, self.sample, self.n_unparsed), default=0) < 0:
            raise LensteerError(f"{self.id} has a negative id, sample or number of sentences")
        n, size = len(self.response_ids), len(self.response)
        if len(self.offsets) != n or list(self.offsets) != sorted(self.offsets) or not _within(self.offsets, size):
            raise LensteerError(
                f"{self.id} has {len(self.offsets)} offsets for {n} tokens and {size} characters: give the place of "
                "each token in the response, in order"
            )
        for span in self.spans:
            if span.end > len(self.ids) or span.char_end > size:
                raise LensteerError(
                    f"a span of {self.id} ends at token {span.end} and character {span.char_end}, and there are "
                    f"{len(self.ids)} tokens, {size} characters of the response: annotate it as it was generated"
                )

    @property
    def id(self) -> str:
        """Task and sample."""
        return f"{self.task.id}/{self.sample}"

    @property
    def ids(self) -> tuple[int, ...]:
        """Prompt and response."""
        return self.prompt_ids + self.response_ids

    @property
    def prompt_length(self) -> int:
        """Number of prompt tokens."""
        return len(self.prompt_ids)

    @property
    def thinking(self) -> tuple[int, int]:
        """Characters of the response that are its chain of thought.

        After the first opening mark (from 0 if the prompt has opened the thought; marks that repeat it are skipped) to
        the first closing one or the end; empty without either. Without marks, the response without the token that
        ends it.
        """
        opens, closes = self.marks
        if not opens:
            return (0, self.offsets[-1] if self._ends_in_a_mark else len(self.response))
        begin = 0 if self._left_open else self.response.find(opens)
        if begin < 0:
            return (0, 0)
        if repeated := re.compile(rf"(\s*{re.escape(opens)})+").match(self.response, begin):
            begin = repeated.end()
        end = self.response.find(closes, begin)
        return (begin, len(self.response) if end < 0 else end)

    @property
    def _left_open(self) -> bool:
        """Whether the prompt leaves a thought open."""
        if self.opened is not None:
            return self.opened
        return self.prompt.rfind(self.marks[0]) > self.prompt.rfind(self.marks[1])

    @property
    def _ends_in_a_mark(self) -> bool:
        """Whether the last token is one such as `<|im_end|>`."""
        last = self.response[self.offsets[-1] :] if self.finished and self.offsets else ""
        return re.fullmatch(r"\s*<[^<>\s]+>\s*", last) is not None

    @property
    def closed(self) -> bool:
        """Whether the thought came to its end. Without marks there is none to come to."""
        return self.marks[1] in self.response

    @property
    def answer(self) -> str | None:
        """What the response gives as its answer; None where none can be read. What is only thought is no answer."""
        return read_answer(self.task, self._spoken, finished=self.finished)

    @property
    def correct(self) -> bool | None:
        """Whether the answer is right; None where that isn't definite. An answer that can't be read is wrong."""
        return grade(self.task, self._spoken, finished=self.finished)

    @property
    def _spoken(self) -> str:
        if not self.marks[1]:
            return self.prefill + self.response
        said = self.response[self.thinking[1] :].removeprefix(self.marks[1])
        return said if self._left_open else self.prefill + said

    @staticmethod
    def from_dict(values: dict[str, Any], where: str = "trace") -> Trace:
        """From JSON values, such as a line of a file that `save_traces` wrote.

        Raises:
            LensteerError: fields are missing or of the wrong kind, or they do not match their digest.
        """
        values = unseal(values, where)
        with reading(where, "give a line that `save_traces` wrote"):
            return cast(Trace, revived(Trace, {**values, "task": Task.from_dict(values["task"])}))


@checked()
def save_traces(traces: Iterable[Trace], path: str | Path) -> None:
    """Write traces as JSONL, atomically.

    Raises:
        LensteerError: the file cannot be written.
    """
    write_given(path, jsonl_text(map(asdict, traces)), "traces to ")


@checked()
def load_traces(path: str | Path) -> list[Trace]:
    """Read traces.

    Raises:
        LensteerError: a missing or empty file, or a line that is not a trace.
    """
    return [Trace.from_dict(values, f"{path}, line {number}") for number, values in read_jsonl(Path(path))]


def label_axis(traces: Iterable[Trace]) -> tuple[str, ...]:
    """The behavior axis for the labels of annotated traces; see `behaviors.axis_of`."""
    return axis_of(span.label for trace in traces for span in trace.spans)


def with_spans(trace: Trace, spans: Sequence[Span], n_unparsed: int) -> Trace:
    """The same trace, annotated."""
    return replace(trace, spans=tuple(spans), n_unparsed=n_unparsed)


def _within(offsets: Sequence[int], size: int) -> bool:
    return not offsets or (offsets[0] >= 0 and offsets[-1] <= size)

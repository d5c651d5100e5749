"""Tasks: their definition, and grading of a response."""

from __future__ import annotations

from dataclasses import asdict, dataclass, fields
from typing import Any

from lensteer.arguments import typed
from lensteer.errors import LensteerError
from lensteer.files import check_text
from lensteer.tasks.grading import GRADERS, final_answer

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Task:
    """A question for a reasoning model; `answer` and `grader` are None if no answer is definite.

    Raises:
        LensteerError: a lone surrogate in a text.
    """

    id: str
    category: str
    split: str
    prompt: str
    answer: str | None = None
    grader: str | None = None

    def __post_init__(self) -> None:
        typed(self)
        for field in fields(self):
            if isinstance(value := getattr(self, field.name), str):
                check_text(value, f"the {field.name} of task {self.id!r}")

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str = "task") -> Task:
        """From JSON values.

        Raises:
            LensteerError: a field is missing, unknown, of the wrong type or has a lone surrogate, or the grader cannot
                read the answer.
        """
        known = [f.name for f in fields(Task)]
        unknown = sorted(set(values) - set(known))
        missing = [k for k in known[:4] if not isinstance(values.get(k), str)]
        if unknown or missing:
            raise LensteerError(f"{where}: a task has the text fields {known}; missing {missing}, unknown {unknown}")
        for key in ("answer", "grader"):
            if not isinstance(values.get(key), str | None):
                raise LensteerError(f"{where}: {key} {values[key]!r} is no text: put it in quotes")
        answer, grader = values.get("answer"), values.get("grader")
        if grader is not None and grader not in GRADERS:
            raise LensteerError(f"{where}: no grader {grader!r}, use one of {sorted(GRADERS)}")
        if grader is not None and answer is not None and not GRADERS[grader](answer, answer):
            raise LensteerError(
                f"{where}: the grader {grader!r} cannot read the answer {answer!r}: "
                "give a number (numeric), one letter (choice) or any text (exact)"
            )
        try:
            return Task(**values)
        except LensteerError as error:
            raise LensteerError(f"{where}: {error}") from error


def read_answer(task: Task, response: str, *, finished: bool = True) -> str | None:
    """What a response gives as its answer, in the form that the task's grader takes; None where none can be read.

    None is "unread", which `grade` counts as wrong. Where a response was cut off (not `finished`), only an answer that
    it marks as such counts. See `grading.final_answer` for the rule.
    """
    return final_answer(response, task.grader or "exact", question=task.prompt, finished=finished)


def grade(task: Task, response: str, *, finished: bool = True) -> bool | None:
    """Whether a response answers a task, by `read_answer`; None where the task has no definite answer."""
    if task.answer is None or task.grader is None:
        return None
    given = read_answer(task, response, finished=finished)
    return given is not None and GRADERS[task.grader](given, task.answer)

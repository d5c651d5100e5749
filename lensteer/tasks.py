"""Reasoning tasks: what they are, where they come from, how an answer is graded. Knows nothing of models or chains."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from lensteer.errors import LensteerError
from lensteer.files import read_jsonl

SPLITS = ("train", "dev", "test")


@dataclass(frozen=True)
class Task:
    """A question for a reasoning model; `answer` and `grader` are None where no answer is definite."""

    id: str
    category: str
    split: str
    prompt: str
    answer: str | None = None
    grader: str | None = None

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    @staticmethod
    def from_dict(values: dict[str, Any], where: str = "task") -> Task:
        """From JSON values.

        Raises:
            LensteerError: a field is missing, unknown or of the wrong type.
        """
        known = [f.name for f in fields(Task)]
        unknown = sorted(set(values) - set(known))
        missing = [k for k in known[:4] if not isinstance(values.get(k), str)]
        if unknown or missing:
            raise LensteerError(f"{where}: a task has the text fields {known}; missing {missing}, unknown {unknown}")
        for key in ("answer", "grader"):
            if not isinstance(values.get(key), str | None):
                raise LensteerError(f"{where}: {key} {values[key]!r} is no text: put it in quotes")
        grader = values.get("grader")
        if grader is not None and grader not in GRADERS:
            raise LensteerError(f"{where}: no grader {grader!r}, use one of {sorted(GRADERS)}")
        return Task(**values)


def load_tasks(source: str | Path = "organism", *, split: str | None = None, n: int | None = None) -> list[Task]:
    """Tasks of one split, always the same ones in the same order.

    Args:
        source: "organism" for the embedded model's generated tasks, or a JSONL file with one task a line
            (`id, category, split, prompt`, and `answer, grader` where there are).
        split: "train", "dev" or "test"; None for all.
        n: how many at most; None for all there are (the organism's grammar has 300, 100 and 200).

    Raises:
        LensteerError: no such file, split or line; an empty or corrupt file.
    """
    if split is not None and split not in SPLITS:
        raise LensteerError(f"no split {split!r}: choose one of {list(SPLITS)}")
    if n is not None and n < 1:
        raise LensteerError(f"n={n}: ask for at least one task")
    if source == "organism":
        from lensteer.organism import make_tasks

        tasks = [task for s in SPLITS if split in (None, s) for task in make_tasks(s)]
    else:
        tasks = [task for task in _read(Path(source)) if split in (None, task.split)]
    if not tasks:
        raise LensteerError(f"{str(source)!r} has no task of split {split!r}")
    return tasks[:n]


def _read(path: Path) -> list[Task]:
    tasks = []
    for number, values in read_jsonl(path):
        tasks.append(Task.from_dict(values, f"{path}, line {number}"))
    if len({task.id for task in tasks}) < len(tasks):
        raise LensteerError(f"{path}: two tasks have the same id; give every task its own")
    return tasks


def _exact(given: str, wanted: str) -> bool:
    return _normal(given) == _normal(wanted)


def _normal(text: str) -> str:
    """Without what only sets an answer off: emphasis, a LaTeX box or dollar signs, quotes, the full stop, case."""
    text = re.sub(r"\\boxed\s*\{(.*)\}", r"\1", text)
    return re.sub(r"\s+", " ", text).strip(" .*_`$\"'").casefold()


GRADERS: dict[str, Callable[[str, str], bool]] = {"exact": _exact}
_ANSWER = re.compile(r"\banswer[\s*_]*(?:\bis\b\s*:?|:)[\s*_]*(.+)", re.IGNORECASE)


def final_answer(response: str) -> str | None:
    """What a response gives as its answer: behind the last "Answer:" or "answer is" after the thinking, or None."""
    found = _ANSWER.findall(re.sub(r"<\|[^|]*\|>", "", response.rpartition("</think>")[2]))
    return str(found[-1]).strip() if found else None


def grade(task: Task, response: str) -> bool | None:
    """Whether a response answers a task; None where the task has no definite answer."""
    if task.answer is None or task.grader is None:
        return None
    given = final_answer(response)
    return given is not None and GRADERS[task.grader](given, task.answer)

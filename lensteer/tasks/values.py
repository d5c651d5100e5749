"""Tasks: their definition, their sources (the organism's, the written set, a file), and grading of a response."""

from __future__ import annotations

import random
from dataclasses import asdict, dataclass, fields
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lensteer.errors import LensteerError
from lensteer.files import check_text, read_jsonl
from lensteer.organism.grammar import FAMILIES, make_world
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


#: Of the written set.
CATEGORIES = (
    "mathematical-logic",
    "spatial-reasoning",
    "verbal-logic",
    "pattern-recognition",
    "lateral-thinking",
    "causal-reasoning",
    "probabilistic-thinking",
    "systems-thinking",
    "creative-problem-solving",
    "scientific-reasoning",
)
ORGANISM_SIZES = {"train": 300, "dev": 100, "test": 200}
_WRITTEN = Path(__file__).parent.parent / "data" / "tasks"


def load_tasks(
    source: str | Path = "organism",
    *,
    split: str | None = None,
    n: int | None = None,
    category: str | None = None,
) -> list[Task]:
    """Tasks of one split, in a fixed order.

    Args:
        source: "organism" for the organism's generated tasks, "builtin" for the written set (its categories in
            turn, so that the first 20 hold two of each), or a JSONL file with one task a line
            (`id, category, split, prompt`, and `answer, grader` if there are any).
        split: "train", "dev" or "test"; None for all.
        n: maximum number; None for all (the organism's grammar has 300, 100 and 200, the written set
            450, 50 and 50).
        category: only this one, e.g. one of `CATEGORIES`; None for all.

    Raises:
        LensteerError: no such file, split, category or line; an empty or corrupt file.
    """
    if split is not None and split not in SPLITS:
        raise LensteerError(f"no split {split!r}: choose one of {list(SPLITS)}")
    if n is not None and n < 1:
        raise LensteerError(f"n={n}: ask for at least one task")
    tasks = [task for task in _all(source) if split in (None, task.split)]
    if not tasks:
        raise LensteerError(f"{str(source)!r} has no task of split {split!r}")
    if category is not None:
        there = sorted({task.category for task in tasks})
        if category not in there:
            raise LensteerError(f"{str(source)!r} has no task of category {category!r}: choose one of {there}")
        tasks = [task for task in tasks if task.category == category]
    return tasks[:n]


def _all(source: str | Path) -> list[Task]:
    if source == "organism":
        return [task for split in SPLITS for task in organism_tasks(split)]
    if source == "builtin":
        files = [_read(_WRITTEN / f"{category}.jsonl") for category in CATEGORIES]
        rounds = zip_longest(*files)
        return sorted((task for row in rounds for task in row if task), key=lambda task: SPLITS.index(task.split))
    return _read(Path(source))


def organism_tasks(split: str) -> list[Task]:
    """The organism's tasks of a split: both families in turn, levels 2 and 3 in equal parts."""
    rng = random.Random(f"tasks-{split}")
    tasks = []
    for index in range(ORGANISM_SIZES[split]):
        family, level = FAMILIES[index % 2], 2 + index // 2 % 2
        world = make_world(rng, family, level)
        name = f"{family}-{split}-{index:04d}"
        tasks.append(Task(name, family, split, world.prompt, world.answer, "exact"))
    return tasks


def _read(path: Path) -> list[Task]:
    tasks = []
    for number, values in read_jsonl(path):
        tasks.append(Task.from_dict(values, f"{path}, line {number}"))
    if len({task.id for task in tasks}) < len(tasks):
        raise LensteerError(f"{path}: two tasks have the same id; give every task its own")
    return tasks

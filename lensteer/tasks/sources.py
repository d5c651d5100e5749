"""Where tasks come from: the organism's grammar, the written set, a file of tasks, or a file of a public benchmark."""

from __future__ import annotations

import hashlib
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, replace
from itertools import zip_longest
from pathlib import Path
from typing import Any

from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.organism.grammar import FAMILIES, make_world
from lensteer.tasks.benchmarks import FORMATS, PARTS, Format, read_rows, recognize, solved_rows
from lensteer.tasks.values import SPLITS, Task

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
#: Keys that a task has to have.
_REQUIRED = {"id", "category", "split", "prompt"}
_WRITTEN = Path(__file__).parent.parent / "data" / "tasks"


@checked()
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
            turn, so that the first 20 hold two of each), or a file (.jsonl or .json with one record a line, .parquet)
            of tasks (`id, category, split, prompt`, and `answer, grader` if there are any) or of a benchmark in its
            published form (`benchmarks.FORMATS`). See `split_of` for a benchmark's splits.
        split: "train", "dev" or "test"; None for all.
        n: maximum number; None for all (the organism's grammar has 300, 100 and 200, the written set
            450, 50 and 50).
        category: only this one, e.g. one of `CATEGORIES`; None for all.

    Raises:
        LensteerError: no such file, split or category; an empty or corrupt file, or one of another format.
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
        files = [read_file(_WRITTEN / f"{category}.jsonl").tasks for category in CATEGORIES]
        rounds = zip_longest(*files)
        return sorted((task for row in rounds for task in row if task), key=lambda task: SPLITS.index(task.split))
    return read_file(source).tasks


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


@dataclass(frozen=True)
class TaskFile:
    """The tasks of a file, its benchmark's format (None: of tasks), and whether its records name their splits."""

    tasks: list[Task]
    format: Format | None
    names_splits: bool


def read_file(source: str | Path) -> TaskFile:
    """The tasks of a file of tasks or of a benchmark; the first record tells which.

    Benchmark tasks are in the order of their questions' hashes, so that the first n of a split are a random sample.

    Raises:
        LensteerError: as `load_tasks`.
    """
    path = Path(source)
    rows = read_rows(path)
    first = rows[0]
    own = _REQUIRED & set(first.values)
    form = None if own == _REQUIRED else recognize(first.values)
    if form is None and len(own) < len(_REQUIRED) - 1:
        known = "; ".join(f"{form.title} ({form.keys})" for form in FORMATS)
        raise LensteerError(
            f"{first.where} has the keys {sorted(first.values)}, which are of no known format: give tasks (id, "
            f"category, split, prompt), or a benchmark: {known}"
        )
    if form is None:
        tasks = [Task.from_dict(dict(row.values), row.where) for row in rows]
        if len({task.id for task in tasks}) < len(tasks):
            raise LensteerError(f"{path}: two tasks have the same id; give every task its own")
        return TaskFile(tasks, None, True)
    tasks = [solved.task for solved in solved_rows(form.name, form.read, "train", rows)]
    named = [_named_split(row.values, row.where) for row in rows]
    if not any(named):
        return TaskFile(split_of(tasks), form, False)
    if lacking := next((row.where for row, split in zip(rows, named, strict=True) if not split), None):
        raise LensteerError(f"{lacking} names no split, and others of the file do: give all records one, or none")
    return TaskFile(_shuffled([replace(t, split=s) for t, s in zip(tasks, named, strict=True)]), form, True)


def _named_split(values: Mapping[str, Any], where: str) -> str:
    named = values.get("split")
    if named in (None, ""):
        return ""
    part = PARTS.get(str(named).lower())
    if part is None:
        raise LensteerError(
            f"{where}: split {named!r} is none of {sorted(PARTS)}: name one, or leave it out everywhere"
        )
    return "dev" if part == "validation" else part


def _hash(task: Task) -> bytes:
    return hashlib.sha256(task.prompt.encode()).digest()


def _shuffled(tasks: list[Task]) -> list[Task]:
    return sorted(tasks, key=lambda task: (_hash(task), task.id))


def split_of(tasks: list[Task]) -> list[Task]:
    """The tasks with splits: of their questions, in the order of hashes, a fifth is dev, a fifth test, the rest train.

    So a question's split depends on no seed and not on its place, a question that occurs twice is in one split, and dev
    is the dev part of `load_benchmark` of the same file.
    """
    hashes = sorted({_hash(task) for task in tasks})
    share = max(1, len(hashes) // 5)
    found = dict.fromkeys(hashes[:share], "dev") | dict.fromkeys(hashes[share : 2 * share], "test")
    return _shuffled([replace(task, split=found.get(_hash(task), "train")) for task in tasks])


def describe_tasks(source: str | Path) -> str | None:
    """What a file of a benchmark was taken for, and its splits, in a sentence; None for other tasks.

    Raises:
        LensteerError: as `load_tasks`.
    """
    if source in ("organism", "builtin"):
        return None
    found = read_file(source)
    if found.format is None:
        return None
    n = Counter(task.split for task in found.tasks)
    counts = ", ".join(f"{n[split]} {split}" for split in SPLITS)
    how = "which its records name" if found.names_splits else "by a hash of each question, as it names no splits"
    return f"{str(source)!r} is read as {found.format.title}: {counts} tasks, {how}."

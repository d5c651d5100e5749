"""The embedded model: a small trained reasoner whose grammar is known, so that every claim can be checked on it."""

from __future__ import annotations

import random

from lensteer.organism.grammar import FAMILIES, cue, make_world, parse, style_of, styles, well_formed
from lensteer.tasks import Task

__all__ = ["cue", "make_tasks", "parse", "style_of", "styles", "well_formed"]

SIZES = {"train": 300, "dev": 100, "test": 200}


def make_tasks(split: str) -> list[Task]:
    """The organism's tasks of a split: both families in turn, levels 2 and 3 in equal parts."""
    rng = random.Random(f"tasks-{split}")
    tasks = []
    for index in range(SIZES[split]):
        family, level = FAMILIES[index % 2], 2 + index // 2 % 2
        world = make_world(rng, family, level)
        name = f"{family}-{split}-{index:04d}"
        tasks.append(Task(name, family, split, world.prompt, world.answer, "exact"))
    return tasks

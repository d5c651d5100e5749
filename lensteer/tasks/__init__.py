"""Reasoning tasks: their definition, their sources, and grading of answers."""

from lensteer.tasks.benchmarks import load_benchmark
from lensteer.tasks.grading import GRADERS, final_answer
from lensteer.tasks.sources import CATEGORIES, describe_tasks, load_tasks
from lensteer.tasks.values import SPLITS, Task, grade, read_answer

__all__ = [
    "CATEGORIES",
    "GRADERS",
    "SPLITS",
    "Task",
    "describe_tasks",
    "final_answer",
    "grade",
    "load_benchmark",
    "load_tasks",
    "read_answer",
]

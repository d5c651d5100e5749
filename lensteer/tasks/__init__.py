"""Reasoning tasks: their definition, their sources, and grading of answers."""

from lensteer.tasks.benchmarks import load_benchmark
from lensteer.tasks.grading import GRADERS, final_answer
from lensteer.tasks.values import CATEGORIES, SPLITS, Task, grade, load_tasks, read_answer

__all__ = [
    "CATEGORIES",
    "GRADERS",
    "SPLITS",
    "Task",
    "final_answer",
    "grade",
    "load_benchmark",
    "load_tasks",
    "read_answer",
]

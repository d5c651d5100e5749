"""Reasoning tasks: what they are, where they come from, how an answer is graded."""

from lensteer.tasks.answers import final_answer
from lensteer.tasks.benchmarks import load_benchmark
from lensteer.tasks.grading import GRADERS
from lensteer.tasks.loading import CATEGORIES, load_tasks
from lensteer.tasks.values import SPLITS, Task, grade

__all__ = [
    "CATEGORIES",
    "GRADERS",
    "SPLITS",
    "Task",
    "final_answer",
    "grade",
    "load_benchmark",
    "load_tasks",
]

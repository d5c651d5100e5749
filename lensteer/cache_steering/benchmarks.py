"""Solved questions of public benchmarks as records for contrastive pairs."""

from __future__ import annotations

from pathlib import Path

from lensteer.cache_steering.pairs import Record
from lensteer.errors import LensteerError
from lensteer.tasks.benchmarks import solved_tasks


def benchmark_records(name: str, source: str | Path | None = None) -> list[Record]:
    """The solved questions of a benchmark's "dev" split, their published steps as style "stepwise".

    They are none of the "test" tasks. A record's question is its task's prompt: where a coefficient is chosen on dev
    tasks, leave those out of the pairs, `[r for r in records if r.question not in {t.prompt for t in tasks}]`.

    Args:
        name: "gsm8k", the one benchmark that publishes steps; its calculator annotations "<<...>>" are left out.
        source: as `load_benchmark` takes it.

    Raises:
        LensteerError: a record without steps, or what `load_benchmark` refuses.
    """
    records = []
    for solved in solved_tasks(name, source, split="dev"):
        if not solved.steps or solved.task.answer is None:
            raise LensteerError(f"{solved.task.id} comes without steps: of the benchmarks, only 'gsm8k' publishes them")
        records.append(Record(solved.task.prompt, {"stepwise": solved.steps}, solved.task.answer))
    return records

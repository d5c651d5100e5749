"""Runs the arms of an experiment: the same tasks and seeds, steered in different ways, measured chain by chain.

Arms share batches, so that forty small arms cost little more than one large one. Knows nothing of what the arms mean.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from tqdm.auto import tqdm

from lensteer import models
from lensteer.annotation import Annotator, annotate, grammar
from lensteer.behaviors import BEHAVIORS
from lensteer.errors import LensteerError
from lensteer.files import append_lines, drop_cut_line, read_jsonl
from lensteer.generation import generate
from lensteer.metrics import repetition
from lensteer.steering import Plan, active_plans, wanted_prefill
from lensteer.tasks import Task
from lensteer.traces import Trace, chain_seed, trace_of

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Arm:
    """One way to run the tasks: a plan, words put behind the question, text put behind the prompt, or none of these."""

    name: str
    plan: Plan | None = None
    words: str = ""
    prefill: str = ""


@dataclass(frozen=True)
class Sampling:
    """How chains are drawn; the same in every arm. `thinking` is whether the template opens `<think>`.

    Raises:
        LensteerError: an impossible number, or greedy samples that would all be the same.
    """

    n_samples: int = 1
    temperature: float = 1.0
    seed: int = 0
    max_new_tokens: int = 400
    batch_size: int = 256
    thinking: bool = True

    def __post_init__(self) -> None:
        for name in ("n_samples", "max_new_tokens", "batch_size"):
            if getattr(self, name) < 1:
                raise LensteerError(f"{name}={getattr(self, name)}: give a positive number")
        if not 0 <= self.temperature < math.inf:
            raise LensteerError(f"temperature {self.temperature}: give 0 (greedy) or a positive number")
        if self.n_samples > 1 and not self.temperature:
            raise LensteerError(
                f"{self.n_samples} greedy samples would be the same: set temperature=1.0 or n_samples=1"
            )


@dataclass(frozen=True)
class Record:
    """What is kept of one chain. Counts are over its thinking, with the sentences that no annotator could read."""

    arm: str
    task: str
    sample: int
    sentences: dict[str, int]
    tokens: dict[str, int]
    n_sentences: int
    n_tokens: int
    parsed: bool
    finished: bool
    correct: bool | None
    length: int
    repetition: float
    style: str | None = None


def measure(trace: Trace, arm: str, style: str | None = None) -> Record:
    """The record of an annotated trace. `parsed`: it ended, it closed its thinking, every sentence could be read."""
    begin, end = trace.thinking
    closed = models.CLOSE_THINKING in trace.response
    return Record(
        arm,
        trace.task.id,
        trace.sample,
        {b: sum(s.label == b for s in trace.spans) for b in BEHAVIORS},
        {b: sum(s.end - s.start for s in trace.spans if s.label == b) for b in BEHAVIORS},
        len(trace.spans) + trace.n_unparsed,
        sum(begin <= offset < end for offset in trace.offsets),
        trace.finished and closed and not trace.n_unparsed and bool(trace.spans),
        trace.finished,
        trace.correct,
        len(trace.response_ids),
        repetition(trace.response_ids),
        style,
    )


def run_arms(
    model: TransformerBridge,
    tasks: Sequence[Task],
    arms: Sequence[Arm],
    sampling: Sampling | None = None,
    *,
    annotator: Annotator = grammar,
    style_of: Callable[[str], str | None] | None = None,
    path: Path | None = None,
    progress: bool = False,
    keep: Callable[[str, Trace], object] | None = None,
) -> list[Record]:
    """Run every arm on every task.

    Args:
        model: the bridge.
        tasks: the same for all arms.
        arms: with distinct names.
        sampling: how chains are drawn. Chain (task, sample) has the same seed in all arms.
        annotator: says what each sentence is.
        style_of: from a response to the style of its thought, or None.
        path: JSONL file that each finished batch is appended to; batches already in it are not run again. It knows
            the annotator by its kind: of two classifiers it does not tell which.
        progress: show a bar.
        keep: called with the arm's name and each new trace.

    Raises:
        LensteerError: no task, tasks that share an id, arms that share a name, or a file of another experiment.
    """
    sampling = sampling or Sampling()
    if not tasks:
        raise LensteerError("no tasks: give at least one, e.g. from load_tasks(split='test')")
    for what, names in (("arms share a name", [a.name for a in arms]), ("tasks share an id", [t.id for t in tasks])):
        if len(set(names)) < len(names):
            raise LensteerError(f"{what}: {sorted({n for n in names if names.count(n) > 1})}; give each its own")
    jobs = [(a, t, s) for a in range(len(arms)) for t in range(len(tasks)) for s in range(sampling.n_samples)]
    done = {} if path is None else _resume(path, _digest(model, tasks, arms, sampling, annotator))
    batches = [jobs[i : i + sampling.batch_size] for i in range(0, len(jobs), sampling.batch_size)]
    behind = [arm.prefill + wanted_prefill(model, arm.plan) for arm in arms]
    texts = {
        (t, arm.words, tail): models.chat_text(
            model, f"{tasks[t].prompt} {arm.words}".strip(), thinking=sampling.thinking
        )
        + tail
        for arm, tail in zip(arms, behind, strict=True)
        for t in range(len(tasks))
    }
    ids = {key: tuple(models.encode(model, text)) for key, text in texts.items()}
    with tqdm(total=len(jobs), initial=len(done), unit="chain", disable=not progress) as bar:
        for batch in batches:
            if all(_key(arms, tasks, job) in done for job in batch):
                continue
            # A batch that a kill cut short is made again whole: rounding depends on the company.
            results = generate(
                model,
                [ids[t, arms[a].words, behind[a]] for a, t, _ in batch],
                max_new_tokens=sampling.max_new_tokens,
                temperature=sampling.temperature,
                seeds=[chain_seed(sampling.seed, tasks[t].id, s) for _, t, s in batch],
                plans=[arms[a].plan for a, _, _ in batch],
            )
            fresh = [(job, r) for job, r in zip(batch, results, strict=True) if _key(arms, tasks, job) not in done]
            keys = [(t, arms[a].words, behind[a]) for (a, t, _), _ in fresh]
            traces = [
                trace_of(model, tasks[t], texts[key], ids[key], result, s, key[2])
                for ((_, t, s), result), key in zip(fresh, keys, strict=True)
            ]
            new = []
            for (job, _), trace in zip(fresh, annotate(traces, annotator), strict=True):
                if keep is not None:
                    keep(arms[job[0]].name, trace)
                new.append(measure(trace, arms[job[0]].name, style_of(trace.response) if style_of else None))
                done[_key(arms, tasks, job)] = new[-1]
            if path is not None:
                append_lines(path, (json.dumps(asdict(record)) for record in new))
            bar.update(len(new))
    return [done[_key(arms, tasks, job)] for job in jobs]


def _key(arms: Sequence[Arm], tasks: Sequence[Task], job: tuple[int, int, int]) -> tuple[str, str, int]:
    return arms[job[0]].name, tasks[job[1]].id, job[2]


def _digest(
    model: TransformerBridge, tasks: Sequence[Task], arms: Sequence[Arm], sampling: Sampling, annotator: Annotator
) -> str:
    while isinstance(annotator, partial):
        annotator = annotator.func
    judge = annotator if hasattr(annotator, "__qualname__") else type(annotator)
    parts = [
        replace(models.fingerprint(model), name="", revision="").to_dict(),  # a folder may be moved
        [task.to_dict() for task in tasks],
        [[arm.name, arm.words, arm.prefill, None if arm.plan is None else arm.plan.identity()] for arm in arms],
        [plan.identity() for plan in active_plans(model)],
        asdict(sampling),
        [judge.__module__, judge.__qualname__],
    ]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def _resume(path: Path, digest: str) -> dict[tuple[str, str, int], Record]:
    if not drop_cut_line(path):
        append_lines(path, [json.dumps({"experiment": digest})])
        return {}
    rows = [values for _, values in read_jsonl(path)]
    if rows[0].get("experiment") != digest:
        raise LensteerError(
            f"{path} holds another experiment ({rows[0].get('experiment')}, this one is {digest}): give another path"
        )
    try:
        records = [Record(**values) for values in rows[1:]]
    except TypeError as error:
        raise LensteerError(f"{path} holds a line that is no record ({error}): give another path") from error
    return {(r.arm, r.task, r.sample): r for r in records}

"""Whether a model thinks or reasons, in which style, how long and how well: the measures for edits of a whole answer.

For behaviors within a chain see `effects`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lensteer.annotation import Annotator
from lensteer.arguments import checked
from lensteer.cache_steering.reasoning import reasons
from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Condition, Record, by_condition, run_conditions
from lensteer.generation.jobs import Sampling
from lensteer.results import Saved
from lensteer.statistics import Estimate, bootstrap_interval, sign_flip_test
from lensteer.tasks import Task

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

    from lensteer.traces import Trace

FIGURES = ("thinks", "reasons", "accuracy", "answered", "parsed", "finished", "repetition", "length")

#: Text counts as broken if it repeats itself more than this, or ends more rarely, and is worse than unsteered by more
#: than the third. Reasoned answers repeat themselves more than bare ones (Qwen2.5-Coder-0.5B on GSM8K: .2, not .04).
MOST_REPETITION, LEAST_FINISHED, WORSE = 0.35, 0.5, 0.1


@dataclass(frozen=True)
class ModeSummary:
    """The measurements of one condition's answers.

    Attributes:
        condition: Its name.
        kind: Of the condition; see `Condition`. Control vectors are of kind "control".
        thinks: Share of answers that contain thinking between marks.
        accuracy: Share of right answers to the tasks that have one; None if none has. An answer that cannot be read is
            not right; `answered` tells how many can.
        parsed: Share that ended, closed their thinking and could be read by the annotator.
        finished: Share that ended by themselves.
        length: Tokens per answer.
        styles: Share of each style, of the answers that think between marks, or of all if none does.
        reasons: Share of answers that reason step by step, by a rule on their words (`cache_steering.reasons`).
        answered: Share in which an answer can be read, on the tasks that have one; None if none has.
        repetition: Share of an answer's 4-grams that occurred earlier in it.
        changes: For each figure, the change from the unsteered condition on the same tasks.
        p: Its p-value, by a sign-flip test over tasks, not corrected for the number of tests.
    """

    condition: str
    kind: str
    thinks: Estimate
    accuracy: Estimate | None
    parsed: Estimate
    finished: Estimate
    length: Estimate
    styles: dict[str, Estimate]
    reasons: Estimate | None = None
    answered: Estimate | None = None
    repetition: Estimate | None = None
    changes: dict[str, Estimate] = field(default_factory=dict)
    p: dict[str, float] = field(default_factory=dict)

    @property
    def broken(self) -> str:
        """Why the text counts as broken, beside the unsteered one; empty if it does not."""
        why = []
        for name, limit, sign in (("repetition", MOST_REPETITION, 1), ("finished", LEAST_FINISHED, -1)):
            change, value = self.changes.get(name), getattr(self, name)
            if change is not None and sign * change.value > WORSE and sign * (value.value - limit) > 0:
                why.append(f"{name} {value.value:.2f} for {value.value - change.value:.2f}")
        return ", ".join(why)


@dataclass(frozen=True)
class Modes(Saved):
    """The mode of the answers in every condition, on the same tasks and seeds."""

    conditions: tuple[ModeSummary, ...]
    n_tasks: int
    n_samples: int

    def __getitem__(self, condition: str) -> ModeSummary:
        """One condition.

        Raises:
            LensteerError: no condition of that name.
        """
        for found in self.conditions:
            if found.condition == condition:
                return found
        raise LensteerError(
            f"no condition {condition!r}: there are {', '.join(repr(a.condition) for a in self.conditions)}"
        )

    def to_dataframe(self) -> pd.DataFrame:
        """One row per condition and figure: estimate and interval, change from unsteered and its p-value."""
        rows = []
        for condition in self.conditions:
            figures = {name: getattr(condition, name) for name in FIGURES}
            figures |= {f"style {name}": value for name, value in condition.styles.items()}
            for name, e in figures.items():
                change = condition.changes.get(name)
                ends = [None] * 3 if change is None else [change.value, change.low, change.high]
                if e is not None:
                    rows.append((condition.condition, name, e.value, e.low, e.high, *ends, condition.p.get(name)))
        columns = ["condition", "figure", "value", "low", "high", "change", "change_low", "change_high", "p"]
        return pd.DataFrame(rows, columns=columns)


@checked()
def measure_modes(
    model: TransformerBridge,
    tasks: Sequence[Task],
    conditions: Sequence[Condition],
    sampling: Sampling | None = None,
    *,
    annotator: Annotator,
    style_of: Callable[[str], str | None] | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = False,
    keep: Callable[[Condition, Trace], object] | None = None,
) -> Modes:
    """Run every condition on the same tasks and seeds, and measure the mode of its answers.

    Args:
        model: the bridge.
        tasks: two or more; not those that a coefficient was chosen on.
        conditions: with distinct names: an unsteered one first, as a rule.
        sampling: how answers are drawn; by default the template does not open `<think>`.
        annotator: decides which sentences can be read.
        style_of: from a response to the style of its thinking, or None; no styles without it.
        seed: of the bootstrap.
        path: JSONL file for resuming.
        progress: show a bar.
        keep: called with the condition and each annotated answer.

    Raises:
        LensteerError: fewer than two tasks, conditions that share a name, or a file of another experiment.
    """
    if len(tasks) < 2:
        raise LensteerError(f"{len(tasks)} task(s): an interval needs at least two")
    sampling = sampling or Sampling(thinking=False)
    records = run_conditions(
        model,
        tasks,
        conditions,
        sampling,
        annotator=annotator,
        measures={"reasons": _reasons},
        style_of=style_of,
        path=None if path is None else Path(path),
        progress=progress,
        keep=keep,
    )
    styles = sorted({r.style for r in records if r.style is not None})
    rows = by_condition(records, conditions)
    base = next((rows[condition.name] for condition in conditions if condition.kind == "unsteered"), None)
    found = []
    for condition in conditions:
        own = rows[condition.name]
        summary = _measured(condition, own, styles, seed)
        found.append(summary if base is None or own is base else _compared(summary, own, base, seed))
    return Modes(tuple(found), len(tasks), sampling.n_samples)


def _reasons(trace: Trace) -> float:
    return float(reasons(trace.response))


def _of(name: str, r: Record) -> float | None:
    """A record's figure; None where it has none."""
    if name == "reasons":
        return r.scores["reasons"]
    if name in ("accuracy", "answered"):
        value = r.correct if name == "accuracy" else r.answered
        return None if r.correct is None or value is None else float(value)
    return float(getattr(r, name))


def _per_task(name: str, records: Sequence[Record]) -> dict[str, float]:
    """The mean of a figure over a task's samples, of the tasks that have one."""
    per_task: dict[str, list[float]] = {}
    for r in records:
        if (value := _of(name, r)) is not None:
            per_task.setdefault(r.task, []).append(value)
    return {task: float(np.mean(values)) for task, values in per_task.items()}


def _compared(summary: ModeSummary, own: Sequence[Record], base: Sequence[Record], seed: int) -> ModeSummary:
    """The summary with its changes from the unsteered condition."""
    changes, p = {}, {}
    for name in FIGURES:
        sides = [_per_task(name, rows) for rows in (own, base)]
        shared = sorted(set(sides[0]) & set(sides[1]))
        if len(shared) > 1:
            values, before = (np.array([side[task] for task in shared]) for side in sides)
            changes[name] = bootstrap_interval(values, before, seed=seed)
            p[name] = sign_flip_test(values, before, seed=seed)
    return replace(summary, changes=changes, p=p)


def _measured(condition: Condition, records: Sequence[Record], styles: Sequence[str], seed: int) -> ModeSummary:
    def interval(per_task: dict[str, float]) -> Estimate | None:
        return bootstrap_interval(np.array(list(per_task.values())), seed=seed) if len(per_task) > 1 else None

    def styled(style: str) -> Estimate | None:
        per_task: dict[str, list[float]] = {}
        for r in [r for r in records if r.thinks] or records:
            per_task.setdefault(r.task, []).append(float(r.style == style))
        return interval({task: float(np.mean(values)) for task, values in per_task.items()})

    nothing = Estimate(0.0, 0.0, 0.0)
    found = {name: interval(_per_task(name, records)) for name in FIGURES}
    return ModeSummary(
        condition.name,
        condition.kind,
        thinks=found["thinks"] or nothing,
        accuracy=found["accuracy"],
        parsed=found["parsed"] or nothing,
        finished=found["finished"] or nothing,
        length=found["length"] or nothing,
        reasons=found["reasons"],
        answered=found["answered"],
        repetition=found["repetition"],
        styles={style: styled(style) or nothing for style in styles},
    )

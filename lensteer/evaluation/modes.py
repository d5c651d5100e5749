"""Whether a model thinks, in which style, how long and how well: the measures for edits of the whole answer.

For behaviors within a chain see `effects`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd

from lensteer.annotation import Annotator
from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Condition, Record, by_condition, run_conditions
from lensteer.generation.jobs import Sampling
from lensteer.results import Saved
from lensteer.statistics import Estimate, bootstrap_interval
from lensteer.tasks import Task

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FIGURES = ("thinks", "accuracy", "parsed", "finished", "length")


@dataclass(frozen=True)
class ModeSummary:
    """The measurements of one condition's answers.

    Attributes:
        condition: Its name.
        kind: Of the condition; see `Condition`. Control vectors are of kind "control".
        thinks: Share of answers that contain thinking.
        accuracy: Share of right ones among those that can be graded; None if none can.
        parsed: Share that ended, closed their thinking and could be read by the annotator.
        finished: Share that ended by themselves.
        length: Tokens per answer.
        styles: Share of the answers that think in each style, of those that think (0 if none does).
    """

    condition: str
    kind: str
    thinks: Estimate
    accuracy: Estimate | None
    parsed: Estimate
    finished: Estimate
    length: Estimate
    styles: dict[str, Estimate]


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
        """One row per condition and figure: estimate and interval."""
        rows = []
        for condition in self.conditions:
            figures = {name: getattr(condition, name) for name in FIGURES}
            figures |= {f"style {name}": value for name, value in condition.styles.items()}
            rows += [
                (condition.condition, name, e.value, e.low, e.high) for name, e in figures.items() if e is not None
            ]
        return pd.DataFrame(rows, columns=["condition", "figure", "value", "low", "high"])


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
        style_of=style_of,
        path=None if path is None else Path(path),
        progress=progress,
    )
    styles = sorted({r.style for r in records if r.style is not None})
    rows = by_condition(records, conditions)
    return Modes(
        tuple(_measured(condition, rows[condition.name], styles, seed) for condition in conditions),
        len(tasks),
        sampling.n_samples,
    )


def _in_style(style: str, record: Record) -> float:
    return float(record.style == style)


def _measured(condition: Condition, records: Sequence[Record], styles: Sequence[str], seed: int) -> ModeSummary:
    def mean(figure: Callable[[Record], float], among: Callable[[Record], bool] = lambda r: True) -> Estimate | None:
        """Mean over tasks of the mean over a task's samples."""
        per_task: dict[str, list[float]] = {}
        for r in filter(among, records):
            per_task.setdefault(r.task, []).append(figure(r))
        if len(per_task) < 2:
            return None
        return bootstrap_interval(np.array([np.mean(values) for values in per_task.values()]), seed=seed)

    nothing = Estimate(0.0, 0.0, 0.0)
    return ModeSummary(
        condition.name,
        condition.kind,
        thinks=mean(lambda r: r.thinks) or nothing,
        accuracy=mean(lambda r: bool(r.correct), lambda r: r.correct is not None),
        parsed=mean(lambda r: r.parsed) or nothing,
        finished=mean(lambda r: r.finished) or nothing,
        length=mean(lambda r: r.length) or nothing,
        styles={style: mean(partial(_in_style, style), lambda r: r.thinks) or nothing for style in styles},
    )

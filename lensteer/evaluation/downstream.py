"""What plans cost on a benchmark: right, unread and truncated answers beside those of the unsteered model.

The conditions are run and measured by `modes.measure_modes`; this module decides which tasks count, and what is shown.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lensteer import models
from lensteer.annotation import unlabeled
from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Condition
from lensteer.evaluation.modes import Modes, ModeSummary, measure_modes
from lensteer.generation.jobs import Sampling
from lensteer.models import ModelId
from lensteer.results import Saved
from lensteer.steering import Plan
from lensteer.tasks import Task

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

UNSTEERED = "unsteered"


@dataclass(frozen=True, repr=False)
class Benchmark(Saved):
    """Accuracy on the same tasks and seeds, unsteered and with each plan.

    Attributes:
        modes: all measurements, "unsteered" first. `changes` and `p` are paired over tasks.
        model: the model's identity.
        sampling: how answers were drawn.
        n_left_out: tasks without a definite answer; they were not asked.
        suffix: that was put after every question.
    """

    modes: Modes
    model: ModelId
    sampling: Sampling = field(default_factory=Sampling)
    n_left_out: int = 0
    suffix: str = ""

    def __getitem__(self, name: str) -> ModeSummary:
        """The measurements with one plan, or "unsteered".

        Raises:
            LensteerError: no plan of that name.
        """
        return self.modes[name]

    @property
    def n_answers(self) -> int:
        """Answers of each condition: tasks times samples."""
        return self.modes.n_tasks * self.modes.n_samples

    def counts(self, name: str) -> dict[str, int]:
        """How many of a condition's answers are "right", "wrong" (one that was read), "unread", and "truncated".

        The first three add up to `n_answers`; a truncated answer is also one of these.

        Raises:
            LensteerError: no plan of that name.
        """
        found = self[name]
        assert found.accuracy is not None
        assert found.answered is not None
        right, read, finished = (
            round(share.value * self.n_answers) for share in (found.accuracy, found.answered, found.finished)
        )
        return dict(right=right, wrong=read - right, unread=self.n_answers - read, truncated=self.n_answers - finished)

    def to_dataframe(self) -> pd.DataFrame:
        """One row per condition: counts, accuracy, length in tokens, and their changes from unsteered.

        Intervals are over tasks; p is of a sign-flip test over tasks, not corrected for the number of plans.
        """
        rows = []
        for found in self.modes.conditions:
            row: dict[str, object] = {"condition": found.condition, "answers": self.n_answers}
            row |= self.counts(found.condition)
            for name in ("accuracy", "length"):
                for key, e in ((name, getattr(found, name)), (f"{name}_change", found.changes.get(name))):
                    ends = (None, None, None) if e is None else (e.value, e.low, e.high)
                    row |= dict(zip((key, f"{key}_low", f"{key}_high"), ends, strict=True))
                row[f"{name}_p"] = found.p.get(name)
            rows.append(row)
        return pd.DataFrame(rows)

    def __str__(self) -> str:
        lines = [self._line(found) for found in self.modes.conditions]
        if self.n_left_out:
            lines.append(f"left out: {self.n_left_out} without a definite answer")
        return "\n".join(lines)

    def _line(self, found: ModeSummary) -> str:
        n, e, change = self.counts(found.condition), found.accuracy, found.changes.get("accuracy")
        assert e is not None
        said = f"{found.condition}: {n['right']} of {self.n_answers} right, {e.value:.1%} [{e.low:.1%}, {e.high:.1%}]"
        if change is not None:
            said += f" ({100 * change.value:+.1f} [{100 * change.low:+.1f}, {100 * change.high:+.1f}] points"
            said += f", p = {found.p['accuracy']:.2g})"
        said += f", {n['unread']} unread, {n['truncated']} truncated, {found.length.value:.0f} tokens"
        return said + (f", BROKEN TEXT: {found.broken}" if found.broken else "")


@checked()
def benchmark(
    model: TransformerBridge,
    tasks: Sequence[Task],
    plans: Mapping[str, Plan],
    sampling: Sampling | None = None,
    *,
    suffix: str = "",
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = False,
) -> Benchmark:
    """Ask every task unsteered and with each plan, and compare the answers.

    Answers are read by the rule of `Trace.answer`. One that cannot be read is not right, and is counted apart.

    Args:
        model: the bridge. Plans that are on apply to every condition, the unsteered one, too.
        tasks: such as those of `load_tasks("gsm8k.jsonl", split="test")`; not those that a plan was chosen on. Those
            without a definite answer are left out and counted.
        plans: by name.
        sampling: how answers are drawn; by default greedily, at most 400 tokens.
        suffix: put after every question, in every condition.
        seed: of the intervals.
        path: JSONL file that each finished batch is appended to; batches already in it are not run again.
        progress: show a bar.

    Raises:
        LensteerError: a plan named "unsteered", a plan of another model, fewer than two tasks with an answer, tasks
            that share an id, or a file of another experiment.
    """
    if UNSTEERED in plans:
        raise LensteerError(f"a plan is named {UNSTEERED!r}, which is the model without a plan: give it another name")
    asked = [task for task in tasks if task.answer is not None and task.grader is not None]
    if len(asked) < 2:
        raise LensteerError(
            f"{len(asked)} of {len(tasks)} tasks have an answer and a grader: accuracy needs at least two"
        )
    sampling = sampling or Sampling(temperature=0.0)
    conditions = [Condition(UNSTEERED, None, suffix, kind="unsteered")]
    conditions += [Condition(name, plan, suffix) for name, plan in plans.items()]
    found = measure_modes(
        model, asked, conditions, sampling, annotator=unlabeled, seed=seed, path=path, progress=progress
    )
    return Benchmark(found, models.fingerprint(model), sampling, len(tasks) - len(asked), suffix)

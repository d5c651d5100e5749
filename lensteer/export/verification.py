"""Whether a served model has the effect that a plan promises: its answers, labeled, against those without the plan.

Once, or again and again: then each look asks anew, and an alarm says when the effect has changed since the first look.
The intervals of that comparison allow for any number of looks: look k is tested at level α_k = 6 α / (π² (k - 1)²), and
the levels of all looks together add up to α.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from lensteer import models
from lensteer.annotation import Annotator, annotate
from lensteer.annotation.annotators import check_labels
from lensteer.endpoints import Answer, Asking, Client, Endpoint, ask_all, read_answers, served_model
from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import measure
from lensteer.files import append_jsonl, drop_cut_line, parse_json, read_jsonl, read_text, unseal, write_json
from lensteer.models import UNMARKED
from lensteer.results import Result, Saved
from lensteer.statistics import Array, Estimate, Ratio, bootstrap_interval, drawn_counts, sign_flip_test
from lensteer.steering import Plan, SteeringPlan
from lensteer.tasks import Task
from lensteer.traces import Trace

LEVEL = 0.05
"""Of the test of each look's effect, and of all comparisons between looks together."""
THERE, NOT_SHOWN, WRONG_WAY = "the effect is there", "not shown", "moves the other way"
AS_PROMISED, WEAKER, STRONGER = "as promised", "weaker than promised", "stronger than promised"

_SETTINGS, _HISTORY = "verify.json", "history.jsonl"


@dataclass(frozen=True)
class Look(Saved):
    """One time that the endpoint was asked. Intervals are 95 % bootstrap intervals over tasks unless said otherwise.

    Attributes:
        number: from 1 on.
        at: when it began, in UTC.
        steered: the behavior's share of sentences at the endpoint.
        unsteered: without the plan.
        change: the difference, paired by task.
        p: two-sided sign-flip test over tasks.
        finished: share of the answers that ended by themselves.
        unsteered_finished: the same without the plan.
        drift: this look's change less the first look's, paired by task, with an interval of level `1 - level`; None for
            the first look.
        level: of that comparison, corrected for looking again and again; 0 for the first look.
        counts: per task, sentences of the behavior and of all, at the endpoint and without the plan.
    """

    number: int
    at: str
    steered: Estimate
    unsteered: Estimate
    change: Estimate
    p: float
    finished: float
    unsteered_finished: float
    drift: Estimate | None
    level: float
    counts: dict[str, tuple[int, ...]]

    @property
    def alarm(self) -> bool:
        """Whether the effect has changed since the first look, beyond chance."""
        return self.drift is not None and bool(self.drift.excludes(0.0))


@dataclass(frozen=True, repr=False)
class Verification(Result):
    """What an endpoint does, beside what a plan promises.

    Attributes:
        endpoint: its URL.
        model: as it is served.
        behavior: whose share.
        sign: +1 if the plan should raise it, -1 if it should lower it.
        promised: the change that the plan's evidence states; None without evidence.
        looks: at the endpoint, in order.
    """

    endpoint: str
    model: str
    behavior: str
    sign: int
    promised: Estimate | None
    looks: tuple[Look, ...]

    @property
    def verdict(self) -> str:
        """Of the last look: significant in the intended direction, not shown, or significant in the other one."""
        last = self.looks[-1]
        if not last.p < LEVEL:
            return NOT_SHOWN
        return THERE if last.change.value * self.sign > 0 else WRONG_WAY

    @property
    def there(self) -> bool:
        """Whether the verdict is that the effect is there."""
        return self.verdict == THERE

    @property
    def against_promise(self) -> str:
        """The last look's change beside the promised one, whose intervals are independent; "" without evidence.

        They differ if they are further apart than √(a² + b²), with the halves of the intervals that face each other.
        """
        if self.promised is None:
            return ""
        mine, theirs = self.looks[-1].change, self.promised
        apart = (mine.value - theirs.value) * self.sign
        a, b = (mine, theirs) if mine.value < theirs.value else (theirs, mine)
        if abs(mine.value - theirs.value) <= math.hypot(a.high - a.value, b.value - b.low):
            return AS_PROMISED
        return STRONGER if apart > 0 else WEAKER

    @property
    def alarm(self) -> bool:
        """Whether the last look raises one."""
        return self.looks[-1].alarm

    def __str__(self) -> str:
        last = self.looks[-1]
        lines = [
            f"{self.behavior}, share of sentences: {last.unsteered.value:.1%} without the plan, "
            f"{last.steered.value:.1%} at {self.endpoint}; change {_percent(last.change)}, p = {last.p:.2g}: "
            + self.verdict,
            "the plan has no evidence: it was not evaluated"
            if self.promised is None
            else f"promised: {_percent(self.promised)}; {self.against_promise}",
        ]
        if last.drift is not None:
            lines.append(
                f"look {last.number}: since the first look {_percent(last.drift)} at level {1 - last.level:.2%}: "
                + ("ALARM, the effect has changed" if last.alarm else "no change shown")
            )
        return "\n".join(lines)


def _percent(estimate: Estimate) -> str:
    return f"{100 * estimate.value:+.1f} % [{100 * estimate.low:+.1f}, {100 * estimate.high:+.1f}]"


def expected_effect(plan: Plan, behavior: str | None = None) -> tuple[str, int, Estimate | None]:
    """The behavior that a plan changes, in which direction, and by how much as its evidence at its scope says.

    Args:
        plan: one edit or several.
        behavior: which, if the plan steers along several.

    Raises:
        LensteerError: several behaviors and none is named, one that the plan does not steer along, or coefficients of
            both signs.
    """
    labels = list(dict.fromkeys(edit.direction.label for edit in plan.edits))
    if not labels:
        raise LensteerError("this plan edits no residual stream: give a SteeringPlan")
    if behavior is None and len(labels) > 1:
        raise LensteerError(f"this plan steers along {labels}: say which behavior to verify")
    if behavior is not None and behavior not in labels:
        raise LensteerError(f"this plan does not steer along {behavior!r}: choose one of {labels}")
    label = behavior or labels[0]
    own = [edit for edit in plan.edits if edit.direction.label == label]
    found = own[0].measured if len(plan.edits) == 1 else None
    if found is not None and found.unit == "sentences" and found.scope == own[0].scope.name:
        return label, found.sign, found.change
    signs = {-1 if _takes_away(edit) else 1 for edit in own}
    if len(signs) > 1:
        raise LensteerError(f"this plan adds and takes away {label!r}: verify each part by itself")
    return label, signs.pop(), None


def _takes_away(edit: SteeringPlan) -> bool:
    """Whether an edit is meant to lower its behavior; a clamp to 0 removes the direction."""
    removes = edit.operator == "project_out" or (edit.operator == "clamp" and not edit.coefficient)
    return removes or edit.coefficient < 0


def trace_of(answer: Answer, task: Task, thought: str = "auto") -> Trace:
    """An answer as a trace, character by character, for annotators.

    Args:
        answer: to the task.
        task: that was asked.
        thought: how the model marks its thought, as `ls.load_model` takes it; "auto" takes the known marks that the
            answer holds. An answer that closes a thought which it did not open began within it, as templates do that
            open one.
    """
    given = models.named_marks(thought)
    marks = models.marks_in(answer.text) if given is None else given
    opened = marks != UNMARKED and not answer.text.lstrip().startswith(marks[0])
    size = len(answer.text)
    return Trace(
        task, "", answer.text, (0,), (0,) * size, tuple(range(size)), answer.finished, answer.sample,
        marks=marks, opened=opened,
    )  # fmt: skip


def _counts(
    answers: Sequence[Answer], tasks: Sequence[Task], annotator: Annotator, behavior: str, thought: str
) -> dict[str, list[int]]:
    """Per task: sentences of the behavior, and all."""
    by_id = {task.id: task for task in tasks}
    traces = annotate([trace_of(answer, by_id[answer.task], thought) for answer in answers], annotator)
    found = {task.id: [0, 0] for task in tasks}
    for trace in traces:
        record = measure(trace, "", [behavior])
        found[trace.task.id][0] += record.sentences.get(behavior, 0)
        found[trace.task.id][1] += record.n_sentences
    return found


def look_at(
    number: int,
    at: str,
    counts: Mapping[str, tuple[int, ...]],
    first: Look | None,
    finished: tuple[float, float] = (math.nan, math.nan),
    seed: int = 0,
) -> Look:
    """The estimates of one look from its counts.

    Args:
        number: of the look, from 1 on.
        at: when.
        counts: per task, as `Look.counts`.
        first: the first look, on the same tasks; None for that look itself.
        finished: shares of answers that ended, at the endpoint and without the plan.
        seed: of resamples and exchanges.

    Raises:
        LensteerError: fewer than two tasks, no sentence on one of the sides, or other tasks than in the first look.
    """
    table = np.array([counts[task] for task in sorted(counts)], dtype=float).reshape(len(counts), 4)
    for side, total in (("at the endpoint", table[:, 1]), ("without the plan", table[:, 3])):
        if not total.sum():
            raise LensteerError(f"the annotator found no sentence in the answers {side}: are they empty, or cut off?")
    own, base = Ratio(table[:, 0], table[:, 1]), Ratio(table[:, 2], table[:, 3])
    drift, level = None, 0.0
    if first is not None:
        if sorted(first.counts) != sorted(counts):
            raise LensteerError("this look has other tasks than the first one: use another folder")
        before = np.array([first.counts[task] for task in sorted(counts)], dtype=float)
        level = level_of(number)
        drift = drift_of(table, before, level, seed)
    return Look(
        number=number,
        at=at,
        steered=bootstrap_interval(own, seed=seed),
        unsteered=bootstrap_interval(base, seed=seed),
        change=bootstrap_interval(own, base, seed=seed),
        p=sign_flip_test(own, base, seed=seed),
        finished=finished[0],
        unsteered_finished=finished[1],
        drift=drift,
        level=level,
        counts={task: tuple(values) for task, values in counts.items()},
    )


def level_of(number: int) -> float:
    """The level of the comparison of look `number` (from 2 on) with the first: 6 α / (π² (number - 1)²)."""
    return 6 * LEVEL / (math.pi**2 * (number - 1) ** 2)


def drift_of(
    now: Float[np.ndarray[Any, Any], "task 4"],
    before: Float[np.ndarray[Any, Any], "task 4"],
    level: float,
    seed: int = 0,
) -> Estimate:
    """The change now less the change before: ± t × the bootstrap's standard deviation over tasks.

    Quantiles of the bootstrap itself are too coarse for the small levels of late looks.

    Args:
        now: counts per task, as `Look.counts`.
        before: the same tasks in the first look.
        level: the interval has the level 1 - `level`.
        seed: of the resamples.
    """
    from scipy.stats import t  # takes a second to import

    def changes(draws: Array) -> Array:
        sums = [draws @ table for table in (now, before)]
        with np.errstate(divide="ignore", invalid="ignore"):
            own, old = (s[:, 0] / s[:, 1] - s[:, 2] / s[:, 3] for s in sums)
        return np.asarray(own - old)

    value = float(changes(np.ones((1, len(now))))[0])
    drawn = changes(drawn_counts(len(now), 2000, seed))
    half = float(t.ppf(1 - level / 2, len(now) - 1)) * float(np.nanstd(drawn))
    return Estimate(value, value - half, value + half, len(now))


def verify(
    plan: Plan,
    endpoint: Endpoint,
    tasks: Sequence[Task],
    annotator: Annotator,
    out: str | Path,
    *,
    unsteered: Endpoint | str | Path,
    model: str = "",
    behavior: str | None = None,
    asking: Asking | None = None,
    thought: str = "auto",
    every: float | None = None,
    looks: int | None = None,
    announce: Callable[[str], None] | None = None,
    step: Callable[[int, int], None] | None = None,
    sleep: Callable[[float], None] = time.sleep,
) -> Verification:
    """Ask an endpoint held-out tasks, label its answers, and compare with the model without the plan.

    Args:
        plan: that the endpoint is said to serve.
        endpoint: with the plan.
        tasks: held out, at least two.
        annotator: of the answers' sentences.
        out: folder of answers and history. The same call resumes in it, and does not repeat a look that is complete.
        unsteered: the endpoint without the plan, asked again in each look; or a file with its recorded answers.
        model: the name of the plan's model, which the served name has to contain unless the endpoint names its model.
        behavior: which, if the plan steers along several.
        asking: how answers are drawn.
        thought: how the model marks its thought; see `trace_of`.
        every: seconds from the beginning of one look to that of the next. It ends at an alarm, or after `looks`.
        looks: how many, those in the folder included; None: one, or with `every` any number.
        announce: called with a line for each look.
        step: called with the number of answers so far and of all, while a look is made.
        sleep: waits.

    Raises:
        LensteerError: an endpoint that is down, too slow, serves another model, does not answer in the expected form,
            or does not sample although it should; a folder of another verification; recorded answers that lack a task;
            an annotator that never gives the behavior's label; fewer than two tasks; no sentence in the answers.
    """
    asking = asking or Asking()
    out = Path(out)
    if len(tasks) < 2:
        raise LensteerError(f"{len(tasks)} task(s): give at least two, the interval is over tasks")
    if (looks is not None and looks < 1) or (every is not None and every <= 0):
        raise LensteerError(f"looks={looks}, every={every}: give at least one look and a positive time")
    label, sign, promised = expected_effect(plan, behavior)
    check_labels(annotator, [label])
    wanted = looks or (None if every else 1)
    client = Client(endpoint)
    other = Client(unsteered) if isinstance(unsteered, Endpoint) else None
    try:
        name = served_model(client, model)
        base = "" if other is None else served_model(other, model)
        _check_settings(out, plan, endpoint, name, tasks, label, asking, unsteered)
        history = _history(out)
        while wanted is None or len(history) < wanted:
            began, number = time.time(), len(history) + 1
            if history and every:
                wait = every - (began - datetime.fromisoformat(history[-1].at).timestamp())
                if wait > 0:
                    sleep(wait)
            at = datetime.now(timezone.utc).isoformat(timespec="seconds")
            folder = out / f"look-{number:04}"
            own = ask_all(client, name, tasks, asking, folder / "steered.jsonl", f"steered {number}", step)
            if other is None:
                plain = _recorded(Path(str(unsteered)), tasks)
            else:
                plain = ask_all(other, base, tasks, asking, folder / "unsteered.jsonl", f"unsteered {number}", step)
            _check_drawn(own, asking, endpoint.url)
            sides = [_counts(answers, tasks, annotator, label, thought) for answers in (own, plain)]
            counts = {task.id: (*sides[0][task.id], *sides[1][task.id]) for task in tasks}
            ended = [sum(a.finished for a in answers) / len(answers) for answers in (own, plain)]
            look = look_at(number, at, counts, history[0] if history else None, (ended[0], ended[1]), asking.seed)
            append_jsonl(out / _HISTORY, [look.to_dict()])
            history.append(look)
            found = Verification(endpoint.url, name, label, sign, promised, tuple(history))
            if announce is not None:
                announce(str(found))
            if every and found.alarm:
                break
    finally:
        client.close()
        if other is not None:
            other.close()
    return Verification(endpoint.url, name, label, sign, promised, tuple(history))


def _check_drawn(answers: Sequence[Answer], asking: Asking, url: str) -> None:
    """Refuse copies: a server that ignores the temperature gives each task the same answer every time, in each look."""
    if asking.n_samples < 2 or not asking.temperature:
        return
    texts: dict[str, set[str]] = {}
    for answer in answers:
        texts.setdefault(answer.task, set()).add(answer.text)
    if all(len(different) == 1 for different in texts.values()):
        raise LensteerError(
            f"{url} gave the same answer to all {asking.n_samples} samples of every task at temperature "
            f"{asking.temperature:g}: it does not sample (`transformers serve` does if the checkpoint's "
            "generation_config.json has do_sample: true); ask one greedy answer a task, --n 1 --temperature 0"
        )


def _check_settings(
    out: Path, plan: Plan, endpoint: Endpoint, name: str, tasks: Sequence[Task], label: str, asking: Asking,
    unsteered: Endpoint | str | Path,
) -> None:  # fmt: skip
    """Write what the folder's looks depend on, or check that it is the same."""
    settings = {
        "plan": plan.identity(),
        "endpoint": endpoint.url,
        "model": name,
        "behavior": label,
        "tasks": [task.id for task in tasks],
        "unsteered": unsteered.url if isinstance(unsteered, Endpoint) else str(unsteered),
        "asking": asdict(asking),
    }
    path = out / _SETTINGS
    if not path.exists() or not any(out.glob("look-*")):  # nothing was answered yet
        write_json(path, settings)
        return
    try:
        before = unseal(parse_json(read_text(path), path), path)
        wrong = [key for key, value in settings.items() if before.get(key) != value]
    except (OverflowError, ValueError, AttributeError) as error:
        raise LensteerError(f"{path} cannot be read ({error}): use another folder") from error
    if wrong:
        raise LensteerError(f"{str(out)!r} holds looks with another {', '.join(wrong)}: use another folder")


def _history(out: Path) -> list[Look]:
    path = out / _HISTORY
    if not drop_cut_line(path):
        return []
    return [Look.from_dict(row) for _, row in read_jsonl(path)]


def _recorded(path: Path, tasks: Sequence[Task]) -> list[Answer]:
    """Recorded answers to the tasks; those to other tasks are left out."""
    answers = read_answers(path)
    there = {answer.task for answer in answers}
    if missing := [task.id for task in tasks if task.id not in there]:
        raise LensteerError(f"{path} has no answer to {missing[:3]} ({len(missing)} of {len(tasks)} tasks): ask them")
    return [answer for answer in answers if answer.task in {task.id for task in tasks}]

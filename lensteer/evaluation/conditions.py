"""Runs the conditions of an evaluation: the same tasks and seeds, steered differently, measured chain by chain.

Conditions share batches, so forty small conditions cost little more than one large one, and rows with the same prompt
share its prefill.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensteer import models
from lensteer.annotation import Annotator, annotate, labels_of, unlabeled
from lensteer.arguments import typed
from lensteer.behaviors import in_order
from lensteer.errors import LensteerError
from lensteer.evaluation.quality import text_quality
from lensteer.files import append_jsonl, check_text, digest, drop_cut_line, read_jsonl
from lensteer.generation import Generated
from lensteer.generation.jobs import Job, Sampling, run_jobs, trace_of
from lensteer.metrics import compression, repetition
from lensteer.results import reading, revived
from lensteer.steering import Plan, active_plans, wanted_prefill
from lensteer.tasks import Task
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


Measure = Callable[[Trace], float]
"""A score of a chain: higher is more of the behavior. Any function, such as a keyword rule or a classifier."""
#: Kinds of conditions.
CONDITION_KINDS = ("unsteered", "down", "up", "prompted", "forced", "control", "other")
#: Number of chains per control vector whose likelihood is measured.
CONTROL_TEXTS = 5
#: Number of batches whose chains are sorted together by prompt length.
BLOCK = 4


@dataclass(frozen=True)
class Condition:
    """One way to run the tasks: a plan, text put after the question, text put after the prompt, or none of these.

    Attributes:
        name: unique.
        plan: the steering plan.
        suffix: put after the question.
        prefill: put after the prompt.
        n_samples: chains per task, if fewer than `Sampling` says.
        kind: "unsteered"; "down" or "up" along a behavior's own vector; "prompted" for the prompted baseline;
            "forced" for the forced-token baseline, chains that begin with given words; "control" for a control vector;
            "other".
        behavior: that is steered, prompted for or forced.
        pool: of the control vector.

    Raises:
        LensteerError: an unknown kind, or a lone surrogate in a text.
    """

    name: str
    plan: Plan | None = None
    suffix: str = ""
    prefill: str = ""
    n_samples: int | None = None
    kind: str = "other"
    behavior: str = ""
    pool: str = ""

    def __post_init__(self) -> None:
        typed(self)
        for name in ("name", "suffix", "prefill"):
            check_text(getattr(self, name), f"the {name} of condition {self.name!r}")
        if self.kind not in CONDITION_KINDS:
            raise LensteerError(f"condition {self.name!r} of kind {self.kind!r}: choose one of {list(CONDITION_KINDS)}")

    @property
    def layer(self) -> int:
        """The layer of its first edit; -1 for a condition without a residual edit."""
        return self.plan.edits[0].layer if self.plan is not None and self.plan.edits else -1


@dataclass(frozen=True)
class Counts:
    """One annotator's counts in a chain's thinking (or in an answer without thinking): by behavior and total."""

    sentences: dict[str, int]
    tokens: dict[str, int]
    n_sentences: int
    n_tokens: int


@dataclass(frozen=True)
class Record:
    """The measurements of one chain. Counts are over its thinking, including sentences that no annotator could read.

    Attributes:
        condition: the chain's condition.
        task: id of its task.
        sample: which of the condition's chains on the task.
        sentences: of each behavior, by the first annotator.
        tokens: of each behavior, by the first annotator.
        n_sentences: total.
        n_tokens: total.
        parsed: it ended, it closed its thinking, and every sentence could be read: a test for the organism's grammar.
        finished: it ended by itself.
        correct: its answer is right; None if that is not definite.
        length: tokens of the response.
        repetition: share of its 4-grams that occurred earlier in it.
        style: of its thinking, if requested.
        compression: compressed length (zlib) of its text as a share; loops compress well.
        others: counts by further annotators, by name.
        nll: nats per token of the text under the unsteered model; None if not measured.
        kl: nats per token between the steered and the unsteered model along the text; None if not measured.
        scores: of the user's measures, by behavior.
        thinks: it has at least one token of thinking between marks; False if the model marks none.
        answered: an answer can be read in it; None if its task has none.
        coherence: a judge's score of the text, from 0 to 100; None if not measured.
    """

    condition: str
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
    compression: float = 1.0
    others: Mapping[str, Counts] = field(default_factory=dict)
    nll: float | None = None
    kl: float | None = None
    scores: Mapping[str, float] = field(default_factory=dict)
    thinks: bool = False
    answered: bool | None = None
    coherence: float | None = None

    def by(self, annotator: str | None) -> Counts:
        """The counts of one annotator; None is the first.

        Raises:
            LensteerError: no annotator of that name.
        """
        if annotator is None:
            return Counts(self.sentences, self.tokens, self.n_sentences, self.n_tokens)
        if annotator not in self.others:
            raise LensteerError(f"no further annotator {annotator!r}: there are {list(self.others)}")
        return self.others[annotator]


def named(annotator: Annotator | Mapping[str, Annotator] | None) -> dict[str, Annotator]:
    """Annotators by name, the first one first; a single one has the name ""."""
    if annotator is None:
        return {}
    return dict(annotator) if isinstance(annotator, Mapping) else {"": annotator}


def by_condition(records: Sequence[Record], conditions: Sequence[Condition]) -> dict[str, list[Record]]:
    """Each condition's records, in their order, by the condition's name."""
    found: dict[str, list[Record]] = {condition.name: [] for condition in conditions}
    for record in records:
        found[record.condition].append(record)
    return found


def measure(
    trace: Trace,
    condition: str,
    labels: Sequence[str],
    style: str | None = None,
    others: Mapping[str, Trace] | None = None,
    scores: Mapping[str, float] | None = None,
    **measured: float,
) -> Record:
    """The record of a trace, annotated by the first and by further annotators.

    Args:
        trace: annotated.
        condition: the chain's condition.
        labels: of the annotators; other labels that occur are counted, too.
        style: of its thinking.
        others: the trace as annotated by others, by name.
        scores: of the measures, by behavior.
        measured: likelihoods and coherence.
    """
    counts = _counts(trace, labels)
    return Record(
        condition,
        trace.task.id,
        trace.sample,
        counts.sentences,
        counts.tokens,
        counts.n_sentences,
        counts.n_tokens,
        trace.finished and trace.closed and not trace.n_unparsed and bool(trace.spans),
        trace.finished,
        trace.correct,
        len(trace.response_ids),
        repetition(trace.response_ids),
        style,
        compression(trace.response),
        {name: _counts(seen, labels) for name, seen in (others or {}).items()},
        scores=dict(scores or {}),
        thinks=bool(trace.marks[0]) and _n_tokens(trace, *trace.thinking) > 0,
        answered=None if trace.task.answer is None else trace.answer is not None,
        **measured,
    )


def _counts(trace: Trace, labels: Sequence[str]) -> Counts:
    begin, end = trace.thinking
    if begin == end and (trace.spans or trace.n_unparsed):  # a model that does not think: its answer was read
        begin, end = 0, len(trace.response)
    known = dict.fromkeys([*labels, *(span.label for span in trace.spans)])
    return Counts(
        {b: sum(s.label == b for s in trace.spans) for b in known},
        {b: sum(s.end - s.start for s in trace.spans if s.label == b) for b in known},
        len(trace.spans) + trace.n_unparsed,
        _n_tokens(trace, begin, end),
    )


def _n_tokens(trace: Trace, begin: int, end: int) -> int:
    """Response tokens that start within a range of characters."""
    return sum(begin <= offset < end for offset in trace.offsets)


def run_conditions(
    model: TransformerBridge,
    tasks: Sequence[Task],
    conditions: Sequence[Condition],
    sampling: Sampling | None = None,
    *,
    annotator: Annotator | Mapping[str, Annotator] | None = None,
    measures: Mapping[str, Measure] | None = None,
    style_of: Callable[[str], str | None] | None = None,
    quality: int = 0,
    coherence: Measure | None = None,
    path: Path | None = None,
    progress: bool = False,
    keep: Callable[[Condition, Trace], object] | None = None,
) -> list[Record]:
    """Run every condition on every task, and measure the chains.

    Args:
        model: the bridge.
        tasks: the same for all conditions.
        conditions: with distinct names.
        sampling: how chains are drawn. Chain (task, sample) has the same seed in all conditions.
        annotator: labels each sentence; or several by name, of which the first one is tested and the others are also
            reported. None is allowed only with measures.
        measures: by behavior, a score of each chain.
        style_of: from a response to the style of its thinking, or None.
        quality: number of chains per condition whose likelihood under the unsteered model is measured (for control
            vectors, `CONTROL_TEXTS`); each task's first sample comes first.
        coherence: a score of a text from 0 to 100, such as a judge's, for as many chains per condition as `quality`.
        path: JSONL file that each finished batch of chains is appended to; batches already in it are not run again. It
            holds text and ids but no labels, so another annotator needs no new generation.
        progress: show a bar.
        keep: called with the condition and each annotated trace.

    Raises:
        LensteerError: no task, tasks that share an id, conditions that share a name, neither annotator nor measure, a
            measure that returns no finite number, or a file of another experiment. Generated chains are kept if an
            annotator or a measure fails.
    """
    measures = measures or {}
    annotators = named(unlabeled if annotator is None and measures else annotator)
    if not annotators:
        raise LensteerError("no annotator: give at least one, such as annotator=rules, or a measure")
    _try_measures(model, tasks, measures, sampling or Sampling())
    chains = draw_chains(model, tasks, conditions, sampling, path=path, progress=progress)
    first, *others = [annotate([trace for _, trace in chains], each) for each in annotators.values()]
    labels = in_order(
        [label for each in annotators.values() for label in labels_of(each) or ()]
        + [span.label for seen in (first, *others) for trace in seen for span in trace.spans]
    )
    by_name = {condition.name: condition for condition in conditions}
    limit = {condition.name: min(quality, CONTROL_TEXTS) if condition.pool else quality for condition in conditions}
    place = {task.id: i for i, task in enumerate(tasks)}
    chosen = [
        i
        for i, (condition, trace) in enumerate(chains)
        if trace.response_ids and trace.sample * len(tasks) + place[trace.task.id] < limit[condition]
    ]
    judged = {} if coherence is None else {i: score(coherence, chains[i][1]) for i in chosen}
    measured = text_quality(
        model,
        [chains[i][1] for i in chosen],
        [by_name[chains[i][0]].plan for i in chosen],
        path=None if path is None else path.with_suffix(".quality.jsonl"),
        progress=progress,
    )
    found = dict(zip(chosen, measured, strict=True))
    records = []
    for i, (condition, _) in enumerate(chains):
        if keep is not None:
            keep(by_name[condition], first[i])
        seen = {name: each[i] for name, each in zip(list(annotators)[1:], others, strict=True)}
        style = style_of(first[i].response) if style_of else None
        scores = _scores(measures, first[i])
        figures = found.get(i, {}) | ({"coherence": judged[i]} if i in judged else {})
        records.append(measure(first[i], condition, labels, style, seen, scores, **figures))
    return records


def score(measure: Measure, trace: Trace) -> float:
    """A measure's score of a chain.

    Raises:
        LensteerError: it is not a finite number.
    """
    value = measure(trace)
    if not isinstance(value, (int, float)) or not math.isfinite(value):
        name = getattr(measure, "__name__", type(measure).__name__)
        raise LensteerError(f"measure {name!r} gives {value!r} for chain {trace.id!r}: return a finite number")
    return float(value)


def _scores(measures: Mapping[str, Measure], trace: Trace) -> dict[str, float]:
    """A chain's scores by behavior; a measure of several behaviors is called once."""
    found = {id(each): score(each, trace) for each in {id(each): each for each in measures.values()}.values()}
    return {behavior: found[id(each)] for behavior, each in measures.items()}


def _try_measures(
    model: TransformerBridge, tasks: Sequence[Task], measures: Mapping[str, Measure], sampling: Sampling
) -> None:
    """Score one made-up chain with each measure, so that a broken measure fails before anything is generated."""
    if not measures or not tasks:
        return
    prompt = models.chat_text(model, tasks[0].prompt, system=sampling.system, thinking=sampling.thinking)
    ids = tuple(models.encode(model, "Let me think. The answer is 4."))
    job = Job(tasks[0], 0, prompt, tuple(models.encode(model, prompt)))
    _scores(measures, trace_of(model, job, Generated(ids, True)))


def draw_chains(
    model: TransformerBridge,
    tasks: Sequence[Task],
    conditions: Sequence[Condition],
    sampling: Sampling | None = None,
    *,
    path: Path | None = None,
    progress: bool = False,
) -> list[tuple[str, Trace]]:
    """The chains of every condition on every task, not annotated. Arguments are those of `run_conditions`."""
    sampling = sampling or Sampling()
    if not tasks:
        raise LensteerError("no tasks: give at least one, e.g. from load_tasks(split='test')")
    for what, names in (
        ("conditions share a name", [a.name for a in conditions]),
        ("tasks share an id", [t.id for t in tasks]),
    ):
        if len(set(names)) < len(names):
            raise LensteerError(f"{what}: {sorted({n for n in names if names.count(n) > 1})}; give each its own")
    samples = [min(condition.n_samples or sampling.n_samples, sampling.n_samples) for condition in conditions]
    first: dict[tuple[int, str, str], Job] = {}

    def job(condition: Condition, t: int, sample: int) -> Job:
        start = sampling.prefill + condition.prefill + wanted_prefill(model, condition.plan)
        if (t, condition.suffix, start) not in first:
            asked = f"{tasks[t].prompt} {condition.suffix}".strip()
            text = models.chat_text(model, asked, system=sampling.system, thinking=sampling.thinking) + start
            first[t, condition.suffix, start] = Job(tasks[t], 0, text, tuple(models.encode(model, text)), start)
        return replace(first[t, condition.suffix, start], sample=sample, plan=condition.plan)

    wanted = [(a, t, s) for a in range(len(conditions)) for t in range(len(tasks)) for s in range(samples[a])]
    jobs = [job(conditions[a], t, s) for a, t, s in wanted]
    # Prompts of similar length share a batch, which saves padding; a few conditions at a time, so that the first
    # conditions finish first.
    order = sorted(range(len(jobs)), key=lambda i: (i // (BLOCK * sampling.batch_size), len(jobs[i].prompt_ids)))
    ordered = [jobs[i] for i in order]
    names = [conditions[wanted[i][0]].name for i in order]
    done: dict[int, Trace] = {}
    if path is not None:
        done = _resume(path, _digest(model, tasks, conditions, sampling), names, ordered, model)

    def keep(fresh: Mapping[int, Trace]) -> None:
        if path is not None:
            append_jsonl(path, (_row(names[i], trace) for i, trace in fresh.items()))

    made = run_jobs(model, ordered, sampling, done=done, keep=keep, progress=progress)
    found = dict(zip(order, zip(names, made, strict=True), strict=True))
    return [found[i] for i in range(len(jobs))]


def _row(condition: str, trace: Trace) -> dict[str, Any]:
    """A chain without its prompt, which is known from the experiment."""
    values = {"condition": condition, "task": trace.task.id, "sample": trace.sample, "response": trace.response}
    return values | {"ids": trace.response_ids, "offsets": trace.offsets, "finished": trace.finished}


def _digest(
    model: TransformerBridge, tasks: Sequence[Task], conditions: Sequence[Condition], sampling: Sampling
) -> str:
    parts = [
        replace(models.fingerprint(model), name="", revision="").to_dict(),  # a folder may be moved
        [task.to_dict() for task in tasks],
        [
            [
                condition.name,
                condition.suffix,
                condition.prefill,
                None if condition.plan is None else condition.plan.identity(),
            ]
            for condition in conditions
        ],
        [plan.identity() for plan in active_plans(model)],
        asdict(sampling),
    ]
    return digest(json.dumps(parts).encode())


def _resume(
    path: Path, digest: str, names: Sequence[str], jobs: Sequence[Job], model: TransformerBridge
) -> dict[int, Trace]:
    if not drop_cut_line(path):
        append_jsonl(path, [{"experiment": digest}])
        return {}
    rows = [values for _, values in read_jsonl(path)]
    if rows[0].get("experiment") != digest:
        raise LensteerError(
            f"{path} holds another experiment ({rows[0].get('experiment')}, this one is {digest}): give another path; "
            "in a run's folder an earlier file has changed since: put that back, or remove this one to measure again"
        )
    numbers = {(name, job.task.id, job.sample): i for i, (name, job) in enumerate(zip(names, jobs, strict=True))}
    done = {}
    for row in rows[1:]:
        with reading(path, "give another path"):
            i = numbers[row["condition"], row["task"], row["sample"]]
            ids, offsets = (revived(tuple[int, ...], row[name]) for name in ("ids", "offsets"))
            written = Generated(ids, revived(bool, row["finished"]))
            models.check_ids(model, [ids])
            done[i] = trace_of(model, jobs[i], written, (revived(str, row["response"]), offsets))
    return done

"""Effects of steering: each behavior pushed down and up, with unsteered, control and prompted conditions.

Effects are differences from the unsteered condition on the same tasks and seeds, tested by flipping signs over tasks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensteer.annotation import Annotator, check_labels
from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.evaluation.clean_chains import CleanChains, on_clean_chains
from lensteer.evaluation.conditions import Condition, Measure, Record, by_condition, named, run_conditions
from lensteer.evaluation.controls import POOLS, control_conditions, match_kl, ranked
from lensteer.evaluation.margins import Margins, text_check
from lensteer.evaluation.results import ConditionSummary, Effect, Evaluation
from lensteer.evaluation.side_effects import side_effects
from lensteer.generation.jobs import Sampling
from lensteer.positions import PositionScope, generated
from lensteer.statistics import Estimate, Ratio, bootstrap_interval, holm, sign_flip_test
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BASELINE_PROMPTS: dict[str, str] = {
    "adding-knowledge": "While you think, recall every fact, definition or rule that may help, and state it.",
    "example-testing": "While you think, try concrete examples and special cases before you trust a conclusion.",
    "uncertainty-estimation": "While you think, say openly wherever you are not sure, and how sure you are.",
    "backtracking": "While you think, give up an approach and try another one whenever you have a doubt about it.",
}
"""Behavior to a sentence that is appended to the question. The organism has its own (`organism.cue`)."""

FORCED_WORDS: dict[str, str] = {
    "adding-knowledge": "I recall that",
    "example-testing": "For example,",
    "uncertainty-estimation": "I'm not sure",
    "backtracking": "Wait,",
}
"""Behavior to words that every chain is made to begin with: the forced-token baseline, for English chains."""


BASE = "unsteered"
KINDS = {"down": -1, "up": 1}
#: Kinds of baselines: conditions for a behavior that add no vector.
BASELINES = ("prompted", "forced")
#: Unsteered chains that the plans are also measured on.
CLEAN_CHAINS = 20
UNITS = ("sentences", "tokens")

Strength = float | tuple[float | None, float | None]
"""The coefficient of a behavior: the same down and up, or one for each; None: not run."""


@checked()
def evaluate(
    model: TransformerBridge,
    tasks: Sequence[Task],
    vectors: BehaviorVectors,
    layers: Mapping[str, int],
    coefficients: Mapping[str, Strength] | float = 1.0,
    *,
    scope: PositionScope = generated,
    unit: str = "difference",
    prompts: Mapping[str, str] | None = None,
    forced: Mapping[str, str] | None = None,
    extra: Sequence[Condition] = (),
    pools: Sequence[str] | None = None,
    n_controls: int = 20,
    control_samples: int | None = None,
    sampling: Sampling | None = None,
    annotator: Annotator | Mapping[str, Annotator] | None = None,
    measure: Measure | Mapping[str, Measure] | None = None,
    margins: Margins | None = None,
    quality: int = 50,
    coherence: Measure | None = None,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = False,
    keep: Callable[[Condition, Trace], object] | None = None,
) -> Evaluation:
    """Steer every behavior of `layers` down and up on held-out tasks, and measure effects and side effects.

    Control vectors are as long as the longest edit at their layer; one set of each pool serves all behaviors at that
    layer.

    Args:
        model: the bridge.
        tasks: held out: neither vectors, layers nor coefficients may have been chosen on them.
        vectors: of the model's behaviors.
        layers: behavior to layer, as `select_layers` returns it.
        coefficients: positive coefficient per behavior, or one for all; a pair is (down, up), with None for a sign that
            is not run.
        scope: positions to steer; the default is compared with others in docs/choices.md.
        unit: what coefficient 1 means; see `SteeringPlan`.
        prompts: behavior to a sentence that asks for it, put after the question: the prompted baseline.
        forced: behavior to words that every chain is made to begin with, such as `FORCED_WORDS`: the forced-token
            baseline. The words themselves are not counted.
        extra: further conditions on the same tasks and seeds, such as `Condition("cache", CachePlan(vector, 0.75))`:
            their measurements are in `Evaluation.conditions`.
        pools: kinds of control vectors, of `POOLS` (as long as the longest edit) and `KL_POOLS` (at its KL); by default
            all of the former for vectors that were fitted with controls, and "isotropic" for others.
        n_controls: control vectors per pool and distinct layer.
        control_samples: chains per task of each control vector and forced-token baseline; by default as many as in the
            steered conditions.
        sampling: how chains are drawn, the same in all conditions.
        annotator: labels each sentence; or several by name: the first one's shares are tested, the others are also
            reported.
        measure: a score of each chain instead of, or next to, shares of sentences: one for all behaviors, or one each.
            If there is one, its scores are tested.
        margins: limits for the text of a condition.
        quality: number of chains per condition whose likelihood is measured.
        coherence: a score of a text from 0 to 100, such as `JudgeScore("How coherent is the response?")`, for as many
            chains; `margins.coherence` limits it.
        seed: of the control vectors and the bootstrap.
        path: JSONL file for resuming.
        progress: show a bar.
        keep: called with the condition and each annotated trace.

    Raises:
        LensteerError: no task or fewer than two, a behavior without vector, an impossible layer or coefficient, fewer
            controls than requested, a behavior that the annotator never labels, a measure that returns no number.
    """
    if len(tasks) < 2:
        raise LensteerError(f"{len(tasks)} task(s): an interval needs at least two")
    vectors.warn_if_of_another(model)
    sampling = sampling or Sampling(n_samples=2)
    margins = margins or Margins()
    if annotator is None and measure is None:
        raise LensteerError("no annotator: give one, such as annotator=rules, or a measure of each chain")
    for each in named(annotator).values() if measure is None else ():
        check_labels(each, list(layers))
    measures = measures_of(measure, list(layers))
    samples = sampling.n_samples if control_samples is None else min(control_samples, sampling.n_samples)
    conditions, without = [Condition(BASE, kind="unsteered")], []
    for behavior, layer in layers.items():
        for (kind, sign), coefficient in zip(KINDS.items(), _both(coefficients, behavior), strict=True):
            if coefficient is None:
                without.append((behavior, kind))
                continue
            plan = SteeringPlan(vectors[behavior], layer, sign * coefficient, scope, unit=unit)
            conditions.append(Condition(f"{behavior}/{kind}", plan, behavior=behavior, kind=kind))
        if prompts and behavior in prompts:
            conditions.append(
                Condition(f"{behavior}/prompted", suffix=prompts[behavior], behavior=behavior, kind="prompted")
            )
        if forced and behavior in forced:
            conditions.append(
                Condition(
                    f"{behavior}/forced",
                    prefill=forced[behavior],
                    n_samples=samples,
                    behavior=behavior,
                    kind="forced",
                )
            )
    if pools is None:
        pools = POOLS if vectors.controls is not None else ("isotropic",)
    controls = control_conditions(
        vectors, conditions, pools=pools, n=n_controls, samples=samples, scope=scope, seed=seed
    )
    path = None if path is None else Path(path)
    matched = None if path is None else path.with_suffix(".matched.json")
    controls = match_kl(
        model, tasks, conditions, controls, system=sampling.system, path=matched, seed=seed, progress=progress
    )
    conditions += [*extra, *controls]
    clean: list[Trace] = []
    first = {task.id for task in tasks[: min(quality, CLEAN_CHAINS)]}

    def seen(condition: Condition, trace: Trace) -> None:
        if condition.kind == "unsteered" and not trace.sample and trace.task.id in first and trace.response_ids:
            clean.append(trace)
        if keep is not None:
            keep(condition, trace)

    records = run_conditions(
        model,
        tasks,
        conditions,
        sampling,
        annotator=annotator,
        measures=measures,
        quality=quality if margins.nll is not None or margins.kl is not None else 0,
        coherence=coherence,
        path=path,
        progress=progress,
        keep=seen,
    )
    found = summarize(records, conditions, margins=margins, seed=seed)
    steered = {c.name: c.plan for c in conditions if c.kind in KINDS and c.plan is not None}
    on_clean: dict[str, CleanChains] = on_clean_chains(model, clean, steered, seed=seed) if len(clean) > 1 else {}
    return replace(
        found,
        conditions=tuple(replace(c, clean=on_clean.get(c.condition)) for c in found.conditions),
        n_samples=sampling.n_samples,
        n_controls=n_controls if controls else 0,
        control_samples=samples,
        scope=scope.name,
        coefficient_unit=unit,
        annotators=tuple(named(annotator)) or ("",),
        without_coefficient=tuple(without),
    )


def measures_of(measure: Measure | Mapping[str, Measure] | None, behaviors: Sequence[str]) -> dict[str, Measure]:
    """A measure for each behavior.

    Raises:
        LensteerError: the names of the measures are not those of the behaviors.
    """
    if measure is None:
        return {}
    if not isinstance(measure, Mapping):
        return dict.fromkeys(behaviors, measure)
    if set(measure) != set(behaviors):
        raise LensteerError(f"measures of {sorted(measure)} for the behaviors {behaviors}: give one for each")
    return dict(measure)


def _both(coefficients: Mapping[str, Strength] | float, behavior: str) -> tuple[float | None, float | None]:
    given = coefficients.get(behavior) if isinstance(coefficients, Mapping) else coefficients
    pair = tuple(given) if isinstance(given, (tuple, list)) else (given, given)
    wrong = len(pair) != 2 or (pair[0] is None and pair[1] is None and not isinstance(given, (tuple, list)))
    if wrong or any(c is not None and not 0 < c < math.inf for c in pair):
        raise LensteerError(
            f"coefficient {given} for {behavior!r}: give a positive, finite one (both signs run), or a pair (down, up)"
        )
    return pair[0], pair[1]


def summarize(
    records: Sequence[Record], conditions: Sequence[Condition], *, margins: Margins | None = None, seed: int = 0
) -> Evaluation:
    """Effects and condition summaries from the records of chains. One of the conditions is unsteered."""
    margins = margins or Margins()
    rows = by_condition(records, conditions)
    standards = [condition.name for condition in conditions if condition.kind == "unsteered"]
    if len(standards) != 1:
        raise LensteerError(
            f"{len(standards)} conditions of kind 'unsteered': give one, that the others are compared with"
        )
    (plain,) = standards
    base = rows[plain]
    checks = {
        condition.name: text_check(rows[condition.name], base, margins, seed=seed)
        for condition in conditions
        if condition.name != plain
    }
    effects: list[Effect] = []
    own = [condition for condition in conditions if condition.kind in (*KINDS, *BASELINES)]
    scored = bool(base[0].scores)
    labeled = not scored or any(set(r.sentences) & {condition.behavior for condition in own} for r in records)
    for annotator in (None, *base[0].others):
        units = [*(["score"] if scored and annotator is None else []), *(UNITS if annotator is None else UNITS[:1])]
        for unit in units if labeled else units[:1]:
            shares = _Shares(rows, plain, unit, annotator, seed)
            found = [_effect(shares, condition, conditions, checks[condition.name].ok) for condition in own]
            effects += _corrected(found)
    return Evaluation(
        tuple(effects),
        tuple(_summary(condition, rows[condition.name], checks.get(condition.name), seed) for condition in conditions),
        n_tasks=len({r.task for r in base}),
        n_samples=max(r.sample for r in base) + 1,
        n_controls=0,
        control_samples=0,
        scope="",
        coefficient_unit="difference",
        side_effects=side_effects(rows, conditions, plain, seed=seed),
    )


Array = np.ndarray[Any, np.dtype[np.float64]]


class _Shares:
    """One annotator's counts in every condition, task by task; results are cached."""

    def __init__(
        self, by_condition: Mapping[str, Sequence[Record]], plain: str, unit: str, annotator: str | None, seed: int
    ) -> None:
        self.by_condition, self.plain, self.unit, self.annotator, self.seed = by_condition, plain, unit, annotator, seed
        self._bases: dict[str, Estimate] = {}

    def sums(self, condition: str, behavior: str) -> dict[str, tuple[float, float]]:
        """Per task, over its samples: the behavior's count, and the count of all."""
        sums: dict[str, tuple[float, float]] = {}
        for r in self.by_condition[condition]:
            if self.unit == "score":
                a, b = sums.get(r.task, (0.0, 0.0))
                sums[r.task] = a + r.scores[behavior], b + 1
                continue
            counts = r.by(self.annotator)
            whole = counts.n_sentences if self.unit == "sentences" else counts.n_tokens
            a, b = sums.get(r.task, (0.0, 0.0))
            sums[r.task] = a + getattr(counts, self.unit).get(behavior, 0), b + whole
        return sums

    def ratio(self, condition: str, behavior: str) -> Ratio:
        """The same as arrays, tasks in order."""
        sums = self.sums(condition, behavior)
        return Ratio(*np.array([sums[t] for t in sorted(sums)], dtype=np.float64).T)

    def fraction(self, condition: str, behavior: str) -> float:
        """The condition's share; NaN if it has no sentences."""
        own, everything = self.ratio(condition, behavior)
        assert everything is not None
        return float(own.sum() / everything.sum()) if everything.any() else math.nan

    def base(self, behavior: str) -> Estimate:
        """The unsteered share with its interval."""
        if behavior not in self._bases:
            self._bases[behavior] = bootstrap_interval(self.ratio(self.plain, behavior), seed=self.seed)
        return self._bases[behavior]


def _effect(shares: _Shares, condition: Condition, conditions: Sequence[Condition], readable: bool) -> Effect:
    behavior, sign = condition.behavior, KINDS.get(condition.kind, 1)
    own, plain = shares.ratio(condition.name, behavior), shares.ratio(shares.plain, behavior)
    share, base = bootstrap_interval(own, seed=shares.seed), shares.base(behavior)
    change = bootstrap_interval(own, plain, seed=shares.seed)
    layer, coefficient, length = -1, 0.0, 0.0
    if condition.plan is not None:
        (edit,) = condition.plan.edits
        layer, coefficient, length = edit.layer, edit.coefficient, edit.length
    controls, null, p_value = ranked(
        shares.fraction,
        [a for a in conditions if a.kind == "control" and a.layer == layer],
        condition,
        [a for a in conditions if a.kind in KINDS],
        shares.plain,
    )
    assert own.weights is not None
    assert plain.weights is not None
    per_task = own.values / np.maximum(own.weights, 1) - plain.values / np.maximum(plain.weights, 1)
    return Effect(
        behavior=behavior,
        kind=condition.kind,
        layer=layer,
        coefficient=coefficient,
        length=length,
        unit=shares.unit,
        annotator=shares.annotator or "",
        share=share,
        base=base,
        events=int(own.values.sum()),
        base_events=int(plain.values.sum()),
        base_event_tasks=int((plain.values > 0).sum()),
        change=change,
        p=sign_flip_test(own, plain, seed=shares.seed) if own.weights.any() else math.nan,
        p_holm=math.nan,
        controls=controls,
        control_low=min(null, default=0.0),
        control_high=max(null, default=0.0),
        p_value=p_value,
        wrong_way=float((sign * per_task < 0).mean()),
        text=readable,
        size=float(per_task.mean() / spread) if (spread := per_task.std(ddof=1)) > 0 else math.nan,
    )


def _corrected(effects: Sequence[Effect]) -> list[Effect]:
    """Effects with Holm's correction over all tests of steering; the baselines are not among them."""
    tested = [e for e in effects if e.kind in KINDS and e.measurable and not math.isnan(e.p)]
    adjusted = dict(zip(map(id, tested), holm([e.p for e in tested]), strict=True))
    return [replace(e, p_holm=e.p if e.kind in BASELINES else adjusted.get(id(e), math.nan)) for e in effects]


def _summary(condition: Condition, records: Sequence[Record], text: Any, seed: int) -> ConditionSummary:
    graded = [r for r in records if r.correct is not None]
    hits = {r.task: 0.0 for r in graded}
    for r in graded:
        hits[r.task] += float(bool(r.correct)) * len(hits) / len(graded)
    nan, right = math.nan, np.array(list(hits.values()))
    mean = {
        field: float(np.mean([getattr(r, field) for r in records]))
        for field in ("parsed", "finished", "length", "n_sentences", "repetition", "compression")
    }
    names = ("nll", "kl", "coherence")
    measured = {name: [v for r in records if (v := getattr(r, name)) is not None] for name in names}
    return ConditionSummary(
        condition=condition.name,
        kind=condition.kind,
        behavior=condition.behavior,
        pool=condition.pool,
        layer=condition.layer,
        chains=len(records),
        accuracy=bootstrap_interval(right, seed=seed) if len(right) > 1 else Estimate(nan, nan, nan, len(right)),
        parsed=mean["parsed"],
        finished=mean["finished"],
        length=mean["length"],
        sentences=mean["n_sentences"],
        sentence_length=sum(r.n_tokens for r in records) / max(1, sum(r.n_sentences for r in records)),
        repetition=mean["repetition"],
        compression=mean["compression"],
        nll=float(np.mean(measured["nll"])) if measured["nll"] else None,
        kl=float(np.mean(measured["kl"])) if measured["kl"] else None,
        text=text,
        coherence=float(np.mean(measured["coherence"])) if measured["coherence"] else None,
    )

"""What steering does: each behavior pushed down and up, beside unsteered, control vectors and a prompted baseline.

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
from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Arm, Measure, Record, by_arm, named, run_arms
from lensteer.evaluation.controls import POOLS, control_arms, ranked
from lensteer.evaluation.results import ArmSummary, Effect, Evaluation
from lensteer.evaluation.text import Margins, text_check
from lensteer.generation.jobs import Sampling
from lensteer.positions import PositionScope, generated
from lensteer.statistics import Estimate, Ratio, bootstrap_interval, holm, sign_flip_test
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

WORDS: dict[str, str] = {
    "adding-knowledge": "While you think, recall every fact, definition or rule that may help, and state it.",
    "example-testing": "While you think, try concrete examples and special cases before you trust a conclusion.",
    "uncertainty-estimation": "While you think, say openly wherever you are not sure, and how sure you are.",
    "backtracking": "While you think, give up an approach and try another one whenever you have a doubt about it.",
}
"""Behavior to a sentence that is appended to the question. The organism has words of its own (`organism.cue`)."""


BASE = "unsteered"
KINDS = {"down": -1, "up": 1}
UNITS = ("sentences", "tokens")

Strength = float | tuple[float | None, float | None]
"""How strongly a behavior is pushed: the same down and up, or one for each; None: not at all."""


def evaluate(
    model: TransformerBridge,
    tasks: Sequence[Task],
    vectors: BehaviorVectors,
    site: Mapping[str, int],
    coefficients: Mapping[str, Strength] | float = 1.0,
    *,
    scope: PositionScope = generated,
    unit: str = "difference",
    words: Mapping[str, str] | None = None,
    extra: Sequence[Arm] = (),
    pools: Sequence[str] | None = None,
    n_random: int = 20,
    control_samples: int | None = None,
    sampling: Sampling | None = None,
    annotator: Annotator | Mapping[str, Annotator] | None = None,
    measure: Measure | Mapping[str, Measure] | None = None,
    margins: Margins | None = None,
    quality: int = 50,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = False,
    keep: Callable[[Arm, Trace], object] | None = None,
) -> Evaluation:
    """Steer every behavior of a site down and up on held-out tasks, and measure everything that moves.

    Control vectors are as long as the longest edit at their layer; one set of each pool serves all behaviors there.

    Args:
        model: the bridge.
        tasks: held out: neither vectors, site nor coefficients may have been chosen on them.
        vectors: of the model's behaviors.
        site: behavior to layer, as `select_layers` returns it.
        coefficients: positive strength per behavior, or one for all; a pair is (down, up), None a way that is not run.
        scope: positions to steer.
        unit: what coefficient 1 is; see `SteeringPlan`.
        words: per behavior, the words that ask for it: the prompted baseline.
        extra: further arms on the same tasks and seeds, such as `Arm("cache", CachePlan(vector, 0.75))`: how their
            chains fare is in `Evaluation.arms`.
        pools: kinds of control vectors, of `POOLS`; by default all for vectors that were fitted with controls, and
            "isotropic" for others.
        n_random: control vectors per pool and distinct layer.
        control_samples: chains per task and control vector; by default as many as in the own arms.
        sampling: how chains are drawn, the same in all arms.
        annotator: says what each sentence is; or several by name: the first one's shares are tested, the others stand
            beside them.
        measure: a score of each chain instead of, or next to, shares of sentences: one for all behaviors, or one each.
            Where there is one, it is what is tested.
        margins: what the text of an arm is held to.
        quality: likelihoods are measured on so many chains per arm.
        seed: of the control vectors and the bootstrap.
        path: JSONL file for resuming.
        progress: show a bar.
        keep: called with the arm and each annotated trace.

    Raises:
        LensteerError: no task or fewer than two, a behavior without vector, an impossible layer or coefficient, fewer
            controls than asked for, a behavior that the annotator never labels, a measure that gives no number.
    """
    if len(tasks) < 2:
        raise LensteerError(f"{len(tasks)} task(s): an interval needs at least two")
    sampling = sampling or Sampling(n_samples=2)
    margins = margins or Margins()
    if annotator is None and measure is None:
        raise LensteerError("no annotator: give one, such as annotator=rules, or a measure of each chain")
    for each in named(annotator).values() if measure is None else ():
        check_labels(each, list(site))
    measures = _measures(measure, list(site))
    arms, without = [Arm(BASE, kind="unsteered")], []
    for behavior, layer in site.items():
        for (kind, sign), strength in zip(KINDS.items(), _both(coefficients, behavior), strict=True):
            if strength is None:
                without.append((behavior, kind))
                continue
            plan = SteeringPlan(vectors[behavior], layer, sign * strength, scope, unit=unit)
            arms.append(Arm(f"{behavior}/{kind}", plan, behavior=behavior, kind=kind))
        if words and behavior in words:
            arms.append(Arm(f"{behavior}/words", words=words[behavior], behavior=behavior, kind="words"))
    samples = sampling.n_samples if control_samples is None else min(control_samples, sampling.n_samples)
    if pools is None:
        pools = POOLS if vectors.controls is not None else ("isotropic",)
    controls = control_arms(vectors, arms, pools=pools, n=n_random, samples=samples, scope=scope, seed=seed)
    arms += [*extra, *controls]
    records = run_arms(
        model,
        tasks,
        arms,
        sampling,
        annotator=annotator,
        measures=measures,
        quality=quality if margins.nll is not None or margins.kl is not None else 0,
        path=None if path is None else Path(path),
        progress=progress,
        keep=keep,
    )
    found = summarize(records, arms, margins=margins, seed=seed)
    return replace(
        found,
        n_samples=sampling.n_samples,
        n_random=n_random if controls else 0,
        control_samples=samples,
        scope=scope.name,
        coefficient_unit=unit,
        annotators=tuple(named(annotator)) or ("",),
        without_dose=tuple(without),
    )


def _measures(measure: Measure | Mapping[str, Measure] | None, behaviors: Sequence[str]) -> dict[str, Measure]:
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
    records: Sequence[Record], arms: Sequence[Arm], *, margins: Margins | None = None, seed: int = 0
) -> Evaluation:
    """Effects and arm summaries from the chains' records. The arms say what each of them is; one is unsteered."""
    margins = margins or Margins()
    rows = by_arm(records, arms)
    standards = [arm.name for arm in arms if arm.kind == "unsteered"]
    if len(standards) != 1:
        raise LensteerError(f"{len(standards)} arms of kind 'unsteered': give one, that the others are compared with")
    (plain,) = standards
    base = rows[plain]
    checks = {arm.name: text_check(rows[arm.name], base, margins, seed=seed) for arm in arms if arm.name != plain}
    effects: list[Effect] = []
    own = [arm for arm in arms if arm.kind in (*KINDS, "words")]
    scored = bool(base[0].scores)
    labeled = not scored or any(set(r.sentences) & {arm.behavior for arm in own} for r in records)
    for annotator in (None, *base[0].others):
        units = [*(["score"] if scored and annotator is None else []), *(UNITS if annotator is None else UNITS[:1])]
        for unit in units if labeled else units[:1]:
            shares = _Shares(rows, plain, unit, annotator, seed)
            found = [_effect(shares, arm, arms, checks[arm.name].ok) for arm in own]
            effects += _corrected(found)
    return Evaluation(
        tuple(effects),
        tuple(_summary(arm, rows[arm.name], checks.get(arm.name), seed) for arm in arms),
        n_tasks=len({r.task for r in base}),
        n_samples=max(r.sample for r in base) + 1,
        n_random=0,
        control_samples=0,
        scope="",
        coefficient_unit="difference",
    )


Array = np.ndarray[Any, np.dtype[np.float64]]


class _Shares:
    """Counts of every arm, task by task, as one annotator sees them; what was worked out once is kept."""

    def __init__(
        self, by_arm: Mapping[str, Sequence[Record]], plain: str, unit: str, annotator: str | None, seed: int
    ) -> None:
        self.by_arm, self.plain, self.unit, self.annotator, self.seed = by_arm, plain, unit, annotator, seed
        self._bases: dict[str, Estimate] = {}

    def sums(self, arm: str, behavior: str) -> dict[str, tuple[float, float]]:
        """Per task, over its samples: the behavior's count, and the count of all."""
        sums: dict[str, tuple[float, float]] = {}
        for r in self.by_arm[arm]:
            if self.unit == "score":
                a, b = sums.get(r.task, (0.0, 0.0))
                sums[r.task] = a + r.scores[behavior], b + 1
                continue
            counts = r.by(self.annotator)
            whole = counts.n_sentences if self.unit == "sentences" else counts.n_tokens
            a, b = sums.get(r.task, (0.0, 0.0))
            sums[r.task] = a + getattr(counts, self.unit).get(behavior, 0), b + whole
        return sums

    def ratio(self, arm: str, behavior: str) -> Ratio:
        """The same as arrays, tasks in order."""
        sums = self.sums(arm, behavior)
        return Ratio(*np.array([sums[t] for t in sorted(sums)], dtype=np.float64).T)

    def fraction(self, arm: str, behavior: str) -> float:
        """The arm's share; NaN where it has no sentence at all."""
        own, everything = self.ratio(arm, behavior)
        assert everything is not None
        return float(own.sum() / everything.sum()) if everything.any() else math.nan

    def base(self, behavior: str) -> Estimate:
        """The unsteered share with its interval."""
        if behavior not in self._bases:
            self._bases[behavior] = bootstrap_interval(self.ratio(self.plain, behavior), seed=self.seed)
        return self._bases[behavior]


def _effect(shares: _Shares, arm: Arm, arms: Sequence[Arm], readable: bool) -> Effect:
    behavior, sign = arm.behavior, KINDS.get(arm.kind, 1)
    own, plain = shares.ratio(arm.name, behavior), shares.ratio(shares.plain, behavior)
    share, base = bootstrap_interval(own, seed=shares.seed), shares.base(behavior)
    change = bootstrap_interval(own, plain, seed=shares.seed)
    layer, coefficient, length = -1, 0.0, 0.0
    if arm.plan is not None:
        (edit,) = arm.plan.edits
        layer, coefficient, length = edit.layer, edit.coefficient, edit.length
    controls, null, p_value = ranked(
        shares.fraction,
        [a for a in arms if a.kind == "control" and a.layer == layer],
        arm,
        [a for a in arms if a.kind in KINDS],
        shares.plain,
    )
    assert own.weights is not None
    assert plain.weights is not None
    per_task = own.values / np.maximum(own.weights, 1) - plain.values / np.maximum(plain.weights, 1)
    return Effect(
        behavior=behavior,
        kind=arm.kind,
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
        null_low=min(null, default=0.0),
        null_high=max(null, default=0.0),
        p_value=p_value,
        wrong_way=float((sign * per_task < 0).mean()),
        text=readable,
    )


def _corrected(effects: Sequence[Effect]) -> list[Effect]:
    """With Holm's correction over the directions that are tested; the prompted baseline is no part of them."""
    tested = [e for e in effects if e.kind in KINDS and e.measurable and not math.isnan(e.p)]
    adjusted = dict(zip(map(id, tested), holm([e.p for e in tested]), strict=True))
    return [replace(e, p_holm=e.p if e.kind == "words" else adjusted.get(id(e), math.nan)) for e in effects]


def _summary(arm: Arm, records: Sequence[Record], text: Any, seed: int) -> ArmSummary:
    graded = [r for r in records if r.correct is not None]
    hits = {r.task: 0.0 for r in graded}
    for r in graded:
        hits[r.task] += float(bool(r.correct)) * len(hits) / len(graded)
    nan, right = math.nan, np.array(list(hits.values()))
    mean = {
        field: float(np.mean([getattr(r, field) for r in records]))
        for field in ("parsed", "finished", "length", "n_sentences", "repetition", "compression")
    }
    measured = {name: [v for r in records if (v := getattr(r, name)) is not None] for name in ("nll", "kl")}
    return ArmSummary(
        arm=arm.name,
        kind=arm.kind,
        behavior=arm.behavior,
        pool=arm.pool,
        layer=arm.layer,
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
    )

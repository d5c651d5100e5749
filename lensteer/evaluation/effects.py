"""What steering does: each behavior pushed down and up, beside doing nothing, random vectors, and asking in words.

Effects are differences to the unsteered arm on the same tasks and seeds, with a bootstrap over tasks. Knows nothing of
how a site or a coefficient was chosen.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lensteer.annotation import Annotator, grammar
from lensteer.directions import isotropic
from lensteer.errors import LensteerError
from lensteer.evaluation.arms import Arm, Record, Sampling, run_arms
from lensteer.evaluation.results import ArmSummary, Effect, Evaluation
from lensteer.positions import PositionScope, onsets
from lensteer.statistics import Interval, Ratio, bootstrap_interval
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors, Direction

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BASE = "unsteered"


def evaluate(
    model: TransformerBridge,
    tasks: Sequence[Task],
    vectors: BehaviorVectors,
    site: Mapping[str, int],
    coefficients: Mapping[str, float] | float = 1.0,
    *,
    scope: PositionScope = onsets,
    words: Mapping[str, str] | None = None,
    extra: Sequence[Arm] = (),
    n_random: int = 20,
    sampling: Sampling | None = None,
    annotator: Annotator = grammar,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = False,
    keep: Callable[[str, Trace], object] | None = None,
) -> Evaluation:
    """Steer every behavior of a site down and up on held-out tasks, and measure everything that moves.

    Random vectors are isotropic and as long as the longest edit at their layer; one set serves all behaviors there.

    Args:
        model: the bridge.
        tasks: held out: neither vectors, site nor coefficients may have been chosen on them.
        vectors: of the model's behaviors.
        site: behavior to layer, as `select_layers` returns it.
        coefficients: positive strength per behavior, or one for all; the arms are minus and plus this.
        scope: positions to steer.
        words: per behavior, the words that ask for it: the prompt baseline.
        extra: further arms on the same tasks and seeds, such as `Arm("cache", CachePlan(vector, 0.75))`: how their
            chains fare is in `Evaluation.arms`.
        n_random: random vectors per distinct layer.
        sampling: how chains are drawn, the same in all arms.
        annotator: says what each sentence is.
        seed: of the random vectors and the bootstrap.
        path: JSONL file for resuming.
        progress: show a bar.
        keep: called with the arm's name and each new trace.

    Raises:
        LensteerError: no task or fewer than two, a behavior without vector, an impossible layer or coefficient.
    """
    if len(tasks) < 2:
        raise LensteerError(f"{len(tasks)} task(s): an interval needs at least two")
    sampling = sampling or Sampling(n_samples=2)
    strength = dict.fromkeys(site, coefficients) if isinstance(coefficients, (int, float)) else dict(coefficients)
    for behavior in site:
        if not 0 < strength.get(behavior, 0) < math.inf:
            raise LensteerError(
                f"coefficient {strength.get(behavior)} for {behavior!r}: give a positive, finite one; both signs run"
            )
    arms = [Arm(BASE)]
    for behavior, layer in site.items():
        for kind, sign in (("down", -1), ("up", 1)):
            plan = SteeringPlan(vectors[behavior], layer, sign * strength[behavior], scope)
            arms.append(Arm(f"{behavior}/{kind}", plan))
        if words and behavior in words:
            arms.append(Arm(f"{behavior}/words", words=words[behavior]))
    arms += extra
    for layer in sorted(set(site.values())):
        longest = max(abs(strength[b]) for b in site if site[b] == layer)
        for direction in random_directions(vectors, layer, n_random, seed=seed):
            arms.append(Arm(f"L{layer}/{direction.label}", SteeringPlan(direction, layer, longest, scope)))
    records = run_arms(
        model,
        tasks,
        arms,
        sampling,
        annotator=annotator,
        path=None if path is None else Path(path),
        progress=progress,
        keep=keep,
    )
    return summarize(records, site, strength, sampling.n_samples, scope.name, seed)


def random_directions(vectors: BehaviorVectors, layer: int, n: int, *, seed: int = 0) -> list[Direction]:
    """Isotropic random directions at one layer, scaled as the behaviors' are.

    Raises:
        LensteerError: a negative number of them, or a layer that the vectors lack.
    """
    if n < 0 or layer not in vectors.layers:
        raise LensteerError(f"{n} random vectors at layer {layer}: give a number from 0, and one of {vectors.layers}")
    row = vectors.layers.index(layer)
    draws = isotropic(n, len(vectors.layers), vectors.raw.shape[-1], seed=seed)[:, row : row + 1].to(vectors.raw)
    return [Direction(f"random-{i}", draw, vectors.mean_norm[row : row + 1], (layer,)) for i, draw in enumerate(draws)]


def summarize(
    records: Sequence[Record],
    site: Mapping[str, int],
    strength: Mapping[str, float],
    n_samples: int,
    scope: str,
    seed: int = 0,
) -> Evaluation:
    """Effects and arm summaries from the chains' records."""
    by_arm: dict[str, list[Record]] = {}
    for record in records:
        by_arm.setdefault(record.arm, []).append(record)
    base = by_arm[BASE]
    nulls = {
        unit: {
            f"{layer}/{b}": [
                _fraction(by_arm[a], b, unit) - _fraction(base, b, unit) for a in by_arm if a.startswith(f"L{layer}/")
            ]
            for b, layer in site.items()
        }
        for unit in ("sentences", "tokens")
    }
    effects = []
    for behavior, layer in site.items():
        unsteered = {unit: _share(base, behavior, unit, seed=seed) for unit in nulls}
        for kind, sign in (("down", -1), ("up", 1), ("words", 1)):
            arm = by_arm.get(f"{behavior}/{kind}")
            if arm is None:
                continue
            for unit, alone in unsteered.items():
                share, change = _share(arm, behavior, unit, seed=seed), _share(arm, behavior, unit, base, seed)
                null = nulls[unit][f"{layer}/{behavior}"]
                # "Not less" holds for NaN too: an arm without any sentence has no share, and counts against.
                exceed = sum(not sign * value < sign * float(change.estimate) for value in null)
                per_task = _per_task(arm, behavior, unit)[2] - _per_task(base, behavior, unit)[2]
                effects.append(
                    Effect(
                        behavior=behavior,
                        kind=kind,
                        layer=-1 if kind == "words" else layer,
                        coefficient=0.0 if kind == "words" else sign * strength[behavior],
                        unit=unit,
                        share=float(share.estimate),
                        share_low=float(share.low),
                        share_high=float(share.high),
                        base=float(alone.estimate),
                        base_low=float(alone.low),
                        base_high=float(alone.high),
                        change=float(change.estimate),
                        low=float(change.low),
                        high=float(change.high),
                        null_low=float(np.min(null)) if null else 0.0,
                        null_high=float(np.max(null)) if null else 0.0,
                        p_value=(1 + exceed) / (1 + len(null)),
                        wrong_way=float((sign * per_task < 0).mean()),
                    )
                )
    return Evaluation(
        tuple(effects),
        tuple(_summary(name, rows, seed) for name, rows in by_arm.items()),
        nulls,
        len({r.task for r in base}),
        n_samples,
        max((len(values) for values in nulls["sentences"].values()), default=0),
        scope,
    )


Array = np.ndarray[Any, np.dtype[np.float64]]


def _per_task(records: Sequence[Record], behavior: str, unit: str) -> tuple[Array, Array, Array]:
    """Per task, over its samples: the behavior's count, the count of all, and their ratio (0 where there is none)."""
    own: dict[str, int] = {}
    everything: dict[str, int] = {}
    for r in records:
        mine, total = (r.sentences, r.n_sentences) if unit == "sentences" else (r.tokens, r.n_tokens)
        own[r.task] = own.get(r.task, 0) + mine[behavior]
        everything[r.task] = everything.get(r.task, 0) + total
    a, b = (np.array([counts[t] for t in sorted(counts)], dtype=np.float64) for counts in (own, everything))
    return a, b, a / np.maximum(b, 1)


def _fraction(records: Sequence[Record], behavior: str, unit: str) -> float:
    own, everything, _ = _per_task(records, behavior, unit)
    return float(own.sum() / everything.sum()) if everything.any() else math.nan


def _share(
    records: Sequence[Record], behavior: str, unit: str, base: Sequence[Record] | None = None, seed: int = 0
) -> Interval:
    own, everything, _ = _per_task(records, behavior, unit)
    minus = None if base is None else Ratio(*_per_task(base, behavior, unit)[:2])
    return bootstrap_interval(Ratio(own, everything), minus, seed=seed)


def _summary(name: str, records: Sequence[Record], seed: int) -> ArmSummary:
    graded = [r for r in records if r.correct is not None]
    hits = {r.task: 0.0 for r in graded}
    for r in graded:
        hits[r.task] += float(bool(r.correct)) * len(hits) / len(graded)
    right = bootstrap_interval(np.array(list(hits.values())), seed=seed) if len(hits) > 1 else None
    mean = {
        field: float(np.mean([getattr(r, field) for r in records]))
        for field in ("parsed", "finished", "length", "n_sentences", "repetition")
    }
    return ArmSummary(
        name,
        *((float("nan"),) * 3 if right is None else (float(right.estimate), float(right.low), float(right.high))),
        mean["parsed"],
        mean["finished"],
        mean["length"],
        mean["n_sentences"],
        mean["repetition"],
    )

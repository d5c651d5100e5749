"""What steering does: each behavior pushed down and up, beside doing nothing, random vectors, and asking in words.

Effects are differences to the unsteered arm on the same tasks and seeds, with a bootstrap over tasks. Knows nothing of
how a site or a coefficient was chosen.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from lensteer.annotation import Annotator, grammar
from lensteer.directions import isotropic
from lensteer.errors import LensteerError
from lensteer.evaluation.arms import Arm, Record, Sampling, run_arms
from lensteer.files import write_atomically
from lensteer.positions import PositionScope, thinking
from lensteer.statistics import Interval, Ratio, bootstrap_interval
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors, Direction

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

BASE = "unsteered"


@dataclass(frozen=True)
class Effect:
    """One arm's share of one behavior, and its change against the unsteered arm, both with 95 % intervals.

    Attributes:
        behavior: whose share.
        kind: "down", "up" (the behavior's own vector) or "words" (the prompt baseline).
        layer: steered (-1 for words).
        coefficient: signed; 0 for words.
        unit: "sentences" or "tokens", of which the share is.
        share: in this arm; `share_low` and `share_high` bound it.
        base: the unsteered share.
        change: share - base, paired by task; `low` and `high` bound it.
        null_low: smallest change of the same share by a random vector; `null_high` the largest.
        p_value: (1 + random vectors that change it at least as far in the wanted direction) / (1 + random vectors).
        wrong_way: share of tasks that move against the wanted direction.
    """

    behavior: str
    kind: str
    layer: int
    coefficient: float
    unit: str
    share: float
    share_low: float
    share_high: float
    base: float
    change: float
    low: float
    high: float
    null_low: float
    null_high: float
    p_value: float
    wrong_way: float

    @property
    def shown(self) -> bool:
        """Whether the change has the wanted sign, its interval excludes 0, and no random vector does as much."""
        if self.kind == "down":
            return self.high < 0 and not self.change >= self.null_low
        return self.low > 0 and not self.change <= self.null_high


@dataclass(frozen=True)
class ArmSummary:
    """How an arm's chains fared, whatever the behavior. Means over chains; `accuracy` with its 95 % interval."""

    arm: str
    accuracy: float
    accuracy_low: float
    accuracy_high: float
    parsed: float
    finished: float
    length: float
    sentences: float
    repetition: float


@dataclass(frozen=True)
class Evaluation:
    """Effects and side effects of steering on held-out tasks."""

    effects: tuple[Effect, ...]
    arms: tuple[ArmSummary, ...]
    nulls: dict[str, dict[str, list[float]]]
    n_tasks: int
    n_samples: int
    n_random: int
    scope: str

    def effect(self, behavior: str, kind: str, unit: str = "sentences") -> Effect:
        """One effect.

        Raises:
            LensteerError: there is none of that name.
        """
        for effect in self.effects:
            if (effect.behavior, effect.kind, effect.unit) == (behavior, kind, unit):
                return effect
        known = sorted({(e.behavior, e.kind, e.unit) for e in self.effects})
        raise LensteerError(f"no effect of {(behavior, kind, unit)}: there are {known}")

    def to_dataframe(self) -> pd.DataFrame:
        """A row per effect."""
        return pd.DataFrame([{**asdict(e), "shown": e.shown} for e in self.effects])

    def arms_dataframe(self) -> pd.DataFrame:
        """A row per arm."""
        return pd.DataFrame([asdict(a) for a in self.arms])

    def save(self, path: str | Path) -> None:
        """Write as JSON, all or nothing."""
        write_atomically(Path(path), json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(path: str | Path) -> Evaluation:
        """Read what `save` wrote.

        Raises:
            LensteerError: no such file, or not such a file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            effects = tuple(Effect(**e) for e in values.pop("effects"))
            arms = tuple(ArmSummary(**a) for a in values.pop("arms"))
            return Evaluation(effects, arms, **values)
        except (OSError, json.JSONDecodeError, KeyError, TypeError) as error:
            raise LensteerError(f"{str(path)!r} is no evaluation ({error}): run the evaluation again") from error


def evaluate(
    model: TransformerBridge,
    tasks: Sequence[Task],
    vectors: BehaviorVectors,
    site: Mapping[str, int],
    coefficients: Mapping[str, float] | float = 1.0,
    *,
    scope: PositionScope = thinking,
    words: Mapping[str, str] | None = None,
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
        coefficients: strength per behavior, or one for all; the arms are minus and plus this.
        scope: positions to steer.
        words: per behavior, the words that ask for it: the prompt baseline.
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
    strength = {b: coefficients if isinstance(coefficients, (int, float)) else coefficients[b] for b in site}
    arms = [Arm(BASE)]
    for behavior, layer in site.items():
        for kind, sign in (("down", -1), ("up", 1)):
            plan = SteeringPlan(vectors[behavior], layer, sign * strength[behavior], scope)
            arms.append(Arm(f"{behavior}/{kind}", plan))
        if words and behavior in words:
            arms.append(Arm(f"{behavior}/words", words=words[behavior]))
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
    """Isotropic random directions at one layer, scaled as the behaviors' are."""
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
                float(_share(by_arm[a], b, unit, base).estimate) for a in by_arm if a.startswith(f"L{layer}/")
            ]
            for b, layer in site.items()
        }
        for unit in ("sentences", "tokens")
    }
    effects = []
    for behavior, layer in site.items():
        for kind, sign in (("down", -1), ("up", 1), ("words", 1)):
            arm = by_arm.get(f"{behavior}/{kind}")
            if arm is None:
                continue
            for unit in ("sentences", "tokens"):
                share, change = _share(arm, behavior, unit, seed=seed), _share(arm, behavior, unit, base, seed)
                null = nulls[unit][f"{layer}/{behavior}"]
                exceed = sum(sign * value >= sign * float(change.estimate) for value in null)
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
                        base=float(_share(base, behavior, unit).estimate),
                        change=float(change.estimate),
                        low=float(change.low),
                        high=float(change.high),
                        null_low=min(null, default=0.0),
                        null_high=max(null, default=0.0),
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

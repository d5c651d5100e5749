"""Choice of coefficients: per behavior and sign, the largest coefficient at which the text is still readable."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lensteer.annotation import Annotator, check_labels
from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import Condition, Measure, Record, by_condition, named, run_conditions
from lensteer.evaluation.dose_response import DoseResponse, dose_response
from lensteer.evaluation.effects import BASE, KINDS, measures_of
from lensteer.evaluation.margins import Margins, TextCheck, check_standard, text_check
from lensteer.generation.jobs import Sampling
from lensteer.positions import PositionScope, generated
from lensteer.results import Saved
from lensteer.steering import SteeringPlan
from lensteer.steering.plans import check_unit
from lensteer.tasks import Task
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

COEFFICIENTS = (0.75, 1.0, 1.5, 2.0)


@dataclass(frozen=True)
class CoefficientTrial:
    """One signed coefficient of one behavior on the dev tasks.

    Attributes:
        behavior: whose vector.
        layer: steered.
        coefficient: signed; 0 is the unsteered condition.
        length: of the added vector.
        share: of the behavior's sentences; or the mean score, if a measure is tested.
        text: comparison of the text with the unsteered condition's; None for that condition.
    """

    behavior: str
    layer: int
    coefficient: float
    length: float
    share: float
    text: TextCheck | None

    @property
    def readable(self) -> bool:
        """Whether the text is no worse than unsteered."""
        return self.text is None or self.text.ok


@dataclass(frozen=True)
class ChosenCoefficients(Saved):
    """The coefficient curve of every behavior, and the coefficients chosen from it.

    Attributes:
        down: behavior to the (positive) coefficient that pushes it down; missing if every coefficient breaks the text.
        up: the same for pushing up.
        curve: every coefficient that was tried.
        margins: limits that the text had to meet.
        coefficient_unit: what coefficient 1 means.
        n_tasks: dev tasks.
        n_samples: chains on each.
        unit: of the curve: "sentences" for shares of sentences, or "score".
        responses: how each behavior's share follows the coefficient, with intervals over the dev tasks.

    Raises:
        LensteerError: an unknown unit of coefficients.
    """

    down: dict[str, float]
    up: dict[str, float]
    curve: tuple[CoefficientTrial, ...]
    margins: Margins
    coefficient_unit: str
    n_tasks: int
    n_samples: int
    unit: str = "sentences"
    responses: tuple[DoseResponse, ...] = ()

    def __post_init__(self) -> None:
        check_unit(self.coefficient_unit)

    @property
    def pairs(self) -> dict[str, tuple[float | None, float | None]]:
        """Behavior to (down, up), as `evaluate` takes it."""
        return {d.behavior: (self.down.get(d.behavior), self.up.get(d.behavior)) for d in self.curve}

    @property
    def coefficients(self) -> dict[str, float]:
        """The coefficients up, by behavior."""
        return dict(self.up)

    def to_dataframe(self) -> pd.DataFrame:
        """A row per behavior and signed coefficient."""
        rows = []
        for trial in self.curve:
            row = {name: value for name, value in asdict(trial).items() if name != "text"}
            figures = () if trial.text is None else trial.text.figures
            rows.append({**row, "readable": trial.readable, **{figure.name: figure.value for figure in figures}})
        return pd.DataFrame(rows)


@checked()
def choose_coefficients(
    model: TransformerBridge,
    tasks: Sequence[Task],
    vectors: BehaviorVectors,
    layers: Mapping[str, int],
    *,
    coefficients: Sequence[float] = COEFFICIENTS,
    margins: Margins | None = None,
    scope: PositionScope = generated,
    unit: str = "difference",
    same_length: bool = True,
    sampling: Sampling | None = None,
    annotator: Annotator | Mapping[str, Annotator] | None = None,
    measure: Measure | Mapping[str, Measure] | None = None,
    quality: int = 25,
    seed: int = 0,
    path: str | Path | None = None,
    progress: bool = False,
) -> ChosenCoefficients:
    """For each behavior and sign, the largest coefficient at which the text is no worse than unsteered.

    No worse: by every figure of `margins`, with an interval over the dev tasks. If every coefficient of a sign breaks
    the text, there is none.

    Args:
        model: the bridge.
        tasks: dev tasks, not those of the evaluation.
        vectors: of the model's behaviors.
        layers: behavior to layer.
        coefficients: positive coefficients to try.
        margins: how much worse than unsteered text may be.
        scope: positions to steer; the default is compared with others in docs/choices.md.
        unit: what coefficient 1 means.
        same_length: at each layer, scale all vectors to the median length of the behaviors' vectors, and lower larger
            coefficients to the most common one, so that behaviors have the same length and share control vectors.
        sampling: how chains are drawn.
        annotator: labels each sentence.
        measure: a score of each chain instead of, or in addition to, labels; see `evaluate`. The margins are the same.
        quality: number of chains per coefficient whose likelihood is measured.
        seed: of the intervals.
        path: JSONL file for resuming.
        progress: show a bar.

    Raises:
        LensteerError: a coefficient that is not positive and finite, fewer than two tasks, a behavior that the
            annotator never labels, a measure that gives no number, or an unsteered condition whose own text counts as
            broken.
    """
    if not coefficients or any(not math.isfinite(d) or d <= 0 for d in coefficients):
        raise LensteerError(
            f"coefficients {list(coefficients)}: give positive, finite coefficients; both signs are tried"
        )
    if len(tasks) < 2:
        raise LensteerError(f"{len(tasks)} dev task(s): an interval needs at least two")
    vectors.warn_if_of_another(model)
    margins, sampling = margins or Margins(), sampling or Sampling()
    ladder = sorted(set(coefficients))
    scales = {b: _scale(vectors, layers, b, unit) if same_length else 1.0 for b in layers}
    for each in named(annotator).values() if measure is None else ():
        check_labels(each, list(layers))
    conditions, tried = [Condition(BASE, kind="unsteered")], []
    for behavior, layer in layers.items():
        for trial in ladder:
            for kind, sign in KINDS.items():
                plan = SteeringPlan(vectors[behavior], layer, sign * trial * scales[behavior], scope, unit=unit)
                conditions.append(Condition(f"{behavior}/{sign * trial:+g}", plan, behavior=behavior, kind=kind))
                tried.append((conditions[-1], plan, trial))
    records = run_conditions(
        model,
        tasks,
        conditions,
        sampling,
        annotator=annotator,
        measures=measures_of(measure, list(layers)),
        quality=quality if margins.nll is not None or margins.kl is not None else 0,
        path=None if path is None else Path(path),
        progress=progress,
    )
    grouped = by_condition(records, conditions)
    base = grouped[BASE]
    check_standard(base, margins)
    curve = [CoefficientTrial(b, layer, 0.0, 0.0, _share(base, b), None) for b, layer in layers.items()]
    largest: dict[tuple[str, str], float] = {}
    for condition, plan, trial in tried:
        rows = grouped[condition.name]
        check = text_check(rows, base, margins, seed=seed)
        share = _share(rows, condition.behavior)
        curve.append(CoefficientTrial(condition.behavior, plan.layer, plan.coefficient, plan.length, share, check))
        if check.ok:
            largest[condition.behavior, condition.kind] = trial
    responses = []
    for behavior, layer in layers.items():
        own = [(condition, plan) for condition, plan, _ in tried if condition.behavior == behavior]
        by_coefficient = {0.0: base} | {plan.coefficient: grouped[condition.name] for condition, plan in own}
        readable = {d.coefficient: d.readable for d in curve if d.behavior == behavior}
        responses.append(dose_response(by_coefficient, readable, behavior, layer, seed=seed))
    if same_length:
        largest = _agreed(largest, layers)
    down, up = ({b: trial * scales[b] for (b, of), trial in largest.items() if of == kind} for kind in KINDS)
    return ChosenCoefficients(
        down,
        up,
        tuple(sorted(curve, key=lambda d: (d.behavior, d.coefficient))),
        margins,
        unit,
        len(tasks),
        sampling.n_samples,
        "sentences" if measure is None else "score",
        tuple(responses),
    )


def _agreed(largest: Mapping[tuple[str, str], float], layers: Mapping[str, int]) -> dict[tuple[str, str], float]:
    """Coefficients lowered to each layer's most common one (the smallest if several are); lower ones stay."""
    found = {}
    for (behavior, kind), trial in largest.items():
        there = [d for (b, _), d in largest.items() if layers[b] == layers[behavior]]
        common = max(sorted(set(there)), key=there.count)
        found[behavior, kind] = min(trial, common)
    return found


def _scale(vectors: BehaviorVectors, layers: Mapping[str, int], behavior: str, unit: str) -> float:
    """The factor that scales a behavior's vector to the median length of the vectors steered at its layer."""
    lengths = sorted(
        float(vectors[b].scaled(layer, unit).norm()) for b, layer in layers.items() if layer == layers[behavior]
    )
    return lengths[len(lengths) // 2] / float(vectors[behavior].scaled(layers[behavior], unit).norm())


def _share(rows: Sequence[Record], behavior: str) -> float:
    if rows and rows[0].scores:
        return sum(r.scores[behavior] for r in rows) / len(rows)
    return sum(r.sentences.get(behavior, 0) for r in rows) / max(sum(r.n_sentences for r in rows), 1)

"""How strongly to steer: the largest coefficient, either way, at which the model still writes what can be read."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd

from lensteer.annotation import Annotator, grammar
from lensteer.errors import LensteerError
from lensteer.evaluation.arms import Arm, Sampling, run_arms
from lensteer.files import write_atomically
from lensteer.positions import PositionScope, onsets
from lensteer.steering import SteeringPlan
from lensteer.tasks import Task
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

DOSES = (0.15, 0.3, 0.5, 0.75, 1.0, 1.5)


@dataclass(frozen=True)
class Dose:
    """One signed coefficient of one behavior on the dev tasks: share of chains that parse, share of its sentences."""

    behavior: str
    layer: int
    coefficient: float
    parsed: float
    share: float


@dataclass(frozen=True)
class Doses:
    """The dose curve of every behavior and the coefficient chosen from it."""

    coefficients: dict[str, float]
    curve: tuple[Dose, ...]
    min_parsed: float
    n_tasks: int

    def to_dataframe(self) -> pd.DataFrame:
        """A row per behavior and signed coefficient."""
        return pd.DataFrame([asdict(dose) for dose in self.curve])

    def save(self, path: str | Path) -> None:
        """Write as JSON, all or nothing."""
        write_atomically(Path(path), json.dumps(asdict(self), indent=1))

    @staticmethod
    def load(path: str | Path) -> Doses:
        """Read what `save` wrote.

        Raises:
            LensteerError: no such file, or not such a file.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
            return Doses(**{**values, "curve": tuple(Dose(**d) for d in values["curve"])})
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise LensteerError(f"{str(path)!r} holds no doses ({error}): choose them again") from error


def choose_coefficients(
    model: TransformerBridge,
    tasks: Sequence[Task],
    vectors: BehaviorVectors,
    site: Mapping[str, int],
    *,
    doses: Sequence[float] = DOSES,
    min_parsed: float = 0.95,
    scope: PositionScope = onsets,
    sampling: Sampling | None = None,
    annotator: Annotator = grammar,
    path: str | Path | None = None,
    progress: bool = False,
) -> Doses:
    """For each behavior the largest dose that leaves chains readable in both directions.

    Args:
        model: the bridge.
        tasks: dev tasks, not those of the evaluation.
        vectors: of the model's behaviors.
        site: behavior to layer.
        doses: positive coefficients to try.
        min_parsed: how many chains must end and be readable, as a share of the unsteered arm's. A dose is too much
            if it falls below by more than the standard error of its own share, so that chance does not decide.
        scope: positions to steer.
        sampling: how chains are drawn.
        annotator: says what each sentence is.
        path: JSONL file for resuming.
        progress: show a bar.

    Raises:
        LensteerError: a dose that is not positive and finite, a `min_parsed` that is no share, or a behavior of which
            every dose is too much.
    """
    if not doses or any(not math.isfinite(d) or d <= 0 for d in doses):
        raise LensteerError(f"doses {list(doses)}: give positive, finite coefficients; both signs are tried")
    if not 0 <= min_parsed <= 1:
        raise LensteerError(f"min_parsed {min_parsed}: give a share of the chains, such as 0.95")
    ladder = sorted(set(doses))
    signed = [(b, layer, sign * dose) for b, layer in site.items() for dose in ladder for sign in (-1, 1)]
    arms = [Arm("unsteered")] + [
        Arm(f"{b}/{c:+g}", SteeringPlan(vectors[b], layer, c, scope)) for b, layer, c in signed
    ]
    sampling = sampling or Sampling()
    records = run_arms(
        model,
        tasks,
        arms,
        sampling,
        annotator=annotator,
        path=None if path is None else Path(path),
        progress=progress,
    )
    curve = []
    for behavior, layer, coefficient in [*((b, layer, 0.0) for b, layer in site.items()), *signed]:
        name = f"{behavior}/{coefficient:+g}" if coefficient else "unsteered"
        rows = [r for r in records if r.arm == name]
        share = sum(r.sentences[behavior] for r in rows) / max(sum(r.n_sentences for r in rows), 1)
        curve.append(Dose(behavior, layer, coefficient, sum(r.parsed for r in rows) / len(rows), share))
    chosen, base = {}, [r.parsed for r in records if r.arm == "unsteered"]

    def too_much(parsed: float) -> bool:
        error = math.sqrt(parsed * (1 - parsed) / len(base))
        return parsed + error < min_parsed * sum(base) / len(base)

    for behavior in site:
        own = [d for d in curve if d.behavior == behavior]
        fits = [dose for dose in ladder if not any(too_much(d.parsed) for d in own if abs(d.coefficient) == dose)]
        if not fits:
            raise LensteerError(
                f"none of ±{ladder} along {behavior!r} leaves {min_parsed:.0%} of the unsteered arm's chains"
                f" readable: try smaller doses, or a lower min_parsed"
            )
        chosen[behavior] = fits[-1]
    return Doses(chosen, tuple(sorted(curve, key=lambda d: (d.behavior, d.coefficient))), min_parsed, len(tasks))

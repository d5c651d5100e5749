"""What an evaluation measured for a plan. It travels with the plan, into every export."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from lensteer.models import ModelId
from lensteer.results import Saved, reading, revived
from lensteer.statistics import Estimate


@dataclass(frozen=True)
class ControlRange:
    """The effects of the control vectors of one pool, at the same layer and at most as long.

    Attributes:
        pool: "isotropic", "covariance_matched" or "shuffled".
        n: control vectors.
        low: their smallest change of the share.
        high: their largest.
        rank: of the plan's own change in its intended direction; 1 if it exceeds all of them.
    """

    pool: str
    n: int
    low: float
    high: float
    rank: int


@dataclass(frozen=True)
class TextMeasure:
    """One figure of the steered text beside the unsteered text's.

    Attributes:
        name: such as "nll", in nats per token under the unsteered model; see `Margins`.
        value: of the steered text.
        base: of the unsteered text.
        limit: the most (or least) that counts as readable.
        ok: whether it is within the limit, with its uncertainty.
    """

    name: str
    value: float
    base: float
    limit: float
    ok: bool


@dataclass(frozen=True)
class Sample:
    """What the model wrote on one held-out task, unsteered and steered."""

    task: str
    unsteered: str
    steered: str


@dataclass(frozen=True)
class Evidence(Saved):
    """Effect and side effects of one plan on held-out tasks. Intervals are 95 % bootstrap intervals over tasks.

    Attributes:
        model: its identity (`ModelId`), as JSON-ready values; empty if the vectors did not record it.
        label: of the direction.
        sign: +1 for a direction that was added, -1 for one that was taken away.
        layer: whose output was edited.
        coefficient: signed.
        coefficient_unit: what coefficient 1 means.
        length: of the vector that was added.
        scope: the positions that were edited.
        unit: of the effect: "sentences" for a share of them, "score" for the mean of a measure over chains.
        annotator: that labeled the sentences, by name.
        n_tasks: held out.
        n_samples: chains per task.
        unsteered: the share (or mean score) without the plan.
        steered: with the plan.
        change: steered less unsteered, paired by task.
        prompted: the share with the prompted baseline, if it was run.
        p: two-sided sign-flip test over tasks, after Holm's correction over all tests of the evaluation.
        controls: changes of the same share by control vectors.
        verdict: in words, as `Effect.verdict`.
        readable: whether the text is no worse than unsteered, by the margins.
        text: the figures behind that.
        accuracy: share of right answers, steered; NaN if none can be graded.
        unsteered_accuracy: the same, unsteered.
        samples: of the text.
        sampling: how chains were drawn: temperature, system prompt and the like, by name.
        lensteer: version that measured it.

    Raises:
        LensteerError: an identity of a model that is none.
    """

    model: dict[str, Any]
    label: str
    sign: int
    layer: int
    coefficient: float
    coefficient_unit: str
    length: float
    scope: str
    unit: str
    annotator: str
    n_tasks: int
    n_samples: int
    unsteered: Estimate
    steered: Estimate
    change: Estimate
    prompted: Estimate | None
    p: float
    controls: tuple[ControlRange, ...]
    verdict: str
    readable: bool | None
    text: tuple[TextMeasure, ...]
    accuracy: Estimate
    unsteered_accuracy: Estimate
    samples: tuple[Sample, ...] = ()
    sampling: dict[str, Any] = field(default_factory=dict)
    lensteer: str = ""

    def __post_init__(self) -> None:
        if self.model:
            with reading("the model's identity in an evidence"):
                revived(ModelId, self.model)

    @property
    def exceeds_controls(self) -> bool | None:
        """Whether the change exceeds that of every control vector; None if there were none."""
        return all(pool.rank == 1 for pool in self.controls) if self.controls else None

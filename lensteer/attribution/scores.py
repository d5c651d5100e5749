"""`LayerScores`: how much each behavior's vector changes the next token at each layer, with intervals over traces.

No model is run here. `efficiency` divides two of them.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lensteer.arguments import checked
from lensteer.attribution.cells import Cells
from lensteer.behaviors import check_behavior
from lensteer.errors import LensteerError
from lensteer.results import Saved

#: A cell below this many times the noise floor is uninformative.
NOISE_FACTOR = 10.0
#: A sampled cell with a larger standard error than this share of its mean is unreliable.
RELATIVE_ERROR = 0.25
#: A quadratic estimate is unreliable for an addition longer than this share of the mean activation, or above this many
#: nats. On the organism (4 behaviors × 8 layers, either sign) the exact KL is off by more than 20 % in 9 % of the cells
#: at 0.1, in 9–22 % at 0.2, 12–28 % at 0.3, 34–50 % at 0.5 and 53–69 % at 1.
QUADRATIC_LENGTH = 0.25
QUADRATIC_NATS = 0.1


@dataclass(frozen=True, eq=False, repr=False)
class LayerScores(Saved):
    """A score per behavior and layer, with a bootstrap interval over traces.

    Attributes:
        labels: The behaviors whose vectors were added, in the order of the first axis.
        layers: The layers, in the order of the second axis.
        n_layers: How many the model has.
        mean: Mean over spans, in `unit`; NaN for a behavior without any span to average over.
        low: Lower end of the 95 % interval; NaN if there are fewer than two traces.
        high: Upper end.
        n_spans: Spans averaged, per behavior.
        n_traces: Traces with any of them: the units of the bootstrap.
        method: Which estimator.
        coefficient: What the scaled vector was multiplied by.
        coefficient_unit: What coefficient 1 means: one of `UNITS`.
        spans: Which onsets: "own", "other" or "all".
        window: Which part of a span is edited: its "onset" or the "span" from there to its last token but one,
            the effects on all its tokens summed.
        noise_floor: The effect of rounding alone, without an addition, in `unit`; None if undefined.
        max_spans: The limit on the spans of a behavior, if there was one.
        cost: "forwards", "rows" (tokens run over a shared cache), "seconds".
        provenance: The model and where the vectors come from.
        cells: The single values, if they were kept.
        unit: "nats", "logits" or "arbitrary".
        samples: How many were drawn at each position, by a sampled estimator.
        standard_error: Of the mean, from that sampling alone; the interval covers the variation over spans.
        kappa: The relative standard error is √(kappa / (samples · spans)); see `cells.sampling_error`.
        controls: For each kind of control vectors, their means in place of the behavior's vector.
        recomputed: Which cells of a quadratic estimate were unreliable and are exact instead.
        estimated: The means before recomputation.
        relative_length: Norm of the added vector relative to the mean activation's.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    mean: Float[Tensor, "behavior layer"]
    low: Float[Tensor, "behavior layer"]
    high: Float[Tensor, "behavior layer"]
    n_spans: tuple[int, ...]
    n_traces: int
    method: str
    coefficient: float
    coefficient_unit: str
    spans: str
    window: str = "onset"
    noise_floor: float | None = None
    max_spans: int | None = None
    cost: dict[str, int | float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    cells: Cells | None = None
    unit: str = "nats"
    samples: int | None = None
    standard_error: Float[Tensor, "behavior layer"] | None = None
    kappa: Float[Tensor, "behavior layer"] | None = None
    controls: dict[str, Float[Tensor, "null behavior layer"]] = field(default_factory=dict)
    recomputed: Bool[Tensor, "behavior layer"] | None = None
    estimated: Float[Tensor, "behavior layer"] | None = None
    relative_length: Float[Tensor, "behavior layer"] | None = None

    @property
    def name(self) -> str:
        """What the values are, for titles: only those in nats are a KL."""
        return f"{self.method} {'KL' if self.unit == 'nats' else 'score'}"

    def row(self, label: str) -> int:
        """The index of a behavior.

        Raises:
            LensteerError: These scores do not have it.
        """
        return self.labels.index(check_behavior(label, self.labels))

    def below_noise(self, factor: float = NOISE_FACTOR) -> Tensor:
        """Which means (`behavior × layer`) are below `factor` times the noise floor, hence uninformative."""
        return self.mean.abs() < factor * (self.noise_floor or 0.0)

    def unreliable(
        self,
        relative_error: float = RELATIVE_ERROR,
        quadratic_length: float = QUADRATIC_LENGTH,
        quadratic_nats: float = QUADRATIC_NATS,
    ) -> Tensor:
        """Which means (`behavior × layer`) are unreliable as estimates of the method's quantity.

        Those below 10 × the noise floor; those whose sampling error exceeds `relative_error` of them; and those
        of a quadratic estimate of the KL for an addition longer than `quadratic_length` of the mean activation, or
        beyond `quadratic_nats`. Only the first rule applies to cells that were recomputed exactly.
        """
        doubtful = torch.zeros_like(self.mean, dtype=torch.bool)
        if self.standard_error is not None:
            doubtful |= self.standard_error > relative_error * self.mean.abs()
        if self.method in ("fisher", "fisher_jvp"):
            doubtful |= self.mean > quadratic_nats
            if self.relative_length is not None:
                doubtful |= self.relative_length > quadratic_length
        if self.recomputed is not None:
            doubtful &= ~self.recomputed
        return doubtful | self.below_noise()

    def to_dataframe(self) -> Any:
        """One row per behavior and layer."""
        import pandas as pd

        noisy, unreliable = self.below_noise(), self.unreliable()
        nothing = torch.full_like(self.mean, math.nan)
        error = nothing if self.standard_error is None else self.standard_error
        exact = torch.zeros_like(noisy) if self.recomputed is None else self.recomputed
        return pd.DataFrame(
            [
                {
                    "behavior": label,
                    "layer": layer,
                    "mean": float(self.mean[b, i]),
                    "low": float(self.low[b, i]),
                    "high": float(self.high[b, i]),
                    "n_spans": self.n_spans[b],
                    "below_noise": bool(noisy[b, i]),
                    "standard_error": float(error[b, i]),
                    "unreliable": bool(unreliable[b, i]),
                    "recomputed": bool(exact[b, i]),
                    "method": self.method,
                    "unit": self.unit,
                    "window": self.window,
                    "coefficient": self.coefficient,
                    "coefficient_unit": self.coefficient_unit,
                    "spans": self.spans,
                }
                for b, label in enumerate(self.labels)
                for i, layer in enumerate(self.layers)
            ]
        )

    def cells_dataframe(self) -> Any:
        """One row per case and layer.

        Raises:
            LensteerError: The cells were not kept.
        """
        import pandas as pd

        if self.cells is None:
            raise LensteerError("these scores have no cells: pass keep_cells=True to attribute")
        cells, n = self.cells, len(self.layers)
        return pd.DataFrame(
            {
                "trace": np.repeat(cells.trace.numpy(), n),
                "span": np.repeat(cells.span.numpy(), n),
                "behavior": [self.labels[b] for b in cells.behavior.tolist() for _ in range(n)],
                "onset": np.repeat(cells.onset.numpy(), n),
                "layer": np.tile(self.layers, len(cells.trace)),
                "value": cells.values.flatten().numpy(),
            }
        )


@checked()
def efficiency(signed: LayerScores, kl: LayerScores) -> LayerScores:
    """Effect toward the behavior per square root of the KL: signed / √KL, in logits per √nat.

    To first order neither numerator nor denominator depends on the coefficient's size, only on its sign. There is no
    interval: both means come from the same spans, and their error does not follow from the two intervals.

    Args:
        signed: Scores of method "signed".
        kl: Scores in nats of the same vectors at the same spans.

    Returns:
        Scores of method "efficiency"; NaN where the KL is below its noise.

    Raises:
        LensteerError: Scores of another kind, or not of the same behaviors, layers, spans, unit or coefficient.
    """
    if signed.method != "signed" or kl.unit != "nats":
        raise LensteerError(
            f"efficiency needs scores of method 'signed' and scores in nats: these are {signed.method!r} and "
            f"{kl.method!r} in {kl.unit}"
        )
    for name in ("labels", "layers", "spans", "window", "coefficient_unit", "coefficient"):
        ours, theirs = getattr(signed, name), getattr(kl, name)
        if ours != theirs:
            raise LensteerError(f"signed scores with {name} {ours!r}, a KL with {theirs!r}: pass both the same")
    value = torch.where(kl.below_noise(), math.nan, signed.mean / kl.mean.sqrt())
    unknown = torch.full_like(value, math.nan)
    return replace(
        signed,
        mean=value,
        low=unknown,
        high=unknown,
        method="efficiency",
        unit="logits/√nat",
        noise_floor=None,
        cost={name: signed.cost[name] + kl.cost[name] for name in signed.cost.keys() & kl.cost.keys()},
        provenance={**signed.provenance, "kl": kl.method},
        cells=None,
        controls={},
    )

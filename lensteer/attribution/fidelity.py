"""How well cheap scores approximate exact ones: correlation, agreement on layers, and the range of coefficients."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lensteer.arguments import checked
from lensteer.attribution.scores import LayerScores
from lensteer.errors import LensteerError

#: An estimate off by more than this share of the exact value is inaccurate.
TOLERATED = 0.2
TOP = 3


@dataclass(frozen=True, eq=False)
class Fidelity:
    """Scores compared with exact ones, at each coefficient of the exact ones.

    Attributes:
        method: Of the scores.
        labels: The behaviors.
        layers: The layers.
        coefficients: Of the exact scores, by absolute value.
        predicted: The scores, extrapolated to each coefficient if they are in nats: a KL grows with its square.
        exact: The exact ones.
        pearson: Correlation over all cells, behaviors × layers.
        spearman: Correlation of their ranks.
        top_overlap: Share of the `TOP` layers with the largest exact scores that are also among those of the scores.
        radius: Smallest absolute coefficient at which |predicted/exact − 1| > 20 %; infinite if there is none, NaN
            for scores that do not predict a KL.
        unreliable: Cells that are unreliable individually: `LayerScores.unreliable` of the scores, at
            their own coefficient, or exact ones below the noise at every coefficient.
        cost_rows: Rows of the exact scores at one coefficient, relative to those of the scores.
        cost_seconds: The same for the time.
    """

    method: str
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    coefficients: tuple[float, ...]
    predicted: Float[Tensor, "coefficient behavior layer"]
    exact: Float[Tensor, "coefficient behavior layer"]
    pearson: tuple[float, ...]
    spearman: tuple[float, ...]
    top_overlap: Float[Tensor, "coefficient behavior"]
    radius: Float[Tensor, "behavior layer"]
    unreliable: Bool[Tensor, "behavior layer"]
    cost_rows: float
    cost_seconds: float

    def to_dataframe(self) -> Any:
        """One row per coefficient, behavior and layer."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "method": self.method,
                    "coefficient": coefficient,
                    "behavior": label,
                    "layer": layer,
                    "predicted": float(self.predicted[k, b, i]),
                    "exact": float(self.exact[k, b, i]),
                    "ratio": float(self.predicted[k, b, i] / self.exact[k, b, i]),
                    "radius": float(self.radius[b, i]),
                    "unreliable": bool(self.unreliable[b, i]),
                }
                for k, coefficient in enumerate(self.coefficients)
                for b, label in enumerate(self.labels)
                for i, layer in enumerate(self.layers)
            ]
        )


@checked()
def fidelity(scores: LayerScores, exact: LayerScores | Sequence[LayerScores]) -> Fidelity:
    """Compare scores with exact ones of the same vectors.

    Args:
        scores: Of any method.
        exact: Exact scores, at one coefficient or several.

    Raises:
        LensteerError: Scores that are not exact, or not of the same behaviors, layers and unit.
    """
    several = sorted([exact] if isinstance(exact, LayerScores) else exact, key=lambda s: abs(s.coefficient))
    if not several:
        raise LensteerError("no exact scores to compare with: pass at least one")
    for truth in several:
        if truth.method != "exact":
            raise LensteerError(f"scores of method {truth.method!r} are not a reference: pass those of method 'exact'")
        for name in ("labels", "layers", "coefficient_unit"):
            ours, theirs = getattr(scores, name), getattr(truth, name)
            # Unit and norm-matched vectors differ by a factor per layer, which `published` leaves out by design.
            if ours != theirs and not (name == "coefficient_unit" and scores.unit != "nats"):
                raise LensteerError(f"scores with {name} {ours!r}, exact ones with {theirs!r}: use the same for both")
    is_kl = scores.unit == "nats"
    values = scores.mean if scores.estimated is None else scores.estimated
    if is_kl and not scores.coefficient:
        raise LensteerError("scores at coefficient 0 predict nothing: score at another one")
    factors = [(truth.coefficient / scores.coefficient) ** 2 if is_kl else 1.0 for truth in several]
    predicted = torch.stack([factor * values for factor in factors])
    truths = torch.stack([truth.mean for truth in several])
    off = (predicted / truths - 1).abs() > TOLERATED
    sizes = torch.tensor([abs(truth.coefficient) for truth in several], dtype=torch.float64)
    radius = torch.where(off, sizes[:, None, None], math.inf).amin(0)
    silent = torch.stack([truth.below_noise() for truth in several]).all(0)
    return Fidelity(
        method=scores.method,
        labels=scores.labels,
        layers=scores.layers,
        coefficients=tuple(truth.coefficient for truth in several),
        predicted=predicted,
        exact=truths,
        pearson=tuple(_correlation(p, t, "pearson") for p, t in zip(predicted, truths, strict=True)),
        spearman=tuple(_correlation(p, t, "spearman") for p, t in zip(predicted, truths, strict=True)),
        top_overlap=torch.stack([_top_overlap(p, t) for p, t in zip(predicted, truths, strict=True)]),
        radius=torch.where(truths.isnan().any(0), math.nan, radius) if is_kl else torch.full_like(radius, math.nan),
        unreliable=scores.unreliable() | silent,
        cost_rows=_cost(several, scores, "rows"),
        cost_seconds=_cost(several, scores, "seconds"),
    )


def _correlation(predicted: Tensor, exact: Tensor, kind: str) -> float:
    import pandas as pd

    both = pd.DataFrame({"predicted": predicted.flatten().numpy(), "exact": exact.flatten().numpy()}).dropna()
    return float(both.corr(method=kind).iloc[0, 1])


def _top_overlap(predicted: Float[Tensor, "behavior layer"], exact: Float[Tensor, "behavior layer"]) -> Tensor:
    k = min(TOP, exact.shape[1])
    ours, theirs = (values.topk(k, dim=1).indices for values in (predicted, exact))
    shared = (ours[:, :, None] == theirs[:, None]).any(2).double().mean(1)
    return torch.where((predicted.isnan() | exact.isnan()).any(1), math.nan, shared)


def _cost(several: Sequence[LayerScores], scores: LayerScores, name: str) -> float:
    """Mean cost of one coefficient of the exact scores, divided by the cost of the scores."""
    each = [truth.cost[name] / truth.cost.get("coefficients", 1) for truth in several if name in truth.cost]
    if not each or not scores.cost.get(name):
        return math.nan
    return sum(each) / len(each) / scores.cost[name]

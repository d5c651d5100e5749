"""Cosine similarity between behavior vectors, with intervals, reliability, and the component that all vectors share.

Every product is in double precision.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.results import Result
from lensteer.vectors import BehaviorVectors


@dataclass(frozen=True, eq=False, repr=False)
class CosineMatrix(Result):
    """Cosines between the vectors of all pairs of behaviors, each at its own layer.

    Attributes:
        labels: of both axes.
        layers: at which each behavior's vector was taken.
        values: symmetric; NaN where a cosine is undefined.
        low: lower end of the interval, if the vectors have replicates.
        high: upper end.
        level: of the interval.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    values: Float[Tensor, "behavior behavior"]
    low: Float[Tensor, "behavior behavior"] | None = None
    high: Float[Tensor, "behavior behavior"] | None = None
    level: float = 0.95

    def at(self, first: str, second: str) -> float:
        """The cosine of one pair."""
        for label in (first, second):
            if label not in self.labels:
                raise LensteerError(f"no behavior {label!r} here: choose from {', '.join(map(repr, self.labels))}")
        return float(self.values[self.labels.index(first), self.labels.index(second)])

    def ordered(self) -> CosineMatrix:
        """The same, with similar behaviors next to each other: leaves of an average-linkage tree on 1 - cosine."""
        from scipy.cluster.hierarchy import leaves_list, linkage, optimal_leaf_ordering
        from scipy.spatial.distance import squareform

        if len(self.labels) < 3:
            return self
        apart = 1 - self.values.nan_to_num(0.0).double().numpy()
        condensed = squareform((apart + apart.T) / 2, checks=False)
        order = leaves_list(optimal_leaf_ordering(linkage(condensed, "average"), condensed)).tolist()
        values, low, high = (None if t is None else t[order][:, order] for t in (self.values, self.low, self.high))
        assert values is not None
        labels, layers = tuple(self.labels[i] for i in order), tuple(self.layers[i] for i in order)
        return CosineMatrix(labels, layers, values, low, high, self.level)

    def to_dataframe(self) -> pd.DataFrame:
        """The matrix, with labels on both sides."""
        return pd.DataFrame(self.values.numpy(), index=list(self.labels), columns=list(self.labels))


@checked()
def cosine_matrix(
    vectors: BehaviorVectors,
    layers: int | Mapping[str, int],
    *,
    default: int | None = None,
    level: float = 0.95,
) -> CosineMatrix:
    """Cosines between behavior vectors.

    Args:
        vectors: with replicates (`fit_vectors(..., n_bootstrap=200)`), every cosine gets a percentile
            interval over resampled traces.
        layers: one layer for all, or one per behavior.
        default: the layer of behaviors that `layers` does not name.
        level: of the intervals.

    Raises:
        LensteerError: a behavior without a layer, or a layer that the vectors lack.
    """
    at = _layers(vectors, layers, default)
    low = high = None
    if vectors.replicates is not None and len(vectors.replicates):
        cosines = _cosines(_pick(vectors.replicates, vectors, at))
        low = torch.quantile(cosines, (1 - level) / 2, dim=0)
        high = torch.quantile(cosines, (1 + level) / 2, dim=0)
    return CosineMatrix(vectors.labels, at, _cosines(_pick(vectors.raw, vectors, at)), low, high, level)


def disattenuated_cosines(
    first: BehaviorVectors,
    second: BehaviorVectors,
    layers: int | Mapping[str, int],
    *,
    default: int | None = None,
) -> CosineMatrix:
    """Cosines corrected for attenuation by noise, from vectors of two halves of the traces.

    `½ (⟨a₁, b₂⟩ + ⟨a₂, b₁⟩) / √(⟨a₁, a₂⟩ ⟨b₁, b₂⟩)`: no product is of two vectors from the same traces, whose errors
    are correlated through a shared baseline. Undefined (NaN) where `⟨a₁, a₂⟩` or `⟨b₁, b₂⟩` is not positive.

    Args:
        first: fitted on one half.
        second: fitted on the other.
        layers: one layer for all, or one per behavior.
        default: the layer of behaviors that `layers` does not name.

    Raises:
        LensteerError: the halves have different behaviors or layers; or as in `cosine_matrix`.
    """
    if (first.labels, first.layers) != (second.labels, second.layers):
        raise LensteerError(
            f"halves have behaviors {first.labels} at layers {first.layers} and {second.labels} at "
            f"{second.layers}: they must be the same"
        )
    at = _layers(first, layers, default)
    a, b = _pick(first.raw, first, at), _pick(second.raw, second, at)
    cross = a @ b.T
    own = cross.diagonal()
    own = torch.where(own > 0, own, torch.nan)
    return CosineMatrix(first.labels, at, (cross + cross.T) / 2 / (own[:, None] * own[None]).sqrt())


def common_component(vectors: BehaviorVectors) -> Float[Tensor, " layer"]:
    """Length of the count-weighted mean of the vectors, as a share of the mean activation's length.

    About 0 if positives and baseline are read at similar positions. If positives are span beginnings and the baseline
    is every token, all vectors share the difference between these positions; the published vectors have 0.22
    (R1-Qwen-1.5B, layer 17).

    Raises:
        LensteerError: the vectors have no counts.
    """
    missing = [label for label in vectors.labels if label not in vectors.counts]
    if missing:
        raise LensteerError(f"no span counts of {', '.join(map(repr, missing))}: give `counts` to `from_means`")
    counts = torch.tensor([vectors.counts[label] for label in vectors.labels], dtype=torch.float64)
    mean = torch.einsum("b,bld->ld", counts / counts.sum(), vectors.raw.double())
    return mean.norm(dim=-1) / vectors.mean_norm.double()


def _layers(vectors: BehaviorVectors, layers: int | Mapping[str, int], default: int | None) -> tuple[int, ...]:
    wanted = [
        layers if isinstance(layers, int) else layers[label] if label in layers else default for label in vectors.labels
    ]
    homeless = [label for label, layer in zip(vectors.labels, wanted, strict=True) if layer is None]
    if homeless:
        raise LensteerError(f"layers names no layer for {', '.join(map(repr, homeless))}: name them, or give `default`")
    at = tuple(layer for layer in wanted if layer is not None)
    for label, layer in zip(vectors.labels, at, strict=True):
        vectors[label].at(layer)  # raises for a layer that they lack
    return at


def _pick(raw: Tensor, vectors: BehaviorVectors, at: tuple[int, ...]) -> Float[Tensor, "... behavior d_model"]:
    rows = [vectors.layers.index(layer) for layer in at]
    return raw[..., torch.arange(len(at)), torch.tensor(rows), :].double()


def _cosines(rows: Float[Tensor, "... behavior d_model"]) -> Float[Tensor, "... behavior behavior"]:
    unit = rows / rows.norm(dim=-1, keepdim=True)
    return unit @ unit.mT

"""Constructions that depend on more than means: they keep the features of all spans, and fit when those are complete.

Each is a function from activations and weights to a direction per behavior. The direction's length and sign are set
here, in the same way for all.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.activations import TraceFeatures
from lensteer.errors import LensteerError
from lensteer.vectors.components import component_normals
from lensteer.vectors.constructions import (
    ContrastSums,
    Recipe,
    contrast_weights,
    label_sides,
    mean_gaps,
    times_drawn,
)
from lensteer.vectors.discriminants import discriminants, whitened_differences
from lensteer.vectors.probes import check_memory, probe_normals

Normals = Callable[[Tensor, Tensor], Tensor]
"""From activations, `[span d_model]` in fp64, and the weight of each span in the positive and the negative mean of
every behavior, `[sign behavior span]`, to `[behavior d_model]`: directions of any length and sign, NaN if one of the
means is empty."""
NORMALS: dict[str, Normals] = {
    "logistic": probe_normals,
    "lda": discriminants,
    "whitened": whitened_differences,
    "pca": component_normals,
}


@dataclass(frozen=True, eq=False)
class _Kept:
    """Data of one trace: features, labels of each side, lengths of windows, times drawn by each replicate."""

    spans: Float[Tensor, "span layer d_model"]
    sides: Int[Tensor, "side span"]
    lengths: Float[Tensor, " span"]
    drawn: Float[Tensor, " replicate"]


class KeptFits:
    """Keeps traces' features, then fits each side, behavior and layer. Same interface as `ContrastSums`.

    A vector is the projection of a difference of means, that of the behavior's spans less that of the others, on the
    construction's direction: raw = n̂ · ⟨n̂, mean(positives) − mean(negatives)⟩, with n̂ of length 1. So its length is
    comparable to that of a difference of means against "rest", and it points to the behavior.

    Features take `4 · spans · layers · d_model` bytes; each shuffle of labels and each replicate costs a fit per
    layer, for probes and components per behavior and layer.

    Args:
        recipe: its construction, and which spans it separates, with the weight of each.
        labels: as for `ContrastSums`, like the following.
        n_layers: size of the layer axis.
        d_model: width of the residual stream.
        n_controls: random vectors of each kind.
        n_bootstrap: replicates.
        seed: of all randomness: the shuffles and replicates are those of `ContrastSums`.
        window: which entry of the features' window axis is the recipe's.
    """

    def __init__(
        self,
        recipe: Recipe,
        labels: Sequence[str],
        n_layers: int,
        d_model: int,
        *,
        n_controls: int = 0,
        n_bootstrap: int = 0,
        seed: int = 0,
        window: int = 0,
    ) -> None:
        self.recipe, self.n_controls, self.n_bootstrap = recipe, n_controls, n_bootstrap
        self._rest = replace(recipe, negatives="rest", construction="difference")
        # Counts, means and the controls that do not depend on the construction.
        self._sums = ContrastSums(
            self._rest, labels, n_layers, d_model, n_controls=n_controls, seed=seed, window=window
        )
        self._shape = len(self._sums.labels), n_layers, d_model
        self._kept: list[_Kept] = []
        self._n_spans = 0

    @property
    def labels(self) -> tuple[str, ...]:
        """The behaviors, in the order of the axis."""
        return self._sums.labels

    @property
    def seed(self) -> int:
        """Seed of all randomness."""
        return self._sums.seed

    @property
    def counts(self) -> Int[Tensor, " behavior"]:
        """Spans of each behavior."""
        return self._sums.counts

    @property
    def n_traces(self) -> int:
        """Number of traces."""
        return self._sums.n_traces

    def add(self, features: TraceFeatures) -> None:
        """Add one trace.

        Raises:
            LensteerError: a span's label is not among the behaviors, or the features outgrow the memory limit.
        """
        self._n_spans += len(features.labels)
        check_memory(self._n_spans, *self._shape[1:])
        self._sums.add(features)
        window = self._sums.window
        kept = _Kept(
            features.spans[window].clone(),  # not a view, which would keep the whole batch
            label_sides(features, self.labels, self.n_controls, self.seed),
            features.lengths[window].double(),
            times_drawn(features, self.n_bootstrap, self.seed),
        )
        self._kept.append(kept)

    def merge(self, other: KeptFits) -> None:
        """Add the features of other traces.

        Raises:
            LensteerError: the other one has a different recipe, behaviors, controls or seed.
        """
        for name in ("recipe", "n_bootstrap"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise LensteerError(f"cannot merge fits with {name} {theirs!r} into {mine!r}: they must be the same")
        self._sums.merge(other._sums)
        self._kept += other._kept
        self._n_spans += other._n_spans

    def all_tokens(self) -> Float[Tensor, "layer d_model"]:
        """Mean activation over all thinking tokens, with equal weight per trace."""
        return self._sums.all_tokens()

    def covariance_matched(self) -> Float[Tensor, "control layer d_model"]:
        """As `ContrastSums.covariance_matched`."""
        return self._sums.covariance_matched()

    def difference(self) -> Float[Tensor, "behavior layer d_model"]:
        """A vector per behavior and layer; NaN without positives or negatives."""
        return self._fitted([(0, None)])[0]

    def shuffled(self) -> Float[Tensor, "control behavior layer d_model"]:
        """The same, with the labels permuted among the spans of each trace."""
        return self._fitted([(side, None) for side in range(1, 1 + self.n_controls)])

    def replicates(self) -> Float[Tensor, "replicate behavior layer d_model"]:
        """The same, on resampled traces (Poisson bootstrap); NaN if none of them has a behavior."""
        return self._fitted([(0, replicate) for replicate in range(self.n_bootstrap)])

    def _fitted(self, sides: list[tuple[int, int | None]]) -> Float[Tensor, "side behavior layer d_model"]:
        out = torch.full((len(sides), *self._shape), torch.nan, dtype=torch.float64)
        if not self._kept:
            return out
        weights = [torch.cat([self._weights(kept, *side) for kept in self._kept], -1) for side in sides]
        for layer in range(self._shape[1]):
            x = torch.cat([kept.spans[:, layer] for kept in self._kept]).double()
            for a, of_side in enumerate(weights):
                normals = NORMALS[self.recipe.construction](x, of_side)
                normals = normals / normals.norm(dim=-1, keepdim=True).clamp_min(1e-300)
                out[a, :, layer] = normals * (normals * mean_gaps(x, of_side)).sum(-1, keepdim=True)
        return out

    def _weights(self, kept: _Kept, side: int, replicate: int | None) -> Float[Tensor, "sign behavior span"]:
        n_behaviors = self._shape[0]
        weights = contrast_weights(kept.sides[side : side + 1], kept.lengths, 1, n_behaviors, self._rest)[0, ..., :-1]
        if self.recipe.negatives == "same_trace":  # equal weight of positives and others within a trace
            masses = weights.sum(-1, keepdim=True)
            weights = torch.stack([weights[0], weights[1] * masses[0] / masses[1].clamp_min(1e-300)])
        return weights if replicate is None else weights * kept.drawn[replicate]

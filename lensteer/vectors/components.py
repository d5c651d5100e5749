"""The principal component of differences: of pairs, or of a behavior's spans from the others.

Like a probe, it is not a sum over pairs: the features of all pairs stay in memory, within the same limit.
"""

from __future__ import annotations

import hashlib

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.activations import TraceFeatures
from lensteer.statistics import trace_generator
from lensteer.vectors.constructions import times_drawn
from lensteer.vectors.probes import check_memory


def principal_component(
    differences: Float[Tensor, "pair d_model"], weights: Float[Tensor, " pair"] | None = None
) -> Float[Tensor, " d_model"]:
    """The direction along which differences are largest, as long as their mean along it: n̂ ⟨n̂, d̄⟩.

    n̂ maximizes Σᵢ wᵢ ⟨n̂, dᵢ⟩², the second moment about zero. So the mean difference matters, but the order of a
    pair's sides does not: it is the PCA of the pairs' sides about each pair's center, as in repeng ("pca_center") and,
    with signs drawn at random, in Zou et al. (arXiv 2310.01405). PCA of the differences about *their* mean (repeng's
    "pca_diff") would remove exactly what the pairs have in common. n̂'s sign is that of the mean difference.

    Args:
        differences: positive less negative, fp64.
        weights: of the pairs; equal by default.

    Returns:
        NaN if no pair has weight.
    """
    weights = differences.new_ones(len(differences)) if weights is None else weights
    if not weights.sum() > 0:
        return differences.new_full(differences.shape[1:], torch.nan)
    mean = (weights / weights.sum()) @ differences
    rows = differences * weights.sqrt()[:, None]
    if len(rows) < rows.shape[1]:  # the smaller of the two Gram matrices
        normal = rows.T @ torch.linalg.eigh(rows @ rows.T).eigenvectors[:, -1]
        normal = normal / normal.norm().clamp_min(1e-300)
    else:
        normal = torch.linalg.eigh(rows.T @ rows).eigenvectors[:, -1]
    return normal * (normal @ mean)


def component_normals(
    x: Float[Tensor, "span d_model"], weights: Float[Tensor, "sign behavior span"]
) -> Float[Tensor, "behavior d_model"]:
    """The principal component of each behavior's spans less the mean of the others.

    n̂ maximizes Σᵢ wᵢ ⟨n̂, xᵢ − μ⁻⟩² over the behavior's spans: as for pairs, with the mean of the others as the second
    side of each (Zou et al., arXiv 2310.01405, pair stimuli at random). The sum is (μ⁺ − μ⁻)² along n̂ plus the variance
    of the behavior's spans, so it follows the difference of means only where that is larger than the spread.

    Args:
        x: activations, fp64.
        weights: of each span in the positive and in the negative mean of every behavior.

    Returns:
        NaN for a behavior without positives or negatives.
    """
    negatives = (weights[1] / weights[1].sum(-1, keepdim=True)) @ x
    found = []
    for positive, negative in zip(weights[0], negatives, strict=True):
        own = positive > 0
        component = x.new_full(x.shape[1:], torch.nan)
        if own.any() and negative.isfinite().all():
            component = principal_component(x[own] - negative, positive[own])
        found.append(component)
    return torch.stack(found)


class PairComponents:
    """Keeps pairs' features, then finds a component per layer. Same interface as `ContrastSums`, for pairs only.

    Features take `8 · pairs · layers · d_model` bytes. Swapping the sides of pairs does not change a principal
    component, so its shuffled control re-pairs the sides at random.

    Args:
        n_layers: size of the layer axis.
        d_model: width of the residual stream.
        n_controls: shuffled vectors.
        n_bootstrap: replicates.
        seed: of all randomness.
    """

    def __init__(
        self, n_layers: int, d_model: int, *, n_controls: int = 0, n_bootstrap: int = 0, seed: int = 0
    ) -> None:
        self._shape = n_layers, d_model
        self.n_controls, self.n_bootstrap, self.seed = n_controls, n_bootstrap, seed
        self._kept: dict[str, tuple[Float[Tensor, "side layer d_model"], Float[Tensor, " replicate"]]] = {}

    def add(self, features: TraceFeatures) -> None:
        """Add one pair: two spans, the positive side first.

        Raises:
            LensteerError: the features outgrow the memory limit.
        """
        assert len(features.labels) == 2
        assert features.key not in self._kept
        check_memory(2 * (len(self._kept) + 1), *self._shape)
        self._kept[features.key] = features.spans[0].clone(), times_drawn(features, self.n_bootstrap, self.seed)

    def _sides(self) -> Float[Tensor, "pair side layer d_model"]:
        """Sides in the order of their keys, so that the order of the pairs changes no draw."""
        return torch.stack([self._kept[key][0] for key in sorted(self._kept)])

    def difference(self) -> Float[Tensor, "1 layer d_model"]:
        """The component of the pairs' differences."""
        return self._found([self._sides()])

    def shuffled(self) -> Float[Tensor, "control 1 layer d_model"]:
        """The same, on randomly re-paired sides."""
        sides = self._sides()
        key = hashlib.sha256("\n".join(sorted(self._kept)).encode()).hexdigest()
        orders = torch.rand(
            self.n_controls, 2 * len(sides), generator=trace_generator(self.seed, "pairing", key)
        ).argsort(dim=1)
        return self._found([sides.flatten(0, 1)[order].view_as(sides) for order in orders])[:, None]

    def replicates(self) -> Float[Tensor, "replicate 1 layer d_model"]:
        """The same, on resampled pairs (Poisson bootstrap); NaN if none was drawn."""
        sides = self._sides()
        drawn = torch.stack([self._kept[key][1] for key in sorted(self._kept)], dim=1)
        return self._found([sides] * self.n_bootstrap, drawn)[:, None]

    def _found(
        self, sides: list[Tensor], weights: Float[Tensor, "side pair"] | None = None
    ) -> Float[Tensor, "side layer d_model"]:
        out = torch.empty(len(sides), *self._shape, dtype=torch.float64)
        for a, pairs in enumerate(sides):
            for layer in range(self._shape[0]):
                differences = (pairs[:, 0, layer] - pairs[:, 1, layer]).double()
                out[a, layer] = principal_component(differences, None if weights is None else weights[a])
        return out

"""Logistic probes: the normal of the plane that separates a behavior's spans from the others, and its accuracy.

A probe is not a sum over traces: the features of all spans stay in memory, within a stated limit.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.activations import TraceFeatures
from lensteer.errors import LensteerError
from lensteer.vectors.constructions import ContrastSums, Recipe, contrast_weights, label_sides, times_drawn

#: Memory limit for the features of all spans and the copies of the layer that is being fitted.
MAX_BYTES = 4 * 2**30
#: λ below. It applies to the mean, not the sum, of the losses, so that more spans do not weaken the penalty. On 2594
#: spans of the organism (width 128) accuracy on held-out tasks was .739 on average at 1e-1, and .714 at 1e-3 (8 of 10
#: cells).
PENALTY = 0.1


def check_memory(n_spans: int, n_layers: int, d_model: int) -> None:
    """Raise if the probes' features exceed the memory limit.

    Raises:
        LensteerError: the features would take more than `MAX_BYTES`.
    """
    needed = n_spans * d_model * (4 * n_layers + 24)
    if needed > MAX_BYTES:
        raise LensteerError(
            f"probes keep the features of all spans: {n_spans} spans × {n_layers} layers × d_model {d_model} take "
            f"{needed / 2**30:.1f} GiB, more than {MAX_BYTES / 2**30:.1f}: give fewer layers at a time, or fewer traces"
        )


class Probe(NamedTuple):
    """Log-odds of the positive class at activation x: `x @ weights + bias`. So x + v adds `v @ weights` to them."""

    weights: Float[Tensor, " d_model"]
    bias: float


def fit_probe(
    x: Float[Tensor, "span d_model"], positive: Float[Tensor, " span"], negative: Float[Tensor, " span"]
) -> Probe | None:
    """The L2-penalized logistic regression of one class against another, each with total weight one half.

    min_w,b  Σ_s ω_s log(1 + exp(−y_s (w·z_s + b))) + λ/2 ‖w‖²,  z = (x − mean) / σ,  λ = `PENALTY`,
    with mean and standard deviation under the same weights ω. The result is mapped back: weights = w / σ.

    Args:
        x: activations, fp64.
        positive: weight of each span in the positive class, 0 if it is not of it.
        negative: the same for the negative class.

    Returns:
        None if one of the classes is empty.
    """
    if not (positive.sum() > 0 and negative.sum() > 0):
        return None
    from sklearn.linear_model import LogisticRegression

    weights = 0.5 * (positive / positive.sum() + negative / negative.sum())
    mean = weights @ x
    z = x - mean
    sigma = (weights @ z.square()).sqrt()
    still = sigma <= 1e-7 * x.abs().amax(0)  # varies by less than single precision resolves
    z[:, still], sigma[still] = 0.0, 1.0
    model = LogisticRegression(C=1 / PENALTY, tol=1e-6, max_iter=1000)
    model.fit((z / sigma).numpy(), (positive > 0).numpy(), sample_weight=weights.numpy())
    normal = torch.as_tensor(model.coef_[0], dtype=torch.float64) / sigma
    return Probe(normal, float(model.intercept_[0]) - float(normal @ mean))


@dataclass(frozen=True, eq=False)
class _Kept:
    """Data of one trace: features, labels of each side, lengths of windows, times drawn by each replicate."""

    spans: Float[Tensor, "span layer d_model"]
    sides: Int[Tensor, "side span"]
    lengths: Float[Tensor, " span"]
    drawn: Float[Tensor, " replicate"]


class ProbeFits:
    """Keeps traces' features, then fits a probe per side, behavior and layer. Same interface as `ContrastSums`.

    A vector is the probe's unit normal, toward the behavior, times the distance between the two classes' means along
    it: raw = n̂ · ⟨n̂, mean(positives) − mean(negatives)⟩, n̂ = weights / ‖weights‖. So its length is comparable to
    that of a difference of means against "rest", whose projection it is. (The penalized optimum always has the
    positives' mean on its positive side.)

    Features take `4 · spans · layers · d_model` bytes; each shuffle of labels and each replicate costs a fit per
    behavior and layer.

    Args:
        recipe: its window, negatives and aggregation: which spans are separated, and the weight of each.
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

    def merge(self, other: ProbeFits) -> None:
        """Add the features of other traces.

        Raises:
            LensteerError: the other one has a different recipe, behaviors, controls or seed.
        """
        for name in ("recipe", "n_bootstrap"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise LensteerError(f"cannot merge probes with {name} {theirs!r} into {mine!r}: they must be the same")
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
                for b, (positive, negative) in enumerate(of_side.unbind(1)):
                    if (probe := fit_probe(x, positive, negative)) is not None:
                        normal = probe.weights / probe.weights.norm().clamp_min(1e-300)
                        gap = (positive / positive.sum() - negative / negative.sum()) @ x
                        out[a, b, layer] = normal * (normal @ gap)
        return out

    def _weights(self, kept: _Kept, side: int, replicate: int | None) -> Float[Tensor, "sign behavior span"]:
        n_behaviors = self._shape[0]
        weights = contrast_weights(kept.sides[side : side + 1], kept.lengths, 1, n_behaviors, self._rest)[0, ..., :-1]
        if self.recipe.negatives == "same_trace":  # equal weight of positives and others within a trace
            masses = weights.sum(-1, keepdim=True)
            weights = torch.stack([weights[0], weights[1] * masses[0] / masses[1].clamp_min(1e-300)])
        return weights if replicate is None else weights * kept.drawn[replicate]


def cross_validated(
    x: Float[Tensor, "span layer d_model"],
    labels: Int[Tensor, " span"],
    groups: Int[Tensor, " span"],
    n_behaviors: int,
    *,
    n_folds: int = 5,
) -> Float[Tensor, "behavior layer span"]:
    """Log-odds that each span is of each behavior, by probes fitted on the folds without the span's group.

    Standardization is part of the fit. NaN if the other folds lack the behavior, or contain nothing else.

    Args:
        x: activations.
        labels: index of each span's behavior.
        groups: what must not be split between folds: the number of the span's trace or task.
        n_behaviors: number of behaviors.
        n_folds: of the groups.

    Raises:
        LensteerError: fewer than two folds, or fewer groups than folds.
    """
    n_groups = len(groups.unique())
    if not 2 <= n_folds <= n_groups:
        raise LensteerError(f"n_folds={n_folds} for spans of {n_groups} tasks: give 2 or more, at most one per task")
    from sklearn.model_selection import GroupKFold

    odds = torch.full((n_behaviors, x.shape[1], len(x)), torch.nan, dtype=torch.float64)
    folds = list(GroupKFold(n_folds).split(labels.numpy(), groups=groups.numpy()))
    for layer in range(x.shape[1]):
        values = x[:, layer].double()
        for train, test in ((torch.as_tensor(a), torch.as_tensor(b)) for a, b in folds):
            for b in range(n_behaviors):
                own = (labels[train] == b).double()
                if (probe := fit_probe(values[train], own, 1 - own)) is not None:
                    odds[b, layer, test] = values[test] @ probe.weights + probe.bias
    return odds

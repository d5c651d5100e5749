"""Logistic probes: the normal of the plane that separates a behavior's spans from the others, and its accuracy.

A probe is not a sum over traces: the features of all spans stay in memory, within a stated limit.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.errors import LensteerError

#: Memory limit for the features of all spans and the copies of the layer that is being fitted.
MAX_BYTES = 4 * 2**30
#: λ below. It applies to the mean, not the sum, of the losses, so that more spans do not weaken the penalty. On 2594
#: spans of the organism (width 128) accuracy on held-out tasks was .739 on average at 1e-1, and .714 at 1e-3 (8 of 10
#: cells).
PENALTY = 0.1


def check_memory(n_spans: int, n_layers: int, d_model: int) -> None:
    """Raise if features of spans that are kept exceed the memory limit.

    Raises:
        LensteerError: the features would take more than `MAX_BYTES`.
    """
    needed = n_spans * d_model * (4 * n_layers + 24)
    if needed > MAX_BYTES:
        raise LensteerError(
            f"the features of all spans are kept: {n_spans} spans × {n_layers} layers × d_model {d_model} take "
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


def probe_normals(
    x: Float[Tensor, "span d_model"], weights: Float[Tensor, "sign behavior span"]
) -> Float[Tensor, "behavior d_model"]:
    """The weights of each behavior's probe; NaN if one of its classes is empty. See `fit_probe`."""
    normals = x.new_full((weights.shape[1], x.shape[1]), torch.nan)
    for b, (positive, negative) in enumerate(weights.unbind(1)):
        if (probe := fit_probe(x, positive, negative)) is not None:
            normals[b] = probe.weights
    return normals


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

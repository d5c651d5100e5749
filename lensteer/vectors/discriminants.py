"""Differences of means that account for the spread of the spans: Fisher's discriminant, and whitening.

A difference of means points along what separates a behavior's spans from the others *and* along what varies anyway and
happens to differ between them. Dividing by the covariance removes the second part.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.vectors.constructions import mean_gaps

#: Eigenvalues of a covariance below this share of the largest are zero in double precision.
RANK = 1e-14


def discriminants(
    x: Float[Tensor, "span d_model"], weights: Float[Tensor, "sign behavior span"]
) -> Float[Tensor, "behavior d_model"]:
    """Fisher's linear discriminant of each behavior against the others.

    n = Σ_w⁻¹ (μ⁺ − μ⁻), with Σ_w the covariance *within* labels: of each span about the mean of its own label, all
    labels together. It maximizes ⟨n, μ⁺ − μ⁻⟩² / nᵀ Σ_w n (Fisher 1936; with several classes, Rao 1948), and is the
    normal of the best plane between Gaussian classes of one covariance. Σ_w is shrunk; see `shrunk_correlations`.

    Args:
        x: activations, fp64.
        weights: of each span in the positive and in the negative mean of every behavior.

    Returns:
        NaN for a behavior without positives or negatives.
    """
    own = weights[0]
    means = (own / own.sum(-1, keepdim=True).clamp_min(1e-300)) @ x
    correlations, deviations = shrunk_correlations(x, means[own.argmax(0)], own.sum(0))
    inverse = torch.where(deviations > 0, 1 / deviations.clamp_min(1e-300), 0.0)
    return torch.linalg.solve(correlations, (mean_gaps(x, weights) * inverse).T).T * inverse


def whitened_differences(
    x: Float[Tensor, "span d_model"], weights: Float[Tensor, "sign behavior span"]
) -> Float[Tensor, "behavior d_model"]:
    """The difference of means of whitened activations.

    n = Σ^(−1/2) (μ⁺ − μ⁻), with Σ the covariance of *all* spans about their common mean, shrunk as in
    `shrunk_correlations`, and Σ^(−1/2) symmetric (ZCA, which changes the activations least; Kessy, Lewin & Strimmer
    2018). It lies half way between the difference of means, Σ⁰ δ, and the discriminant: Σ⁻¹ δ is parallel to Σ_w⁻¹ δ
    if Σ_w is the covariance within two classes, the behavior and the rest, because Σ = Σ_w + π (1 − π) δ δᵀ
    (Sherman & Morrison 1950). So there is no construction of its own for Σ⁻¹.

    Args:
        x: activations, fp64.
        weights: of each span in the positive and in the negative mean of every behavior.

    Returns:
        NaN for a behavior without positives or negatives.
    """
    mass = weights[0].sum(0)
    correlations, deviations = shrunk_correlations(x, (mass / mass.sum()) @ x, mass)
    values, vectors = torch.linalg.eigh(deviations[:, None] * correlations * deviations)
    scale = torch.where(values > RANK * values[-1], values.clamp_min(1e-300).rsqrt(), 0.0)
    return ((mean_gaps(x, weights) @ vectors) * scale) @ vectors.T


def shrunk_correlations(
    x: Float[Tensor, "span d_model"], centers: Float[Tensor, "*span d_model"], weights: Float[Tensor, " span"]
) -> tuple[Float[Tensor, "d_model d_model"], Float[Tensor, " d_model"]]:
    """A covariance as correlations C and standard deviations σ: Σ_ij = σ_i C_ij σ_j.

    C = (1 − λ) R + λ I, with R the correlations under the weights and λ as in Ledoit & Wolf (2004), who minimize the
    expected squared error. As in scikit-learn's `LinearDiscriminantAnalysis(shrinkage="auto")`, the target is the
    identity *after* standardization: a few entries of a residual stream are a hundred times larger than the others,
    and an equal variance for all would be theirs. An entry that does not vary has σ = 0.

    Args:
        x: activations, fp64.
        centers: what they are compared with: the mean of each span's label, or one mean for all.
        weights: of the spans; spans without weight are left out.
    """
    from sklearn.covariance import ledoit_wolf

    there = weights > 0
    rows, weights = (x - centers)[there], weights[there] / weights.sum()
    deviations = (weights @ rows.square()).sqrt()
    still = deviations <= 1e-7 * x[there].abs().amax(0)  # varies by less than single precision resolves
    deviations = torch.where(still, 0.0, deviations)
    # Rows in proportion to the root of their weight, so that sums over rows are weighted sums.
    scaled = rows / torch.where(still, 1.0, deviations) * (weights * len(rows)).sqrt()[:, None]
    scaled[:, still] = 0.0
    correlations = torch.as_tensor(ledoit_wolf(scaled.numpy(), assume_centered=True)[0])
    correlations[still, still] = 1.0  # regular; what does not vary is left out by its deviation
    return correlations, deviations

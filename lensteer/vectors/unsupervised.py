"""Directions that no label enters, and how near the behaviors' vectors come to one of them.

If a behavior is a direction of its own in the activations of sentences, it can be found without labels, as RISE does
with sparse autoencoders on the activation of one token per step (Zhang et al., arXiv 2512.23988). Here the dictionary
is scikit-learn's, and principal components are the plain alternative.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import pandas as pd
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer import models
from lensteer.activations import Window, stream_features, trace_key
from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.files import digest
from lensteer.results import Saved
from lensteer.statistics import Estimate, percentile_interval
from lensteer.traces import Trace
from lensteer.vectors.constructions import Recipe
from lensteer.vectors.fitting import library_versions
from lensteer.vectors.probes import check_memory
from lensteer.vectors.values import NO_SPANS, BehaviorVectors, Direction

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

METHODS = ("pca", "dictionary")
POOLS = ("isotropic", "covariance_matched", "shuffled")


@checked()
def unsupervised_directions(
    model: TransformerBridge,
    traces: Sequence[Trace],
    *,
    n: int = 32,
    method: str = "pca",
    window: str | Window = Recipe.window,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    penalty: float = 1.0,
    seed: int = 0,
    batch_size: int = 16,
) -> BehaviorVectors:
    """Directions of the sentences' activations, without their labels.

    With x̃ₛ the mean activation of span s in the window, less the mean over all spans, at each layer on its own:

    - `pca`: the n principal components, in order of variance; raw is one standard deviation along each.
    - `dictionary`: with z̃ = x̃ / σ (each entry by its standard deviation), atoms d_j of length 1 and codes c ≥ 0 that
      minimize ½ ‖z̃ₛ − Σ_j c_sj d_j‖² + λ Σ_j c_sj on average over s, with λ = `penalty` (Mairal et al. 2009, as in
      scikit-learn's `MiniBatchDictionaryLearning`). Raw is σ d_j times the mean of the code where it is not 0; atoms
      are in order of Σₛ c².

    A principal component's sign is arbitrary: it points to the longer tail (positive third moment).

    Each layer is on its own: "direction-0" of one layer is unrelated to "direction-0" of the next. The spans' features
    are kept, `4 · spans · layers · d_model` bytes, up to a limit of 4 GiB.

    Args:
        model: whose residual stream is read.
        traces: with spans; only their places count.
        n: number of directions.
        method: "pca" or "dictionary".
        window: which positions represent a span; see `Window.parse`.
        layers: by default all. A dictionary takes seconds to minutes per layer.
        site: where in each block.
        penalty: λ of the dictionary: the larger, the fewer atoms per span.
        seed: of the dictionary.
        batch_size: traces per forward.

    Returns:
        Vectors with labels "direction-0" and so on; counts are the spans with a positive score (of a dictionary: with a
        code that is not 0) at the first layer.

    Raises:
        LensteerError: an unknown method, layer or window, no spans, more directions than spans or entries, or features
            that exceed the limit.
    """
    if method not in METHODS:
        raise LensteerError(f"unknown method {method!r}: choose one of {', '.join(map(repr, METHODS))}")
    if not penalty > 0:
        raise LensteerError(f"penalty={penalty}: give a positive number")
    recipe = Recipe(str(window), "spans", "span", f"unsupervised_{method}")
    chosen = tuple(range(models.n_layers(model)) if layers is None else layers)
    n_spans, d_model = sum(len(trace.spans) for trace in traces), models.d_model(model)
    if not n_spans:
        raise LensteerError(NO_SPANS)
    if not 1 <= n <= (most := min(n_spans - 1, d_model)):
        raise LensteerError(f"n={n} directions of {n_spans} spans with {d_model} entries each: give 1 to {most}")
    check_memory(n_spans, len(chosen), d_model)
    features = sorted(
        (
            (each.key, each.index, each.spans[0].clone(), each.tokens.clone())
            for each in stream_features(
                model, traces, windows=[recipe.window], layers=chosen, site=site, batch_size=batch_size
            )
        ),
        key=lambda kept: kept[:2],  # whatever the order of the traces
    )
    tokens = torch.stack([kept[3] for kept in features]).double().mean(0)
    raw: list[Tensor] = []
    counts: Tensor | None = None
    for row in range(len(chosen)):
        x = torch.cat([kept[2][:, row] for kept in features]).double()
        x -= x.mean(0)
        vectors, active = principal(x, n) if method == "pca" else dictionary(x, n, penalty, seed)
        raw.append(vectors.float())
        counts = active if counts is None else counts
    assert counts is not None
    labels = tuple(f"direction-{i}" for i in range(n))
    return BehaviorVectors(
        raw=torch.stack(raw, dim=1),
        mean_norm=tokens.norm(dim=-1).float(),
        labels=labels,
        layers=chosen,
        counts=dict(zip(labels, counts.tolist(), strict=True)),
        n_traces=len(features),
        recipe=recipe,
        provenance={
            "model": models.fingerprint(model).to_dict(),
            "site": site,
            "traces": digest("\n".join(sorted(trace_key(trace) for trace in traces if trace.spans)).encode()),
            "seed": seed,
            "versions": library_versions(recipe),
        },
    )


def principal(
    x: Float[Tensor, "span d_model"], n: int
) -> tuple[Float[Tensor, "direction d_model"], Int[Tensor, " direction"]]:
    """The first principal components of centered activations, one standard deviation long, and their positive spans."""
    values, vectors = torch.linalg.eigh(x.T @ x / len(x))
    first, deviations = vectors.flip(-1)[:, :n].T, values.flip(-1)[:n].clamp_min(0).sqrt()
    scores = x @ first.T
    signs = torch.where(scores.pow(3).sum(0) < 0, -1.0, 1.0).double()
    return first * (signs * deviations)[:, None], (scores * signs > 0).sum(0)


def dictionary(
    x: Float[Tensor, "span d_model"], n: int, penalty: float, seed: int
) -> tuple[Float[Tensor, "direction d_model"], Int[Tensor, " direction"]]:
    """The atoms of a sparse, nonnegative code of centered activations, as long as their mean code, and their spans."""
    from sklearn.decomposition import MiniBatchDictionaryLearning

    deviations = x.square().mean(0).sqrt()
    z = x / torch.where(deviations > 0, deviations, 1.0)
    learner = MiniBatchDictionaryLearning(
        n,
        alpha=penalty,
        max_iter=50,
        fit_algorithm="cd",
        transform_algorithm="lasso_cd",
        transform_alpha=penalty,
        positive_code=True,
        random_state=seed,
        batch_size=256,
    )
    codes = torch.as_tensor(learner.fit_transform(z.numpy()))
    atoms = torch.as_tensor(learner.components_)
    order = codes.square().sum(0).argsort(descending=True, stable=True)
    codes, atoms = codes[:, order], atoms[order]
    active = (codes > 0).sum(0)
    return atoms * deviations * (codes.sum(0) / active.clamp_min(1))[:, None], active


@dataclass(frozen=True)
class DirectionMatch:
    """The direction that is nearest to one behavior's vector.

    Attributes:
        behavior: whose vector is compared.
        layer: at which.
        direction: the label of the direction with the largest |cosine|.
        cosine: with it, signed; with a 95 % interval if the vectors have replicates: of the largest |cosine| of each
            replicate, with the sign of the vector's own.
        chance: by pool of control vectors, the 95 % quantile of a control's largest |cosine|.
        p: by pool, (1 + controls that come at least as near) / (1 + controls).
    """

    behavior: str
    layer: int
    direction: str
    cosine: Estimate
    chance: dict[str, float]
    p: dict[str, float]


@dataclass(frozen=True, eq=False, repr=False)
class DirectionMatches(Saved):
    """What `match_directions` found: a row per behavior and layer; `n_controls` vectors in each pool."""

    rows: tuple[DirectionMatch, ...]
    n_controls: int

    def at(self, behavior: str, layer: int) -> DirectionMatch:
        """The row of one behavior and layer.

        Raises:
            LensteerError: there is none.
        """
        for row in self.rows:
            if (row.behavior, row.layer) == (behavior, layer):
                return row
        raise LensteerError(f"no match of {behavior!r} at layer {layer}: there are {[r.behavior for r in self.rows]}")

    def to_dataframe(self) -> pd.DataFrame:
        """One row per behavior and layer."""
        return pd.DataFrame(
            [
                dict(
                    behavior=row.behavior,
                    layer=row.layer,
                    direction=row.direction,
                    cosine=row.cosine.value,
                    cosine_low=row.cosine.low,
                    cosine_high=row.cosine.high,
                    **{f"chance_{pool}": value for pool, value in row.chance.items()},
                    **{f"p_{pool}": value for pool, value in row.p.items()},
                )
                for row in self.rows
            ]
        )


@checked()
def match_directions(
    directions: BehaviorVectors, vectors: BehaviorVectors, layers: Sequence[int] | None = None
) -> DirectionMatches:
    """Hold unsupervised directions against behavior vectors: the largest |cosine| of each, and of its controls.

    With many directions some cosine is large by chance, so each behavior's largest |cosine| is compared with those of
    the vectors' own controls: "isotropic" ones, which is what a random rotation of the directions does;
    "covariance_matched" ones, which lie along large components, as the directions do; and vectors of "shuffled" labels.

    Args:
        directions: from `unsupervised_directions`.
        vectors: with controls (`fit_vectors(..., n_controls=200)`), and with replicates for intervals.
        layers: by default those that both have.

    Raises:
        LensteerError: no controls, another width, or a layer that one of them lacks.
    """
    if vectors.controls is None:
        raise LensteerError("these vectors have no random controls to compare with: fit them with n_controls=200")
    if directions.raw.shape[-1] != vectors.raw.shape[-1]:
        raise LensteerError(
            f"directions of width {directions.raw.shape[-1]} and vectors of width {vectors.raw.shape[-1]}: give those "
            "of one model"
        )
    common = [layer for layer in vectors.layers if layer in directions.layers]
    rows = []
    for layer in common if layers is None else layers:
        of = {name: directions[name].at(layer) for name in directions.labels}  # raises for a layer that they lack
        units = _unit(torch.stack(list(of.values())))
        at = vectors.layers.index(layer) if layer in vectors.layers else -1
        for b, behavior in enumerate(vectors.labels):
            cosines = units @ _unit(vectors[behavior].at(layer))
            best = int(cosines.abs().argmax())
            value = float(cosines[best])
            low = high = float("nan")
            n_replicates = 0
            if vectors.replicates is not None and len(vectors.replicates):
                nearest = (_unit(vectors.replicates[:, b, at]) @ units.T).abs().amax(-1).numpy() * np.sign(value)
                found = percentile_interval(value, nearest, vectors.n_traces)
                low, high, n_replicates = found.low, found.high, vectors.n_traces
            chance, p = {}, {}
            for pool in POOLS:
                draws: Tensor = getattr(vectors.controls, pool)
                draws = draws[:, b, at] if pool == "shuffled" else draws[:, at]
                nearest_controls = (_unit(draws) @ units.T).abs().amax(-1)
                chance[pool] = float(nearest_controls.quantile(0.95))
                p[pool] = (1 + int((nearest_controls >= abs(value)).sum())) / (1 + len(draws))
            rows.append(
                DirectionMatch(
                    behavior, layer, directions.labels[best], Estimate(value, low, high, n_replicates), chance, p
                )
            )
    return DirectionMatches(tuple(rows), len(vectors.controls.isotropic))


def nearest_direction(directions: BehaviorVectors, match: DirectionMatch) -> Direction:
    """The direction of a match, turned to the side of the behavior, ready to steer with."""
    found = directions[match.direction]
    sign = -1.0 if match.cosine.value < 0 else 1.0
    return Direction(f"{match.direction} for {match.behavior}", sign * found.raw, found.mean_norm, found.layers)


def _unit(rows: Tensor) -> Tensor:
    rows = rows.double()
    return rows / rows.norm(dim=-1, keepdim=True).clamp_min(1e-300)

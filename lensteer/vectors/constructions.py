"""Difference of means and its random controls, in one pass over features.

All of these are linear in the spans' features, so they are rows of one accumulator, including control vectors and
bootstrap replicates.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.activations import TraceFeatures, Window
from lensteer.arguments import typed
from lensteer.behaviors import check_behavior
from lensteer.errors import LensteerError
from lensteer.statistics import WeightedSums, trace_generator

NEGATIVES = ("all", "spans", "rest", "same_trace")
AGGREGATIONS = ("token", "span", "trace")
CONSTRUCTIONS = ("difference", "logistic", "lda", "whitened", "pca")
#: Constructions that no label enters: see `unsupervised`.
UNSUPERVISED = ("unsupervised_pca", "unsupervised_dictionary")
#: Constructions from pairs, which compare their sides: see `lensteer.contrast`.
PAIRS, PAIR_CONSTRUCTIONS = "pairs", ("difference", "pca", "logistic")


@dataclass(frozen=True)
class Recipe:
    """How a direction is computed from spans, or from pairs.

    Attributes:
        window: which positions represent a span; see `Window.parse`. For pairs, the position where they are read; see
            `contrast.Position.parse`.
        negatives: what is subtracted: the mean over "all" thinking tokens; over all "spans", in the same
            window; over the "rest", the spans of other behaviors; or "same_trace", the mean over all spans of
            the positive's own trace. "pairs" is for pairs instead of spans (`fit_directions`): the other sides are
            subtracted.
        aggregation: what is weighted equally on both sides: each "token" of a window, each "span", or each "trace". The
            mean over "all" tokens is first taken per trace (as in the published code), except for "token".
        construction: the "difference" of the two means; or the projection of that difference on a direction that
            depends on the spread of the spans, too: "logistic", the normal of a probe that separates a behavior's
            spans from the others (see `probes`); "lda", Fisher's discriminant, and "whitened", the difference of
            means of whitened activations (see `discriminants`); "pca", the principal component of differences (see
            `components`): of a behavior's spans from the mean of the others, or of pairs. For these, negatives "spans"
            and "rest" are the same. Pairs have "difference", "pca" and "logistic". What `unsupervised_directions`
            returns has one of `UNSUPERVISED`.

    Raises:
        LensteerError: an unknown name, or one of the other constructions against "all" tokens, whose means are no
            spans.
    """

    window: str = "onset±3"
    negatives: str = "spans"
    aggregation: str = "span"
    construction: str = "difference"

    def __post_init__(self) -> None:
        typed(self)
        if self.negatives == PAIRS:
            if self.construction not in PAIR_CONSTRUCTIONS:
                known = ", ".join(map(repr, PAIR_CONSTRUCTIONS))
                raise LensteerError(f"unknown construction {self.construction!r} of pairs: choose one of {known}")
            return
        object.__setattr__(self, "window", str(Window.parse(self.window)))
        for name, value, choices in (
            ("negatives", self.negatives, NEGATIVES),
            ("aggregation", self.aggregation, AGGREGATIONS),
            ("construction", self.construction, (*CONSTRUCTIONS, *UNSUPERVISED)),
        ):
            if value not in choices:
                raise LensteerError(f"unknown {name} {value!r}: choose one of {', '.join(map(repr, choices))}")
        if self.construction != "difference" and self.negatives == "all":
            raise LensteerError(
                f"construction {self.construction!r} tells spans from spans, and negatives 'all' are means over "
                "tokens: choose 'spans', 'rest' or 'same_trace'"
            )

    def __str__(self) -> str:
        how = "" if self.construction == "difference" else f", {self.construction}"
        if self.negatives == PAIRS:
            return f"{self.window} of pairs{how}"
        return f"{self.window} − {self.negatives} per {self.aggregation}{how}"


def contrast_weights(
    labels: Int[Tensor, "side span"],
    lengths: Float[Tensor, " span"],
    n_tokens: int,
    n_behaviors: int,
    recipe: Recipe,
) -> Float[Tensor, "side sign behavior item"]:
    """The weights of one trace's items in the positive and the negative mean of every behavior.

    The items are the trace's spans, and last the mean of all its tokens.

    Args:
        labels: index of each span's behavior; one row per side (the true labels, or shuffled ones).
        lengths: number of tokens that represent each span.
        n_tokens: of all tokens.
        n_behaviors: number of behaviors.
        recipe: its negatives and aggregation.
    """
    own = torch.nn.functional.one_hot(labels, n_behaviors).transpose(1, 2).double()  # side behavior span
    base = lengths if recipe.aggregation == "token" else torch.ones_like(lengths)

    def weigh(chosen: Tensor) -> Tensor:
        weights = chosen * base
        if recipe.aggregation == "trace":
            weights = weights / weights.sum(-1, keepdim=True).clamp_min(1)
        return weights

    positive, everyone = weigh(own), weigh(torch.ones_like(own))
    last = torch.zeros(*own.shape[:2], 1, dtype=own.dtype)
    no_tokens, tokens = last, last
    if recipe.negatives == "all":
        negative = torch.zeros_like(own)
        tokens = last + (n_tokens if recipe.aggregation == "token" else 1)
    elif recipe.negatives == "spans":
        negative = everyone
    elif recipe.negatives == "rest":
        negative = weigh(1 - own)
    else:  # the positives' total weight, spread over their own trace: Σ w (x − its trace's mean)
        negative = everyone / everyone.sum(-1, keepdim=True) * positive.sum(-1, keepdim=True)
    return torch.stack([torch.cat([positive, no_tokens], -1), torch.cat([negative, tokens], -1)], dim=1)


def mean_gaps(
    x: Float[Tensor, "span d_model"], weights: Float[Tensor, "sign behavior span"]
) -> Float[Tensor, "behavior d_model"]:
    """Weighted mean of each behavior's positives less that of its negatives; NaN if one of them is empty."""
    positive, negative = weights / weights.sum(-1, keepdim=True)
    return (positive - negative) @ x


def label_sides(features: TraceFeatures, labels: Sequence[str], n_controls: int, seed: int) -> Int[Tensor, "side span"]:
    """Each span's behavior as an index into `labels`: the true ones, then shuffles among the trace's spans.

    Raises:
        LensteerError: a span's label is not among the behaviors.
    """
    index = {label: i for i, label in enumerate(labels)}
    for label in features.labels:
        check_behavior(label, labels)
    own = torch.tensor([index[label] for label in features.labels])
    shuffle = trace_generator(seed, "shuffle", features.key)
    orders = torch.rand(n_controls, len(own), generator=shuffle).argsort(dim=1)
    return torch.cat([own[None], own[orders]])


def times_drawn(features: TraceFeatures, n_bootstrap: int, seed: int) -> Float[Tensor, " replicate"]:
    """How often each bootstrap replicate has drawn a trace: Poisson(1)."""
    resample = trace_generator(seed, "bootstrap", features.key)
    return torch.poisson(torch.ones(n_bootstrap, dtype=torch.float64), generator=resample)


class ContrastSums:
    """Accumulates traces' features into the means that directions are made of. Mergeable.

    The sides of the contrast are the true labels, `n_controls` shuffles of the labels among each trace's
    spans, and `n_bootstrap` reweightings of the traces by Poisson(1). Gaussian combinations of the spans are
    accumulated as well, for the covariance-matched controls. All randomness is seeded per trace, so halves merge to the
    whole.

    Args:
        recipe: of the contrast.
        labels: the behaviors, in the order of the axis.
        n_layers: size of the layer axis.
        d_model: width of the residual stream.
        n_controls: random vectors of each kind.
        n_bootstrap: replicates.
        seed: of all randomness.
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
        self.recipe, self.labels, self.seed, self.window = recipe, tuple(labels), seed, window
        self.n_controls, self.n_bootstrap = n_controls, n_bootstrap
        # Against "all" or "spans", behaviors and shuffles have the same negatives, and these are summed once.
        self._same_negatives = recipe.negatives in ("all", "spans")
        n_sides = 1 + n_controls + n_bootstrap
        n_negatives = 1 + n_bootstrap if self._same_negatives else n_sides * len(self.labels)
        self.positive = WeightedSums(n_sides * len(self.labels), n_layers, d_model)
        self.negative = WeightedSums(n_negatives, n_layers, d_model)
        self.noise = WeightedSums(1 + n_controls, n_layers, d_model)
        self.tokens = WeightedSums(1, n_layers, d_model)
        self.counts = torch.zeros(len(self.labels), dtype=torch.long)
        self.n_traces = 0

    def add(self, features: TraceFeatures) -> None:
        """Add one trace.

        Raises:
            LensteerError: a span's label is not among the behaviors.
        """
        spans = features.spans[self.window]
        lengths = features.lengths[self.window].double()
        sides = label_sides(features, self.labels, self.n_controls, self.seed)
        labels = sides[0]
        weights = contrast_weights(sides, lengths, features.n_tokens, len(self.labels), self.recipe)
        drawn = times_drawn(features, self.n_bootstrap, self.seed)
        weights = torch.cat([weights, drawn[:, None, None, None] * weights[:1]])
        items = torch.cat([spans, features.tokens[None]])
        positive, negative = weights.unbind(1)
        if self._same_negatives:
            negative = torch.cat([negative[:1], negative[1 + self.n_controls :]])[:, :1]
        self.positive.add(positive.flatten(0, 1), items)
        self.negative.add(negative.flatten(0, 1), items)
        gauss = trace_generator(self.seed, "covariance", features.key)
        noise = torch.randn(self.n_controls, len(labels), generator=gauss, dtype=torch.float64)
        self.noise.add(torch.cat([torch.ones(1, len(labels), dtype=torch.float64), noise]), spans)
        self.tokens.add(torch.ones(1, 1), features.tokens[None])
        self.counts += torch.bincount(labels, minlength=len(self.labels))
        self.n_traces += 1

    def merge(self, other: ContrastSums) -> None:
        """Add the sums over other traces.

        Raises:
            LensteerError: the other one has a different recipe, behaviors, controls or seed.
        """
        for name in ("recipe", "labels", "seed", "n_controls", "n_bootstrap"):
            mine, theirs = getattr(self, name), getattr(other, name)
            if mine != theirs:
                raise LensteerError(f"cannot merge sums with {name} {theirs!r} into {mine!r}: they must be the same")
        self.positive.merge(other.positive)
        self.negative.merge(other.negative)
        self.noise.merge(other.noise)
        self.tokens.merge(other.tokens)
        self.counts = self.counts + other.counts
        self.n_traces += other.n_traces

    def all_tokens(self) -> Float[Tensor, "layer d_model"]:
        """Mean activation over all thinking tokens, with equal weight per trace."""
        return self.tokens.means()[0]

    def _sides(self, begin: int, end: int) -> Float[Tensor, "side behavior layer d_model"]:
        n = len(self.labels)
        positive = self.positive.means(begin * n, end * n)
        if not self._same_negatives:
            return (positive - self.negative.means(begin * n, end * n)).unflatten(0, (end - begin, n))
        first = max(0, begin - self.n_controls)  # one for the true labels and all shuffles, then one per replicate
        negative = self.negative.means(first, max(first + 1, end - self.n_controls))
        return positive.unflatten(0, (end - begin, n)) - negative[:, None]

    def difference(self) -> Float[Tensor, "behavior layer d_model"]:
        """Mean of the positives less mean of the negatives; NaN if one of them is empty."""
        return self._sides(0, 1)[0]

    def shuffled(self) -> Float[Tensor, "control behavior layer d_model"]:
        """The same, with the labels permuted among the spans of each trace."""
        return self._sides(1, 1 + self.n_controls)

    def replicates(self) -> Float[Tensor, "replicate behavior layer d_model"]:
        """The same, on resampled traces (Poisson bootstrap); NaN if none of them has a behavior."""
        return self._sides(1 + self.n_controls, 1 + self.n_controls + self.n_bootstrap)

    def covariance_matched(self) -> Float[Tensor, "control layer d_model"]:
        """Gaussian vectors with the covariance of the spans' activations, in the recipe's window.

        `Σᵢ gᵢ (xᵢ − x̄) / √(n − 1)` with `gᵢ ~ N(0, 1)` over all `n` spans: no covariance matrix is formed.

        Raises:
            LensteerError: fewer than two spans.
        """
        n = int(self.noise.mass[0])
        if n < 2:
            raise LensteerError(f"{n} span(s) have no covariance: annotate more traces")
        center = self.noise.sums[0] / n
        centered = self.noise.sums[1:] - self.noise.mass[1:, None, None] * center
        return centered / (n - 1) ** 0.5


def isotropic(n: int, n_layers: int, d_model: int, *, seed: int = 0) -> Float[Tensor, "control layer d_model"]:
    """Random unit vectors, uniform over directions and independent between layers."""
    generator = torch.Generator().manual_seed(seed)
    draws = torch.randn(n, n_layers, d_model, generator=generator, dtype=torch.float64)
    return draws / draws.norm(dim=-1, keepdim=True)

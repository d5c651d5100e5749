"""From sentences to logits and probabilities, with what training has found. Knows nothing of how it was found."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float

from lensteer.annotation.features import Array, Chain, FeatureWeights, Vocabulary, features
from lensteer.errors import LensteerError


@dataclass(frozen=True, eq=False)
class Linear:
    """A vocabulary, a logistic regression on its features, and how long the spans were that it has learned from.

    Attributes:
        vocabulary: of the features.
        coefficients: of each label and feature.
        intercept: of each label.
        lengths: share of the spans that held one, two, … sentences, among these.
    """

    vocabulary: Vocabulary
    coefficients: Float[np.ndarray[Any, Any], "behavior feature"]
    intercept: Float[np.ndarray[Any, Any], " behavior"]
    lengths: Float[np.ndarray[Any, Any], " length"]

    def scores(
        self, chains: Sequence[Chain], residuals: Array | None, weights: FeatureWeights
    ) -> Float[np.ndarray[Any, Any], "span behavior"]:
        """Logits of every piece of every chain.

        Raises:
            LensteerError: the coefficients are not of these features.
        """
        if not any(chain.pieces for chain in chains):
            return np.zeros((0, len(self.intercept)))
        found = features(chains, self.vocabulary, weights, residuals)
        if found.shape[1] != self.coefficients.shape[1]:
            raise LensteerError(
                f"the classifier has {self.coefficients.shape[1]} coefficients a label for {found.shape[1]} features: "
                "it is damaged or of another version, train it again"
            )
        return np.asarray(found @ self.coefficients.T) + self.intercept

    def sentence_scores(
        self, chains: Sequence[Chain], residuals: Array | None, weights: FeatureWeights
    ) -> Float[np.ndarray[Any, Any], "span behavior"]:
        """Logits of every sentence of every chain, each read alone and together with those around it.

        A judge's span may hold several sentences of a paragraph, and only one of them the words that its label goes by.
        A sentence's logits are the mean over the runs of sentences that it is in, without a blank line inside, each
        weighted with the share of training spans of that many sentences.
        """
        n = sum(len(chain.pieces) for chain in chains)
        total, mass = np.zeros((n, len(self.intercept))), np.zeros((n, 1))
        for size, share in enumerate(self.lengths, 1):
            if not share and size > 1:
                continue
            runs = [_runs(chain, size) for chain in chains]
            joined = [_joined(chain, starts, size) for chain, starts in zip(chains, runs, strict=True)]
            first = np.cumsum([0, *(len(chain.pieces) for chain in chains)])
            at = np.array([int(first[i]) + start for i, starts in enumerate(runs) for start in starts], dtype=np.int64)
            read = None if residuals is None else _pooled(residuals, at, size)
            found = self.scores(joined, read, weights)
            share = max(float(share), 1e-6)  # every sentence is in a run of one
            for place in range(size):
                np.add.at(total, at + place, share * found)
                np.add.at(mass, at + place, share)
        return total / mass if n else total


@dataclass(frozen=True, eq=False)
class Scaling:
    """Calibration: probabilities are softmax(`scale` · logits + `bias`).

    One scale for all labels and one bias for each, between the temperature and the vector scaling of Guo et al. 2017
    (arXiv 1706.04599): the biases give back how common each label is, which a balanced training has taken away.
    """

    scale: float
    bias: Float[np.ndarray[Any, Any], " behavior"]

    def probabilities(
        self, scores: Float[np.ndarray[Any, Any], "span behavior"]
    ) -> Float[np.ndarray[Any, Any], "span behavior"]:
        """Of each label; rows sum to 1."""
        return np.exp(log_softmax(self.scale * scores + self.bias))


def log_softmax(logits: Float[np.ndarray[Any, Any], "span behavior"]) -> Float[np.ndarray[Any, Any], "span behavior"]:
    """Log-probabilities of each row."""
    below = logits - logits.max(axis=1, keepdims=True)
    return np.asarray(below - np.log(np.exp(below).sum(axis=1, keepdims=True)))


def span_lengths(
    spans: Sequence[Chain], sentences: Sequence[Chain], longest: int
) -> Float[np.ndarray[Any, Any], " length"]:
    """Of the spans that hold the middles of one to `longest` sentences, the share of each number."""
    counts = np.zeros(longest)
    for whole, cut in zip(spans, sentences, strict=True):
        middles = np.array([(start + end) / 2 for start, end in cut.pieces])
        for start, end in whole.pieces:
            held = int(((middles > start) & (middles < end)).sum())
            if 1 <= held <= longest:
                counts[held - 1] += 1
    return counts / counts.sum() if counts.any() else np.eye(longest)[0]


def _runs(chain: Chain, size: int) -> list[int]:
    """Where runs of so many sentences without a blank line inside begin."""
    response, pieces = chain.trace.response, chain.pieces
    gaps = [response[end:start].count("\n") > 1 for (_, end), (start, _) in pairwise(pieces)]
    return [i for i in range(len(pieces) - size + 1) if not any(gaps[i : i + size - 1])]


def _joined(chain: Chain, starts: Sequence[int], size: int) -> Chain:
    return Chain(chain.trace, tuple((chain.pieces[i][0], chain.pieces[i + size - 1][1]) for i in starts))


def _pooled(residuals: Array, at: np.ndarray[Any, np.dtype[np.int64]], size: int) -> Array:
    """A run's onset is its first sentence's; its mean is the mean over its sentences."""
    half = residuals.shape[1] // 2
    mean = np.mean([residuals[at + place, half:] for place in range(size)], axis=0)
    return np.concatenate([residuals[at, :half], mean.reshape(len(at), half)], axis=1)

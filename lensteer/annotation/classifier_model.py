"""The linear model of a sentence classifier: training data, logits, probabilities and training.

Logistic regression on the annotator's spans, calibrated on held-out chains. It works on arrays and chains;
`lensteer.annotation.classifier` turns it into an annotator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float, Int

from lensteer import models
from lensteer.annotation.annotators import labeled_sentences
from lensteer.annotation.features import (
    Array,
    Chain,
    FeatureWeights,
    Vocabulary,
    features,
    learn_vocabulary,
    residual_features,
)
from lensteer.behaviors import in_order
from lensteer.errors import LensteerError
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_ITERATIONS, _TOLERANCE = 300, 1e-3
_UNSEEN = 5.0  # a label that a fold's training chains lack is this many logits below all others
_PRIOR = 1.0  # ridge penalty toward scale 1 and bias 0, for few sentences or no errors


@dataclass(frozen=True)
class ClassifierConfig:
    """How a classifier is trained.

    Attributes:
        features: weight of each group of features.
        strength: inverse of the L2 penalty (scikit-learn's C).
        balance: 1 weights all behaviors equally in training, 0 all sentences; 0 is more accurate overall but finds few
            of the rare behaviors.
        together: the most sentences of one paragraph that are read together; 1 reads each alone.
        n_folds: of the cross-validation, split by task; also used for the calibration.
    """

    features: FeatureWeights = field(default_factory=FeatureWeights)
    strength: float = 4.0
    balance: float = 1.0
    together: int = 3
    n_folds: int = 5

    def __post_init__(self) -> None:
        if not 0 < self.strength < np.inf:
            raise LensteerError(f"strength={self.strength}: give a positive number, such as 4.0")
        if not 0 <= self.balance <= 1:
            raise LensteerError(f"balance={self.balance}: give a number from 0 to 1")
        if self.together < 1:
            raise LensteerError(f"together={self.together}: give at least 1 sentence")
        if self.n_folds < 2:
            raise LensteerError(f"n_folds={self.n_folds}: a cross-validation needs at least 2")


@dataclass(frozen=True)
class Pieces:
    """Pieces of chains with the annotator's label of each, and their residual features, if any.

    Attributes:
        chains: in order.
        labels: per chain and piece; None if the annotator has no label.
        residuals: one row per piece of every chain.
    """

    chains: tuple[Chain, ...]
    labels: tuple[tuple[str | None, ...], ...]
    residuals: Array | None

    def take(self, which: Sequence[int]) -> Pieces:
        """Some of the chains."""
        rows = list(pairwise(accumulate((len(chain.pieces) for chain in self.chains), initial=0)))
        residuals = self.residuals
        if residuals is not None:
            residuals = np.concatenate([residuals[slice(*rows[i])] for i in which])
        return Pieces(tuple(self.chains[i] for i in which), tuple(self.labels[i] for i in which), residuals)

    def named(self, scores: Sequence[Array], labels: Sequence[str]) -> list[list[tuple[str, str]]]:
        """For each chain's labeled pieces, the annotator's label and the one with the highest logit."""
        return [
            [(b, labels[best]) for b, best in zip(truth, of.argmax(1), strict=True) if b is not None]
            for truth, of in zip(self.labels, scores, strict=True)
        ]

    def truth(self, labels: Sequence[str]) -> Int[np.ndarray[Any, Any], " span"]:
        """Index of the label of each piece of every chain; -1 for none."""
        return np.array([-1 if b is None else labels.index(b) for chain in self.labels for b in chain], dtype=np.int64)

    def by_chain(self, values: np.ndarray[Any, np.dtype[Any]]) -> list[np.ndarray[Any, np.dtype[Any]]]:
        """Rows of all pieces, chain by chain."""
        return np.split(values, np.cumsum([len(chain.pieces) for chain in self.chains])[:-1])


@dataclass(frozen=True)
class Material:
    """The training data: the annotator's own spans, and the same chains split into sentences by rule.

    Attributes:
        spans: what the linear model is trained on; a judge's spans hold whole thoughts, each with one label.
        sentences: what the model is used on, so also what it is calibrated on.
        folds: of each chain.
        labels: the behaviors that occur.
    """

    spans: Pieces
    sentences: Pieces
    folds: tuple[int, ...]
    labels: tuple[str, ...]


@dataclass(frozen=True, eq=False)
class Linear:
    """A vocabulary, a logistic regression on its features, and the lengths of the training spans.

    Attributes:
        vocabulary: of the features.
        coefficients: of each label and feature.
        intercept: of each label.
        lengths: shares of the training spans that hold one, two, … sentences; they sum to 1.
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
            LensteerError: the coefficients do not fit the features.
        """
        if not any(chain.pieces for chain in chains):
            return np.zeros((0, len(self.intercept)))
        found = features(chains, self.vocabulary, weights, residuals)
        if found.shape[1] != self.coefficients.shape[1]:
            raise LensteerError(
                f"the classifier has {self.coefficients.shape[1]} coefficients per label for {found.shape[1]} features:"
                " it is damaged or of another version, train it again"
            )
        return np.asarray(found @ self.coefficients.T) + self.intercept

    def sentence_scores(
        self, chains: Sequence[Chain], residuals: Array | None, weights: FeatureWeights
    ) -> Float[np.ndarray[Any, Any], "span behavior"]:
        """Logits of every sentence of every chain, each read alone and together with those around it.

        A judge's span may hold several sentences of a paragraph, of which only one has the words that indicate its
        label. So a sentence's logits are the mean over all runs of sentences without a blank line inside that contain
        it, each weighted by the share of training spans with that many sentences.
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
    (arXiv 1706.04599). The biases restore how common each label is, which balanced training removes.
    """

    scale: float
    bias: Float[np.ndarray[Any, Any], " behavior"]

    def probabilities(
        self, scores: Float[np.ndarray[Any, Any], "span behavior"]
    ) -> Float[np.ndarray[Any, Any], "span behavior"]:
        """The probability of each label; rows sum to 1."""
        from scipy.special import softmax

        return np.asarray(softmax(self.scale * scores + self.bias, axis=1))


def gather(
    traces: Sequence[Trace], model: TransformerBridge | None, layer: int | None, n_folds: int, seed: int
) -> Material:
    """The training data of annotated traces. Those without spans are left out.

    Raises:
        LensteerError: a model without a layer or vice versa, no such layer, fewer than two behaviors, fewer
            tasks than folds.
    """
    check_reading(model, layer)
    annotated = [trace for trace in traces if trace.spans]
    labels = in_order(span.label for trace in annotated for span in trace.spans)
    if len(labels) < 2:
        raise LensteerError(
            f"{len(annotated)} of {len(traces)} traces have spans, of behaviors {list(labels)}: a classifier needs "
            "annotated traces with at least two behaviors"
        )
    tasks = sorted({trace.task.id for trace in annotated})
    if len(tasks) < n_folds:
        raise LensteerError(
            f"annotated traces of {len(tasks)} task(s) cannot make {n_folds} folds: give more, or a smaller n_folds"
        )
    order = np.random.default_rng(seed).permutation(len(tasks))
    fold = {tasks[task]: place % n_folds for place, task in enumerate(order)}
    sentences = [labeled_sentences(trace) for trace in annotated]
    return Material(
        _pieces(
            [[(s.char_start, s.char_end, s.label) for s in trace.spans] for trace in annotated], annotated, model, layer
        ),
        _pieces([[(s.start, s.end, s.label) for s in found] for found in sentences], annotated, model, layer),
        tuple(fold[trace.task.id] for trace in annotated),
        labels,
    )


def check_reading(model: TransformerBridge | None, layer: int | None) -> None:
    """Check that model and layer are both given, or neither.

    Raises:
        LensteerError: one without the other, or a layer that the model lacks.
    """
    if (model is None) != (layer is None):
        raise LensteerError(
            f"{'no model' if model is None else 'a model'} with layer={layer}: give both, for features of its residual "
            "stream, or neither"
        )
    if model is not None and layer is not None:
        models.check_layer(model, layer)


def _pieces(
    found: Sequence[Sequence[tuple[int, int, str | None]]],
    traces: Sequence[Trace],
    model: TransformerBridge | None,
    layer: int | None,
) -> Pieces:
    chains = tuple(Chain(t, tuple((a, b) for a, b, _ in places)) for t, places in zip(traces, found, strict=True))
    residuals = None if model is None or layer is None else residual_features(model, layer, chains)
    return Pieces(chains, tuple(tuple(label for *_, label in places) for places in found), residuals)


def fit_linear(material: Material, config: ClassifierConfig, *, without: int | None = None) -> Linear:
    """Multinomial logistic regression on the spans of all chains, or of all but one fold (`without`).

    A label that does not occur among them gets a constant logit below all others.
    """
    from sklearn.linear_model import LogisticRegression

    which = [i for i, fold in enumerate(material.folds) if fold != without]
    pieces, labels = material.spans.take(which), material.labels
    vocabulary = learn_vocabulary(pieces.chains, config.features, pieces.residuals)
    x = features(pieces.chains, vocabulary, config.features, pieces.residuals)
    y = pieces.truth(labels)
    counts = np.bincount(y, minlength=len(labels))
    seen = np.flatnonzero(counts)
    coefficients, intercept = np.zeros((len(labels), x.shape[1])), np.zeros(len(labels))
    if len(seen) > 1:
        weight = {b: float((counts.sum() / (len(seen) * counts[b])) ** config.balance) for b in seen}
        regression = LogisticRegression(
            C=config.strength, class_weight=weight, max_iter=_ITERATIONS, tol=_TOLERANCE
        ).fit(x, y)
        if len(seen) == 2:  # scikit-learn has one row of coefficients then
            coefficients[seen[1]], intercept[seen[1]] = regression.coef_[0], regression.intercept_[0]
        else:
            coefficients[seen], intercept[seen] = regression.coef_, regression.intercept_
    intercept[counts == 0] = intercept.min() - _UNSEEN
    lengths = span_lengths(pieces.chains, [material.sentences.chains[i] for i in which], config.together)
    return Linear(vocabulary, coefficients, intercept, lengths)


def held_out_scores(material: Material, config: ClassifierConfig) -> tuple[list[Array], list[Array]]:
    """Logits of each chain's spans, and of its sentences, from a model that was fitted on the other folds."""
    spans: dict[int, Array] = {}
    sentences: dict[int, Array] = {}
    for fold in range(config.n_folds):
        out = [i for i, f in enumerate(material.folds) if f == fold]
        linear = fit_linear(material, config, without=fold)
        for into, pieces, score in (
            (spans, material.spans.take(out), linear.scores),
            (sentences, material.sentences.take(out), linear.sentence_scores),
        ):
            found = pieces.by_chain(score(pieces.chains, pieces.residuals, config.features))
            into.update(zip(out, found, strict=True))
    n = range(len(material.folds))
    return [spans[i] for i in n], [sentences[i] for i in n]


def fit_scaling(
    scores: Float[np.ndarray[Any, Any], "span behavior"], truth: Int[np.ndarray[Any, Any], " span"]
) -> Scaling:
    """The calibration that maximizes the likelihood of held-out labels.

    Args:
        scores: logits on held-out chains.
        truth: index of each piece's label; those below 0 are left out.
    """
    from scipy.optimize import minimize
    from scipy.special import log_softmax

    n_labels = scores.shape[1]
    scores, truth = scores[truth >= 0], truth[truth >= 0]
    one_hot = np.eye(n_labels)[truth]

    def loss(parameters: Array) -> tuple[float, Array]:
        scale, bias = float(np.exp(parameters[0])), parameters[1:]
        log_p = log_softmax(scale * scores + bias, axis=1)
        wrong = np.exp(log_p) - one_hot
        gradient = np.concatenate([[scale * (wrong * scores).sum()], wrong.sum(0)]) + _PRIOR * parameters
        return float(-(log_p * one_hot).sum() + _PRIOR * (parameters @ parameters) / 2), gradient

    found = minimize(loss, np.zeros(1 + n_labels), jac=True, bounds=[(-5, 5)] + [(-10, 10)] * n_labels).x
    return Scaling(float(np.exp(found[0])), np.asarray(found[1:]))


def span_lengths(
    spans: Sequence[Chain], sentences: Sequence[Chain], longest: int
) -> Float[np.ndarray[Any, Any], " length"]:
    """Shares of the spans that hold one, two, … `longest` sentences: those whose middle a span covers."""
    counts = np.zeros(longest)
    for whole, cut in zip(spans, sentences, strict=True):
        middles = np.array([(start + end) / 2 for start, end in cut.pieces])
        for start, end in whole.pieces:
            held = int(((middles > start) & (middles < end)).sum())
            if 1 <= held <= longest:
                counts[held - 1] += 1
    return counts / counts.sum() if counts.any() else np.eye(longest)[0]


def _runs(chain: Chain, size: int) -> list[int]:
    """Start indices of runs of `size` sentences without a blank line inside."""
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

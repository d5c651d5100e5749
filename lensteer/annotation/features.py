"""The features of a sentence for a classifier: its words, its opening, its neighbors, its position in the chain.

Terms are learned from training chains, so a chain in another language or on another subject has few of them.
"""

from __future__ import annotations

import re
from bisect import bisect_left, bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from lensteer.annotation.alignment import align
from lensteer.behaviors import UNPARSED, Sentence, Span
from lensteer.errors import LensteerError
from lensteer.traces import Trace, with_spans

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Array = np.ndarray[Any, np.dtype[np.float64]]

_TOKEN = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*|\d+|[^\w\s]")
_OPENING, _MIN_COUNT = 8, 2  # words that open a sentence; pieces that a term must be in
_BINS = 5  # of the relative position in the thinking
_GAP = 8  # characters before and after a sentence that are searched for line breaks
_NONE = "<none>"


@dataclass(frozen=True)
class FeatureWeights:
    """Scale of each group of features before the classifier's own coefficients; 0 leaves the group out.

    Attributes:
        words: single words and pairs of the sentence, numbers and marks included.
        opening: the same for its first eight words.
        place: where in the thinking it begins, and whether a line break or blank line comes before or after it.
        neighbors: the words of the sentences before and after it.
        residuals: the residual stream's mean at the sentence and at its onset, if a model is given.
    """

    words: float = 1.0
    opening: float = 1.0
    place: float = 0.5
    neighbors: float = 0.3
    residuals: float = 1.0

    def __post_init__(self) -> None:
        weights = {field.name: getattr(self, field.name) for field in fields(self)}
        for name, weight in weights.items():
            if not 0 <= weight < np.inf:
                raise LensteerError(f"feature weight {name}={weight}: give a number that is not negative")
        if not any(weights.values()):
            raise LensteerError("all feature weights are 0: give at least one that is positive")


@dataclass(frozen=True)
class Chain:
    """A trace and the pieces of it that are classified, as characters of the response.

    Both starts and ends increase; pieces may overlap.
    """

    trace: Trace
    pieces: tuple[tuple[int, int], ...]

    @property
    def texts(self) -> list[str]:
        """The text of each piece."""
        return [self.trace.response[start:end] for start, end in self.pieces]

    def beside(self) -> list[tuple[int, int]]:
        """For each piece, the index of the last piece that ends before it (-1: none) and of the first after it.

        The latter is the number of pieces if there is none. Without overlaps these are its neighbors.
        """
        starts, ends = [start for start, _ in self.pieces], [end for _, end in self.pieces]
        return [(bisect_right(ends, start) - 1, bisect_left(starts, end)) for start, end in self.pieces]


@dataclass(frozen=True, eq=False)
class Vocabulary:
    """The terms of each group of text features with their inverse document frequencies, and the residuals' moments.

    Attributes:
        terms: by group.
        idf: by group, one per term.
        standard: mean and standard deviation of each residual feature, `[2 feature]`; empty without a model.
    """

    terms: Mapping[str, tuple[str, ...]]
    idf: Mapping[str, Array]
    standard: Float[np.ndarray[Any, Any], "2 feature"]


def learn_vocabulary(chains: Sequence[Chain], weights: FeatureWeights, residuals: Array | None) -> Vocabulary:
    """The terms that occur in at least two training pieces.

    Raises:
        LensteerError: there are none at all.
    """
    terms: dict[str, tuple[str, ...]] = {}
    idf: dict[str, Array] = {}
    for group, documents in _documents(chains, weights).items():
        vectorizer = _vectorizer()
        try:
            vectorizer.fit(documents)
        except ValueError:  # no term is left
            terms[group], idf[group] = (), np.zeros(0)
        else:
            terms[group], idf[group] = tuple(map(str, vectorizer.get_feature_names_out())), vectorizer.idf_
    if terms and not any(terms.values()):
        raise LensteerError("no word occurs in two of the annotated sentences: give more annotated chains")
    standard = np.zeros((2, 0))
    if residuals is not None:
        standard = np.stack([residuals.mean(0), np.maximum(residuals.std(0), 1e-6)])
    return Vocabulary(terms, idf, standard)


def features(chains: Sequence[Chain], vocabulary: Vocabulary, weights: FeatureWeights, residuals: Array | None) -> Any:
    """A sparse matrix: a row per piece of every chain; a column per term, place feature and residual dimension.

    Raises:
        LensteerError: no group of features is left.
    """
    from scipy import sparse

    blocks = []
    for group, documents in _documents(chains, weights).items():
        if vocabulary.terms[group]:
            vectorizer = _vectorizer(vocabulary.terms[group])
            vectorizer.idf_ = vocabulary.idf[group]
            blocks.append(_weight(weights, group) * vectorizer.transform(documents))
    if weights.place:
        places = np.array([row for chain in chains for row in _place(chain)])
        blocks.append(weights.place * sparse.csr_matrix(places))
    if residuals is not None:
        centered = (residuals - vocabulary.standard[0]) / vocabulary.standard[1]
        length = np.linalg.norm(centered, axis=1, keepdims=True)
        blocks.append(sparse.csr_matrix(weights.residuals * centered / np.maximum(length, 1e-6)))
    if not blocks:
        raise LensteerError(f"no features under {weights} without a model: give a model and layer, or another weight")
    return sparse.hstack(blocks, format="csr")


def residual_features(
    model: TransformerBridge, layer: int, chains: Sequence[Chain]
) -> Float[np.ndarray[Any, Any], "span feature"]:
    """For each piece, the residual stream at a block's output: at the piece's onset, and the mean over the piece.

    The mean includes the onset. A piece that has no token of its own has zeros.
    """
    from lensteer.activations import stream_features  # later in the layout; only a classifier with residuals needs it

    placed, numbers = [], []
    for chain in chains:
        trace = chain.trace
        sentences = [Sentence(UNPARSED, text) for text in chain.texts]
        spans = align(sentences, trace.response, trace.offsets, prompt_length=trace.prompt_length).spans
        number = {start: i for i, (start, _) in enumerate(chain.pieces)}
        kept: list[Span] = [span for span in spans if span.char_start in number]
        placed.append(with_spans(trace, kept, 0))
        numbers.append([number[span.char_start] for span in kept])
    first = np.cumsum([0, *(len(chain.pieces) for chain in chains)])
    found = np.zeros((int(first[-1]), 2 * int(model.cfg.d_model)))
    for read in stream_features(model, placed, windows=("onset", "span"), layers=(layer,)):
        rows = first[read.index] + np.array(numbers[read.index])
        found[rows] = np.concatenate([window[:, 0].double().numpy() for window in read.spans], axis=1)
    return found


def text_groups(weights: FeatureWeights) -> tuple[str, ...]:
    """The groups of terms that a vocabulary under these weights has."""
    return tuple(_documents((), weights))


def tokens(text: str) -> list[str]:
    """Words, numbers (all as "0") and punctuation marks, in lower case."""
    return ["0" if token[0].isdigit() else token for token in _TOKEN.findall(text.lower().replace("’", "'"))]


def _documents(chains: Sequence[Chain], weights: FeatureWeights) -> dict[str, list[list[str]]]:
    """The terms of every piece, by group of weight above 0."""
    documents: dict[str, list[list[str]]] = {}
    words = [[tokens(text) for text in chain.texts] for chain in chains]
    flat = [sentence for chain in words for sentence in chain]
    if weights.words:
        documents["words"] = [_word_pairs(sentence) for sentence in flat]
    if weights.opening:
        documents["opening"] = [_word_pairs(sentence[:_OPENING]) for sentence in flat]
    if weights.neighbors:
        beside = [pair for chain in chains for pair in chain.beside()]
        padded = [[*chain, [_NONE]] for chain in words for _ in chain]  # -1 and one past the last: no sentence
        for side, group in enumerate(("before", "behind")):
            documents[group] = [chain[pair[side]] for chain, pair in zip(padded, beside, strict=True)]
    return documents


def _weight(weights: FeatureWeights, group: str) -> float:
    return float(getattr(weights, "neighbors" if group in ("before", "behind") else group))


def _vectorizer(terms: tuple[str, ...] | None = None) -> Any:
    """scikit-learn's TF-IDF on lists of terms; without `terms`, one that learns those of at least two documents."""
    from sklearn.feature_extraction.text import TfidfVectorizer

    return TfidfVectorizer(analyzer=_identity, sublinear_tf=True, min_df=_MIN_COUNT, vocabulary=terms)


def _identity(document: list[str]) -> list[str]:
    return document


def _word_pairs(words: list[str]) -> list[str]:
    return words + [f"{a} {b}" for a, b in pairwise(words)]


def _place(chain: Chain) -> list[list[float]]:
    response = chain.trace.response
    begin, end = chain.trace.thinking
    opening, closing = begin, end  # without white space at either end
    while opening < closing and response[opening].isspace():
        opening += 1
    while closing > opening and response[closing - 1].isspace():
        closing -= 1
    rows: list[list[float]] = []
    for start, stop in chain.pieces:
        at = min(max(0.0, (start - begin) / max(1, end - begin)), 1.0)
        before, after = response[max(0, start - _GAP) : start], response[stop : stop + _GAP]
        before, after = before[len(before.rstrip()) :], after[: len(after) - len(after.lstrip())]
        breaks = [gap.count("\n") > least for gap in (before, after) for least in (0, 1)]
        bins = [*_bin(int(at * _BINS), _BINS), *_bin(int(np.log2(1 + max(0, start - begin) / 50)), 6)]
        rows.append([at, *bins, *map(float, [*breaks, start <= opening, stop >= closing])])
    return rows


def _bin(number: int, size: int) -> list[float]:
    """One-hot of `number` in `size` cells; the last cell also takes all larger numbers."""
    return [float(i == min(number, size - 1)) for i in range(size)]

"""Agreement of two annotators on the same chains, sentence by sentence, with intervals over chains.

`first` is called the reference because precision and recall need one. That does not mean that it is right; κ and
accuracy are symmetric.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
from jaxtyping import Float, Int

from lensteer.annotation.annotators import label_intervals, labeled_sentences
from lensteer.behaviors import axis_of
from lensteer.errors import LensteerError
from lensteer.statistics import Estimate, drawn_counts, percentile_interval
from lensteer.traces import Trace

#: Name of the confusion matrix's row and column for sentences without a label.
NONE = "none"

Array = np.ndarray[Any, np.dtype[np.float64]]


@dataclass(frozen=True)
class LabelAgreement:
    """One label: how often each annotator gives it, and scores of the second with the first as reference.

    Attributes:
        label: the behavior.
        n_first: sentences with this label from the reference.
        n_second: sentences with this label from the other annotator.
        precision: share of the `n_second` sentences that also have it from the reference; undefined if there are none.
        recall: share of the `n_first` sentences that also have it from the other annotator; undefined if there are
            none.
        f1: 2 · both / (n_first + n_second); undefined if neither annotator gives it.
    """

    label: str
    n_first: int
    n_second: int
    precision: Estimate
    recall: Estimate
    f1: Estimate


@dataclass(frozen=True, eq=False)
class Agreement:
    """Two annotators on the same sentences.

    Attributes:
        labels: of both axes of `confusion`; the last is "none", a sentence without a label.
        confusion: sentences by label of the first annotator (rows) and of the second (columns).
        kappa: Cohen's κ = (p_o − p_e) / (1 − p_e), with "none" as one more label.
        accuracy: share of sentences with the same label.
        macro_f1: mean F1 over the labels that occur in the reference, without "none".
        per_label: in the order of `labels`, without "none".
        n_sentences: sentences compared.
        n_chains: chains they are from; the bootstrap resamples these.
    """

    labels: tuple[str, ...]
    confusion: Int[np.ndarray[Any, Any], "behavior behavior"]
    kappa: Estimate
    accuracy: Estimate
    macro_f1: Estimate
    per_label: tuple[LabelAgreement, ...]
    n_sentences: int
    n_chains: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per figure and label ("" for all labels together), with its number of sentences in the reference."""
        return pd.DataFrame(
            [(name, label, found.value, found.low, found.high, n) for name, label, found, n in self._estimates()],
            columns=["figure", "label", "value", "low", "high", "n"],
        )

    def figures(self) -> dict[str, int | float]:
        """The same as a flat mapping: "kappa", "kappa_low", "f1.backtracking" ...; undefined ones are left out."""
        flat: dict[str, int | float] = {"n_sentences": self.n_sentences, "n_chains": self.n_chains}
        for name, label, found, _ in self._estimates():
            key = f"{name}.{label}" if label else name
            values = {key: found.value, f"{key}_low": found.low, f"{key}_high": found.high}
            flat |= {at: value for at, value in values.items() if not np.isnan(value)}
        return flat

    def _estimates(self) -> Iterator[tuple[str, str, Estimate, int]]:
        for name, found in (("kappa", self.kappa), ("accuracy", self.accuracy), ("macro_f1", self.macro_f1)):
            yield name, "", found, self.n_sentences
        for own in self.per_label:
            for name, found in (("precision", own.precision), ("recall", own.recall), ("f1", own.f1)):
                yield name, own.label, found, own.n_first


def agreement(first: Sequence[Trace], second: Sequence[Trace], *, n_boot: int = 2000, seed: int = 0) -> Agreement:
    """Compare two annotations of the same chains, sentence by sentence.

    Sentences are those of `labeled_sentences`; one that an annotator left out is "none" for that annotator. If a judge
    left out the end of a chain, that lowers the agreement: cut the chains first if it should not.

    Args:
        first: the reference.
        second: the same chains, in any order.
        n_boot: resamples of the chains.
        seed: for the resamples.

    Raises:
        LensteerError: a chain on one side only or twice on one side, different responses, or no sentence.
    """
    sides = [{trace.id: trace for trace in side} for side in (first, second)]
    for name, side, found in zip(("first", "second"), (first, second), sides, strict=True):
        if len(found) < len(side):
            raise LensteerError(f"{name} has {len(side)} traces but {len(found)} ids: give every chain once")
    if odd := sorted(sides[0].keys() ^ sides[1].keys()):
        raise LensteerError(f"{len(odd)} chain(s) on one side only, such as {odd[0]!r}: give the same chains on both")
    pairs = []
    for one in first:
        other = sides[1][one.id]
        if other.response != one.response:
            raise LensteerError(f"the two traces {one.id!r} have different responses: annotate the same chain twice")
        sentences = labeled_sentences(one)
        labels = label_intervals(other.response, [(s.start, s.end) for s in sentences], other.spans)
        pairs.append([(s.label, label) for s, label in zip(sentences, labels, strict=True)])
    return agreement_of(pairs, n_boot=n_boot, seed=seed)


def agreement_of(
    pairs: Sequence[Sequence[tuple[str | None, str | None]]],
    *,
    labels: Sequence[str] | None = None,
    n_boot: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Agreement from labels alone.

    Args:
        pairs: per chain and sentence, the labels from the first and the second annotator (None: no label).
        labels: the possible labels; None for the default scheme, or for all that occur if there are others.
        n_boot: resamples of the chains. With one chain, or `n_boot` 0, all intervals are NaN.
        seed: for the resamples.

    Raises:
        LensteerError: no sentence, an unknown label, or a negative `n_boot`.
    """
    if n_boot < 0:
        raise LensteerError(f"n_boot={n_boot}: give a number of resamples, such as 2000")
    if labels is None:
        labels = axis_of(label for chain in pairs for pair in chain for label in pair if label is not None)
    names = (*labels, NONE)
    index = {name: i for i, name in enumerate(names)} | {None: len(labels)}
    counts = np.zeros((len(pairs), len(names), len(names)))
    for chain, sentences in enumerate(pairs):
        for pair in sentences:
            if unknown := [label for label in pair if label not in index]:
                raise LensteerError(f"unknown label {unknown[0]!r}: choose from {', '.join(map(repr, labels))}")
            counts[chain, index[pair[0]], index[pair[1]]] += 1
    total = counts.sum(0)
    if not total.any():
        raise LensteerError(f"no sentence in {len(pairs)} chain(s): there is nothing to compare")
    found = _figures(total)
    drawn = drawn_counts(len(pairs), n_boot if len(pairs) > 1 else 0, seed)
    resampled = _figures(np.tensordot(drawn, counts, 1))

    def estimate(name: str, at: int | tuple[()] = ()) -> Estimate:
        draws = resampled[name] if at == () else resampled[name][:, at]
        return percentile_interval(found[name][at], draws, len(pairs))

    return Agreement(
        labels=names,
        confusion=total.astype(np.int64),
        kappa=estimate("kappa"),
        accuracy=estimate("accuracy"),
        macro_f1=estimate("macro_f1"),
        per_label=tuple(
            LabelAgreement(
                label,
                int(total[i].sum()),
                int(total[:, i].sum()),
                *(estimate(name, i) for name in ("precision", "recall", "f1")),
            )
            for i, label in enumerate(labels)
        ),
        n_sentences=int(total.sum()),
        n_chains=len(pairs),
    )


def macro_f1(truth: Sequence[str | None], guess: Sequence[str | None], labels: Sequence[str] | None = None) -> float:
    """Mean F1 over the labels that occur in `truth`, without intervals; NaN if there are none.

    Raises:
        LensteerError: no sentence, an unknown label, or sequences of different length.
    """
    if len(truth) != len(guess):
        raise LensteerError(f"{len(truth)} true labels and {len(guess)} guesses: give one of each per sentence")
    return agreement_of([list(zip(truth, guess, strict=True))], labels=labels, n_boot=0).macro_f1.value


def _figures(counts: Float[np.ndarray[Any, Any], "*draw behavior behavior"]) -> dict[str, Array]:
    """All figures of confusion matrices, NaN where undefined; the last row and column represent no label."""
    first, second, both = counts.sum(-1), counts.sum(-2), np.diagonal(counts, axis1=-2, axis2=-1)
    total = counts.sum((-2, -1))
    accuracy = _ratio(both.sum(-1), total)
    chance = _ratio((first * second).sum(-1), total**2)
    f1 = _ratio(2 * both, first + second)
    held = first[..., :-1] > 0
    return {
        "kappa": _ratio(accuracy - chance, 1 - chance),
        "accuracy": accuracy,
        "precision": _ratio(both, second),
        "recall": _ratio(both, first),
        "f1": f1,
        "macro_f1": _ratio(np.where(held, f1[..., :-1], 0).sum(-1), held.sum(-1)),
    }


def _ratio(numerator: Any, denominator: Any) -> Array:
    return np.asarray(
        np.divide(numerator, denominator, out=np.full(np.shape(numerator), np.nan), where=denominator != 0)
    )

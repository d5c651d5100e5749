"""How well a trained classifier does on held-out chains, and how well calibrated its probabilities are.

All figures compare it with the annotator that it was trained on; they do not measure that annotator's quality.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd
from jaxtyping import Float

from lensteer.annotation.agreement import Agreement, agreement_of
from lensteer.annotation.classifier_model import (
    ClassifierConfig,
    fit_linear,
    fit_scaling,
    gather,
    held_out_scores,
)
from lensteer.annotation.features import Array
from lensteer.errors import LensteerError
from lensteer.statistics import Estimate
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

THRESHOLDS = (0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8, 0.9)
_BINS = 10


@dataclass(frozen=True)
class ReliabilityBin:
    """Sentences whose labels have about the same probability, and the share of those labels that are right.

    Attributes:
        confidence: mean probability of the label given.
        accuracy: share of labels that match the annotator's.
        n: sentences.
    """

    confidence: float
    accuracy: float
    n: int


@dataclass(frozen=True)
class Coverage:
    """The sentences that are labeled at an abstention threshold, and how accurately.

    Attributes:
        abstain: sentences whose label is less probable are left out.
        coverage: share of the sentences that are labeled.
        accuracy: of those.
        macro_f1: of those.
    """

    abstain: float
    coverage: float
    accuracy: Estimate
    macro_f1: Estimate


@dataclass(frozen=True, eq=False)
class ClassifierReport:
    """Cross-validated figures of a classifier, every piece labeled by a model that was not fitted on its task.

    Attributes:
        agreement: the annotator (first) and the classifier (second): macro-F1, κ, F1 of each label, confusion.
        reliability: ten bins of equal size, by probability of the label given.
        calibration_error: Σ n/N |accuracy - confidence| over these bins; above 0 by chance alone.
        coverage: by abstention threshold; thresholds that nothing reaches are left out.
        units: "spans", the annotator's own pieces, or "sentences", split by rule, as the classifier is used.
        correct: per chain, how many labels are right, and how many pieces there are.
    """

    agreement: Agreement
    reliability: tuple[ReliabilityBin, ...]
    calibration_error: float
    coverage: tuple[Coverage, ...]
    units: str
    correct: tuple[tuple[int, int], ...]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per figure and label; figures at an abstention threshold have it in the column `abstain`."""
        table = self.agreement.to_dataframe().assign(abstain=0.0)
        n = self.agreement.n_sentences
        rows = [("calibration_error", "", self.calibration_error, np.nan, np.nan, n, 0.0)]
        for at in self.coverage:
            left = round(at.coverage * n)
            rows.append(("coverage", "", at.coverage, np.nan, np.nan, n, at.abstain))
            rows += [
                (figure, "", found.value, found.low, found.high, left, at.abstain)
                for figure, found in (("accuracy", at.accuracy), ("macro_f1", at.macro_f1))
            ]
        return pd.concat([table, pd.DataFrame(rows, columns=table.columns)], ignore_index=True)


def cross_validate(
    traces: Sequence[Trace],
    *,
    model: TransformerBridge | None = None,
    layer: int | None = None,
    units: str = "sentences",
    seed: int = 0,
    config: ClassifierConfig | None = None,
    n_boot: int = 2000,
) -> ClassifierReport:
    """How well a classifier labels chains of tasks that it was not trained on.

    The model is fitted on the annotator's spans of the other folds. The probabilities of a fold are calibrated on the
    held-out logits of the other folds.

    Args:
        traces: annotated; those without spans are left out.
        model: with `layer`, as for `fit_classifier`.
        layer: the block at whose output the residual stream is read.
        units: what is labeled and counted: "sentences" split by rule, without those that the annotator did not label,
            or the annotator's own "spans".
        seed: for the folds and the bootstrap over chains.
        config: of features and training.
        n_boot: resamples of the chains (the fits are not repeated).

    Raises:
        LensteerError: unknown units, or anything that `fit_classifier` raises.
    """
    if units not in ("spans", "sentences"):
        raise LensteerError(f"units={units!r}: choose 'spans' or 'sentences'")
    config = config or ClassifierConfig()
    material = gather(traces, model, layer, config.n_folds, seed)
    on_spans, on_sentences = held_out_scores(material, config)
    pieces, scores = (material.spans, on_spans) if units == "spans" else (material.sentences, on_sentences)
    fold = np.concatenate([np.full(len(of), f) for of, f in zip(scores, material.folds, strict=True)])
    every, truth = np.concatenate(scores), pieces.truth(material.labels)
    probability = np.zeros_like(every)
    for out in range(config.n_folds):
        scaling = fit_scaling(every[fold != out], truth[fold != out])
        probability[fold == out] = scaling.probabilities(every[fold == out])
    best = every.argmax(1)
    given = probability[np.arange(len(best)), best]
    pairs = pieces.named(scores, material.labels)
    by_chain = [of[t >= 0] for of, t in zip(pieces.by_chain(given), pieces.by_chain(truth), strict=True)]
    reliability = _reliability(given[truth >= 0], (best == truth)[truth >= 0])
    n = sum(bin_.n for bin_ in reliability)
    return ClassifierReport(
        agreement=agreement_of(pairs, n_boot=n_boot, seed=seed),
        reliability=reliability,
        calibration_error=sum(bin_.n / n * abs(bin_.accuracy - bin_.confidence) for bin_ in reliability),
        coverage=tuple(_coverage(pairs, by_chain, t, n_boot, seed) for t in THRESHOLDS if given[truth >= 0].max() >= t),
        units=units,
        correct=tuple((sum(a == b for a, b in chain), len(chain)) for chain in pairs),
    )


def left_out_source(
    traces: Sequence[Trace],
    sources: Sequence[object],
    *,
    seed: int = 0,
    config: ClassifierConfig | None = None,
    n_boot: int = 2000,
) -> Agreement:
    """How well a classifier labels chains of a source, such as a model, and of tasks that it was not fitted on.

    The chains of one source on one half of the tasks are labeled by a classifier that was fitted on the other sources'
    chains on the other half, for every source and half in turn.

    Args:
        traces: annotated.
        sources: the source of each trace; at least two different ones.
        seed: for the halves and the bootstrap over chains.
        config: of features and training.
        n_boot: resamples of the chains.

    Raises:
        LensteerError: one source, a list of another length, or anything that `fit_classifier` raises.
    """
    if len(sources) != len(traces) or len(set(sources)) < 2:
        raise LensteerError(
            f"{len(sources)} sources ({len(set(sources))} different) for {len(traces)} traces: give one for each, at "
            "least two different ones"
        )
    config = config or ClassifierConfig()
    halves = gather(traces, None, None, 2, seed)
    half = dict(zip((t.id for t in traces if t.spans), halves.folds, strict=True))
    pairs: list[list[tuple[str, str]]] = []
    for source in dict.fromkeys(sources):
        for out in (0, 1):
            chosen = [
                trace
                for trace, of in zip(traces, sources, strict=True)
                if trace.spans and (of == source) == (half[trace.id] == out)
            ]
            held = {t.id for t, of in zip(traces, sources, strict=True) if of == source}
            material = gather(chosen, None, None, 2, seed)
            folds = tuple(int(t.id not in held) for t in chosen)
            linear = fit_linear(replace(material, folds=folds), config, without=0)
            pieces = material.sentences.take([i for i, fold in enumerate(folds) if fold == 0])
            scores = pieces.by_chain(linear.sentence_scores(pieces.chains, None, config.features))
            pairs += pieces.named(scores, material.labels)
    return agreement_of(pairs, n_boot=n_boot, seed=seed)


def _reliability(
    given: Float[np.ndarray[Any, Any], " span"], right: np.ndarray[Any, np.dtype[np.bool_]]
) -> tuple[ReliabilityBin, ...]:
    parts = np.array_split(np.argsort(given, kind="stable"), min(_BINS, len(given)))
    return tuple(ReliabilityBin(float(given[i].mean()), float(right[i].mean()), len(i)) for i in parts)


def _coverage(
    pairs: Sequence[Sequence[tuple[str, str]]], given: Sequence[Array], threshold: float, n_boot: int, seed: int
) -> Coverage:
    left = [
        [pair for pair, p in zip(chain, of, strict=True) if p >= threshold]
        for chain, of in zip(pairs, given, strict=True)
    ]
    found = agreement_of(left, n_boot=n_boot, seed=seed)
    return Coverage(threshold, sum(map(len, left)) / sum(map(len, pairs)), found.accuracy, found.macro_f1)

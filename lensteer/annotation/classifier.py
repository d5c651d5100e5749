"""A sentence classifier trained on annotated chains, usable as an annotator. It learns its annotator's errors, too.

A linear model of words, position in the chain and, with a model, the residual stream. Its provenance records how well
it does on held-out chains of its training distribution; whether new chains follow that distribution is for the user to
judge.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from jaxtyping import Float

from lensteer import models
from lensteer._version import __version__
from lensteer.annotation.agreement import agreement_of
from lensteer.annotation.classifier_model import (
    ClassifierConfig,
    Linear,
    Scaling,
    fit_linear,
    fit_scaling,
    gather,
    held_out_scores,
)
from lensteer.annotation.features import Array, Chain, FeatureWeights, Vocabulary, residual_features, text_groups
from lensteer.annotation.splitting import split_sentences
from lensteer.behaviors import UNPARSED, Sentence
from lensteer.errors import LensteerError
from lensteer.files import read_tensors, write_tensors
from lensteer.models import ModelId
from lensteer.results import reading, revived
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_AT_ONCE = 200  # traces whose features are in memory at a time
_KEY, _WHAT = "lensteer-classifier", "classifier"


@dataclass(frozen=True, eq=False)
class SentenceClassifier:
    """Labels sentences that are split by rule. An `Annotator`: `annotate(traces, classifier)`.

    A sentence gets the label with the highest logit. The logits weight labels by `ClassifierConfig.balance`, while
    the probabilities reflect how common each label is, so a rare label may be given at a low probability.

    Attributes:
        labels: the labels that it gives, in the order of the behavior axis.
        linear: vocabulary and coefficients.
        scaling: from logits to probabilities.
        weights: of the feature groups.
        layer: the layer whose residual stream it reads; None if it reads text only.
        abstain: a sentence whose label is less probable than this is `UNPARSED`.
        provenance: lensteer version, training chains and labels, cross-validated figures, model.
        model: the model it was trained with, if it reads a layer.

    Raises:
        LensteerError: `abstain` is not a probability, or the model is not the one that it was trained with.
    """

    labels: tuple[str, ...]
    linear: Linear
    scaling: Scaling
    weights: FeatureWeights
    layer: int | None
    abstain: float
    provenance: dict[str, Any]
    model: TransformerBridge | None = field(default=None, repr=False)

    def __post_init__(self) -> None:
        if not 0 <= self.abstain <= 1:
            raise LensteerError(f"abstain={self.abstain} is not a probability: give a number from 0 to 1")
        if self.model is None:
            return
        if self.layer is None:
            raise LensteerError("this classifier reads text only: load it without a model")
        if odd := models.fingerprint(self.model).differences(self.provenance["model"]):
            raise LensteerError(
                f"this classifier was trained with {self.provenance['model']['name']!r}, and the model given differs "
                f"in {', '.join(odd)}: give the same one"
            )

    def __call__(self, traces: Sequence[Trace]) -> list[list[Sentence]]:
        """Every sentence of each trace's thinking with its label, or `UNPARSED`.

        Raises:
            LensteerError: it reads a layer and has no model.
        """
        return [
            [
                Sentence(self.labels[best] if p[best] >= self.abstain else UNPARSED, text)
                for text, best, p in zip(chain.texts, scores.argmax(1), self.scaling.probabilities(scores), strict=True)
            ]
            for chain, scores in self._scored(traces)
        ]

    def probabilities(self, traces: Sequence[Trace]) -> list[Float[np.ndarray[Any, Any], "span behavior"]]:
        """For each trace, the calibrated probability of each of `labels` for each sentence.

        Raises:
            LensteerError: it reads a layer and has no model.
        """
        return [self.scaling.probabilities(scores) for _, scores in self._scored(traces)]

    def _scored(self, traces: Sequence[Trace]) -> Iterator[tuple[Chain, Array]]:
        if self.layer is not None and self.model is None:
            raise LensteerError(
                f"this classifier reads layer {self.layer} of {self.provenance['model']['name']!r}: load it with model="
            )
        for first in range(0, len(traces), _AT_ONCE):
            chains = [_sentences(trace) for trace in traces[first : first + _AT_ONCE]]
            residuals = None
            if self.layer is not None and self.model is not None:
                residuals = residual_features(self.model, self.layer, chains)
            scores = self.linear.sentence_scores(chains, residuals, self.weights)
            at = 0
            for chain in chains:
                yield chain, scores[at : (at := at + len(chain.pieces))]

    def save(self, path: str | Path) -> None:
        """Write everything except the model to one safetensors file.

        Raises:
            LensteerError: the file cannot be written.
        """
        vocabulary = self.linear.vocabulary
        arrays = {
            "coefficients": self.linear.coefficients,
            "intercept": self.linear.intercept,
            "bias": self.scaling.bias,
            "lengths": self.linear.lengths,
            "standard": vocabulary.standard,
            **{f"idf.{group}": values for group, values in vocabulary.idf.items()},
        }
        header = {
            "labels": self.labels,
            "terms": vocabulary.terms,
            "scale": self.scaling.scale,
            "weights": asdict(self.weights),
            "layer": self.layer,
            "abstain": self.abstain,
            "provenance": self.provenance,
        }
        write_tensors(path, {name: torch.from_numpy(array) for name, array in arrays.items()}, header, _KEY, _WHAT)

    @staticmethod
    def load(path: str | Path, model: TransformerBridge | None = None) -> SentenceClassifier:
        """Read a classifier.

        Args:
            path: what `save` wrote.
            model: needed to use one that reads a layer.

        Raises:
            LensteerError: no such file, a corrupt or foreign one, or a model that it was not trained with.
        """
        tensors, header = read_tensors(path, _KEY, _WHAT)
        arrays = {name: tensor.numpy() for name, tensor in tensors.items()}
        with reading(repr(str(path)), "save the classifier again"):
            terms = revived(dict[str, tuple[str, ...]], header["terms"])
            labels = revived(tuple[str, ...], header["labels"])
            weights = revived(FeatureWeights, header["weights"])
            provenance = revived(dict[str, Any], header["provenance"])
            layer = None if header["layer"] is None else revived(int, header["layer"])
            if layer is not None:
                revived(ModelId, provenance["model"])
            if flaw := _flaw(labels, terms, weights, arrays):
                raise ValueError(flaw)
            vocabulary = Vocabulary(terms, {group: arrays[f"idf.{group}"] for group in terms}, arrays["standard"])
            return SentenceClassifier(
                labels=labels,
                linear=Linear(vocabulary, arrays["coefficients"], arrays["intercept"], arrays["lengths"]),
                scaling=Scaling(revived(float, header["scale"]), arrays["bias"]),
                weights=weights,
                layer=layer,
                abstain=revived(float, header["abstain"]),
                provenance=provenance,
                model=model,
            )


def fit_classifier(
    traces: Sequence[Trace],
    *,
    model: TransformerBridge | None = None,
    layer: int | None = None,
    abstain: float = 0.0,
    seed: int = 0,
    config: ClassifierConfig | None = None,
) -> SentenceClassifier:
    """Train on annotated traces, and calibrate by cross-validation.

    Args:
        traces: annotated; those without spans are left out.
        model: with `layer`, to read its residual stream as well as the text; give the model that generated the chains.
        layer: to read.
        abstain: below this probability a sentence is `UNPARSED`.
        seed: for the folds.
        config: of features and training.

    Raises:
        LensteerError: fewer than two behaviors, fewer tasks than folds, an impossible `abstain`, a model without a
            layer.
    """
    config = config or ClassifierConfig()
    material = gather(traces, model, layer, config.n_folds, seed)
    on_spans, on_sentences = held_out_scores(material, config)
    figures: dict[str, Any] = {}
    for name, pieces, scores in (
        ("spans", material.spans, on_spans),
        ("sentences", material.sentences, on_sentences),
    ):
        found = agreement_of(pieces.named(scores, material.labels), seed=seed)
        figures[name] = {
            figure: [estimate.value, estimate.low, estimate.high]
            for figure, estimate in (("macro_f1", found.macro_f1), ("kappa", found.kappa))
        }
    scaling = fit_scaling(np.concatenate(on_sentences), material.sentences.truth(material.labels))
    counts = [b for chain in material.spans.labels for b in chain]
    provenance = {
        "lensteer": __version__,
        "n_chains": len(material.folds),
        "n_spans": {b: counts.count(b) for b in material.labels},
        "cross_validated": figures,
        "seed": seed,
        "config": asdict(config),
        "model": None if model is None else models.fingerprint(model).to_dict(),
    }
    linear = fit_linear(material, config)
    return SentenceClassifier(material.labels, linear, scaling, config.features, layer, abstain, provenance, model)


def _sentences(trace: Trace) -> Chain:
    begin, end = trace.thinking
    return Chain(trace, tuple((begin + a, begin + b) for a, b in split_sentences(trace.response[begin:end])))


def _flaw(
    labels: Sequence[str],
    terms: Mapping[str, Sequence[str]],
    weights: FeatureWeights,
    arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]],
) -> str:
    """What is wrong with the sizes and numbers of a stored classifier; empty if nothing is."""
    n, groups = len(labels), text_groups(weights)
    if set(terms) != set(groups):
        return f"terms of {sorted(terms)} with weights of {sorted(groups)}"
    if twice := [group for group, of in terms.items() if len(set(of)) < len(of)]:
        return f"terms of {twice} twice"
    shapes: dict[str, tuple[int | None, ...]] = {"coefficients": (n, None), "intercept": (n,), "bias": (n,)}
    shapes |= {"lengths": (None,), "standard": (2, None)} | {f"idf.{group}": (len(terms[group]),) for group in groups}
    for name, shape in shapes.items():
        found = arrays[name]
        if len(found.shape) != len(shape) or any(a not in (None, b) for a, b in zip(shape, found.shape, strict=True)):
            return f"{name} have shape {found.shape} for {n} labels"
        if found.dtype != np.float64 or not np.isfinite(found).all():
            return f"{name} are not all finite numbers"
    return ""

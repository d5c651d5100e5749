"""What is scored: which spans, at which positions, by which method, with scaled vectors and controls."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors

#: Pseudo-count: extra sentences that each token is counted as beginning, with the average distribution of labels.
PSEUDO_COUNT = 1.0


def find_cases(traces: Sequence[Trace], labels: Sequence[str], spans: str, window: str) -> Int[Tensor, "case 5"]:
    """Every (trace, span, behavior) to score, with its half-open range of positions.

    An onset window is the token before the span, whose logits predict the span's first token; a span window goes
    on to the span's last token but one, whose logits predict its last.

    Raises:
        LensteerError: Nothing to score.
    """
    cases = []
    for t, trace in enumerate(traces):
        for s, span in enumerate(trace.spans):
            end = span.onset + 1 if window == "onset" else span.end - 1
            for b, label in enumerate(labels):
                if spans == "all" or (span.label == label) == (spans == "own"):
                    cases.append((t, s, b, span.onset, end))
    if not cases:
        n_spans = sum(len(trace.spans) for trace in traces)
        raise LensteerError(
            f"no onset to score: {len(traces)} traces with {n_spans} spans have none for "
            f"spans={spans!r} and behaviors {', '.join(map(repr, labels))}; pass annotated traces "
            "that contain them"
        )
    return torch.tensor(cases)


def limited(cases: Int[Tensor, "case 5"], max_spans: int | None, seed: int) -> Int[Tensor, "kept 5"]:
    """At most `max_spans` cases of each behavior, drawn at random, in their order."""
    if max_spans is None:
        return cases
    generator = torch.Generator().manual_seed(seed)
    kept = []
    for b in cases[:, 2].unique().tolist():
        own = (cases[:, 2] == b).nonzero()[:, 0]
        kept.append(own[torch.randperm(len(own), generator=generator)[:max_spans]])
    return cases[torch.cat(kept).sort().values]


def first_token_shares(
    traces: Sequence[Trace], labels: Sequence[str], d_vocab: int
) -> Float[Tensor, "behavior d_vocab"]:
    """P̂(b | first token v) = (n(v, b) + π_b) / (n(v) + 1), from the spans of annotated traces.

    n counts the spans that begin with token v, and π_b is the share of b among all of them: each token is counted with
    one more sentence (`PSEUDO_COUNT`) of the average kind. A token that begins no sentence gets the prior, π_b.

    Raises:
        LensteerError: No span of a behavior, or all spans are of one.
    """
    counts = torch.zeros(len(labels) + 1, d_vocab, dtype=torch.float64)  # the last row: of all spans
    for trace in traces:
        for span in trace.spans:
            first = trace.ids[span.start]
            counts[-1, first] += 1
            if span.label in labels:
                counts[labels.index(span.label), first] += 1
    base = counts.sum(1) / counts[-1].sum()
    for label, share in zip(labels, base[:-1].tolist(), strict=True):
        if not 0 < share < 1:
            raise LensteerError(
                f"{'no' if share == 0 else 'every'} span of these traces is of {label!r}: what distinguishes its first "
                "tokens cannot be estimated; pass more traces, or leave it out with behaviors=[…]"
            )
    return (counts[:-1] + PSEUDO_COUNT * base[:-1, None]) / (counts[-1] + PSEUDO_COUNT)


SPANS = ("own", "other", "all")
WINDOWS = ("onset", "span")
CONTROL_KINDS = ("covariance_matched", "shuffled")


@dataclass(frozen=True)
class Method:
    """The conventions of an estimator.

    Attributes:
        unit: Of its values.
        power: They grow with the coefficient to this power; None if each coefficient is run.
        spans: Which onsets it averages over by default.
        coefficient_unit: Of the vectors by default; one of `UNITS`.
        windows: The supported ones.
        linear: Whether a vector enters as a dot product with gradients, so that control vectors are nearly free.
        sampled: Whether it draws tokens.
    """

    unit: str
    power: int | None = None
    spans: str = "own"
    coefficient_unit: str = "difference"
    windows: tuple[str, ...] = WINDOWS
    linear: bool = False
    sampled: bool = False


METHODS = {
    "exact": Method("nats"),
    "fisher": Method("nats", power=2, linear=True, sampled=True),
    "fisher_jvp": Method("nats", power=2),
    "signed": Method("logits", power=1, spans="all", windows=("onset",), linear=True),
    "published": Method("arbitrary", power=1, spans="other", coefficient_unit="unit", windows=("onset",), linear=True),
}


@dataclass(frozen=True, eq=False)
class ControlVectors:
    """Control vectors of one kind; `raw · factor` is as long as the vectors that they are compared with.

    Attributes:
        raw: As they were fitted; one row if all behaviors share them.
        factor: What to multiply each by, for each behavior.
    """

    raw: Float[Tensor, "null row layer d_model"]
    factor: Float[Tensor, "null behavior layer"]

    def of(self, behavior: int) -> tuple[Float[Tensor, "null layer d_model"], Float[Tensor, "null layer"]]:
        """Those for one behavior."""
        b = behavior if self.raw.shape[1] > 1 else 0
        return self.raw[:, b], self.factor[:, behavior]


@dataclass(frozen=True, eq=False)
class Request:
    """The input of an estimator, except the traces.

    Attributes:
        method: Its name.
        window: Which positions of a span are edited.
        spans: Which spans.
        coefficient_unit: Of the vectors.
        coefficients: The requested coefficients.
        labels: The behaviors.
        layers: The layers.
        scaled: The vectors as coefficient 1 adds them.
        length: Their norm relative to the mean activation's.
        cases: Trace, span, behavior, first position and one past the last, for all that is averaged.
        wanted: Behaviors and layers to run; the exact estimator skips the others.
        controls: Control vectors, by kind.
        share: P(a sentence is of the behavior | its first token), for the signed estimator.
        samples: Tokens to draw at each position, for the sampled one.
        max_spans: The limit on the cases of a behavior, if there was one.
        seed: For all draws.
        memory: Bytes that one forward's rows may take, roughly.
    """

    method: str
    window: str
    spans: str
    coefficient_unit: str
    coefficients: tuple[float, ...]
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    scaled: Float[Tensor, "behavior layer d_model"]
    length: Float[Tensor, "behavior layer"]
    cases: Int[Tensor, "case 5"]
    wanted: Bool[Tensor, "behavior layer"]
    controls: Mapping[str, ControlVectors]
    share: Float[Tensor, "behavior d_vocab"] | None
    samples: int
    max_spans: int | None
    seed: int
    memory: int

    @property
    def run_at(self) -> tuple[float, ...]:
        """The coefficients that have to be run: only 1 if the others follow from it."""
        return self.coefficients if METHODS[self.method].power is None else (1.0,)


def scaled_vectors(
    vectors: BehaviorVectors, labels: Sequence[str], layers: Sequence[int], unit: str
) -> Float[Tensor, "behavior layer d_model"]:
    """The vectors as coefficient 1 adds them, in any unit. A zero vector stays zero."""
    raw, length = _lengths(vectors, labels, layers, unit)
    return raw if unit == "difference" else raw * _factor(raw, length)[..., None]


def relative_length(
    scaled: Float[Tensor, "behavior layer d_model"], vectors: BehaviorVectors, layers: Sequence[int]
) -> Float[Tensor, "behavior layer"]:
    """The norms of vectors relative to the mean activation at their layer."""
    columns = [vectors.layers.index(layer) for layer in layers]
    return scaled.norm(dim=-1).double() / vectors.mean_norm[columns].double().cpu()


def control_vectors(
    vectors: BehaviorVectors, labels: Sequence[str], layers: Sequence[int], unit: str, n: int
) -> dict[str, ControlVectors]:
    """The first `n` control vectors of each kind, at the same length as the vectors.

    Raises:
        LensteerError: There are fewer.
    """
    if n == 0:
        return {}
    if vectors.controls is None:
        raise LensteerError(f"n_controls={n}, but these vectors have no controls: fit them with n_controls={n}")
    there = len(vectors.controls.shuffled)
    if there < n:
        raise LensteerError(f"n_controls={n}, but these vectors have {there} controls: fit them with n_controls={n}")
    rows = [vectors.labels.index(label) for label in labels]
    columns = [vectors.layers.index(layer) for layer in layers]
    _, length = _lengths(vectors, labels, layers, unit)
    found = {}
    for kind in CONTROL_KINDS:
        draws: Tensor = getattr(vectors.controls, kind)[:n]
        draws = draws[:, rows] if draws.dim() == 4 else draws[:, None]
        draws = draws[:, :, columns].float()
        found[kind] = ControlVectors(draws, _factor(draws, length))
    return found


def _lengths(
    vectors: BehaviorVectors, labels: Sequence[str], layers: Sequence[int], unit: str
) -> tuple[Float[Tensor, "behavior layer d_model"], Float[Tensor, "behavior layer"]]:
    """The raw vectors, and the length of each in a unit."""
    columns = [vectors.layers.index(layer) for layer in layers]
    raw = vectors.raw[[vectors.labels.index(label) for label in labels]][:, columns].float().cpu()
    norm = raw.norm(dim=-1)
    if unit == "difference":
        return raw, norm
    length = vectors.mean_norm[columns].float().cpu() if unit == "mean_norm" else torch.ones(len(columns))
    return raw, length.expand_as(norm)


def _factor(raw: Float[Tensor, "*rows layer d_model"], length: Float[Tensor, "behavior layer"]) -> Tensor:
    """The factor that scales each vector to a length; 0 for a zero vector."""
    norm = raw.norm(dim=-1)
    return torch.where(norm > 0, length / norm, 0.0)

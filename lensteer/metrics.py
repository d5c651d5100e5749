"""Pure functions that measure logits, token ids and annotated spans."""

import zlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lensteer.behaviors import Span, axis_of
from lensteer.errors import LensteerError


def kl_divergence(
    logits_p: Float[Tensor, "*#rows d_vocab"], logits_q: Float[Tensor, "*#rows d_vocab"]
) -> Float[Tensor, "*rows"]:
    """KL(p‖q) = Σ_v p(v)·(log p(v) − log q(v)), in nats, for each pair of rows of logits.

    Reduced in fp64: for nearby distributions the terms cancel, and fp32 loses about a tenth of the value at a
    hundredth of the usual coefficient. Written out, because `torch.nn.functional.kl_div` takes its target as
    probabilities unless `log_target=True`, and silently returns something else.

    Args:
        logits_p: The reference. Leading axes broadcast against those of `logits_q`.
        logits_q: The distribution that is compared with it.

    Returns:
        fp64, never below 0; NaN where a logit is.
    """
    log_p = logits_p.double().log_softmax(-1)
    log_q = logits_q.double().log_softmax(-1)
    p = log_p.exp()
    # A token that p excludes (logit −inf) adds 0, not 0 · inf.
    terms = torch.where(p == 0, 0.0, p * (log_p - log_q))
    return terms.sum(-1).clamp_min(0.0)


def perplexity(
    logits: Float[Tensor, "batch pos d_vocab"],
    ids: Int[Tensor, "batch pos"],
    scored: Bool[Tensor, "batch pos"] | None = None,
) -> float:
    """Exponential of the mean negative log-likelihood of `ids`, in nats per token.

    Args:
        logits: Logits of a forward pass over `ids`: those at one position predict the next token.
        ids: The text.
        scored: Which tokens of `ids` count (leave out padding). The first of a row never counts: nothing
            predicts it.

    Raises:
        LensteerError: No token is left to score.
    """
    log_p = logits[:, :-1].double().log_softmax(-1).gather(-1, ids[:, 1:, None].long())[..., 0]
    chosen = log_p if scored is None else log_p[scored[:, 1:]]
    if chosen.numel() == 0:
        raise LensteerError(f"no token to score among ids of shape {tuple(ids.shape)}: pass at least two a row")
    return float(chosen.mean().neg().exp())


def repetition(ids: Sequence[int], n: int = 4) -> float:
    """Share of the n-grams of `ids` that occurred earlier in it: 0 for no repeat, near 1 for a loop.

    Args:
        ids: Token ids of one text.
        n: Length of the n-grams, in tokens.

    Returns:
        1 − distinct / all; 0 for a text shorter than `n`.

    Raises:
        LensteerError: `n` is below 1.
    """
    if n < 1:
        raise LensteerError(f"n-grams of length {n} do not exist: n must be at least 1")
    grams = [tuple(ids[i : i + n]) for i in range(len(ids) - n + 1)]
    return 1.0 - len(set(grams)) / len(grams) if grams else 0.0


def compression(text: str) -> float:
    """Length of a text after zlib compression as a share of its UTF-8 length: near 0 for a loop.

    Short texts compress little regardless of content: compare texts of similar length. 1 for an empty text.
    """
    raw = text.encode(errors="surrogatepass")
    return min(1.0, len(zlib.compress(raw, 9)) / len(raw)) if raw else 1.0


@dataclass(frozen=True)
class Fraction:
    """How much of a trace is one behavior: share of its sentences and share of its tokens, both in [0, 1]."""

    sentences: float
    tokens: float


def behavior_fractions(spans: Iterable[Span], n_sentences: int, n_tokens: int) -> dict[str, Fraction]:
    """Each behavior's share of the sentences and of the tokens.

    Args:
        spans: The annotated sentences of one or more traces.
        n_sentences: All sentences of these traces; those that could not be read stay in the denominator.
        n_tokens: All tokens of these traces that could belong to a span.

    Returns:
        A `Fraction` for each label of the default scheme, or, if there are others, for each that occurs; 0 for an empty
        denominator.

    Raises:
        LensteerError: There are more spans than sentences, or more tokens in spans than tokens.
    """
    spans = list(spans)
    covered = sum(span.end - span.start for span in spans)
    if len(spans) > n_sentences or covered > n_tokens:
        raise LensteerError(
            f"{len(spans)} spans with {covered} tokens do not fit {n_sentences} sentences with {n_tokens} "
            "tokens: count all sentences and tokens, annotated or not"
        )

    def fraction(label: str) -> Fraction:
        own = [span for span in spans if span.label == label]
        n_own = sum(span.end - span.start for span in own)
        return Fraction(len(own) / n_sentences if n_sentences else 0.0, n_own / n_tokens if n_tokens else 0.0)

    return {label: fraction(label) for label in axis_of(span.label for span in spans)}

"""Which earlier sentence a sentence looks at, head by head, in one trace; and what a sentence receives."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer import models
from lensteer.attention.streaming import stream_attention
from lensteer.errors import LensteerError
from lensteer.results import Result
from lensteer.steering import Plan
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: The nearest sentences do not count for what a sentence receives ("Thought Anchors", arXiv 2506.19143).
NEAREST = 4


@dataclass(frozen=True, eq=False, repr=False)
class SentenceAttention(Result):
    """Attention between the sentences of one trace. Rows of `values` and `elsewhere` together add to one.

    (In models with a learned attention sink, such as gpt-oss, they lack that sink's share.)

    Attributes:
        trace: its id.
        labels: behavior of each sentence.
        texts: what each says.
        lengths: tokens of each.
        layers: of the layer axis.
        values: mean over the tokens of sentence i (first span axis) of the attention mass on the tokens of sentence
            j (second); zero where j comes after i.
        elsewhere: the same on what is in no sentence; see `ELSEWHERE`.
    """

    trace: str
    labels: tuple[str, ...]
    texts: tuple[str, ...]
    lengths: tuple[int, ...]
    layers: tuple[int, ...]
    values: Float[Tensor, "layer head span span"]
    elsewhere: Float[Tensor, "layer head span elsewhere"]

    def at(self, layer: int, head: int) -> Float[Tensor, "span span"]:
        """One head's attention.

        Raises:
            LensteerError: no such layer or head here.
        """
        if layer not in self.layers or not 0 <= head < self.values.shape[1]:
            raise LensteerError(
                f"no head {head} of layer {layer}: these are layers {list(self.layers)} with heads 0 to "
                f"{self.values.shape[1] - 1}"
            )
        return self.values[self.layers.index(layer), head]

    def received(self, nearest: int = NEAREST) -> Float[Tensor, "layer head span"]:
        """What each sentence receives from the later ones; see `received`. NaN for the last `nearest` sentences."""
        shape = (*self.values.shape[:2], len(self.labels))
        found = received(per_token(self.values, torch.tensor(self.lengths)), nearest)
        padded = self.values.new_full(shape, torch.nan)
        padded[..., : found.shape[-1]] = found
        return padded

    def to_dataframe(self) -> Any:
        """One row per layer, head and pair of sentences, `key` at or before `query`."""
        import pandas as pd

        query, key = torch.tril_indices(len(self.labels), len(self.labels))
        n_layers, n_heads = self.values.shape[:2]
        pairs = len(query)
        return pd.DataFrame(
            {
                "layer": torch.tensor(self.layers).repeat_interleave(n_heads * pairs).numpy(),
                "head": torch.arange(n_heads).repeat_interleave(pairs).repeat(n_layers).numpy(),
                "query": query.repeat(n_layers * n_heads).numpy(),
                "key": key.repeat(n_layers * n_heads).numpy(),
                "query_label": [self.labels[i] for i in query.tolist()] * (n_layers * n_heads),
                "key_label": [self.labels[j] for j in key.tolist()] * (n_layers * n_heads),
                "mass": self.values[:, :, query, key].flatten().numpy(),
            }
        )


def per_token(
    values: Float[Tensor, "*batch span span"], lengths: Int[Tensor, " span"]
) -> Float[Tensor, "*batch span span"]:
    """Attention mass per key token, which is the mean over pairs of tokens: a long sentence gets no more for that."""
    return values / lengths.to(values)


def received(values: Float[Tensor, "*batch span span"], nearest: int = NEAREST) -> Float[Tensor, "*batch receiver"]:
    """What each sentence receives: the mean of its column over the sentences at least `nearest` later.

    r_j = mean of values_ij over i ≥ j + nearest. "Thought Anchors" (arXiv 2506.19143) calls it the vertical score.

    Returns:
        For all sentences but the last `nearest`, which nothing counts for; maybe none.

    Raises:
        LensteerError: `nearest` is not positive (a sentence's attention to itself is nothing received).
    """
    if nearest < 1:
        raise LensteerError(f"nearest={nearest}: give a positive number of sentences, such as {NEAREST}")
    n = values.shape[-1]
    if n <= nearest:
        return values.new_zeros(*values.shape[:-2], 0)
    later = torch.ones(n, n, device=values.device).tril(-nearest)[:, : n - nearest]
    return (values[..., : n - nearest] * later).sum(-2) / later.sum(0)


def sentence_attention(
    model: TransformerBridge, trace: Trace, *, layers: Sequence[int] | None = None, plan: Plan | None = None
) -> SentenceAttention:
    """Attention between the sentences of one annotated trace, for every layer and head.

    Args:
        model: whose attention is read.
        trace: annotated.
        layers: all by default.
        plan: read under this steering, on the same tokens. Plans that are on apply, too.

    Raises:
        LensteerError: the trace has no spans, or what `stream_attention` raises.
    """
    if not trace.spans:
        raise LensteerError(f"trace {trace.id!r} has no spans: annotate it first")
    found = stream_attention(model, [trace], lambda _, rows: rows, layers=layers, batch_size=1, plan=plan)
    ((_, rows),) = found
    n = len(trace.spans)
    return SentenceAttention(
        trace=trace.id,
        labels=tuple(span.label for span in trace.spans),
        texts=tuple(trace.response[span.char_start : span.char_end] for span in trace.spans),
        lengths=tuple(span.end - span.start for span in trace.spans),
        layers=tuple(range(models.n_layers(model))) if layers is None else tuple(layers),
        values=rows[..., :n],
        elsewhere=rows[..., n:],
    )

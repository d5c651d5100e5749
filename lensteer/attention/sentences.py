"""Attention between the sentences of annotated traces, reduced layer by layer during the forward pass.

Only one layer's pattern of one batch exists at a time. `SentenceAttention` holds one trace: which earlier sentence a
sentence attends to, head by head, and how much attention a sentence receives.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer import models
from lensteer.arguments import checked
from lensteer.errors import LensteerError
from lensteer.forward import Forward, right_padded
from lensteer.results import Result
from lensteer.steering import Plan
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Targets of attention outside all sentences: the first token; the chat template's other tokens; the rest of the
#: prompt; and text after the prompt in no sentence, such as one that the annotator could not parse.
ELSEWHERE = ("sink", "template", "prompt", "rest")
_MARK = "\N{ASTERISM}"  # placeholder for the message when a template is split

Reduce = Callable[[Trace, Float[Tensor, "head span column"]], Tensor]
"""From one trace's rows at one layer to what is kept of them. Columns are the sentences, then `ELSEWHERE`."""


def stream_attention(
    model: TransformerBridge,
    traces: Sequence[Trace],
    reduce: Reduce,
    *,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    plan: Plan | None = None,
) -> Iterator[tuple[int, Float[Tensor, "layer ..."]]]:
    """Run the model over annotated traces and apply `reduce` to each layer's attention.

    Traces of similar length share a batch, padded on the right, so they come out of order. Traces without spans are
    left out. Plans use each trace's own prompt length, not that passed to `plan.on`.

    Args:
        model: whose attention is read.
        traces: annotated.
        reduce: from one trace's `[head, span, span + elsewhere]` rows at one layer to a tensor of any shape.
        layers: to read; all by default.
        batch_size: traces per forward.
        plan: steering that is on during the forward passes.

    Yields:
        The trace's number, and what was kept, stacked over layers, on the CPU.

    Raises:
        LensteerError: an unknown layer, no layer, a batch size under 1, or attention that is not finite (names
            the trace and the layer).
    """
    chosen = read_layers(model, layers)
    if not chosen or batch_size < 1:
        raise LensteerError(f"layers={layers!r}, batch_size={batch_size}: give at least one of each")
    order = sorted((i for i, trace in enumerate(traces) if trace.spans), key=lambda i: len(traces[i].ids))
    for first in range(0, len(order), batch_size):
        numbers = order[first : first + batch_size]
        with nullcontext() if plan is None else plan.on(model):  # on during the forward only, not in the caller
            kept = _reduced(model, [traces[i] for i in numbers], reduce, chosen)
        yield from zip(numbers, kept, strict=True)


def read_layers(model: TransformerBridge, layers: Sequence[int] | None = None) -> tuple[int, ...]:
    """The layers to read: as asked for, or all that have an attention pattern (linear attention has none).

    Raises:
        LensteerError: one that has none, or no such layer.
    """
    having = [layer for layer in range(models.n_layers(model)) if pattern_hook(layer) in model.hook_dict]
    for layer in layers or ():
        if models.check_layer(model, layer) not in having:
            raise LensteerError(
                f"layer {layer} of {models.fingerprint(model).name!r} has no attention pattern, as linear "
                f"attention has none: read some of the layers {having}"
            )
    return tuple(having if layers is None else layers)


def pattern_hook(layer: int) -> str:
    """The hook point of the attention weights, `[batch, head, query, key]`."""
    return f"blocks.{layer}.attn.hook_pattern"


def forward_padded(
    model: TransformerBridge, traces: Sequence[Trace], *, stop_after: int | None = None
) -> Float[Tensor, "batch pos width"]:
    """Run whole traces, padded on the right. Plans that are on use each trace's own prompt length.

    Args:
        model: the bridge.
        traces: annotated or not.
        stop_after: if only hooks matter: the last layer to run; logits are then of one position at most.

    Returns:
        Logits, or those that were computed. Values at padding are meaningless.
    """
    text = right_padded(model, [trace.ids for trace in traces], [trace.prompt_length for trace in traces])
    forward = Forward(model, text, fast=False)  # heads have hook points on the bridge only
    with torch.no_grad():
        return forward.whole(keep=0 if stop_after is None else 1, stop=stop_after)


def _reduced(
    model: TransformerBridge, traces: list[Trace], reduce: Reduce, layers: tuple[int, ...]
) -> list[Float[Tensor, "layer ..."]]:
    groups = [_groups(model, trace) for trace in traces]
    kept: dict[int, list[Tensor]] = {}

    def read(pattern: Float[Tensor, "batch head pos pos"], hook: Any, layer: int) -> None:
        kept[layer] = []
        for row, (trace, (queries, keys)) in enumerate(zip(traces, groups, strict=True)):
            n = len(trace.ids)
            own = pattern[row, :, :n, :n].float()
            rows = (queries.to(own) @ own) @ keys.to(own)
            if not rows.isfinite().all():
                raise LensteerError(
                    f"attention of layer {layer} is not finite in trace {trace.id!r}: load the model with a dtype of "
                    "wider range (float32 or bfloat16), or leave the trace out"
                )
            kept[layer].append(reduce(trace, rows).cpu())

    with model.hooks(fwd_hooks=[(pattern_hook(layer), partial(read, layer=layer)) for layer in set(layers)]):
        forward_padded(model, traces, stop_after=max(layers))
    return [torch.stack([kept[layer][row] for layer in layers]) for row in range(len(traces))]


def _groups(model: TransformerBridge, trace: Trace) -> tuple[Float[Tensor, "span pos"], Float[Tensor, "pos column"]]:
    """Queries and keys: weights that average over each sentence's tokens, and the column of each token."""
    n_tokens, n = len(trace.ids), len(trace.spans)
    sink, template, prompt, rest = range(n, n + len(ELSEWHERE))
    columns = torch.full((n_tokens,), rest)
    columns[: trace.prompt_length] = torch.where(_in_template(model, trace), template, prompt)
    queries = torch.zeros(n, n_tokens)
    for i, span in enumerate(trace.spans):
        queries[i, span.start : span.end] = 1 / (span.end - span.start)
        columns[span.start : span.end] = i
    columns[0] = sink
    return queries, torch.nn.functional.one_hot(columns, n + len(ELSEWHERE)).float()


def _in_template(model: TransformerBridge, trace: Trace) -> Tensor:
    """Which prompt tokens the chat template (or a prefill) wrote: those before the message and after it."""
    text, starts = models.decode_offsets(model.tokenizer, trace.prompt_ids)
    begin, end = 0, 0
    for thinking in (True, False):
        head, _, tail = models.chat_text(model, _MARK, thinking=thinking).partition(_MARK)
        tail += trace.prefill
        begin = max(begin, len(head) if text.startswith(head) else 0)
        if text.endswith(tail):
            end = len(tail)
            break
    if not begin and trace.task.prompt:  # a system prompt is before the message
        begin = max(0, text.rfind(trace.task.prompt, 0, len(text) - end))
    ends = torch.tensor([*starts[1:], len(text)])
    return (ends <= begin) | (torch.tensor(starts) >= len(text) - end)


#: The nearest sentences do not count for what a sentence receives ("Thought Anchors", arXiv 2506.19143).
NEAREST = 4


@dataclass(frozen=True, eq=False, repr=False)
class SentenceAttention(Result):
    """Attention between the sentences of one trace. Rows of `values` and `elsewhere` together add to one.

    (In models with a learned attention sink, such as gpt-oss, they lack that sink's share.)

    Attributes:
        trace: its id.
        labels: behavior of each sentence.
        texts: of each sentence.
        lengths: tokens of each.
        layers: of the layer axis.
        values: mean over the tokens of sentence i (first span axis) of the attention mass on the tokens of sentence
            j (second); zero where j comes after i.
        elsewhere: the same on tokens in no sentence; see `ELSEWHERE`.
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
    """Attention mass per key token, which is the mean over pairs of tokens: a long sentence has no advantage."""
    return values / lengths.to(values)


def received(values: Float[Tensor, "*batch span span"], nearest: int = NEAREST) -> Float[Tensor, "*batch receiver"]:
    """What each sentence receives: the mean of its column over the sentences at least `nearest` later.

    r_j = mean of values_ij over i ≥ j + nearest. "Thought Anchors" (arXiv 2506.19143) calls it the vertical score.

    Returns:
        For all sentences but the last `nearest`, which receive nothing; possibly empty.

    Raises:
        LensteerError: `nearest` is not positive (a sentence's attention to itself does not count).
    """
    if nearest < 1:
        raise LensteerError(f"nearest={nearest}: give a positive number of sentences, such as {NEAREST}")
    n = values.shape[-1]
    if n <= nearest:
        return values.new_zeros(*values.shape[:-2], 0)
    later = torch.ones(n, n, device=values.device).tril(-nearest)[:, : n - nearest]
    return (values[..., : n - nearest] * later).sum(-2) / later.sum(0)


@checked()
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
        layers=read_layers(model, layers),
        values=rows[..., :n],
        elsewhere=rows[..., n:],
    )

"""Residual-stream activations, streamed: a trace is reduced to a mean per span while its batch is in flight.

One layer of one batch is held at a time, and no logits are computed. A batch has little padding, which costs as much as
text; on a CPU a few hundred tokens are as fast per token as more.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer import models
from lensteer.behaviors import Span
from lensteer.errors import LensteerError
from lensteer.files import digest
from lensteer.forward import Forward, read_there, right_padded
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: The published code averages at most this many tokens from the start of a span.
PUBLISHED_TOKENS = 10
#: Tokens per forward, padding included.
MAX_TOKENS = 4096
#: On a CPU, numbers in the residual stream of a batch, where more exceed its cache: they are slower, not faster.
CPU_NUMBERS = 2**18
#: The largest share of a row that is padding, and how many tokens of it are less than a forward of its own costs.
MAX_PADDING, FEW_TOKENS = 0.1, 16


@dataclass(frozen=True)
class Window:
    """Which positions represent a span: their mean activation is the span's.

    Attributes:
        kind: "onset", "span" or "published".
        before: number of positions of an onset window before the onset.
        after: number of its positions behind the onset.
    """

    kind: str
    before: int = 0
    after: int = 0

    @classmethod
    def parse(cls, spec: str | Window) -> Window:
        """Read a window's name.

        Args:
            spec: "onset", the token before the span, whose logits predict the span's first token;
                "onset±k" or "onset+-k", it and its `k` neighbors on either side;
                "onset-k" or "onset+k", it and the `k` positions before or behind it;
                "span", the span's tokens and the one before it (arXiv 2506.18167, text);
                "published", positions `start - 1` to `min(end - 1, start + 10)`, half-open (its code).

        Raises:
            LensteerError: any other name.
        """
        if isinstance(spec, Window):
            return spec
        match = re.fullmatch(r"onset(?:(±|\+-|\+/-|\+|-)(\d+))?|span|published", spec)
        if not match:
            raise LensteerError(
                f"unknown window {spec!r}: choose 'onset', 'onset±k' such as 'onset±3', 'onset-k', 'onset+k', 'span' "
                "or 'published'"
            )
        sides, k = match[1] or "", int(match[2] or 0)
        return cls("onset" if spec.startswith("onset") else spec, 0 if sides == "+" else k, 0 if sides == "-" else k)

    def __str__(self) -> str:
        if self.before == self.after:
            return f"{self.kind}±{self.before}" if self.before else self.kind
        return f"{self.kind}-{self.before}" if self.before else f"{self.kind}+{self.after}"

    def bounds(self, span: Span, n_tokens: int) -> tuple[int, int]:
        """The window as a half-open range of absolute positions.

        It may extend into the prompt (the first span's onset is the prompt's last token), but never includes position
        0, which is the BOS or another attention sink with massive activations. It ends with the trace.

        Raises:
            LensteerError: the window is empty because the span's onset is position 0.
        """
        onset = span.onset
        if self.kind == "onset":
            begin, end = onset - self.before, onset + self.after + 1
        elif self.kind == "span":
            begin, end = onset, span.end
        else:
            begin, end = onset, min(span.end - 1, span.start + PUBLISHED_TOKENS)
        begin, end = max(begin, 1), min(end, n_tokens)
        if begin >= end:
            raise LensteerError(
                f"window {str(self)!r} of the span at tokens [{span.start}, {span.end}) holds nothing but "
                "position 0: a span needs a prompt of at least two tokens before it"
            )
        return begin, end


@dataclass(frozen=True, eq=False)
class TraceFeatures:
    """What is kept of one trace's activations, on the CPU, in single precision.

    "All tokens" are the thinking tokens: from the start of the first span to the end of the last.

    Attributes:
        index: of the trace in the input.
        key: identifies the trace regardless of its index, and seeds its random draws.
        labels: of the spans.
        layers: of the layer axis.
        spans: mean activation of each span under each window.
        lengths: number of tokens in each window.
        tokens: mean activation of all tokens.
        n_tokens: number of all tokens.
    """

    index: int
    key: str
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    spans: Float[Tensor, "window span layer d_model"]
    lengths: Int[Tensor, "window span"]
    tokens: Float[Tensor, "layer d_model"]
    n_tokens: int


def stream_features(
    model: TransformerBridge,
    traces: Sequence[Trace],
    *,
    windows: Sequence[str | Window] = ("onset",),
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    batch_size: int = 16,
) -> Iterator[TraceFeatures]:
    """Run the model over annotated traces and yield each one's features, batch by batch.

    Traces of similar length share a batch, padded on the right, so they come out of order. Traces without
    spans are left out.

    Args:
        model: whose residual stream is read.
        traces: annotated.
        windows: which positions represent a span; see `Window.parse`.
        layers: to read; all by default.
        site: where in each block; see `models.SITES`.
        batch_size: traces per forward, fewer where they are long or differ in length (see `batches`).

    Raises:
        LensteerError: an unknown window, layer or site, or an activation that is not finite (names the trace and the
            layer).
    """
    wanted = [Window.parse(window) for window in windows]
    if not wanted:
        raise LensteerError(f"windows={windows!r}: give at least one")
    kept = [i for i, trace in enumerate(traces) if trace.spans]
    ranges = [_ranges(traces[i], wanted) for i in kept]
    chosen = _checked_layers(model, layers, batch_size)
    for number, rows in stream_means(
        model,
        [traces[i].ids for i in kept],
        [traces[i].prompt_length for i in kept],
        ranges,
        layers=chosen,
        site=site,
        batch_size=batch_size,
        name=lambda number: f"trace {kept[number]} (task {traces[kept[number]].task.id!r})",
    ):
        trace = traces[kept[number]]
        lengths = torch.tensor([end - begin for begin, end in ranges[number]])
        yield TraceFeatures(
            index=kept[number],
            key=trace_key(trace),
            labels=tuple(span.label for span in trace.spans),
            layers=chosen,
            spans=rows[:-1].unflatten(0, (len(wanted), len(trace.spans))),
            lengths=lengths[:-1].view(len(wanted), len(trace.spans)),
            tokens=rows[-1],
            n_tokens=int(lengths[-1]),
        )


def stream_means(
    model: TransformerBridge,
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    ranges: Sequence[Sequence[tuple[int, int]]],
    *,
    layers: Sequence[int] | None = None,
    site: str = "resid_post",
    batch_size: int = 16,
    name: Callable[[int], str] = "text {}".format,
) -> Iterator[tuple[int, Float[Tensor, "row layer d_model"]]]:
    """Run the model once over each text and yield its mean activations over ranges of positions, batch by batch.

    Texts of similar length share a batch, padded on the right, so they come out of order. Results are views of their
    batch's means: clone what you keep.

    Args:
        model: whose residual stream is read.
        texts: token ids, special tokens and all.
        prompt_lengths: number of prompt tokens of each text, for the scopes of plans that are on.
        ranges: half-open ranges of each text's positions; each is a row of the text's result.
        layers: to read; all by default.
        site: where in each block; see `models.SITES`.
        batch_size: texts per forward, fewer where they are long or differ in length (see `batches`).
        name: from a text's number to its name in error messages.

    Yields:
        The number of a text, and a mean per range, on the CPU, in single precision.

    Raises:
        LensteerError: an unknown layer or site, or an activation that is not finite (names the text and the layer).
    """
    chosen = _checked_layers(model, layers, batch_size)
    for numbers in batches([len(text) for text in texts], batch_size, batch_tokens(model)):
        batch = [texts[i] for i in numbers]
        means = _averaged(
            model, batch, [prompt_lengths[i] for i in numbers], [ranges[i] for i in numbers], chosen, site
        )
        for i, rows in zip(numbers, means, strict=True):
            finite = rows.isfinite().all(dim=2).all(dim=0)
            if not finite.all():
                raise LensteerError(
                    f"activations of layer {chosen[int(finite.int().argmin())]} are not finite in {name(i)}: load the "
                    "model with a dtype of wider range (float32 or bfloat16), or leave it out"
                )
            yield i, rows


def batch_tokens(model: TransformerBridge) -> int:
    """Tokens per forward, padding included, up to which larger batches are faster."""
    if models.device(model).type != "cpu":
        return MAX_TOKENS
    return min(MAX_TOKENS, max(1, CPU_NUMBERS // models.d_model(model)))


def batches(lengths: Sequence[int], batch_size: int, tokens: int) -> Iterator[list[int]]:
    """Numbers of the texts of each batch, the longest first.

    Args:
        lengths: of the texts.
        batch_size: texts per batch.
        tokens: per batch, padding included; a longer text is a batch of its own.

    Yields:
        Texts whose padding is at most `MAX_PADDING` of the longest, or `FEW_TOKENS`.
    """
    batch: list[int] = []
    for i in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        if batch:
            width = lengths[batch[0]]
            padded = width - lengths[i] > max(MAX_PADDING * width, FEW_TOKENS)
            if padded or len(batch) == batch_size or (len(batch) + 1) * width > tokens:
                yield batch
                batch = []
        batch.append(i)
    if batch:
        yield batch


def _checked_layers(model: TransformerBridge, layers: Sequence[int] | None, batch_size: int) -> tuple[int, ...]:
    """The requested layers, if the model has them all."""
    chosen = tuple(range(models.n_layers(model))) if layers is None else tuple(layers)
    if not chosen or batch_size < 1:
        raise LensteerError(f"layers={layers!r}, batch_size={batch_size}: give at least one of each")
    for layer in chosen:
        models.check_layer(model, layer)
    return chosen


def trace_key(trace: Trace) -> str:
    """A name of the trace that does not depend on its index: its task, and a hash of its tokens."""
    return f"{trace.task.id}|{digest(repr(list(trace.ids)).encode())}"


def _ranges(trace: Trace, windows: list[Window]) -> list[tuple[int, int]]:
    """Each window's range for each span, then that of all tokens."""
    n_tokens = len(trace.ids)
    begin, end = min(span.start for span in trace.spans), max(span.end for span in trace.spans)
    return [*(window.bounds(span, n_tokens) for window in windows for span in trace.spans), (begin, end)]


def _averaged(
    model: TransformerBridge,
    texts: Sequence[Sequence[int]],
    prompt_lengths: Sequence[int],
    ranges: Sequence[Sequence[tuple[int, int]]],
    layers: tuple[int, ...],
    site: str,
) -> Sequence[Float[Tensor, "row layer d_model"]]:
    """Means over positions of each layer's residual stream, computed in its hook, so that no activations accumulate."""
    text = right_padded(model, texts, prompt_lengths)
    averager = _bag_means if text.ids.device.type == "cpu" else _dense_means
    average = averager(ranges, text.ids.shape[1])
    means: dict[int, Tensor] = {}

    def read(layer: int, resid: Float[Tensor, "batch pos d_model"]) -> None:
        means[layer] = average(resid).cpu()

    with torch.no_grad():
        if site == "resid_post":
            forward = Forward(model, text)
            with forward.hooked(read, layers):
                forward.whole(stop=max(layers))
        else:
            read_there(model, text, site, layers, read)
    return torch.stack([means[layer] for layer in layers], dim=1).split([len(each) for each in ranges])


_Average = Callable[[Float[Tensor, "batch pos d_model"]], Float[Tensor, "range d_model"]]
"""Means over the ranges of all rows, one row's after the other's."""


def _bag_means(ranges: Sequence[Sequence[tuple[int, int]]], width: int) -> _Average:
    """Reads the positions of each range, and no others. For a CPU: a GPU reads a long range one position at a time."""
    bounds = torch.tensor([(row * width + b, row * width + e) for row, each in enumerate(ranges) for b, e in each])
    lengths = bounds[:, 1] - bounds[:, 0]
    offsets = lengths.cumsum(0) - lengths
    positions = torch.arange(int(lengths.sum())) + (bounds[:, 0] - offsets).repeat_interleave(lengths)

    def average(resid: Tensor) -> Tensor:
        return torch.nn.functional.embedding_bag(positions, resid.flatten(0, 1).float(), offsets, mode="mean")

    return average


def _dense_means(ranges: Sequence[Sequence[tuple[int, int]]], width: int) -> _Average:
    """One product of matrices, mostly of zeros: one kernel for a GPU."""
    weights = torch.zeros(len(ranges), max(map(len, ranges)), width)
    used = torch.zeros(weights.shape[:2], dtype=torch.bool)
    for row, each in enumerate(ranges):
        used[row, : len(each)] = True
        for r, (begin, end) in enumerate(each):
            weights[row, r, begin:end] = 1 / (end - begin)

    def average(resid: Tensor) -> Tensor:
        return torch.bmm(weights.to(resid.device), resid.float())[used.to(resid.device)]

    return average

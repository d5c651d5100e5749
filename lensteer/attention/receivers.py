"""Receiver heads: heads in which later sentences all attend to the same few, and which sentences those are.

After "Thought Anchors" (arXiv 2506.19143). It shows where attention goes, not its effect.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.arguments import checked
from lensteer.attention.sentences import NEAREST, per_token, read_layers, received, stream_attention
from lensteer.errors import LensteerError
from lensteer.results import Result
from lensteer.statistics import averaged
from lensteer.steering import Plan
from lensteer.traces import Trace, label_axis

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: With fewer values a kurtosis depends almost only on their number.
FEWEST = 4


@dataclass(frozen=True, eq=False, repr=False)
class ReceiverHeads(Result):
    """The kurtosis of the attention that sentences receive from later ones, per head.

    A sentence receives r_j, the mean over sentences at least `nearest` later of the mean attention over pairs of
    tokens. A head's score in a trace is the excess kurtosis of r over sentences, m₄ / m₂² - 3 with plain moments; the
    score is its mean over traces. That is the paper's measure, with these differences: sentences are the annotated ones
    (text between or after them may belong to none), the prompt is not a sentence, traces with fewer than `FEWEST`
    receiving sentences are left out, and there are intervals. The largest possible kurtosis grows with the number of
    sentences: compare heads on the same traces, not one set of traces with another.

    With a plan, `kurtosis` and `relative` are changes: steered less unsteered on the same tokens.

    Attributes:
        labels: of the behavior axis.
        layers: of the layer axis.
        kurtosis: mean over traces; NaN for a head that gives all sentences of all traces the same.
        low: lower end of the 95 % interval, from a bootstrap over traces; NaN for fewer than two.
        high: upper end.
        relative: per trace, Σ over sentences of a behavior of r_j / (mean of r over the trace).
        counts: per trace, receiving sentences of each behavior.
        n_left_out: traces with too few sentences.
        nearest: later sentences nearer than this do not count.
        change: whether the figures are changes under a plan.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    kurtosis: Float[Tensor, "layer head"]
    low: Float[Tensor, "layer head"]
    high: Float[Tensor, "layer head"]
    relative: Float[Tensor, "trace layer head behavior"]
    counts: Float[Tensor, "trace behavior"]
    n_left_out: int
    nearest: int
    change: bool = False

    @property
    def n_traces(self) -> int:
        """Traces that were long enough: the units of the bootstrap."""
        return len(self.counts)

    def top(self, n: int = 5) -> list[tuple[int, int]]:
        """The heads (layer, head) of largest kurtosis, or of largest absolute change."""
        score = self.kurtosis.abs() if self.change else self.kurtosis
        order = score.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True)[:n]
        return [(self.layers[i // score.shape[1]], i % score.shape[1]) for i in order.tolist()]

    def broadcasting(self, heads: Sequence[tuple[int, int]] | None = None, *, seed: int = 0) -> Any:
        """Which behavior's sentences are broadcast: the attention they receive from some heads, as a table.

        Per behavior: mean of r_j / (mean of r over the trace), averaged over the heads; 1 is what the average
        sentence of the trace receives. Not corrected for place: early and late sentences have different later ones
        (`behavior_attention` corrects for that).

        Args:
            heads: (layer, head); the five top ones by default.
            seed: for the bootstrap over traces.

        Returns:
            A data frame with behavior, received, low, high and n (sentences).

        Raises:
            LensteerError: no heads, or one that was not read.
        """
        import pandas as pd

        chosen = self.top() if heads is None else list(heads)
        for layer, head in chosen:
            if layer not in self.layers or not 0 <= head < self.kurtosis.shape[1]:
                raise LensteerError(
                    f"no head {head} of layer {layer}: these are layers {list(self.layers)} with heads 0 to "
                    f"{self.kurtosis.shape[1] - 1}"
                )
        if not chosen:
            raise LensteerError("heads=[]: give at least one (layer, head), or None for the top ones")
        values = torch.stack([self.relative[:, self.layers.index(layer), head] for layer, head in chosen]).mean(0)
        mean, low, high = averaged(values, self.counts, seed=seed).numpy()
        n = self.counts.sum(0).long().numpy()
        return pd.DataFrame({"behavior": self.labels, "received": mean, "low": low, "high": high, "n": n})

    def to_dataframe(self) -> Any:
        """One row per layer and head."""
        import pandas as pd

        index = pd.MultiIndex.from_product([self.layers, range(self.kurtosis.shape[1])], names=["layer", "head"])
        columns = {name: getattr(self, name).flatten().numpy() for name in ("kurtosis", "low", "high")}
        return pd.DataFrame(columns, index=index).reset_index()


@checked()
def receiver_heads(
    model: TransformerBridge,
    traces: Sequence[Trace],
    *,
    plan: Plan | None = None,
    layers: Sequence[int] | None = None,
    nearest: int = NEAREST,
    batch_size: int = 8,
    seed: int = 0,
) -> ReceiverHeads:
    """Score every head by the kurtosis of the attention that sentences receive.

    Args:
        model: whose attention is read.
        traces: annotated.
        plan: if given, all values are changes under this steering, on the same tokens.
        layers: all by default.
        nearest: later sentences nearer than this do not count.
        batch_size: traces per forward.
        seed: for the bootstrap.

    Raises:
        LensteerError: no trace is long enough, or what `stream_attention` and `received` raise.
    """
    usable = [trace for trace in traces if len(trace.spans) >= nearest + FEWEST]
    if not usable:
        longest = max((len(trace.spans) for trace in traces), default=0)
        raise LensteerError(
            f"the longest of {len(traces)} traces has {longest} sentences: receiver heads need at least "
            f"{nearest + FEWEST} in one, of which the last {nearest} count as receiving nothing"
        )

    axis = label_axis(usable)

    def reduce(trace: Trace, rows: Float[Tensor, "head span column"]) -> Float[Tensor, "head figure"]:
        return _figures(trace, rows, nearest, axis)

    def collect(plan: Plan | None) -> Float[Tensor, "trace layer head figure"]:
        found = dict(stream_attention(model, usable, reduce, layers=layers, batch_size=batch_size, plan=plan))
        return torch.stack([found[i] for i in range(len(usable))])

    figures = collect(None)
    if plan is not None:
        figures = collect(plan) - figures
    defined = figures[..., 0].isfinite()
    kurtosis, low, high = averaged(figures[..., 0].nan_to_num(0.0), defined.double(), seed=seed)
    labels = [[axis.index(span.label) for span in trace.spans[: len(trace.spans) - nearest]] for trace in usable]
    return ReceiverHeads(
        labels=axis,
        layers=read_layers(model, layers),
        kurtosis=kurtosis,
        low=low,
        high=high,
        relative=figures[..., 1:],
        counts=torch.stack([torch.bincount(torch.tensor(own), minlength=len(axis)) for own in labels]).double(),
        n_left_out=len(traces) - len(usable),
        nearest=nearest,
        change=plan is not None,
    )


def excess_kurtosis(values: Float[Tensor, "*batch receiver"]) -> Float[Tensor, "*batch"]:
    """m₄ / m₂² - 3 along the last axis, with plain moments; NaN if all values are the same."""
    centered = values.double() - values.double().mean(-1, keepdim=True)
    m2, m4 = centered.square().mean(-1), centered.pow(4).mean(-1)
    flat = values.amax(-1) == values.amin(-1)
    return (m4 / m2.square() - 3).where(~flat, torch.nan)


def _figures(
    trace: Trace, rows: Float[Tensor, "head span column"], nearest: int, axis: Sequence[str]
) -> Float[Tensor, "head figure"]:
    """For one layer: the kurtosis, then what sentences of each behavior receive relative to the mean."""
    n = len(trace.spans)
    lengths = torch.tensor([span.end - span.start for span in trace.spans], device=rows.device)
    got = received(per_token(rows[..., :n], lengths), nearest).double()
    mean = got.mean(-1, keepdim=True)
    relative = (got / mean).where(mean > 0, 1.0)  # a head without attention to any has no preference
    labels = torch.tensor([axis.index(span.label) for span in trace.spans[: n - nearest]], device=rows.device)
    sums = got.new_zeros(got.shape[0], len(axis)).index_add_(1, labels, relative)
    return torch.cat([excess_kurtosis(got)[:, None], sums], dim=1)

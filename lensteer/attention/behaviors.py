"""Which behavior attends to which: attention between sentences of two labels, relative to their places alone.

Only sums over pairs of sentences are kept for each trace.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.arguments import checked
from lensteer.attention.sentences import per_token, read_layers, stream_attention
from lensteer.behaviors import check_behavior
from lensteer.errors import LensteerError
from lensteer.results import Result
from lensteer.statistics import averaged
from lensteer.steering import Plan
from lensteer.traces import Trace, label_axis

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Lower edges of the bins of sentence distances, and of numbers of sentences before.
BINS = (1, 2, 3, 4, 5, 7, 9, 13, 17, 25, 33, 49, 65)
_CELLS = len(BINS) ** 2


@dataclass(frozen=True, eq=False, repr=False)
class BehaviorAttention(Result):
    """How much sentences of one behavior (first axis) attend to earlier sentences of another (second axis).

    `lift` is Σ observed / Σ expected over all pairs of sentences (i later than j) with these labels. Observed is the
    mean over pairs of tokens, so that long sentences have no advantage. Expected is the same head's mean over all pairs
    of any labels in all traces whose distance i - j and whose number of sentences before, i, fall into the same bins
    (of `BINS`), which corrects for distance and for the length of the chain so far. The effect of a label that always
    occurs at one place, such as initializing, cannot be separated from that place. The expectation is fixed in the
    bootstrap, which makes intervals of the most common pairs too wide, if anything.

    With a plan, `lift` and `mass` are changes: steered less unsteered on the same tokens, in the unit of the unsteered
    expectation.

    Attributes:
        labels: of both behavior axes.
        layers: of the layer axis.
        lift: 1 is what the place alone predicts (0 for a change); NaN without pairs, or if the head never attends
            there.
        low: lower end of the 95 % interval, from a bootstrap over traces; NaN if fewer than two have such pairs.
        high: upper end.
        mass: mean attention of a sentence on all earlier sentences of the label together.
        n_pairs: pairs of sentences.
        n_traces: traces with a pair of sentences, the units of the bootstrap.
        change: whether the figures are changes under a plan.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    lift: Float[Tensor, "layer head behavior behavior"]
    low: Float[Tensor, "layer head behavior behavior"]
    high: Float[Tensor, "layer head behavior behavior"]
    mass: Float[Tensor, "layer head behavior behavior"]
    n_pairs: Int[Tensor, "behavior behavior"]
    n_traces: int
    change: bool = False

    def top(self, query: str, key: str, n: int = 5) -> list[tuple[int, int]]:
        """The heads (layer, head) whose sentences of behavior `query` attend most to `key`, the most certain first.

        Ranked by the end of the interval that is nearer to no effect; for a change, by its absolute value there.

        Raises:
            LensteerError: an unknown behavior.
        """
        a, b = (self.labels.index(check_behavior(label, self.labels)) for label in (query, key))
        sure = self.low[..., a, b]
        if self.change:
            sure = torch.minimum(self.low[..., a, b].abs(), self.high[..., a, b].abs())
            sure = sure * (self.low[..., a, b] * self.high[..., a, b] > 0)
        best = sure.nan_to_num(-torch.inf).flatten().argsort(descending=True, stable=True)[:n]
        return [(self.layers[i // sure.shape[1]], i % sure.shape[1]) for i in best.tolist()]

    def to_dataframe(self) -> Any:
        """One row per layer, head, query behavior and key behavior."""
        import pandas as pd

        n_heads = self.lift.shape[1]
        index = pd.MultiIndex.from_product(
            [self.layers, range(n_heads), self.labels, self.labels], names=["layer", "head", "query", "key"]
        )
        columns = {name: getattr(self, name).flatten().numpy() for name in ("lift", "low", "high", "mass")}
        pairs = self.n_pairs.flatten().repeat(len(self.layers) * n_heads).numpy()
        return pd.DataFrame({**columns, "n_pairs": pairs}, index=index).reset_index()


class PairSums:
    """Sums over the pairs of sentences of each trace, and over all traces by place. Mergeable.

    Args:
        labels: of both behavior axes.

    Attributes:
        observed: per trace, Σ attention per token by labels of query and key sentence.
        mass: per trace, Σ attention mass by the same labels.
        counts: per trace, number of pairs by labels and cell of place.
        askers: per trace, sentences of each label that have one before them.
        by_place: Σ attention per token by cell, over all traces.
    """

    def __init__(self, labels: Sequence[str]) -> None:
        self.labels = tuple(labels)
        self.observed: list[Float[Tensor, "layer head pair"]] = []
        self.mass: list[Float[Tensor, "layer head pair"]] = []
        self.counts: list[Float[Tensor, "pair cell"]] = []
        self.askers: list[Float[Tensor, " behavior"]] = []
        self.by_place: Float[Tensor, "layer head cell"] | float = 0.0

    def add(self, trace: Trace, sums: Float[Tensor, "layer head sum"]) -> None:
        """Add a trace, given its `pair_sums` at every layer."""
        n = len(self.labels)
        observed, mass, by_place = sums.split((n**2, n**2, _CELLS), dim=2)
        _, _, pair, cell = _pairs(trace, self.labels)
        labels = torch.tensor([self.labels.index(span.label) for span in trace.spans[1:]])
        self.observed.append(observed.float())
        self.mass.append(mass.float())
        self.counts.append(torch.bincount(pair * _CELLS + cell, minlength=n**2 * _CELLS).view(n**2, _CELLS).double())
        self.askers.append(torch.bincount(labels, minlength=n).double())
        self.by_place = self.by_place + by_place

    def merge(self, other: PairSums) -> None:
        """Add the sums of other traces."""
        for name in ("observed", "mass", "counts", "askers"):
            getattr(self, name).extend(getattr(other, name))
        self.by_place = self.by_place + other.by_place

    def result(self, layers: Sequence[int], steered: PairSums | None = None, *, seed: int = 0) -> BehaviorAttention:
        """Observed relative to expected attention.

        Args:
            layers: of the sums' layer axis.
            steered: the same traces in the same order under a plan; the result is then the change.
            seed: for the bootstrap.
        """
        n, counts = len(self.labels), torch.stack(self.counts)
        askers = torch.stack(self.askers).sum(0)
        mean = self.by_place / counts.sum((0, 1)).clamp_min(1)
        lifts, masses = [], []
        for i in range(len(layers)):  # the resamples of one layer at a time
            observed, mass = (torch.stack([kept[i] for kept in kind]) for kind in (self.observed, self.mass))
            if steered is not None:
                observed = torch.stack([kept[i] for kept in steered.observed]) - observed
                mass = torch.stack([kept[i] for kept in steered.mass]) - mass
            expected = torch.einsum("tpc,hc->thp", counts, mean[i])
            lifts.append(averaged(observed, expected, seed=seed))
            masses.append(mass.double().sum(0).unflatten(1, (n, n)) / askers[:, None])
        lift, low, high = torch.stack(lifts, dim=1).unflatten(-1, (n, n))
        n_pairs = counts.sum((0, 2)).long().view(n, n)
        seen = n_pairs > 0
        return BehaviorAttention(
            labels=self.labels,
            layers=tuple(layers),
            lift=lift,
            low=low,
            high=high,
            mass=torch.stack(masses).where(seen, torch.nan),
            n_pairs=n_pairs,
            n_traces=len(counts),
            change=steered is not None,
        )


@checked()
def behavior_attention(
    model: TransformerBridge,
    traces: Sequence[Trace],
    *,
    plan: Plan | None = None,
    layers: Sequence[int] | None = None,
    batch_size: int = 8,
    seed: int = 0,
) -> BehaviorAttention:
    """Which behavior attends to which, for every layer and head.

    Args:
        model: whose attention is read.
        traces: annotated.
        plan: if given, all values are changes under this steering, on the same tokens.
        layers: all by default.
        batch_size: traces per forward.
        seed: for the bootstrap.

    Raises:
        LensteerError: no trace has two sentences, or what `stream_attention` raises.
    """
    usable = [trace for trace in traces if len(trace.spans) > 1]
    if not usable:
        raise LensteerError(
            f"none of {len(traces)} traces has two annotated sentences: annotate them, or give longer chains"
        )

    axis = label_axis(usable)

    def reduce(trace: Trace, rows: Float[Tensor, "head span column"]) -> Float[Tensor, "head sum"]:
        return pair_sums(trace, rows, axis)

    def collect(plan: Plan | None) -> PairSums:
        sums = PairSums(axis)
        for i, kept in stream_attention(model, usable, reduce, layers=layers, batch_size=batch_size, plan=plan):
            sums.add(usable[i], kept)
        return sums

    chosen = read_layers(model, layers)
    return collect(None).result(chosen, None if plan is None else collect(plan), seed=seed)


def pair_sums(
    trace: Trace, rows: Float[Tensor, "head span column"], labels: Sequence[str]
) -> Float[Tensor, "head sum"]:
    """For one layer: attention per token by labels, mass by labels, attention per token by cells of place."""
    n, n_pairs = len(trace.spans), len(labels) ** 2
    later, earlier, pair, cell = (index.to(rows.device) for index in _pairs(trace, labels))
    lengths = torch.tensor([span.end - span.start for span in trace.spans], device=rows.device)
    mass = rows[..., :n]
    observed = per_token(mass, lengths)[:, later, earlier]
    sums = rows.new_zeros(rows.shape[0], 2 * n_pairs + _CELLS)
    sums.index_add_(1, pair, observed)
    sums.index_add_(1, n_pairs + pair, mass[:, later, earlier])
    return sums.index_add_(1, 2 * n_pairs + cell, observed)


def _pairs(trace: Trace, labels: Sequence[str]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """For every pair of sentences: the later one, the earlier one, their labels, and the cell of place."""
    label = torch.tensor([labels.index(span.label) for span in trace.spans])
    later, earlier = torch.tril_indices(len(label), len(label), offset=-1)
    bins = torch.tensor([0, *(bisect_right(BINS, d) - 1 for d in range(1, len(label)))])
    return later, earlier, label[later] * len(labels) + label[earlier], bins[later - earlier] * len(BINS) + bins[later]

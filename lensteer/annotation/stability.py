"""Which spans a model reproduces: sentences drawn again from their onsets, and a filter of spans on the result.

A label says what a sentence is, not that the model was about to write such a sentence. Zhuang et al. (arXiv 2604.02113)
found that 93.3 % of 541 boundaries with a keyword do not show the behavior again if the model continues from the same
prefix, and fitted steering vectors on the others alone.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Bool
from torch import Tensor

from lensteer import models
from lensteer.activations import trace_key
from lensteer.annotation.annotators import Annotator, annotate
from lensteer.arguments import checked
from lensteer.behaviors import Span, in_order
from lensteer.errors import LensteerError
from lensteer.generation.jobs import Job, Sampling, resume_jobs
from lensteer.results import Saved
from lensteer.statistics import Estimate, averaged
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class LabelStability:
    """How often the model reproduces the spans of one label. Intervals are over traces.

    Attributes:
        label: of the spans.
        n_spans: that were tested.
        n_kept: of them, those whose share is at least the threshold.
        reproduced: share of continuations from these spans' onsets whose first sentence has the label.
        elsewhere: the same from the onsets of the tested spans with other labels, which is chance.
        kept: share of the spans that is kept.
        right_kept: share of the kept spans whose label is the truth's; None without a truth.
        right_dropped: the same of the spans that were left out.
    """

    label: str
    n_spans: int
    n_kept: int
    reproduced: Estimate
    elsewhere: Estimate
    kept: Estimate
    right_kept: Estimate | None = None
    right_dropped: Estimate | None = None


@dataclass(frozen=True, eq=False, repr=False)
class Stability(Saved):
    """What `stable_spans` found.

    Attributes:
        rows: a row per label that was tested.
        unstable: share of all tested spans that was left out, with its interval over traces.
        shares: of each trace, for each of its spans, the share of continuations with the span's label; NaN for a span
            that was not tested.
        n: continuations per span.
        threshold: smallest share of a span that is kept.
        n_traces: traces with a tested span.
    """

    rows: tuple[LabelStability, ...]
    unstable: Estimate
    shares: tuple[tuple[float, ...], ...]
    n: int
    threshold: float
    n_traces: int

    def to_dataframe(self) -> pd.DataFrame:
        """One row per label."""
        rows = []
        for row in self.rows:
            values: dict[str, object] = dict(label=row.label, n_spans=row.n_spans, n_kept=row.n_kept)
            for name in ("reproduced", "elsewhere", "kept", "right_kept", "right_dropped"):
                if (found := getattr(row, name)) is not None:
                    values |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
            rows.append(values)
        return pd.DataFrame(rows)


@checked()
def stable_spans(
    model: TransformerBridge,
    traces: Sequence[Trace],
    annotator: Annotator,
    *,
    n: int = 10,
    threshold: float = 0.5,
    behaviors: Sequence[str] | None = None,
    truth: Annotator | None = None,
    temperature: float = 1.0,
    max_new_tokens: int = 60,
    seed: int = 0,
    batch_size: int = 128,
    path: str | Path | None = None,
    progress: bool = False,
) -> tuple[list[Trace], Stability]:
    """Keep the spans that the model reproduces: those whose label its continuations from their onsets have, too.

    A span's share is that of `n` continuations of the tokens before it whose first sentence has the span's label. The
    sentence is the one that holds the first letter after the prefix, as `annotator` reads the whole chain; one that it
    cannot read, and a chain that ends there, has no label. The continuations of a span share the prefix's prefill.

    What is estimated is how likely the model is to show the behavior there. So a rare behavior that is drawn at random
    is left out even if its label is right, and labels from another annotator than `annotator` count as not reproduced
    where the two disagree.

    Args:
        model: that wrote the chains, or is to be steered.
        traces: annotated.
        annotator: labels the continuations; give the one that labeled the traces.
        n: continuations per span; the paper has 10.
        threshold: smallest share of a span that is kept.
        behaviors: labels whose spans are tested; spans of other labels are kept, and can be negatives. None for all.
        truth: an annotator that is right, such as `grammar` on the embedded organism: is what is kept more often right?
        temperature: of the continuations.
        max_new_tokens: of each: enough for a sentence.
        seed: of the continuations.
        batch_size: continuations per batch.
        path: JSONL file that each finished batch is appended to; batches already in it are not rerun.
        progress: show a bar.

    Returns:
        The traces with the stable spans alone, and the report.

    Raises:
        LensteerError: no span to test, a number out of range, or a file of another run.
    """
    if not 0 < threshold <= 1 or n < 1 or temperature <= 0:
        raise LensteerError(
            f"n={n}, threshold={threshold}, temperature={temperature}: give at least one continuation, a share above 0 "
            "and at most 1, and a positive temperature"
        )
    tested = [
        [span if behaviors is None or span.label in behaviors else None for span in trace.spans] for trace in traces
    ]
    jobs: dict[tuple[str, int], list[Job]] = {}
    for trace, some in zip(traces, tested, strict=True):
        for span in some:
            if span is not None and (key := (trace_key(trace), span.start)) not in jobs:
                jobs[key] = _jobs(trace, span, key, n)
    if not jobs:
        wanted = "a label" if behaviors is None else f"one of {list(behaviors)}"
        raise LensteerError(f"no span with {wanted} in {len(traces)} traces: annotate them first")
    keys = sorted(jobs, key=lambda key: (len(jobs[key][0].prompt_ids), key))  # little padding, and a fixed order
    sampling = Sampling(n, temperature, seed, max_new_tokens, batch_size)
    ordered = [job for key in keys for job in jobs[key]]
    made = resume_jobs(model, ordered, sampling, path=path, progress=progress)
    drawn = {key: made[i * n : (i + 1) * n] for i, key in enumerate(keys)}
    spans = [(t, span) for t, some in enumerate(tested) for span in some if span is not None]
    found: list[list[str | None]] = []  # for each of them, the labels of its continuations
    for t, trace in enumerate(traces):  # one at a time: the continuations of all are many long chains
        own = [(span, one) for at, span in spans if at == t for one in drawn[(trace_key(trace), span.start)]]
        chains = [_chain(model, trace, span, one) for span, one in own]
        labels = [
            label_at(read, chain.offsets[span.start - trace.prompt_length])
            for (span, _), chain, read in zip(own, chains, annotate(chains, annotator) if own else [], strict=True)
        ]
        found += [labels[i : i + n] for i in range(0, len(labels), n)]
    right = None
    if truth is not None:
        true = annotate(traces, truth)
        right = [label_at(true[t], span.char_start) == span.label for t, span in spans]
    shares = [seen.count(span.label) / n for (_, span), seen in zip(spans, found, strict=True)]
    left = iter(shares)
    by_trace = tuple(tuple(math.nan if span is None else next(left) for span in some) for some in tested)
    report = Stability(
        *_rows(spans, found, [share >= threshold for share in shares], right, len(traces), seed),
        by_trace,
        n,
        threshold,
        len({t for t, _ in spans}),
    )
    kept = [
        replace(trace, spans=tuple(s for s, share in zip(trace.spans, each, strict=True) if not share < threshold))
        for trace, each in zip(traces, by_trace, strict=True)
    ]
    return kept, report


def label_at(trace: Trace, char: int) -> str | None:
    """The label of the span that holds the first letter from a character of the response on; None if there is none."""
    while char < len(trace.response) and trace.response[char].isspace():
        char += 1
    return next((span.label for span in trace.spans if span.char_start <= char < span.char_end), None)


def _jobs(trace: Trace, span: Span, key: tuple[str, int], n: int) -> list[Job]:
    """A job per continuation. The task's name holds the place, so that every place has random numbers of its own."""
    task = replace(trace.task, id=f"{key[0]}@{key[1]}")
    done = span.start - trace.prompt_length
    text = trace.prompt + trace.response[: trace.offsets[done]]
    return [Job(task, sample, text, trace.ids[: span.start]) for sample in range(n)]


def _chain(model: TransformerBridge, trace: Trace, span: Span, drawn: Trace) -> Trace:
    """The chain up to the span, and then as continued. The last token before is decoded along for its space."""
    done = span.start - trace.prompt_length
    first = max(done - 1, 0)
    text, starts = models.decode_offsets(model.tokenizer, (*trace.response_ids[first:done], *drawn.response_ids))
    begin = trace.offsets[first]
    return replace(
        trace,
        response=trace.response[:begin] + text,
        response_ids=(*trace.response_ids[:done], *drawn.response_ids),
        offsets=(*trace.offsets[:first], *(begin + start for start in starts)),
        finished=drawn.finished,
        spans=(),
        n_unparsed=0,
        run="",
    )


def _rows(
    spans: Sequence[tuple[int, Span]],
    found: Sequence[Sequence[str | None]],
    kept: Sequence[bool],
    right: Sequence[bool] | None,
    n_traces: int,
    seed: int,
) -> tuple[tuple[LabelStability, ...], Estimate]:
    """A row per label, and the share of all spans that is left out, from the labels of each span's continuations."""
    owner, labels = torch.tensor([t for t, _ in spans]), [span.label for _, span in spans]
    stay = torch.tensor(kept)

    def mean(values: Tensor, chosen: Bool[Tensor, " span"]) -> Estimate:
        sums = torch.zeros(n_traces, 2, dtype=torch.float64)
        sums.index_add_(0, owner, torch.stack([values.double() * chosen, chosen.double()], 1))
        value, low, high = averaged(sums[:, :1], sums[:, 1:], seed=seed)[:, 0].tolist()
        return Estimate(value, low, high, int((sums[:, 1] > 0).sum()))

    rows = []
    for label in in_order(labels):
        own = torch.tensor([b == label for b in labels])
        seen = torch.tensor([drawn.count(label) / len(drawn) for drawn in found])
        truth = None if right is None else torch.tensor(right)
        rows.append(
            LabelStability(
                label,
                n_spans=int(own.sum()),
                n_kept=int((own & stay).sum()),
                reproduced=mean(seen, own),
                elsewhere=mean(seen, ~own),
                kept=mean(stay, own),
                right_kept=None if truth is None else mean(truth, own & stay),
                right_dropped=None if truth is None else mean(truth, own & ~stay),
            )
        )
    return tuple(rows), mean(~stay, torch.ones_like(stay))

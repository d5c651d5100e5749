"""Which spans are scored, at which positions, and what their first tokens tell."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.traces import Trace

#: Every token counts as having begun so many sentences more than it did, of the average kind.
PSEUDO_COUNT = 1.0


def find_cases(traces: Sequence[Trace], labels: Sequence[str], positions: str, window: str) -> Int[Tensor, "case 5"]:
    """Every (trace, span, behavior) to score, with the positions it is about, half-open.

    An onset window is the token before the span, whose logits predict the span's first token; a span window goes
    on to the span's last token but one, whose logits predict its last.

    Raises:
        LensteerError: A span beyond its trace's end, or nothing to score.
    """
    cases = []
    for t, trace in enumerate(traces):
        for s, span in enumerate(trace.spans):
            if span.end > len(trace.ids):
                raise LensteerError(
                    f"trace {t} ({trace.id}) has {len(trace.ids)} tokens, but a span of {span.label!r} "
                    f"at [{span.start}, {span.end}): annotate it again"
                )
            end = span.onset + 1 if window == "onset" else span.end - 1
            for b, label in enumerate(labels):
                if positions == "all" or (span.label == label) == (positions == "own"):
                    cases.append((t, s, b, span.onset, end))
    if not cases:
        n_spans = sum(len(trace.spans) for trace in traces)
        raise LensteerError(
            f"no onset to score: {len(traces)} traces with {n_spans} spans have none for "
            f"positions={positions!r} and behaviors {', '.join(map(repr, labels))}; pass annotated traces "
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

    n counts the spans that begin with token v, and π_b is the share of b among all of them: each token has seen one
    more sentence (`PSEUDO_COUNT`) of the average kind. A token that begins no sentence so says nothing, π_b.

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

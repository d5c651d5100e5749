"""The sentences of a chain, each with the label that its spans give it.

Annotators cut a chain in different places. To compare two of them, or to train on one, the sentences have to be the
same for all, so these are cut by rule.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate

from lensteer.behaviors import Span
from lensteer.splitting import split_sentences
from lensteer.traces import Trace


@dataclass(frozen=True)
class LabeledSentence:
    """One sentence by rule.

    Attributes:
        start: its first character in the response.
        end: one past its last.
        text: of the sentence.
        label: its behavior; None if less than half of its letters are in a span.
    """

    start: int
    end: int
    text: str
    label: str | None


def labeled_sentences(trace: Trace) -> list[LabeledSentence]:
    """The sentences of a trace's thinking, as `split_sentences` cuts them, with the labels of its spans.

    A sentence gets the label that covers most of its letters (everything but white space), the first of two that cover
    equally many. It gets None if all spans together cover less than half of them, because a judge left it out or its
    annotation could not be placed.
    """
    begin, end = trace.thinking
    places = [(begin + a, begin + b) for a, b in split_sentences(trace.response[begin:end])]
    labels = label_intervals(trace.response, places, trace.spans)
    return [LabeledSentence(a, b, trace.response[a:b], label) for (a, b), label in zip(places, labels, strict=True)]


def label_intervals(text: str, intervals: Iterable[tuple[int, int]], spans: Sequence[Span]) -> list[str | None]:
    """The label of each interval of a text, as in `labeled_sentences`; intervals are in order and do not overlap."""
    letters = [0, *accumulate(not c.isspace() for c in text)]
    labels: list[str | None] = []
    first = 0
    for start, end in intervals:
        while first < len(spans) and spans[first].char_end <= start:
            first += 1
        covered: dict[str, int] = {}
        for span in spans[first:]:
            if span.char_start >= end:
                break
            shared = letters[min(end, span.char_end)] - letters[max(start, span.char_start)]
            covered[span.label] = covered.get(span.label, 0) + shared
        enough = 2 * sum(covered.values()) >= letters[end] - letters[start]
        labels.append(max(covered, key=lambda label: covered[label]) if covered and enough else None)
    return labels

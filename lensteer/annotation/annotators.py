"""The sentences of a chain, each with the label that its spans give it, and the annotators that label them.

Annotators split a chain in different places. To compare two of them, or to train on one, the sentences have to be the
same for all, so these are split by rule. The aligner locates each labeled sentence in the response.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import TypeVar

from lensteer import organism
from lensteer.annotation.alignment import AlignmentReport, align
from lensteer.annotation.splitting import split_sentences
from lensteer.arguments import checked
from lensteer.behaviors import BEHAVIORS, UNPARSED, Sentence, Span
from lensteer.errors import LensteerError
from lensteer.files import check_text
from lensteer.traces import Trace, with_spans


@dataclass(frozen=True)
class LabeledSentence:
    """One sentence, split by rule.

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
    """The sentences of a trace's thinking, as `split_sentences` returns them, with the labels of its spans.

    A sentence gets the label that covers most of its letters (everything but white space), the first in a tie. It gets
    None if all spans together cover less than half of them: a judge left it out, or its annotation could not be placed.
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


Annotator = Callable[[Sequence[Trace]], list[list[Sentence]]]
"""From traces to the sentences of each, in order; a sentence without a label has the label "unparsed".

It gets all traces at once, so that it can batch a model's forward passes or send a server concurrent requests. An
annotator may declare its labels (`labels_of`); otherwise every label that it returns is accepted.
"""

A = TypeVar("A", bound=Annotator)


def labeling(*labels: str) -> Callable[[A], A]:
    """A decorator that declares which labels an annotator gives: `@labeling("polite", "rude")`."""

    def declare(annotator: A) -> A:
        vars(annotator)["labels"] = labels
        return annotator

    return declare


def labels_of(annotator: Annotator) -> tuple[str, ...] | None:
    """The labels that an annotator declares; None if it declares none."""
    labels = getattr(annotator, "labels", None)
    return None if labels is None else tuple(labels)


def check_labels(annotator: Annotator, wanted: Sequence[str]) -> None:
    """Check that an annotator can find all behaviors.

    Raises:
        LensteerError: a behavior is not among the labels that the annotator declares.
    """
    known = labels_of(annotator)
    if known is not None and (odd := [label for label in wanted if label not in known]):
        raise LensteerError(
            f"the annotator {getattr(annotator, '__name__', type(annotator).__name__)!r} never labels {odd}: it "
            f"declares {list(known)}; give another annotator, or one of its labels"
        )


@labeling(*BEHAVIORS)
def grammar(traces: Sequence[Trace]) -> list[list[Sentence]]:
    """The embedded organism's own grammar: exact, for that model alone."""
    return [organism.parse(trace.response[slice(*trace.thinking)]) for trace in traces]


@labeling()
def unlabeled(traces: Sequence[Trace]) -> list[list[Sentence]]:
    """Sentences of each trace's thinking, or of the whole response if there is none, without labels.

    For statistics of text that need no behaviors, such as tokens per sentence.
    """
    texts = [trace.response[slice(*trace.thinking)] or trace.response for trace in traces]
    return [[Sentence(UNPARSED, text[start:end]) for start, end in split_sentences(text)] for text in texts]


@checked()
def annotate(traces: Sequence[Trace], annotator: Annotator) -> list[Trace]:
    """Traces with the spans that an annotator finds. `annotate_report` also returns what could not be placed.

    Args:
        traces: any; existing spans are replaced.
        annotator: `rules`, `grammar` (for the embedded organism alone), a `SentenceClassifier`, a `Judge`, or any
            function from traces to labeled sentences.

    Raises:
        LensteerError: the annotator returns a label that it did not declare or that has a lone surrogate, or not one
            list per trace.
    """
    return annotate_report(traces, annotator)[0]


def annotate_report(traces: Sequence[Trace], annotator: Annotator) -> tuple[list[Trace], list[AlignmentReport]]:
    """Traces with spans, and for each trace what was placed, repaired and dropped."""
    annotated, reports = [], []
    labels = labels_of(annotator)
    returned = annotator(traces)
    if len(returned) != len(traces):
        raise LensteerError(f"the annotator returned {len(returned)} lists of sentences for {len(traces)} traces")
    for trace, sentences in zip(traces, returned, strict=True):
        if labels is not None and (odd := {s.label for s in sentences}.difference(labels, [UNPARSED])):
            raise LensteerError(f"the annotator returned {sorted(odd)} in {trace.id}, but declares {list(labels)}")
        for label in {s.label for s in sentences}:
            check_text(label, f"a label that the annotator returned in {trace.id}")
        found = align(sentences, trace.response, trace.offsets, prompt_length=trace.prompt_length)
        spans = [span for span in found.spans if span.label != UNPARSED]
        annotated.append(with_spans(trace, spans, len(sentences) - len(spans)))
        reports.append(found.report)
    return annotated, reports

"""Annotators say which behavior each sentence is; the aligner places what they say. Knows nothing of models."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from lensteer import organism
from lensteer.alignment import AlignmentReport, align
from lensteer.behaviors import BEHAVIORS, UNPARSED, Sentence
from lensteer.traces import Trace, with_spans

Annotator = Callable[[Sequence[Trace]], list[list[Sentence]]]
"""From traces to the sentences of each, in order; a sentence that it cannot label has the label "unparsed".

All traces at once, so that an annotator may batch a model's forward passes or ask a server many things at a time.
"""


def grammar(traces: Sequence[Trace]) -> list[list[Sentence]]:
    """The embedded organism's own grammar: exact, and of no use for any other model."""
    return [organism.parse(trace.response[slice(*trace.thinking)]) for trace in traces]


def annotate(traces: Sequence[Trace], annotator: Annotator = grammar) -> list[Trace]:
    """Traces with the spans that an annotator finds. `annotate_report` also says what could not be placed."""
    return annotate_report(traces, annotator)[0]


def annotate_report(
    traces: Sequence[Trace], annotator: Annotator = grammar
) -> tuple[list[Trace], list[AlignmentReport]]:
    """Traces with spans, and for each trace what was placed, repaired and dropped."""
    annotated, reports = [], []
    for trace, sentences in zip(traces, annotator(traces), strict=True):
        found = align(
            sentences,
            trace.response,
            trace.offsets,
            prompt_length=trace.prompt_length,
            labels=(*BEHAVIORS, UNPARSED),
        )
        spans = [span for span in found.spans if span.label != UNPARSED]
        annotated.append(with_spans(trace, spans, len(sentences) - len(spans)))
        reports.append(found.report)
    return annotated, reports

"""Tests whether an annotator relies on cue words: the same chains are annotated again with the cues masked.

The list of cues is for this test alone. An annotator that used it would be tested on its own definition.
"""

from __future__ import annotations

import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import replace

from lensteer.annotation.agreement import Agreement, agreement_of
from lensteer.annotation.annotators import Annotator, annotate, label_intervals, labeled_sentences, labeling, labels_of
from lensteer.behaviors import UNPARSED, Sentence
from lensteer.traces import Trace

#: Replaces a masked word, capitalized where the word is, so that sentences split as before.
MASK = "xxx"

#: Words that indicate a behavior, most of them in the order of the labels that they suggest.
MARKERS: tuple[str, ...] = (
    *("okay", "ok", "alright", "first", "to begin with", "to start", "let me see", "let me think", "let's see"),
    *("so", "therefore", "thus", "hence", "then", "since", "because", "that means", "which means", "it follows"),
    *("consequently", "as a result", "this implies", "we get", "we have", "this gives"),
    *("recall", "remember", "i know", "we know", "known", "note that", "by definition", "in general", "generally"),
    *("according to", "the formula", "typically", "usually"),
    *("for example", "for instance", "e.g.", "such as", "suppose", "let's say", "say", "let me test", "let's test"),
    *("let me try", "let's try", "let me check", "let's check", "imagine", "consider", "assume", "what if", "example"),
    *("hmm", "hm", "maybe", "perhaps", "possibly", "probably", "i think", "i guess", "i wonder", "not sure", "unsure"),
    *("not certain", "uncertain", "unclear", "might", "may", "could be", "seems", "seem", "confused", "confusing"),
    *("wait", "hold on", "actually", "alternatively", "instead", "on second thought", "scratch that", "never mind"),
    *("going back", "go back", "back to", "let me re-examine", "let me reconsider", "let me rethink", "reconsider"),
    *("double-check", "double check", "another approach", "another way", "mistake", "wrong", "incorrect"),
)

_CUE = re.compile(
    r"(?<!\w)(?:{})(?!\w)".format(
        "|".join(
            re.escape(cue).replace(r"\ ", r"[^\S\n]+").replace("'", "['’]")
            for cue in sorted(MARKERS, key=len, reverse=True)
        )
    ),
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W\d_]+(?:['’][^\W\d_]+)*")


def mask_markers(text: str) -> str:
    """A text with every cue of `MARKERS` replaced by "xxx" (or "Xxx"), whole words of any case only."""
    return _masked(text, [found.span() for found in _CUE.finditer(text)])


def masked(traces: Sequence[Trace], *, control: bool = False, seed: int = 0) -> list[Trace]:
    """The same chains with the cues in their thinking masked, without spans.

    Their tokens are single characters with the id 0, so the annotator must read text, not token ids.

    Args:
        traces: any.
        control: mask the same number of other words instead, drawn at random within each chain (all others, if fewer).
        seed: for those draws.
    """
    return [_mask(trace, _places(trace, control, seed)) for trace in traces]


def masking(annotator: Annotator, *, control: bool = False, seed: int = 0) -> Annotator:
    """An annotator that reads the chains with their cues masked, and labels the original sentences.

    A behavior's share under this annotator shows how much of the share does not depend on cue words. Compare it with
    `control`, which masks the same number of random other words.

    Args:
        annotator: must read text, not token ids.
        control: mask random words instead of cues.
        seed: for their choice.
    """

    def blind(traces: Sequence[Trace]) -> list[list[Sentence]]:
        places = [_places(trace, control, seed) for trace in traces]
        hidden = annotate([_mask(trace, at) for trace, at in zip(traces, places, strict=True)], annotator)
        return [
            [
                *(
                    Sentence(s.label, trace.response[_back(s.char_start, at) : _back(s.char_end, at)])
                    for s in seen.spans
                ),
                *([Sentence(UNPARSED, "")] * seen.n_unparsed),
            ]
            for trace, seen, at in zip(traces, hidden, places, strict=True)
        ]

    labels = labels_of(annotator)
    return blind if labels is None else labeling(*labels)(blind)


def marker_dependence(
    traces: Sequence[Trace],
    annotator: Annotator,
    *,
    control: bool = False,
    n_boot: int = 2000,
    seed: int = 0,
) -> Agreement:
    """Agreement of an annotator with itself: the original text (the reference) and the text without cue words.

    Sentences are those of the original text. A κ near 1 means that the labels do not depend on the cues. At a low κ, a
    model that merely says "wait" more often would count as backtracking more. Compare it with a second run with
    `control`: masking random words costs some agreement, too, and only the rest is due to the cues. The figure does not
    say whether the labels are right, and it covers only the cues in `MARKERS`.

    Args:
        traces: any; existing spans are ignored.
        annotator: must read text, not token ids.
        control: mask the same number of random other words instead of the cues.
        n_boot: resamples of the chains, for the intervals.
        seed: for the resamples and the random words.

    Raises:
        LensteerError: no sentence in any trace.
    """
    places = [_places(trace, control, seed) for trace in traces]
    hidden = annotate([_mask(trace, at) for trace, at in zip(traces, places, strict=True)], annotator)
    pairs = []
    for plain, blind, at in zip(annotate(traces, annotator), hidden, places, strict=True):
        sentences = labeled_sentences(plain)
        moved = [(_moved(s.start, at), _moved(s.end, at)) for s in sentences]
        labels = label_intervals(blind.response, moved, blind.spans)
        pairs.append([(s.label, label) for s, label in zip(sentences, labels, strict=True)])
    return agreement_of(pairs, n_boot=n_boot, seed=seed)


def _places(trace: Trace, control: bool, seed: int) -> list[tuple[int, int]]:
    """Intervals of the words to mask, in order: the cues in the thinking, or the same number of other words."""
    begin, end = trace.thinking
    cues = [found.span() for found in _CUE.finditer(trace.response, begin, end)]
    if not control:
        return cues
    within = {at for a, b in cues for at in range(a, b)}
    words = [found.span() for found in _WORD.finditer(trace.response, begin, end)]
    others = [(a, b) for a, b in words if within.isdisjoint(range(a, b))]
    return sorted(random.Random(f"{seed}/{trace.id}").sample(others, min(len(cues), len(others))))


def _mask(trace: Trace, places: Sequence[tuple[int, int]]) -> Trace:
    text = _masked(trace.response, places)
    return replace(
        trace, response=text, response_ids=(0,) * len(text), offsets=tuple(range(len(text))), spans=(), n_unparsed=0
    )


def _masked(text: str, places: Sequence[tuple[int, int]]) -> str:
    parts, after = [], 0
    for start, end in places:
        parts += [text[after:start], MASK.capitalize() if text[start].isupper() else MASK]
        after = end
    return "".join([*parts, text[after:]])


def _back(at: int, places: Sequence[tuple[int, int]]) -> int:
    """Where a character of the masked text was before; one within a mask was where the masked word begins."""
    shift = 0
    for start, end in places:
        if at < start + shift + len(MASK):
            return min(at - shift, start)
        shift += len(MASK) - (end - start)
    return at - shift


def _moved(at: int, places: Sequence[tuple[int, int]]) -> int:
    """Where a character that no mask covers is after masking."""
    before = bisect_right([end for _, end in places], at)
    return at + sum(len(MASK) - (end - start) for start, end in places[:before])

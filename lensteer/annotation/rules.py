"""An annotator by cue words, for English chains: no training, no model, the same result every time.

A sentence's score for a behavior is the sum of the weights of the cues in it (`cues.CUES`), plus what it gets from the
label of the sentence before (`cues.CARRIED`); the best score is its label, deduction where nothing speaks. It reads
the surface: a change of approach without such a word is missed, and a "wait, no" that changes nothing counts as one.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lensteer.annotation.annotators import labeling
from lensteer.annotation.cues import CARRIED, CUES
from lensteer.behaviors import BEHAVIORS, Sentence
from lensteer.splitting import split_sentences

if TYPE_CHECKING:
    from lensteer.traces import Trace

_BLANK_LINE = re.compile(r"\n\s*\n")
_MARKUP = re.compile(r"\A(?:[-–•*#>]+\s+|[*_]+)+")


@labeling(*BEHAVIORS)
def rules(traces: Sequence[Trace]) -> list[list[Sentence]]:
    """Every sentence of each trace's thinking with a behavior, in order; an `Annotator`.

    The texts are the response's own, so that the aligner finds them word for word. An answer behind the thinking has no
    sentences.
    """
    return [_label(trace.response[slice(*trace.thinking)]) for trace in traces]


def _label(text: str) -> list[Sentence]:
    sentences: list[Sentence] = []
    end = 0
    for start, stop in split_sentences(text):
        before = sentences[-1].label if sentences else ""
        inherited = CARRIED.get(before, (0.0, 0.0))[bool(_BLANK_LINE.search(text, end, start))]
        label = _behavior(text[start:stop], len(sentences), before, inherited)
        sentences.append(Sentence(label, text[start:stop]))
        end = stop
    return sentences


def _behavior(sentence: str, index: int, before: str, inherited: float) -> str:
    """The label of the sentence at `index` of its chain; of equal scores, the one that `BEHAVIORS` has first."""
    words = _MARKUP.sub("", sentence.replace("’", "'"))
    scores = dict.fromkeys(BEHAVIORS, 0.0)
    for cue in CUES:
        if (cue.until is None or index < cue.until) and cue.pattern.search(words):
            scores[cue.label] += cue.weight
    if inherited:
        scores[before] += inherited
    return max(BEHAVIORS, key=lambda label: scores[label])

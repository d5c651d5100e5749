"""An annotator by cue words, for English chains: no training, no model, the same result every time.

A sentence's score for a behavior is the sum of the weights of the cues in it (`CUES`), plus what it gets from the
label of the sentence before (`CARRIED`). The label with the highest score is assigned, and deduction if no cue matches.
Only the surface is read: a change of approach without such a word is missed, and a "wait, no" that changes nothing is
counted.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from lensteer.annotation.annotators import labeling
from lensteer.annotation.splitting import split_sentences
from lensteer.behaviors import BEHAVIORS, Sentence

if TYPE_CHECKING:
    from lensteer.traces import Trace

#: A medium cue alone outweighs `DEFAULT`, a weak one does not, two weak ones do.
STRONG, MEDIUM, WEAK = 3.0, 2.0, 1.0
DEFAULT = 1.5

#: Words can mark only this many first sentences of a chain as initializing.
OPENING = 8


@dataclass(frozen=True)
class Cue:
    """Words that are evidence for a behavior.

    Attributes:
        label: the behavior.
        weight: added to the behavior's score.
        words: a regular expression that is searched for in the sentence, ignoring case.
        until: the cue counts only in this many first sentences of a chain; None: in all.
    """

    label: str
    weight: float
    words: str
    until: int | None = None
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", re.compile(self.words, re.IGNORECASE))


# Connectives before the first word that carries meaning.
_OPEN = r"^(?:(?:oh|well|okay|ok|alright|so|but|and|or|now|hmm+|wait|then|also|first|yes|actually)\b[\s,.:!…—-]*)*"
_N = r"-?\d[\d.,]*"

CUES: tuple[Cue, ...] = (
    # The next step of the present approach: the default, unless other cues outweigh it.
    Cue("deduction", DEFAULT, ""),
    Cue("deduction", WEAK, r"^(?:therefore|thus|hence|next|finally|because|plus)\b|^so,? (?:if|when|the answer)\b"),
    # The task is restated, in the first sentences.
    Cue("initializing", 2 * STRONG, "", until=1),
    Cue(
        "initializing", WEAK, r"^(?:okay|alright|hmm+)\b|\b(?:interesting|tricky|challenging|classic)\b", until=OPENING
    ),
    Cue(
        "initializing",
        MEDIUM,
        r"\bstep by step\b|\bbreak \w+ down\b|\bfigure .{0,20}out\b|\bhow to approach\b|\b(?:to|do i|should i) start\b",
        until=OPENING,
    ),
    Cue("initializing", MEDIUM, _OPEN + r"let(?:'s| me)\b", until=4),
    Cue(
        "initializing",
        MEDIUM,
        r"\b(?:i|we) (?:need|have|want) to\b|\btrying to\b|\b(?:is asking|asks|wants)\b",
        until=4,
    ),
    # A fact is brought in.
    Cue("adding-knowledge", STRONG, r"\b(?:remember|recall|recalling)\b|\bi(?:'ve)? (?:know|heard|read|learned)\b"),
    Cue(
        "adding-knowledge",
        MEDIUM,
        r"\b(?:called|known as|refers to|defin(?:ed as|ition of)|by definition|according to)\b",
    ),
    Cue("adding-knowledge", MEDIUM, r"\b(?:usually|typically|sometimes|often|commonly|generally|in general)\b"),
    Cue("adding-knowledge", WEAK, r"\bthings like\b|\b(?:like|such as) (?:a|an|the)\b|\bthere are \d"),
    Cue("adding-knowledge", WEAK, r"\b(?:is|are) (?:a|an|like|used|made|related|important)\b"),
    # A case is tried. The published judge also counts worked-out numbers as one.
    Cue("example-testing", STRONG, r"\b(?:for (?:example|instance)|e\.g\.|(?:an?|another) (?:\w+ )?example)\b"),
    Cue(
        "example-testing",
        MEDIUM,
        r"\b(?:suppose|imagine|let's say|let us say|say,|test(?:ing)? (?:this|it|with|the))\b",
    ),
    Cue(
        "example-testing",
        MEDIUM,
        _OPEN + r"(?:if i|let me|let's|i'll|i can) (?:have|take|try|test|check|plug|pick|use)\b",
    ),
    Cue(
        "example-testing", MEDIUM, _OPEN + rf"(?:(?:for|when|if|with|case|sum|try|take) )?(?:[a-z] ?= ?)?{_N} ?[:=,×÷]"
    ),
    Cue("example-testing", MEDIUM, r"^[-+\s\d.,×*·/÷()=^$]+$|^[a-z]\(\d+\)"),
    Cue("example-testing", WEAK, rf"\d ?[-+×*·÷/] ?{_N} ?[=≈] ?-?\d"),
    # Doubt about the chain's own statements.
    Cue(
        "uncertainty-estimation",
        STRONG,
        r"(?:\bnot|n't) (?:\w+ )?(?:sure|certain|confident|clear)\b|\b(?:unsure|unclear)\b",
    ),
    Cue(
        "uncertainty-estimation",
        STRONG,
        r"\bconfus|\bstuck\b|\bin circles\b|\bover-?(?:complicat|think)|\b(?:i'm|bit) lost\b|\bdoubt",
    ),
    Cue(
        "uncertainty-estimation",
        MEDIUM,
        r"\b(?:make sure|verify|confirm|double[- ]check|recount|mistaken?|miscount\w*)\b",
    ),
    Cue("uncertainty-estimation", WEAK, r"\?$"),
    Cue("uncertainty-estimation", WEAK, r"\bi (?:think|guess|believe|must)\b|\bi'm\b"),
    Cue("uncertainty-estimation", WEAK, r"^(?:but )?(?:wait|hmm+)\b"),
    Cue("uncertainty-estimation", WEAK, r"^but\b"),
    # Another approach is taken.
    Cue("backtracking", MEDIUM, r"\bwait,? (?:no|actually|maybe|perhaps|another|let)\b|\bhold on\b|\bscratch that\b"),
    Cue(
        "backtracking",
        STRONG,
        r"\b(?:another|different|alternative) (?:approach|way|method|idea|thought|analogy|strategy)\b",
    ),
    Cue(
        "backtracking",
        MEDIUM,
        r"\b(?:think again|start over|(?:go|going) back|back to|rethink|re-?consider|revisit|instead of)\b",
    ),
)

#: Added for the label of the sentence before: in the same paragraph, and across a blank line.
CARRIED: dict[str, tuple[float, float]] = {"initializing": (WEAK, 0.0), "example-testing": (MEDIUM, WEAK)}

_BLANK_LINE = re.compile(r"\n\s*\n")
_MARKUP = re.compile(r"\A(?:[-–•*#>]+\s+|[*_]+)+")


@labeling(*BEHAVIORS)
def rules(traces: Sequence[Trace]) -> list[list[Sentence]]:
    """Every sentence of each trace's thinking with a behavior, in order; an `Annotator`.

    The texts are copied from the response, so the alignment is exact. The answer after the thinking has no
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
    """The label of the sentence at `index` of its chain; ties go to the first in `BEHAVIORS`."""
    words = _MARKUP.sub("", sentence.replace("’", "'"))
    scores = dict.fromkeys(BEHAVIORS, 0.0)
    for cue in CUES:
        if (cue.until is None or index < cue.until) and cue.pattern.search(words):
            scores[cue.label] += cue.weight
    if inherited:
        scores[before] += inherited
    return max(BEHAVIORS, key=lambda label: scores[label])

"""The table behind `rules`: which words, at which place, speak for which behavior, and how much.

For English chains of thought. Knows nothing of how the weights are added up.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

#: A medium cue alone outweighs `DEFAULT`, a weak one does not, two weak ones do.
STRONG, MEDIUM, WEAK = 3.0, 2.0, 1.0
DEFAULT = 1.5

#: How many of a chain's first sentences may be called initializing for their words.
OPENING = 8


@dataclass(frozen=True)
class Cue:
    """One reason to call a sentence something.

    Attributes:
        label: the behavior that it speaks for.
        weight: how much.
        words: a regular expression, searched for in the sentence, case aside.
        until: counts in the first so many sentences of a chain only; None: in all.
    """

    label: str
    weight: float
    words: str
    until: int | None = None
    pattern: re.Pattern[str] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "pattern", re.compile(self.words, re.IGNORECASE))


# Words that only connect, before the one that a sentence really begins with.
_OPEN = r"^(?:(?:oh|well|okay|ok|alright|so|but|and|or|now|hmm+|wait|then|also|first|yes|actually)\b[\s,.:!…—-]*)*"
_N = r"-?\d[\d.,]*"

CUES: tuple[Cue, ...] = (
    # A step from what is there: what no other cue outweighs.
    Cue("deduction", DEFAULT, ""),
    Cue("deduction", WEAK, r"^(?:therefore|thus|hence|next|finally|because|plus)\b|^so,? (?:if|when|the answer)\b"),
    # The task is taken in, in the first sentences.
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
    # A case is tried; to the published judge, numbers that are worked out are one.
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
    # Doubt about one's own words.
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
    # Another way is taken.
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

#: What a sentence gets from the label of the one before: in the same paragraph, and across a blank line.
CARRIED: dict[str, tuple[float, float]] = {"initializing": (WEAK, 0.0), "example-testing": (MEDIUM, WEAK)}

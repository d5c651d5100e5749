"""Classifies the reasoning style of a text, one of five, by marker words."""

from __future__ import annotations

import re
from dataclasses import dataclass

STYLES = ("stepwise", "strategy-first", "causal", "analogical", "annotated-deduction")
"""Of the written records: in numbered or ordered steps; naming the plan, then carrying it out; from causes to effects;
carrying over a familiar case; each inference with its reason in brackets."""

WORDS = 120
"""How many words of a text are read."""

THRESHOLD = 2.5
"""Below this score no style is assigned."""


@dataclass(frozen=True)
class _Marker:
    """Evidence for a style: `weight` per match, for `most` matches at most, in the first `within` words."""

    style: str
    weight: float
    pattern: str
    most: int = 1
    within: int = WORDS


_START = r"(?:\A|(?<=[.!?:;])\s+|\n)\W*"
_FIRST = r"first(?:ly| of all)?\b|to (?:begin|start)\b|(?:begin|start) (?:with|on|from)\b"
_LATER = r"second(?:ly)?,|third(?:ly)?,|fourth,|next\b|then\b|after that\b|finally\b|last(?:ly)?,|in the end,"
_PLAN = r"\b(?:plan|strategy|approach|method)\b|\b(?:idea|trick|route|course)\b.* is\b"
_PLANNED = r"\b(?:plan(?:ned)?|strategy|carr(?:ied|ying) (?:it|this|that)? ?(?:out|through))\b"
_SO = (
    r"therefore|hence|thus|consequently|as a (?:result|consequence)|(?:which|that) means|leads to"
    r"|for (?:this|that) reason"
)
_LIKE = r"(?<!would )(?<!'d )(?<!feel )\b(?:un)?like\b(?! to\b)"
_ALIKE = (
    r"just as|likewise|similarly|equally|by the same token|carried over|no different from"
    r"|(?:the|this|that) same (?:way|fashion|manner|pattern)"
)

_MARKERS = (
    _Marker("stepwise", 1.5, rf"{_START}(?:step \w+\b\s?[:.,]|\d\d?[.)]\s)", most=3),
    _Marker("stepwise", 1.5, rf"{_START}(?:{_FIRST})"),
    _Marker("stepwise", 1.0, rf"{_START}(?:{_LATER})", most=3),
    _Marker("strategy-first", 2.5, _PLAN, within=15),
    _Marker("strategy-first", 2.5, r"\A\W*(?:to \w+ (?:this|it), )?(?:what )?(?:i|we)(?:'ll|'d|'m going to)\b"),
    _Marker("strategy-first", 2.5, r"\A\W*(?:i (?:will|would|intend to)|(?:the|a good) way)\b"),
    _Marker("strategy-first", 1.0, _PLANNED, most=2),
    _Marker("causal", 1.5, r"\bif\b(?:[^.?!]|\.\d)*\bthen\b", most=2),
    _Marker("causal", 1.0, r"\b(?:because|since)\b", most=3),
    _Marker("causal", 1.0, rf"{_START}(?:if|because|since)\b", most=2),
    _Marker("causal", 1.0, rf"\b(?:{_SO})\b", most=2),
    _Marker("analogical", 2.5, r"\A(?:think of|imagine|picture|compare|consider|look at)\b"),
    _Marker("analogical", 2.5, rf"{_LIKE}|\bresembles?\b|\b(?:just|the same) as\b|\bas if\b", within=15),
    _Marker("analogical", 1.0, _LIKE),
    _Marker("analogical", 1.0, rf"\b(?:{_ALIKE})\b", most=2),
    _Marker("annotated-deduction", 1.5, r"(?<=\s)\[[^\[\]\\]*[a-z][^\[\]\\]*\](?!\()", most=4),
)


def style_of(text: str) -> str | None:
    """The style in which a response reasons, or None if none stands out.

    Only the first 120 words are read, without think tags and bold type. Every marker adds its weight for each of its
    matches, up to a number of them:

    - stepwise: list numbers, "Step 1:" and ordinals ("First", "then", "finally") at the start of sentences;
    - strategy-first: a plan, strategy, approach or method among the first 15 words, or "I will", "the way" as the very
      first; later on "as planned", "carried out";
    - causal: "if ... then", "because", "since", most of all at the start of sentences; "therefore", "which means";
    - analogical: "like" or "the same as" among the first 15 words, "think of", "imagine" as the very first; "likewise";
    - annotated-deduction: remarks in square brackets.

    The highest score wins if it reaches `THRESHOLD` and no other style has as much. The rule reads only words: an
    analogy without such a word is missed, and a text with many a "because" is called causal whatever its content.
    """
    words = re.findall(r"\s*\S+", re.sub(r"</?think>|<[|｜][^|｜]*[|｜]>|\*\*", " ", text).replace("’", "'").strip())
    scores = dict.fromkeys(STYLES, 0.0)
    for marker in _MARKERS:
        found = re.findall(marker.pattern, "".join(words[: marker.within]), re.IGNORECASE)
        scores[marker.style] += marker.weight * min(len(found), marker.most)
    first, second = sorted(STYLES, key=lambda style: -scores[style])[:2]
    return first if scores[first] >= THRESHOLD and scores[first] > scores[second] else None

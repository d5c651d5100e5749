r"""Whether an answer reasons step by step: a rule on its words, for models that do not mark their thinking.

Checked by hand on 100 answers to GSM8K (`analyses/LOG.md`, 2026-11-27).
"""

from __future__ import annotations

import re

LEAST_STEPS = 2
"""Steps of an answer that reasons."""

_MARKS = re.compile(r"</?think>|<[|｜][^|｜]*[|｜]>")
#: Sentences end at a stop before a capital, or at a line's end; "3 p.m. on" and "1.5" go on.
_END = re.compile(r"(?<=[.!?:;])[*_)\"'”’\]]{0,3}\s+(?=[^\sa-z])|\n+")
#: A list's number, which is no sentence of its own.
_ITEM = re.compile(r"^[\s>*]*\d\d?[.)]\s+(?=\S)", re.MULTILINE)
_CODE = re.compile(r"^\s*```\S*\s*$", re.MULTILINE)
#: A calculation that is carried out: an equals sign after an operation, in signs, words or TeX.
_EQUATION = re.compile(
    r"[\d)}a-z%]\s*(?:[-−+*/×÷·]|\\times|\\cdot|\\div|\\frac|\bx\b|\bof\b|\btimes\b|\bplus\b|\bminus\b|\bdivided by\b)"
    r".{0,80}?(?:=|≈|\\approx|\bis\b|\bequals\b|\bgives\b|\bare\b)",
    re.IGNORECASE | re.DOTALL,
)
_ASSIGNED = re.compile(r"^\s*[\w.]+\s*=\s*\S.*[-+*/].*$")
#: An item of a list, a numbered step, or a word that carries an argument on, at the start of a sentence.
_CARRIED = re.compile(
    r"\W*(?:step \w+\b|\d\d?[.)]\s|(?:first|second|third)(?:ly)?\b|(?:then|next|finally|now|after that)\b"
    r"|(?:so|therefore|thus|hence|since|because|if)\b|this (?:means|gives|leaves|is because)\b|that (?:means|leaves)\b"
    r"|we (?:know|need|have|can|are)\b|let(?:'s| us| [a-z]\b)|given\b|to (?:find|solve|calculate|determine|get|do)\b)",
    re.IGNORECASE,
)
_ANSWER = re.compile(r"\W*(?:so |therefore,? |thus,? )?(?:the )?(?:final )?answer\b|#{4}|\\boxed", re.IGNORECASE)


def steps_of(text: str) -> list[str]:
    """The steps of an answer: its sentences and lines that calculate or carry an argument on, each text once.

    A sentence calculates if it has an operation and its result ("3 * 4 = 12", "half of 12 is 6", a line of code with an
    operation); it carries on if it starts with a list number, an ordinal, "so", "therefore", "since", "if", "we need
    to" or the like. A sentence that only gives the answer ("The answer is 12.", "#### 12") is no step, and neither is
    one that was said before: loops do not reason.
    """
    found: dict[str, None] = {}
    for piece in _END.split(_ITEM.sub("\nstep ", _CODE.sub("", _MARKS.sub("\n", text.replace("**", ""))))):
        sentence = (piece or "").strip()
        if not sentence or _ANSWER.match(sentence):
            continue
        if _EQUATION.search(sentence) or _ASSIGNED.match(sentence) or _CARRIED.match(sentence):
            found.setdefault(re.sub(r"\W+", " ", sentence).strip().lower())
    return list(found)


def reasons(text: str) -> bool:
    """Whether an answer reasons step by step: it has at least `LEAST_STEPS` different steps (see `steps_of`)."""
    return len(steps_of(text)) >= LEAST_STEPS

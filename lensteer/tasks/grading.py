"""Graders: whether a given answer is the wanted one, forgiving of form, strict of value."""

from __future__ import annotations

import re
from collections.abc import Callable

from lensteer.tasks.answers import untypeset
from lensteer.tasks.numbers import read_number, same_number

_LEAD = r"(?i:(?:the|my|correct|right|best|final|answer|option|choice|letter|statement|is|it|must|be|would)\b[\s:]*)*"
_NAMED = re.compile(
    rf"{_LEAD}(?:\((?P<enclosed>[A-Za-z])\)|(?P<listed>[A-Za-z])\)|(?P<capital>[A-Z])(?:[.:,;]|\s*[-–—]\s|$)"
    r"|(?P<small>[a-z])\.?$|(?P<argued>[A-Z])(?=\s+(?i:because|since|is (?:the )?(?:correct|right|best)|\()))",
)
_LAST_NAMED = re.compile(r"[^()]*\((?P<letter>[A-Za-z])\)")
#: Other options in what follows: capitals that stand alone, but not an article, "I", or letters in parentheses.
_OTHERS = re.compile(r"\b(?:[B-HJ-Z]|[AI](?!\s+\w|'))\b|(?<=\()[a-z](?=\))")
_LETTERS = re.compile(r"[a-z](?:[\s,;]+(?:and\s+)?[a-z])+")
_UNDONE = re.compile(r"\W*(?:or|and|nor|is (?:not|wrong|incorrect))\b", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:not|nor|neither|never|no|or|wrong|incorrect)\b|n't\b", re.IGNORECASE)


def numeric(given: str, wanted: str) -> bool:
    r"""Whether a text states the wanted number: see `read_number` for forms and `same_number` for values.

    Form: "x = 12.", "$\frac{3}{8}$", "1,234.50", "1.2 × 10^3", "twelve", "two thirds", "37.5 %", "about 12", "12
    apples" (units are not checked). Value: "12 or 13", "at least 12" and "0.33" for 1/3 are refused.
    """
    answer, right = read_number(given), read_number(wanted)
    return answer is not None and right is not None and same_number(answer, right)


def choice(given: str, wanted: str) -> bool:
    """Whether a text names the wanted option, and no other, by its letter.

    The letter opens the text: "B", "b", "(B)", "B.", "B) the blue one", "option B", "the answer is B because it is
    heavier"; or it closes it in parentheses: "the blue one (B)". "A blue one", "A or B", "not B" and "B, not C" (where
    a reader of letters cannot be sure) name none.
    """
    text = re.sub(r"\s+", " ", untypeset(given)).strip(" *_\"'")
    opening, closing = _NAMED.match(text), _LAST_NAMED.fullmatch(text.rstrip(". "))
    if opening:
        letter, rest = next(group for group in opening.groups() if group), text[opening.end() :]
        undone = _UNDONE.match(rest)
    elif closing:
        letter, rest = closing["letter"], text[: closing.start("letter") - 1]
        undone = _DENIED.search(rest)
    else:
        return False
    others = {other.upper() for other in _OTHERS.findall(rest)} - {letter.upper()}
    return letter.upper() == wanted.strip().upper() and not others and not undone


def exact(given: str, wanted: str) -> bool:
    """Whether two texts are the same but for typesetting, emphasis, quotes, spacing, case and the full stop.

    Single letters may be listed in any way: "Q, R and S" is "QRS".
    """
    return _normal(given) == _normal(wanted) != ""


def _normal(text: str) -> str:
    text = re.sub(r"\s*,\s*", ", ", re.sub(r"\s+", " ", untypeset(text)))
    text = text.strip(" .*_\"'").casefold()
    return re.sub(r"\band\b|\W", "", text) if _LETTERS.fullmatch(text) else text


GRADERS: dict[str, Callable[[str, str], bool]] = {"numeric": numeric, "choice": choice, "exact": exact}

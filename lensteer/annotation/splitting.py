"""Splits a chain of thought into sentences, by rule."""

from __future__ import annotations

import re

from lensteer.positions import CLOSERS, STOPS, SURE_STOPS

_CLOSERS = f"[{re.escape(CLOSERS)}]*"
_CANDIDATE = re.compile(
    rf"[{STOPS}]+(?:[\"'”’»)\]}}*_`$]|\\[)\]])*|[{SURE_STOPS}][{SURE_STOPS}{STOPS}]*{_CLOSERS}|:{_CLOSERS}|\n\s*"
)
_FORMULA = re.compile(rf"\\\S|\$\$?|[.?…]{_CLOSERS}(?=\s)|[{SURE_STOPS}]|\n\s*")
_BETWEEN_DIGITS = "．।॥۔"  # also a decimal point, or around the number of a verse
_OPENED_BY = {r"\)": r"\(", r"\]": r"\[", "$$": "$$", "$": "$"}

_BLANKS = re.compile(r"\s*")
_OPENERS = re.compile(r"[\"'“‘«*_\[]*")
_OPERATOR = re.compile(r"[=+/×÷·^≤≥≠≈,;:)\]}%&]|[-–—−*<>](?=\s|\Z)")
_ITEM = re.compile(r"[*_]*(?:[-*•+–]|\(?(?:\d{1,3}|[A-Za-z])[.)]|#{1,6})[^\S\n]+\S|\|")
_NUMBER = re.compile(r"[\s*_#>(\[•+–-]*(?:\d{1,3}|[A-Za-z])")
_WORD = re.compile(r"[^\W\d_](?:\.?[^\W\d_])*$")
_INITIALS = re.compile(r"(?:^|[^\w.])[A-Z]\.\s+[A-Z]$")
_INITIAL = re.compile(r"[A-Z]\.(?!\w)")
_FACTORIAL = re.compile(r"[\d)\]}]$|(?:^|[\W\d_])[^\W\d_]$")
_WINDOW = 12  # characters before a period that decide whether it ends a sentence

#: Words whose period never ends a sentence, and those whose period ends one only if a capital follows.
_NEVER = frozenset("e.g eg i.e ie cf vs dr mr mrs ms prof st fig figs eq eqs approx viz resp".split())
_SELDOM = frozenset("etc al inc ltd co corp jr sr ft lbs oz hr hrs min sec".split())


def split_sentences(text: str) -> list[tuple[int, int]]:
    r"""Intervals of the sentences in a text.

    1. A blank line always ends a sentence. A single line break ends one before and after a list item, a heading or a
       table row, and after a line that ends in a colon or as in 2.
    2. `.`, `!`, `?`, `…` and runs of them end one if white space follows; closing quotes, brackets and emphasis after
       them belong to it. Those of other scripts (`。！？`, `।`, `؟`; `positions.SURE_STOPS`) need no white space, but
       `．` and `।` do not end one before a digit.
    3. They do not end one before an operator or a closing bracket (`5! = 120`); inside `$…$`, `$$…$$`, `\(…\)` or
       `\[…\]`; as the number or letter that begins a list item (`2. First`); after an abbreviation (`e.g.`); between
       initials (`J. K. Rowling`, whereas one capital in mid-sentence may end it: `so it is B. Then`).
    4. An ellipsis, a factorial (`n!`), `etc.` or `p.m.` ends one only before a capital; a mark with a quote or bracket
       after it does unless a lowercase letter follows (`"Is it?" is asked`).

    Args:
        text: any, such as the thinking of a trace.

    Returns:
        Half-open character intervals, in order, not overlapping, without white space at their ends. Together they cover
        every character that is not white space. Splitting a sentence returns it whole. Time is linear in the length of
        the text.
    """
    sentences: list[tuple[int, int]] = []
    formulas, f = _formulas(text), 0
    start = line = _after(_BLANKS, text, 0)  # of the sentence and of the line
    for found in _CANDIDATE.finditer(text, start):
        breaks = found[0].count("\n")
        at = found.start() if breaks else found.end()
        while f < len(formulas) and formulas[f][1] <= at:
            f += 1
        if breaks:
            item = _ITEM.match(text, max(line, start)) or _ITEM.match(text, found.end())
            line = found.end()
        if at <= start:
            continue
        if f < len(formulas) and formulas[f][0] < at:
            ends = breaks > 1
        else:
            ends = breaks > 1 or bool(item) if breaks else _ends(text, start, found)
        if ends:
            sentences.append((start, start + len(text[start:at].rstrip())))
            start = _after(_BLANKS, text, at)
    if start < len(text):
        sentences.append((start, start + len(text[start:].rstrip())))
    return sentences


def _ends(text: str, start: int, found: re.Match[str]) -> bool:
    """Whether a stop outside any formula ends the sentence that begins at `start`."""
    sign, dot, at = found[0], found.start(), found.end()
    next_ = _after(_BLANKS, text, at)
    if sign[0] in SURE_STOPS:
        return not (sign[-1] in _BETWEEN_DIGITS and text[at : at + 1].isdecimal())
    if next_ == at or next_ == len(text):
        return False
    if sign[0] == ":":
        return "\n" in text[at:next_]
    stop = sign[: len(sign) - len(sign.lstrip(STOPS))]
    if _OPERATOR.match(text, next_) or (stop != sign and text[next_].islower()):
        return False
    capital = _capital(text, next_)
    head = text[max(start, dot - _WINDOW) : dot]
    if stop == "!":
        return capital or not _FACTORIAL.search(head)
    if stop != ".":
        return capital or "!" in stop or "?" in stop
    if dot - start <= _WINDOW and _NUMBER.fullmatch(head):
        return False
    last = _WORD.search(head)
    word = last[0] if last else ""
    if word.lower() in _NEVER or ("." in word and word[0].isupper()) or _INITIALS.search(head):
        return False
    if word.lower() in _SELDOM or "." in word:
        return capital
    return not (len(word) == 1 and word.isupper() and _INITIAL.match(text, next_))


def _formulas(text: str) -> list[tuple[int, int]]:
    r"""Intervals of LaTeX, merged where they overlap.

    A formula ends before a blank line, and `$…$` before a line break or a period and a capital, so that prices are not
    formulas: `$` opens before a character that is not white space, and closes after one unless a digit follows.
    """
    opened: dict[str, int] = {}
    merged: list[tuple[int, int]] = []
    for found in _FORMULA.finditer(text):
        sign, at = found[0], found.start()
        if sign[0] == "\n" and sign.count("\n") > 1:
            opened.clear()
        elif sign[0] not in "\\$":
            if sign[0] in "\n" + SURE_STOPS or _capital(text, _after(_BLANKS, text, found.end())):
                opened.pop("$", None)
        elif sign in (r"\(", r"\["):
            opened[sign] = at
        elif sign in _OPENED_BY:
            before, after = text[at - 1 : at], text[found.end() : found.end() + 1]
            begin = opened.get(_OPENED_BY[sign])
            if begin is not None and (sign != "$" or not (before.isspace() or after.isdigit())):
                del opened[_OPENED_BY[sign]]
                end = found.end()
                while merged and begin < merged[-1][1]:
                    begin = min(begin, merged.pop()[0])
                merged.append((begin, end))
            elif sign == "$$" or (sign == "$" and after and not after.isspace()):
                opened[sign] = at
    return merged


def _capital(text: str, at: int) -> bool:
    """Whether a capitalized word, perhaps in quotes, begins there."""
    at = _after(_OPENERS, text, at)
    return text[at : at + 1].isupper()


def _after(pattern: re.Pattern[str], text: str, at: int) -> int:
    """The end of the match of `pattern` at a position; `pattern` also matches the empty string."""
    found = pattern.match(text, at)
    assert found is not None
    return found.end()

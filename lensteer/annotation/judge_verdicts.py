"""Which part of a judge's reply is its verdict.

A judge may think before it answers, between marks or not, and draft verdicts on the way. What counts:

1. Only what comes after the last mark that ends a thought. A thought that never ends holds no verdict.
2. Labels in JSON: entries in text order. A new verdict begins after other text, or in another JSON value, where a
   number recurs or is lower than the one before. The last complete verdict counts, that is, one with an entry for every
   sentence. A later incomplete one that starts over counts instead of it: the judge had given up the earlier one, and
   what is missing is requested again. Later entries that do not start over are remarks: one that contradicts the
   verdict leaves its sentence without a label.
3. Labels as a list, one item a line, `2. deduction`: only if it is complete, after any JSON, and no label is named
   after it. The last such list counts.
4. A score: the last `{"score": n}`, or, if none, the last number that the text calls a score, or a last line or reply
   that is a number. `35/100`, `35 out of 100` and `35%` are 35. Two scores side by side, a question, a range, another
   scale and a JSON value that was cut off are no score.

Everything else is no verdict, and the question is repeated.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

Entry = tuple[Any, Any]
"""A number and a label, as the reply has them."""

_NAMES = r"think|thinking|thoughts?|reasoning|reflection|analysis|scratchpad"
_THOUGHT = re.compile(
    rf"</(?:\w+:)?(?:{_NAMES})>|\[/THINK\]|◁/think▷|<\|(?:end_of_thought|END_THINKING)\|>|"
    r"<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)
_OPENED = re.compile(
    rf"\s*(?:<(?:\w+:)?(?:{_NAMES})>|\[THINK\]|◁think▷|<\|(?:begin_of_thought|START_THINKING)\|>|"
    r"<\|channel\|>(?:analysis|commentary)<\|message\|>)",
    re.IGNORECASE,
)

_OBJECT = re.compile(r"\{[^{}]*\}")  # entries are flat, so each complete one is found in prose and in cut JSON, too
_WITHIN = re.compile(r'(?:[\s,\[{]|"[^"{}\[\]]*"\s*:)*')  # between two entries of one JSON value
_ITEM = re.compile(  # bounded, so that the time is linear in the length of a line
    r"^[^\w\n]{0,9}(?:sentence|no\.?|n)?[^\w\n]{0,9}(\d{1,9})[^\w\n]{1,9}((?:[^\W\d_]|[ _‐‑–-]){1,80}?)"
    r"[*_\"'`)\]| ]{0,9}(?:$|[.,;|][ \t]*$|(?:[.,;:(|]|[-–—])[ \t]+[^\n]*$|\([^\n]*$)",
    re.MULTILINE | re.IGNORECASE,
)
_BETWEEN = re.compile(r"[\s_\-‐‑–]+")

_NUMBER = r"(\d{1,9}(?:\.\d+)?|\.\d+)"
_OUT_OF = r"(?:[*_`]*\s*(?:/|out of)\s*[*_`]*100(?![\d.]*\d)|\s*%|\s*percent\b)?"
_BARE = re.compile(rf"[\s*_`\"'(\[]*(?:\\boxed\{{)?{_NUMBER}{_OUT_OF}[}}\s*_`\"')\].]*")
_CALLED = re.compile(
    r"(?:score|(?:rating|grade|verdict)(?!\"))\b[\s*_`\"')\]]{0,9}"
    r"(?:(?:is|of|would be|will be|to)\b[\s*_`\"':]{0,9}|[:=→][\s*_`\"']{0,9}|\s[-–—]\s|\s)(?:\\boxed\{)?"
    + _NUMBER
    + r"(?![\d.,]*\d|[A-Za-z])"
    + _OUT_OF,
    re.IGNORECASE,
)
_OPEN = re.compile(  # after a number: it is a question, a range, of another scale, or only supposed
    r"[*_`\"')\]}]*\s*(?:\?|/|[-–—]\s*\d|out\s+of\b|(?:or|to|would|might|may|could|seems|feels|looks|sounds)\b)",
    re.IGNORECASE,
)


def spoken(text: str) -> str:
    """A reply without its thoughts."""
    said = text[max((mark.end() for mark in _THOUGHT.finditer(text)), default=0) :]
    return "" if _OPENED.match(said) else said


@dataclass
class _Verdict:
    """Entries of one verdict, with the numbers that sentences have, and whether its JSON value was cut off."""

    entries: list[Entry] = field(default_factory=list)
    numbers: list[int] = field(default_factory=list)
    cut: bool = False

    @property
    def first(self) -> float:
        return float(self.numbers[0]) if self.numbers else math.inf

    def add(self, entries: list[Entry], numbers: list[int]) -> None:
        self.entries += entries
        self.numbers += numbers


def labels_of_verdict(said: str, n_sentences: int, labels: Sequence[str]) -> tuple[list[Entry], str]:
    """The entries of the verdict in a reply without thoughts, and its form: "JSON", "list", or "" if there is none."""
    verdicts, end = _in_json(said, n_sentences)
    listed = _listed(said[end:], n_sentences, labels)
    if listed:
        return listed, "list"
    verdict = _Verdict()
    for later in verdicts:
        complete = len(set(later.numbers)) == n_sentences
        again = later.first <= verdict.first and (len(later.numbers) > 1 or later.cut)
        if complete or again or not verdict.numbers:
            strays = [] if verdict.numbers else verdict.entries
            verdict = _Verdict([*strays, *later.entries], later.numbers)
        else:
            verdict.add(later.entries, later.numbers)
    return verdict.entries, "JSON" if verdict.entries else ""


def _in_json(said: str, n_sentences: int) -> tuple[list[_Verdict], int]:
    """All verdicts in JSON, and where the last one ends."""
    verdicts: list[_Verdict] = []
    end, single = 0, False  # of the last object with entries: its end, and whether it is one entry, not a mapping
    for place, values in objects(said):
        entries = _entries(values)
        if not entries:
            continue
        numbers = [n for number, _ in entries if (n := number_of(number, n_sentences)) is not None]
        before = said[end : place.start()]
        last = verdicts[-1] if verdicts else None
        over = last is not None and any(n in last.numbers or n < last.numbers[-1] for n in numbers if last.numbers)
        joined = single and "n" in values and bool(_WITHIN.fullmatch(before))
        if last is None or (over and not joined):
            last = _Verdict(cut="[" in before and "]" not in said[place.end() :])
            verdicts.append(last)
        last.add(entries, numbers)
        end, single = place.end(), "n" in values
    return verdicts, end


def _entries(values: dict[str, Any]) -> list[Entry]:
    if "n" in values and "label" in values:
        return [(values["n"], values["label"])]
    return [(key, value) for key, value in values.items() if key.strip().isdecimal()]


def _listed(said: str, n_sentences: int, labels: Sequence[str]) -> list[Entry]:
    """The entries of the last complete list, if no label is named after it."""
    known = {plain(label) for label in labels}
    verdict, complete, after = _Verdict(), _Verdict(), 0
    for item in _ITEM.finditer(said):
        n = number_of(item[1], n_sentences)
        if n is None or plain(item[2]) not in known or "?" in item[0]:
            continue
        if n in verdict.numbers or n < (verdict.numbers or [0])[-1]:
            verdict = _Verdict()
        verdict.add([(item[1], item[2].strip())], [n])
        after = item.end(2)
        if len(verdict.numbers) == n_sentences:
            complete, after_complete = verdict, after
    if not complete.entries:
        return []
    rest = f"-{plain(said[after_complete:])}-"
    return [] if any(re.search(rf"(?<!\w){re.escape(label)}(?!\w)", rest) for label in known) else complete.entries


def score_of(text: str) -> float | None:
    """The score from 0 to 100 that a reply gives; None if it gives none, or none that is certain."""
    said = spoken(text).strip()
    found = [(place, values["score"]) for place, values in objects(said) if "score" in values]
    called = [(mark, mark[1]) for mark in _CALLED.finditer(said) if not _OPEN.match(said, mark.end())]
    if found:
        place, score = found[-1]
        later = [value for mark, value in called if mark.start() >= place.end()]
        alike = [score, *later, *([found[-2][1]] if _side_by_side(said, found) else [])]
    elif _cut_json(said):
        return None
    elif called:
        score = called[-1][1]
        alike = [score, *([called[-2][1]] if _side_by_side(said, called, sentence=True) else [])]
    else:
        bare = _BARE.fullmatch(said) or _BARE.fullmatch(said.rpartition("\n")[2]) or _only_share(said)
        if bare is None:
            return None
        score, alike = bare[1], []
    values = {_number(value) for value in [score, *alike]}
    return values.pop() if len(values) == 1 else None


def _side_by_side(said: str, found: list[tuple[re.Match[str], Any]], *, sentence: bool = False) -> bool:
    """Whether nothing between the last two says which of them holds; or, if asked, whether they share a sentence."""
    if len(found) < 2:
        return False
    between = said[found[-2][0].end() : found[-1][0].start()]
    return not re.search(r"\w", re.sub(r"(?i)\b(?:and|final|overall|the|json)\b", "", between)) or (
        sentence and not re.search(r"[.!?…\n]", between)
    )


def _only_share(said: str) -> re.Match[str] | None:
    """`35/100` in prose, if it is the only one."""
    shares = [m for m in re.finditer(_NUMBER + _OUT_OF, said) if "100" in m[0][len(m[1]) :]]
    certain = shares and not any(_OPEN.match(said, m.end()) for m in shares)
    return shares[0] if certain and len({m[1] for m in shares}) == 1 and _own(said, shares[0]) else None


def _own(said: str, number: re.Match[str]) -> bool:
    """Whether a number is whole: no sign, range or decimal is before it."""
    return not re.search(r"[\d.,\-–—+−]\s*$", said[: number.start()])


def _cut_json(said: str) -> bool:
    return said.rfind("{") > said.rfind("}")


def _number(value: object) -> float | None:
    found = re.fullmatch(rf"{_NUMBER}{_OUT_OF}\.?", str(value).strip())
    return float(found[1]) if found and float(found[1]) <= 100 else None


def objects(text: str) -> Iterator[tuple[re.Match[str], dict[str, Any]]]:
    """Every complete flat JSON object in a text, with its place."""
    for found in _OBJECT.finditer(text):
        try:
            yield found, json.loads(found[0])
        except (ValueError, RecursionError):
            continue


def plain(label: str) -> str:
    """A label without quotes or capitals, and with "-" between its words, to compare spellings."""
    return _BETWEEN.sub("-", label.strip(" \t\r\n\"'`[].*").lower())


def number_of(value: object, n_sentences: int) -> int | None:
    """The number of a sentence, from 1; None if none has it."""
    text = str(value).strip(" .#[]()")
    if not (text.isdecimal() and len(text) < 10):
        return None
    return int(text) if 1 <= int(text) <= n_sentences else None

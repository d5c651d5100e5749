"""Reading the one number that an answer states, as an exact fraction."""

from __future__ import annotations

import math
import re
import unicodedata
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

from lensteer.tasks.answers import untypeset

_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {name: i for i, name in enumerate(_ONES)} | {name: 10 * i for i, name in enumerate(_TENS, 2)}
_SMALL |= {f"{ten}-{one}": _SMALL[ten] + i for ten in _TENS for i, one in enumerate(_ONES[1:10], 1)}
#: Smallest first: "two million three hundred thousand" is put together from its end.
_SCALES = {"dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
_PARTS = {f"{name}th": i for i, name in enumerate(_ONES[:20]) if i in (4, 6, 7, *range(10, 20))}
_PARTS |= {"half": 2, "halve": 2, "third": 3, "quarter": 4, "fifth": 5, "eighth": 8, "ninth": 9, "twelfth": 12}
_PARTS |= {"twentieth": 20, "hundredth": 100, "thousandth": 1000}

_SMALL_WORD = re.compile(
    r"\b(" + "|".join(sorted(_SMALL, key=len, reverse=True)).replace("-", r"(?:-|\s+)") + r")\b", re.IGNORECASE
)
_PART_WORD = re.compile(rf"\b(?:(1|an?)[\s-]+({'|'.join(_PARTS)})|(\d+)[\s-]+({'|'.join(_PARTS)})s)\b", re.IGNORECASE)

_DIGITS = r"(?:\d{1,3}(?:,\d{3})+(?:\.\d+)?|\d{1,60}(?:\.\d{0,60})?|\.\d{1,60})(?!\d|[.,:]\d)"
_POWER = r"\^\(?[-+]?\d{1,3}(?!\d)\)?"
_LITERAL = rf"{_DIGITS}(?:e[-+]?\d{{1,3}}(?!\d))?(?:\s*[*x]\s*10{_POWER})?(?:{_POWER})?"
_NUMBER = re.compile(
    rf"(?<![\w.^])(?<!\d[,:])(?P<sign>(?<![\w)])(?<![\d)]\s)[-+])?"
    rf"(?:(?P<whole>\d{{1,60}})\s+(?=\d{{1,60}}\s*/\s*\d))?"
    rf"(?P<top>{_LITERAL})(?:\s*/\s*(?P<bottom>{_LITERAL}))?(?P<percent>\s*(?:%|per\s?cent\b))?",
    re.IGNORECASE,
)

#: What may not stand around the number (read as "#"): it would make another number, or none, of it.
_OTHERWISE = re.compile(
    "|".join(
        [
            r"[\\+*^<>≤≥≠±√∞!%\u0304\u0305\d]",  # more of a formula, or digits that are no number in a common form
            r"-\s*#|#\s*[-/:]?\s*#|[/:]\s*#",  # a difference, a range, a ratio, two numbers side by side
            r"#(?![mshglLVWNJACF]\b)[^\W\d_]\b|#(?:pi|bn|mn)\b|#\s+[xyznkiMB]\b|#\s*π|#\s+pi\b",  # 12x, 12k, 12 n, 12π
            rf"#[\s-]+(?i:first|second|{'|'.join(_PARTS)}|dozen|hundred|[mbtr]+illion|thousand)s?\b",
            r"(?i:\b(?:not?|none|never|neither|nor|cannot|wrong|incorrect|impossible|than|except|between)\b|n't\b)",
            r"(?i:\b(?:at (?:least|most)|up to)\b|\b(?:over|under|above|below|almost|nearly|beyond)\s+#)",
            r"(?i:#\s+(?:or|and)\s+(?:more|less|fewer|so|up)\b|\bor\b(?!\s*#))",
        ]
    )
)
#: Letters with a digit or exponent of their own, of units and names: cm^2, L^-1, x1. Not 1.2e3 or 2 x 10^3.
_NAME = re.compile(r"((?:(?<!\d)|(?!e))(?!x\s*10\^)[^\W\d_])\^?\(?[-+]?\d+\)?", re.IGNORECASE)
_ABOUT = re.compile(r"≈|(?:\bor\s+)?\b(?:about|approximately|approx\b\.?|roughly|around)\s", re.IGNORECASE)
#: In front of the last equals sign, a number and then one of these: what is equated is not the answer.
_CLAUSE = re.compile(r"\d.*(?:[,;.]\s|\b(?:and|or|because|since|as|but|is|so|if|where|when|with|for)\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """An exact value; a percentage's is that in front of its sign. `places` are the digits after a decimal point."""

    value: Fraction
    percent: bool = False
    places: int | None = None

    @property
    def plain(self) -> Fraction:
        """The value with a percent sign worked in: 3/8 for 37.5 %."""
        return self.value / 100 if self.percent else self.value


def read_number(text: str) -> Number | None:
    """The one number that a text states, or None: it states none, several that differ, or one that can't be read.

    Of "x = 3 · 4 = 12" it is what comes after the last equals sign; of "1/3 ≈ 0.333" the exact side, where the
    other rounds it up or down. Two forms of one number ("3/8, or 37.5 %") are one. Words and units around it are passed
    over; but not those that change it ("not 12", "at least 12", "12 or more", "12!", "3 · 4", "5-7", "12 x").
    """
    text = _plain(text)
    about = _ABOUT.search(text)
    exact, rough = (text[: about.start()], text[about.end() :]) if about else ("", text)
    if not re.search(r"\d", exact) or not re.search(r"\d", rough):
        return _stated(exact + rough)
    number, near = _stated(exact), _stated(rough)
    if number is None or near is None:
        return None
    off = abs(number.plain - near.plain) * (100 if near.percent else 1)
    return number if off < Fraction(1, 10 ** (near.places or 0)) else None


def _stated(text: str) -> Number | None:
    front, equals, back = text.rpartition("=")
    if equals and not _CLAUSE.search(front) and not re.search(r"[<>≤≥≠±]", front):
        text = back
    text = _NAME.sub(r"\1", text)
    numbers = []
    for found in _NUMBER.finditer(text):
        try:
            numbers.append(_value(found))
        except ZeroDivisionError:
            return None
    around = _NUMBER.sub("#", text)
    alike = len({number.plain for number in numbers}) == 1
    return numbers[0] if alike and "=" not in around and not _OTHERWISE.search(around) else None


def same_number(given: Number, wanted: Number) -> bool:
    """Whether a given number is the wanted one.

    They are compared as exact fractions. Where the wanted one is written as a decimal with k places, the given one is
    rounded to k places first (half away from zero), as a decimal may be a rounded answer; to have 2.5 and not 2.54, the
    wanted one is written as 5/2. "37.5 %" is 0.375. Where the wanted one is a percentage, a bare 37.5 is one as well;
    where it is a bare number above 1, a percent sign may be a unit ("by how many percent?").
    """
    values = {given.plain}
    if wanted.percent:
        values = {given.value, given.value if given.percent else 100 * given.value}
    elif given.percent and abs(wanted.value) > 1:
        values.add(given.value)
    return any(_round(value, wanted.places) == _round(wanted.value, wanted.places) for value in values)


def _round(value: Fraction, places: int | None) -> Fraction:
    if places is None:
        return value
    units = math.floor(abs(value) * 10**places + Fraction(1, 2))
    return Fraction(-units if value < 0 else units, 10**places)


def _value(found: re.Match[str]) -> Number:
    top = _literal(found["top"])
    value = top / _literal(found["bottom"]) if found["bottom"] else top
    value += int(found["whole"] or 0)
    decimal = re.fullmatch(r"[\d,]*\.(\d+)", found["top"])
    places = len(decimal[1]) if decimal and not found["bottom"] else None
    return Number(-value if found["sign"] == "-" else value, bool(found["percent"]), places)


def _literal(text: str) -> Fraction:
    base, *powers = re.split(r"\s*[*x]\s*(?=10\^)", re.sub(r"[,()]", "", text.lower()))
    value = Fraction(1)
    for factor in (base, *powers):
        mantissa, _, exponent = factor.partition("^")
        value *= Fraction(mantissa) ** int(exponent or 1)
    return value


def _plain(text: str) -> str:
    """In plain signs and digits: LaTeX, typographic signs and number words replaced."""
    text = untypeset(text)
    text = re.sub(r"(\d?)\\[dt]?frac\s*(?:\{([^{}]*)\}|(\d))\s*(?:\{([^{}]*)\}|(\d))", _fraction, text)
    text = re.sub(r"\\(?:times|cdot)\b|[×·⋅]", "*", text)
    text = re.sub(r"\\(?:approx|simeq)\b|[≃≅]", "≈", text)
    text = re.sub(r"\^\s*\{?\s*\\(?:circ|degree)\s*\}?|\\degree\b", " degrees", text)
    text = re.sub(r"([\^_])\{([^{}]*)\}", r"\1\2", text)
    text = re.sub(r"[⁺⁻⁰¹²³⁴⁵⁶⁷⁸⁹]+", lambda m: "^" + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub(r"[¼-¾⅐-⅞]", lambda m: " " + unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub("[\u2212\u2013\u2010\u2011]", "-", unicodedata.normalize("NFKC", text).replace("⁄", "/"))
    text = re.sub(r"!=|\\neq?\b", "≠", re.sub(r"<=|\\leq?\b", "≤", re.sub(r">=|\\geq?\b", "≥", text)))
    text = re.sub("[€£*_]*$|^[*_]+|[€£#]", "", text.strip().rstrip(".").strip())
    return _digits(text)


def _fraction(found: re.Match[str]) -> str:
    digit, top, bottom = found[1], found[2] or found[3], found[4] or found[5]
    simple = re.fullmatch(r"\s*[-+]?[\d,.]+\s*", top) and re.fullmatch(r"\s*[\d,.]+\s*", bottom)
    return f"{digit}{' ' if digit else ''}{top.strip()}/{bottom.strip()}" if simple else found[0]


def _digits(text: str) -> str:
    """With number words as digits: "two hundred and five" is 205, "three and a half" 3 1/2, "minus two thirds" -2/3."""
    text = _SMALL_WORD.sub(lambda m: str(_SMALL[re.sub(r"\s+", "-", m[0].lower())]), text)
    text = _PART_WORD.sub(lambda m: f"{_count(m[1] or m[3])}/{_PARTS[(m[2] or m[4]).lower()]}", text)
    text = re.sub(r"\bhalf\b", "1/2", text, flags=re.IGNORECASE)
    text = re.sub(r"\b(\d+) and (?=\d+/\d+)", r"\1 ", text)
    for name, scale in _SCALES.items():
        rest = "" if name == "dozen" else rf"(?:,?\s+(?:and\s+)?(\d{{1,{len(str(scale)) - 1}}})\b(?![.,/]\d))?"
        pattern = rf"(?<![\d.,/])(\d+(?:\.\d+)?|\ban?)\s+{name}\b{rest}"
        text = re.sub(pattern, partial(_scaled, scale=scale), text, flags=re.IGNORECASE)
    return re.sub(r"\b(?:minus|negative)\s+(?=\d)", "-", text, flags=re.IGNORECASE)


def _count(word: str) -> Fraction:
    return Fraction(1) if word.lower() in ("a", "an") else Fraction(word)


def _scaled(found: re.Match[str], scale: int) -> str:
    return str(_count(found[1]) * scale + sum(int(rest or 0) for rest in found.groups()[1:]))

"""Extraction and grading of answers: lenient about form, strict about value."""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass
from fractions import Fraction
from functools import partial

_SKIPPED = r"(?:[\s*_]|\\\[|\$\$)*"
#: A label before an answer: "Answer:", "The final answer is", or "Final answer" alone on a line as a heading.
_LABEL = re.compile(
    rf"(?P<label>\banswer[\s*_]*:|^[#*_ ]*(?:the )?(?:final )?answer[*_ ]*$){_SKIPPED}(?P<text>.+)"
    rf"|\banswer[\s*_]*\bis\b\s*:?{_SKIPPED}(?P<said>.+)",
    re.IGNORECASE | re.MULTILINE,
)
_BOX = re.compile(r"\\boxed\s*\{")
#: A last line that is bold as a whole and contains only one number or one letter.
_LAST = re.compile(r"\*\*\s*(\$?[-−+$]?[\d.,/%]*\d%?\$?|\(?[A-Za-z]\))\s*\*\*\.?")
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|emph)\s*\{([^{}]*)\}")


def final_answer(response: str) -> str | None:
    r"""The answer that a response gives, or None if it gives none.

    Only what comes after the thinking counts: after the last `</think>`, and before any `<think>` that is not
    closed. In this order:

    1. The content of the last `\boxed{…}`. Several boxes on its line are one answer ("\boxed{1} or \boxed{2}").
    2. The rest of the line after the last "Answer:", "answer is" or heading "Answer"; an "Answer:" that comes after
       the last box outranks it. If a bold answer ends its sentence ("**Answer: No.** She may…"), only the bold part.
    3. A last line that is bold as a whole and contains only a number or a letter in parentheses: "**12**", "**(B)**".
       Other bold text may be a heading, and a bare last line a step of the calculation: neither counts.
    """
    spoken = response.rpartition("</think>")[2].partition("<think>")[0]
    text = re.sub(r"<[|｜][^|｜]*[|｜]>", "", spoken)
    labels = list(_LABEL.finditer(text))
    boxes = _boxes(text)
    if boxes and not (labels and labels[-1]["label"] and labels[-1].start() > boxes[-1][0]):
        line = [box for box in boxes if "\n" not in text[box[0] : boxes[-1][0]]]
        given = text[line[0][0] : line[-1][1]] if len({box[2] for box in line}) > 1 else line[-1][2]
    elif labels:
        given = _set_off(text, labels[-1])
    else:
        last = _LAST.fullmatch(text.strip().rpartition("\n")[2].strip())
        given = last[1] if last else ""
    return given.strip() or None


def _set_off(text: str, label: re.Match[str]) -> str:
    """The text after a label: up to where bold type ends, if that also ends the sentence, or to the line's end."""
    group = "text" if label["label"] else "said"
    given = label[group]
    opened = text[text.rfind("\n", 0, label.start()) + 1 : label.start(group)].count("**") % 2 == 1
    bold, end, rest = given.partition("**")
    ends = bold.rstrip().endswith((".", "!")) or rest.startswith(".")
    return bold if opened and end and ends and "**" not in rest else given


def _boxes(text: str) -> list[tuple[int, int, str]]:
    r"""Begin, end and content of every closed `\boxed{…}`, outermost only."""
    boxes: list[tuple[int, int, str]] = []
    for found in _BOX.finditer(text):
        if boxes and found.start() < boxes[-1][1]:
            continue
        depth = 1
        for end in range(found.end(), len(text)):
            depth += {"{": 1, "}": -1}.get(text[end], 0) if text[end - 1] != "\\" else 0
            if depth == 0:
                boxes.append((found.start(), end + 1, text[found.end() : end]))
                break
    return boxes


def untypeset(text: str) -> str:
    """Text without markup: boxes, text commands, math delimiters, spacing commands, bold type."""
    for begin, end, content in reversed(_boxes(text)):
        text = text[:begin] + content + text[end:]
    before = ""
    while before != text:
        before, text = text, _WRAPPERS.sub(r"\1", text)
    text = re.sub(r"(?<=\d)\\[,!:; ](?=\d{3}(?!\d))", "", text.replace("{,}", ",").replace("\\%", "%"))
    text = re.sub(r"\\[()\[\]]|\\?\$|\*\*|__|`", "", text)
    text = re.sub(r"\\(?:[,;:! ]|(?:quad|qquad|left|right|displaystyle)\b)", " ", text)
    return re.sub(r"[\u2018\u2019]", "'", re.sub(r"[\u201c\u201d]", '"', text))


_ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen"
).split()
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
_SMALL = {name: i for i, name in enumerate(_ONES)} | {name: 10 * i for i, name in enumerate(_TENS, 2)}
_SMALL |= {f"{ten}-{one}": _SMALL[ten] + i for ten in _TENS for i, one in enumerate(_ONES[1:10], 1)}
#: Smallest first: "two million three hundred thousand" is assembled from its end.
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

#: Context that may not surround the number (written "#"): it would change the number or make it none.
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
#: Letters with a digit or exponent, in units and names: cm^2, L^-1, x1. Not 1.2e3 or 2 x 10^3.
_NAME = re.compile(r"((?:(?<!\d)|(?!e))(?!x\s*10\^)[^\W\d_])\^?\(?[-+]?\d+\)?", re.IGNORECASE)
_ABOUT = re.compile(r"≈|(?:\bor\s+)?\b(?:about|approximately|approx\b\.?|roughly|around)\s", re.IGNORECASE)
#: A number and then one of these before the last equals sign: the equated value is not the answer.
_CLAUSE = re.compile(r"\d.*(?:[,;.]\s|\b(?:and|or|because|since|as|but|is|so|if|where|when|with|for)\b)", re.IGNORECASE)


@dataclass(frozen=True)
class Number:
    """An exact value; for a percentage, the number before its sign. `places` are the digits after a decimal point."""

    value: Fraction
    percent: bool = False
    places: int | None = None

    @property
    def plain(self) -> Fraction:
        """The value with a percent sign applied: 3/8 for 37.5 %."""
        return self.value / 100 if self.percent else self.value


def read_number(text: str) -> Number | None:
    """The one number that a text states; None if it states none, several different ones, or one that cannot be read.

    In "x = 3 · 4 = 12" it follows the last equals sign; in "1/3 ≈ 0.333" it is the exact side, if the other one is its
    rounded value. Two forms of one number ("3/8, or 37.5 %") are one. Words and units around it are ignored, but not
    those that change it ("not 12", "at least 12", "12 or more", "12!", "3 · 4", "5-7", "12 x").
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

    They are compared as exact fractions. If the wanted one is a decimal with k places, the given one is first rounded
    to k places (half away from zero), because a decimal may be a rounded answer; to accept 2.5 but not 2.54, write the
    wanted one as 5/2. "37.5 %" is 0.375. If the wanted one is a percentage, a bare 37.5 counts as one, too; if it is a
    bare number above 1, a percent sign may be a unit ("by how many percent?").
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
    """Text in plain signs and digits: LaTeX, typographic signs and number words replaced."""
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
    """Number words as digits: "two hundred and five" is 205, "three and a half" 3 1/2, "minus two thirds" -2/3."""
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


_LEAD = r"(?i:(?:the|my|correct|right|best|final|answer|option|choice|letter|statement|is|it|must|be|would)\b[\s:]*)*"
_NAMED = re.compile(
    rf"{_LEAD}(?:\((?P<enclosed>[A-Za-z])\)|(?P<listed>[A-Za-z])\)|(?P<capital>[A-Z])(?:[.:,;]|\s*[-–—]\s|$)"
    r"|(?P<small>[a-z])\.?$|(?P<argued>[A-Z])(?=\s+(?i:because|since|is (?:the )?(?:correct|right|best)|\()))",
)
_LAST_NAMED = re.compile(r"[^()]*\((?P<letter>[A-Za-z])\)")
#: Other options in the rest of the text: capitals that stand alone, but not an article, "I", or letters in parentheses.
_OTHERS = re.compile(r"\b(?:[B-HJ-Z]|[AI](?!\s+\w|'))\b|(?<=\()[a-z](?=\))")
_LETTERS = re.compile(r"[a-z](?:[\s,;]+(?:and\s+)?[a-z])+")
_UNDONE = re.compile(r"\W*(?:or|and|nor|is (?:not|wrong|incorrect))\b", re.IGNORECASE)
_DENIED = re.compile(r"\b(?:not|nor|neither|never|no|or|wrong|incorrect)\b|n't\b", re.IGNORECASE)


def numeric(given: str, wanted: str) -> bool:
    r"""Whether a text states the wanted number: see `read_number` for forms and `same_number` for values.

    Form: "x = 12.", "$\frac{3}{8}$", "1,234.50", "1.2 × 10^3", "twelve", "two thirds", "37.5 %", "about 12", "12
    apples" (units are not checked). Value: "12 or 13", "at least 12" and "0.33" for 1/3 are rejected.
    """
    answer, right = read_number(given), read_number(wanted)
    return answer is not None and right is not None and same_number(answer, right)


def choice(given: str, wanted: str) -> bool:
    """Whether a text names only the wanted option, by its letter.

    The letter opens the text: "B", "b", "(B)", "B.", "B) the blue one", "option B", "the answer is B because it is
    heavier"; or it closes it in parentheses: "the blue one (B)". "A blue one", "A or B", "not B" and "B, not C" (which
    letters alone do not settle) name none.
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
    """Whether two texts are the same except for typesetting, emphasis, quotes, spacing, case and the final period.

    Single letters may be listed in any format: "Q, R and S" is "QRS".
    """
    return _normal(given) == _normal(wanted) != ""


def _normal(text: str) -> str:
    text = re.sub(r"\s*,\s*", ", ", re.sub(r"\s+", " ", untypeset(text)))
    text = text.strip(" .*_\"'").casefold()
    return re.sub(r"\band\b|\W", "", text) if _LETTERS.fullmatch(text) else text


GRADERS: dict[str, Callable[[str, str], bool]] = {"numeric": numeric, "choice": choice, "exact": exact}

"""What a response gives as its answer, and whether that is the right one: forgiving of form, strict of value.

`final_answer` is the one rule for where an answer stands; `Trace.answer`, `Trace.correct` and the benchmarks' read-out
use it. Graders that take the last number of a text, such as math-verify 0.9, read 18 in "17 or 18", "at least 18" and
"not 18", and nothing in "eighteen".
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import partial
from itertools import pairwise

_SKIPPED = r"(?:[\s*_]|\\\[|\$\$)*"
#: A label before an answer: "Answer:", "The final answer is", or "Final answer" alone on a line as a heading.
_LABEL = re.compile(
    rf"(?P<label>\banswer[\s*_]*:|^[#*_ ]*(?:the )?(?:final )?answer[*_ ]*$){_SKIPPED}(?P<text>.+)"
    rf"|\banswer[\s*_]*\bis\b\s*:?{_SKIPPED}(?P<said>.+)",
    re.IGNORECASE | re.MULTILINE,
)
#: Where a number is asked for, two more labels: GSM8K's "#### 18" (with words after it, a heading), "18 is the answer".
_MARK = re.compile(
    r"^#{4}[ \t]*(?P<mark>[-−+$€£\d.,/]*\d[ \t]*%?)\.?[ \t]*$"
    r"|(?<!\S)(?P<named>[^\s\w]{0,5}\d\S{0,40}(?:[ \t][A-Za-z]{1,20})?)[ \t]is the (?:final |correct |right )*answer\b",
    re.IGNORECASE | re.MULTILINE,
)
_BRACE = re.compile(r"\\boxed\s*\{|\\[{}]|[{}]")
#: A last line that is bold from end to end and holds nothing but one number or one letter.
_LAST = re.compile(r"\*\*\s*(\$?[-−+$]?[\d.,/%]*\d%?\$?|\(?[A-Za-z]\))\s*\*\*\.?")
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|emph)\s*\{([^{}]*)\}")


def final_answer(response: str, grader: str = "exact", *, question: str = "", finished: bool = True) -> str | None:
    r"""What a response gives as its answer, or None where it gives none that can be read.

    Only what comes after the thinking counts: after the last `</think>`, and before any `<think>` that is not
    closed. A marked answer goes first, in this order:

    1. The content of the last `\boxed{…}`. Several boxes on its line are one answer ("\boxed{1} or \boxed{2}").
    2. The rest of the line after the last "Answer:", "answer is" or heading "Answer"; an "Answer:" that comes after
       the last box outranks it. Where a bold answer ends its sentence ("**Answer: No.** She may…"), only the bold part.
    3. A last line that is bold as a whole and is nothing but a number or a letter in parentheses: "**12**", "**(B)**".
       Other bold text may be a heading.

    For "exact" that is all. For "numeric" the lines "#### 18" and "18 is the answer" are labels as well, and where
    nothing is marked the last sentence that states a number counts. If it states several that differ, its answer is the
    one in bold type; else the one right after its last equals sign ("3 · 6 = 18") or "is"; else the only one that the
    question does not state ("after 3 weeks she has 18"). Where none of these tells, nothing is read. For "choice" it is
    the last sentence that names an option, if it names one only.

    Args:
        response: with or without its thinking.
        grader: the task's.
        question: the prompt, with its numbers and its options "(A) …".
        finished: whether the response ended by itself. Of one that was cut off, only a marked answer counts.

    Returns:
        For "exact" the text; for "numeric" one number, in digits; for "choice" one capital letter.
    """
    spoken = response.rpartition("</think>")[2].partition("<think>")[0]
    text = re.sub(r"<[|｜][^|｜]{0,60}[|｜]>", "", spoken)
    if grader == "numeric":
        number = _number_of(text, question, finished)
        return None if number is None else str(number)
    marked = _marked(text)
    if grader == "choice":
        return _letter(marked) if marked else _last_named(text, question) if finished else None
    return marked


def _marked(text: str) -> str | None:
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
    opened: list[re.Match[str]] = []
    for found in _BRACE.finditer(text):
        if found[0].endswith("{") and found[0] != r"\{":
            opened.append(found)
        elif found[0] == "}" and opened:
            begin = opened.pop()
            if begin[0] != "{":
                while boxes and boxes[-1][0] > begin.start():
                    boxes.pop()
                boxes.append((begin.start(), found.end(), text[begin.end() : found.start()]))
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


#: Sentences end at these, unless a small letter follows ("3 p.m. on").
_STOP = re.compile(r"(?<=[.!?])[*_)\"'”’]{0,3}\s+(?=[^\sa-z])")
_ITEM = re.compile(
    r"^[\s>]*(?:[-*•#]{1,6}\s+)?(?:(?:\d{1,2}[.)]|(?:step|part)\s+\d{1,2}\s*[:.)])\s+(?=\S))?", re.IGNORECASE
)
_LONGEST = 600
_CODE = re.compile(r"```(?!\s*(?:output|text|plaintext|plain)?\s*\n)[^`]*(?:```|\Z)", re.IGNORECASE)
_PARTING = re.compile(
    r"\W*(?:i hope|hope|let me know|please|feel free|if you (?:have|need|want|would)|would you|do you|is there|note)\b",
    re.IGNORECASE,
)
#: "one" that counts nothing. "One hundred", "twenty-one", "is one", "one." do.
_PRONOUN = re.compile(
    rf"(?<!ty )(?<![-\w])(?<!is )(?<!are )(?<!has )(?<!have )(?<!left )one\b"
    rf"(?!\W*$|-|\s+(?:{'|'.join([*_SCALES, *_PARTS])}|and\b))|\bone (?:of|way|more|by|another|who|that|which)\b",
    re.IGNORECASE,
)
_BOLD = re.compile(r"\*\*([^*\n]{1,80})\*\*")
#: What says that a number comes out.
_SIGN = re.compile(
    r"[=≈](?P<equals>)|\b(?:is|are|was|were|be|being|equals?|makes|total(?:s|ing)? of|totals)\b"
    r"(?:\s+(?:equal to|about|approximately|roughly|only|just|exactly|now|a total of|still))*",
    re.IGNORECASE,
)
#: After the result and before another number: a second statement, or more of a formula.
_JOINER = re.compile(
    r"[,;:=]|\b(?:and|or|but|so|which|leaving|then|not|plus|minus|times|while)\b|\bto\W*$", re.IGNORECASE
)
#: In front of an equals sign: what is equated is a reason for a number that came before, or a second unknown.
_REASON = re.compile(
    r"\d.*\b(?:because|since|if|where|or)\b|(?<!\w)[a-z]\w?\s*=.*(?<![\w(])[a-z]\w?\s*$", re.IGNORECASE
)
#: "18 more apples than Tom": a comparison that the number is the outcome of.
_COMPARED = re.compile(r"(?<=\d)((?:\s+[^\W\d]+){1,8})\s+than\b")
_BECAUSE = re.compile(r",?\s+(?:because|since)\b", re.IGNORECASE)
#: What only says something about a marked answer.
_ASIDE = re.compile(r",?\s+(?:which|because|since|where)\b", re.IGNORECASE)
#: Between two labels that follow one another.
_BETWEEN = re.compile(r"\W*(?:(?:so|therefore|thus|hence)\W+)?(?:the|my)?\W*(?:final|correct|right)?\W*", re.IGNORECASE)


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

    def __str__(self) -> str:
        """In digits, as `read_number` reads it: "1234.50", "-3/8", "37.5%"."""
        text = str(self.value)
        if self.places:
            whole, part = divmod(int(abs(self.value) * 10**self.places), 10**self.places)
            text = f"{'-' if self.value < 0 else ''}{whole}.{part:0{self.places}}"
        return f"{text}%" if self.percent else text


def read_number(text: str) -> Number | None:
    """The one number that a text states; None if it states none, several different ones, or one that cannot be read.

    In "x = 3 · 4 = 12" it follows the last equals sign; in "1/3 ≈ 0.333" it is the exact side, if the other one is its
    rounded value. Two forms of one number ("3/8, or 37.5 %") are one. Words and units around it are ignored, but not
    those that change it ("not 12", "at least 12", "12 or more", "12!", "3 · 4", "5-7", "12 x").
    """
    return _read(_plain(text))


def _read(text: str) -> Number | None:
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
    numbers = [_value(found) for found in _NUMBER.finditer(text)]
    around = _NUMBER.sub("#", text)
    alike = None not in numbers and len({number.plain for number in numbers if number}) == 1
    return numbers[0] if alike and "=" not in around and not _OTHERWISE.search(around) else None


def _number_of(text: str, question: str, finished: bool) -> Number | None:
    """The number that a response without its thinking gives as its answer: see `final_answer`."""
    text = _MARK.sub(lambda m: f"Answer: {m['mark'] or m['named']}", text)
    marked = _marked(text)
    if marked is None or not re.search(r"\d", _plain(marked)):
        return _last_stated(text, question) if finished else None
    for first, second in pairwise(list(_LABEL.finditer(text))[-2:]):
        if _BETWEEN.fullmatch(text[first.end() : second.start()]):
            one, other = (read_number(label["text"] or label["said"]) for label in (first, second))
            if one and other and one.plain != other.plain:
                return None
    return read_number(marked) or _result("= " + _ASIDE.split(next(_sentences(marked), ""))[0], question)


def _sentences(text: str) -> Iterator[str]:
    """The sentences of a text, at most a line long, without what numbers a list."""
    for line in text.splitlines():
        yield from (_ITEM.sub("", sentence) for sentence in _STOP.split(line) if sentence.strip())


def _last_stated(text: str, question: str) -> Number | None:
    """The number of the last sentence that states one; program code and parting words state none."""
    for sentence in reversed(list(_sentences(_CODE.sub("\n", text)))):
        sentence = _PRONOUN.sub("a", sentence[-_LONGEST:])
        if not _PARTING.match(sentence) and re.search(r"\d", _plain(sentence)):
            return _result(sentence, question)
    return None


def _result(sentence: str, question: str) -> Number | None:
    """The number that a sentence comes to: its only one, or the one that something sets apart from the others."""
    bold = {number for text in _BOLD.findall(sentence) if (number := read_number(text))}
    if len(bold) == 1:
        return bold.pop()
    text = _plain(sentence.rstrip("!?. "), words=not re.search(r"\d", sentence))
    front = _BECAUSE.split(text)[0]
    text = front if re.search(r"\d", front) else text
    text = _COMPARED.sub(r"\1 of", text)
    number = _read(text)
    if number or re.search(r"\bor\b", text):
        return number
    return _equated(text) or _not_asked(text, question)


def _equated(text: str) -> Number | None:
    """The number right after the last equals sign or "is", if what follows it only says of what it is."""
    for sign in sorted(_SIGN.finditer(text), key=lambda sign: (sign["equals"] is None, -sign.start())):
        back = text[sign.end() :]
        first, second = (*_NUMBER.finditer(back), None, None)[:2]
        if first is None or re.search(r"[^\W\d_]{2}", back[: first.start()]):
            continue
        between = back[first.end() : second.start()] if second else " of"
        if not re.match(r"\s*[^\W\d_]{2}", between) or _JOINER.search(between) or _REASON.search(text[: sign.start()]):
            return None
        return _stated("= " + back[: first.end()] + _NUMBER.sub("some", back[first.end() :]))
    return None


def _not_asked(text: str, question: str) -> Number | None:
    """The only number of a sentence that the question does not state."""
    asked = {number.plain for found in _NUMBER.finditer(_plain(question)) if (number := _value(found))}
    new = [found for found in _NUMBER.finditer(text) if (number := _value(found)) and number.plain not in asked]
    if len({found[0] for found in new}) != 1:
        return None
    return _stated(_NUMBER.sub(lambda found: found[0] if found[0] == new[0][0] else "some", text))


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


def _value(found: re.Match[str]) -> Number | None:
    """What a piece of text is worth; None for a division by zero."""
    try:
        top = _literal(found["top"])
        value = top / _literal(found["bottom"]) if found["bottom"] else top
    except ZeroDivisionError:
        return None
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


def _plain(text: str, words: bool = True) -> str:
    """In plain signs and digits: LaTeX and typographic signs replaced; number words, too, unless told not to."""
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
    return _digits(text, words)


def _fraction(found: re.Match[str]) -> str:
    digit, top, bottom = found[1], found[2] or found[3] or "", found[4] or found[5] or ""
    simple = re.fullmatch(r"\s*[-+]?[\d,.]+\s*", top) and re.fullmatch(r"\s*[\d,.]+\s*", bottom)
    return f"{digit}{' ' if digit else ''}{top.strip()}/{bottom.strip()}" if simple else found[0]


def _digits(text: str, words: bool) -> str:
    """With number words as digits: "two hundred and five" is 205, "three and a half" 3 1/2, "minus two thirds" -2/3."""
    if words:
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
_OFFERED = re.compile(r"^\(([A-Z])\) ", re.MULTILINE)
_OPTION = re.compile(r"[\s*_>-]{0,8}\(?([A-Za-z])[).:](?!\w)")
#: What a statement may begin with before it names an option.
_SO = re.compile(
    r"[\s*_>-]{0,8}(?:(?:so|therefore|thus|hence|then|in conclusion|i|we|would|will|can|choose|pick|select|go with|say|"
    r"think|believe|conclude|that)\b[\s,:]*)*",
    re.IGNORECASE,
)
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
    return _letter(given) == wanted.strip().upper()


def _letter(given: str) -> str | None:
    text = re.sub(r"\s+", " ", untypeset(given)).strip(" *_\"'")
    opening, closing = _NAMED.match(text), _LAST_NAMED.fullmatch(text.rstrip(". "))
    if opening:
        letter, rest = next(group for group in opening.groups() if group), text[opening.end() :]
        undone = _UNDONE.match(rest)
    elif closing:
        letter, rest = closing["letter"], text[: closing.start("letter") - 1]
        undone = _DENIED.search(rest)
    else:
        return None
    others = {other.upper() for other in _OTHERS.findall(rest)} - {letter.upper()}
    return None if others or undone else letter.upper()


def _last_named(text: str, question: str) -> str | None:
    """The option that the last sentence with an option's letter names; none at the end of a list of options."""
    offered = _OFFERED.findall(question)
    listed = {found[1].upper() for line in text.splitlines() if (found := _OPTION.match(line))}
    for sentence in reversed(list(_sentences(text))):
        said = _SO.sub("", sentence[-_LONGEST:], count=1)
        letter = _letter(said)
        if letter and (not offered or letter in offered):
            return None if _OPTION.match(said) and len(listed) > 1 else letter
        if any(other.upper() in offered or not offered for other in _OTHERS.findall(untypeset(said))):
            return None
    return None


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

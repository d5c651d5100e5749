"""What a response gives as its answer, and that answer without its typesetting."""

from __future__ import annotations

import re

_SKIPPED = r"(?:[\s*_]|\\\[|\$\$)*"
#: A label in front of an answer: "Answer:", "The final answer is", or "Final answer" alone on a line as a heading.
_LABEL = re.compile(
    rf"(?P<label>\banswer[\s*_]*:|^[#*_ ]*(?:the )?(?:final )?answer[*_ ]*$){_SKIPPED}(?P<text>.+)"
    rf"|\banswer[\s*_]*\bis\b\s*:?{_SKIPPED}(?P<said>.+)",
    re.IGNORECASE | re.MULTILINE,
)
_BOX = re.compile(r"\\boxed\s*\{")
#: A last line that is bold from end to end and holds nothing but one number or one letter.
_LAST = re.compile(r"\*\*\s*(\$?[-−+$]?[\d.,/%]*\d%?\$?|\(?[A-Za-z]\))\s*\*\*\.?")
_WRAPPERS = re.compile(r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mathit|mathsf|operatorname|emph)\s*\{([^{}]*)\}")


def final_answer(response: str) -> str | None:
    r"""What a response gives as its answer, or None where it gives none.

    Only what comes after the thinking counts: after the last `</think>`, and before any `<think>` that is not
    closed. In this order:

    1. The content of the last `\boxed{…}`. Several boxes on its line are one answer ("\boxed{1} or \boxed{2}").
    2. The rest of the line after the last "Answer:", "answer is" or heading "Answer"; an "Answer:" that comes after
       the last box outranks it. Where a bold answer ends its sentence ("**Answer: No.** She may…"), only the bold part.
    3. A last line that is bold as a whole and is nothing but a number or a letter in parentheses: "**12**", "**(B)**".
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
    """Without what only sets text off: boxes, text commands, mathematics' delimiters, spacing commands, bold type."""
    for begin, end, content in reversed(_boxes(text)):
        text = text[:begin] + content + text[end:]
    before = ""
    while before != text:
        before, text = text, _WRAPPERS.sub(r"\1", text)
    text = re.sub(r"(?<=\d)\\[,!:; ](?=\d{3}(?!\d))", "", text.replace("{,}", ",").replace("\\%", "%"))
    text = re.sub(r"\\[()\[\]]|\\?\$|\*\*|__|`", "", text)
    text = re.sub(r"\\(?:[,;:! ]|(?:quad|qquad|left|right|displaystyle)\b)", " ", text)
    return re.sub(r"[\u2018\u2019]", "'", re.sub(r"[\u201c\u201d]", '"', text))

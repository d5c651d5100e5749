"""The schemas of public benchmarks: what one record of each says, in every form that it is published in.

- GSM8K (Cobbe et al., arXiv 2110.14168; on the hub openai/gsm8k, "main"): `question`, and `answer` with the steps and
  then "#### 18".
- ARC (Clark et al., arXiv 1803.05457; allenai/ai2_arc, "ARC-Challenge"): `id`, `question`, `choices` with lists `text`
  and `label` (letters or digits), `answerKey`. In the authors' files `question` holds `stem` and a list of `choices`.
- CommonsenseQA (Talmor et al., arXiv 1811.00937; tau/commonsense_qa): the same two forms. Test answers are hidden.
- PIQA (Bisk et al., arXiv 1911.11641; ybisk/piqa): `goal`, `sol1`, `sol2`, `label` 0 or 1. The authors keep the labels
  of `x.jsonl` in `x-labels.lst`. Test answers are hidden.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from string import ascii_uppercase
from typing import Any

from lensteer.errors import LensteerError

_HIDDEN = "a hidden answer cannot be graded, take the validation part"


@dataclass(frozen=True)
class Reading:
    """What one record says; `steps` to the answer only where the benchmark publishes them."""

    prompt: str
    answer: str
    grader: str
    steps: str = ""


def read_gsm8k(values: Mapping[str, Any], where: str) -> Reading:
    """A record of GSM8K, without its calculator annotations "<<48/2=24>>".

    Raises:
        LensteerError: one that is not of this form; `where` says which.
    """
    question = _text(values, "question", where)
    steps, mark, answer = _text(values, "answer", where).rpartition("####")
    if not mark or not answer.strip():
        raise LensteerError(f"{where}: the answer has to end in '#### 18' or so, it is {values['answer']!r:.200}")
    return Reading(question, answer.strip().replace(",", ""), "numeric", re.sub("<<.*?>>", "", steps).strip())


def read_choice(values: Mapping[str, Any], where: str) -> Reading:
    """A record of ARC or CommonsenseQA.

    Raises:
        LensteerError: one that is not of this form, or whose answer is hidden; `where` says which.
    """
    nested = values.get("question")
    inner = nested if isinstance(nested, dict) else values
    stem = _text(inner, "question" if inner is values else "stem", where)
    choices = inner.get("choices")
    if isinstance(choices, list) and all(isinstance(choice, dict) for choice in choices):
        choices = {key: [choice.get(key) for choice in choices] for key in ("text", "label")}
    texts, labels = (choices.get(key) if isinstance(choices, dict) else None for key in ("text", "label"))
    if not isinstance(texts, list) or not isinstance(labels, list) or len(texts) != len(labels):
        raise LensteerError(f"{where}: choices need a text and a label each, they are {choices!r:.200}")
    key, named = str(values.get("answerKey") or ""), [str(label) for label in labels]
    if not key:
        raise LensteerError(f"{where} has no answerKey: {_HIDDEN}")
    if named.count(key) != 1:
        raise LensteerError(f"{where}: answerKey {key!r} has to be one of the labels, which are {named}")
    return Reading(_lettered(stem, texts, where), ascii_uppercase[named.index(key)], "choice")


def read_piqa(values: Mapping[str, Any], where: str) -> Reading:
    """A record of PIQA.

    Raises:
        LensteerError: one that is not of this form, or whose answer is hidden; `where` says which.
    """
    label = str(values.get("label", ""))
    goal, solutions = _text(values, "goal", where), [_text(values, key, where) for key in ("sol1", "sol2")]
    if label in ("", "None", "-1"):
        raise LensteerError(f"{where} has no label, and there is no file of labels beside it: {_HIDDEN}")
    if label not in ("0", "1"):
        raise LensteerError(f"{where}: label {label!r} is neither 0 (sol1) nor 1 (sol2)")
    return Reading(_lettered(goal, solutions, where), "AB"[int(label)], "choice")


def _lettered(question: str, options: list[Any], where: str) -> str:
    """A question with its options on lines of their own, "(A)" and so on whatever their labels were."""
    if not 2 <= len(options) <= len(ascii_uppercase) or not all(isinstance(o, str) and o.strip() for o in options):
        raise LensteerError(f"{where}: a question needs 2 to 26 options, each a text, it has {options!r:.200}")
    lines = (f"({letter}) {option.strip()}" for letter, option in zip(ascii_uppercase, options, strict=False))
    return "\n".join([question, *lines])


def _text(values: Mapping[str, Any], key: str, where: str) -> str:
    found = values.get(key)
    if not isinstance(found, str) or not found.strip():
        raise LensteerError(f"{where}: {key!r} has to be a text, it is {found!r:.80}; the record has {sorted(values)}")
    return found.strip()

"""What a judge's reply says, however it says it, and what to ask next. Knows of no server and no file.

Any text is read without an exception, and no label but the known ones ever comes out.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Generator, Sequence
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

from lensteer.alignment import align
from lensteer.annotation.judge_prompt import Messages, question
from lensteer.annotation.published import parse_published
from lensteer.annotation.sentences import label_intervals
from lensteer.behaviors import REASONING, UNPARSED, LabelScheme

#: Questions about one chunk: the first, and more for as long as each answer brings a label.
MAX_QUESTIONS = 5

_OBJECT = re.compile(r"\{[^{}]*\}")  # entries are flat, so each complete one is found in prose and in cut JSON, too
_BETWEEN = re.compile(r"[\s_\-‐‑–]+")


@dataclass(frozen=True)
class Remark:
    """Something about a chain's annotation that did not go as asked.

    Attributes:
        kind: "retried" (the server failed first), "repaired" (read although not as asked), "malformed" (could not be
            read), "asked again" or "unlabeled" (a sentence that is left without a label).
        at: the sentence's index in its chain; None if it concerns a whole reply.
        text: the sentence, or the beginning of the reply.
        reason: why.
    """

    kind: str
    at: int | None
    text: str
    reason: str


@dataclass(frozen=True)
class Answer:
    """What came back for one question.

    Attributes:
        text: what the judge said.
        cut: whether the server says that it was cut off.
        refused: why there is no text, if there is none.
        retried: what failed on the way, in words.
    """

    text: str
    cut: bool = False
    refused: str = ""
    retried: tuple[str, ...] = ()


#: Questions out, answers in; in the end the label of each sentence by index, and what did not go as asked.
Talk = Generator[Messages, Answer, tuple[dict[int, str], list[Remark]]]


@dataclass
class Reply:
    """What a reply says about the sentences numbered from 1.

    Attributes:
        labels: known labels by number.
        wrong: why a number that was mentioned has no label.
        mended: how a label was spelled that was read all the same.
        faults: what is the matter with the reply as a whole.
        repairs: in what other form it came and was read.
    """

    labels: dict[int, str] = field(default_factory=dict)
    wrong: dict[int, str] = field(default_factory=dict)
    mended: dict[int, str] = field(default_factory=dict)
    faults: list[str] = field(default_factory=list)
    repairs: list[str] = field(default_factory=list)


def parse_reply(text: str, sentences: Sequence[str], labels: Sequence[str] = REASONING.labels) -> Reply:
    """Read a reply to a question about `sentences`, which may have these labels.

    Understood are `{"labels": [{"n": 1, "label": "..."}]}`, the same amid prose or a code fence or cut off, an object
    of numbers and labels, and the published format `["label"] text ["end-section"]`, whose text may be edited.
    """
    said = text.rpartition("</think>")[2]
    entries = _entries(said) or _entries(text)
    if not entries:
        return _published(said if said.strip() else text, sentences, labels)
    reply = Reply()
    if not said.strip().startswith("{") or not said.strip().endswith("}"):
        reply.repairs.append("the JSON stands in other text, or is cut off")
    strays: list[str] = []
    known = {_plain(label): label for label in labels}
    for number, raw in entries:
        n = _number(number, len(sentences))
        if n is None:
            strays.append(str(number)[:20])
            continue
        label = known.get(_plain(str(raw)), "")
        if not label:
            reply.wrong[n] = f"{str(raw)[:40]!r} is not one of the labels"
        elif reply.labels.setdefault(n, label) != label:
            reply.wrong[n] = f"it has the labels {reply.labels[n]!r} and {label!r}"
        elif label != raw:
            reply.mended[n] = str(raw)[:40]
    for n in reply.wrong:
        reply.labels.pop(n, None)
        reply.mended.pop(n, None)
    if strays:
        reply.faults.append(f"numbers that no sentence has: {', '.join(strays[:10])}")
    return reply


def converse(
    task: str, sentences: Sequence[str], wanted: Sequence[int], *, context: int, scheme: LabelScheme = REASONING
) -> Talk:
    """Questions about some sentences of a chain, one after the other; send the answers in.

    Sentences without a usable label are asked for again, with what was wrong: twice at most where the label was not
    one, and for as long as each answer brings some (`MAX_QUESTIONS`).

    Returns:
        The label of every wanted sentence, `UNPARSED` for those that have none, and what did not go as asked.
    """
    labels: dict[int, str] = {}
    remarks: list[Remark] = []
    misnamed: Counter[int] = Counter()
    reasons: dict[int, str] = {}
    left, complaint = list(wanted), ""
    for turn in range(MAX_QUESTIONS):
        answer = yield question(task, sentences, left, context=context, scheme=scheme, complaint=complaint)
        remarks += [Remark("retried", None, "", reason) for reason in answer.retried]
        if answer.refused:
            reasons.update(dict.fromkeys(left, answer.refused))
            break
        reply = parse_reply(answer.text, [sentences[i] for i in left], scheme.labels)
        head = answer.text[:80]
        faults = [*reply.faults, *(["the reply was cut off"] if answer.cut else [])]
        remarks += [Remark("malformed", None, head, fault) for fault in faults]
        remarks += [Remark("repaired", None, head, repair) for repair in reply.repairs]
        numbers = dict(enumerate(left, 1))
        for n, index in numbers.items():
            if n in reply.labels:
                labels[index] = reply.labels[n]
                if n in reply.mended:
                    remarks.append(Remark("repaired", index, sentences[index], f"label spelled {reply.mended[n]!r}"))
            else:
                reasons[index] = reply.wrong.get(n, "the reply has no label for it")
                misnamed[index] += n in reply.wrong
        left = [i for i in left if i not in labels and misnamed[i] < 2]
        if not left or (turn and not reply.labels) or turn + 1 == MAX_QUESTIONS:
            break
        faulty: dict[str, list[str]] = {}
        for n, index in enumerate(left, 1):
            faulty.setdefault(reasons[index], []).append(f"[{n}]")
        complaint = "; ".join([*faults, *(f"{', '.join(ns)}: {reason}" for reason, ns in faulty.items())])
        remarks += [Remark("asked again", i, sentences[i], reasons[i]) for i in left]
    for i in wanted:
        if i not in labels:
            remarks.append(Remark("unlabeled", i, sentences[i], reasons[i]))
    return {i: labels.get(i, UNPARSED) for i in wanted}, remarks


def _plain(label: str) -> str:
    """A label as a judge may have spelled it, without quotes, capitals and what stands between its words."""
    return _BETWEEN.sub("-", label.strip(" \t\r\n\"'`[].*").lower())


def _entries(text: str) -> list[tuple[Any, Any]]:
    """Pairs of what should be a number and what should be a label, from every complete flat object in a text."""
    entries: list[tuple[Any, Any]] = []
    for found in _OBJECT.finditer(text):
        try:
            values = json.loads(found[0])
        except (ValueError, RecursionError):
            continue
        if "n" in values and "label" in values:
            entries.append((values["n"], values["label"]))
        else:
            entries += [(key, value) for key, value in values.items() if key.strip().isdecimal()]
    return entries


def _number(value: object, n_sentences: int) -> int | None:
    text = str(value).strip(" .#[]()")
    if not (text.isdecimal() and len(text) < 10):
        return None
    return int(text) if 1 <= int(text) <= n_sentences else None


def _published(text: str, sentences: Sequence[str], known: Sequence[str]) -> Reply:
    """Labels from the published format: its sections are placed in the sentences, edited as they may be."""
    sections = parse_published(text, known)[0]
    page = "\n".join(sentences)
    ends = list(accumulate(len(s) + 1 for s in sentences))
    places = [(end - 1 - len(s), end - 1) for end, s in zip(ends, sentences, strict=True)]
    spans = align(sections, page, range(len(page)), prompt_length=1).spans if sections else ()
    labels = label_intervals(page, places, spans)
    reply = Reply({n: label for n, label in enumerate(labels, 1) if label is not None})
    if reply.labels:
        reply.repairs.append("the published format instead of JSON")
    else:
        reply.faults.append("no label in it" if text.strip() else "it is empty")
    return reply

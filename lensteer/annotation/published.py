"""Reads and writes chains in the published annotation format (arXiv 2506.18167).

A judge wrapped each part of a chain as `["label"] text ["end-section"]`. Its output has missing quotes and marks,
numbered labels and edited text; the report lists what was repaired or lost, and where.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd

from lensteer import models
from lensteer.annotation.alignment import AlignmentReport, align
from lensteer.behaviors import BEHAVIORS, Sentence
from lensteer.errors import LensteerError
from lensteer.files import read_jsonl
from lensteer.tasks import Task
from lensteer.traces import Trace, with_spans

END = "end-section"
UNQUOTED, STRAY = "label without quotes", "stray label"
UNCLOSED, UNOPENED, OUTSIDE, EMPTY = "section without an end", "end without a label", "text in no section", "no text"
_MARK = re.compile(rf'\["([^"\]\n]*)"\]|\[(?:\d+\.\s*)?({"|".join(map(re.escape, (*BEHAVIORS, END)))})\]')


@dataclass(frozen=True)
class Problem:
    """A violation of the format in an annotation.

    Attributes:
        kind: "label without quotes" or "section without an end" (read anyway), "stray label", "end without a
            label", "text in no section" or "no text" (not read).
        at: its first character in the annotation.
        text: the mark, or the text that was not read.
    """

    kind: str
    at: int
    text: str


@dataclass(frozen=True)
class PublishedReport:
    """How a file of annotations was read; all tuples have one entry per chain.

    Attributes:
        chains: ids of the traces.
        alignments: what was placed, repaired and dropped, of the sections that were read.
        problems: of the format.
    """

    chains: tuple[str, ...]
    alignments: tuple[AlignmentReport, ...]
    problems: tuple[tuple[Problem, ...], ...]

    @property
    def n_matched(self) -> int:
        """Sections whose text occurs in their chain unchanged."""
        return sum(report.matched for report in self.alignments)

    @property
    def n_repaired(self) -> int:
        """Sections that were placed although the judge had changed their text."""
        return sum(len(report.repaired) for report in self.alignments)

    @property
    def n_dropped(self) -> int:
        """Sections that could not be placed."""
        return sum(len(report.dropped) for report in self.alignments)

    @property
    def n_sections(self) -> int:
        """Sections with a known label and text."""
        return self.n_matched + self.n_repaired + self.n_dropped

    @property
    def placed(self) -> float:
        """Share of the sections that have a span."""
        return 1 - self.n_dropped / self.n_sections if self.n_sections else 1.0

    def to_dataframe(self) -> pd.DataFrame:
        """One row for everything that was repaired or dropped, and for every violation of the format.

        `at` is the section's number in its chain for "repaired" and "dropped", else a character of the annotation.
        """
        rows: list[tuple[str, str, int, str, str, float | None]] = []
        for chain, report, problems in zip(self.chains, self.alignments, self.problems, strict=True):
            rows += [(chain, "repaired", r.index, r.text, r.found, r.similarity) for r in report.repaired]
            rows += [(chain, "dropped", d.index, d.text, d.reason, None) for d in report.dropped]
            rows += [(chain, p.kind, p.at, p.text, "", None) for p in problems]
        return pd.DataFrame(rows, columns=["chain", "kind", "at", "text", "found", "similarity"])


def parse_published(annotated: str, labels: Sequence[str] = BEHAVIORS) -> tuple[list[Sentence], list[Problem]]:
    """The sections of one annotation that have a known label and text, and all violations of the format.

    A section ends at the next mark, whether an end or another label. A label without quotes (`[deduction]`,
    `[1. deduction]`) counts if it is a known one.
    """
    sentences: list[Sentence] = []
    problems: list[Problem] = []
    label: str | None = None
    opened = after = 0  # where the open section's mark begins, and where the last mark ends
    marks = [*_MARK.finditer(annotated), None]
    for mark in marks:
        at = mark.start() if mark else len(annotated)
        name = (mark[1] if mark[2] is None else mark[2]) if mark else None
        text = annotated[after:at].strip()
        if label is not None:
            if label not in labels:
                problems.append(Problem(STRAY, opened, annotated[opened:at].strip()))
            elif not text:
                problems.append(Problem(EMPTY, opened, annotated[opened:at].strip()))
            else:
                sentences.append(Sentence(label, text))
            if name != END:
                problems.append(Problem(UNCLOSED, opened, annotated[opened:after]))
        elif text:
            problems.append(Problem(OUTSIDE, after, text))
        if mark and mark[2] is not None:
            problems.append(Problem(UNQUOTED, at, mark[0]))
        if mark and label is None and name == END:
            problems.append(Problem(UNOPENED, at, mark[0]))
        label, opened, after = (None if name == END else name), at, mark.end() if mark else at
    return sentences, problems


def read_published(
    path: str | Path,
    tokenizer: Any = None,
    *,
    labels: Sequence[str] = BEHAVIORS,
    marks: models.Marks | None = None,
) -> tuple[list[Trace], PublishedReport]:
    """Annotated traces from a JSONL file with `response` and `annotated` on each line.

    The file does not hold the full prompt of the model. A trace's prompt is empty (or an open thought, if the response
    opens none) and is represented by one token with the id 0, so that no span begins at position 0. Tasks are
    named `published-000` and so on, and hold the line's `prompt`, if there is one.

    Args:
        path: the file.
        tokenizer: a Hugging Face tokenizer, which re-encodes the response; the ids may differ from those that were
            generated, and decode to another text if the tokenizer normalizes (offsets are into the file's text even
            then). Without one, every character is a token with the id 0, enough for code that reads text only.
        labels: that sections may have.
        marks: of the model that the chains are for: a chain's own ones, if it has others, become these. None: they
            stay as they are.

    Returns:
        The traces, in the file's order, and what was placed, repaired and dropped.

    Raises:
        LensteerError: no such file, a line without these texts, or a slow tokenizer that changes a text.
    """
    traces, alignments, problems = [], [], []
    for i, (number, row) in enumerate(read_jsonl(Path(path))):
        response, annotated = row.get("response"), row.get("annotated")
        if not isinstance(response, str) or not isinstance(annotated, str):
            raise LensteerError(f"{path}, line {number} has {sorted(row)}: give the texts 'response' and 'annotated'")
        sentences, found = parse_published(annotated, labels)
        theirs = models.marks_in(response)
        if marks is not None and marks[0] and theirs[0]:
            response = response.replace(theirs[0], marks[0], 1).replace(theirs[1], marks[1], 1)
            theirs = marks
        opens, closes = theirs if theirs[0] else (models.OPEN_THINKING, models.CLOSE_THINKING)
        ids, offsets = _tokens(response, tokenizer, f"published-{i:03}")
        alignment = align(sentences, response, offsets, prompt_length=1)
        trace = Trace(
            task=Task(f"published-{i:03}", "published", "train", str(row.get("prompt", ""))),
            prompt="" if opens in response else opens,
            response=response,
            prompt_ids=(0,),
            response_ids=ids,
            offsets=offsets,
            finished=closes in response,
            marks=(opens, closes),
        )
        unread = len(alignment.report.dropped) + sum(p.kind in (STRAY, OUTSIDE) for p in found)
        traces.append(with_spans(trace, alignment.spans, unread))
        alignments.append(alignment.report)
        problems.append(tuple(found))
    return traces, PublishedReport(tuple(t.id for t in traces), tuple(alignments), tuple(problems))


def write_published(trace: Trace) -> str:
    """The annotation of a trace in the published format; `parse_published` recovers its spans' labels and texts.

    Raises:
        LensteerError: a span's text holds a mark of the format itself.
    """
    parts = []
    for span in trace.spans:
        text = trace.response[span.char_start : span.char_end]
        if mark := _MARK.search(text):
            raise LensteerError(
                f"{trace.id}: the text of a span holds {mark[0]!r}, which the format uses: leave it out"
            )
        parts.append(f'["{span.label}"] {text} ["{END}"]')
    return "\n\n".join(parts)


def _tokens(text: str, tokenizer: Any, chain: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Ids and the first character of each token, as `models.decode_offsets` gives it for generated traces.

    Some tokenizers change the text before they encode it (Unicode's composed form, blanks at its ends), so their ids
    decode to another one. Then the tokenizer's own offsets, which are into the text as it was handed in, are used, and
    tokens that share a character get one start, as the decoder's have.
    """
    if tokenizer is None:
        return (0,) * len(text), tuple(range(len(text)))
    ids = tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    decoded, starts = models.decode_offsets(tokenizer, ids)
    if decoded == text:
        return ids, tuple(starts)
    try:
        offsets = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)["offset_mapping"]
    except NotImplementedError as error:
        at = next(n for n in range(len(text) + 1) if decoded[: n + 1] != text[: n + 1])
        raise LensteerError(
            f"{chain}: the tokenizer's ids decode to another text from character {at} on ({decoded[at : at + 20]!r} "
            f"for {text[at : at + 20]!r}), and it gives no offsets: give a fast tokenizer, or none"
        ) from error
    starts, covered = [], 0
    for start, end in offsets:
        starts.append(start if start >= covered else starts[-1])
        covered = max(covered, end)
    return ids, tuple(starts)

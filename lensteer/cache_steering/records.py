"""Solved questions from files: the written set that comes with the package, or a file of one's own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lensteer.cache_steering.pairs import Record
from lensteer.errors import LensteerError
from lensteer.files import read_jsonl

_WRITTEN = Path(__file__).parent.parent / "data" / "records.jsonl"


def load_records(source: str | Path = "builtin") -> list[Record]:
    """Solved questions, in the order of their file.

    Args:
        source: "builtin" for the written set (100 questions, each solved in every style of `STYLES`), or a JSONL file
            with `question, steps, answer` on every line: steps a text, which counts as "stepwise", or a mapping from
            style to text. Other fields, such as an id, are passed over.

    Raises:
        LensteerError: no such file, an empty one, or a line that is no record.
    """
    path = _WRITTEN if source == "builtin" else Path(source)
    return [_record(values, f"{path}, line {number}") for number, values in read_jsonl(path)]


def _record(values: Mapping[str, Any], where: str) -> Record:
    for name in ("question", "answer"):
        if not _is_text(values.get(name)):
            raise LensteerError(f"{where}: {name!r} is {values.get(name)!r}, give it as a text that is not empty")
    steps = values.get("steps")
    if isinstance(steps, str):
        steps = {"stepwise": steps}
    if not isinstance(steps, dict) or not steps or not all(map(_is_text, [*steps, *steps.values()])):
        raise LensteerError(f"{where}: 'steps' is {steps!r}, give a text, or a mapping from style to text")
    return Record(values["question"], steps, values["answer"])


def _is_text(value: object) -> bool:
    return isinstance(value, str) and bool(value.strip())

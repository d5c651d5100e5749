"""Files that survive a kill at any byte, and lines that are read for what they are."""

from __future__ import annotations

import codecs
import json
import os
import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

import lensteer as ls
from lensteer import models
from lensteer.annotation import annotate, read_published
from lensteer.annotation.judge import Judge, JudgeScore
from lensteer.behaviors import LabelScheme, Sentence
from lensteer.cache_steering.pairs import Record, load_records
from lensteer.contrast.pairs import Text, load_pairs, pair_up
from lensteer.errors import LensteerError
from lensteer.evaluation import Condition
from lensteer.files import (
    SEAL,
    append_jsonl,
    check_text,
    drop_cut_line,
    parse_json,
    read_json,
    read_jsonl,
    read_text,
    unseal,
    write_atomically,
    write_json,
)
from lensteer.metrics import compression
from lensteer.tasks import Task, load_tasks
from lensteer.tasks.benchmarks import load_benchmark
from lensteer.traces import Trace, load_traces, save_traces

ROWS: list[dict[str, Any]] = [{"a": 1}, {"text": "one\u2028two\x85three\ufeff"}, {"🤔": [None, 0.1]}]


def test_a_file_is_written_whole_in_a_folder_that_is_made(tmp_path):
    path = tmp_path / "deep" / "er" / "file.json"
    write_atomically(path, "naïve 🤔\n")
    assert path.read_bytes() == "naïve 🤔\n".encode()
    write_atomically(path, b"\x00\xff")
    assert path.read_bytes() == b"\x00\xff"
    assert [p.name for p in path.parent.iterdir()] == ["file.json"]


@pytest.mark.parametrize("stop", [OSError, KeyboardInterrupt])
@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_stops_a_write_leaves_the_old_file_and_no_other(call, stop, tmp_path, monkeypatch):
    path = tmp_path / "file.json"
    write_atomically(path, "old")

    def fail(*_):
        assert path.read_text() == "old"
        raise stop("no room")

    monkeypatch.setattr(os, call, fail)
    with pytest.raises(stop):
        write_atomically(path, "new")
    assert path.read_text() == "old"
    assert [p.name for p in tmp_path.iterdir()] == ["file.json"]


def test_lines_are_appended_and_read_back_with_their_numbers(tmp_path):
    path = tmp_path / "deep" / "rows.jsonl"
    for row in ROWS:
        append_jsonl(path, [row])
    append_jsonl(path, [])
    with path.open("a") as file:
        file.write(f"\n  \n{json.dumps(ROWS[0])}\n")  # of somebody else, without a digest
    assert read_jsonl(path) == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[2]), (6, ROWS[0])]


def test_a_digest_holds_for_values_and_not_for_their_layout(tmp_path):
    path = tmp_path / "values.json"
    values = {"9": [1.5, 1e-7, None, True], "10": {"b": "é\u2028", "a": []}, "2": (1, 2)}
    write_json(path, values)
    assert read_json(path) == json.loads(json.dumps(values))
    path.write_text(json.dumps(json.loads(path.read_text()), ensure_ascii=False))
    assert read_json(path)["2"] == [1, 2]
    edited = json.loads(path.read_text()) | {"2": [1, 3]}
    path.write_text(json.dumps(edited))
    with pytest.raises(LensteerError, match=rf"values.json does not match its '{SEAL}'.* remove that entry"):
        read_json(path)
    del edited[SEAL]
    path.write_text(json.dumps(edited))
    assert read_json(path)["2"] == [1, 3]


def test_lines_end_as_those_of_windows(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(b'{"a": 1}\r\n\r\n{"a": 2}')
    assert [values["a"] for _, values in read_jsonl(path)] == [1, 2]


@given(n=st.integers(0, 3), cut=st.integers(0, 60))
def test_a_cut_at_any_byte_leaves_the_whole_lines_before_it(tmp_path_factory, n, cut):
    path = tmp_path_factory.mktemp("cut") / "rows.jsonl"
    lines = [(json.dumps(row, ensure_ascii=False) + "\n").encode() for row in ROWS[:n]]
    whole = b"".join(lines)
    path.write_bytes(whole[: min(cut, len(whole))])
    kept = [line for i, line in enumerate(lines) if len(b"".join(lines[: i + 1])) <= cut]
    assert drop_cut_line(path) == bool(kept)
    assert path.read_bytes() == b"".join(kept)
    assert drop_cut_line(path) == bool(kept)  # nothing is left to drop


def test_no_file_has_no_line(tmp_path):
    assert not drop_cut_line(tmp_path / "none.jsonl")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "is empty"),
        (b"\n \n", "is empty"),
        (b'{"a": 1}\n{"a": ', "line 2 is not JSON"),
        (b'{"a": 1}\n\n[1]\n', "line 3 is not a JSON object"),
        (b'{"a": 1}\n{"a": "\xff"}\n', "line 2 is not JSON"),
        (b"\x00\x00", "line 1 is not JSON"),
    ],
)
def test_bad_lines_are_named(data, words, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(data)
    with pytest.raises(LensteerError, match=words) as error:
        read_jsonl(path)
    assert str(path) in str(error.value)


def test_a_missing_file_and_a_folder_are_named(tmp_path):
    for path in (tmp_path / "none.jsonl", tmp_path):
        with pytest.raises(LensteerError, match="no file"):
            read_jsonl(path)


# --- what UTF-8 can't hold, and what it can -------------------------------------------------------

TRACE = Trace(
    Task("t", "c", "dev", "2?"), "p", "It is \0 or \ufeff4.", (1,), (1, 2), (0, 6), True, prefill="\ufeffWell\0"
)


def both_splits(name: str, path: Path) -> list[Task]:
    return [task for split in ("dev", "test") for task in load_benchmark(name, path, split=split)]


#: Every reader of lines, with a line that it reads.
READERS = {
    "lines": (read_jsonl, {"text": "x"}),
    "tasks": (load_tasks, {"id": "t", "category": "c", "split": "dev", "prompt": "x"}),
    "traces": (load_traces, json.loads(json.dumps(asdict(TRACE))) | {"prompt": "x"}),
    "published chains": (read_published, {"response": "x", "annotated": '["deduction"] x ["end-section"]'}),
    "plain pairs": (load_pairs, {"positive": "x", "negative": "y"}),
    "A/B questions": (
        load_pairs,
        {"question": "x", "answer_matching_behavior": "(A)", "answer_not_matching_behavior": "(B)"},
    ),
    "persona": (load_pairs, {"instruction": [{"pos": "x", "neg": "y"}], "questions": ["z"]}),
    "solved questions": (load_records, {"question": "x", "steps": "x", "answer": "4"}),
    "gsm8k": (lambda path: both_splits("gsm8k", path), {"question": "x", "answer": "So. #### 4"}),
    "piqa": (lambda path: both_splits("piqa", path), {"goal": "x", "sol1": "a", "sol2": "b", "label": 0}),
}
every_reader = pytest.mark.parametrize(("read", "row"), READERS.values(), ids=READERS.keys())


def lines_of(row: dict, *texts: str) -> str:
    """The row once for each text, in place of its x's, with ids of their own; in ASCII."""
    return "".join(
        json.dumps(row | ({"id": f"t{n}"} if "id" in row else {})).replace('"x"', json.dumps(text)) + "\n"
        for n, text in enumerate(texts)
    )


@every_reader
@pytest.mark.parametrize("mark", ["", "\ufeff"], ids=["", "mark"])
def test_a_byte_order_mark_is_no_text_and_nul_is(read, row, mark, tmp_path):
    """Windows' editors write the mark. NUL and U+FEFF within a text are part of it."""
    path = tmp_path / "rows.jsonl"
    texts = ["one\0two\ufeff", "\ufeffthree"]
    many = texts if row != READERS["persona"][1] else texts[:1]
    path.write_bytes((mark + lines_of(row, *many)).encode())
    read_with = read(path)
    path.write_bytes(lines_of(row, *many).encode())
    assert read_with == read(path)
    assert "one\\x00two\\ufeff" in repr(read_with)
    path.write_bytes("".join(mark + line + "\n" for line in lines_of(row, *many).splitlines()).encode())
    if len(many) > 1:  # files that were joined
        assert repr(read(path)) == repr(read_with)


@every_reader
@pytest.mark.parametrize("encoding", ["utf-16", "utf-16-le", "utf-16-be", "utf-32"])
def test_another_encoding_is_named(read, row, encoding, tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_bytes(lines_of(row, "one", "two").encode(encoding))
    name = encoding[:6].upper()
    with pytest.raises(LensteerError, match=rf"rows.jsonl is {name}, .*: save it as UTF-8"):
        read(path)


@every_reader
@pytest.mark.parametrize(
    "half", ["\ud800", "so \udc00", "\udc00\ud800", "\ud83d\ud83e\udd14", "\\\\\udfffx", "a" * 99 + "\udbff"]
)
def test_half_a_character_is_refused_where_it_is_read(read, row, half, tmp_path):
    path = tmp_path / "rows.jsonl"
    whole = ["first \\ud800", "\U0001f914 second"]  # a backslash and letters, and two escapes that are one character
    text = lines_of(row, *whole, half, "last") if row != READERS["persona"][1] else lines_of(row, half)
    number = 3 if row != READERS["persona"][1] else 1
    path.write_text(text, encoding="utf-8")
    with pytest.raises(LensteerError, match=rf"rows.jsonl, line {number}, column \d+ has '\\ud[0-9a-f]+'") as error:
        read(path)
    column, said = re.search(r"column (\d+) has '(\\u\w{4})'", str(error.value)).groups()
    assert text.splitlines()[number - 1][int(column) - 1 :].startswith(said)
    assert "write the whole character, or leave it out" in str(error.value)
    path.write_text(lines_of(row, *whole, "last") if number == 3 else lines_of(row, whole[0]), encoding="utf-8")
    assert repr(whole[0])[1:-1] in repr(read(path))


def test_pairs_over_several_lines_are_read_alike(tmp_path):
    path = tmp_path / "pairs.json"
    rows = [{"positive": "x", "negative": "y"}, {"positive": "\ufeffz", "negative": "\0"}]
    path.write_bytes(codecs.BOM_UTF8 + json.dumps(rows, indent=1).encode())
    assert [pair.positive.prompt for pair in load_pairs(path)] == ["x", "\ufeffz"]
    path.write_text(json.dumps([*rows, {"positive": "\ud800", "negative": "y"}], indent=1), encoding="utf-8")
    with pytest.raises(LensteerError, match=r"pairs.json, line 11, column 16 has "):
        load_pairs(path)
    path.write_bytes(json.dumps(rows).encode("utf-16"))
    with pytest.raises(LensteerError, match="is UTF-16"):
        load_pairs(path)
    path.write_bytes(b'[\n{"positive": "\xed\xa0\x80", "negative": "y"}]')
    with pytest.raises(LensteerError, match="line 2 is not UTF-8"):
        load_pairs(path)


def test_labels_beside_a_benchmark_may_have_a_mark(tmp_path):
    row = {"goal": "x", "sol1": "a", "sol2": "b"}
    (tmp_path / "valid.jsonl").write_text(lines_of(row, *"abcdef"))
    (tmp_path / "valid-labels.lst").write_bytes(codecs.BOM_UTF8 + b"0\n1\n0\n1\n0\n1\n")
    found = [
        task for split in ("dev", "test") for task in load_benchmark("piqa", tmp_path / "valid.jsonl", split=split)
    ]
    assert sorted(task.answer for task in found) == list("AAABBB")


@pytest.mark.parametrize(
    "use",
    [
        lambda _, half: check_text(half, "it"),
        lambda _, half: parse_json(json.dumps([half]), "it"),
        lambda _, half: Task("t", "c", "dev", half),
        lambda _, half: Task(half, "c", "dev", "p"),
        lambda _, half: Task("t", "c", "dev", "p", half, "exact"),
        lambda _, half: Task.from_dict({"id": "t", "category": "c", "split": "dev", "prompt": half}),
        lambda _, half: Trace(TRACE.task, half, "", (1,), (), (), True),
        lambda _, half: Trace(TRACE.task, "", half, (1,), (), (), True),
        lambda _, half: Text(half),
        lambda _, half: Text("p", half),
        lambda _, half: Text("p", system=half),
        lambda _, half: pair_up(["p"], ["q"], label=half),
        lambda _, half: pair_up(["p"], [half]),
        lambda _, half: load_pairs([{"positive": "p", "negative": half}]),
        lambda _, half: Record(half, {"stepwise": "s"}, "4"),
        lambda _, half: Record("q", {"stepwise": half}, "4"),
        lambda model, half: models.encode(model, half),
        lambda model, half: models.encode_raw(model, half),
        lambda model, half: models.chat_text(model, half),
        lambda model, half: models.chat_text(model, [{"role": "user", "content": half}]),
        lambda model, half: ls.generate_traces(model, [TRACE.task], prefill=half, max_new_tokens=1),
        lambda _, half: Condition(half),
        lambda _, half: Condition("c", suffix=half),
        lambda _, half: Condition("c", prefill=half),
        lambda _, half: LabelScheme((half,), ("one",)),
        lambda _, half: LabelScheme(("one",), (half,)),
        lambda _, half: Judge(model=half),
        lambda _, half: JudgeScore(half, model="m"),
        lambda _, half: annotate([TRACE], lambda traces: [[Sentence(half, "It is")] for _ in traces]),
    ],
)
def test_half_a_character_in_python_is_refused_at_once(use, organism):
    with pytest.raises(LensteerError, match=r"'\\udc80'.*: it is half of a character"):
        use(organism, "so \udc80 it")


def test_nul_and_marks_within_a_text_survive(organism, tmp_path):
    task = Task("t\0", "c", "dev", "\ufeffone\0two\ufeff")
    asked = models.chat_text(organism, task.prompt)
    ids = models.encode(organism, asked)
    assert models.decode_offsets(organism.tokenizer, ids)[0] == asked
    (trace,) = ls.generate_traces(organism, [task], prefill="\0\ufeff", max_new_tokens=2)
    path = tmp_path / "traces.jsonl"
    save_traces([trace, TRACE], path)
    assert load_traces(path) == [trace, TRACE]


def test_a_write_never_fails_on_half_a_character(tmp_path):
    """A result that holds one by a way that nobody thought of is kept, with its escape in JSON."""
    row = {"a": "x\ud800", "b": "\U0001f914"}
    write_atomically(tmp_path / "one.json", json.dumps(row, ensure_ascii=False))
    append_jsonl(tmp_path / "two.json", [row])
    for path in (tmp_path / "one.json", tmp_path / "two.json"):
        assert unseal(json.loads(read_text(path)), path) == row
    assert compression("x\ud800" * 50) < 0.2

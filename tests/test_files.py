"""Files that survive a kill at any byte, and lines that are read for what they are."""

from __future__ import annotations

import json
import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from lensteer.errors import LensteerError
from lensteer.files import append_lines, drop_cut_line, read_jsonl, write_atomically

ROWS = [{"a": 1}, {"text": "one\u2028two\x85three\ufeff"}, {"🤔": [None, 0.1]}]


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
        append_lines(path, [json.dumps(row, ensure_ascii=False)])
    append_lines(path, [])
    append_lines(path, ["", "  ", json.dumps(ROWS[0])])
    assert read_jsonl(path) == [(1, ROWS[0]), (2, ROWS[1]), (3, ROWS[2]), (6, ROWS[0])]


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

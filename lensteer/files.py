"""File I/O: atomic writes, text, JSONL, and safetensors with a JSON header.

Text is UTF-8. A byte order mark at its beginning is skipped; NUL and U+FEFF within it are characters like any other. A
lone surrogate (half of a character, which JSON can spell as an escape and a Python string can hold) cannot be encoded:
it is refused where a text comes in, by `read_jsonl`, `parse_json` and `check_text`. Writing never fails on one.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lensteer.errors import LensteerError

_ESCAPED = "backslashreplace"
_HALF = (
    "it is half of a character (a lone surrogate), which UTF-8 cannot hold; write the whole character, or leave it out"
)
#: The escapes of a JSON text, of which those of surrogates without their other half are `lone`.
_ESCAPE = re.compile(
    r"\\u[dD][89abAB][0-9a-fA-F]{2}\\u[dD][c-fC-F][0-9a-fA-F]{2}|(?P<lone>\\u[dD][89a-fA-F][0-9a-fA-F]{2})|\\."
)
_WIDE = {  # UTF-32's first, because UTF-16's mark begins it
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}


def digest(data: bytes) -> str:
    """The first 16 hex digits of SHA-256, which identify files, settings and models here."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file atomically: at any moment it is either the complete old one or the complete new one.

    A lone surrogate in a text is written as its escape, as in JSON, so that no result is lost because of it.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode(errors=_ESCAPED) if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def write_given(path: str | Path, data: str | bytes, what: str = "") -> Path:
    """Write a file to a path that a user gave, as `write_atomically` does.

    Args:
        path: of the file.
        data: its content.
        what: for the message, such as "vectors to ".

    Raises:
        LensteerError: it cannot be written.
    """
    try:
        write_atomically(Path(path), data)
    except OSError as error:
        raise LensteerError(f"cannot write {what}{str(path)!r} ({error}): give a file to write") from error
    return Path(path)


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A temporary folder beside `path`, which takes its name once the `with` ends without an error.

    Raises:
        LensteerError: there is a file, or a folder that holds something.
    """
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise LensteerError(f"{str(path)!r} exists and holds something: give a new or an empty folder")
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    temporary.mkdir()
    try:
        yield temporary
        if path.exists():
            path.rmdir()
        os.replace(temporary, path)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines and flush them to disk before returning; lone surrogates are escaped as in `write_atomically`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors=_ESCAPED) as file:
        file.write("".join(line + "\n" for line in lines))
        file.flush()
        os.fsync(file.fileno())


def drop_cut_line(path: Path) -> bool:
    """Drop an incomplete last line that a kill left; return whether the file has any complete line."""
    if not path.exists():
        return False
    data = path.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if len(whole) < len(data):
        write_atomically(path, whole)
    return bool(whole.strip())


def check_text(text: str, what: str) -> str:
    """Return a text if UTF-8 can hold it; `what` names it in the message.

    Raises:
        LensteerError: it has a lone surrogate.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        at = error.start
        raise LensteerError(
            f"{what} has {text[at]!r} at character {at}, in {text[max(0, at - 20) : at + 20]!r}: {_HALF}"
        ) from error
    return text


def parse_json(text: str, path: str | Path, line: int = 1) -> Any:
    """The value that a JSON text spells; `line` of the file `path` is its first.

    Raises:
        LensteerError: a text in it has a lone surrogate.
        ValueError: it is no JSON.
    """
    values = json.loads(text)
    for escape in _ESCAPE.finditer(text):
        if escape["lone"]:
            at = escape.start()
            line += text.count("\n", 0, at)
            column = at - text.rfind("\n", 0, at)
            raise LensteerError(f"{path}, line {line}, column {column} has '{escape[0]}': {_HALF}")
    return values


def read_bytes(path: Path) -> bytes:
    """The bytes of a text file, without the byte order mark that some editors put before UTF-8.

    Raises:
        LensteerError: it is UTF-16 or UTF-32.
        OSError: it cannot be read.
    """
    data = path.read_bytes()
    name = next((name for mark, name in _WIDE.items() if data.startswith(mark)), "")
    if not name and b"\0" in data[:2] != b"\0\0":  # of UTF-16 without a mark, as JSON begins with an ASCII character
        name = "UTF-16"
    if name:
        raise LensteerError(f"{path} is {name}, it begins with {data[:8]!r}: save it as UTF-8")
    return data.removeprefix(codecs.BOM_UTF8)


def read_text(path: Path) -> str:
    """The text of a UTF-8 file, with or without a byte order mark.

    Raises:
        LensteerError: it is not UTF-8.
        OSError: it cannot be read.
    """
    data = read_bytes(path)
    try:
        return data.decode()
    except UnicodeDecodeError as error:
        line = data.count(b"\n", 0, error.start) + 1
        raise LensteerError(f"{path}, line {line} is not UTF-8 ({error}): save it as UTF-8") from error


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Numbered objects of a JSONL file; blank lines are skipped.

    Raises:
        LensteerError: a missing or empty file, one that is not UTF-8, a line that is not a JSON object, or a lone
            surrogate in one (names line and column).
    """
    if not path.is_file():
        raise LensteerError(f"no file {str(path)!r}: give a JSONL file, one object a line")
    rows = []
    for number, line in enumerate(read_bytes(path).split(b"\n"), 1):  # not at Unicode's other line breaks
        line = line.removeprefix(codecs.BOM_UTF8)  # files with a mark that were joined have one within
        if not line.strip():
            continue
        try:
            values = parse_json(line.decode(), path, number)
        except LensteerError:
            raise
        except ValueError as error:  # of JSON or of UTF-8
            raise LensteerError(f"{path}, line {number} is not JSON ({error}): {line[:80]!r}") from error
        if not isinstance(values, dict):
            raise LensteerError(f"{path}, line {number} is not a JSON object: {line[:80]!r}")
        rows.append((number, values))
    if not rows:
        raise LensteerError(f"{path} is empty: give a JSONL file with at least one object")
    return rows


#: Incremented when the format changes incompatibly.
FORMAT = 1


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a file atomically.

    Raises:
        LensteerError: the file cannot be written.
    """
    metadata = {"lensteer": json.dumps({"format": FORMAT, **header})}
    data = save({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, metadata)
    write_given(path, data, "vectors to ")


def read_tensors(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read tensors and header.

    Raises:
        LensteerError: no such file, a truncated or corrupt one, or one that lensteer did not write.
    """
    if not Path(path).is_file():
        raise LensteerError(f"no vectors at {str(path)!r}: give the file that `vectors.save` wrote")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise LensteerError(f"{str(path)!r} is truncated or no safetensors file ({error}): save it again") from error
    try:
        header = json.loads(metadata["lensteer"])
        version = header["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise LensteerError(
            f"{str(path)!r} holds no behavior vectors: give the file that `vectors.save` wrote"
        ) from error
    if version != FORMAT:
        raise LensteerError(f"{str(path)!r} has format {version!r}, and this version of lensteer reads {FORMAT}")
    return tensors, header

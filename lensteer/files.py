"""File I/O: atomic writes, text, JSONL, and safetensors with a JSON header.

Text is UTF-8. A byte order mark at its beginning is skipped; NUL and U+FEFF within it are characters like any other. A
lone surrogate (half of a character, which JSON can spell as an escape and a Python string can hold) cannot be encoded:
it is refused where a text comes in, by `read_jsonl`, `parse_json` and `check_text`. Writing never fails on one.

What lensteer writes for itself to read again carries a digest of its content (`seal`), so that a flipped bit is noticed
even where the file still reads.
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

import torch
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


#: The entry of a JSON object that holds the digest of all its other entries.
SEAL = "lensteer_digest"


def seal(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON values with their digest."""
    return {**values, SEAL: digest(json.dumps(values).encode())}


def unseal(values: Mapping[str, Any], where: object) -> dict[str, Any]:
    """JSON values without their digest, which is checked if there is one: earlier versions and others write none.

    Raises:
        LensteerError: the values are not those that were written (names `where`).
    """
    rest = {name: value for name, value in values.items() if name != SEAL}
    if SEAL in values and seal(rest)[SEAL] != values[SEAL]:
        raise LensteerError(
            f"{where} does not match its {SEAL!r}: it was damaged or edited since it was written. Make it again; if "
            "you edited it, remove that entry"
        )
    return rest


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


def json_text(values: Mapping[str, Any], *, allow_nan: bool = True) -> str:
    """A JSON object with its digest, as a text."""
    return json.dumps(seal(values), allow_nan=allow_nan, indent=1)


def write_json(path: Path, values: Mapping[str, Any]) -> None:
    """Write a JSON object with its digest, atomically."""
    write_atomically(path, json_text(values))


def read_json(path: Path) -> dict[str, Any]:
    """Read what `write_json` wrote.

    Raises:
        LensteerError: it is missing, damaged, or no JSON object.
    """
    try:
        values = json.loads(read_text(path))
    except (OSError, ValueError, RecursionError) as error:  # a LensteerError is one
        raise LensteerError(f"{str(path)!r} cannot be read ({error}): make it again") from error
    if not isinstance(values, dict):
        raise LensteerError(f"{str(path)!r} holds no JSON object: make it again")
    return unseal(values, path)


def jsonl_text(rows: Iterable[Mapping[str, Any]]) -> str:
    """JSON objects with their digests, one a line, as a text."""
    return "".join(json.dumps(seal(row), ensure_ascii=False) + "\n" for row in rows)


def write_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Write JSON objects with their digests, one a line, atomically."""
    write_atomically(path, jsonl_text(rows))


def append_jsonl(path: Path, rows: Iterable[Mapping[str, Any]]) -> None:
    """Append lines as `write_jsonl` writes them, and flush them to disk before returning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8", errors=_ESCAPED) as file:
        file.write(jsonl_text(rows))
        file.flush()
        os.fsync(file.fileno())


def drop_cut_line(path: Path) -> bool:
    """Drop an incomplete last line that a kill left; return whether the file has any complete line.

    Raises:
        LensteerError: a folder.
    """
    if not path.exists():
        return False
    if path.is_dir():
        raise LensteerError(f"{str(path)!r} is a folder: give a file")
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
        ValueError: it is no JSON, or nested too deeply.
    """
    try:
        values = json.loads(text)
    except RecursionError as error:
        raise ValueError("nested too deeply") from error
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
    """Numbered objects of a JSONL file, without their digests; blank lines are skipped.

    Raises:
        LensteerError: a missing or empty file, one that is not UTF-8, a line that is not a JSON object or does not
            match its digest, or a lone surrogate in one (names line and column).
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
        rows.append((number, unseal(values, f"{path}, line {number}")))
    if not rows:
        raise LensteerError(f"{path} is empty: give a JSONL file with at least one object")
    return rows


#: Incremented when the format changes incompatibly.
FORMAT = 1


def _tensors_digest(tensors: Mapping[str, Tensor]) -> str:
    """Of names, types, shapes and bytes."""
    found = hashlib.sha256()
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.contiguous().flatten().view(torch.uint8).numpy().data)
    return found.hexdigest()[:16]


def write_tensors(
    path: str | Path,
    tensors: Mapping[str, Tensor],
    header: Mapping[str, Any],
    key: str = "lensteer",
    what: str = "vectors",
) -> None:
    """Write tensors and a JSON header with their digests to one safetensors file, atomically.

    Args:
        path: of the file.
        tensors: by name.
        header: JSON values.
        key: of the header in the file's metadata.
        what: is written, for messages, such as "behavior vectors".

    Raises:
        LensteerError: the file cannot be written.
    """
    # Copies, because the format has no tensors that share memory.
    kept = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    values = seal({"format": FORMAT, "tensors": _tensors_digest(kept), **header})
    write_given(path, save(kept, {key: json.dumps(values)}), f"{what} to ")


def read_tensors(
    path: str | Path, key: str = "lensteer", what: str = "vectors"
) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read the tensors and the header that `write_tensors` wrote under the same key.

    Raises:
        LensteerError: no such file, a truncated or damaged one, or one that does not hold `what`.
    """
    if not Path(path).is_file():
        raise LensteerError(f"no {what} at {str(path)!r}: give the file that its `save` wrote")
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError, TypeError, ValueError, RuntimeError) as error:
        reason = str(error).split("\n")[0]
        raise LensteerError(f"{str(path)!r} is truncated or no safetensors file ({reason}): save it again") from error
    try:
        header = dict(json.loads(metadata[key]))
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise LensteerError(f"{str(path)!r} holds no {what} ({error!r}): give a file of its `save`") from error
    header = unseal(header, repr(str(path)))
    if header.pop("tensors", None) not in (None, _tensors_digest(tensors)):
        raise LensteerError(f"{str(path)!r} has other numbers than were written: it was damaged; save it again")
    if (version := header.pop("format", FORMAT)) != FORMAT:
        raise LensteerError(f"{str(path)!r} has format {version!r}, and this version of lensteer reads {FORMAT}")
    return tensors, header

"""File I/O: atomic writes, JSONL, and safetensors with a JSON header."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lensteer.errors import LensteerError


def digest(data: bytes) -> str:
    """The first 16 hex digits of SHA-256, which identify files, settings and models here."""
    return hashlib.sha256(data).hexdigest()[:16]


def write_atomically(path: Path, data: str | bytes) -> None:
    """Write a file atomically: at any moment it is either the complete old one or the complete new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
    try:
        with temporary.open("wb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def append_lines(path: Path, lines: Iterable[str]) -> None:
    """Append lines and flush them to disk before returning."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
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


def read_jsonl(path: Path) -> list[tuple[int, dict[str, Any]]]:
    """Numbered objects of a JSONL file; blank lines are skipped.

    Raises:
        LensteerError: a missing or empty file, or a line that is not a JSON object.
    """
    if not path.is_file():
        raise LensteerError(f"no file {str(path)!r}: give a JSONL file, one object a line")
    rows = []
    for number, line in enumerate(path.read_bytes().split(b"\n"), 1):  # not at Unicode's other line breaks
        if not line.strip():
            continue
        try:
            values = json.loads(line.decode())
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
    try:
        write_atomically(Path(path), data)
    except OSError as error:
        raise LensteerError(f"cannot write vectors to {str(path)!r} ({error}): give a file to write") from error


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

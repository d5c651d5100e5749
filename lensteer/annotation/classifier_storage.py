"""Arrays and a JSON header in one safetensors file, written whole or not at all. Knows no names in them."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from lensteer.errors import LensteerError
from lensteer.files import write_atomically

#: Raised when a reader of today's files could not read tomorrow's.
FORMAT = 1
_KEY = "lensteer-classifier"


def write(path: str | Path, arrays: Mapping[str, np.ndarray[Any, np.dtype[Any]]], header: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all.

    Raises:
        LensteerError: the file cannot be written.
    """
    metadata = {_KEY: json.dumps({"format": FORMAT, **header})}
    data = save({name: np.ascontiguousarray(array) for name, array in arrays.items()}, metadata)
    try:
        write_atomically(Path(path), data)
    except OSError as error:
        raise LensteerError(f"cannot write a classifier to {str(path)!r} ({error}): give a file to write") from error


def read(path: str | Path) -> tuple[dict[str, np.ndarray[Any, np.dtype[Any]]], dict[str, Any]]:
    """Read arrays and header.

    Raises:
        LensteerError: no such file, a truncated or corrupt one, or one that is no classifier of lensteer.
    """
    if not Path(path).is_file():
        raise LensteerError(f"no classifier at {str(path)!r}: give the file that `classifier.save` wrote")
    try:
        with safe_open(str(path), "np") as file:
            metadata = file.metadata() or {}
            arrays = {name: file.get_tensor(name) for name in file.keys()}
    except (SafetensorError, OSError) as error:
        raise LensteerError(f"{str(path)!r} is truncated or no safetensors file ({error}): save it again") from error
    try:
        header = json.loads(metadata[_KEY])
        version = header["format"]
    except (KeyError, TypeError, ValueError) as error:
        raise LensteerError(f"{str(path)!r} holds no classifier: give the file that `classifier.save` wrote") from error
    if version != FORMAT:
        raise LensteerError(f"{str(path)!r} has format {version!r}, and this version of lensteer reads {FORMAT}")
    return arrays, header

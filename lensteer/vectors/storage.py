"""Tensors and a JSON header in one safetensors file, written whole or not at all."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.files import write_atomically

#: Raised when a reader of today's files could not read tomorrow's.
FORMAT = 1


def write_tensors(path: str | Path, tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> None:
    """Write a file, whole or not at all.

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

"""Loads models: a folder, a name on the hub, or the embedded organism, as TransformerLens' own bridge."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from lensteer.errors import LensteerError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

ORGANISM = Path(__file__).parents[1] / "organism" / "weights"


def load_model(
    name_or_path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    revision: str | None = None,
) -> TransformerBridge:
    """Load a causal language model as TransformerLens' own bridge, with raw Hugging Face weights.

    Args:
        name_or_path: a folder with a Hugging Face checkpoint or a name on the hub; None loads the embedded organism,
            through the same code.
        dtype: of the weights and activations.
        device: such as "cpu" or "cuda"; None lets TransformerLens choose.
        revision: of the checkpoint on the hub.

    Raises:
        LensteerError: no such model, one that TransformerLens cannot load, or too little memory.
    """
    from safetensors import SafetensorError
    from transformer_lens.model_bridge import TransformerBridge

    source = str(ORGANISM if name_or_path is None else name_or_path)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise LensteerError(f"{source!r} is a folder without config.json: give the folder of a Hugging Face checkpoint")
    try:
        with _no_bar() if name_or_path is None else nullcontext():  # it loads at once
            model = TransformerBridge.boot_transformers(source, dtype=dtype, device=device, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, SafetensorError) as error:
        if out_of_memory(error):
            raise LensteerError(
                f"out of memory while loading model {source!r} in {dtype} on {device or 'the default device'}: load it "
                f"in bfloat16 (2 bytes a parameter), on another device, or take a smaller model ({error})"
            ) from error
        raise LensteerError(
            f"cannot load model {source!r}: give a folder with a Hugging Face checkpoint, a name on the hub, or "
            f"nothing for the embedded organism ({type(error).__name__}: {error})"
        ) from error
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that host or device memory ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return any(word in str(error).lower() for word in words)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Hide the bar that Hugging Face shows while it loads weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

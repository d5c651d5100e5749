"""Rotates attention keys by a model's rotary embedding, and back."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def rotated(
    model: TransformerBridge,
    keys: Float[Tensor, "batch head pos d_head"],
    positions: Int[Tensor, "batch pos"],
    *,
    back: bool = False,
) -> Float[Tensor, "batch head pos d_head"]:
    """Keys rotated to given positions, as in the model's attention; `back` undoes the rotation.

    The angles come from the model's rotary embedding and the rotation from its own modeling code, so scaled variants
    are covered. A rotation is undone with the opposite angles, and a scaling factor with its square.

    Args:
        model: The bridge.
        keys: Of some tokens, at one layer.
        positions: Of the tokens.
        back: Undo the rotation.

    Raises:
        LensteerError: A model without one rotary embedding for all layers.
    """
    embedding = getattr(getattr(model.original_model, "model", None), "rotary_emb", None)
    embedding = getattr(embedding, "original_component", embedding)
    apply = getattr(sys.modules.get(type(embedding).__module__), "apply_rotary_pos_emb", None)
    if embedding is None or apply is None:
        raise LensteerError(
            f"{models.fingerprint(model).name!r} has no rotary embedding laid out as Llama's: its keys cannot be "
            "turned; edit values only (c_keys=0)"
        )
    cos, sin = embedding(keys, positions)
    if back:
        square = (cos.double() ** 2 + sin.double() ** 2)[..., :1].to(cos)  # 1, or a scaled embedding's factor squared
        cos, sin = cos / square, -sin / square
    return torch.as_tensor(apply(keys, keys, cos, sin)[1])

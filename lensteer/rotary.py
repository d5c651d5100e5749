"""Rotates attention keys by a model's rotary embedding, and back."""

from __future__ import annotations

import inspect
import sys
import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer import models
from lensteer.caches import single_token
from lensteer.errors import LensteerError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: From keys, cosines, sines and the model's own function to turned keys.
Turn = Callable[[Tensor, Tensor, Tensor, Callable[..., Any]], Tensor]


def _whole(keys: Tensor, cos: Tensor, sin: Tensor, apply: Callable[..., Any]) -> Tensor:
    return torch.as_tensor(apply(keys, keys, cos, sin)[1])


def _first(keys: Tensor, cos: Tensor, sin: Tensor, apply: Callable[..., Any]) -> Tensor:
    n = cos.shape[-1]
    return torch.cat([_whole(keys[..., :n], cos, sin, apply), keys[..., n:]], -1)


def _last(keys: Tensor, cos: Tensor, sin: Tensor, apply: Callable[..., Any]) -> Tensor:
    n = cos.shape[-1]
    return torch.cat([keys[..., :-n], _whole(keys[..., -n:], cos, sin, apply)], -1)


def _none(keys: Tensor, cos: Tensor, sin: Tensor, apply: Callable[..., Any]) -> Tensor:
    return keys


#: Which dimensions of a key a model may turn: those that its function takes, the first or last ones, none.
TURNS: tuple[Turn, ...] = (_whole, _first, _last, _none)
#: Where the probe's token stands.
PROBE = 7
_found: weakref.WeakKeyDictionary[Any, dict[int, Turn | None]] = weakref.WeakKeyDictionary()


def rotated(
    model: TransformerBridge,
    keys: Float[Tensor, "batch head pos d_head"],
    positions: Int[Tensor, "batch pos"],
    *,
    layer: int = 0,
    back: bool = False,
) -> Float[Tensor, "batch head pos d_head"]:
    """Keys rotated to given positions, as in the model's attention; `back` undoes the rotation.

    The angles come from the model's rotary embedding and the rotation from its own modeling code, so scaled variants
    are covered. A rotation is undone with the opposite angles, and a scaling factor with its square.
    Which dimensions are rotated (all, some, none) is measured on a single token.

    Args:
        model: The bridge.
        keys: Of some tokens, at one layer.
        positions: Of the tokens.
        layer: The layer of the keys.
        back: Undo the rotation.

    Raises:
        LensteerError: It is not known how the model turns its keys.
    """
    turn = turning(model, layer)
    if turn is None:
        raise LensteerError(
            f"{models.fingerprint(model).name!r} turns its keys in a way that is not known: they cannot be edited; "
            "edit values only (c_keys=0)"
        )
    return _turned(model, turn, keys, positions, layer, back)


def turning(model: TransformerBridge, layer: int = 0) -> Turn | None:
    """How the model turns a layer's keys, or None where no way of `TURNS` gives what its cache holds."""
    known = _found.setdefault(model, {})
    if layer not in known:
        known[layer] = next((turn for turn in TURNS if _fits(model, turn, layer)), None)
    return known[layer]


def _fits(model: TransformerBridge, turn: Turn, layer: int) -> bool:
    """Whether keys at position 0, turned back and to another position, are what the model keeps there."""
    start, moved = (single_token(model, position)[layer][0] for position in (0, PROBE))
    zero = torch.zeros(1, 1, dtype=torch.long, device=start.device)
    try:
        flat = _turned(model, turn, start, zero, layer, back=True)
        ours = _turned(model, turn, flat, zero + PROBE, layer, back=False)
    except (RuntimeError, TypeError, ValueError, KeyError, IndexError, AttributeError):  # another shape or signature
        return False
    off = 1e-4 if start.dtype in (torch.float32, torch.float64) else 2e-2
    return ours.shape == moved.shape and float((ours - moved).abs().max()) <= off * float(moved.abs().max())


def _turned(
    model: TransformerBridge, turn: Turn, keys: Tensor, positions: Tensor, layer: int, back: bool
) -> Float[Tensor, "batch head pos d_head"]:
    if turn is _none:
        return keys
    embedding = _embedding(model)
    apply = getattr(sys.modules[type(embedding).__module__], "apply_rotary_pos_emb")  # noqa: B009 - not a known module
    types = getattr(model.original_model.config.get_text_config(decoder=True), "layer_types", None) or ()
    by_type = "layer_type" in inspect.signature(embedding.forward).parameters
    cos, sin = embedding(keys, positions, types[layer]) if by_type else embedding(keys, positions)
    if back:
        square = (cos.double() ** 2 + sin.double() ** 2)[..., :1].to(cos)  # 1, or a scaled embedding's factor squared
        cos, sin = cos / square, -sin / square
    return turn(keys, cos, sin, apply)


def _embedding(model: TransformerBridge) -> Any:
    """The model's rotary embedding, as Hugging Face made it, wherever it stands."""
    for module in model.original_model.modules():
        module = getattr(module, "original_component", module)
        if type(module).__name__.endswith("RotaryEmbedding"):
            return module
    raise AttributeError("no rotary embedding")

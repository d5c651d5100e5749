"""A plain Hugging Face model on a bridge's own parameters, for hot loops. Knows nothing of what runs on it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import nn

from lensteer import models

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_twins: weakref.WeakKeyDictionary[nn.Module, tuple[tuple[int, ...], nn.Module | None]] = weakref.WeakKeyDictionary()


def plain_twin(model: TransformerBridge) -> nn.Module | None:
    """A plain Hugging Face model on the very same parameters, for hot loops: its attention is the fused kernel.

    None where no such model gives the bridge's logits to 1e-4 of their scale (checked once, on a few tokens), where
    its layers are not laid out as Llama's, or where TransformerLens has processed the weights.
    """
    if getattr(model, "compatibility_mode", False):
        return None
    storages = tuple(tensor.data_ptr() for tensor in model.original_model.parameters())
    if model not in _twins or _twins[model][0] != storages:  # the model may have been moved, cast or given new weights
        _twins[model] = (storages, _build_twin(model))
    return _twins[model][1]


def twin_layer(twin: nn.Module, layer: int) -> nn.Module:
    """The module of a plain twin whose output is the residual stream behind a block."""
    return twin.model.layers[layer]  # type: ignore[union-attr,index,return-value]  # Hugging Face's layout


def _build_twin(model: TransformerBridge) -> nn.Module | None:
    original = model.original_model
    if not hasattr(getattr(original, "model", None), "rotary_emb"):
        return None
    state = {k.replace("._original_component", ""): v for k, v in original.state_dict().items()}
    config = original.config
    with torch.device("meta"):
        twin = type(original)._from_config(config, attn_implementation="sdpa", dtype=original.dtype)
    twin.load_state_dict({k: v for k, v in state.items() if k in twin.state_dict()}, strict=False, assign=True)
    twin.tie_weights()
    rotary = type(twin.model.rotary_emb)
    twin.model.rotary_emb = rotary(config=config).to(models.device(model))
    if any(p.is_meta for p in [*twin.parameters(), *twin.buffers()]):
        return None
    twin.eval()
    ids = torch.arange(min(8, int(model.cfg.d_vocab)), device=models.device(model))[None]
    with torch.inference_mode():
        ours, theirs = model(ids), twin(input_ids=ids).logits
    close = torch.allclose(ours, theirs, rtol=1e-3, atol=1e-4 * float(ours.abs().max()))
    return twin if close or original.dtype != torch.float32 else None

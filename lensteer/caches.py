"""What a model keeps of past tokens: keys and values of attention, or the state of a recurrent layer."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionCacheLayerMixin

from lensteer import models, twins

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

_probes: weakref.WeakKeyDictionary[Any, dict[int, list[tuple[Tensor, Tensor]]]] = weakref.WeakKeyDictionary()
_latent: weakref.WeakKeyDictionary[Any, bool] = weakref.WeakKeyDictionary()


def new_cache(model: TransformerBridge, attention: Callable[[], DynamicLayer] = DynamicLayer) -> DynamicCache:
    """An empty cache: attention keeps all positions, whatever its window; recurrent layers keep their state.

    Args:
        model: The bridge.
        attention: Makes the layers that keep keys and values.
    """
    cache, own = DynamicCache(), recurrent_layers(model)
    cache.layers = [own[layer] if layer in own else attention() for layer in range(models.n_layers(model))]
    return cache


def recurrent_layers(model: TransformerBridge) -> dict[int, Any]:
    """The layers that keep a state instead of keys and values, such as linear attention, each with an empty one."""
    layers = DynamicCache(config=model.original_model.config).layers
    return {i: layer for i, layer in enumerate(layers) if isinstance(layer, LinearAttentionCacheLayerMixin)}


def keep_rows(layer: Any, rows: Tensor) -> None:
    """Keep some of the batch's rows in a layer of a cache, also several times, if there is anything in it."""
    if isinstance(layer, LinearAttentionCacheLayerMixin):
        if layer.device is not None:
            layer.reorder_cache(rows)
    elif layer.is_initialized:
        layer.keep(rows)


def single_token(model: TransformerBridge, position: int) -> list[tuple[Tensor, Tensor]]:
    """Keys and values of every layer, `[1, head, 1, d_head]`, for one token that stands alone at a position.

    A token alone attends to itself, so that nothing but the turning of keys depends on where it stands, unless the
    model adds positions to its embeddings. Kept, because it is a probe of the model, not of a text.
    """
    known = _probes.setdefault(model, {})
    if position not in known:
        with twins.unhooked(model):
            known[position] = _kept(model, model, position)
    return known[position]


def latent(model: TransformerBridge) -> bool:
    """Whether Hugging Face's own model keeps something of another shape than the bridge's keys and values."""
    if model not in _latent:
        twin = twins.plain_twin(model)
        own = single_token(model, 0) if twin is None else _kept(model, twin, 0)
        pairs = zip(own, single_token(model, 0), strict=True)
        _latent[model] = any(a.shape != b.shape for one, two in pairs for a, b in zip(one, two, strict=True))
    return _latent[model]


def _kept(model: TransformerBridge, runner: Any, position: int) -> list[tuple[Tensor, Tensor]]:
    cache, where = new_cache(model), models.device(model)
    ids, at = torch.full((1, 1), 5, device=where), torch.full((1, 1), position, device=where)
    with torch.inference_mode():
        runner(ids, position_ids=at, past_key_values=cache, use_cache=True)
    return [(layer.keys, layer.values) for layer in cache.layers]

"""Cache vectors from contrastive pairs of prompts: two prefills per pair, and no other forward."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.arguments import checked
from lensteer.cache_steering.pairs import Pair
from lensteer.caches import new_cache
from lensteer.errors import LensteerError
from lensteer.files import digest
from lensteer.forward import Forward, left_padded
from lensteer.progress import progress_bar
from lensteer.rotary import rotated, turning
from lensteer.steering.cache import CacheVector, as_long, check_attention, check_position, index_in

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Control vectors drawn from the pairs' spread.
N_SPREAD = 20
#: A mean difference of values that is shorter than this share of the values is none.
CANCELED = 1e-4


@checked()
def fit_cache_vector(
    model: TransformerBridge,
    pairs: Sequence[Pair],
    *,
    position: int | str = "last_prompt",
    layers: Sequence[int] | None = None,
    label: str = "",
    batch_size: int = 32,
    progress: bool = False,
) -> CacheVector:
    """S = mean over pairs of positive less negative, of keys before rotation and of values, at one position.

    Keys are taken from the cache, where they are rotated, and rotated back by the model's own rotary embedding: a mean
    of rotated keys would mix rotations, because a pair's prompts differ in length.

    Args:
        model: The bridge.
        pairs: From `contrastive_pairs`, or made by hand.
        position: Where to read: a name of `POSITIONS`, or an index of the prompt (negative: from its end).
        layers: Where to read; None is everywhere, which needs full attention everywhere. The vector is zero elsewhere.
        label: What the vector represents.
        batch_size: Prompts per batch.
        progress: Show a bar.

    Raises:
        LensteerError: No pair, two sides that are the same up to the position, a position outside a prompt, an
            unsupported attention, numbers that are not finite, differences that cancel.
    """
    if not pairs:
        raise LensteerError("no pairs: make some with contrastive_pairs(model, records)")
    check_position(position)
    read = list(range(models.n_layers(model))) if layers is None else sorted(set(layers))
    check_attention(model, read)
    prompts = [models.encode(model, text) for pair in pairs for text in (pair.positive, pair.negative)]
    for number, (one, other) in enumerate(zip(prompts[::2], prompts[1::2], strict=True)):
        ends = [index_in(position, len(side)) + 1 for side in (one, other)]
        if one[: ends[0]] == other[: ends[1]]:
            raise LensteerError(
                f"pair {number}: both sides are the same {ends[0]} tokens up to position {position!r}, where they are "
                f"read, such as {pairs[number].positive[:60]!r}: give pairs that differ before it"
            )
    n, signs = len(pairs), torch.tensor([1.0, -1.0], dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    draws = torch.randn(N_SPREAD, n, generator=generator, dtype=torch.float64)
    weights = torch.cat([torch.ones(1, n, dtype=torch.float64), draws - draws.mean(1, keepdim=True)]) / n
    weights = (weights[:, :, None] * signs).flatten(1)  # of each prompt, in the vector and in each control
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))  # similar lengths need little padding
    sums: tuple[Tensor, Tensor] | None = None
    norms = torch.zeros(2, dtype=torch.float64)
    with progress_bar(total=len(prompts), unit="prompt", show=progress) as bar:
        for begin in range(0, len(order), batch_size):
            batch = order[begin : begin + batch_size]
            at = [index_in(position, len(prompts[i])) for i in batch]
            found = read_slots(model, [prompts[i] for i in batch], at, read)
            exact = [tensor.to("cpu", torch.float64) for tensor in found]
            norms += torch.stack([tensor.flatten(1).norm(dim=1).sum() for tensor in exact]) / len(prompts)
            parts = [torch.tensordot(weights[:, batch], tensor, 1) for tensor in exact]
            sums = (parts[0], parts[1]) if sums is None else (sums[0] + parts[0], sums[1] + parts[1])
            bar.update(len(batch))
    assert sums is not None
    keys, values = (tensor.float() for tensor in sums)
    if float(values[0].norm()) <= CANCELED * float(norms[1]):
        raise LensteerError(
            f"the differences of {n} pairs cancel: their mean is {float(values[0].norm()):.2g} long, the values "
            f"themselves {float(norms[1]):.2g}; give pairs whose positive sides all differ in one way"
        )
    provenance: dict[str, Any] = {
        "model": models.fingerprint(model).to_dict(),
        "n_pairs": n,
        "pairs": pairs_digest(pairs),
        "norms": {"keys": float(norms[0]), "values": float(norms[1])},
    }
    if layers is not None:
        provenance["layers"] = read
    spread = (as_long(keys[1:], keys[0]), as_long(values[1:], values[0])) if n > 2 else None
    return CacheVector(label, keys[0], values[0], position, provenance, spread)


def pairs_digest(pairs: Sequence[Pair]) -> str:
    """What tells the pairs of one fit from those of another."""
    return digest(json.dumps([[p.positive, p.negative] for p in pairs]).encode())


@torch.inference_mode()
def read_slots(
    model: TransformerBridge, prompts: Sequence[Sequence[int]], at: Sequence[int], layers: Sequence[int] | None = None
) -> tuple[Float[Tensor, "batch layer head d_head"], Float[Tensor, "batch layer head d_head"]]:
    """Keys before rotation and values of one position of each prompt, at every layer, from one forward.

    Keys are zero where it is not known how the model turns them (`rotary.turning`), and both are at other layers.

    Args:
        model: The bridge; plans that are on apply.
        prompts: Token ids.
        at: One index per prompt.
        layers: To read; None: all.
    """
    text, cache = left_padded(model, prompts), new_cache(model)
    forward = Forward(model, text, cache=cache)
    with forward.hooked():
        forward.prefill(keep=1)
    where, pad = text.ids.device, text.pad
    index = torch.tensor(at, device=where)
    rows = torch.arange(len(prompts), device=where)
    keys, values = [], []
    for number, layer in enumerate(cache.layers):
        key, value = layer.keys[rows, :, pad + index][:, :, None], layer.values[rows, :, pad + index]
        wanted = layers is None or number in layers
        known = wanted and turning(model, number) is not None
        key = rotated(model, key, index[:, None], layer=number, back=True) if known else torch.zeros_like(key)
        keys.append(key[:, :, 0])
        values.append(value if wanted else torch.zeros_like(value))
    return torch.stack(keys, 1), torch.stack(values, 1)

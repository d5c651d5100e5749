"""Head ablation: a head's output is replaced, or its attention is masked. Undone when the `with` block ends."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lensteer import models
from lensteer.attention.sentences import forward_padded, pattern_hook
from lensteer.errors import LensteerError
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Head = tuple[int, int]
"""Layer and head."""


def z_hook(layer: int) -> str:
    """The hook point of the heads' outputs before the output projection, `[batch, pos, head, d_head]`."""
    return f"blocks.{layer}.attn.hook_z"


def mean_z(
    model: TransformerBridge, traces: Sequence[Trace], *, batch_size: int = 8
) -> Float[Tensor, "layer head d_head"]:
    """Mean z of each head over the tokens after the prompts, to replace z by in `ablated`.

    Args:
        model: the bridge.
        traces: with tokens after the prompt.
        batch_size: traces per forward.

    Raises:
        LensteerError: no token after a prompt.
    """
    total: dict[int, Tensor] = {}
    n_tokens = sum(len(trace.response_ids) for trace in traces)
    if not n_tokens:
        raise LensteerError(f"{len(traces)} traces have no token after their prompts: give generated traces")

    def read(z: Float[Tensor, "batch pos head d_head"], hook: Any, layer: int, batch: Sequence[Trace]) -> None:
        for row, trace in enumerate(batch):
            total[layer] = total.get(layer, 0) + z[row, trace.prompt_length : len(trace.ids)].double().sum(0)

    layers = range(models.n_layers(model))
    for first in range(0, len(traces), batch_size):
        batch = traces[first : first + batch_size]
        with model.hooks(fwd_hooks=[(z_hook(layer), partial(read, layer=layer, batch=batch)) for layer in layers]):
            forward_padded(model, batch, stop_after=len(layers) - 1)
    return (torch.stack([total[layer] for layer in layers]) / n_tokens).float()


@contextmanager
def ablated(
    model: TransformerBridge, heads: Sequence[Head], means: Float[Tensor, "layer head d_head"] | None = None
) -> Iterator[TransformerBridge]:
    """Replace the z of heads at every position: by zero, or by its mean.

    Args:
        model: the bridge.
        heads: which; none ablates nothing.
        means: from `mean_z`; zeros if left out.

    Raises:
        LensteerError: a head that the model lacks.
    """

    def replace(z: Float[Tensor, "batch pos head d_head"], hook: Any, layer: int) -> Tensor:
        own = _of(heads, layer)
        z = z.clone()  # in-place edits can be lost
        z[:, :, own] = 0.0 if means is None else means[layer, own].to(z)
        return z

    layers = _checked(model, heads)
    with model.hooks(fwd_hooks=[(z_hook(layer), partial(replace, layer=layer)) for layer in layers]):
        yield model


@contextmanager
def knocked_out(
    model: TransformerBridge, heads: Sequence[Head], cut: Bool[Tensor, "batch query key"]
) -> Iterator[TransformerBridge]:
    """Mask the attention of heads from some positions to others; the rest is renormalized to sum to one.

    Args:
        model: the bridge.
        heads: which.
        cut: True where a query must not attend to a key; the shape of the forward's pattern, padding included. A query
            without any key left reads zeros.

    Raises:
        LensteerError: a head that the model lacks, or (in the forward) a pattern of another shape.
    """

    def close(pattern: Float[Tensor, "batch head query key"], hook: Any, layer: int) -> Tensor:
        if cut.shape != (pattern.shape[0], *pattern.shape[2:]):
            raise LensteerError(
                f"cut has shape {list(cut.shape)}, but this forward's attention is "
                f"{[pattern.shape[0], *pattern.shape[2:]]} (batch, query, key): give one entry for each"
            )
        own = _of(heads, layer)
        pattern = pattern.clone()  # in-place edits can be lost
        left = pattern[:, own].masked_fill(cut[:, None].to(pattern.device), 0.0)
        scale = torch.where(left.sum(-1) > 0, pattern[:, own].sum(-1) / left.sum(-1), 0.0)
        pattern[:, own] = left * scale[..., None]
        return pattern

    layers = _checked(model, heads)
    with model.hooks(fwd_hooks=[(pattern_hook(layer), partial(close, layer=layer)) for layer in layers]):
        yield model


def _of(heads: Sequence[Head], layer: int) -> list[int]:
    return sorted({head for at, head in heads if at == layer})


def _checked(model: TransformerBridge, heads: Sequence[Head]) -> list[int]:
    """The layers that the heads are in."""
    for layer, head in heads:
        models.check_layer(model, layer)
        if not 0 <= head < model.cfg.n_heads:
            raise LensteerError(f"no head {head}: layers of this model have heads 0 to {model.cfg.n_heads - 1}")
    return sorted({layer for layer, _ in heads})

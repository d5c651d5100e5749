"""How far each token's residual stream reaches along each behavior's direction. Knows nothing of steering."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.generation.running import choose_runner
from lensteer.positions import Context
from lensteer.steering import attached, tokens_seen
from lensteer.vectors import BehaviorVectors

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@torch.inference_mode()
def projections(
    model: TransformerBridge, ids: Sequence[int], vectors: BehaviorVectors
) -> Float[Tensor, "behavior layer pos"]:
    """`<h, û> / ‖mean h‖` at resid_post, unsteered, for every behavior and layer; NaN where a vector is zero.

    In multiples of the length of the layer's mean activation, whatever the unit of a coefficient.
    """
    runner, _ = choose_runner(model, None, 1)
    tokens = torch.tensor([ids], device=models.device(model))
    unit = vectors.raw.double() / vectors.raw.double().norm(dim=-1, keepdim=True)
    unit = unit / vectors.mean_norm.double()[:, None]
    found: dict[int, Tensor] = {}

    def read(layer: int, resid: Tensor) -> Tensor:
        found[layer] = (resid[0].double() @ unit[:, vectors.layers.index(layer)].T.to(resid.device)).T.cpu()
        return resid

    with attached(model, runner, list(vectors.layers), read):
        if runner is not model:
            runner(input_ids=tokens, use_cache=False, logits_to_keep=1)
        else:
            zero = tokens.new_zeros(1)
            with tokens_seen(Context(tokens, zero, zero, models.token_table(model))):
                model(tokens, return_type="logits", logits_to_keep=1)
    return torch.stack([found[layer] for layer in vectors.layers], 1)

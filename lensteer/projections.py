"""Where a chain's residual stream goes along a direction, token by token. Knows nothing of how it was fitted."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.traces import Trace
from lensteer.vectors import Direction

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False)
class TokenProjections:
    """How far each token's residual goes along one direction.

    Attributes:
        label: of the direction.
        layer: whose output was read.
        tokens: their text, prompt included.
        prompt_length: how many of them are the prompt.
        values: <h, û> at each token as a multiple of the length of the layer's mean activation.
    """

    label: str
    layer: int
    tokens: tuple[str, ...]
    prompt_length: int
    values: Float[Tensor, " pos"]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per token."""
        return pd.DataFrame({"token": self.tokens, "projection": self.values.tolist()})


def token_projections(model: TransformerBridge, trace: Trace, direction: Direction, layer: int) -> TokenProjections:
    """<h_l, û_l> / ‖mean h_l‖ at every token of a chain, from one forward.

    Args:
        model: the bridge; plans that are on apply.
        trace: prompt and response.
        direction: such as `vectors["backtracking"]`.
        layer: whose output is read.

    Raises:
        LensteerError: a layer that the model or the direction lacks.
    """
    vector = direction.scaled(models.check_layer(model, layer), "mean_norm").to(models.device(model))
    found: list[Tensor] = []
    hooks = [(models.resid_hook(layer), lambda resid, hook: found.append(resid[0].float()))]
    ids = torch.tensor([trace.ids], device=models.device(model))
    with torch.no_grad(), model.hooks(fwd_hooks=hooks):
        model(ids, attention_mask=torch.ones_like(ids), return_type=None)
    values = (found[0] @ vector.float() / vector.float().norm() ** 2).cpu()
    texts: list[str] = []
    for part in (trace.prompt_ids, trace.response_ids):
        text, starts = models.decode_offsets(model.tokenizer, part)
        texts += [text[a:b] for a, b in pairwise([*starts, len(text)])]
    return TokenProjections(direction.label, layer, tuple(texts), trace.prompt_length, values)

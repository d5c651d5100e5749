"""Projections of a chain's residual stream on directions, token by token."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.arguments import checked
from lensteer.forward import Forward, right_padded
from lensteer.results import Result
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors, Direction

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False, repr=False)
class TokenProjections(Result):
    """The projection of each token's residual on one direction.

    Attributes:
        label: of the direction.
        layer: whose output was read.
        tokens: their text, prompt included.
        prompt_length: number of prompt tokens.
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


@checked()
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
    vector = direction.scaled(models.check_layer(model, layer), "mean_norm").double()
    values = _along(model, trace, {layer: (vector / vector.norm() ** 2)[None]})[0, 0].float()
    texts: list[str] = []
    for part in (trace.prompt_ids, trace.response_ids):
        text, starts = models.decode_offsets(model.tokenizer, part)
        texts += [text[a:b] for a, b in pairwise([*starts, len(text)])]
    return TokenProjections(direction.label, layer, tuple(texts), trace.prompt_length, values)


def all_projections(
    model: TransformerBridge, trace: Trace, vectors: BehaviorVectors
) -> Float[Tensor, "behavior layer pos"]:
    """<h_l, û_l> / ‖mean h_l‖ at every token of a chain, for every behavior and layer; NaN if a vector is zero.

    In multiples of the length of the layer's mean activation, regardless of the unit of a coefficient.

    Args:
        model: the bridge; plans that are on apply.
        trace: prompt and response.
        vectors: of the behaviors.
    """
    unit = vectors.raw.double() / vectors.raw.double().norm(dim=-1, keepdim=True)
    unit = unit / vectors.mean_norm.double()[:, None]
    return _along(model, trace, {layer: unit[:, i] for i, layer in enumerate(vectors.layers)})


@torch.inference_mode()
def _along(
    model: TransformerBridge, trace: Trace, directions: Mapping[int, Float[Tensor, "behavior d_model"]]
) -> Float[Tensor, "behavior layer pos"]:
    """<h_l, d> at every token, for some directions at each layer, from one forward."""
    found: dict[int, Tensor] = {}

    def read(layer: int, resid: Tensor) -> None:
        found[layer] = (resid[0].double() @ directions[layer].T.to(resid.device)).T.cpu()

    forward = Forward(model, right_padded(model, [trace.ids], [trace.prompt_length]))
    with forward.hooked(read, directions):
        forward.whole(stop=max(directions))
    return torch.stack([found[layer] for layer in directions], 1)

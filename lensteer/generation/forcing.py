"""Teacher forcing: the logits at which the tokens of given responses would have been drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from lensteer.errors import LensteerError
from lensteer.forward import Forward, left_padded
from lensteer.steering import Plan

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@torch.inference_mode()
def forced_logits(
    model: TransformerBridge,
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Sequence[int]],
    *,
    plans: Sequence[Plan | None] | None = None,
) -> list[Float[Tensor, "_pos d_vocab"]]:
    """Logits at which a model would have drawn each token of given responses, from one forward over all rows.

    Entry `[row][t]` predicts `responses[row][t]`: under the plans of a generation, what that token was drawn from
    there, up to rounding. Prompts end together, so that only the responses' part of the vocabulary is computed.

    Args:
        model: the bridge. Plans that are on apply to all rows.
        prompts: token ids.
        responses: token ids, at least one each.
        plans: one per row, None for a row that is left alone.

    Raises:
        LensteerError: an empty prompt or response, or a list of another length than the prompts.
    """
    for name, given in (("responses", responses), ("plans", plans)):
        if given is not None and len(given) != len(prompts):
            raise LensteerError(f"{len(given)} {name} for {len(prompts)} prompts: give one per prompt")
    if not all(map(len, [*prompts, *responses])):
        raise LensteerError("an empty prompt or response: give at least one token id of each per row")
    if not prompts:
        return []
    start, keep = max(map(len, prompts)), max(map(len, responses))
    ids = [[0] * (start - len(p)) + [*p, *r] + [0] * (keep - len(r)) for p, r in zip(prompts, responses, strict=True)]
    text = left_padded(model, prompts)
    whole = torch.tensor(ids, device=text.ids.device)[:, :-1]  # the last token predicts nothing
    forward = Forward(model, replace(text, ids=whole), plans)
    if forward.slots:
        forward.cache = DynamicCache()
    with forward.hooked():
        logits = forward.prefill(keep=keep)
    return [row[: len(r)] for row, r in zip(logits, responses, strict=True)]

"""Teacher forcing: the logits at which the tokens of given responses would have been drawn."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.generation.running import choose_runner, prefilled, slot_edits
from lensteer.positions import Context
from lensteer.steering import Edits, Plan, attached, tokens_seen

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
    runner, rows = choose_runner(model, plans, len(prompts))
    where = models.device(model)
    start, keep = max(map(len, prompts)), max(map(len, responses))
    width = start + keep - 1  # the last token predicts nothing
    ids = torch.tensor(
        [[0] * (start - len(p)) + [*p, *r] + [0] * (keep - len(r)) for p, r in zip(prompts, responses, strict=True)],
        device=where,
    )[:, :width]
    pad = torch.tensor([start - len(p) for p in prompts], device=where)
    lengths = torch.tensor([len(p) for p in prompts], device=where)
    edits, slots = Edits.of(rows, model), slot_edits(model, rows, [len(p) for p in prompts], start)
    cache = DynamicCache() if slots else None
    seen: list[Context] = []

    def forward(begin: int, end: int) -> Tensor:
        seen[:] = [Context(ids[:, :end], pad, lengths, models.token_table(model))]
        position = seen[0].position
        options: dict[str, Any] = dict(
            attention_mask=(position >= 0).long(),
            position_ids=position[:, begin:].clamp(min=0),
            past_key_values=cache,
            use_cache=cache is not None,
            logits_to_keep=min(keep, end - begin),
        )
        if runner is not model:
            return torch.as_tensor(runner(input_ids=ids[:, begin:end], **options).logits)
        with tokens_seen(seen[0]):
            return model(ids[:, begin:end], return_type="logits", **options)

    with attached(model, runner, list(edits.groups), lambda layer, resid: edits.apply(layer, resid, seen[0])):
        logits = prefilled(model, cache, slots, width, forward)
    return [row[: len(r)] for row, r in zip(logits, responses, strict=True)]

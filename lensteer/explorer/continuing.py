"""A chain continued twice from the same point, steered and unsteered, side by side in one batch.

Plans act on the given tokens, too, as they would have in a generation from the prompt. Knows nothing of widgets.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers import DynamicCache

from lensteer import models
from lensteer.annotation import Annotator, annotate
from lensteer.errors import LensteerError
from lensteer.generation.buffers import Buffered
from lensteer.generation.running import choose_runner, prefilled, slot_edits
from lensteer.positions import Context
from lensteer.steering import Edits, Plan, attached, tokens_seen, wanted_prefill
from lensteer.traces import Trace, chain_seed

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NewTokens = tuple[list[int], list[int]]
"""What has been made so far: unsteered, steered."""


@dataclass(frozen=True)
class Continuation:
    """Two continuations of one chain, annotated.

    Attributes:
        unsteered: the chain up to the cut, and what the model made of it.
        steered: the same under the plan.
        cut: position of the first new token (an offset token that the plan put behind the prompt counts).
    """

    unsteered: Trace
    steered: Trace
    cut: int


def continue_chain(
    model: TransformerBridge,
    trace: Trace,
    plan: Plan | None,
    *,
    cut: int | None = None,
    max_new_tokens: int = 200,
    temperature: float = 0.0,
    seed: int = 0,
    annotator: Annotator | None = None,
    advance: Callable[[NewTokens], object] | None = None,
) -> Continuation:
    """Continue a chain from a point in its response, unsteered and under a plan.

    From the prompt's end it makes what `generate_traces` would, with the same seed.

    Args:
        model: the bridge; plans that are on apply to both.
        trace: the chain.
        plan: None steers nothing.
        cut: absolute position of the first token that is made anew; None is the prompt's end.
        max_new_tokens: of each.
        temperature: 0 is greedy.
        seed: both draw with the same random numbers.
        annotator: of the two chains; None leaves them without labels.
        advance: called after every step with all new tokens so far; what it raises ends the run.

    Raises:
        LensteerError: a cut outside the response or behind its end token, an impossible number, a plan that the model
            or the prompt cannot take, logits that are not finite.
    """
    cut = trace.prompt_length if cut is None else cut
    kept = trace.response_ids[: max(cut - trace.prompt_length, 0)]
    if not trace.prompt_length <= cut <= len(trace.ids) or models.end_ids(model) & set(kept):
        last = len(trace.ids) - bool(models.end_ids(model) & set(trace.response_ids[-1:]))
        raise LensteerError(f"cut={cut}: a continuation may begin at positions {trace.prompt_length} to {last}")
    if max_new_tokens < 1 or not 0 <= temperature < math.inf:
        raise LensteerError(f"max_new_tokens={max_new_tokens}, temperature={temperature}: give at least 1 and 0")
    base = replace(trace, response_ids=kept, offsets=trace.offsets[: len(kept)], spans=(), run="")
    prefill = wanted_prefill(model, plan)
    if prefill and not trace.prefill.endswith(prefill):
        prompt = trace.prompt + prefill
        ids = tuple(models.encode(model, prompt))
        base = replace(base, prompt=prompt, prompt_ids=ids, prefill=trace.prefill + prefill)
    noise = None
    if temperature:
        generator = torch.Generator().manual_seed(chain_seed(seed, trace.task.id, trace.sample) % 2**63)
        noise = torch.rand(max_new_tokens, generator=generator, dtype=torch.float64)
    rows = _decode(model, base, plan, max_new_tokens, temperature, noise, advance)
    unsteered, steered = (extended(model, base, row) for row in rows)
    if annotator is not None:
        unsteered, steered = annotate([unsteered, steered], annotator)
    return Continuation(unsteered, steered, len(base.ids))


def extended(model: TransformerBridge, trace: Trace, new: Sequence[int]) -> Trace:
    """A trace with more tokens behind it, its text decoded from the very ids; not annotated."""
    ids = (*trace.response_ids, *new)
    response, offsets = models.decode_offsets(model.tokenizer, ids)
    finished = bool(new) and new[-1] in models.end_ids(model)
    return replace(trace, response=response, response_ids=ids, offsets=tuple(offsets), finished=finished, spans=())


@torch.inference_mode()
def _decode(
    model: TransformerBridge,
    base: Trace,
    plan: Plan | None,
    limit: int,
    temperature: float,
    noise: Float[Tensor, " pos"] | None,
    advance: Callable[[NewTokens], object] | None,
) -> NewTokens:
    runner, rows = choose_runner(model, [None, plan], 2)
    where, table, ends = models.device(model), models.token_table(model), models.end_ids(model)
    ids, length = torch.tensor([base.ids] * 2, device=where), len(base.prompt_ids)
    edits, slots = Edits.of(rows, model), slot_edits(model, rows, [length] * 2, length)
    zeros = ids.new_zeros(2)
    cache = DynamicCache()
    cache.layers = [Buffered() for _ in range(models.n_layers(model))]
    seen: list[Context] = []

    def forward(begin: int, end: int) -> Float[Tensor, "batch d_vocab"]:
        seen[:] = [Context(ids[:, :end], zeros, zeros + length, table)]
        options: dict[str, Any] = dict(
            attention_mask=torch.ones_like(seen[0].ids),
            position_ids=seen[0].position[:, begin:],
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if runner is not model:
            return runner(input_ids=ids[:, begin:end], **options).logits[:, -1].float()
        with tokens_seen(seen[0]):
            return model(ids[:, begin:end], return_type="logits", **options)[:, -1].float()

    made: NewTokens = ([], [])
    over = [False, False]
    with attached(model, runner, list(edits.groups), lambda layer, resid: edits.apply(layer, resid, seen[0])):
        for step in range(limit):
            end = len(base.ids) + step
            logits = forward(end - 1, end) if step else prefilled(model, cache, slots, end, forward)
            if not logits.isfinite().all():
                raise LensteerError(f"the logits of token {step} are not finite: lower the coefficient")
            new = _pick(logits, temperature, None if noise is None else float(noise[step]))
            ids = torch.cat([ids, new[:, None]], 1)
            for row, token in enumerate(new.tolist()):
                if not over[row]:
                    made[row].append(token)
                    over[row] = token in ends
            if advance is not None:
                advance(made)
            if all(over):
                break
    return made


def _pick(logits: Float[Tensor, "batch d_vocab"], temperature: float, noise: float | None) -> Tensor:
    if noise is None:
        return logits.argmax(-1)
    cumulative = (logits / temperature).softmax(-1).double().cumsum(-1)
    drawn = torch.searchsorted(cumulative, noise * cumulative[:, -1:], right=True)[:, 0]
    return drawn.clamp(max=logits.shape[1] - 1)

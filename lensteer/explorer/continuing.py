"""A chain continued twice from the same point, steered and unsteered, side by side in one batch.

Plans act on the given tokens, too, as they would have in a generation from the prompt.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lensteer import models
from lensteer.annotation import Annotator, annotate
from lensteer.errors import LensteerError
from lensteer.generation import decode
from lensteer.jobs import chain_seed
from lensteer.steering import Plan, wanted_prefill
from lensteer.traces import Trace

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
        cut: position of the first new token (an offset token that the plan appended to the prompt counts).
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
        LensteerError: a cut outside the response or after its end token, an impossible number, a plan that the model
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
    made: NewTokens = ([], [])
    seeds = [chain_seed(seed, trace.task.id, trace.sample)] * 2
    steps = decode(
        model,
        [base.ids] * 2,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        seeds=seeds,
        plans=[None, plan],
        prompt_lengths=[base.prompt_length] * 2,
    )
    with closing(steps):  # hooks go, also where `advance` raises
        for step in steps:
            for row, token in zip(step.rows, step.tokens, strict=True):
                made[row].append(token)
            if advance is not None:
                advance(made)
    unsteered, steered = (extended(model, base, row) for row in made)
    if annotator is not None:
        unsteered, steered = annotate([unsteered, steered], annotator)
    return Continuation(unsteered, steered, len(base.ids))


def extended(model: TransformerBridge, trace: Trace, new: Sequence[int]) -> Trace:
    """A trace with more tokens appended, its text decoded from the very ids; not annotated."""
    ids = (*trace.response_ids, *new)
    response, offsets = models.decode_offsets(model.tokenizer, ids)
    finished = bool(new) and new[-1] in models.end_ids(model)
    return replace(trace, response=response, response_ids=ids, offsets=tuple(offsets), finished=finished, spans=())

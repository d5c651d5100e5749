"""Batched, KV-cached decoding with edits; every row's tokens depend on that row alone.

Prompts are left-padded, finished rows leave the batch, and sampling inverts the cumulative distribution at one uniform
number per step from the row's own generator: the same seed gives the same chain in any batch, and two rows with the
same seed differ only by their plans. Rows with the same prompt share its prefill up to the last token, unless their
plans edit it differently.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers.cache_utils import DynamicLayer

from lensteer import models
from lensteer.caches import keep_rows, new_cache
from lensteer.errors import LensteerError
from lensteer.forward import Forward, left_padded
from lensteer.steering import Plan, active_plans, foreign_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Buffered(DynamicLayer):
    """A cache layer with preallocated room; the stock one copies its whole content for every new token."""

    keys: Tensor
    values: Tensor
    room: tuple[Tensor, Tensor]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append keys and values; returns all of them."""
        old = self.keys.shape[-2] if self.is_initialized else 0
        new = old + key_states.shape[-2]
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.room = self._allocate(key_states, new + 64), self._allocate(value_states, new + 64)
        elif new > self.room[0].shape[-2]:
            length = new + new // 2
            bigger = self._allocate(key_states, length), self._allocate(value_states, length)
            for target, source in zip(bigger, (self.keys, self.values), strict=True):
                target[..., :old, :] = source
            self.room = bigger
        for buffer, states in zip(self.room, (key_states, value_states), strict=True):
            buffer[..., old:new, :] = states
        self.keys, self.values = (buffer[..., :new, :] for buffer in self.room)
        return self.keys, self.values

    @staticmethod
    def _allocate(like: Tensor, length: int) -> Tensor:
        return like.new_empty((*like.shape[:-2], length, like.shape[-1]))

    def keep(self, rows: Tensor) -> None:
        """Keep some of the batch's rows."""
        length = self.keys.shape[-2]
        self.room = self.room[0][rows], self.room[1][rows]
        self.keys, self.values = (buffer[..., :length, :] for buffer in self.room)


@dataclass(frozen=True)
class Generated:
    """A row's new token ids (the end token included) and whether it ended by itself."""

    ids: tuple[int, ...]
    finished: bool


class Step(NamedTuple):
    """The rows that were extended in one step, the token of each, and whether it ends its row."""

    rows: list[int]
    tokens: list[int]
    ended: list[bool]


def generate(
    model: TransformerBridge,
    prompts: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    plans: Sequence[Plan | None] | None = None,
    advance: Callable[[int], object] | None = None,
) -> list[Generated]:
    """Continue all prompts together. Arguments and errors are those of `decode`.

    Args:
        model: the bridge.
        prompts: token ids.
        max_new_tokens: maximum number of new tokens per row.
        temperature: 0 is greedy.
        top_p: nucleus sampling: draw from the likeliest tokens that together have this probability.
        seeds: one per row, needed when sampling.
        plans: one per row, None for a row without one.
        advance: called with the number of tokens generated in each step.
    """
    made: list[list[int]] = [[] for _ in prompts]
    finished = [False] * len(prompts)
    options: dict[str, Any] = dict(temperature=temperature, top_p=top_p, seeds=seeds, plans=plans)
    with closing(decode(model, prompts, max_new_tokens=max_new_tokens, **options)) as steps:  # always removes hooks
        for step in steps:
            for row, token, ended in zip(*step, strict=True):
                made[row].append(token)
                finished[row] = ended
            if advance is not None:
                advance(len(step.rows))
    return [Generated(tuple(ids), ended) for ids, ended in zip(made, finished, strict=True)]


@torch.inference_mode()
def decode(
    model: TransformerBridge,
    rows: Sequence[Sequence[int]],
    *,
    max_new_tokens: int,
    temperature: float = 0.0,
    top_p: float = 1.0,
    seeds: Sequence[int] | None = None,
    plans: Sequence[Plan | None] | None = None,
    prompt_lengths: Sequence[int] | None = None,
) -> Generator[Step, None, None]:
    """Continue rows of token ids, one token each per step.

    Args:
        model: the bridge. Plans that are on apply to all rows; foreign hooks fire, but slow it down.
        rows: token ids of prompts, optionally with the beginning of a response.
        max_new_tokens: maximum number of new tokens per row.
        temperature: 0 is greedy, with ties to the lowest id.
        top_p: nucleus sampling: draw from the likeliest tokens that together have this probability; 1 draws from all.
        seeds: one per row, needed when sampling.
        plans: one per row, None for a row without one.
        prompt_lengths: number of prompt tokens of each row, for scopes; None: all of them.

    Yields:
        Each step's tokens.

    Raises:
        LensteerError: an empty row, an invalid number, sampling without seeds, a list whose length differs from the
            rows', logits that are not finite.
    """
    if not all(map(len, rows)):
        raise LensteerError("an empty prompt: give at least one token id per row")
    if max_new_tokens < 1:
        raise LensteerError(f"max_new_tokens={max_new_tokens}: give a positive number")
    if not 0 <= temperature < math.inf:
        raise LensteerError(f"temperature {temperature}: give 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise LensteerError(f"top_p={top_p}: give a probability above 0, 1 for all tokens")
    if temperature and seeds is None:
        raise LensteerError(f"sampling at temperature {temperature} needs seeds, one per row")
    for name, given in (("seeds", seeds), ("plans", plans), ("prompt_lengths", prompt_lengths)):
        if given is not None and len(given) != len(rows):
            raise LensteerError(f"{len(given)} {name} for {len(rows)} prompts: give one per prompt")
    if not rows:
        return
    models.check_rows(model, rows, new=max_new_tokens)
    cache = new_cache(model, Buffered)
    forward = Forward(model, left_padded(model, rows, prompt_lengths), plans, cache=cache)
    where, width = forward.text.ids.device, forward.text.ids.shape[1]
    ends = torch.tensor(sorted(models.end_ids(model)), device=where)
    numbers, live = list(range(len(rows))), [True] * len(rows)  # rows in the batch, and which of them have not ended
    noise = None
    if temperature and seeds is not None:
        noise = torch.stack([_uniforms(seed, max_new_tokens) for seed in seeds]).to(where)
    steered = forward.steered() | bool(active_plans(model))
    alike = not foreign_hooks(model)  # a foreign hook may treat rows differently
    with forward.hooked():
        for step in range(max_new_tokens):
            end = width + step
            if step:
                logits = forward.run(end - 1, end, keep=1)[:, -1].float()
            else:
                logits = _prefilled(forward, rows, plans, alike)
            if noise is None:
                new = logits.argmax(-1)
            else:
                p = (logits / temperature).softmax(-1)
                new = inverse_cdf(p if top_p == 1 else nucleus(p, top_p), noise[:, step])
            forward.text = replace(forward.text, ids=torch.cat([forward.text.ids, new[:, None]], 1))
            # All that the host has to know, in one transfer: a GPU is waited for once per step.
            tokens, ended, finite = torch.stack([new, torch.isin(new, ends).long(), _finite(logits)]).tolist()
            if not all(finite):
                raise _overflow(numbers[finite.index(0)], step, steered, model)
            now = [i for i, alive in enumerate(live) if alive]
            yield Step([numbers[i] for i in now], [tokens[i] for i in now], [bool(ended[i]) for i in now])
            live = [alive and not over for alive, over in zip(live, ended, strict=True)]
            if not any(live):
                return
            if sum(live) / len(live) < 0.8:  # compacting the KV cache copies it, so several rows leave together
                left = [i for i, alive in enumerate(live) if alive]
                kept = torch.tensor(left, device=where)
                forward.keep(kept)
                numbers, live = [numbers[i] for i in left], [True] * len(left)
                noise = None if noise is None else noise[kept]


def _prefilled(
    forward: Forward, rows: Sequence[Sequence[int]], plans: Sequence[Plan | None] | None, alike: bool
) -> Float[Tensor, "batch d_vocab"]:
    """The first logits. Rows with the same prefill run all but its last token once, and the cache is copied to all.

    Rows have the same prefill if they are alike, and have the same ids, and the same plan if it edits more than the
    last token.
    """
    text, width = forward.text, forward.text.ids.shape[1]
    if forward.slots or width < 2 or not alike:
        return forward.prefill(keep=1)[:, -1].float()
    edited = forward.edits.touched(text, width - 1).tolist()
    lengths = text.prompt_length.tolist()
    keys = [
        (tuple(ids), length, id(plan) if own else None)
        for ids, length, plan, own in zip(rows, lengths, plans or [None] * len(rows), edited, strict=True)
    ]
    first: dict[object, int] = {}
    for row, key in enumerate(keys):
        first.setdefault(key, row)
    if len(first) == len(keys):
        return forward.prefill(keep=1)[:, -1].float()
    place = {key: i for i, key in enumerate(first)}
    edits = forward.edits
    forward.keep(torch.tensor(list(first.values()), device=text.ids.device))
    forward.run(0, width - 1, keep=1)
    forward.text, forward.edits = text, edits
    for layer in forward.cache.layers:
        keep_rows(layer, torch.tensor([place[key] for key in keys], device=text.ids.device))
    return forward.run(width - 1, width, keep=1)[:, -1].float()


def _finite(logits: Float[Tensor, "batch d_vocab"]) -> Int[Tensor, " batch"]:
    """1 for the rows whose logits are all finite."""
    low, high = logits.aminmax(dim=1)  # both NaN where any logit is
    return (torch.isfinite(low) & torch.isfinite(high)).long()


def _overflow(row: int, step: int, steered: Bool[Tensor, " row"], model: TransformerBridge) -> LensteerError:
    where, dtype = f"the logits of row {row} are not finite at step {step}", model.original_model.dtype
    if steered[row]:
        return LensteerError(f"{where}: lower the coefficient")
    return LensteerError(
        f"{where}, unsteered: {dtype} does not hold this model's activations; load it in another dtype"
    )


def nucleus(p: Float[Tensor, "batch d_vocab"], mass: float) -> Float[Tensor, "batch d_vocab"]:
    """Probabilities of the likeliest tokens that together have at least `mass`; 0 for the others."""
    ordered, ids = p.sort(stable=True, dim=-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < mass
    return torch.zeros_like(p).scatter(-1, ids, torch.where(kept, ordered, 0.0))


def inverse_cdf(
    p: Float[Tensor, "batch d_vocab"], uniform: Float[Tensor, " batch"], block: int = 256
) -> Int[Tensor, " batch"]:
    """The first id whose cumulative probability exceeds `uniform` times the total.

    Block sums over the vocabulary locate the block, and sums within it the id: one pass over `p` instead of a
    double-precision copy and its cumulative sum.
    """
    size = p.shape[1]
    blocks = torch.nn.functional.pad(p, (0, -size % block)).unflatten(1, (-1, block))
    ends = blocks.sum(-1, dtype=torch.float64).cumsum(-1)
    wanted = uniform[:, None] * ends[:, -1:]
    which = torch.searchsorted(ends, wanted, right=True).clamp(max=ends.shape[1] - 1)
    inside = blocks.gather(1, which[..., None].expand(-1, 1, block))[:, 0].double().cumsum(-1)
    before = torch.where(which > 0, ends.gather(1, (which - 1).clamp(min=0)), 0.0)
    found = which[:, 0] * block + torch.searchsorted(inside, wanted - before, right=True)[:, 0]
    return found.clamp(max=size - 1)


def _uniforms(seed: int, n: int) -> Float[Tensor, " n"]:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64)

"""Batched, KV-cached generation with edits; every row's tokens depend on that row alone.

Prompts are padded on the left, finished rows leave the batch, and sampling inverts the cumulative distribution at one
uniform number per step from the row's own generator: the same seed gives the same chain in any batch, and two arms with
the same seeds differ by what was done to them. Rows with the same prompt share its prefill up to the last token, unless
their plans edit it differently. Knows nothing of tasks or behaviors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.generation.buffers import Buffered
from lensteer.generation.running import choose_runner, prefilled, slot_edits
from lensteer.positions import Context
from lensteer.steering import Edits, Plan, attached, foreign_hooks, tokens_seen

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class Generated:
    """A row's new token ids (the end token included) and whether it ended by itself."""

    ids: tuple[int, ...]
    finished: bool


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
    """Continue all prompts together.

    Args:
        model: the bridge. Plans that are on apply to all rows; foreign hooks fire, and cost speed.
        prompts: token ids.
        max_new_tokens: at most so many per row.
        temperature: 0 takes the likeliest token, ties to the lowest id.
        top_p: draw from the likeliest tokens that together have so much probability; 1 draws from all.
        seeds: one per row, needed when sampling.
        plans: one per row, None for a row that is left alone.
        advance: called with the number of tokens made in each step.

    Raises:
        LensteerError: an empty prompt, an impossible number, sampling without seeds, a list of another length than
            the prompts, logits that are not finite.
    """
    if not prompts:
        return []
    if not all(len(p) for p in prompts):
        raise LensteerError("an empty prompt: give at least one token id per row")
    if max_new_tokens < 1:
        raise LensteerError(f"max_new_tokens={max_new_tokens}: give a positive number")
    if not 0 <= temperature < math.inf:
        raise LensteerError(f"temperature {temperature}: give 0 (greedy) or a positive number")
    if not 0 < top_p <= 1:
        raise LensteerError(f"top_p={top_p}: give a probability above 0, 1 for all tokens")
    if temperature and seeds is None:
        raise LensteerError(f"sampling at temperature {temperature} needs seeds, one per row")
    for name, given in (("seeds", seeds), ("plans", plans)):
        if given is not None and len(given) != len(prompts):
            raise LensteerError(f"{len(given)} {name} for {len(prompts)} prompts: give one per prompt")
    runner, rows = choose_runner(model, plans, len(prompts))
    loop = _Loop(model, runner, prompts, rows, max_new_tokens, temperature, top_p, seeds)
    if not foreign_hooks(model):  # such a hook may tell rows apart
        loop.share([(tuple(p), id(plan)) for p, plan in zip(prompts, plans or [None] * len(prompts), strict=True)])
    return loop.run(advance)


class _Loop:
    """One batch on its way: rows that still run, in step with the cache."""

    def __init__(
        self,
        model: TransformerBridge,
        runner: nn.Module,
        prompts: Sequence[Sequence[int]],
        plans: list[Plan | None],
        max_new_tokens: int,
        temperature: float,
        top_p: float,
        seeds: Sequence[int] | None,
    ) -> None:
        self.model, self.runner = model, runner
        self.limit, self.temperature, self.top_p = max_new_tokens, temperature, top_p
        where = models.device(model)
        width = max(map(len, prompts))
        self.lengths = torch.tensor([len(p) for p in prompts], device=where)
        self.ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], device=where)
        self.rows = torch.arange(len(prompts), device=where)
        self.edits = Edits.of(plans, model)
        self.slots = slot_edits(model, plans, self.lengths.tolist(), width)
        self.cache = DynamicCache()
        self.cache.layers = [Buffered() for _ in range(models.n_layers(model))]
        self.ends = torch.tensor(sorted(models.end_ids(model)), device=where)
        self.noise = None
        self.shared: tuple[Tensor, Tensor] | None = None
        if temperature and seeds is not None:
            self.noise = torch.stack([_uniforms(seed, max_new_tokens) for seed in seeds]).to(where)

    def share(self, rows: Sequence[tuple[tuple[int, ...], int]]) -> None:
        """Find rows with one prefill: the same prompt, and the same plan where one edits more than its last token.

        Args:
            rows: prompt and number of the plan of each row.
        """
        if self.slots or self.ids.shape[1] < 2:
            return
        context = Context(self.ids, self.ids.shape[1] - self.lengths, self.lengths, models.token_table(self.model))
        edited = self.edits.touched(context, self.ids.shape[1] - 1).tolist()
        keys = [(ids, plan if own else None) for (ids, plan), own in zip(rows, edited, strict=True)]
        first: dict[object, int] = {}
        for row, key in enumerate(keys):
            first.setdefault(key, row)
        if len(first) < len(keys):
            place = {key: i for i, key in enumerate(first)}
            self.shared = (
                torch.tensor(list(first.values()), device=self.ids.device),
                torch.tensor([place[key] for key in keys], device=self.ids.device),
            )

    @torch.inference_mode()
    def run(self, advance: Callable[[int], object] | None) -> list[Generated]:
        self.width = self.ids.shape[1]
        done: dict[int, Generated] = {}
        with ExitStack() as stack:
            stack.enter_context(
                attached(
                    self.model,
                    self.runner,
                    list(self.edits.groups),
                    lambda layer, resid: self.edits.apply(layer, resid, self.seen),
                )
            )
            for step in range(self.limit):
                end = self.width + step
                if step:
                    logits = self._forward(end - 1, end)
                elif self.shared is not None:
                    logits = self._prefill_once(end, *self.shared)
                else:
                    logits = prefilled(self.model, self.cache, self.slots, end, self._forward)
                new = self._pick(logits, step)
                self.ids = torch.cat([self.ids, new[:, None]], 1)
                if advance is not None:
                    advance(len(new))
                over = torch.isin(new, self.ends)
                for i in over.nonzero()[:, 0].tolist() if step + 1 < self.limit else range(len(new)):
                    row = int(self.rows[i])
                    ids = self.ids[i, self.width :].tolist()
                    done.setdefault(row, Generated(_until(ids, self.ends.tolist()), bool(over[i])))
                live = torch.tensor([int(r) not in done for r in self.rows], device=new.device)
                if not live.any():
                    break
                if live.float().mean() < 0.8:  # leaving costs a copy of the cache, so several leave together
                    self._keep(live.nonzero()[:, 0])
        return [done[row] for row in range(len(done))]

    def _prefill_once(self, end: int, first: Tensor, place: Tensor) -> Float[Tensor, "batch d_vocab"]:
        """Prefill one row of each kind but for the last token, copy the cache to all rows, and run that token."""
        every = self.ids, self.lengths, self.edits
        self.ids, self.lengths, self.edits = self.ids[first], self.lengths[first], self.edits.keep(first)
        self._forward(0, end - 1)
        self.ids, self.lengths, self.edits = every
        for layer in self.cache.layers:
            layer.keep(place)
        return self._forward(end - 1, end)

    def _forward(self, begin: int, end: int) -> Float[Tensor, "batch d_vocab"]:
        """Run the columns [begin, end) behind what the cache holds."""
        ids = self.ids[:, :end]
        self.seen = Context(ids, self.width - self.lengths, self.lengths, models.token_table(self.model))
        position = self.seen.position
        options: dict[str, Any] = dict(
            attention_mask=(position >= 0).long(),
            position_ids=position[:, begin:].clamp(min=0),
            past_key_values=self.cache,
            use_cache=True,
            logits_to_keep=1,
        )
        if self.runner is not self.model:
            return self.runner(input_ids=ids[:, begin:], **options).logits[:, -1].float()
        with tokens_seen(self.seen):
            return self.model(ids[:, begin:], return_type="logits", **options)[:, -1].float()

    def _pick(self, logits: Float[Tensor, "batch d_vocab"], step: int) -> Int[Tensor, " batch"]:
        low, high = logits.aminmax(dim=1)  # both NaN where any logit is
        if not (torch.isfinite(low).all() and torch.isfinite(high).all()):
            row = int(self.rows[~(torch.isfinite(low) & torch.isfinite(high))][0])
            raise LensteerError(f"the logits of row {row} are not finite at step {step}: lower the coefficient")
        if self.noise is None:
            return logits.argmax(-1)
        p = (logits / self.temperature).softmax(-1)
        return inverse_cdf(p if self.top_p == 1 else nucleus(p, self.top_p), self.noise[:, step])

    def _keep(self, live: Tensor) -> None:
        self.ids, self.rows, self.lengths = self.ids[live], self.rows[live], self.lengths[live]
        self.edits = self.edits.keep(live)
        self.noise = None if self.noise is None else self.noise[live]
        for layer in self.cache.layers:
            layer.keep(live)


def nucleus(p: Float[Tensor, "batch d_vocab"], mass: float) -> Float[Tensor, "batch d_vocab"]:
    """Probabilities of the likeliest tokens that together have at least `mass`; 0 for the others."""
    ordered, ids = p.sort(stable=True, dim=-1, descending=True)
    kept = ordered.cumsum(-1) - ordered < mass
    return torch.zeros_like(p).scatter(-1, ids, torch.where(kept, ordered, 0.0))


def inverse_cdf(
    p: Float[Tensor, "batch d_vocab"], uniform: Float[Tensor, " batch"], block: int = 256
) -> Int[Tensor, " batch"]:
    """The first id whose cumulative probability exceeds `uniform` times the total.

    Sums of blocks of the vocabulary find the block, and the sums within it the id: one pass over `p` instead of a
    double-precision copy of it and its running sum.
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


def _until(ids: list[int], ends: list[int]) -> tuple[int, ...]:
    """Ids up to and with the first end token (a row that has ended may stay in the batch for a while)."""
    stop = next((i for i, token in enumerate(ids) if token in ends), len(ids) - 1)
    return tuple(ids[: stop + 1])


def _uniforms(seed: int, n: int) -> Float[Tensor, " n"]:
    return torch.rand(n, generator=torch.Generator().manual_seed(seed % 2**63), dtype=torch.float64)

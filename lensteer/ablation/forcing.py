"""A chain under teacher forcing, steered against unsteered, whose unsteered pass is kept."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lensteer import models
from lensteer.ablation.effects import ForcedEffect
from lensteer.errors import LensteerError
from lensteer.forward import Forward, choose_runner
from lensteer.metrics import kl_divergence
from lensteer.positions import Context
from lensteer.steering import Plan, Plans, active_plans, foreign_hooks
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: So many plans run together at most: each has its own mask, so more of them cost more than they save.
MAX_ROWS = 8
#: So many tokens of them together: enough to fill a forward, few enough to be stopped soon.
MAX_TOKENS = 4096
#: And so many logits, which are held in single precision (1 GiB).
MAX_LOGITS = 2**28


@dataclass(frozen=True, eq=False)
class _Unsteered:
    """The pass that others are compared with, and what it was made under."""

    runner: nn.Module
    plans: list[Plans]
    cache: DynamicCache
    logits: Float[Tensor, "pos d_vocab"]


class ForcedChain:
    """A chain whose unsteered pass is kept: a plan then costs only what comes after the first token it changes.

    The numbers are those of `generation.forced_logits`, steered against unsteered. Plans and hooks that are on belong
    to both sides. Weights that are changed in place are not noticed.
    """

    def __init__(self, model: TransformerBridge, prompt_ids: Sequence[int], response_ids: Sequence[int]) -> None:
        """Nothing is run yet.

        Args:
            model: the bridge.
            prompt_ids: token ids.
            response_ids: token ids.

        Raises:
            LensteerError: either is empty.
        """
        if not len(prompt_ids) or not len(response_ids):
            raise LensteerError(
                f"{len(prompt_ids)} prompt and {len(response_ids)} response tokens: give at least one of each"
            )
        self.model, self.prompt_length = model, len(prompt_ids)
        self.ids = torch.tensor([[*prompt_ids, *response_ids]], device=models.device(model))
        self._kept: _Unsteered | None = None

    @staticmethod
    def of(model: TransformerBridge, trace: Trace, prefill: str = "") -> ForcedChain:
        """The chain of a trace, with a text such as a cache plan's offset token after its prompt if it isn't there."""
        there = trace.prefill.endswith(prefill)
        prompt = trace.prompt_ids if there else models.encode(model, trace.prompt + prefill)
        return ForcedChain(model, prompt, trace.response_ids)

    @property
    def rows(self) -> int:
        """How many plans run together."""
        length = self.ids.shape[1]
        logits = (length - self.prompt_length) * int(self.model.cfg.d_vocab)
        return max(1, min(MAX_ROWS, MAX_TOKENS // length, MAX_LOGITS // logits))

    def context(self, n_rows: int = 1) -> Context:
        """The whole chain as scopes see it."""
        zeros = self.ids.new_zeros(n_rows)
        return Context(self.ids.expand(n_rows, -1), zeros, zeros + self.prompt_length, models.token_table(self.model))

    def first_changed(self, plan: Plan | None) -> int:
        """The first position whose residual a plan may change; the chain's length where it changes nothing."""
        if plan is None:
            return self.ids.shape[1]
        if plan.slots:
            return 0
        chosen = [edit.scope.mask(self.context())[0].nonzero() for edit in plan.edits if edit.coefficient]
        return min((int(found[0]) for found in chosen if len(found)), default=self.ids.shape[1])

    def effect(self, plan: Plan | None) -> ForcedEffect:
        """What a plan does. `effects` for one."""
        return self.effects([plan])[0]

    @torch.inference_mode()
    def effects(self, plans: Sequence[Plan | None]) -> list[ForcedEffect]:
        """What each plan does, `rows` of them in one forward; None changes nothing.

        Raises:
            LensteerError: a plan that the model or the prompt cannot take, or logits that are not finite.
        """
        runner, rows = choose_runner(self.model, plans, len(plans))
        base = self._unsteered(runner)
        firsts = [self.first_changed(plan) for plan in plans]
        found: list[ForcedEffect] = []
        for start in range(0, len(plans), self.rows):
            end = start + self.rows
            found += self._measured(base, rows[start:end], firsts[start:end])
        return found

    def _measured(self, base: _Unsteered, rows: Sequence[Plan | None], firsts: Sequence[int]) -> list[ForcedEffect]:
        begin, n = 0 if any(plan.slots for plan in base.plans) else min(firsts), len(base.logits)
        offset = max(begin + 1 - self.prompt_length, 0)  # the logits at one position are for the next token
        if offset >= n:
            logits = base.logits.new_empty((len(rows), 0, base.logits.shape[1]))
        else:
            cache = _beginning(base.cache, begin, len(rows)) if begin else DynamicCache()
            logits = self._run(base.runner, rows, begin, cache)
        made = []
        for first, row in zip(firsts, logits, strict=True):
            skip = max(first + 1 - self.prompt_length, 0)  # exactly 0 in front, whatever the batch has rerun
            kl, change = torch.zeros(2, n, dtype=torch.float64)
            targets = self.ids[0, self.prompt_length + skip :]
            step = max(1, 2**22 // row.shape[-1])
            for at in range(skip, n, step):
                p, q = row[at - offset : at - offset + step], base.logits[at : at + step]
                if not p.isfinite().all():
                    raise LensteerError("the steered logits are not finite: lower the coefficient")
                kl[at : at + step] = kl_divergence(p, q).cpu()
                picked = targets[at - skip : at - skip + step, None]
                now, then = (x.double().log_softmax(-1).gather(-1, picked)[:, 0] for x in (p, q))
                change[at : at + step] = (now - then).cpu()
            made.append(ForcedEffect(self.prompt_length, kl, change))
        return made

    def _unsteered(self, runner: nn.Module) -> _Unsteered:
        on, kept = active_plans(self.model), self._kept
        same = kept is not None and kept.runner is runner and [*map(id, kept.plans)] == [*map(id, on)]
        if kept is None or not same or foreign_hooks(self.model):
            cache = DynamicCache()
            logits = self._run(runner, choose_runner(self.model, None, 1)[1], 0, cache)[0]
            if not logits.isfinite().all():
                raise LensteerError("the model's own logits are not finite here: load it in another dtype")
            self._kept = kept = _Unsteered(runner, on, cache, logits)
        return kept

    def _run(
        self, runner: nn.Module, rows: Sequence[Plan | None], begin: int, cache: DynamicCache
    ) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits for the response's tokens, or for those after `begin`, over a cache that holds what is before."""
        width, length = self.ids.shape[1] - 1, self.prompt_length  # the last token predicts nothing
        forward = Forward(self.model, self.context(len(rows)), cache=cache, chosen=(runner, rows))
        with forward.hooked():
            keep = min(width - begin, width + 1 - length)
            return forward.run(begin, width, keep=keep) if begin else forward.prefill(width, keep=keep)


def _beginning(cache: DynamicCache, length: int, n_rows: int) -> DynamicCache:
    """A cache of the first positions, for several rows; what is appended to it leaves the other one alone."""
    made = DynamicCache()
    made.layers = []
    for stored in cache.layers:
        layer = DynamicLayer()
        layer.lazy_initialization(stored.keys, stored.values)
        layer.keys, layer.values = (t[..., :length, :].expand(n_rows, -1, -1, -1) for t in (stored.keys, stored.values))
        made.layers.append(layer)
    return made


def forced_effect(model: TransformerBridge, trace: Trace, plan: Plan) -> ForcedEffect:
    """What a plan does to each token of a trace's response; a cache plan's offset token is appended to both prompts.

    Raises:
        LensteerError: a plan that the model or the prompt cannot take, or logits that are not finite.
    """
    return ForcedChain.of(model, trace, plan.prefill).effect(plan)

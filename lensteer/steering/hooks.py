"""How edits get into a running model, and out again whatever happens; which plans are on at the moment."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lensteer import models, twins
from lensteer.errors import LensteerError
from lensteer.positions import Context
from lensteer.steering.edits import Edits
from lensteer.steering.plans import Plan, Plans

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(eq=False)  # the same plan may be on twice: entries are told apart by who they are
class _Active:
    """A plan that is on, and the tokens that its hooks have seen so far."""

    plan: Plans
    seen: Context | None = None


_active: weakref.WeakKeyDictionary[nn.Module, list[_Active]] = weakref.WeakKeyDictionary()
_given: ContextVar[Context | None] = ContextVar("lensteer-context", default=None)


def active_plans(model: TransformerBridge) -> list[Plans]:
    """Plans that are on at the moment, outermost first."""
    return [entry.plan for entry in _active.get(model, [])]


def wanted_prefill(model: TransformerBridge, plan: Plan | None) -> str:
    """What the plans that are on, and one more, want appended to the prompt."""
    return max((p.prefill for p in [*active_plans(model), *([] if plan is None else [plan])]), default="", key=len)


def foreign_hooks(model: TransformerBridge) -> bool:
    """Whether any hook point carries a hook that is not ours."""
    points = {id(point): point for point in model.hook_dict.values()}.values()
    ours = sum(len({e.layer for e in plan.edits}) for plan in active_plans(model))
    return sum(len(p.fwd_hooks) + len(p.bwd_hooks) for p in points) > ours


@contextmanager
def tokens_seen(context: Context) -> Iterator[None]:
    """Tell plans that are on what the next forwards' tokens are, where a caller knows better than their own watch."""
    token = _given.set(context)
    try:
        yield
    finally:
        _given.reset(token)


@contextmanager
def attached(
    model: TransformerBridge, runner: nn.Module, layers: Iterable[int], edit: Callable[[int, Tensor], Tensor]
) -> Iterator[None]:
    """Hook `edit(layer, resid)` into a runner: the bridge at its hook points, its plain twin at its layers' outputs."""
    if runner is model:

        def at_point(layer: int) -> Callable[..., Tensor]:
            return lambda resid, hook: edit(layer, resid)

        bridge: Any = model
        with bridge.hooks(fwd_hooks=[(models.resid_hook(layer), at_point(layer)) for layer in layers]):
            yield
        return
    handles = []

    def at_output(layer: int) -> Callable[..., Any]:
        return lambda _module, _inputs, output: (
            (edit(layer, output[0]), *output[1:]) if isinstance(output, tuple) else edit(layer, output)
        )

    try:
        for layer in layers:
            handles.append(twins.twin_layer(runner, layer).register_forward_hook(at_output(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def installed(model: TransformerBridge, plan: Plans, prompt_length: int | None) -> Iterator[None]:
    """Have a plan on: hooks for residuals, and cache edits for `lensteer.generation` to see."""
    entry, tokens = _Active(plan), models.token_table(model)
    edits = Edits.of([plan], model)  # one row stands for all

    def watch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _given.get() is not None:
            entry.seen = _given.get()
            return
        if plan.slots:
            raise LensteerError(
                "a cache plan edits one slot between two parts of the prompt: use lensteer's own generation with it"
            )
        ids = kwargs.get("input_ids", args[0] if args else None)
        if ids is None:
            raise LensteerError("a steered forward needs token ids: which positions are steered depends on them")
        past = kwargs.get("past_key_values")
        length = 0 if past is None else int(past.get_seq_length())
        seen = entry.seen
        if not length:
            mask = kwargs.get("attention_mask")
            pad = ids.new_zeros(ids.shape[0])
            if mask is not None and mask.dim() == 2:
                pad = (mask.cumsum(1) == 0).sum(1)
            given = ids.shape[1] - pad if prompt_length is None else torch.full_like(pad, prompt_length)
            entry.seen = Context(ids, pad, given, tokens)
        elif seen is not None and seen.ids.shape == (ids.shape[0], length):
            entry.seen = Context(torch.cat([seen.ids, ids], 1), seen.pad, seen.prompt_length, tokens)
        else:
            raise LensteerError(
                f"a cache of {length} tokens that this plan has not seen: enter `plan.on(model)` before the prefill"
            )

    def edit(layer: int, resid: Tensor) -> Tensor:
        assert entry.seen is not None
        return edits.apply(layer, resid, entry.seen)

    handle = model.original_model.register_forward_pre_hook(watch, with_kwargs=True)
    try:
        with attached(model, model, edits.groups, edit):
            _active.setdefault(model, []).append(entry)
            try:
                yield
            finally:
                _active[model].remove(entry)
    finally:
        handle.remove()

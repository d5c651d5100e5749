"""The only editor of residuals: what is done to which positions of which layer, and how it gets into a running model.

h <- h + coefficient * v        (add; v as long as the layer's mean activation, so coefficient 1 is that long)
h <- h - coefficient * <h, û> û (project_out; coefficient 1 removes the direction)

Knows nothing of text, tasks or whether an edit does any good.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.positions import Context, PositionScope, everywhere

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

OPERATORS = ("add", "project_out")


@runtime_checkable
class Steerable(Protocol):
    """What can be steered along: a direction at every layer, such as `vectors["backtracking"]`."""

    @property
    def label(self) -> str:
        """What the direction is called."""

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The direction as it was computed; raises for a layer it lacks."""

    def scaled(self, layer: int) -> Float[Tensor, " d_model"]:
        """The direction, as long as the layer's mean activation."""


class _Joinable:
    """What one edit and several have in common."""

    edits: tuple[SteeringPlan, ...]

    def __add__(self, other: SteeringPlan | Plans) -> Plans:
        return Plans(self.edits + other.edits)

    @contextmanager
    def on(self, model: TransformerBridge, *, prompt_length: int | None = None) -> Iterator[TransformerBridge]:
        """Steer everything the model runs inside the `with`, through hook points that are gone afterwards.

        Args:
            model: the bridge.
            prompt_length: for forwards on whole chains: how many tokens are the prompt. By default what is first
                given in one go is the prompt, as in a generation.
        """
        with _installed(model, Plans(self.edits), prompt_length):
            yield model


@dataclass(frozen=True)
class SteeringPlan(_Joinable):
    """One edit: a behavior's direction, a layer, how much, where, and how. Join several with `+`.

    Attributes:
        direction: such as `vectors["backtracking"]`.
        layer: whose output is edited.
        coefficient: signed; 1 adds a vector as long as the layer's mean activation.
        scope: the positions that are edited.
        operator: "add" or "project_out".

    Raises:
        LensteerError: a layer the direction lacks, a coefficient that is not finite, an unknown operator.
    """

    direction: Steerable
    layer: int
    coefficient: float = 1.0
    scope: PositionScope = everywhere
    operator: str = "add"

    def __post_init__(self) -> None:
        if not math.isfinite(self.coefficient):
            raise LensteerError(f"coefficient {self.coefficient} is not finite: give a number such as 1.0 or -0.5")
        if self.operator not in OPERATORS:
            raise LensteerError(f"no operator {self.operator!r}: choose one of {list(OPERATORS)}")
        self.direction.at(self.layer)  # raises for a layer it lacks

    @property
    def edits(self) -> tuple[SteeringPlan, ...]:  # type: ignore[override]  # a plan is its own only edit
        """This edit alone (several plans joined have several)."""
        return (self,)

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """What is added per unit of coefficient, or the unit vector that is projected out."""
        if self.operator == "add":
            return self.direction.scaled(self.layer)
        raw = self.direction.at(self.layer)
        return raw / raw.norm()


@dataclass(frozen=True)
class Plans(_Joinable):
    """Several edits at once, in order."""

    edits: tuple[SteeringPlan, ...]


Plan = SteeringPlan | Plans


@dataclass
class _Group:
    """The edits of one layer that share operator and scope: a vector for each row, zero where a row has none."""

    operator: str
    scope: PositionScope
    table: Float[Tensor, "batch d_model"]
    strength: Float[Tensor, " batch"]


@dataclass
class Edits:
    """Plans laid out for a batch whose rows may differ in plan. `None` is a row that is not steered."""

    groups: dict[int, list[_Group]] = field(default_factory=dict)

    @staticmethod
    def of(plans: Sequence[SteeringPlan | Plans | None], model: TransformerBridge) -> Edits:
        """Lay out one plan (or None) per row.

        Raises:
            LensteerError: a layer that the model lacks, or a vector of another width or that is not finite.
        """
        groups: dict[int, list[_Group]] = {}
        shape, like = (len(plans), models.d_model(model)), next(iter(model.parameters()))
        for row, plan in enumerate(plans):
            behind: dict[int, int] = {}  # per layer, the first group that comes after the row's edits so far
            for edit in () if plan is None else plan.edits:
                found = groups.setdefault(models.check_layer(model, edit.layer), [])
                kind, least = (edit.operator, edit.scope), behind.get(edit.layer, 0)
                at = next((i for i, g in enumerate(found) if i >= least and (g.operator, g.scope) == kind), len(found))
                if at == len(found):
                    found.append(_Group(*kind, like.new_zeros(shape), like.new_zeros(shape[0])))
                behind[edit.layer] = at + 1
                found[at].table[row] = _checked(edit, shape[1]).to(like)
                found[at].strength[row] = edit.coefficient
        return Edits(groups)

    def apply(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], context: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual of the last `pos` positions of a context."""
        for group in self.groups.get(layer, ()):
            chosen = group.scope.mask(context)[:, -resid.shape[1] :, None]
            vector, strength = group.table[:, None], group.strength[:, None, None]
            if group.operator == "add":
                delta = strength * vector
            else:
                delta = -strength * (resid * vector).sum(-1, keepdim=True) * vector
            resid = torch.where(chosen, resid + delta, resid)
        return resid

    def keep(self, rows: Tensor) -> Edits:
        """The same for some of the rows."""
        return Edits(
            {
                layer: [_Group(g.operator, g.scope, g.table[rows], g.strength[rows]) for g in groups]
                for layer, groups in self.groups.items()
            }
        )


def _checked(edit: SteeringPlan, width: int) -> Tensor:
    vector = edit.vector
    if vector.shape != (width,) or not torch.isfinite(vector).all():
        raise LensteerError(
            f"{edit.direction.label!r} at layer {edit.layer} is zero, not finite or another model's: shape "
            f"{list(vector.shape)}, where this residual stream is {width} wide"
        )
    return vector


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
    """Hook `edit(layer, resid)` into a runner: the bridge at its hook points, its plain twin behind its layers."""
    if runner is model:

        def at_point(layer: int) -> Callable[..., Tensor]:
            return lambda resid, hook: edit(layer, resid)

        bridge: Any = model
        with bridge.hooks(fwd_hooks=[(models.resid_hook(layer), at_point(layer)) for layer in layers]):
            yield
        return
    handles = []

    def behind(layer: int) -> Callable[..., Any]:
        return lambda _module, _inputs, output: (
            (edit(layer, output[0]), *output[1:]) if isinstance(output, tuple) else edit(layer, output)
        )

    try:
        for layer in layers:
            handles.append(models.twin_layer(runner, layer).register_forward_hook(behind(layer)))
        yield
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _installed(model: TransformerBridge, plan: Plans, prompt_length: int | None) -> Iterator[None]:
    entry, tokens = _Active(plan), models.token_table(model)
    edits = Edits.of([plan], model)  # one row stands for all

    def watch(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        if _given.get() is not None:
            entry.seen = _given.get()
            return
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

"""Steering plans: which vector is added to which positions of which layer. Plans join with `+`.

h <- h + coefficient * v        (add; v is the difference of means, or scaled according to `unit`)
h <- h - coefficient * <h, û> û (project_out; coefficient 1 removes the direction)

`operators` has the equations of these and of the others, `gates` conditions on the residual, and `schedules`
coefficients that change over the generated tokens.
`Edits` applies plans to a batch, and is the only editor of residuals; `attached` and `installed` hook it into a model.
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
from jaxtyping import Bool, Float
from torch import Tensor, nn

from lensteer import models, twins
from lensteer.arguments import typed
from lensteer.errors import LensteerError
from lensteer.positions import Context, PositionScope, everywhere
from lensteer.steering.evidence import Evidence
from lensteer.steering.gates import Gate, Gates
from lensteer.steering.operators import IN_UNITS, OPERATORS
from lensteer.steering.schedules import Schedule

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: What coefficient 1 adds: the difference of means, unscaled; a vector as long as the layer's mean activation; or one
#: of length 1. The first transfers between models (`analyses/unit_of_coefficients.py`).
UNITS = ("difference", "mean_norm", "unit")

#: The same as text.
UNIT_WORDS = {
    "difference": "1 = the difference of means itself",
    "mean_norm": "1 = as long as the mean activation",
    "unit": "1 = length 1",
}


def check_unit(unit: str, units: Sequence[str] = UNITS) -> str:
    """The unit itself, if it is one of `units`.

    Raises:
        LensteerError: otherwise.
    """
    if unit not in units:
        raise LensteerError(f"no unit {unit!r} of a coefficient: choose one of {list(units)}")
    return unit


@runtime_checkable
class Steerable(Protocol):
    """A direction at every layer to steer along, such as `vectors["backtracking"]`."""

    @property
    def label(self) -> str:
        """The name of the direction."""

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The unscaled direction; raises for a layer it lacks."""

    def scaled(self, layer: int, unit: str = "difference") -> Float[Tensor, " d_model"]:
        """What coefficient 1 adds under a unit; see `Direction.scaled`."""


@runtime_checkable
class Slot(Protocol):
    """A one-shot edit of a KV cache (`cache_steering.CachePlan`), as plans use it."""

    @property
    def prefill(self) -> str:
        """The text that the edit appends to the prompt."""

    def describe(self) -> list[Any]:
        """Everything it depends on, as JSON-ready values."""


class Joinable:
    """Common base of one edit and of several: edits of residuals, and of cache slots."""

    edits: tuple[SteeringPlan, ...]
    slots: tuple[Slot, ...]

    def __add__(self, other: Joinable) -> Plans:
        return Plans(self.edits + other.edits, self.slots + other.slots)

    @property
    def prefill(self) -> str:
        """The text appended to the prompt; empty except for a cache edit with an offset token."""
        return max((slot.prefill for slot in self.slots), default="", key=len)

    @contextmanager
    def on(self, model: TransformerBridge, *, prompt_length: int | None = None) -> Iterator[TransformerBridge]:
        """Steer everything the model runs inside the `with`; hooks are removed afterwards.

        Args:
            model: the bridge.
            prompt_length: for forwards on whole chains: number of prompt tokens. By default the input of the first
                forward is the prompt, as in generation.
        """
        from lensteer.steering.plans import installed

        with installed(model, Plans(self.edits, self.slots), prompt_length):
            yield model

    def identity(self) -> list[Any]:
        """Everything the edits depend on, as JSON-ready values, to identify an experiment."""
        return [edit.describe() for edit in (*self.edits, *self.slots)]


@dataclass(frozen=True)
class SteeringPlan(Joinable):
    """One edit: direction, layer, coefficient, scope and operator. Join several with `+`.

    Attributes:
        direction: such as `vectors["backtracking"]`.
        layer: whose output is edited.
        coefficient: signed; in multiples of `unit`. Of "clamp" it is the projection to reach, in lengths of the unit's
            vector (0 removes the direction); of "rotate" the angle in degrees.
        scope: the positions that are edited. Everywhere is what the published work does and what files for servers can
            say; `evaluate` and runs steer generated tokens alone, which does as much on mini-R1 (docs/choices.md).
        operator: "add", "project_out", "clamp" or "rotate"; see `operators`.
        unit: of "add" and "clamp": "difference", the unscaled direction; "mean_norm", a vector as long as the
            layer's mean activation (the default before 0.1.0); "unit", one of length 1.
        evidence: what an evaluation measured for it, if any. It goes along with exports and changes nothing else.
        gate: edit only those positions of the scope at which it is open; None: all of them.
        schedule: of the coefficient over the generated tokens; None: constant.

    Raises:
        LensteerError: a layer the direction lacks, a coefficient that is not finite, an unknown operator or unit, or a
            gate whose direction is of another width.
    """

    direction: Steerable
    layer: int
    coefficient: float = 1.0
    scope: PositionScope = everywhere
    operator: str = "add"
    unit: str = "difference"
    evidence: Evidence | None = field(default=None, compare=False, repr=False)
    gate: Gate | None = None
    schedule: Schedule | None = None

    def __post_init__(self) -> None:
        typed(self)
        if not math.isfinite(self.coefficient):
            raise LensteerError(f"coefficient {self.coefficient} is not finite: give a number such as 1.0 or -0.5")
        if self.operator not in OPERATORS:
            raise LensteerError(f"no operator {self.operator!r}: choose one of {list(OPERATORS)}")
        check_unit(self.unit)
        own = self.direction.at(self.layer)  # raises for a layer it lacks
        given = None if self.gate is None else self.gate.direction
        if given is not None and given.shape != own.shape:
            raise LensteerError(
                f"the gate's direction is {len(given)} wide, and {self.direction.label!r} is {len(own)}: give a vector "
                "of the same model"
            )

    @property
    def edits(self) -> tuple[SteeringPlan, ...]:  # type: ignore[override]  # a plan is its own only edit
        """This edit alone (joined plans have several)."""
        return (self,)

    @property
    def slots(self) -> tuple[Slot, ...]:  # type: ignore[override]  # residuals only
        """None."""
        return ()

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """What is added per unit of coefficient (of a clamp: what the projection is counted in), or the unit vector."""
        if self.operator in IN_UNITS:
            return self.direction.scaled(self.layer, self.unit)
        raw = self.direction.at(self.layer)
        return raw / raw.norm()

    @property
    def constant(self) -> bool:
        """Whether it adds the same vector at every position of its scope: no other operator, gate or schedule."""
        return self.operator == "add" and self.gate is None and self.schedule is None

    @property
    def length(self) -> float:
        """Length of the vector that is added at each position; NaN if that is not the same vector everywhere."""
        return abs(self.coefficient) * float(self.vector.norm()) if self.constant else math.nan

    @property
    def measured(self) -> Evidence | None:
        """The evidence, if it is of this direction, layer and coefficient; it may be of another scope."""
        found = self.evidence
        if found is None or (found.label, found.layer, found.coefficient) != (
            self.direction.label,
            self.layer,
            self.coefficient,
        ):
            return None
        same = self.constant and math.isclose(found.length, self.length, rel_tol=1e-4)
        return found if same else None

    def describe(self) -> list[Any]:
        """Everything the edit depends on, as JSON-ready values."""
        found: list[Any] = [self.layer, self.coefficient, self.operator, self.scope.name, self.vector.double().tolist()]
        # Left out where there are none, so that experiments from before there were any are recognized.
        return found + [part.describe() for part in (self.gate, self.schedule) if part is not None]


@dataclass(frozen=True)
class Plans(Joinable):
    """Several edits at once, in order."""

    edits: tuple[SteeringPlan, ...]
    slots: tuple[Slot, ...] = ()


Plan = Joinable
"""One edit or several, of residuals or of cache slots."""


@dataclass
class _Group:
    """The edits of one layer that share operator, scope and schedule: a vector for each row, zero where it has none."""

    operator: str
    scope: PositionScope
    schedule: Schedule | None
    table: Float[Tensor, "batch d_model"]
    coefficient: Float[Tensor, " batch"]
    gates: Gates | None = None

    def matches(self, edit: SteeringPlan) -> bool:
        """Whether an edit can be one of its rows."""
        mine, its = (self.operator, self.scope, self.schedule), (edit.operator, edit.scope, edit.schedule)
        return mine == its and (self.gates is None) == (edit.gate is None)

    def active(self) -> Bool[Tensor, " batch"]:
        """The rows that have an edit with a coefficient; a clamp to 0 is one."""
        return self.table.any(1) if self.operator == "clamp" else self.coefficient != 0

    def keep(self, rows: Tensor) -> _Group:
        """The same for some of the rows."""
        gates = None if self.gates is None else self.gates.keep(rows)
        return _Group(self.operator, self.scope, self.schedule, self.table[rows], self.coefficient[rows], gates)


@dataclass
class Edits:
    """The plans of a batch, one per row. `None` is an unsteered row."""

    groups: dict[int, list[_Group]] = field(default_factory=dict)

    @staticmethod
    def of(plans: Sequence[Plan | None], model: TransformerBridge) -> Edits:
        """Combine one plan (or None) per row.

        Raises:
            LensteerError: a layer that the model lacks, a vector of another width or that is not finite, or a
                coefficient beyond the dtype's range.
        """
        groups: dict[int, list[_Group]] = {}
        n, width, like = len(plans), models.d_model(model), next(iter(model.parameters()))
        for row, plan in enumerate(plans):
            after: dict[int, int] = {}  # per layer, the first group that comes after the row's edits so far
            for edit in () if plan is None else plan.edits:
                found = groups.setdefault(models.check_layer(model, edit.layer), [])
                least = after.get(edit.layer, 0)
                at = next((i for i, g in enumerate(found) if i >= least and g.matches(edit)), len(found))
                if at == len(found):
                    found.append(_empty(edit, n, width, like))
                after[edit.layer] = at + 1
                vector, coefficient = _checked(edit, width, like.dtype)
                group = found[at]
                group.table[row], group.coefficient[row] = vector.to(group.table), coefficient
                if group.gates is not None and edit.gate is not None:
                    group.gates.put(row, edit.gate, edit.direction.at(edit.layer))
        return Edits(groups)

    def apply(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], context: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual of the last `pos` positions of a context that a pass has run."""
        columns = context.last(resid.shape[1])
        for group in self.groups.get(layer, ()):
            chosen = group.scope.mask(context)[:, columns, None]
            coefficient = group.coefficient[:, None, None]
            if group.schedule is not None:
                since = (context.position - context.prompt_length[:, None])[:, columns, None]
                coefficient = (coefficient * group.schedule.factor(since)).to(coefficient.dtype)
            if group.gates is not None:
                chosen = chosen & group.gates.open(resid)[..., None]
            edited = OPERATORS[group.operator](resid, group.table[:, None], coefficient)
            resid = torch.where(chosen, edited, resid)
        return resid

    def touched(self, context: Context, columns: int) -> Bool[Tensor, " batch"]:
        """The rows that any edit may change within the first columns of a context; its gate may be shut there."""
        found = torch.zeros(len(context.ids), dtype=torch.bool, device=context.ids.device)
        for groups in self.groups.values():
            for group in groups:
                found |= group.scope.mask(context)[:, :columns].any(1) & group.active()
        return found

    def rows(self, n: int) -> Bool[Tensor, " batch"]:
        """Which of `n` rows have any edit with a coefficient."""
        found = torch.zeros(n, dtype=torch.bool)
        for group in (group for groups in self.groups.values() for group in groups):
            found |= group.active().cpu()
        return found

    def keep(self, rows: Tensor) -> Edits:
        """The same for some of the rows."""
        return Edits({layer: [group.keep(rows) for group in groups] for layer, groups in self.groups.items()})


def _empty(edit: SteeringPlan, n: int, width: int, like: Tensor) -> _Group:
    """A group for edits like this one, without any.

    Angles, targets and measures of gates are computed in float32 at least; sums in the model's dtype, as its own are.
    """
    fine = like.new_empty(0, dtype=torch.promote_types(like.dtype, torch.float32))
    own = like if edit.operator in ("add", "project_out") else fine
    gates = None if edit.gate is None else Gates.none(n, width, fine)
    return _Group(edit.operator, edit.scope, edit.schedule, own.new_zeros(n, width), own.new_zeros(n), gates)


def _checked(edit: SteeringPlan, width: int, dtype: torch.dtype) -> tuple[Tensor, float]:
    """The vector and the coefficient that an operator takes."""
    vector, coefficient = edit.vector, edit.coefficient
    if vector.shape != (width,) or not torch.isfinite(vector).all():
        raise LensteerError(
            f"{edit.direction.label!r} at layer {edit.layer} is zero, not finite or another model's: shape "
            f"{list(vector.shape)}, where this residual stream is {width} wide"
        )
    if edit.operator == "clamp":
        length = float(vector.norm())
        vector, coefficient = vector / length, coefficient * length
    if abs(coefficient) > (most := torch.finfo(dtype).max):
        raise LensteerError(f"coefficient {edit.coefficient:g} is beyond {dtype}, which ends at {most:g}: give less")
    return vector, coefficient


@dataclass(eq=False)  # the same plan may be on twice: entries are compared by identity
class _Active:
    """A plan that is on, and the tokens that its hooks have seen so far."""

    plan: Plans
    seen: Context | None = None


_active: weakref.WeakKeyDictionary[nn.Module, list[_Active]] = weakref.WeakKeyDictionary()
_given: ContextVar[Context | None] = ContextVar("lensteer-context", default=None)


def active_plans(model: TransformerBridge) -> list[Plans]:
    """Plans that are on, outermost first."""
    return [entry.plan for entry in _active.get(model, [])]


def wanted_prefill(model: TransformerBridge, plan: Plan | None) -> str:
    """The text that the plans that are on, and one more, append to the prompt."""
    return max((p.prefill for p in [*active_plans(model), *([] if plan is None else [plan])]), default="", key=len)


def foreign_hooks(model: TransformerBridge) -> bool:
    """Whether any hook point has a foreign hook (not one of lensteer's)."""
    hooked = {
        id(p): len(p.fwd_hooks) + len(p.bwd_hooks) for p in model.hook_dict.values() if p.fwd_hooks or p.bwd_hooks
    }
    return sum(hooked.values()) > sum(len({e.layer for e in plan.edits}) for plan in active_plans(model))


@contextmanager
def tokens_seen(context: Context) -> Iterator[None]:
    """Set the tokens of the next forwards for plans that are on, instead of what their own hooks recorded."""
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
    """Put a plan on: hooks for residuals, and cache edits for `lensteer.generation` to apply."""
    entry, tokens = _Active(plan), models.token_table(model)
    edits = Edits.of([plan], model)  # one row represents all

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

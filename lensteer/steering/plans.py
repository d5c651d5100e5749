"""What is done to which positions of which layer: plans, which join with `+`.

h <- h + coefficient * v        (add; v is the difference of means itself, or as long as `unit` says)
h <- h - coefficient * <h, û> û (project_out; coefficient 1 removes the direction)
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.positions import PositionScope, everywhere
from lensteer.units import check_unit

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

    def scaled(self, layer: int, unit: str = "difference") -> Float[Tensor, " d_model"]:
        """What coefficient 1 adds under a unit; see `Direction.scaled`."""


@runtime_checkable
class Slot(Protocol):
    """A one-shot edit of a KV cache (`cache_steering.CachePlan`), as far as a plan has to know it."""

    @property
    def prefill(self) -> str:
        """What the edit wants appended to the prompt."""

    def describe(self) -> list[Any]:
        """All that it depends on, as JSON-ready values."""


class Joinable:
    """What one edit and several have in common: edits of residuals, and of cache slots."""

    edits: tuple[SteeringPlan, ...]
    slots: tuple[Slot, ...]

    def __add__(self, other: Joinable) -> Plans:
        return Plans(self.edits + other.edits, self.slots + other.slots)

    @property
    def prefill(self) -> str:
        """What is appended to the prompt; empty but for a cache edit that appends an offset token."""
        return max((slot.prefill for slot in self.slots), default="", key=len)

    @contextmanager
    def on(self, model: TransformerBridge, *, prompt_length: int | None = None) -> Iterator[TransformerBridge]:
        """Steer everything the model runs inside the `with`, through hook points that are gone afterwards.

        Args:
            model: the bridge.
            prompt_length: for forwards on whole chains: how many tokens are the prompt. By default what is first
                given in one go is the prompt, as in a generation.
        """
        from lensteer.steering.hooks import installed

        with installed(model, Plans(self.edits, self.slots), prompt_length):
            yield model

    def identity(self) -> list[Any]:
        """All that the edits depend on, as JSON-ready values: what tells one experiment from another."""
        return [edit.describe() for edit in (*self.edits, *self.slots)]


@dataclass(frozen=True)
class SteeringPlan(Joinable):
    """One edit: a behavior's direction, a layer, how much, where, and how. Join several with `+`.

    Attributes:
        direction: such as `vectors["backtracking"]`.
        layer: whose output is edited.
        coefficient: signed; in multiples of what `unit` says.
        scope: the positions that are edited.
        operator: "add" or "project_out".
        unit: of an added vector: "difference", the direction as it was computed; "mean_norm", a vector as long as the
            layer's mean activation (the default before 0.1.0); "unit", one of length 1.

    Raises:
        LensteerError: a layer the direction lacks, a coefficient that is not finite, an unknown operator or unit.
    """

    direction: Steerable
    layer: int
    coefficient: float = 1.0
    scope: PositionScope = everywhere
    operator: str = "add"
    unit: str = "difference"

    def __post_init__(self) -> None:
        if not math.isfinite(self.coefficient):
            raise LensteerError(f"coefficient {self.coefficient} is not finite: give a number such as 1.0 or -0.5")
        if self.operator not in OPERATORS:
            raise LensteerError(f"no operator {self.operator!r}: choose one of {list(OPERATORS)}")
        check_unit(self.unit)
        self.direction.at(self.layer)  # raises for a layer it lacks

    @property
    def edits(self) -> tuple[SteeringPlan, ...]:  # type: ignore[override]  # a plan is its own only edit
        """This edit alone (several plans joined have several)."""
        return (self,)

    @property
    def slots(self) -> tuple[Slot, ...]:  # type: ignore[override]  # residuals only
        """None."""
        return ()

    @property
    def vector(self) -> Float[Tensor, " d_model"]:
        """What is added per unit of coefficient, or the unit vector that is projected out."""
        if self.operator == "add":
            return self.direction.scaled(self.layer, self.unit)
        raw = self.direction.at(self.layer)
        return raw / raw.norm()

    @property
    def length(self) -> float:
        """Of the vector that is added at each position."""
        return abs(self.coefficient) * float(self.vector.norm())

    def describe(self) -> list[Any]:
        """All that the edit depends on, as JSON-ready values."""
        return [self.layer, self.coefficient, self.operator, self.scope.name, self.vector.double().tolist()]


@dataclass(frozen=True)
class Plans(Joinable):
    """Several edits at once, in order."""

    edits: tuple[SteeringPlan, ...]
    slots: tuple[Slot, ...] = ()


Plan = Joinable
"""One edit or several, of residuals or of cache slots."""

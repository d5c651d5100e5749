"""What an explorer has found for what is chosen at the moment. Values only."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from lensteer.ablation import ForcedEffect, LeaveOneOut
from lensteer.cache_steering import CachePlan
from lensteer.explorer.continuing import Continuation
from lensteer.explorer.state import State, same_steering
from lensteer.steering import SteeringPlan

#: Fields of a state that a result depends on, besides what steers.
_DEPENDS: dict[str, tuple[str, ...]] = {
    "effect": (),
    "continuation": ("cut", "max_new_tokens", "temperature", "seed"),
    "ranking": ("measure",),
}


@dataclass(frozen=True, eq=False)
class Result:
    """Results that belong to one state. What was not measured under it, or is not ready, is None.

    Attributes:
        state: what is chosen.
        plan: what it stands for; None where no position is chosen.
        effect: on every token of the chain.
        continuation: unsteered and steered.
        ranking: what each group of positions matters.
    """

    state: State
    plan: SteeringPlan | CachePlan | None
    effect: ForcedEffect | None
    continuation: Continuation | None
    ranking: LeaveOneOut | None


def result_of(state: State, plan: SteeringPlan | CachePlan | None, made: Mapping[str, tuple[State, Any]]) -> Result:
    """What holds for a state, of what was made: kind -> the state that it was made for, and what it is."""
    held: dict[str, Any] = dict.fromkeys(_DEPENDS)
    for kind, (under, value) in made.items():
        if same_steering(under, state) and all(getattr(under, f) == getattr(state, f) for f in _DEPENDS[kind]):
            held[kind] = value
    return Result(state, plan, **held)

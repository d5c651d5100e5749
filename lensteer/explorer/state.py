"""The explorer's state, the available choices, and the plan and the code that a state represents.

Values and pure functions only: no widgets, no threads, no model.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, get_type_hints

from lensteer.ablation import LeaveOneOut
from lensteer.attribution import LayerScores
from lensteer.behaviors import check_behavior
from lensteer.cache_steering import CachePlan, CacheVector
from lensteer.calibration import starting_coefficient
from lensteer.errors import LensteerError
from lensteer.expressions import parse_scope
from lensteer.positions import at
from lensteer.steering import SteeringPlan
from lensteer.steering.operators import IN_UNITS
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors

CHANNELS = ("residual", "cache")
"""What is edited."""

OPERATORS = ("add", "project_out", "clamp")
"""Of those of a plan: "rotate" has degrees, and gates and schedules have numbers of their own, which the page lacks."""

MEASURES = ("kl", "log_prob")
"""Measures of leaving positions out: the total KL, or the log-probability of the behavior's first tokens."""

MOST_TOKENS = 4000
UNIT = "difference"
"""of the coefficient, see `lensteer.steering.UNITS`."""

_KINDS: dict[Any, str] = {int: "a whole number", float: "a number", str: "text"}


@dataclass(frozen=True)
class State:
    """Everything that is chosen.

    Attributes:
        behavior: whose vector.
        layer: whose output is edited.
        trace: index of the chain.
        coefficient: of the vector, in multiples of the difference of means itself.
        operator: of `OPERATORS`: those of a plan whose coefficient needs no other range than the vector's.
        expression: the positions; see `parse_scope`. Empty: none.
        channel: "residual", or "cache" for the cache vector, which has its own slot.
        c_values: coefficient of the cache vector's values.
        cut: where a continuation begins; None is the prompt's end.
        max_new_tokens: of a continuation.
        temperature: of a continuation; 0 is greedy.
        seed: of a continuation.
        measure: for leaving positions out; one of `MEASURES`.
    """

    behavior: str
    layer: int
    trace: int = 0
    coefficient: float = 1.0
    operator: str = "add"
    expression: str = "onsets"
    channel: str = "residual"
    c_values: float = 1.0
    cut: int | None = None
    max_new_tokens: int = 200
    temperature: float = 0.0
    seed: int = 0
    measure: str = "kl"

    def changed(self, values: Mapping[str, Any]) -> State:
        """With some fields replaced, as a page sends them.

        Raises:
            LensteerError: an unknown field, or a value of another kind.
        """
        kinds, taken = get_type_hints(State), {}
        for name, value in values.items():
            if name not in kinds:
                raise LensteerError(f"no field {name!r}: choose one of {list(kinds)}")
            wanted = kinds[name]
            if wanted is float and type(value) is int:
                value = float(value)
            if type(value) is bool or not isinstance(value, wanted):
                raise LensteerError(f"{name}={value!r}: give {_KINDS.get(wanted, 'a whole number or nothing')}")
            taken[name] = value
        if "trace" in taken:  # another chain ends elsewhere
            taken.setdefault("cut", None)
        return replace(self, **taken)


@dataclass(frozen=True, eq=False)
class Choices:
    """The available choices.

    Attributes:
        vectors: whose labels are the behaviors, and whose layers the layers.
        traces: the chains.
        scores: the curve under the layers.
        layers: a layer for each behavior, marked on the curve.
        cache_vector: for the channel "cache".
        coefficients: a recommended coefficient for each behavior, in the same unit, marked.
        kl_budget: nats per steered token; the coefficient that the scores predict for it is marked.
    """

    vectors: BehaviorVectors
    traces: Sequence[Trace]
    scores: LayerScores | None = None
    layers: Mapping[str, int] | None = None
    cache_vector: CacheVector | None = None
    coefficients: Mapping[str, float] = field(default_factory=dict)
    kl_budget: float = 0.1

    def __post_init__(self) -> None:
        if not self.traces:
            raise LensteerError("no traces: give at least one, e.g. from annotate(generate_traces(model, tasks))")
        if not self.vectors.labels or not self.vectors.layers:
            raise LensteerError("vectors without behaviors or layers: fit them on annotated traces")
        if not 0 < self.kl_budget < math.inf:
            raise LensteerError(f"kl_budget={self.kl_budget}: give nats per steered token, such as 0.1")

    def initial(self) -> State:
        """A first choice: backtracking if it is there, at the layer that was selected or scored best."""
        labels = self.vectors.labels
        behavior = "backtracking" if "backtracking" in labels else labels[-1]
        coefficient = self.coefficients.get(behavior, State.coefficient)
        return State(behavior, self._layer(behavior), coefficient=coefficient)

    def _layer(self, behavior: str) -> int:
        layers = self.vectors.layers
        if self.layers is not None and self.layers.get(behavior) in layers:
            return self.layers[behavior]
        if self.scores is not None and behavior in self.scores.labels:
            row = self.scores.mean[self.scores.row(behavior)].tolist()
            scored = {n: v for n, v in zip(self.scores.layers, row, strict=True) if n in layers and math.isfinite(v)}
            if scored:
                return max(scored, key=lambda layer: scored[layer])
        return layers[len(layers) // 2]

    def budget_coefficient(self, behavior: str, layer: int) -> float | None:
        """The coefficient that the scores predict for the KL budget; None if they cannot predict it."""
        try:
            return None if self.scores is None else starting_coefficient(self.scores, behavior, layer, self.kl_budget)
        except LensteerError:
            return None

    def check(self, state: State) -> State:
        """The state itself, if it is valid.

        Raises:
            LensteerError: otherwise; the message names the value and what would be right.
        """
        check_behavior(state.behavior, self.vectors.labels)
        for name, value, known in (
            ("layer", state.layer, self.vectors.layers),
            ("operator", state.operator, OPERATORS),
            ("channel", state.channel, CHANNELS),
            ("measure", state.measure, MEASURES),
        ):
            if value not in known:
                raise LensteerError(f"no {name} {value!r}: choose one of {list(known)}")
        if state.channel == "cache" and self.cache_vector is None:
            raise LensteerError("channel 'cache' needs a cache vector: pass cache_vector= to explore")
        if not 0 <= state.trace < len(self.traces):
            raise LensteerError(f"trace={state.trace}: there are {len(self.traces)} traces, counted from 0")
        for name in ("coefficient", "c_values"):
            if not math.isfinite(getattr(state, name)):
                raise LensteerError(f"{name}={getattr(state, name)} is not finite: give a number such as 1.0")
        if not 1 <= state.max_new_tokens <= MOST_TOKENS:
            raise LensteerError(f"max_new_tokens={state.max_new_tokens}: give a number from 1 to {MOST_TOKENS}")
        if not 0 <= state.temperature < math.inf:
            raise LensteerError(f"temperature={state.temperature}: give 0 (greedy) or a positive number")
        trace = self.traces[state.trace]
        if state.cut is not None and not trace.prompt_length <= state.cut <= len(trace.ids):
            raise LensteerError(
                f"cut={state.cut}: a continuation of this chain may begin at positions {trace.prompt_length} (after "
                f"the prompt) to {len(trace.ids)}"
            )
        if state.expression.strip():
            parse_scope(state.expression)
        return state

    def plan(self, state: State, positions: Sequence[int] | None = None) -> SteeringPlan | CachePlan | None:
        """The plan of a state; None if no position is chosen.

        Args:
            state: that was checked.
            positions: explicit ones in place of the state's.
        """
        if state.channel == "cache":
            assert self.cache_vector is not None
            return CachePlan(self.cache_vector, state.c_values)
        if positions is None and not state.expression.strip():
            return None
        scope = parse_scope(state.expression) if positions is None else at(positions)
        return SteeringPlan(self.vectors[state.behavior], state.layer, state.coefficient, scope, state.operator, UNIT)


def same_steering(a: State, b: State) -> bool:
    """Whether two states steer the same chain alike: what was measured under one holds for the other."""

    def steering(state: State) -> State:
        return replace(state, cut=None, max_new_tokens=1, temperature=0.0, seed=0, measure="kl")

    return steering(a) == steering(b)


def code_of(state: State, scope: str, *, continued: bool = False, ranked: LeaveOneOut | None = None) -> str:
    """Code that repeats what the explorer shows, given `model`, `vectors`, `traces` (and `cache_vector`).

    Args:
        state: that was checked.
        scope: its expression as code; empty for none.
        continued: with the continuation.
        ranked: with this leave-one-out.
    """
    lines = ["import lensteer as ls"]
    if state.channel == "cache" or scope:
        names = ["forced_effect", *(["leave_one_out"] if ranked is not None else [])]
        lines.append(f"from lensteer.ablation import {', '.join(names)}")
    if state.channel == "cache":
        lines.append("from lensteer.cache_steering import CachePlan")
    if continued:
        lines.append("from lensteer.explorer import continue_chain")
    lines += ["", f"trace = traces[{state.trace}]  # of those that the explorer was given"]
    given = [
        f"vectors[{json.dumps(state.behavior, ensure_ascii=False)}]",
        f"layer={state.layer}",
        f"coefficient={state.coefficient!r}",
    ]
    kind = [f"operator={state.operator!r}"] if state.operator != "add" else []
    kind += [f"unit={UNIT!r}"] if state.operator in IN_UNITS else []
    if state.channel == "cache":
        lines.append(f"plan = CachePlan(cache_vector, c_values={state.c_values!r})")
    elif scope:
        lines.append(f"plan = ls.SteeringPlan({', '.join([*given, f'scope={scope}', *kind])})")
    else:
        return "\n".join([*lines, "# no position is chosen: nothing is steered", ""])
    lines.append("effect = forced_effect(model, trace, plan)")
    if ranked is not None:
        lines += ["", "def plan_at(positions):"]
        lines += [f"    return ls.SteeringPlan({', '.join([*given, 'scope=ls.at(positions)', *kind])})", ""]
        groups = dict(zip(ranked.names, ranked.groups, strict=True))
        target = f", targets={ranked.targets}" if ranked.measure == "log_prob" else ""
        lines += [f"groups = {groups}", f"ranking = leave_one_out(model, trace, plan_at, groups{target})"]
    if continued:
        options = [f"max_new_tokens={state.max_new_tokens}"]
        options += [f"cut={state.cut}"] if state.cut is not None else []
        options += [f"temperature={state.temperature!r}", f"seed={state.seed}"] if state.temperature else []
        lines.append(f"continuation = continue_chain(model, trace, plan, {', '.join(options)})")
    return "\n".join([*lines, ""])

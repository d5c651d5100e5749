"""Computes the results for a state of the explorer, on private copies of the model, and keeps them.

A continuation starts twice from the same point, steered and unsteered, in one batch. Plans also edit the given tokens,
as in a generation from the prompt.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.ablation import ForcedChain, ForcedEffect, LeaveOneOut, leave_one_out
from lensteer.annotation import Annotator, annotate
from lensteer.cache_steering import CachePlan
from lensteer.errors import LensteerError
from lensteer.explorer.background import private_copy
from lensteer.explorer.chain import Chain
from lensteer.explorer.state import Choices, State, same_steering
from lensteer.generation import decode
from lensteer.generation.jobs import chain_seed
from lensteer.steering import Plan, SteeringPlan, wanted_prefill
from lensteer.steering.cache import check_plan
from lensteer.traces import Trace
from lensteer.vectors.projections import all_projections

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NewTokens = tuple[list[int], list[int]]
"""The tokens generated so far: unsteered, steered."""


@dataclass(frozen=True)
class Continuation:
    """Two continuations of one chain, annotated.

    Attributes:
        unsteered: the chain up to the cut, and the model's continuation.
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

    From the prompt's end it generates what `generate_traces` would, with the same seed.

    Args:
        model: the bridge; plans that are on apply to both.
        trace: the chain.
        plan: None steers nothing.
        cut: absolute position of the first new token; None is the prompt's end.
        max_new_tokens: of each.
        temperature: 0 is greedy.
        seed: both draw with the same random numbers.
        annotator: for the two chains; None leaves them without labels.
        advance: called after every step with all new tokens so far; an exception in it ends the run.

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
    with closing(steps):  # hooks are removed, even if `advance` raises
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
    """A trace with more tokens appended, its text decoded from the ids; not annotated."""
    ids = (*trace.response_ids, *new)
    response, offsets = models.decode_offsets(model.tokenizer, ids)
    finished = bool(new) and new[-1] in models.end_ids(model)
    return replace(trace, response=response, response_ids=ids, offsets=tuple(offsets), finished=finished, spans=())


#: Fields of a state that a result depends on, besides what steers.
_DEPENDS: dict[str, tuple[str, ...]] = {
    "effect": (),
    "continuation": ("cut", "max_new_tokens", "temperature", "seed"),
    "ranking": ("measure",),
}


@dataclass(frozen=True, eq=False)
class Result:
    """Results for one state. Those that were not computed for it, or are not ready, are None.

    Attributes:
        state: what is chosen.
        plan: of the state; None if no position is chosen.
        effect: on every token of the chain.
        continuation: unsteered and steered.
        ranking: how much each group of positions matters.
    """

    state: State
    plan: SteeringPlan | CachePlan | None
    effect: ForcedEffect | None
    continuation: Continuation | None
    ranking: LeaveOneOut | None


def result_of(state: State, plan: SteeringPlan | CachePlan | None, made: Mapping[str, tuple[State, Any]]) -> Result:
    """The results that hold for a state, from `made`: kind -> the state that it was computed for, and the result."""
    held: dict[str, Any] = dict.fromkeys(_DEPENDS)
    for kind, (under, value) in made.items():
        if same_steering(under, state) and all(getattr(under, f) == getattr(state, f) for f in _DEPENDS[kind]):
            held[kind] = value
    return Result(state, plan, **held)


NewPart = tuple[Trace, int]
"""An unfinished chain, annotated so far, and how many of its response tokens were given."""

#: Seconds between two reports on a run in progress.
BETWEEN = 0.08
#: An annotator that takes longer than this many seconds is called at the end only.
QUICK = 0.2


class Engine:
    """One explorer's models, and its state between computations.

    `effect` and `projection` belong to one thread, `continuation` and `ranking` to another: each has its own copy.
    Plans and positions are arguments, because expressions must not be parsed in a thread: Python's parser of syntax
    trees fails in some versions when two threads use it.
    """

    def __init__(self, model: TransformerBridge, choices: Choices, annotator: Annotator | None) -> None:
        """Copies the model, sharing its weights.

        Raises:
            LensteerError: a cache vector that the model cannot take, or a plan that is on.
        """
        if choices.cache_vector is not None:
            check_plan(model, CachePlan(choices.cache_vector))
        self.choices, self._annotator = choices, annotator
        self._quick, self._patient = private_copy(model), private_copy(model)
        self._chains: dict[int, Chain] = {}
        self._projections: dict[int, Tensor] = {}
        self._forced: tuple[tuple[int, str], ForcedChain] | None = None

    def chain(self, index: int) -> Chain:
        """One of the traces as it is shown.

        Raises:
            LensteerError: it is not this model's.
        """
        if index not in self._chains:
            self._chains[index] = Chain.of(self._quick, self.choices.traces[index])
        return self._chains[index]

    def projection(self, state: State) -> Float[Tensor, " pos"]:
        """The projection of each token's residual stream on the chosen vector, unsteered."""
        vectors = self.choices.vectors
        if state.trace not in self._projections:
            trace = self.choices.traces[state.trace]
            self._projections[state.trace] = all_projections(self._quick, trace, vectors)
        row = vectors.labels.index(state.behavior), vectors.layers.index(state.layer)
        return self._projections[state.trace][row]

    def effect(self, state: State, plan: Plan | None, check: Callable[[], object]) -> ForcedEffect:
        """The effect of the chosen plan on each token of the chain.

        Args:
            state: what is chosen.
            plan: the same as a plan.
            check: called often; an exception in it ends the run.

        Raises:
            LensteerError: a plan that the model or the prompt cannot take, or logits that are not finite.
        """
        trace = self.choices.traces[state.trace]
        key = state.trace, "" if plan is None else plan.prefill
        if self._forced is None or self._forced[0] != key:
            self._forced = key, ForcedChain.of(self._quick, trace, key[1])
        return self._forced[1].effect(plan, check=check)

    def continuation(
        self,
        state: State,
        plan: Plan | None,
        check: Callable[[], object],
        tell: Callable[[Sequence[NewPart]], object],
    ) -> Continuation:
        """The chain, continued from the cut, unsteered and steered.

        Args:
            state: what is chosen.
            plan: the same as a plan.
            check: called for every token; an exception in it ends the run.
            tell: called regularly with both chains so far.

        Raises:
            LensteerError: as `continue_chain`.
        """
        trace, model = self.choices.traces[state.trace], self._patient
        n_given = 0 if state.cut is None else state.cut - trace.prompt_length
        base = replace(trace, response_ids=trace.response_ids[:n_given], offsets=trace.offsets[:n_given], spans=())
        ends, spans, quick = models.token_table(model).ends_sentence, [base.spans, base.spans], True
        sent, told = 0.0, 0

        def advance(made: NewTokens) -> None:
            nonlocal sent, told, spans, quick
            check()
            if time.monotonic() - sent < BETWEEN:
                return
            conditions = [extended(model, base, row) for row in made]
            ended = sum(int(ends[row].sum()) for row in made)
            if self._annotator is not None and ended > told and quick:
                before, told = time.monotonic(), ended
                spans = [condition.spans for condition in annotate(conditions, self._annotator)]
                quick = time.monotonic() - before < QUICK
            tell(
                [(replace(condition, spans=found), n_given) for condition, found in zip(conditions, spans, strict=True)]
            )
            sent = time.monotonic()

        return continue_chain(
            model,
            trace,
            plan,
            cut=state.cut,
            max_new_tokens=state.max_new_tokens,
            temperature=state.temperature,
            seed=state.seed,
            annotator=self._annotator,
            advance=advance,
        )

    def groups(self, state: State, positions: Sequence[int]) -> dict[str, tuple[int, ...]]:
        """The groups that a ranking leaves out, one at a time.

        Raises:
            LensteerError: no position is chosen, or there is no token to measure by.
        """
        chain = self.chain(state.trace)
        groups = chain.groups(positions)
        if state.channel == "cache" or not groups:
            raise LensteerError("nothing to leave out: choose positions of the residual stream to steer at")
        if state.measure == "log_prob" and not chain.onset_tokens(state.behavior):
            raise LensteerError(f"this chain has no sentence of {state.behavior!r}: rank by 'kl'")
        return groups

    def ranking(
        self, state: State, groups: Mapping[str, Sequence[int]], advance: Callable[[int], object]
    ) -> LeaveOneOut:
        """How much each group of positions matters for the effect.

        Raises:
            LensteerError: as `effect`.
        """

        def plan_of(positions: tuple[int, ...]) -> SteeringPlan:
            plan = self.choices.plan(state, positions)
            assert isinstance(plan, SteeringPlan)
            return plan

        chain = self.chain(state.trace)
        targets = chain.onset_tokens(state.behavior) if state.measure == "log_prob" else None
        return leave_one_out(self._patient, chain.trace, plan_of, groups, targets=targets, advance=advance)

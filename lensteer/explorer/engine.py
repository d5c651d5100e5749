"""Computes what a state asks for, on copies of the model of its own."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.ablation import ForcedChain, ForcedEffect, LeaveOneOut, leave_one_out
from lensteer.annotation import Annotator, annotate
from lensteer.cache_steering import CachePlan
from lensteer.errors import LensteerError
from lensteer.explorer.background import private_copy
from lensteer.explorer.chain import Chain
from lensteer.explorer.continuing import Continuation, NewTokens, continue_chain, extended
from lensteer.explorer.state import Choices, State
from lensteer.projections import all_projections
from lensteer.steering import Plan, SteeringPlan
from lensteer.steering.cache import check_plan
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

NewPart = tuple[Trace, int]
"""A chain on its way, annotated as far as it goes, and how many of its response tokens were given."""

#: Seconds between two reports on a run that is under way.
BETWEEN = 0.08
#: An annotator that takes longer than so many seconds is asked at the end only.
QUICK = 0.2


class Engine:
    """One explorer's models, and what is kept between two computations.

    `effect` and `projection` belong to one thread, `continuation` and `ranking` to another: each has its own copy.
    Plans and positions are given, because expressions must not be read in a thread: Python's parser of syntax trees
    fails in some versions when two threads use it.
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
        """What each token's residual stream has of the chosen vector, unsteered."""
        vectors = self.choices.vectors
        if state.trace not in self._projections:
            trace = self.choices.traces[state.trace]
            self._projections[state.trace] = all_projections(self._quick, trace, vectors)
        row = vectors.labels.index(state.behavior), vectors.layers.index(state.layer)
        return self._projections[state.trace][row]

    def effect(self, state: State, plan: Plan | None) -> ForcedEffect:
        """What the chosen plan does to each token of the chain.

        Raises:
            LensteerError: a plan that the model or the prompt cannot take, or logits that are not finite.
        """
        trace = self.choices.traces[state.trace]
        key = state.trace, "" if plan is None else plan.prefill
        if self._forced is None or self._forced[0] != key:
            self._forced = key, ForcedChain.of(self._quick, trace, key[1])
        return self._forced[1].effect(plan)

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
            check: called for every token; what it raises ends the run.
            tell: called now and then with both chains so far.

        Raises:
            LensteerError: as `continue_chain`.
        """
        trace, model = self.choices.traces[state.trace], self._patient
        n_given = 0 if state.cut is None else state.cut - trace.prompt_length
        base = replace(trace, response_ids=trace.response_ids[:n_given], spans=())
        ends, spans, quick = models.token_table(model).ends_sentence, [base.spans, base.spans], True
        sent, told = 0.0, 0

        def advance(made: NewTokens) -> None:
            nonlocal sent, told, spans, quick
            check()
            if time.monotonic() - sent < BETWEEN:
                return
            arms = [extended(model, base, row) for row in made]
            ended = sum(int(ends[row].sum()) for row in made)
            if self._annotator is not None and ended > told and quick:
                before, told = time.monotonic(), ended
                spans = [arm.spans for arm in annotate(arms, self._annotator)]
                quick = time.monotonic() - before < QUICK
            tell([(replace(arm, spans=found), n_given) for arm, found in zip(arms, spans, strict=True)])
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
        """What a ranking leaves out, one at a time.

        Raises:
            LensteerError: there is nothing, or no token to measure it by.
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

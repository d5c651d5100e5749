"""The widget: messages from the page change the state, whose results are computed in threads and sent back.

Messages from the page never raise here: errors are sent to the page. Computes nothing itself.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import anywidget
import traitlets

from lensteer.cache_steering import CachePlan
from lensteer.errors import LensteerError
from lensteer.explorer import payloads
from lensteer.explorer.background import Check, Worker
from lensteer.explorer.engine import Engine, NewPart, Result, result_of
from lensteer.explorer.state import State, code_of, same_steering
from lensteer.expressions import as_code
from lensteer.steering import Plan, SteeringPlan


class Explorer(anywidget.AnyWidget):
    """The explorer; made by `lensteer.explore`.

    `state` may be read and set. Its results arrive in `result`; `wait()` waits for them.
    """

    _esm = Path(__file__).parent / "widget.js"
    _css = Path(__file__).parent / "widget.css"

    options = traitlets.Dict().tag(sync=True)
    settings = traitlets.Dict().tag(sync=True)
    chain = traitlets.Dict().tag(sync=True)
    projection: traitlets.List[Any] = traitlets.List().tag(sync=True)
    effect = traitlets.Dict().tag(sync=True)
    continuation = traitlets.Dict().tag(sync=True)
    ranking = traitlets.Dict().tag(sync=True)
    status = traitlets.Dict().tag(sync=True)
    #: From the page: all commands that are not acknowledged yet, each `{client, id, name, ...}`.
    commands: traitlets.List[Any] = traitlets.List().tag(sync=True)
    #: To the page: the id of the last command that was handled, by client.
    ack = traitlets.Dict().tag(sync=True)

    def __init__(self, engine: Engine) -> None:
        """See `lensteer.explore`."""
        self._lock = threading.RLock()  # one thread at a time sends to the page
        self._engine, self._steering = engine, 0
        self._live = Worker(lambda error: self._fail("live", error))
        self._slow = Worker(lambda error: self._fail("slow", error))
        self._made: dict[str, tuple[State, Any]] = {}
        self.error: Exception | None = None  # the last error
        options = payloads.options_payload(engine.choices)
        super().__init__(options=options, status={"error": None, "slow": "", "done": 0})
        self._enter(engine.choices.initial(), None)

    # What is chosen

    @property
    def state(self) -> State:
        """Everything that is chosen. Set it as in `explorer.state = dataclasses.replace(explorer.state, layer=4)`."""
        return self._state

    @state.setter
    def state(self, state: State) -> None:
        self._engine.choices.check(state)
        if state != self._state:
            self._enter(state, self._state)

    def _enter(self, state: State, before: State | None) -> None:
        chain, plan = self._engine.chain(state.trace), self._engine.choices.plan(state)
        positions = chain.positions(state.expression)  # raises for a scope that is undefined for this vocabulary
        scope = as_code(state.expression) if state.expression.strip() else ""
        anew = before is None or not same_steering(before, state)
        with self._lock:
            self._state, self._plan, self._positions, self._scope = state, plan, positions, scope
            if before is None or before.trace != state.trace:
                self.stop()
                self._publish(chain=chain.to_dict(), effect={}, projection=[], continuation={}, ranking={})
            self._steering += anew
            self._settle()
        if anew:
            self._live.submit(partial(self._measure, state, plan, self._steering))

    @property
    def plan(self) -> SteeringPlan | CachePlan | None:
        """The plan of the state; None if no position is chosen."""
        return self._plan

    @property
    def positions(self) -> tuple[int, ...]:
        """The chosen positions of the chain."""
        return self._positions

    def choose(self, positions: Sequence[int]) -> None:
        """Choose explicit positions.

        Raises:
            LensteerError: one outside the chain.
        """
        found = self._engine.chain(self._state.trace).expression(positions, self._state.expression)
        self.state = replace(self._state, expression=found)

    def select(self, what: str, cursor: int = 0) -> None:
        """Choose as a button does: one of `chain.SELECTIONS`, such as "thinking" or "sentence" (the cursor's).

        Raises:
            LensteerError: an unknown selection, a position outside the chain, or a behavior that the chain lacks.
        """
        chain, state = self._engine.chain(self._state.trace), self._state
        self.state = replace(state, expression=chain.select(what, state.expression, state.behavior, cursor))

    # What is found

    @property
    def result(self) -> Result:
        """The results for the current state."""
        return result_of(self._state, self._plan, self._made)

    def to_code(self) -> str:
        """Code that repeats the results, given `model`, `vectors`, `traces` (and `cache_vector`)."""
        result = self.result
        return code_of(result.state, self._scope, continued=result.continuation is not None, ranked=result.ranking)

    def wait(self, timeout: float | None = None) -> Explorer:
        """Wait until all requested results are computed.

        Raises:
            LensteerError: it takes longer than `timeout` seconds.
        """
        if not (self._live.wait(timeout) and self._slow.wait(timeout)):
            raise LensteerError(f"still at work after {timeout} seconds: wait longer, or stop() it")
        return self

    # What can be run

    def run_continuation(self) -> None:
        """Continue the chain from the cut, unsteered and steered."""
        state, plan = self._state, self._plan
        self.stop()
        self._say(error=None, slow="continuing", done=0, of=state.max_new_tokens)
        self._slow.submit(partial(self._continue, state, plan))

    def run_ranking(self) -> None:
        """Leave every chosen sentence (or position, if there are few) out of the plan once.

        Raises:
            LensteerError: no position is chosen, or the chain has no sentence of the behavior to measure it by.
        """
        state, groups = self._state, self._engine.groups(self._state, self._positions)
        self.stop()
        self._say(error=None, slow="ranking", done=0, of=len(groups))
        self._slow.submit(partial(self._rank, state, groups))

    def stop(self) -> None:
        """End a continuation or ranking in progress."""
        self._slow.stop()
        self._rest()

    def close(self) -> None:
        """End everything and leave the page."""
        self._live.close()
        self._slow.close()
        super().close()

    # In the threads

    def _measure(self, state: State, plan: Plan | None, steering: int, check: Check) -> None:
        started = time.perf_counter()
        row = payloads.numbers(self._engine.projection(state))
        check()
        effect = self._engine.effect(state, plan, check)
        milliseconds = 1000 * (time.perf_counter() - started)
        with self._lock:
            check()
            self._made["effect"] = state, effect
            self._publish(projection=row, effect=payloads.effect_payload(effect, steering, milliseconds))
            if (self.status["error"] or {}).get("where") == "live":
                self._say(error=None)

    def _continue(self, state: State, plan: Plan | None, check: Check) -> None:
        def tell(conditions: Sequence[NewPart]) -> None:
            parts = [payloads.condition_payload(trace, n_given, running=True) for trace, n_given in conditions]
            with self._lock:
                check()
                self._publish(continuation={"sides": parts, "note": "running"})
                self._say(done=max(part["tokens"] for part in parts))

        found = self._engine.continuation(state, plan, check, tell)
        n_given = found.cut - found.steered.prompt_length
        conditions = [
            payloads.condition_payload(trace, n_given, running=False) for trace in (found.unsteered, found.steered)
        ]
        with self._lock:
            check()
            self._made["continuation"] = state, found
            self._publish(continuation={"sides": conditions, "note": ""})
            self._settle()
            self._rest()

    def _rank(self, state: State, groups: Mapping[str, Sequence[int]], check: Check) -> None:
        done = 0

        def advance(n: int) -> None:
            nonlocal done
            done += n
            with self._lock:
                check()
                self._say(done=done)

        found = self._engine.ranking(state, groups, advance)
        with self._lock:
            check()
            self._made["ranking"] = state, found
            self._publish(ranking={**payloads.ranking_payload(found), "stale": self.result.ranking is None})
            self._settle()
            self._rest()

    # To and from the page

    def _publish(self, **traits: Any) -> None:
        with self._lock:
            for name, value in traits.items():
                if getattr(self, name) != value:  # unchanged values are not sent again
                    setattr(self, name, value)

    def _say(self, **changes: Any) -> None:
        with self._lock:
            self._publish(status={**self.status, **changes})

    def _rest(self) -> None:
        with self._lock:
            self._say(slow="")
            if self.continuation.get("note") == "running":
                self._publish(continuation={**self.continuation, "note": "stopped"})

    def _settle(self) -> None:
        """Send the state to the page, and mark the results on it that are of another state."""
        with self._lock:
            result, trace = self.result, self._engine.choices.traces[self._state.trace]
            self._publish(
                settings=payloads.settings_payload(result.state, trace, self._positions, self._steering, self.to_code())
            )
            if self.continuation and self.continuation["note"] != "running":
                note = "of earlier settings" if result.continuation is None else ""
                self._publish(continuation={**self.continuation, "note": note})
            if self.ranking:
                self._publish(ranking={**self.ranking, "stale": result.ranking is None})

    def _fail(self, where: str, error: Exception) -> None:
        self.error = error
        message = str(error) if isinstance(error, LensteerError) else f"{type(error).__name__}: {error}"
        with self._lock:
            self._say(error={"where": where, "message": message})
            if where == "live":
                self._publish(effect={})
            elif where == "slow":
                self._rest()

    def set_state(self, sync_data: dict[str, Any]) -> None:
        """Accept a message from the page; not while a thread is sending."""
        with self._lock:
            super().set_state(sync_data)

    @traitlets.observe("commands")
    def _obey(self, change: Mapping[str, Any]) -> None:
        ack = dict(self.ack)
        for command in change["new"]:
            where = "page"
            try:
                client, number, where = str(command["client"]), int(command["id"]), str(command["name"])
                if number > ack.get(client, 0):
                    ack[client] = number
                    self._do(where, command)
            except Exception as error:  # any error is sent to the page, and the kernel keeps running
                self._fail(where, error)
        self._publish(ack=ack)

    def _do(self, name: str, command: Mapping[str, Any]) -> None:
        if name in ("set", "expression"):
            self.state = self._state.changed(command["values"])
        elif name == "choose":
            self.choose([int(p) for p in command["positions"]])
        elif name == "select":
            self.select(str(command["what"]), int(command["cursor"]))
        else:
            runs = {"continue": self.run_continuation, "rank": self.run_ranking, "stop": self.stop}
            if name not in runs:
                raise LensteerError(f"no command {name!r}: choose one of {['set', 'choose', 'select', *runs]}")
            runs[name]()
        if (self.status["error"] or {}).get("where") in ("set", "expression", "choose", "select", name):
            self._say(error=None)

"""Background work while the kernel is busy: a copy of the model for hooks, and a thread.

Hooks of two computations on one model would affect both. So the explorer uses copies that share the weights but have
their own modules and hooks.
"""

from __future__ import annotations

import contextlib
import copy
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING

from lensteer import twins
from lensteer.errors import LensteerError
from lensteer.steering import active_plans

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Check = Callable[[], None]
"""Raises `Stopped` if the calling job was stopped or replaced."""


class Stopped(Exception):
    """Raised in a job that was asked to stop."""


def private_copy(model: TransformerBridge) -> TransformerBridge:
    """The same model on the same weights, with its own modules and hooks (existing hooks are copied).

    Raises:
        LensteerError: a plan is on, which would stay on in the copy forever.
    """
    if active_plans(model):
        raise LensteerError("a steering plan is on: leave `with plan.on(model)` before exploring")
    shared = {id(x): x for x in [*model.parameters(), *model.buffers(), model.tokenizer]}
    made: TransformerBridge = copy.deepcopy(model, shared)
    twins.plain_twin(made)  # now, because building one sets torch's default dtype for a moment
    return made


class Worker:
    """Runs jobs in its own thread, one at a time. A new job replaces the one before.

    The thread stays between jobs: plain twins belong to a thread, and so does what a job keeps of a pass for the next.
    """

    def __init__(self, failed: Callable[[Exception], None]) -> None:
        """Nothing runs yet.

        Args:
            failed: called in the thread with the exception of a job.
        """
        self._failed = failed
        self._changed = threading.Condition()
        self._next: Callable[[Check], None] | None = None
        self._number = 0
        self._thread: threading.Thread | None = None
        self._running = self._closed = False

    def submit(self, job: Callable[[Check], None]) -> None:
        """Run a job as soon as the one before has stopped; it should call its check regularly."""
        with self._changed:
            self._next, self._number = job, self._number + 1
            self._running, self._closed = True, False
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, daemon=True, name="lensteer-explorer")
                self._thread.start()
            self._changed.notify_all()

    def stop(self) -> None:
        """Ask the job to stop."""
        with self._changed:
            self._next, self._number = None, self._number + 1

    def close(self) -> None:
        """Ask the job to stop, and end the thread; a later job starts another one."""
        with self._changed:
            self._next, self._number, self._closed = None, self._number + 1, True
            self._changed.notify_all()

    def wait(self, timeout: float | None = None) -> bool:
        """Wait until nothing runs; False if that takes longer."""
        with self._changed:
            return self._changed.wait_for(lambda: not self._running, timeout)

    def _take(self) -> tuple[Callable[[Check], None], int] | None:
        """The next job and its number, as soon as there is one; None after `close`."""
        with self._changed:
            while self._next is None:
                self._running = False
                self._changed.notify_all()
                if self._closed:
                    self._thread = None
                    return None
                self._changed.wait()
            job, self._next = self._next, None
            return job, self._number

    def _run(self) -> None:
        while (taken := self._take()) is not None:
            job, number = taken

            def check(mine: int = number) -> None:
                if self._number != mine:
                    raise Stopped

            try:
                check()
                job(check)
            except Stopped:
                pass
            except Exception as error:  # any error is shown, and later jobs still run
                if self._number == number:
                    with contextlib.suppress(Exception):  # there may be no page left to show it
                        self._failed(error)

"""Batches of work on a model, wherever they run: here, several at once on threads, or on a pool of other processes.

Small operations (norms, rotary embeddings, attention of a single new token) do not keep several cores busy; batches do.
So batches of a large model on a CPU run at once, one thread each. Each thread runs its own plain twin on the same
parameters, so that their hooks do not interfere.

While a pool is on a model (`distributed.Actors`), batches are sent to it instead. Callers do not see the difference:
what they call depends on the model and on its batch only.
"""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, TypeVar, runtime_checkable

import torch
from torch import nn

from lensteer import models, twins
from lensteer.errors import LensteerError
from lensteer.steering import active_plans, foreign_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Item = TypeVar("Item")
Result = TypeVar("Result")

#: Minimum number of parameters: below it, Python overhead between operations dominates.
LARGE = 50_000_000
#: No model has so many: for work that is not to run on threads.
NO_THREADS = sys.maxsize
#: Shards per worker of a pool, for work that is split by the pool's size: enough to even out unequal ones.
SHARDS = 4


@dataclass(frozen=True)
class SetAside:
    """An item that a pool could not process, while it processed the others.

    Attributes:
        name: of the item.
        error: why.
    """

    name: str
    error: str


@runtime_checkable
class Pool(Protocol):
    """Workers that have the model loaded."""

    aside: list[SetAside]

    @property
    def n(self) -> int:
        """Number of workers."""

    def run(
        self,
        run: Callable[[TransformerBridge, Sequence[Item]], Result],
        batches: Sequence[Sequence[Item]],
        name: Callable[[Item], str] | None,
    ) -> Iterator[tuple[Sequence[Item], Result]]:
        """As `run_batches`."""


_pools: weakref.WeakKeyDictionary[nn.Module, Pool] = weakref.WeakKeyDictionary()


@contextmanager
def pooled(model: TransformerBridge, pool: Pool) -> Iterator[None]:
    """Send the batches of a model to a pool inside the `with`.

    Raises:
        LensteerError: one is on the model already.
    """
    if model in _pools:
        raise LensteerError("there is a pool on this model already: leave its `with` first")
    _pools[model] = pool
    try:
        yield
    finally:
        del _pools[model]


def pool_on(model: TransformerBridge) -> Pool | None:
    """The pool that runs a model's batches; None while plans or foreign hooks are on, which only this process has."""
    pool = _pools.get(model)
    return None if pool is None or active_plans(model) or foreign_hooks(model) else pool


def shards(
    model: TransformerBridge, items: Sequence[Item], least: int = 1, *, dealt: bool = False
) -> list[Sequence[Item]]:
    """The items in a few parts for each worker of the pool; in one part without a pool.

    Args:
        model: whose pool it is.
        items: to split.
        least: number of items that a part should have, if there are enough for a part for each worker.
        dealt: deal the items out in turn, so that of items sorted by length every part has its share; instead of
            cutting the list.
    """
    pool = pool_on(model)
    if pool is None or not items:
        return [items] if items else []
    size = max(-(-len(items) // (SHARDS * pool.n)), min(least, -(-len(items) // pool.n)))
    n = -(-len(items) // size)
    return [items[i::n] for i in range(n)] if dealt else [items[i : i + size] for i in range(0, len(items), size)]


def n_at_once(model: TransformerBridge, least: int = LARGE) -> int:
    """How many batches to run at once: torch's number of threads, or 1 if batches may not run concurrently."""
    fits = models.device(model).type == "cpu" and sum(p.numel() for p in model.original_model.parameters()) >= least
    alone = not fits or active_plans(model) or foreign_hooks(model) or twins.plain_twin(model) is None
    return 1 if alone else torch.get_num_threads()


def run_batches(
    model: TransformerBridge,
    run: Callable[[TransformerBridge, Sequence[Item]], Result],
    batches: Sequence[Sequence[Item]],
    *,
    name: Callable[[Item], str] | None = None,
    least: int = LARGE,
) -> Iterator[tuple[Sequence[Item], Result]]:
    """Each batch with the result of `run`, in order. A result may wait for earlier ones.

    On a pool a batch may come back in parts: one that fails there is halved until the items that fail are alone.

    Args:
        model: that `run` uses, through `generate` or `forced_logits`.
        run: must depend on its model and its batch only; on a pool it is pickled.
        batches: of work.
        name: an item's name. With it, a pool sets aside an item that fails (`Pool.aside`) and leaves it out of what is
            returned. Without it, and without a pool, an error ends the work.
        least: minimum number of parameters for running several at once on threads.
    """
    pool = pool_on(model)
    if pool is not None:
        yield from pool.run(run, batches, name)
        return
    n = n_at_once(model, least)
    if n == 1:
        for batch in batches:
            yield batch, run(model, batch)
        return
    todo, threads = list(batches), torch.get_num_threads()
    torch.set_num_threads(1)  # each batch has one thread
    try:
        with ThreadPoolExecutor(n) as executor:
            waiting: list[tuple[Sequence[Item], Future[Result]]] = []
            try:
                while todo or waiting:
                    while todo and len(waiting) < n + 1:
                        batch = todo.pop(0)
                        waiting.append((batch, executor.submit(run, model, batch)))
                    batch, future = waiting.pop(0)
                    yield batch, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)

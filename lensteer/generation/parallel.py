"""Several batches of a large model at once on a CPU, one thread each.

Small operations (norms, rotary embeddings, a single new token's attention) do not keep several cores busy; batches do.
Each thread runs a plain twin of its own on the same parameters, so that the hooks of one do not meet the other's.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import TYPE_CHECKING, TypeVar

import torch

from lensteer import models, twins
from lensteer.steering import active_plans, foreign_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Batch = TypeVar("Batch")
Result = TypeVar("Result")

#: Parameters from which on it pays: below, Python's own work between operations is what takes the time.
LARGE = 50_000_000


def n_at_once(model: TransformerBridge, least: int = LARGE) -> int:
    """How many batches to run at once: torch's number of threads, or 1 where a batch may not run beside another."""
    fits = models.device(model).type == "cpu" and sum(p.numel() for p in model.original_model.parameters()) >= least
    alone = active_plans(model) or foreign_hooks(model) or not fits or twins.plain_twin(model) is None
    return 1 if alone else torch.get_num_threads()


def run_batches(
    model: TransformerBridge, run: Callable[[Batch], Result], batches: Iterable[Batch], *, least: int = LARGE
) -> Iterator[tuple[Batch, Result]]:
    """Each batch with what `run` makes of it, in order. A result may wait for those before it.

    Args:
        model: that `run` runs, through `generate` or `forced_logits`.
        run: depends on nothing but its batch.
        batches: of work.
        least: parameters from which on several run at once.
    """
    n = n_at_once(model, least)
    if n == 1:
        for batch in batches:
            yield batch, run(batch)
        return
    todo, threads = list(batches), torch.get_num_threads()
    torch.set_num_threads(1)  # each batch has one thread
    try:
        with ThreadPoolExecutor(n) as pool:
            waiting: list[tuple[Batch, Future[Result]]] = []
            try:
                while todo or waiting:
                    while todo and len(waiting) < n + 1:
                        batch = todo.pop(0)
                        waiting.append((batch, pool.submit(run, batch)))
                    batch, future = waiting.pop(0)
                    yield batch, future.result()
            finally:
                for _, future in waiting:
                    future.cancel()
    finally:
        torch.set_num_threads(threads)

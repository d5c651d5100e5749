"""Several batches of a large model at once on a CPU, one thread each.

Small operations (norms, rotary embeddings, attention of a single new token) do not keep several cores busy; batches do.
Each thread runs its own plain twin on the same parameters, so that their hooks do not interfere.
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

#: Minimum number of parameters: below it, Python overhead between operations dominates.
LARGE = 50_000_000


def n_at_once(model: TransformerBridge, least: int = LARGE) -> int:
    """How many batches to run at once: torch's number of threads, or 1 if batches may not run concurrently."""
    fits = models.device(model).type == "cpu" and sum(p.numel() for p in model.original_model.parameters()) >= least
    alone = active_plans(model) or foreign_hooks(model) or not fits or twins.plain_twin(model) is None
    return 1 if alone else torch.get_num_threads()


def run_batches(
    model: TransformerBridge, run: Callable[[Batch], Result], batches: Iterable[Batch], *, least: int = LARGE
) -> Iterator[tuple[Batch, Result]]:
    """Each batch with the result of `run`, in order. A result may wait for earlier ones.

    Args:
        model: that `run` uses, through `generate` or `forced_logits`.
        run: must depend on its batch only.
        batches: of work.
        least: minimum number of parameters for running several at once.
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

"""Text quality: likelihood under the unsteered model, and KL between steered and unsteered."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.files import append_jsonl, digest, drop_cut_line, read_jsonl
from lensteer.forward import forced_logits
from lensteer.generation import run_batches
from lensteer.progress import progress_bar
from lensteer.results import reading, revived
from lensteer.steering import Plan, active_plans
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Tokens per forward, logits kept: batches that fit the CPU cache are faster than larger ones.
_TOKENS = 2048
#: The same on a GPU, where small batches wait for the host.
_GPU_TOKENS = 8192


def text_quality(
    model: TransformerBridge,
    traces: Sequence[Trace],
    plans: Sequence[Plan | None],
    *,
    path: Path | None = None,
    progress: bool = False,
) -> list[dict[str, float]]:
    """For each chain, "nll", nats per token of its response under the model without its plan, and "kl".

    "kl" is the mean over its tokens of KL(p_steered ‖ p_unsteered) in nats, 0 for a chain without a plan. The chain is
    run twice under teacher forcing, with and without the plan.

    Args:
        model: the bridge.
        traces: chains as they were generated, none empty.
        plans: one per chain, that it was generated with.
        path: JSONL file for resuming.
        progress: show a bar.

    Raises:
        LensteerError: an empty response, lists of different lengths, or a likelihood that is not finite.
    """
    if len(plans) != len(traces):
        raise LensteerError(f"{len(plans)} plans for {len(traces)} chains: give one per chain")
    identities = {id(plan): "" if plan is None else json.dumps(plan.identity()) for plan in plans}
    on = json.dumps([plan.identity() for plan in active_plans(model)])
    fingerprint = models.fingerprint(model).weights

    def key(i: int) -> str:
        parts = [fingerprint, on, identities[id(plans[i])], list(traces[i].ids), traces[i].prompt_length]
        return digest(json.dumps(parts).encode())

    keys = [key(i) for i in range(len(traces))]
    known: dict[str, dict[str, float]] = {}
    if path is not None and drop_cut_line(path):
        with reading(path, "give another path"):
            rows = [row for _, row in read_jsonl(path)]
            known = {row["key"]: {name: revived(float, row[name]) for name in ("nll", "kl")} for row in rows}
    order = sorted((i for i in range(len(traces)) if keys[i] not in known), key=lambda i: -len(traces[i].ids))
    batches, size = [], _TOKENS if models.device(model).type == "cpu" else _GPU_TOKENS
    while order:
        n = max(1, size // len(traces[order[0]].ids))
        batches.append(order[:n])
        order = order[n:]

    texts = [[(i, traces[i].prompt_ids, traces[i].response_ids, plans[i]) for i in batch] for batch in batches]
    todo = sum(map(len, batches))
    with progress_bar(total=todo, unit="chain", desc="text quality", show=progress and bool(todo)) as bar:
        for batch, found in run_batches(model, _read, texts):
            some = [i for i, *_ in batch]
            for i, figures in zip(some, found, strict=True):
                if not all(map(math.isfinite, figures.values())):
                    why = "lower the coefficient that wrote it"
                    if plans[i] is None:
                        why = f"{model.original_model.dtype} does not hold this model's activations; load it in another"
                    raise LensteerError(f"the likelihood of chain {traces[i].id!r} is not finite: {why}")
                known[keys[i]] = figures
            if path is not None:
                append_jsonl(path, ({"key": keys[i], **known[keys[i]]} for i in some))
            bar.update(len(some))
    return [known[k] for k in keys]


#: Its number, the tokens of a prompt and of its response, and the plan that the response was generated with.
_Text = tuple[int, Sequence[int], Sequence[int], Plan | None]


def _read(model: TransformerBridge, batch: Sequence[_Text]) -> list[dict[str, float]]:
    _, given, written, plans = zip(*batch, strict=True)
    plain = forced_logits(model, given, written)
    steered: Sequence[Tensor | None] = [None] * len(batch)
    if any(plan is not None for plan in plans):
        steered = forced_logits(model, given, written, plans=plans)
    return [
        _figures(ids, q, None if plan is None else p)
        for ids, q, p, plan in zip(written, plain, steered, plans, strict=True)
    ]


def _figures(ids: Sequence[int], logits: Tensor, steered: Tensor | None) -> dict[str, float]:
    log_q = logits.float().log_softmax(-1)
    nll = -float(log_q.gather(1, torch.tensor(ids, device=log_q.device)[:, None]).double().mean())
    if steered is None:
        return {"nll": nll, "kl": 0.0}
    log_p = steered.float().log_softmax(-1)
    return {"nll": nll, "kl": float((log_p.exp() * (log_p - log_q)).sum(-1, dtype=torch.float64).mean())}

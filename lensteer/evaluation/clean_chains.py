"""What a plan does to text that the unsteered model wrote: KL per token, and how much likelihood the text loses."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch

from lensteer.calibration import RolloutKL
from lensteer.errors import LensteerError
from lensteer.forward import forced_logits
from lensteer.metrics import kl_divergence
from lensteer.statistics import Estimate, Ratio, bootstrap_interval
from lensteer.steering import Plan
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: Chains per forward.
_ROWS = 8


@dataclass(frozen=True)
class CleanChains:
    """A plan along unsteered chains, under teacher forcing; 95 % intervals over chains.

    Attributes:
        kl_p50: median over tokens of KL(p_steered ‖ p_unsteered), in nats.
        kl_p95: its 95th percentile.
        nll: nats per token that the text costs more under the steered model than under the unsteered one.
        n: chains.
    """

    kl_p50: Estimate
    kl_p95: Estimate
    nll: Estimate
    n: int


def on_clean_chains(
    model: TransformerBridge, traces: Sequence[Trace], plans: Mapping[str, Plan], *, seed: int = 0
) -> dict[str, CleanChains]:
    """Each plan's effect on the tokens of the same unsteered chains: one forward per plan, and one without.

    Args:
        model: the bridge.
        traces: chains that the unsteered model wrote, none empty.
        plans: by name.
        seed: of the intervals.

    Raises:
        LensteerError: fewer than two chains, an empty one, or a layer that the model lacks.
    """
    if len(traces) < 2:
        raise LensteerError(f"{len(traces)} unsteered chain(s): an interval needs at least two")
    kl: dict[str, list[torch.Tensor]] = {name: [] for name in plans}
    nll: dict[str, list[float]] = {name: [] for name in plans}
    by_length = sorted(traces, key=lambda trace: len(trace.ids))
    for at in range(0, len(by_length), _ROWS):
        some = by_length[at : at + _ROWS]
        given, written = [trace.prompt_ids for trace in some], [trace.response_ids for trace in some]
        plain = forced_logits(model, given, written)
        for name, plan in plans.items():
            steered = forced_logits(model, given, written, plans=[plan] * len(some))
            for ids, p, q in zip(written, steered, plain, strict=True):
                kl[name].append(kl_divergence(p, q).cpu())
                nll[name].append(_nats(p, ids) - _nats(q, ids))
    lengths = np.array([float(len(trace.response_ids)) for trace in by_length])
    found = {}
    for name in plans:
        tokens = RolloutKL(tuple(kl[name]))
        more = bootstrap_interval(Ratio(np.array(nll[name]), lengths), seed=seed)
        found[name] = CleanChains(
            tokens.estimate(0.5, seed=seed), tokens.estimate(0.95, seed=seed), more, len(by_length)
        )
    return found


def _nats(logits: torch.Tensor, ids: Sequence[int]) -> float:
    """Minus the log-likelihood of a response."""
    chosen = torch.tensor(ids, device=logits.device)[:, None]
    return -float(logits.float().log_softmax(-1).gather(1, chosen).double().sum())

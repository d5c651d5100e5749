"""The KL of steering at each token of the *steered* model's own rollouts.

    KL_t = KL(p_steered(· | x_<t) ‖ p_unsteered(· | x_<t)),   x drawn from the steered model at temperature 1.

In this direction because x is drawn from the steered model: by the chain rule Σ_t KL_t is, in expectation, the KL
between the two models' distributions over whole chains.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeVar

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.forward import forced_logits
from lensteer.generation import generate
from lensteer.generation.jobs import chain_seed
from lensteer.metrics import kl_divergence
from lensteer.statistics import Estimate, Ratio, bootstrap_interval, drawn_counts, percentile_interval
from lensteer.steering import Plan
from lensteer.tasks import Task

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

Row = TypeVar("Row")


@dataclass(frozen=True, eq=False)
class RolloutKL:
    """The KL of one plan at each token of its own rollouts.

    Attributes:
        tokens: for each prompt, KL_t of every generated token (the end token included), in nats, fp64. Rollouts differ
            in length.
    """

    tokens: tuple[Float[Tensor, " _pos"], ...]

    def statistic(self, quantile: float | None) -> float:
        """A quantile over all tokens (the smallest value that this share does not exceed), or their mean."""
        values = torch.cat(self.tokens)
        if quantile is None:
            return float(values.mean())
        return float(values.sort().values[max(math.ceil(quantile * len(values)) - 1, 0)])

    def estimate(self, quantile: float | None, *, n: int = 1000, seed: int = 0) -> Estimate:
        """The statistic with its 95 % percentile bootstrap over prompts; NaN ends if there is only one."""
        lengths, value = [len(row) for row in self.tokens], self.statistic(quantile)
        if len(lengths) < 2:
            return Estimate(value, math.nan, math.nan, len(lengths))
        if quantile is None:
            sums = np.array([float(row.sum()) for row in self.tokens])
            return bootstrap_interval(Ratio(sums, np.array(lengths)), n=n, seed=seed)
        values, order = torch.cat(self.tokens).sort()
        prompt = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))[order]
        below = torch.nn.functional.one_hot(prompt, len(lengths)).cumsum(0).T.double()  # of each prompt, up to a value
        draws = []
        for counts in torch.as_tensor(drawn_counts(len(lengths), n, seed)).split(100):
            so_far = counts @ below
            draws.append(values[(so_far >= quantile * so_far[:, -1:]).int().argmax(1)])
        return percentile_interval(value, torch.cat(draws).numpy(), len(lengths))


def rollout_kl(
    model: TransformerBridge,
    prompts: Sequence[Task] | Sequence[Sequence[int]],
    plans: Sequence[Plan],
    *,
    max_new_tokens: int = 200,
    system: str = "",
    seed: int = 0,
    batch_size: int = 256,
    memory: int = 2**30,
    cost: Counter[str] | None = None,
) -> list[RolloutKL]:
    """Roll out every plan on every prompt and measure the KL of each token: KL(steered ‖ unsteered), in nats.

    Plans share batches. Each rollout is then scored twice by teacher forcing, steered and unsteered, in batches of the
    same shape, so that a coefficient of 0 gives exactly 0. In half precision small KLs are lost in rounding.

    Args:
        model: the bridge. Plans that are on apply to both sides of the comparison.
        prompts: tasks with distinct ids, or token ids.
        plans: each is compared with the unsteered model.
        max_new_tokens: per rollout.
        system: the system prompt of tasks.
        seed: for the sampling: a prompt has the same random numbers under every plan and at every coefficient.
        batch_size: rollouts that run together.
        memory: bytes that a teacher-forced pass may take, roughly.
        cost: counts "forwards", and tokens "generated" and "forced", if given.

    Raises:
        LensteerError: no prompts, an empty one, tasks that share an id, an impossible number, a layer that the model
            lacks, or a coefficient so large that logits are not finite.
    """
    ids, names = _encoded(model, prompts, system)
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if value < 1:
            raise LensteerError(f"{name}={value}: give a positive number")
    seeds = [chain_seed(seed, name, 0) for name in names]
    cost = Counter() if cost is None else cost
    jobs = [(plan, row) for plan in range(len(plans)) for row in range(len(ids))]
    found: dict[tuple[int, int], Tensor] = {}

    def decoded(n_rows: int) -> None:
        cost.update(forwards=1, generated=n_rows)

    for batch in _chunks(jobs, batch_size):
        rollouts = generate(
            model,
            [ids[row] for _, row in batch],
            max_new_tokens=max_new_tokens,
            temperature=1.0,
            seeds=[seeds[row] for _, row in batch],
            plans=[plans[plan] for plan, _ in batch],
            advance=decoded,
        )
        written = {job: rollout.ids for job, rollout in zip(batch, rollouts, strict=True)}
        order = sorted(batch, key=lambda job: -len(ids[job[1]]) - len(written[job]))  # the first chunk is the largest
        longest, most = max(len(ids[row]) for _, row in batch), max(map(len, written.values()))
        for some in _chunks(order, _rows_that_fit(model, longest + most, most, memory)):
            given, responses = [ids[row] for _, row in some], [written[job] for job in some]
            steered = forced_logits(model, given, responses, plans=[plans[plan] for plan, _ in some])
            unsteered = forced_logits(model, given, responses)
            cost.update(forwards=2, forced=2 * sum(map(len, [*given, *responses])))
            for job, p, q in zip(some, steered, unsteered, strict=True):
                parts = max(1, 48 * p.numel() // memory)
                kl = [kl_divergence(a, b) for a, b in zip(p.chunk(parts), q.chunk(parts), strict=True)]
                found[job] = torch.cat(kl).cpu()
    return [RolloutKL(tuple(found[plan, row] for row in range(len(ids)))) for plan in range(len(plans))]


def _encoded(
    model: TransformerBridge, prompts: Sequence[Task] | Sequence[Sequence[int]], system: str
) -> tuple[list[list[int]], list[str]]:
    """Token ids of each prompt, and the name that seeds its sampling."""
    if not prompts:
        raise LensteerError("no prompts to roll out: give tasks, e.g. from load_tasks(split='dev'), or token ids")
    ids, names = [], []
    for number, prompt in enumerate(prompts):
        if isinstance(prompt, Task):
            names.append(prompt.id)
            ids.append(models.encode(model, models.chat_text(model, prompt.prompt, system=system)))
        else:
            names.append(str(number))
            ids.append([int(token) for token in prompt])  # type: ignore[attr-defined]  # a sequence, if not a task
    if len(set(names)) < len(names):
        raise LensteerError(f"tasks share an id: {sorted({n for n in names if names.count(n) > 1})}; give each its own")
    return ids, names


def _rows_that_fit(model: TransformerBridge, length: int, keep: int, memory: int) -> int:
    """Rows of a teacher-forced batch that fit into `memory`: logits of both sides, scores of all heads, the MLP."""
    cfg = model.cfg
    layer = 12 * length * (int(cfg.d_mlp or 4 * cfg.d_model) + int(cfg.n_heads) * length)
    return max(1, memory // (16 * keep * int(cfg.d_vocab) + layer))


def _chunks(rows: Sequence[Row], size: int) -> list[Sequence[Row]]:
    return [rows[i : i + size] for i in range(0, len(rows), size)]

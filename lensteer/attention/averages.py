"""Weighted means over traces with intervals, where a column may have no data in some or all traces."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.statistics import Ratio, bootstrap_interval


def averaged(
    values: Float[Tensor, "trace *column"], weights: Float[Tensor, "trace *column"], *, seed: int = 0
) -> Float[Tensor, "3 *column"]:
    """Σ values / Σ weights over traces, and the ends of its 95 % bootstrap interval.

    Args:
        values: sums of each trace.
        weights: the denominators; 0 if a trace has no data.
        seed: for the resamples.

    Returns:
        Estimate, low and high. NaN if all weights are 0; the ends also if fewer than two traces have weight.
    """
    v, w = values.double().flatten(1), weights.double().flatten(1)
    result = v.new_full((3, v.shape[1]), torch.nan)
    some, enough = w.sum(0) > 0, (w > 0).sum(0) > 1
    result[0, some] = v[:, some].sum(0) / w[:, some].sum(0)
    if enough.any():
        found = bootstrap_interval(Ratio(v[:, enough].numpy(), w[:, enough].numpy()), seed=seed)
        result[1, enough], result[2, enough] = torch.from_numpy(found.low), torch.from_numpy(found.high)
    return result.view(3, *values.shape[1:])

"""Single values of a score, by span and layer, and their means over spans with intervals over traces."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.statistics import Ratio, bootstrap_interval


@dataclass(frozen=True, eq=False)
class Cells:
    """The values that scores average: a case is a span's onset and the behavior whose vector is added there.

    Attributes:
        trace: Index of the trace, per case.
        span: Index of the span in its trace.
        behavior: Index into the scores' labels of the vector that is added (not the span's own label).
        onset: Absolute position.
        values: In the unit of the scores.
    """

    trace: Int[Tensor, " case"]
    span: Int[Tensor, " case"]
    behavior: Int[Tensor, " case"]
    onset: Int[Tensor, " case"]
    values: Float[Tensor, "case layer"]


def average(
    cells: Cells, n_behaviors: int, *, seed: int = 0
) -> tuple[Float[Tensor, "3 behavior layer"], tuple[int, ...], int]:
    """Means over cases with their intervals, the number of cases per behavior, and the number of traces.

    A mean is Σ values / Σ cases, so a trace is weighted by its number of spans; the bootstrap resamples traces.

    Returns:
        Mean, low and high stacked (fp64, NaN where undefined), spans per behavior, traces.
    """
    _, unit = cells.trace.unique(return_inverse=True)
    n_traces, n_layers = int(unit.max()) + 1, cells.values.shape[1]
    place = unit * n_behaviors + cells.behavior
    sums = torch.zeros(n_traces * n_behaviors, n_layers, dtype=torch.float64)
    sums = sums.index_add(0, place, cells.values.double()).view(n_traces, n_behaviors, n_layers)
    counts = torch.bincount(place, minlength=n_traces * n_behaviors).view(n_traces, n_behaviors)
    result = torch.full((3, n_behaviors, n_layers), math.nan, dtype=torch.float64)
    for b in range(n_behaviors):
        if not counts[:, b].any():
            continue
        result[0, b] = sums[:, b].sum(0) / counts[:, b].sum()
        if n_traces > 1:
            weights = counts[:, b, None].expand(n_traces, n_layers)
            interval = bootstrap_interval(Ratio(sums[:, b].numpy(), weights.numpy()), seed=seed)
            result[1, b], result[2, b] = torch.tensor(interval.low), torch.tensor(interval.high)
    return result, tuple(counts.sum(0).tolist()), n_traces


def sampling_error(
    variance: Float[Tensor, "case layer"], mean: Float[Tensor, "behavior layer"], cells: Cells, samples: int
) -> tuple[Float[Tensor, "behavior layer"], Float[Tensor, "behavior layer"]]:
    """The effect of drawing a few samples per case on the means over cases: their standard error, and κ.

    With V_c the variance between the samples x of case c, out of N cases with m samples each, the standard error
    is √(Σ_c V_c / m) / N and κ = mean_c(V_c) / mean(x)², so that the relative error is √(κ / (m·N)). κ is 2 for
    x the square of a Gaussian score, more for heavy tails.

    Args:
        variance: Between the samples of a case, unbiased.
        mean: Of the values, over all cases and samples.
        cells: The cases.
        samples: Samples per case.

    Returns:
        Standard error and κ; NaN for a behavior without a case.
    """
    error, kappa = torch.full((2, *mean.shape), math.nan, dtype=torch.float64)
    for b in cells.behavior.unique().tolist():
        own = variance[cells.behavior == b]
        error[b] = (own.sum(0) / samples).sqrt() / len(own)
        kappa[b] = own.mean(0) / mean[b].square()
    return error, kappa

"""From a request to scores: an estimator over all traces, means, errors, and exact values where they are needed."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from lensteer import models
from lensteer.attribution.cells import Cells, average, sampling_error
from lensteer.attribution.estimators import Estimate, estimate, noise_measure
from lensteer.attribution.request import METHODS, Request
from lensteer.attribution.rows import SharedCache
from lensteer.attribution.scores import LayerScores
from lensteer.errors import LensteerError
from lensteer.generation.parallel import NO_THREADS, pool_on, run_batches, shards
from lensteer.progress import progress_bar
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


class Measured(NamedTuple):
    """The result of an estimator on all traces. All but `values` is at coefficient 1.

    Attributes:
        kept: Which of the request's cases were measured: all, but those of traces that a pool set aside.
        values: For each coefficient that was run: coefficient 1 only, if the others follow from it.
        variance: Between the samples of a case; NaN if there are fewer than two.
        controls: By kind of control vectors, their means over the cases of each behavior.
        noise_floor: In the unit of the method.
        cost: Forwards, rows and seconds.
    """

    kept: Bool[Tensor, " asked"]
    values: Float[Tensor, "coefficient case layer"]
    variance: Float[Tensor, "case layer"]
    controls: dict[str, Float[Tensor, "null behavior layer"]]
    noise_floor: float
    cost: dict[str, int | float]


#: A trace with its number and its cases.
_Numbered = tuple[int, Trace, Int[Tensor, "case 5"]]


def measure(model: TransformerBridge, traces: Sequence[Trace], request: Request, *, progress: bool = False) -> Measured:
    """Run the estimator on every trace that has cases; a pool on the model (`distributed.Actors`) shares them out.

    Raises:
        LensteerError: An error of the estimator, with its trace.
    """
    began, cases, shape = time.perf_counter(), request.cases, (len(request.cases), len(request.layers))
    values = torch.full((len(request.run_at), *shape), torch.nan, dtype=torch.float64)
    variance = torch.full(shape, torch.nan, dtype=torch.float64)
    controls: dict[str, Tensor] = {}
    kept = torch.zeros(len(cases), dtype=torch.bool)
    noise, forwards, rows = 0.0, 0, 0
    todo = [(number, traces[number], cases[cases[:, 0] == number]) for number in cases[:, 0].unique().tolist()]
    parts = [[each] for each in todo] if pool_on(model) is None else shards(model, todo)
    run = partial(_estimates, request=replace(request, cases=cases[:0]))  # each trace comes with its own
    with progress_bar(total=len(todo), desc=request.method, unit="trace", show=progress) as bar:
        for part, estimates in run_batches(model, run, parts, name=lambda each: each[1].id, least=NO_THREADS):
            for (number, *_), (found, floor, n_forwards, n_rows) in zip(part, estimates, strict=True):
                mine = (cases[:, 0] == number).nonzero()[:, 0]
                kept[mine] = True
                values[:, mine] = found.values
                if found.variance is not None:
                    variance[mine] = found.variance
                for kind, sums in found.controls.items():
                    controls[kind] = controls.get(kind, 0) + sums
                noise = max(noise, floor)
                forwards, rows = forwards + n_forwards, rows + n_rows
            bar.update(len(part))
    counts = cases[kept, 2].bincount(minlength=len(request.labels))[:, None]
    cost = {"forwards": forwards, "rows": rows, "seconds": time.perf_counter() - began}
    return Measured(
        kept, values[:, kept], variance[kept], {kind: sums / counts for kind, sums in controls.items()}, noise, cost
    )


def _estimates(
    model: TransformerBridge, batch: Sequence[_Numbered], request: Request
) -> list[tuple[Estimate, float, int, int]]:
    """The estimate of each trace, with the noise floor of its cache and the number of forwards and rows."""
    difference, made = noise_measure(request), []
    for number, trace, cases in batch:
        try:
            places = torch.cat([torch.arange(begin, end) for begin, end in cases[:, 3:].unique(dim=0).tolist()])
            cache = SharedCache(model, trace.ids, places, difference=difference)
            found = estimate(cache, trace, cases, request)
        except LensteerError as error:
            raise LensteerError(f"trace {number} ({trace.id}): {error}") from error
        made.append((found, cache.noise_floor, cache.n_forwards, cache.n_rows))
    return made


def scores_of(
    model: TransformerBridge, request: Request, measured: Measured, number: int, provenance: Mapping[str, Any]
) -> LayerScores:
    """The scores at one of the requested coefficients; the request has the cases that were measured."""
    how, coefficient = METHODS[request.method], request.coefficients[number]
    values, factor = measured.values[number if how.power is None else 0], 1.0
    if how.power is not None:
        factor = abs(coefficient) if request.method == "published" else coefficient**how.power
    trace, span, behavior, onset, _ = request.cases.unbind(1)
    cells = Cells(trace, span, behavior, onset, factor * values)
    (mean, low, high), n_spans, n_traces = average(cells, len(request.labels), seed=request.seed)
    error = kappa = None
    if how.sampled:
        error, kappa = sampling_error(measured.variance * factor**2, mean, cells, request.samples)
    return LayerScores(
        labels=request.labels,
        layers=request.layers,
        n_layers=models.n_layers(model),
        mean=mean,
        low=low,
        high=high,
        n_spans=n_spans,
        n_traces=n_traces,
        method=request.method,
        coefficient=float(coefficient),
        coefficient_unit=request.coefficient_unit,
        spans=request.spans,
        window=request.window,
        noise_floor=None if how.unit == "arbitrary" else measured.noise_floor,
        max_spans=request.max_spans,
        cost={**measured.cost, "coefficients": len(request.coefficients)},
        provenance=dict(provenance),
        cells=cells,
        unit=how.unit,
        samples=request.samples if how.sampled else None,
        standard_error=error,
        kappa=kappa,
        controls={kind: factor * means for kind, means in measured.controls.items()},
        relative_length=abs(coefficient) * request.length,
    )


def with_exact_cells(
    model: TransformerBridge,
    traces: Sequence[Trace],
    request: Request,
    scores: LayerScores,
    *,
    progress: bool = False,
) -> LayerScores:
    """The same scores with exact values in the cells that are unreliable because of their sampling error or size.

    A cell below the noise is unchanged: its exact value would be below the same noise. Control vectors are not rerun;
    the means to compare them with are kept in `estimated`.
    """
    wanted = scores.unreliable() & ~scores.below_noise()
    assert scores.cells is not None
    kept = wanted[scores.cells.behavior].any(1)
    changed = replace(scores, recomputed=wanted, estimated=scores.mean)
    if not kept.any():
        return changed
    again = replace(
        request,
        method="exact",
        coefficients=(scores.coefficient,),
        cases=request.cases[kept],
        wanted=wanted,
        controls={},
    )
    exact = measure(model, traces, again, progress=progress)
    if not exact.kept.all():
        raise LensteerError(
            "the exact scores of a trace failed, whose estimates did not: leave out exact_where_unreliable"
        )
    values = scores.cells.values.clone()
    values[kept] = torch.where(wanted[scores.cells.behavior[kept]], exact.values[0], values[kept])
    cells = replace(scores.cells, values=values)
    (mean, low, high), _, _ = average(cells, len(scores.labels), seed=request.seed)
    error = scores.standard_error
    return replace(
        changed,
        mean=mean,
        low=low,
        high=high,
        cells=cells,
        noise_floor=max(scores.noise_floor or 0.0, exact.noise_floor),
        standard_error=None if error is None else torch.where(wanted, 0.0, error),
        cost={name: scores.cost[name] + exact.cost.get(name, 0) for name in scores.cost},
    )

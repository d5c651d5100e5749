"""The estimators: functions of one signature, from one trace's shared cache and cases to their values.

Each says what it computes; `attribute` averages over traces.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.activations import trace_key
from lensteer.attribution.exact import curvature_cells, exact_cells
from lensteer.attribution.gradients import (
    Cotangents,
    behavior_odds,
    behavior_odds_cotangents,
    chain_gradients,
    published_cotangents,
    sampled_scores,
    stratified_uniforms,
)
from lensteer.attribution.request import Request
from lensteer.attribution.rows import SharedCache
from lensteer.metrics import kl_divergence
from lensteer.statistics import trace_generator
from lensteer.traces import Trace

#: From the projections of a vector, `[sample case layer …]`, to the values of the samples.
Values = Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """What one trace gave. All but `values` is at coefficient 1.

    Attributes:
        values: For each strength that was run; a linear or quadratic method has coefficient 1 only.
        variance: Between the samples of a case.
        nulls: By kind of control vectors, their values summed over the cases of each behavior.
    """

    values: Float[Tensor, "coefficient case layer"]
    variance: Float[Tensor, "case layer"] | None
    nulls: dict[str, Float[Tensor, "null behavior layer"]]


def estimate(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """Run the method that `request` names on one trace's cases."""
    return _ESTIMATORS[request.method](cache, trace, cases, request)


def noise_measure(request: Request) -> Callable[[Tensor, Tensor], Tensor]:
    """How the rounding of two sets of logits is compared: in the unit of the method."""
    if request.share is None:
        return kl_divergence
    share = request.share
    return lambda full, rows: (behavior_odds(full, share) - behavior_odds(rows, share)).abs().amax(-1)


def exact(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """KL(p ‖ p with the vector added), run for every strength."""
    begin, end, strength = cases[:, 3], cases[:, 4], torch.tensor(request.run_at)
    added = strength[:, None, None, None] * request.unit
    vector, layers, wanted = cases[:, 2], request.layers, request.wanted
    return Estimate(exact_cells(cache, begin, end, added, vector, layers, wanted, memory=request.memory), None, {})


def fisher_jvp(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """½ Var_p(J u), the second order of that KL, by forward-mode differentiation."""
    begin, end = cases[:, 3], cases[:, 4]
    value = curvature_cells(cache, begin, end, request.unit, cases[:, 2], request.layers, memory=request.memory)
    return Estimate(value[None], None, {})


def fisher(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """½ mean_m (Σ_s u·∇_{h_s} Σ_t log p_t(y_t))², y_t drawn from p_t: an unbiased estimate of ½ Σ_t Var_{p_t}(J_t u).

    Scores of different positions t are independent with mean 0, so the square of their sum has no cross terms.
    """
    generator = trace_generator(request.seed, "fisher", trace_key(trace))
    uniforms = stratified_uniforms(len(trace.ids), request.samples, generator)  # whatever of it is scored
    return _linear(cache, cases, request, sampled_scores(uniforms), request.samples, lambda s: 0.5 * s.square())


def signed(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """⟨u, ∇M_b⟩, M_b the log-odds that a sentence of b begins: the direction in which the vector of b pushes."""
    assert request.share is not None
    return _linear(cache, cases, request, behavior_odds_cotangents(request.share), len(request.labels), lambda s: s)


def published(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """|⟨u, g⟩|, g the gradient of what the code of arXiv 2506.18167 calls a KL; see `published_cotangents`.

    It is neither a KL nor an order of one, it has no unit, and by default it looks at the onsets of other behaviors.
    """
    return _linear(cache, cases, request, published_cotangents, 1, torch.abs)


_ESTIMATORS = {"exact": exact, "fisher": fisher, "fisher_jvp": fisher_jvp, "signed": signed, "published": published}


def _linear(
    cache: SharedCache,
    cases: Int[Tensor, "case 5"],
    request: Request,
    cotangents: Cotangents,
    samples: int,
    values: Values,
) -> Estimate:
    """Means over samples of `values` of the dot products of vectors and gradients, one product per layer."""
    windows, window = cases[:, 3:].unique(dim=0, return_inverse=True)
    gradients = chain_gradients(
        cache, windows[:, 0], windows[:, 1], request.layers, cotangents, samples=samples, memory=request.memory
    )
    n_layers = len(request.layers)
    out = torch.empty(len(cases), n_layers, dtype=torch.float64)
    variance = torch.full_like(out, torch.nan)
    nulls = {
        kind: torch.zeros(len(draws.raw), len(request.labels), n_layers, dtype=torch.float64)
        for kind, draws in request.nulls.items()
    }
    for b in cases[:, 2].unique().tolist():
        mine = (cases[:, 2] == b).nonzero()[:, 0]
        own = gradients[:, window[mine].to(gradients.device)]
        if request.method == "signed":  # there a sample is a behavior
            own = own[b : b + 1]
        project = partial(torch.einsum, "scld,nld->scln", own)
        drawn = values(project(request.unit[b][None].to(own))[..., 0].double()).cpu()
        out[mine] = drawn.mean(0)
        if len(drawn) > 1:
            variance[mine] = drawn.var(0)
        for kind, draws in request.nulls.items():
            raw, factor = draws.of(b)
            found = values((project(raw.to(own)) * factor.T.to(own)).double())
            nulls[kind][:, b] = found.mean(0).sum(0).T.cpu()
    return Estimate(out[None], variance, nulls)

"""The estimators: functions of one signature, from one trace's shared cache and cases to their values.

Exact scores and the Fisher curvature run the chain with a vector added; the others need gradients only. `attribute`
averages over traces.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from functools import partial
from typing import NamedTuple

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lensteer.activations import trace_key
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
from lensteer.attribution.rows import Rows, SharedCache, row_edits, rows_per_forward
from lensteer.errors import LensteerError
from lensteer.metrics import kl_divergence
from lensteer.statistics import trace_generator
from lensteer.traces import Trace

#: From the logits of unedited rows and of edited chains at the same positions: a value per position and chain.
Measure = Callable[[Float[Tensor, "pos d_vocab"], Float[Tensor, "chain pos d_vocab"]], Float[Tensor, "chain pos"]]


def exact_cells(
    cache: SharedCache,
    begin: Int[Tensor, " case"],
    end: Int[Tensor, " case"],
    added: Float[Tensor, "coefficient vector layer d_model"],
    vector: Int[Tensor, " case"],
    layers: Sequence[int],
    wanted: Bool[Tensor, "vector layer"],
    *,
    memory: int = 2**30,
) -> Float[Tensor, "coefficient case layer"]:
    """Σ_t KL(p_t ‖ p_t with a vector added at resid_post of one layer), t and the addition over [begin, end), in nats.

    p_t comes from an unedited chain in the same forward as the edited ones, so that both have the same rounding.

    Args:
        cache: Of the sequence.
        begin: First position of each case.
        end: One past the last.
        added: What is added, coefficient included.
        vector: Which of the vectors each case adds.
        layers: The layers on the third axis of `added`.
        wanted: The vectors and layers to run; the others' values are NaN.
        memory: Bytes that the rows of one forward may take, roughly.

    Raises:
        LensteerError: The model's attention cannot share a cache between rows, or a KL is not finite.
    """
    with torch.no_grad():
        kl = _run(cache, begin, end, added, vector, layers, wanted, kl_divergence, memory)
    if not kl[:, wanted[vector]].isfinite().all():  # the layer is unknown: rows share sums of attention
        raise LensteerError("a KL is not finite: the added vector is so long that activations overflow")
    return kl


def curvature_cells(
    cache: SharedCache,
    begin: Int[Tensor, " case"],
    end: Int[Tensor, " case"],
    added: Float[Tensor, "vector layer d_model"],
    vector: Int[Tensor, " case"],
    layers: Sequence[int],
    *,
    memory: int = 2**30,
) -> Float[Tensor, "case layer"]:
    """½ Σ_t Var_{p_t}(J_t u), the KL's second order in the coefficient of u = `added`, without sampling noise.

    J_t u, the directional derivative of the logits at t, is the tangent that dual numbers carry forward: the same
    row edits add a vector whose value is zero and whose tangent is u. Arguments and errors are those of
    `exact_cells`. The fused attention kernels lack a forward-mode formula, so attention runs unfused here.
    """
    duals = torch.zeros_like(added)
    with ExitStack() as stack:
        stack.enter_context(torch.no_grad())
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        stack.enter_context(forward_ad.dual_level())
        value = _run(
            cache,
            begin,
            end,
            forward_ad.make_dual(duals, added)[None],
            vector,
            layers,
            torch.ones(added.shape[:2], dtype=torch.bool),
            _half_variance,
            memory // 2,  # tangents double the memory
        )[0]
    if not value.isfinite().all():
        raise LensteerError("a directional derivative is not finite: load the model in a dtype of wider range")
    return value


def _half_variance(
    unedited: Float[Tensor, "pos d_vocab"], edited: Float[Tensor, "chain pos d_vocab"]
) -> Float[Tensor, "chain pos"]:
    tangent = forward_ad.unpack_dual(edited).tangent.double()
    p = forward_ad.unpack_dual(unedited).primal.double().softmax(-1)
    centered = tangent - (p * tangent).sum(-1, keepdim=True)
    return 0.5 * (p * centered.square()).sum(-1)


def _run(
    cache: SharedCache,
    begin: Int[Tensor, " case"],
    end: Int[Tensor, " case"],
    added: Float[Tensor, "coefficient vector layer d_model"],
    vector: Int[Tensor, " case"],
    layers: Sequence[int],
    wanted: Bool[Tensor, "vector layer"],
    measure: Measure,
    memory: int,
) -> Float[Tensor, "coefficient case layer"]:
    """Run every wanted (coefficient, case, layer) as a separate chain and sum `measure` over its positions."""
    # Chains over the same positions are adjacent, so that few unedited ones are run twice.
    windows, window = torch.stack([begin, end], 1).unique(dim=0, return_inverse=True)
    lengths = windows[:, 1] - windows[:, 0]
    values = torch.full((len(added), len(vector), len(layers)), torch.nan, dtype=torch.float64)
    case, layer, coefficient = wanted[vector][..., None].expand(-1, -1, len(added)).nonzero().unbind(1)
    if not len(case):
        return values
    order = window[case].argsort(stable=True)
    case, layer, coefficient = case[order], layer[order], coefficient[order]
    limit = rows_per_forward(cache.model, len(cache.ids), memory)
    added = added.to(cache.ids.device)
    with row_edits(cache, layers) as edits:
        for first, last in _chunks(window[case].tolist(), lengths.tolist(), limit):
            c, i, a = case[first:last], layer[first:last], coefficient[first:last]
            places, plain = window[c].unique(return_inverse=True)
            span = torch.cat([windows[places], windows[window[c]]])
            rows = Rows.of(span[:, 0], span[:, 1])
            n_plain = int(lengths[places].sum())
            chain = rows.chain[n_plain:] - len(places)  # of each edited row, among the edited chains
            edits.clear()
            for at in i.unique().tolist():
                mine = (i[chain] == at).nonzero()[:, 0]
                which = chain[mine]
                edits[layers[at]] = ((mine + n_plain).to(added.device), added[a[which], vector[c[which]], at])
            logits = cache.run(rows)
            cache.check(rows.position[:n_plain], forward_ad.unpack_dual(logits).primal[:n_plain])
            unedited = logits[:n_plain].split(lengths[places].tolist())
            n_chains = plain.bincount(minlength=len(places))
            edited = logits[n_plain:].split((n_chains * lengths[places]).tolist())
            found = [
                measure(base, many.unflatten(0, (-1, len(base)))).sum(1)
                for base, many in zip(unedited, edited, strict=True)
            ]
            values[a, c, i] = torch.cat(found).cpu()
    return values


def _chunks(window: list[int], lengths: list[int], limit: int) -> Iterator[tuple[int, int]]:
    """Cut chains, sorted by window, into runs of at most `limit` rows, with the unedited chain of each window."""
    start, rows, before = 0, 0, -1
    for i, at in enumerate(window):
        new = lengths[at] * (1 if at == before else 2)
        if rows + new > limit and i > start:
            yield start, i
            start, rows, new = i, 0, 2 * lengths[at]
        rows, before = rows + new, at
    yield start, len(window)


#: From the projections of a vector, `[sample case layer …]`, to the values of the samples.
Values = Callable[[Tensor], Tensor]


class Estimate(NamedTuple):
    """The result for one trace. All but `values` is at coefficient 1.

    Attributes:
        values: For each coefficient that was run; a linear or quadratic method has coefficient 1 only.
        variance: Between the samples of a case.
        controls: By kind of control vectors, their values summed over the cases of each behavior.
    """

    values: Float[Tensor, "coefficient case layer"]
    variance: Float[Tensor, "case layer"] | None
    controls: dict[str, Float[Tensor, "null behavior layer"]]


def estimate(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """Run the method that `request` names on one trace's cases."""
    return _ESTIMATORS[request.method](cache, trace, cases, request)


def noise_measure(request: Request) -> Callable[[Tensor, Tensor], Tensor]:
    """The measure of rounding differences between two sets of logits, in the unit of the method."""
    if request.share is None:
        return kl_divergence
    share = request.share
    return lambda full, rows: (behavior_odds(full, share) - behavior_odds(rows, share)).abs().amax(-1)


def exact(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """KL(p ‖ p with the vector added), run for every coefficient."""
    begin, end, coefficient = cases[:, 3], cases[:, 4], torch.tensor(request.run_at)
    added = coefficient[:, None, None, None] * request.scaled
    vector, layers, wanted = cases[:, 2], request.layers, request.wanted
    return Estimate(exact_cells(cache, begin, end, added, vector, layers, wanted, memory=request.memory), None, {})


def fisher_jvp(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """½ Var_p(J u), the second order of that KL, by forward-mode differentiation."""
    begin, end = cases[:, 3], cases[:, 4]
    value = curvature_cells(cache, begin, end, request.scaled, cases[:, 2], request.layers, memory=request.memory)
    return Estimate(value[None], None, {})


def fisher(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """½ mean_m (Σ_s u·∇_{h_s} Σ_t log p_t(y_t))², y_t drawn from p_t: an unbiased estimate of ½ Σ_t Var_{p_t}(J_t u).

    Scores of different positions t are independent with mean 0, so the square of their sum has no cross terms.
    """
    generator = trace_generator(request.seed, "fisher", trace_key(trace))
    uniforms = stratified_uniforms(len(trace.ids), request.samples, generator)  # for all positions
    return _linear(cache, cases, request, sampled_scores(uniforms), request.samples, lambda s: 0.5 * s.square())


def signed(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """⟨u, ∇M_b⟩, M_b the log-odds that a sentence of b begins: the direction in which the vector of b pushes."""
    assert request.share is not None
    return _linear(cache, cases, request, behavior_odds_cotangents(request.share), len(request.labels), lambda s: s)


def published(cache: SharedCache, trace: Trace, cases: Int[Tensor, "case 5"], request: Request) -> Estimate:
    """|⟨u, g⟩|, g the gradient of what the code of arXiv 2506.18167 calls a KL; see `published_cotangents`.

    It is neither a KL nor an approximation of one, has no unit, and by default is averaged over onsets of other
    behaviors.
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
    controls = {
        kind: torch.zeros(len(draws.raw), len(request.labels), n_layers, dtype=torch.float64)
        for kind, draws in request.controls.items()
    }
    for b in cases[:, 2].unique().tolist():
        mine = (cases[:, 2] == b).nonzero()[:, 0]
        own = gradients[:, window[mine].to(gradients.device)]
        if request.method == "signed":  # there a sample is a behavior
            own = own[b : b + 1]
        project = partial(torch.einsum, "scld,nld->scln", own)
        drawn = values(project(request.scaled[b][None].to(own))[..., 0].double()).cpu()
        out[mine] = drawn.mean(0)
        if len(drawn) > 1:
            variance[mine] = drawn.var(0)
        for kind, draws in request.controls.items():
            raw, factor = draws.of(b)
            found = values((project(raw.to(own)) * factor.T.to(own)).double())
            controls[kind][:, b] = found.mean(0).sum(0).T.cpu()
    return Estimate(out[None], variance, controls)

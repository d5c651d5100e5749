"""Gradients of scalars of the logits with respect to the residual stream at all layers, over shared-cache rows.

The first-order effect of a vector is then a dot product, for any number of vectors. The scalars of the estimators are
defined here, too, each by its gradient with respect to the logits (its cotangent). Parameters get no gradients.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.attribution.rows import Rows, SharedCache, rows_per_forward
from lensteer.errors import LensteerError

#: From logits of rows and their positions to ∂(scalar)/∂(logits), for each sample and row.
Cotangents = Callable[[Float[Tensor, "row d_vocab"], Int[Tensor, " row"]], Float[Tensor, "sample row d_vocab"]]


def chain_gradients(
    cache: SharedCache,
    begin: Int[Tensor, " chain"],
    end: Int[Tensor, " chain"],
    layers: Sequence[int],
    cotangents: Cotangents,
    *,
    samples: int,
    memory: int = 2**30,
) -> Float[Tensor, "sample chain layer d_model"]:
    """Σ_s ∂M/∂h_s at resid_post of each layer, s over the rows [begin, end) of a chain, for each scalar M.

    A scalar M is given by its cotangent, summed over the rows of the chain. The graph holds the rows only, from the
    lowest requested layer upward. All samples share one backward pass.

    Args:
        cache: Of the sequence.
        begin: First position of each chain.
        end: One past the last.
        layers: On the third axis of the result.
        cotangents: Of the scalars, from the logits.
        samples: How many scalars there are.
        memory: Bytes that the rows of one forward and their graph may take, roughly.

    Raises:
        LensteerError: The model's attention cannot share a cache between rows, or a gradient is not finite.
    """
    device, lowest = cache.ids.device, min(layers)
    n_layers, width = len(layers), int(cache.model.cfg.d_model)
    out = torch.zeros(n_layers, samples, len(begin), width, device=device)
    graph_layers = int(cache.model.cfg.n_layers) - lowest
    limit = rows_per_forward(cache.model, len(cache.ids), memory, samples=samples, graph_layers=graph_layers)
    resids: dict[int, Tensor] = {}

    def keep(layer: int, resid: Tensor) -> Tensor:
        resids[layer] = resid.detach().requires_grad_() if layer == lowest else resid
        return resids[layer]

    with cache.hooked(sorted(set(layers)), keep):
        for first, last in _chunks((end - begin).tolist(), limit):
            rows = Rows.of(begin[first:last], end[first:last])
            with torch.enable_grad():
                logits = cache.run(rows)
            cache.check(rows.position, logits)
            cotangent = cotangents(logits.detach(), rows.position.to(device)).to(logits)
            gradients = torch.autograd.grad(logits, [resids[i] for i in layers], cotangent, is_grads_batched=True)
            resids.clear()
            del logits, cotangent
            for i, gradient in enumerate(gradients):
                out[i, :, first:last].index_add_(1, rows.chain.to(device), gradient[:, 0].float())
    if not out.isfinite().all():
        raise LensteerError("a gradient is not finite: load the model in a dtype of wider range")
    return out.permute(1, 2, 0, 3)


def _chunks(lengths: list[int], limit: int) -> list[tuple[int, int]]:
    """Cut chains into runs of at most `limit` rows (or one chain)."""
    cuts, rows = [0], 0
    for i, length in enumerate(lengths):
        if rows + length > limit and i > cuts[-1]:
            cuts.append(i)
            rows = 0
        rows += length
    return list(zip(cuts, [*cuts[1:], len(lengths)], strict=True))


def sampled_scores(uniforms: Float[Tensor, "pos sample"]) -> Cotangents:
    """∂ log p(y)/∂z = onehot(y) − p, for tokens y drawn from p at every row.

    E[(u·∇ log p(y))²] = Var_p(J u): the Fisher information in direction u. A token is drawn by inverse transform
    sampling from the row's own uniform number, so that draws do not depend on chunks or other rows.

    Args:
        uniforms: One number in [0, 1) per position of the sequence and sample.
    """

    def cotangents(logits: Tensor, position: Tensor) -> Tensor:
        p = logits.double().softmax(-1)
        cumulative = p.cumsum(-1)
        wanted = uniforms.to(p)[position] * cumulative[:, -1:]
        drawn = torch.searchsorted(cumulative, wanted, right=True).clamp_max(p.shape[1] - 1).T[..., None]
        minus_p = p.neg_().float().expand(len(drawn), -1, -1)
        return minus_p.scatter_add(2, drawn, torch.ones_like(drawn, dtype=minus_p.dtype))

    return cotangents


def stratified_uniforms(n_positions: int, samples: int, generator: torch.Generator) -> Float[Tensor, "pos sample"]:
    """Uniform numbers, stratified: one in each of `samples` equal parts of [0, 1) at every position, in random order.

    Each number is marginally uniform, and those of two positions are independent, which suffices for an unbiased
    estimate; stratification within a row reduces its variance.
    """
    order = torch.rand(n_positions, samples, generator=generator, dtype=torch.float64).argsort(1)
    within = torch.rand(n_positions, samples, generator=generator, dtype=torch.float64)
    return (order + within) / samples


def behavior_odds(logits: Float[Tensor, "row d_vocab"], share: Float[Tensor, "behavior d_vocab"]) -> Tensor:
    """M_b = logit of q_b = Σ_v p(v)·share_b(v), the log-odds that a sentence of b begins, `[row behavior]`."""
    q = logits.double().softmax(-1) @ share.to(logits.device).double().T
    return q.logit()


def behavior_odds_cotangents(share: Float[Tensor, "behavior d_vocab"]) -> Cotangents:
    """∂M_b/∂z_v = p(v)·(share_b(v) − q_b) / (q_b·(1 − q_b)), a sample for each behavior; see `behavior_odds`."""

    def cotangents(logits: Tensor, position: Tensor) -> Tensor:
        p, weight = logits.double().softmax(-1), share.to(logits.device).double()
        q = (p @ weight.T).T[..., None]
        return p * (weight[:, None] - q) / (q * (1 - q))

    return cotangents


def published_cotangents(logits: Float[Tensor, "row d_vocab"], position: Int[Tensor, " row"]) -> Tensor:
    """∂/∂z = (1/V)·(p·Σ_v log p_v − log p), what the code of arXiv 2506.18167 differentiates, as one sample.

    It is neither a KL nor an approximation of one: it is the gradient of `kl_div(log_softmax(z),
    log_softmax(z).detach())` with the target interpreted as probabilities, which measures how the peakedness of p
    changes. The value of that call is NaN. With `log_target=True` it would be KL(p‖p), whose gradient is 0.
    """
    log_p = logits.double().log_softmax(-1)
    return ((log_p.exp() * log_p.sum(-1, keepdim=True) - log_p) / log_p.shape[-1])[None]

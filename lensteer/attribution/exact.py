"""Scores of chains that are really run with something added: the exact KL, and its curvature by forward-mode AD."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack

import torch
import torch.autograd.forward_ad as forward_ad
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lensteer.attribution.rows import Rows, SharedCache, row_edits, rows_per_forward
from lensteer.errors import LensteerError
from lensteer.metrics import kl_divergence

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

    p_t comes from an unedited chain in the same forward as the edited ones, so that both are rounded alike.

    Args:
        cache: Of the sequence.
        begin: First position of each case.
        end: One past the last.
        added: What is added, strength included.
        vector: Which of the vectors each case adds.
        layers: The layers on the third axis of `added`.
        wanted: The vectors and layers to run; the others' values are NaN.
        memory: Bytes that the rows of one forward may take, roughly.

    Raises:
        LensteerError: The model's attention cannot share a cache between rows, or a KL is not finite.
    """
    with torch.no_grad():
        kl = _run(cache, begin, end, added, vector, layers, wanted, kl_divergence, memory)
    if not kl[:, wanted[vector]].isfinite().all():  # which layer did it cannot be said: rows share sums of attention
        raise LensteerError("a KL is not finite: what was added is so long that activations overflow")
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
    """½ Σ_t Var_{p_t}(J_t u), the KL's second order in the strength of u = `added`, without sampling noise.

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
            memory // 2,  # tangents take as much again
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
    """Run every wanted (coefficient, case, layer) as a chain of its own and sum `measure` over its positions."""
    # Chains over the same positions stand side by side, so that few unedited ones are run twice.
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

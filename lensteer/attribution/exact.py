"""The exact score: KL(p ‖ p with α·u added at one layer, at one onset), by really running it.

Knows nothing of spans and behaviors: it gets positions, and one stack of vectors per case.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.attribution.rows import SharedCache, row_edits
from lensteer.errors import LensteerError
from lensteer.metrics import kl_divergence

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: More rows in a forward waste time on masked scores between rows, fewer on its overhead.
MAX_ROWS = 256

#: An unedited row off by more than this share of the logits' spread is not rounding but another computation.
TOLERATED = {torch.float32: 1e-2, torch.float64: 1e-6}
TOLERATED_IN_HALF = 0.5


@dataclass(frozen=True)
class ExactCells:
    """What `exact_cells` measured on one sequence.

    Attributes:
        kl: Nats, for each case and layer.
        noise_floor: Largest KL between the filling forward and an unedited row: what rounding alone makes.
        logit_error: Largest difference of their logits, as a share of the logits' standard deviation.
        n_forwards: Forward passes run, the filling one included.
        n_rows: Rows run, the unedited ones included.
    """

    kl: Float[Tensor, "case layer"]
    noise_floor: float
    logit_error: float
    n_forwards: int
    n_rows: int


def rows_per_forward(model: TransformerBridge, length: int, memory: int) -> int:
    """How many rows fit into `memory` bytes beside a cache of `length` positions, at most `MAX_ROWS`.

    Counted per row: logits once in the model's dtype and five times in fp64 (the KL), three copies of the
    scores of all heads in fp32, three of the MLP's hidden layer.
    """
    cfg = model.cfg
    fixed = 44 * int(cfg.d_vocab) + 12 * int(cfg.d_mlp or 4 * cfg.d_model)
    per_key = 12 * int(cfg.n_heads)
    rows = MAX_ROWS
    while rows > 1 and rows * (fixed + per_key * (length + rows)) > memory:
        rows //= 2
    return rows


def exact_cells(
    model: TransformerBridge,
    ids: Sequence[int],
    onsets: Int[Tensor, " case"],
    vectors: Int[Tensor, " case"],
    added: Float[Tensor, "vector layer d_model"],
    layers: Sequence[int],
    *,
    memory: int = 2**30,
) -> ExactCells:
    """KL(p ‖ p_{v,l}) in nats, for each case (an onset and a vector) at each layer.

    p is the next-token distribution at the onset and p_{v,l} the same with `added[v, l]` added to resid_post
    of layer l at the onset only. p comes from an unedited row in the same forward as the edited ones.

    Args:
        model: The model.
        ids: Tokens of one sequence, from position 0, without padding.
        onsets: Absolute position of each case.
        vectors: Which of `added` each case adds.
        added: What is added, strength included.
        layers: The layers on the second axis of `added`.
        memory: Bytes that the rows of one forward may take, roughly.

    Raises:
        LensteerError: The model's attention cannot share a cache between rows, or a KL is not finite.
    """
    places = onsets.unique()
    cache = SharedCache(model, ids, places)
    device = cache.ids.device
    # Cases of one onset side by side, so that few unedited rows are run twice; layer varies fastest.
    order = onsets.argsort(stable=True)
    n_layers = len(layers)
    case = order.repeat_interleave(n_layers)
    layer = torch.arange(n_layers).repeat(len(order))
    kl = torch.empty(len(onsets), n_layers, dtype=torch.float64)
    added = added.to(device)
    spread = float(cache.logits.float().std())
    noise, error, n_forwards, n_rows = 0.0, 0.0, 1, 0
    step = rows_per_forward(model, len(cache.ids), memory)
    with row_edits(model, layers) as edits:
        for start in range(0, len(case), step):
            cases, at = case[start : start + step], layer[start : start + step]
            plain, plain_row = onsets[cases].unique(return_inverse=True)
            edits.clear()
            for i in at.unique().tolist():
                rows = (at == i).nonzero()[:, 0]
                edits[layers[i]] = ((rows + len(plain)).to(device), added[vectors[cases[rows]], i])
            logits = cache.run(torch.cat([plain, onsets[cases]]))
            unedited, edited = logits[: len(plain)], logits[len(plain) :]
            kl[cases, at] = kl_divergence(unedited[plain_row.to(device)], edited).cpu()
            full = cache.logits[torch.searchsorted(places, plain).to(device)]
            noise = max(noise, float(kl_divergence(full, unedited).max()))
            error = max(error, float((full - unedited).abs().max()) / spread)
            n_forwards, n_rows = n_forwards + 1, n_rows + len(logits)
    if not error <= TOLERATED.get(cache.logits.dtype, TOLERATED_IN_HALF):
        raise LensteerError(
            f"rows over a shared cache miss this model's own logits by {error:.2g} of their spread: its "
            "attention does not take a 4-D mask and explicit positions as they are"
        )
    if not kl.isfinite().all():  # which layer did it cannot be said: rows share the sums of attention
        raise LensteerError("a KL is not finite: what was added is so long that activations overflow")
    return ExactCells(kl, noise, error, n_forwards, n_rows)

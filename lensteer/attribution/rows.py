"""Many what-ifs about one trace as query rows over one shared KV cache.

A column of a causal transformer sees only its own past. So the past is computed once, and any number of rows,
each standing at some position p with the token that stands there, run as extra queries of one forward: row i
sees the cache before p_i and itself, never another row. Knows nothing of behaviors, traces or scores.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: What the rows of a forward add to the residual stream: layer → (row numbers, what to add to each of them).
RowEdits = dict[int, tuple[Tensor, Tensor]]


@contextmanager
def row_edits(model: TransformerBridge, layers: Sequence[int]) -> Iterator[RowEdits]:
    """Hooks at resid_post of `layers` that add to single rows whatever the yielded dict holds at the moment.

    The hooks go on once for many forwards, because putting them on costs as much as a small forward, and are
    gone afterwards, whatever happens. An empty dict edits nothing.
    """
    edits: RowEdits = {}

    def hook_at(layer: int) -> Callable[..., Tensor | None]:
        def add(resid: Float[Tensor, "batch pos d_model"], hook: Any) -> Tensor | None:
            if layer not in edits:
                return None
            rows, added = edits[layer]
            return resid.index_add(1, rows, added[None].to(resid))  # a new tensor: in-place edits can be lost

        return add

    with model.hooks(fwd_hooks=[(models.resid_hook(layer), hook_at(layer)) for layer in layers]):
        yield edits


class SharedCache:
    """The KV cache of one token sequence, filled once without gradients, read by any number of rows.

    Attributes:
        ids: The tokens in the cache, from position 0.
        logits: Logits of the filling forward at the positions asked for: what unedited rows must reproduce.
    """

    def __init__(self, model: TransformerBridge, ids: Sequence[int], positions: Int[Tensor, " span"]) -> None:
        """Run the model over `ids`, up to the last of `positions`, and keep its cache.

        Args:
            model: The model.
            ids: One sequence, without padding.
            positions: Absolute positions whose logits are wanted.

        Raises:
            LensteerError: A layer does not keep every position in its cache, or logits are not finite.
        """
        self._model = model
        self.ids = torch.tensor(ids[: int(positions.max()) + 1], device=models.device(model))
        with torch.no_grad():
            logits, self._cache = model(
                self.ids[None],
                return_type="logits_and_cache",
                logits_to_keep=positions.to(self.ids.device),
            )
        self.logits: Float[Tensor, "span d_vocab"] = logits[0]
        if not self.logits.isfinite().all():
            raise LensteerError("the model's own logits are not finite here: load it in another dtype")
        for number, layer in enumerate(self._cache.layers):
            keys = getattr(layer, "keys", None)
            whole = isinstance(keys, Tensor) and keys.shape[-2] == len(self.ids)
            if getattr(layer, "is_sliding", False) or not whole:
                raise LensteerError(
                    f"layer {number} of this model keeps its past in a {type(layer).__name__}, which forgets "
                    "positions: rows can share only the cache of layers that attend to their whole past "
                    "(no sliding windows, no recurrent layers)"
                )

    def run(self, positions: Int[Tensor, " row"]) -> Float[Tensor, "row d_vocab"]:
        """Logits of rows that stand at `positions`. The cache is the same afterwards."""
        positions = positions.to(self.ids.device)
        n_rows, length = len(positions), len(self.ids)
        dtype = self._model.original_model.dtype
        past = torch.arange(length, device=positions.device) < positions[:, None]
        itself = torch.eye(n_rows, dtype=torch.bool, device=positions.device)
        # Additive, and finite: Hugging Face and the bridge add it to the scores as it is.
        mask = torch.zeros(n_rows, length + n_rows, dtype=dtype, device=positions.device)
        mask.masked_fill_(~torch.cat([past, itself], dim=1), torch.finfo(dtype).min)
        try:
            with torch.no_grad():
                logits: Tensor = self._model(
                    self.ids[positions][None],
                    past_key_values=self._cache,
                    position_ids=positions[None],
                    attention_mask=mask[None, None],
                )[0]
        finally:
            for layer in self._cache.layers:  # an error half-way leaves the rows in some layers only
                layer.keys, layer.values = layer.keys[..., :length, :], layer.values[..., :length, :]
        return logits

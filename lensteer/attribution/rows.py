"""Many edited versions of one trace as query rows over one shared KV cache.

In a causal transformer a position attends only to its past. So the past is computed once, and any number of rows, each
with a position and the token there, run as extra queries of one forward. Rows form chains: a row attends to the cache
before its chain begins and to the rows of its own chain up to itself, never to another chain.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer

from lensteer import models, twins
from lensteer.errors import LensteerError
from lensteer.forward import call
from lensteer.metrics import kl_divergence
from lensteer.steering import active_plans, attached, foreign_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

#: What the rows of a forward add to the residual stream: layer → (row numbers, what to add to each of them).
RowEdits = dict[int, tuple[Tensor, Tensor]]
#: Difference between two sets of logits, row by row.
Difference = Callable[[Tensor, Tensor], Tensor]

#: More rows in a forward waste time on masked scores between rows, fewer on its overhead.
MAX_ROWS = 256
#: Number of positions of a trace that are compared with the prefill: logits of all would fill the memory.
CHECKED = 32
#: An unedited row off by more than this share of the logits' spread is not rounding but a different computation.
TOLERATED = {torch.float32: 1e-2, torch.float64: 1e-6}
TOLERATED_IN_HALF = 0.5


_takes_rows: weakref.WeakSet[nn.Module] = weakref.WeakSet()

#: What can be done on a model that cannot be attributed this way.
INSTEAD = "compare layers by forced_effect of plans, or by embedding_overlap"


@dataclass(frozen=True, eq=False)
class Rows:
    """Query rows, chain after chain.

    Attributes:
        position: Of each row.
        chain: Which chain it belongs to, counted from 0.
    """

    position: Int[Tensor, " row"]
    chain: Int[Tensor, " row"]

    @staticmethod
    def of(begin: Int[Tensor, " chain"], end: Int[Tensor, " chain"]) -> Rows:
        """One chain of rows for each half-open range of positions."""
        lengths = end - begin
        chain = torch.arange(len(begin)).repeat_interleave(lengths)
        within = torch.arange(len(chain)) - (lengths.cumsum(0) - lengths)[chain]
        return Rows(begin[chain] + within, chain)


def rows_per_forward(
    model: TransformerBridge, length: int, memory: int, *, samples: int = 0, graph_layers: int = 0
) -> int:
    """How many rows fit into `memory` bytes with a cache of `length` positions, at most `MAX_ROWS`.

    Counted per row without gradients: logits once in the model's dtype and five times in fp64 (the KL), three
    copies of the scores of all heads in fp32, three of the MLP's hidden layer. With gradients: the logits, four
    copies of their probabilities in fp32 and a cotangent of each sample twice; all that the backward pass needs of
    `graph_layers` layers; a gradient of each sample and layer twice.
    """
    cfg = model.cfg
    hidden, width, heads = int(cfg.d_mlp or 4 * cfg.d_model), int(cfg.d_model), int(cfg.n_heads)
    per_layer = 12 * hidden
    fixed = 44 * int(cfg.d_vocab) + per_layer
    if samples:
        fixed = (20 + 8 * samples) * int(cfg.d_vocab) + graph_layers * (per_layer + 48 * width + 8 * samples * width)
    per_key = 12 * heads * max(graph_layers, 1)
    rows = MAX_ROWS
    while rows > 1 and rows * (fixed + per_key * (length + rows)) > memory:
        rows //= 2
    return rows


@contextmanager
def row_edits(cache: SharedCache, layers: Sequence[int]) -> Iterator[RowEdits]:
    """Hooks at resid_post of `layers` that add the current content of the yielded dict to single rows.

    The hooks are registered once for many forwards, because that costs as much as a small forward, and are always
    removed afterward. An empty dict edits nothing.
    """
    edits: RowEdits = {}

    def add(layer: int, resid: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
        if layer not in edits:
            return resid
        rows, added = edits[layer]
        return resid.index_add(1, rows, added[None].to(resid))  # a new tensor: in-place edits can be lost

    with cache.hooked(layers, add):
        yield edits


class SharedCache:
    """The KV cache of one token sequence, filled once without gradients, read by any number of rows.

    It keeps every position at every layer, also in layers with sliding-window attention: there the rows' mask is
    narrowed to the window. Prefill and rows run on the plain twin of the model if there is one (`twins.plain_twin`),
    but on the bridge if it has other hooks and in half precision, where the bridge's attention rounds rows and whole
    texts alike and the fused kernels do not (bfloat16 organism, onsets: noise floor 0 compared with 1e-4 nats).

    Attributes:
        ids: The tokens in the cache, from position 0.
        noise_floor: Largest difference so far between the prefill and unedited rows: the effect of rounding alone.
        n_forwards: Forward passes so far, including the prefill.
        n_rows: Rows run so far, including unedited ones.
    """

    def __init__(
        self,
        model: TransformerBridge,
        ids: Sequence[int],
        positions: Int[Tensor, " position"],
        *,
        difference: Difference = kl_divergence,
    ) -> None:
        """Run the model over `ids`, up to the last of `positions`, and keep its cache.

        Args:
            model: The model.
            ids: One sequence, without padding.
            positions: Absolute positions of the rows.
            difference: The measure of the noise floor.

        Raises:
            LensteerError: A layer that keeps its past in another way, a steering plan that is on, a text longer than
                the model's positions, or logits that are not finite.
        """
        if active_plans(model):
            raise LensteerError(
                "a steering plan is on: rows are not at the positions that the plan edits; "
                "leave `with plan.on(model)` before attributing"
            )
        models.check_rows(model, [ids], cached=True)
        self.model, self._difference = model, difference
        self._windows = _windows(model)
        fused = model.original_model.dtype in TOLERATED and not foreign_hooks(model)
        self._runner: nn.Module = (twins.plain_twin(model) if fused else None) or model
        self.ids = torch.tensor(ids[: int(positions.max()) + 1], device=models.device(model))
        self._cache = DynamicCache()
        self._cache.layers = [_Shared() for _ in self._windows]
        self.noise_floor, self.n_forwards, self.n_rows = 0.0, 1, 0
        places = positions.unique()
        self._places = places[torch.linspace(0, len(places) - 1, min(CHECKED, len(places))).round().long()]
        with torch.no_grad():
            self.logits: Float[Tensor, "place d_vocab"] = self._forward(
                self.ids, logits_to_keep=self._places.to(self.ids.device)
            )
        if not self.logits.isfinite().all():
            raise LensteerError("the model's own logits are not finite here: load it in another dtype")
        self._spread = float(self.logits.float().std())
        for number, layer in enumerate(self._cache.layers):
            if not layer.is_initialized or layer.keys.shape[-2] != len(self.ids):
                raise LensteerError(f"layer {number} of this model does not keep its past in the cache it was given")
        self._check_mask()

    def hooked(self, layers: Sequence[int], edit: Callable[[int, Tensor], Tensor]) -> AbstractContextManager[None]:
        """Hook `edit(layer, resid)` at resid_post of `layers` into whatever runs the rows."""
        return attached(self.model, self._runner, layers, edit)

    def run(self, rows: Rows) -> Float[Tensor, "row d_vocab"]:
        """Logits of rows. Gradient mode is the caller's. The cache is unchanged."""
        position, chain = rows.position.to(self.ids.device), rows.chain.to(self.ids.device)
        begin = position.new_full((int(chain.max()) + 1,), len(self.ids))
        begin.scatter_reduce_(0, chain, position, "amin")
        column = torch.arange(len(self.ids), device=position.device)
        past = column < begin[chain, None]
        kin = (chain == chain[:, None]) & (position <= position[:, None])
        seen = torch.cat([past, kin], dim=1)
        distance = position[:, None] - torch.cat([column, position])
        masks = {
            kind: self._mask(seen if window is None else seen & (distance < window))
            for kind, window in dict(self._windows).items()
        }
        self.n_forwards, self.n_rows = self.n_forwards + 1, self.n_rows + len(position)
        return self._forward(
            self.ids[position],
            position_ids=position[None],
            # Models whose layers differ take one mask for each type of layer, the others a single one.
            attention_mask=masks if len(masks) > 1 else next(iter(masks.values())),
        )

    def check(self, position: Int[Tensor, " row"], logits: Float[Tensor, "row d_vocab"]) -> None:
        """Compare the logits of unedited rows with those of the prefill, and record the noise.

        Raises:
            LensteerError: They are not finite, or differ by more than rounding.
        """
        known = torch.isin(position, self._places)
        if not known.any():
            return
        mine = logits.detach()[known.to(logits.device)]
        full = self.logits[torch.searchsorted(self._places, position[known]).to(logits.device)]
        if not mine.isfinite().all():
            raise LensteerError("the logits of an unedited row are not finite: a vector added to other rows overflows")
        error = float((full - mine).abs().max()) / self._spread
        if error > TOLERATED.get(logits.dtype, TOLERATED_IN_HALF):
            raise LensteerError(
                f"rows over a shared cache differ from this model's logits by {error:.2g} of their spread: its "
                f"attention does not take a 4-D mask and explicit positions as they are; {INSTEAD}"
            )
        self.noise_floor = max(self.noise_floor, float(self._difference(full, mine).max()))

    def _mask(self, seen: Tensor) -> Tensor:
        dtype = self.model.original_model.dtype
        # Additive, and finite: Hugging Face and the bridge add it to the scores as it is.
        mask = torch.zeros(seen.shape, dtype=dtype, device=seen.device)
        return mask.masked_fill_(~seen, torch.finfo(dtype).min)[None, None]

    def _forward(self, ids: Int[Tensor, " pos"], **options: Any) -> Float[Tensor, "kept d_vocab"]:
        options |= dict(past_key_values=self._cache, use_cache=True)
        return call(self.model, self._runner, None, ids[None], **options)[0]

    def _check_mask(self) -> None:
        """Run one row, once for each runner, with nothing else on it: does its attention take a mask between rows?

        Raises:
            LensteerError: It does not.
        """
        if self._runner in _takes_rows:
            return
        row, counts = torch.zeros(1, dtype=torch.long), (self.n_forwards, self.n_rows)
        try:
            with torch.no_grad(), twins.unhooked(self.model):
                self.run(Rows(row, row))
        except (ValueError, TypeError, IndexError, RuntimeError) as error:
            if models.out_of_memory(error):
                raise
            raise LensteerError(
                f"the attention of {models.fingerprint(self.model).name!r} does not take a mask between single rows "
                f"({type(error).__name__}: {str(error).splitlines()[0][:120]}); {INSTEAD}"
            ) from error
        self.n_forwards, self.n_rows = counts
        _takes_rows.add(self._runner)


class _Shared(DynamicLayer):
    """A cache layer that the first forward fills and all others read: they append to a copy."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Keys and values with the new ones appended."""
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
            self.keys, self.values = key_states, value_states
            return key_states, value_states
        return torch.cat([self.keys, key_states], dim=-2), torch.cat([self.values, value_states], dim=-2)


def _windows(model: TransformerBridge) -> list[tuple[str, int | None]]:
    """For each layer the type of its attention and how many positions it sees (None: all)."""
    config = model.original_model.config.get_text_config(decoder=True)
    layers = DynamicCache(config=config).layers
    chunked = getattr(config, "sliding_window", None) is None
    types = getattr(config, "layer_types", None) or [
        ("chunked_attention" if chunked else "sliding_attention") if layer.is_sliding else "full_attention"
        for layer in layers
    ]
    for number, (kind, layer) in enumerate(zip(types, layers, strict=True)):
        if kind not in ("full_attention", "sliding_attention") or not isinstance(layer, DynamicLayer):
            raise LensteerError(
                f"layer {number} of this model has {kind!r} and keeps its past in a {type(layer).__name__}: rows can "
                "share only the cache of full or sliding-window attention (no recurrent, chunked or shared ones); "
                f"{INSTEAD}"
            )
    if len(layers) != models.n_layers(model):
        raise LensteerError(
            f"this model keeps the past of {len(layers)} layers for {models.n_layers(model)} blocks: rows can "
            f"share a cache only if each block has its own; {INSTEAD}"
        )
    return [(kind, getattr(layer, "sliding_window", None)) for kind, layer in zip(types, layers, strict=True)]

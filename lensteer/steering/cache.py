"""One-shot edits of the KV cache: the vector (`CacheVector`), where and how much (`CachePlan`), and the edit itself.

k <- k + c_keys * R(p) S_k,   v <- v + c_values * S_v   at slot p, once, with R(p) the rotation to the slot's position.

Under the unit "norm", S_k and S_v are first made as long, over all layers together, as the keys and values of the slot.

The order matters: prefill through p, edit, then at least one more prompt token before the first token is drawn.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.arguments import typed
from lensteer.caches import latent, recurrent_layers, single_token
from lensteer.errors import LensteerError
from lensteer.files import read_tensors, write_tensors
from lensteer.results import Result, check_arrays, reading, revived
from lensteer.rotary import rotated, turning
from lensteer.steering.plans import Joinable, Slot, SteeringPlan, check_unit

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

POSITIONS: dict[str, int] = {"last_prompt": -2, "offset_token": -1}
"""Named positions, as indices from the prompt's end.

`last_prompt` is the second to last prompt token, because an edit reaches the first generated token only through a later
prompt token. `offset_token` is the last one; when the plan is used, `OFFSET` is appended after it.
"""

CACHE_UNITS = ("difference", "norm")
"""What coefficient 1 adds: the mean difference itself (as published), or one as long as what it is added to.

Mean differences are .15 of the values' length in SmolLM2-135M-Instruct and 1.07 in the organism (GSM8K's solutions, the
organism's chains; `analyses/LOG.md`, 2026-11-27), so coefficients of the second unit transfer between models.
"""

OFFSET = "\n"
"""The text that is appended to the prompt for position `offset_token`."""


@dataclass(frozen=True, eq=False, repr=False)
class CacheVector(Result):
    """Mean differences of keys and of values at one position, positive less negative.

    Attributes:
        label: What it represents.
        keys: Before rotation, without normalization.
        values: Without normalization.
        position: Where they were read: a name of `POSITIONS`, or an index of the prompt's tokens (negative: from its
            end).
        provenance: Model, number of pairs, and other facts on its origin: "norms" are the mean lengths, over all layers
            together, of the keys and values that were read.
        spread: Random combinations of the pairs' differences about their mean, keys and values, each as long as the
            vector at each layer: controls from the pairs' own covariance. None if the vector was not fitted on pairs.
    """

    label: str
    keys: Float[Tensor, "layer head d_head"]
    values: Float[Tensor, "layer head d_head"]
    position: int | str
    provenance: Mapping[str, Any] = field(default_factory=dict)
    spread: tuple[Float[Tensor, "draw layer head d_head"], Float[Tensor, "draw layer head d_head"]] | None = None

    def __post_init__(self) -> None:
        typed(self)
        check_arrays(self)
        check_position(self.position)
        for name, tensor in (("keys", self.keys), ("values", self.values)):
            if not torch.isfinite(tensor).all():
                layer = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
                raise LensteerError(f"{name} of {self.label!r} at layer {layer} are not finite")
        if not self.keys.any() and not self.values.any():
            raise LensteerError(f"cache vector {self.label!r} is zero everywhere: an edit with it would do nothing")

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return int(self.keys.shape[0])

    @property
    def layers(self) -> tuple[int, ...]:
        """Where it was read; it is zero elsewhere."""
        return tuple(self.provenance.get("layers") or range(self.n_layers))

    def scale(self, what: str, unit: str) -> float:
        """The factor that makes coefficient 1 of "keys" or "values" mean the unit.

        Raises:
            LensteerError: An unknown unit, or "norm" for a vector whose slots' lengths are not known.
        """
        if check_unit(unit, CACHE_UNITS) == "difference":
            return 1.0
        norms = self.provenance.get("norms")
        if norms is None:
            raise LensteerError(
                f"cache vector {self.label!r} does not record the lengths of the slot's keys and values, which unit "
                "'norm' needs: fit it again, or use unit='difference'"
            )
        length = float(getattr(self, what).double().norm())
        return float(norms[what]) / length if length else 0.0

    def random(self, seed: int) -> CacheVector:
        """A control: isotropic random keys and values with this vector's length at each layer."""
        generator = torch.Generator().manual_seed(seed)
        keys, values = (
            as_long(torch.randn(tensor.shape, generator=generator), tensor) for tensor in (self.keys, self.values)
        )
        return replace(self, label=f"random-{seed}", keys=keys, values=values, spread=None)

    def controls(self, n: int, seed: int = 0) -> list[CacheVector]:
        """Control vectors of this vector's length at each layer, from the pairs' covariance where it is known.

        Isotropic ones are too weak a control: at a few times the values' length they change nothing in a language model
        (Qwen2.5-Coder-0.5B), while some combinations of the pairs' differences do.

        Args:
            n: How many.
            seed: Of isotropic ones; the others were drawn when the vector was fitted.

        Raises:
            LensteerError: More than were drawn.
        """
        if self.spread is None:
            return [self.random(seed + i) for i in range(n)]
        if n > len(self.spread[0]):
            raise LensteerError(
                f"{n} control vectors: cache vector {self.label!r} has {len(self.spread[0])} from its pairs; ask for "
                "at most that, or use .random(seed) for isotropic ones"
            )
        return [
            replace(self, label=f"spread-{i}", keys=keys, values=values, spread=None)
            for i, (keys, values) in enumerate(zip(*self.spread, strict=True))
        ][:n]

    def check_model(self, model: TransformerBridge) -> None:
        """Make sure that the vector belongs to a model.

        Raises:
            LensteerError: It was fitted on another model.
        """
        found = models.fingerprint(model)
        if "model" in self.provenance and found.differences(self.provenance["model"]):
            raise LensteerError(
                f"cache vector {self.label!r} was fitted on {self.provenance['model']['name']!r}, which differs from "
                f"{found.name!r} in {found.differences(self.provenance['model'])}: fit it on this model"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; names and provenance are in its metadata.

        Raises:
            LensteerError: The file cannot be written.
        """
        facts = {"label": self.label, "position": self.position, "provenance": dict(self.provenance)}
        tensors = {"keys": self.keys, "values": self.values}
        if self.spread is not None:
            tensors |= {"spread_keys": self.spread[0], "spread_values": self.spread[1]}
        write_tensors(path, tensors, facts, "cache_vector", "cache vector")

    @staticmethod
    def load(path: str | Path, model: TransformerBridge | None = None) -> CacheVector:
        """Read a vector, checked against a model if one is given.

        Raises:
            LensteerError: No such file, another kind of file, or another model's vector.
        """
        tensors, facts = read_tensors(path, "cache_vector", "cache vector")
        with reading(repr(str(path)), "save the cache vector again"):
            spread = (tensors["spread_keys"], tensors["spread_values"]) if "spread_keys" in tensors else None
            label, position = revived(str, facts["label"]), revived(int | str, facts["position"])
            provenance = revived(dict[str, Any], facts["provenance"])
            if "model" in provenance:
                revived(models.ModelId, provenance["model"])
            vector = CacheVector(label, tensors["keys"], tensors["values"], position, provenance, spread)
        if model is not None:
            vector.check_model(model)
        return vector


def as_long(
    tensors: Float[Tensor, "*draw layer head d_head"], as_these: Float[Tensor, "layer head d_head"]
) -> Float[Tensor, "*draw layer head d_head"]:
    """Tensors scaled, at each layer, to the length of others; zero where they are zero."""
    lengths = tensors.flatten(-2).norm(dim=-1)
    factors = as_these.float().flatten(1).norm(dim=1) / lengths.where(lengths > 0, 1)
    return tensors * factors[..., None, None]


def check_position(position: int | str) -> int | str:
    """The position itself, if it is one.

    Raises:
        LensteerError: It is an unknown name.
    """
    if isinstance(position, str) and position not in POSITIONS:
        raise LensteerError(f"no position {position!r}: choose one of {list(POSITIONS)}, or give an index")
    return position


def index_in(position: int | str, length: int) -> int:
    """The absolute index of a position in a prompt of `length` tokens.

    Raises:
        LensteerError: The prompt is too short for it.
    """
    at = POSITIONS[position] if isinstance(position, str) else position
    index = at + length if at < 0 else at
    if not 0 <= index < length:
        raise LensteerError(f"position {position!r} is outside a prompt of {length} tokens")
    return index


@dataclass(frozen=True)
class CachePlan(Joinable):
    """One edit of one cache slot. Used like a `SteeringPlan`, and joined with others by `+`.

    Attributes:
        vector: From `fit_cache_vector`.
        c_values: Coefficient of the values' difference; 1 to 10 in the published work.
        c_keys: Coefficient of the keys' difference; 0 was best nearly everywhere.
        position: The slot; None is where the vector was read. `offset_token` appends `OFFSET` to the prompt.
        layers: Which layers; None is those of the vector.
        unit: Of both coefficients: one of `CACHE_UNITS`.

    Raises:
        LensteerError: A coefficient that is not finite, an unknown position or unit, or a layer that the vector lacks.
    """

    vector: CacheVector
    c_values: float = 1.0
    c_keys: float = 0.0
    position: int | str | None = None
    layers: tuple[int, ...] | None = None
    unit: str = "difference"

    def __post_init__(self) -> None:
        typed(self)
        for name, value in (("c_values", self.c_values), ("c_keys", self.c_keys)):
            if not math.isfinite(value):
                raise LensteerError(f"{name}={value} is not finite: give a number such as 6.0")
        self.vector.scale("values", self.unit)
        if self.position is not None:
            check_position(self.position)
        for layer in self.layers or ():
            if not 0 <= layer < self.vector.n_layers:
                raise LensteerError(f"no layer {layer}: this cache vector has layers 0 to {self.vector.n_layers - 1}")

    @property
    def edits(self) -> tuple[SteeringPlan, ...]:  # type: ignore[override]  # no residual is edited
        """None."""
        return ()

    @property
    def slots(self) -> tuple[Slot, ...]:  # type: ignore[override]  # a plan is its own only edit
        """This edit alone; nothing if both coefficients are 0, so that the run equals the unsteered one bit for bit."""
        return (self,) if self.c_values or self.c_keys else ()

    @property
    def where(self) -> int | str:
        """The slot: as given, or where the vector was read."""
        return self.vector.position if self.position is None else self.position

    @property
    def prefill(self) -> str:
        """The offset token's text if the slot needs one; the unsteered condition should get it, too."""
        return OFFSET if self.where == "offset_token" else ""

    def describe(self) -> list[Any]:
        """All that the edit depends on, as JSON-ready values."""
        tensors = [t.double().tolist() for t in (self.vector.keys, self.vector.values)]
        return [*tensors, *(self.factor(name) for name in ("values", "keys")), self.where, self.layers]

    def factor(self, what: str) -> float:
        """What the vector's "keys" or "values" are multiplied with: coefficient times unit."""
        coefficient = float(getattr(self, f"c_{what}"))
        return coefficient * self.vector.scale(what, self.unit) if coefficient else 0.0

    def slot(self, length: int) -> int:
        """The index of the edited slot in a prompt of `length` tokens (including an offset token).

        Raises:
            LensteerError: The prompt is too short, or no prompt token follows the slot.
        """
        index = index_in("last_prompt" if self.where == "offset_token" else self.where, length)
        if index + 1 >= length:
            raise LensteerError(
                f"position {self.where!r} is the prompt's last token: an edit there comes too late for the first "
                "generated token; use 'last_prompt', or 'offset_token', which appends one"
            )
        return index


def check_plan(model: TransformerBridge, plan: CachePlan) -> None:
    """Raise if the plan cannot be applied to this model.

    Raises:
        LensteerError: A vector of another shape or model, or layers whose cache drops the slot.
    """
    n_layers, vector = models.n_layers(model), plan.vector
    layers = vector.layers if plan.layers is None else plan.layers
    if vector.n_layers == n_layers:
        check_attention(model, layers)
    heads = {int(single_token(model, 0)[layer][1].shape[1]) for layer in layers if layer < n_layers}
    if vector.n_layers != n_layers or heads - {int(vector.values.shape[1])}:
        raise LensteerError(
            f"cache vector {vector.label!r} has {vector.n_layers} layers of {vector.values.shape[1]} key-value heads, "
            f"this model {n_layers} of {', '.join(map(str, sorted(heads)))}: fit it on this model"
        )
    vector.check_model(model)
    if plan.c_keys and any(turning(model, layer) is None for layer in layers):
        raise LensteerError(
            f"{models.fingerprint(model).name!r} turns its keys in a way that is not known: they cannot be edited; "
            "edit values only (c_keys=0)"
        )


def edit_cache(
    model: TransformerBridge,
    cache: Any,
    rows: Sequence[int],
    columns: Sequence[int],
    positions: Sequence[int],
    plans: Sequence[CachePlan],
) -> None:
    """Edit one slot in some rows of a Hugging Face cache, in place; nothing else in it changes.

    Args:
        model: The bridge.
        cache: A `DynamicCache` that is filled at least through the slots.
        rows: Of the batch, one per plan.
        columns: Of the cache: the slot, including padding.
        positions: Of the slot in its row, without padding: the position for rotating its key.
        plans: What to add; none of their values may be shared with an unsteered run's cache.

    Raises:
        LensteerError: A cache that is not plain tensors (a quantized or static one).
    """
    where, row, column = models.device(model), list(rows), list(columns)
    factors = {name: torch.tensor([p.factor(name) for p in plans], device=where) for name in ("keys", "values")}
    turn = torch.tensor(positions, device=where)[:, None]
    for layer, store in enumerate(cache.layers):
        if not any(layer in (plan.vector.layers if plan.layers is None else plan.layers) for plan in plans):
            continue
        if not isinstance(getattr(store, "keys", None), Tensor) or "Quantized" in type(store).__name__:
            raise LensteerError(f"a cache of {type(store).__name__} cannot be edited: use a DynamicCache")
        active = torch.tensor([plan.layers is None or layer in plan.layers for plan in plans], device=where)

        def added(name: str, layer: int = layer, active: Tensor = active, like: Tensor = store.keys) -> Tensor:
            coefficient = factors[name] * active
            table = torch.stack([getattr(p.vector, name)[layer] for p in plans]).to(where, torch.float32)
            return (coefficient[:, None, None] * table).to(like.dtype)

        store.values[row, :, column] += added("values")
        if any(plan.c_keys for plan in plans):
            store.keys[row, :, column] += rotated(model, added("keys")[:, :, None], turn, layer=layer)[:, :, 0]


def check_attention(model: TransformerBridge, layers: Sequence[int]) -> None:
    """Raise for layers whose slots do not stay in the cache.

    Raises:
        LensteerError: One of the layers attends to a sliding window.
    """
    config = model.original_model.config
    types = list(getattr(config, "layer_types", None) or ())
    if states := recurrent_layers(model):
        raise LensteerError(
            f"layers {list(states)} of {models.fingerprint(model).name!r} keep a state instead of keys and values, "
            "which has no slot to edit: edit the residual stream, by a SteeringPlan"
        )
    if latent(model):
        raise LensteerError(
            f"{models.fingerprint(model).name!r} keeps a latent that its keys and values are made of, not the keys and "
            "values themselves: edit the residual stream, by a SteeringPlan"
        )
    for layer in layers:
        kind = types[models.check_layer(model, layer)] if types else "full_attention"
        if kind != "full_attention":
            raise LensteerError(
                f"layer {layer} of {models.fingerprint(model).name!r} is {kind!r}: its cache drops the edited slot; "
                f"fit it with layers={[i for i, t in enumerate(types) if t == 'full_attention']}"
            )

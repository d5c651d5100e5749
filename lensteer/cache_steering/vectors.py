"""`CacheVector`: what is added to keys and values of one slot, at every layer. Knows nothing of how it was fitted."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from lensteer import models
from lensteer._version import __version__
from lensteer.errors import LensteerError
from lensteer.files import write_atomically

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

POSITIONS: dict[str, int] = {"last_prompt": -2, "offset_token": -1}
"""Named positions and where they are read, counted from the prompt's end.

`last_prompt` is the last prompt token that another one follows, because an edit reaches the first generated token only
through a prompt token that is processed after it. `offset_token` is the very last; at use `OFFSET` is put behind it.
"""

OFFSET = "\n"
"""What is put behind the prompt where the position is `offset_token`."""


@dataclass(frozen=True, eq=False)
class CacheVector:
    """Mean difference of keys and of values at one position, positive less negative.

    Attributes:
        label: What it stands for.
        keys: Before rotation, as they were read (no normalization).
        values: As they were read.
        position: Where: a name of `POSITIONS`, or an index of the prompt's tokens (negative: from its end).
        provenance: Model, number of pairs, and what else it came from.
    """

    label: str
    keys: Float[Tensor, "layer head d_head"]
    values: Float[Tensor, "layer head d_head"]
    position: int | str
    provenance: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_position(self.position)
        for name, tensor in (("keys", self.keys), ("values", self.values)):
            if not torch.isfinite(tensor).all():
                layer = int((~torch.isfinite(tensor)).flatten(1).any(1).nonzero()[0])
                raise LensteerError(f"{name} of {self.label!r} at layer {layer} are not finite")

    @property
    def n_layers(self) -> int:
        """Number of layers."""
        return int(self.keys.shape[0])

    def random(self, seed: int) -> CacheVector:
        """A control: isotropic random keys and values, at each layer as long as this vector's."""
        generator = torch.Generator().manual_seed(seed)

        def like(tensor: Tensor) -> Tensor:
            draw = torch.randn(tensor.shape, generator=generator)
            return draw * (tensor.float().flatten(1).norm(dim=1) / draw.flatten(1).norm(dim=1))[:, None, None]

        return replace(self, label=f"random-{seed}", keys=like(self.keys), values=like(self.values))

    def check_model(self, model: TransformerBridge) -> None:
        """Make sure that the vector belongs to a model.

        Raises:
            LensteerError: It was fitted on another one.
        """
        found = models.fingerprint(model)
        if "model" in self.provenance and found.differences(self.provenance["model"]):
            raise LensteerError(
                f"cache vector {self.label!r} was fitted on {self.provenance['model']['name']!r}, which differs from "
                f"{found.name!r} in {found.differences(self.provenance['model'])}: fit it on this model"
            )

    def save(self, path: str | Path) -> None:
        """Write one safetensors file; names and provenance are in its metadata."""
        facts = {"label": self.label, "position": self.position, "provenance": dict(self.provenance)}
        tensors = {"keys": self.keys.contiguous(), "values": self.values.contiguous()}
        write_atomically(Path(path), save(tensors, {"lensteer": __version__, "cache_vector": json.dumps(facts)}))

    @staticmethod
    def load(path: str | Path, model: TransformerBridge | None = None) -> CacheVector:
        """Read a vector, checked against a model if one is given.

        Raises:
            LensteerError: No such file, another kind of file, or another model's vector.
        """
        try:
            with safe_open(str(path), "pt") as file:
                facts = json.loads((file.metadata() or {})["cache_vector"])
                vector = CacheVector(keys=file.get_tensor("keys"), values=file.get_tensor("values"), **facts)
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise LensteerError(f"{str(path)!r} holds no cache vector ({error}): save one with its .save()") from error
        if model is not None:
            vector.check_model(model)
        return vector


def check_position(position: int | str) -> int | str:
    """The position itself, if it is one.

    Raises:
        LensteerError: It is an unknown name.
    """
    if isinstance(position, str) and position not in POSITIONS:
        raise LensteerError(f"no position {position!r}: choose one of {list(POSITIONS)}, or give an index")
    return position


def index_in(position: int | str, length: int) -> int:
    """The absolute index of a position in a prompt of so many tokens.

    Raises:
        LensteerError: The prompt is too short for it.
    """
    at = POSITIONS[position] if isinstance(position, str) else position
    index = at + length if at < 0 else at
    if not 0 <= index < length:
        raise LensteerError(f"position {position!r} is outside a prompt of {length} tokens")
    return index

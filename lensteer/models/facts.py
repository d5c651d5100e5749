"""What a loaded model is: its dimensions, its hook points, its fingerprint, its final norm.

Layer `l` is 0-based and means the residual stream at the output of block `l`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.files import digest
from lensteer.models.loading import ORGANISM

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase


def n_layers(model: TransformerBridge) -> int:
    """Number of blocks."""
    return int(model.cfg.n_layers)


def d_model(model: TransformerBridge) -> int:
    """Width of the residual stream."""
    return int(model.cfg.d_model)


def device(model: TransformerBridge) -> torch.device:
    """The device for the model's inputs."""
    return next(iter(model.parameters())).device


def check_layer(model: TransformerBridge, layer: int) -> int:
    """The layer itself, if the model has it.

    Raises:
        LensteerError: otherwise.
    """
    if not 0 <= layer < n_layers(model):
        raise LensteerError(f"no layer {layer}: this model has layers 0 to {n_layers(model) - 1}")
    return layer


SITES = ("resid_pre", "resid_mid", "resid_post")
"""Where a block's residual stream can be read: before it, between attention and MLP, at its output."""


def resid_hook(layer: int, site: str = "resid_post") -> str:
    """The hook point of the residual stream at a block.

    Raises:
        LensteerError: no such site.
    """
    if site not in SITES:
        raise LensteerError(f"no site {site!r}: choose one of {list(SITES)}")
    return f"blocks.{layer}.hook_{site}"


@dataclass(frozen=True)
class ModelId:
    """The identity of a model. Hashes are the first 16 hex digits of SHA-256.

    `weights` covers the final norm and the first embedding rows, rounded to bfloat16: enough to tell checkpoints apart,
    and the same for one checkpoint loaded in different dtypes.
    """

    name: str
    revision: str
    n_layers: int
    d_model: int
    weights: str
    tokenizer: str
    template: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields in which another identity differs, apart from name and revision (a folder may be moved)."""
        mine = asdict(self)
        return [k for k in mine if k not in ("name", "revision") and mine[k] != other.get(k)]


def fingerprint(model: TransformerBridge) -> ModelId:
    """The model's identity."""
    tokenizer, config = model.tokenizer, model.original_model.config
    parts = [final_norm_gain(model), model.W_E[:64]]
    raw = b"".join(p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes() for p in parts)
    return ModelId(
        name=_short_name(str(config._name_or_path or model.cfg.model_name)),
        revision=str(getattr(config, "_commit_hash", None) or ""),
        n_layers=n_layers(model),
        d_model=d_model(model),
        weights=digest(raw),
        tokenizer=_vocabulary_digest(tokenizer, len(tokenizer)),
        template=digest(str(tokenizer.chat_template or "").encode()),
    )


@lru_cache(maxsize=8)
def _vocabulary_digest(tokenizer: PreTrainedTokenizerBase, _size: int) -> str:
    """Digest of a tokenizer, cached because serializing a large one takes seconds; added tokens change its size."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return digest((backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))).encode())


def _short_name(name: str) -> str:
    if Path(name) == ORGANISM:
        return "organism"
    return Path(name).name if Path(name).exists() else name


def final_norm_gain(model: TransformerBridge) -> Tensor:
    """The final norm's gain as it multiplies the normalized residual, `[d_model]`.

    Measured: the norm is run on a vector and on its opposite, which takes a bias out. Some norms store the gain less
    one, and some have none. What is measured says which; the digits are those of the stored weight where there is one.

    Raises:
        LensteerError: What the norm does is no gain, such as a gate that depends on its input.
    """
    norm = getattr(model.ln_final, "original_component", None) or model.ln_final
    stored = getattr(norm, "weight", None)
    like = model.W_E if stored is None else stored
    probe = torch.linspace(0.5, 1.5, d_model(model))
    probe[1::2] *= -1
    probe = (1e3 * (probe - probe.mean())).to(device(model) if like.is_meta else like.device, like.dtype)
    normalized = probe.float() / probe.float().square().mean().sqrt()
    with torch.no_grad():
        both = norm(torch.stack([probe, -probe])[None])[0].float()
    measured = (both[0] - both[1]) / 2 / normalized
    near = 1e-4 if like.dtype in (torch.float32, torch.float64) else 2e-2
    exact = [torch.ones_like(measured)] if stored is None else [stored.detach(), stored.detach() + 1]
    for gain in exact:
        if not gain.is_meta and torch.allclose(gain.float(), measured, rtol=near, atol=near):
            return gain.to(like.dtype)
    if not measured.isfinite().all():
        raise LensteerError(f"the final norm of {model.cfg.model_name!r} gives numbers that are not finite")
    return measured.to(like.dtype)


def context_length(model: TransformerBridge) -> int | None:
    """The model's maximum context length in tokens; None if its configuration does not say."""
    config = model.original_model.config
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if longest is None else int(longest)

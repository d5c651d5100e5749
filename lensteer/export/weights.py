"""A model's weights by their Hugging Face names, one tensor at a time, and a checkpoint that is written from them.

They come from the checkpoint's own safetensors files where it has them, in the dtype that they are stored in; else from
the loaded model, whose memory they share. No second copy of the model is made.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.models.loading import TOWER

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

INDEX = "model.safetensors.index.json"


@dataclass(frozen=True)
class Weights:
    """The tensors of a checkpoint.

    Attributes:
        names: as Hugging Face has them; without those that are tied to others.
        get: reads one.
        folder: of the checkpoint's files; None if there is none.
    """

    names: frozenset[str]
    get: Callable[[str], Tensor]
    folder: Path | None

    @property
    def dtype(self) -> torch.dtype:
        """Of the matrices, which are most of it."""
        return next(tensor.dtype for name in sorted(self.names) if (tensor := self.get(name)).dim() > 1)


Make = Callable[[Weights], Tensor]
"""Makes one tensor of an export from those of the checkpoint."""


def weights_of(model: TransformerBridge) -> Weights:
    """A bridge's weights.

    Raises:
        LensteerError: they are quantized, TransformerLens has processed them, or they are not on one machine's devices.
    """
    original = model.original_model
    if getattr(model, "compatibility_mode", False):
        raise LensteerError("TransformerLens has processed this model's weights: load it by ls.load_model, as it is")
    if getattr(original, "hf_quantizer", None) is not None or getattr(original.config, "quantization_config", None):
        raise LensteerError(
            f"{original.config._name_or_path!r} is quantized, and an edit of its weights would be rounded away: export "
            "from the checkpoint that it was quantized from, and quantize the export"
        )
    names = names_of(original.config)
    folder = folder_of(model)
    if folder is not None:
        found = _on_disk(folder, names)
        if found is not None:
            return found
    state = {name.replace("._original_component", ""): tensor for name, tensor in original.state_dict().items()}
    if missing := sorted(names - set(state)):
        raise LensteerError(
            f"the weights of a {type(original).__name__} cannot be written: TransformerLens keeps {missing[0]!r} and "
            f"{len(missing) - 1} more in another form"
        )
    return Weights(names, lambda name: state[name].detach().cpu(), folder)


def names_of(config: Any) -> frozenset[str]:
    """The names of the tensors of a checkpoint with this configuration, without tied ones."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        empty = AutoModelForCausalLM.from_config(config)
    tied = empty.all_tied_weights_keys if getattr(config, "tie_word_embeddings", False) else {}
    return frozenset(set(empty.state_dict()) - set(tied))


def folder_of(model: TransformerBridge) -> Path | None:
    """The folder of a bridge's checkpoint, on this machine; None for a GGUF file or a model that was given."""
    import huggingface_hub

    config = model.original_model.config
    name = str(config._name_or_path)
    if Path(name).is_dir():
        return Path(name)
    if name.count("/") > 1 or name.startswith((".", "~")) or not name or Path(name).exists():
        return None
    try:  # what was downloaded when it was loaded; nothing is fetched
        revision = getattr(config, "_commit_hash", None)
        return Path(huggingface_hub.snapshot_download(name, revision=revision, local_files_only=True))
    except Exception:  # the loaded model has all that is needed
        return None


def _on_disk(folder: Path, names: frozenset[str]) -> Weights | None:
    """The tensors of a folder, if its safetensors files hold these, perhaps as a larger model's text tower."""
    files: dict[str, tuple[Path, str]] = {}
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(str(path), "pt") as file:
            for stored in file.keys():
                name = stored
                for old, new in TOWER.items():
                    name = re.sub(old, new, name)
                files[name] = (path, stored)
    if not names <= set(files):
        return None

    def get(name: str) -> Tensor:
        path, stored = files[name]
        with safe_open(str(path), "pt") as file:
            tensor: Tensor = file.get_tensor(stored)
        return tensor

    return Weights(names, get, folder)


def write_weights(
    path: Path,
    tensors: Mapping[str, Make],
    source: Weights,
    *,
    dtype: torch.dtype,
    max_shard: int = 2 * 2**30,
) -> None:
    """Write safetensors shards and their index. At most one shard is in memory.

    Args:
        path: an existing folder.
        tensors: each tensor's name, and what makes it.
        source: that they are made from.
        dtype: of floating-point tensors.
        max_shard: most bytes of a shard with more than one tensor.
    """
    shards: list[dict[str, int]] = []
    kept: dict[str, Tensor] = {}

    def flush() -> None:
        if kept:
            save_file(kept, path / f"part-{len(shards)}", {"format": "pt"})
            shards.append({name: _bytes(tensor) for name, tensor in kept.items()})
            kept.clear()

    for name, make in tensors.items():
        tensor = make(source)
        if tensor.is_floating_point():
            tensor = tensor.to(dtype)
        if kept and sum(map(_bytes, kept.values())) + _bytes(tensor) > max_shard:
            flush()
        kept[name] = tensor.contiguous().clone() if tensor._base is not None else tensor.contiguous()
    flush()
    names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    if len(shards) == 1:
        names = ["model.safetensors"]
    for number, name in enumerate(names):
        (path / f"part-{number}").rename(path / name)
    if len(shards) > 1:
        where = {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        total = sum(sum(shard.values()) for shard in shards)
        index = {"metadata": {"total_size": total}, "weight_map": where}
        (path / INDEX).write_text(json.dumps(index, indent=1), encoding="utf-8")


def _bytes(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()

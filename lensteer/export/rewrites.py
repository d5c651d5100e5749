"""A plan as an edit of weights: which tensors of which architecture make a model that steers itself.

A constant vector after block l is, by architecture,

- the bias of the block's MLP output, which GPT-2, GPT-NeoX and others have, and Llama's configuration can have;
- for Qwen2 and Mistral the same after the weights are renamed a Llama's, which computes the same;
- for Qwen3 and Gemma, whose MLPs can have no bias: one more block after block l, which adds the vector and nothing
  else. Its attention reads a constant from the bias of its values, its output matrix turns that into the vector, and
  its MLP is zero.

A projection is W <- W - û ûᵀ W for every matrix that writes to the residual stream, up to block l: the stream then has
no component along û at any site up to l (Arditi et al. 2024, "Refusal in language models is mediated by a single
direction", section 4.1).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.export.weights import Make, Weights

#: The bias of a block's MLP output, where an architecture always has one.
BIASES = {
    "gpt2": "transformer.h.{}.mlp.c_proj.bias",
    "gpt_bigcode": "transformer.h.{}.mlp.c_proj.bias",
    "gpt_neo": "transformer.h.{}.mlp.c_proj.bias",
    "gpt_neox": "gpt_neox.layers.{}.mlp.dense_4h_to_h.bias",
    "gptj": "transformer.h.{}.mlp.fc_out.bias",
    "bloom": "transformer.h.{}.mlp.dense_4h_to_h.bias",
    "phi": "model.layers.{}.mlp.fc2.bias",
    "starcoder2": "model.layers.{}.mlp.c_proj.bias",
}
#: Architectures whose weights compute the same in a Llama, if all layers attend to everything.
AS_LLAMA = ("qwen2", "mistral")
#: Architectures whose attention can have biases and whose MLPs cannot.
INSERTED = ("qwen3", "gemma", "gemma2", "gemma3_text")
#: Fields that a Llama's configuration shares with them.
_SHARED = (
    "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
    "num_key_value_heads", "hidden_act", "max_position_embeddings", "initializer_range", "rms_norm_eps", "use_cache",
    "pad_token_id", "bos_token_id", "eos_token_id", "tie_word_embeddings", "rope_parameters", "attention_dropout",
)  # fmt: skip
_MLP = ("gate_proj", "up_proj", "down_proj")
_ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")

Added = Mapping[int, Float[Tensor, " d_model"]]
"""Layer to the vector that is added after it."""


@dataclass(frozen=True)
class Rewrite:
    """A checkpoint that steers itself.

    Attributes:
        config: its configuration.
        tensors: the name of each of its tensors, and what makes it.
        how: in words, for the card.
        steering: the tensors that hold a vector, and the same without it: a tensor of the checkpoint, or None for
            zero; empty for a projection, which is in many of them.
    """

    config: Any
    tensors: Mapping[str, Make]
    how: str
    steering: Mapping[str, str | None] = field(default_factory=dict)


def added(config: Any, weights: Weights, vectors: Added) -> Rewrite:
    """A checkpoint that adds constant vectors.

    Raises:
        LensteerError: an architecture or a configuration that cannot.
    """
    kind = config.model_type
    if kind in BIASES:
        return _own_biases(config, weights, vectors)
    if kind in AS_LLAMA:
        return _mlp_biases(_as_llama(config, weights), weights, vectors, f"{_class(config)} as LlamaForCausalLM, ")
    if hasattr(config, "mlp_bias") and f"model.layers.0.mlp.{_MLP[2]}.weight" in weights.names:
        return _mlp_biases(config, weights, vectors, "")
    if kind in INSERTED:
        return _inserted(config, weights, vectors)
    raise LensteerError(
        f"a {kind!r} cannot hold a constant vector: its MLPs have no bias at their output, and no way around that is "
        f"known here; it works for {', '.join([*BIASES, 'llama', *AS_LLAMA, *INSERTED])} and others whose "
        "configuration has mlp_bias. Serve the vector beside the model instead, by ls.export.hf or ls.export.gguf"
    )


def _class(config: Any) -> str:
    return str((config.architectures or [config.model_type])[0])


def _copied(names: Any) -> dict[str, Make]:
    return {name: lambda weights, name=name: weights.get(name) for name in sorted(names)}  # type: ignore[misc]  # the default binds the name


def _zeros(like: str, dim: int = 0) -> Make:
    """A zero bias for the outputs of a matrix."""

    def make(weights: Weights) -> Tensor:
        matrix = weights.get(like)
        return matrix.new_zeros(matrix.shape[dim])

    return make


def _plus(name: str, vector: Tensor) -> Make:
    """A bias plus a vector; the vector alone where there is no such bias. The writer rounds it, once."""

    def make(weights: Weights) -> Tensor:
        return weights.get(name).double() + vector.double() if name in weights.names else vector

    return make


def _own_biases(config: Any, weights: Weights, vectors: Added) -> Rewrite:
    tensors = _copied(weights.names)
    for layer, vector in vectors.items():
        name = BIASES[config.model_type].format(layer)
        if name not in weights.names:
            raise LensteerError(f"this {config.model_type!r} has no {name!r}: its configuration leaves biases out")
        tensors[name] = _plus(name, vector)
    own = {name: name for name in (BIASES[config.model_type].format(layer) for layer in vectors)}
    return Rewrite(config, tensors, "with the vectors added to the biases of the MLPs' output, which it has", own)


def _mlp_biases(config: Any, weights: Weights, vectors: Added, before: str) -> Rewrite:
    config = _changed(config, mlp_bias=True)
    tensors = _copied(weights.names)
    scale = float(getattr(config, "residual_multiplier", 1.0))  # Granite's, of what a block adds
    for layer in range(config.num_hidden_layers):
        for part in _MLP:
            name = f"model.layers.{layer}.mlp.{part}"
            if f"{name}.bias" not in weights.names:
                tensors[f"{name}.bias"] = _zeros(f"{name}.weight")
        for part in _ATTENTION if getattr(config, "attention_bias", False) else ():
            name = f"model.layers.{layer}.self_attn.{part}"
            if f"{name}.bias" not in weights.names:
                tensors[f"{name}.bias"] = _zeros(f"{name}.weight")
        if layer in vectors:
            name = f"model.layers.{layer}.mlp.{_MLP[2]}"
            tensors[f"{name}.bias"] = _plus(f"{name}.bias", vectors[layer] / scale)
    names = [f"model.layers.{layer}.mlp.{_MLP[2]}.bias" for layer in vectors]
    own = {name: name if name in weights.names else None for name in names}
    return Rewrite(config, tensors, f"{before}with the vectors as biases of the MLPs' output (`mlp_bias`)", own)


def _as_llama(config: Any, weights: Weights) -> Any:
    from transformers import LlamaConfig

    layers = list(getattr(config, "layer_types", None) or ())
    window = getattr(config, "sliding_window", None) if config.model_type == "mistral" else None
    if set(layers) - {"full_attention"} or (window is not None and window < config.max_position_embeddings):
        raise LensteerError(
            f"this {config.model_type!r} attends to a sliding window in some layers, which a Llama does not, and "
            "its MLPs have no bias at their output: serve the vector beside it, by ls.export.hf or ls.export.gguf"
        )
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    biased = "model.layers.0.self_attn.q_proj.bias" in weights.names
    shared = {name: getattr(config, name) for name in _SHARED}
    found = LlamaConfig(**shared, head_dim=head, attention_bias=biased, mlp_bias=True)
    found.architectures = ["LlamaForCausalLM"]
    return found


def _changed(config: Any, **values: Any) -> Any:
    changed = type(config).from_dict({**config.to_dict(), **values})
    changed._name_or_path = config._name_or_path
    return changed


def _inserted(config: Any, weights: Weights, vectors: Added) -> Rewrite:
    """One more block after each layer with a vector. Layers after it move up by one."""
    n = config.num_hidden_layers
    place = {layer: layer + sum(other < layer for other in vectors) for layer in range(n)}
    changes: dict[str, Any] = dict(num_hidden_layers=n + len(vectors), attention_bias=True)
    if getattr(config, "layer_types", None):
        kinds = list(config.layer_types)
        after = {layer: [kinds[layer], "full_attention"] if layer in vectors else [kinds[layer]] for layer in range(n)}
        changes["layer_types"] = [kind for layer in range(n) for kind in after[layer]]
    tensors: dict[str, Make] = {}
    for name in sorted(weights.names):
        head, _, rest = name.removeprefix("model.layers.").partition(".")
        if not name.startswith("model.layers."):
            tensors[name] = _copied([name])[name]
            continue
        layer = int(head)
        tensors[f"model.layers.{place[layer]}.{rest}"] = _copied([name])[name]
        if layer in vectors:
            tensors[f"model.layers.{place[layer] + 1}.{rest}"] = _part(name, rest, config, vectors[layer])
    for layer in range(n):
        own, new = f"model.layers.{layer}.self_attn", f"model.layers.{place[layer]}.self_attn"
        for part in _ATTENTION:
            if f"{own}.{part}.bias" not in weights.names:
                tensors[f"{new}.{part}.bias"] = _zeros(f"{own}.{part}.weight")
            if layer in vectors:
                name = f"model.layers.{place[layer] + 1}.self_attn.{part}.bias"
                zero = _zeros(f"{own}.{part}.weight")
                tensors[name] = _one_hot(zero) if part == "v_proj" else zero
    found = _changed(config, **changes)
    return Rewrite(
        found,
        tensors,
        f"with one more block after each of the layers {list(vectors)}, which adds the vector and nothing else "
        f"(so it has {found.num_hidden_layers} blocks instead of {n}; MLPs of a {config.model_type!r} have no bias)",
        {f"model.layers.{place[layer] + 1}.self_attn.o_proj.weight": None for layer in vectors},
    )


def _one_hot(zero: Make) -> Make:
    def make(weights: Weights) -> Tensor:
        bias = zero(weights).clone()
        bias[0] = 1.0
        return bias

    return make


def _part(name: str, rest: str, config: Any, vector: Tensor) -> Make:
    """A tensor of the inserted block, shaped like the one of the block before it.

    Every position's value is 1 in the first entry of the first head, from the bias alone, and so is their average. The
    output matrix's first column turns it into the vector. Where a norm follows, it scales to its own gain.
    """
    rms = float(vector.double().square().mean().sqrt())
    normed = config.model_type in ("gemma2", "gemma3_text")  # attention's output goes through a norm, with gain 1 + w

    def make(weights: Weights) -> Tensor:
        old = weights.get(name)
        if normed and rest == "post_attention_layernorm.weight":
            return torch.full_like(old, rms - 1, dtype=torch.float32)
        if "norm" in rest:
            return old
        new = torch.zeros_like(old, dtype=torch.float32)
        if rest == "self_attn.o_proj.weight":
            new[:, 0] = vector / rms if normed else vector
        return new

    return make


def projected(config: Any, weights: Weights, unit: Float[Tensor, " d_model"], layer: int) -> Rewrite:
    """A checkpoint whose residual stream has no component along a unit vector at any site up to a layer.

    Raises:
        LensteerError: an architecture whose writes to the residual stream are not plain matrices.
    """
    writes = ["model.embed_tokens.weight"]
    for block in range(layer + 1):
        writes += [f"model.layers.{block}.self_attn.o_proj.weight", f"model.layers.{block}.mlp.down_proj.weight"]
    if not set(writes) <= weights.names or any("post_feedforward_layernorm" in name for name in weights.names):
        raise LensteerError(
            f"a projection cannot be written into the weights of a {config.model_type!r}: what its blocks add to the "
            "residual stream does not come from one attention matrix and one MLP matrix alone (a norm or experts are "
            "in between); steer it by ls.export.hf"
        )
    tensors = _copied(weights.names)
    direction = unit.double() / unit.double().norm()
    for name in writes:
        tensors[name] = _orthogonal(name, direction)
        bias = name.replace(".weight", ".bias")
        if bias in weights.names:
            tensors[bias] = _orthogonal(bias, direction)
    untied = bool(config.tie_word_embeddings)
    if untied:
        tensors["lm_head.weight"] = _copied(["model.embed_tokens.weight"])["model.embed_tokens.weight"]
    return Rewrite(
        _changed(config, tie_word_embeddings=False),
        tensors,
        f"with the embedding and the output matrices of attention and MLP of layers 0 to {layer} orthogonal to the "
        f"direction{', and an unembedding of its own' if untied else ''}",
    )


def _orthogonal(name: str, unit: Float[Tensor, " d_model"]) -> Make:
    """A matrix without the part of its output along a unit vector."""

    def make(weights: Weights) -> Tensor:
        values = weights.get(name).double()
        if name.endswith("embed_tokens.weight"):  # its rows are outputs
            return values - torch.outer(values @ unit, unit)
        if values.dim() == 1:
            return values - (values @ unit) * unit
        return values - torch.outer(unit, unit @ values)

    return make

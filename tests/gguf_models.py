"""Small models as GGUF files for llama.cpp, written by the package gguf: Llama and Qwen2, in F32 or F16.

llama.cpp has its own converter, which is no package; this one holds what the test models need.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

#: Names of llama.cpp's pre-tokenizers, by what the model is made of.
PRE = {"llama": "smollm", "qwen2": "qwen2"}


def interleaved(weight: np.ndarray, heads: int) -> np.ndarray:
    """Query or key rows in llama.cpp's order for the architecture "llama", whose rotary pairs are neighbors."""
    half = weight.shape[0] // heads // 2
    return weight.reshape(heads, 2, half, *weight.shape[1:]).swapaxes(1, 2).reshape(weight.shape)


def write_model(folder: Path, path: Path, *, dtype: str = "F32") -> Path:
    """Write a Hugging Face checkpoint as GGUF; `dtype` is that of the matrices (norms and biases are F32)."""
    import gguf
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    config, kind = model.config, model.config.model_type
    assert kind in PRE, kind
    writer = gguf.GGUFWriter(path, kind)
    heads, kv_heads = config.num_attention_heads, config.num_key_value_heads
    head = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(folder).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head)
    writer.add_vocab_size(config.vocab_size)
    writer.add_file_type(gguf.LlamaFileType.ALL_F32 if dtype == "F32" else gguf.LlamaFileType.MOSTLY_F16)
    add_tokenizer(writer, tokenizer, config, PRE[kind])
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.q_proj": "attn_q",
        "self_attn.k_proj": "attn_k",
        "self_attn.v_proj": "attn_v",
        "self_attn.o_proj": "attn_output",
        "post_attention_layernorm": "ffn_norm",
        "mlp.gate_proj": "ffn_gate",
        "mlp.up_proj": "ffn_up",
        "mlp.down_proj": "ffn_down",
    }
    for name, tensor in model.state_dict().items():
        values = tensor.float().numpy()
        rest, _, last = name.removeprefix("model.").rpartition(".")
        if name == "lm_head.weight":
            if config.tie_word_embeddings:
                continue
            own = "output.weight"
        elif rest in ("embed_tokens", "norm"):
            own = {"embed_tokens": "token_embd", "norm": "output_norm"}[rest] + ".weight"
        else:
            _, layer, part = rest.split(".", 2)
            own = f"blk.{layer}.{parts[part]}.{last}"
            if kind == "llama" and part in ("self_attn.q_proj", "self_attn.k_proj"):
                values = interleaved(values, heads if part.endswith("q_proj") else kv_heads)
        writer.add_tensor(own, np.ascontiguousarray(values, np.float16 if dtype == "F16" and values.ndim > 1 else None))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def add_tokenizer(writer: Any, tokenizer: Any, config: Any, pre: str) -> None:
    """Vocabulary, merges, special tokens and chat template of a byte-level BPE tokenizer."""
    import gguf

    held = json.loads(tokenizer.backend_tokenizer.to_str())
    by_id = {i: token for token, i in tokenizer.get_vocab().items()}
    added = {entry["id"]: entry for entry in held["added_tokens"]}
    kinds, tokens = [], []
    for i in range(config.vocab_size):
        kind = gguf.TokenType.NORMAL if i in by_id else gguf.TokenType.UNUSED
        if i in added:
            kind = gguf.TokenType.CONTROL if added[i]["special"] else gguf.TokenType.USER_DEFINED
        kinds.append(kind)
        tokens.append(by_id.get(i, f"[unused{i}]"))
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre)
    writer.add_token_list(tokens)
    writer.add_token_types(kinds)
    merges = held["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    writer.add_add_bos_token(False)
    if tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    if tokenizer.pad_token_id is not None:
        writer.add_pad_token_id(tokenizer.pad_token_id)
    if tokenizer.chat_template:
        writer.add_chat_template(tokenizer.chat_template)

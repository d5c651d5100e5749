"""Edit one slot of the prompt's cache, once: `python steer_cache.py MODEL "a prompt"`, or `edited_cache(model, ids)`.

Needs torch, transformers and safetensors. `cache_vector.safetensors` beside this file holds the vector and settings.
The prompt runs through the slot, the slot's values change, the rest of the prompt and the answer run on top.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

FILE = Path(__file__).with_name("cache_vector.safetensors")


def settings(file: str | Path = FILE) -> dict[str, Any]:
    """Where and how much: "slot", from the prompt's end if negative, and "append", a text that ends the prompt."""
    with safe_open(str(file), "pt") as opened:
        found: dict[str, Any] = json.loads(opened.metadata()["steering"])
    return found


@torch.no_grad()
def edited_cache(model: Any, ids: torch.Tensor, file: str | Path = FILE) -> Any:
    """A cache for `model.generate(ids, past_key_values=...)`. `ids` is one prompt, [1, pos], "append" included."""
    from transformers import DynamicCache

    found, length = settings(file), ids.shape[1]
    slot = found["slot"] if found["slot"] >= 0 else length + found["slot"]
    if not 0 <= slot < length - 1:
        raise ValueError(f"slot {found['slot']} of a prompt of {length} tokens: one more has to follow it")
    cache = DynamicCache()
    model(input_ids=ids[:, : slot + 1], past_key_values=cache, use_cache=True)
    with safe_open(str(file), "pt") as opened:
        values = opened.get_tensor("values")  # layer, head, d_head: what is added
    if len(cache.layers) != len(values):
        raise ValueError(f"this vector is of {found['model']!r}, which has {len(values)} layers")
    for layer, added in zip(cache.layers, values, strict=True):
        layer.values[:, :, slot] += added.to(layer.values)
    return cache


def main() -> None:
    """Print what the model answers after the edit."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if len(sys.argv) != 3:
        sys.exit('usage: python steer_cache.py MODEL "a prompt"')
    name, text = sys.argv[1:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    text += settings()["append"]
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids
    cache, mask = edited_cache(model, ids), torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, past_key_values=cache, max_new_tokens=200, do_sample=False)
    sys.stdout.write(tokenizer.decode(out[0, ids.shape[1] :]) + "\n")


if __name__ == "__main__":
    main()

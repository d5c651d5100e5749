"""Steer a model of transformers: `python steer.py MODEL "a prompt"`, or `with steered(model): model.generate(...)`.

Needs torch, transformers and safetensors. `steering_vector.safetensors` beside this file holds vectors and settings.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

FILE = Path(__file__).with_name("steering_vector.safetensors")


@contextmanager
def steered(model: Any, prompt_length: int | None = None, file: str | Path = FILE) -> Iterator[Any]:
    """Steer one `generate`, whose first forward is the prompt; or forwards on whole texts, with `prompt_length`."""
    with safe_open(str(file), "pt") as opened:
        settings = json.loads(opened.metadata()["steering"])
        edits = [(edit, opened.get_tensor(edit["vector"])) for edit in settings["edits"]]
    blocks = model.get_submodule(settings["blocks"])
    if (len(blocks), model.config.hidden_size) != (settings["n_layers"], settings["d_model"]):
        raise ValueError(f"these vectors are of {settings['model']!r}, which has {settings['n_layers']} blocks")
    begin, prompt = 0, prompt_length

    def before(_module: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        nonlocal begin, prompt
        past = kwargs.get("past_key_values")
        begin = 0 if past is None else past.get_seq_length()
        ids: Any = kwargs.get("input_ids", args[0] if args else None)
        prompt = ids.shape[1] if prompt is None else prompt

    def hook(edit: dict[str, Any], vector: torch.Tensor) -> Callable[..., Any]:
        def after(_module: Any, _args: Any, output: Any) -> Any:
            resid = output[0] if isinstance(output, tuple) else output
            along = vector.to(resid)
            change = edit["coefficient"] * along
            if edit["operator"] == "project_out":
                change = -edit["coefficient"] * (resid * along).sum(-1, keepdim=True) * along
            if edit["scope"] == "generated":
                assert prompt is not None  # the first forward sets it
                column = begin + torch.arange(resid.shape[1], device=resid.device)
                change = change * (column >= prompt)[None, :, None]
            resid = resid + change
            return (resid, *output[1:]) if isinstance(output, tuple) else resid

        return after

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        handles += [blocks[edit["layer"]].register_forward_hook(hook(edit, vector)) for edit, vector in edits]
        yield model
    finally:
        for handle in handles:
            handle.remove()


def main() -> None:
    """Print what the steered model answers."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    if len(sys.argv) != 3:
        sys.exit('usage: python steer.py MODEL "a prompt"')
    name, text = sys.argv[1:]
    model, tokenizer = AutoModelForCausalLM.from_pretrained(name), AutoTokenizer.from_pretrained(name)
    if tokenizer.chat_template:
        chat = [{"role": "user", "content": text}]
        text = tokenizer.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).input_ids
    with steered(model):
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=200, do_sample=False)
    sys.stdout.write(tokenizer.decode(out[0, ids.shape[1] :]) + "\n")


if __name__ == "__main__":
    main()

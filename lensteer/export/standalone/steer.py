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


def add(h: torch.Tensor, vector: torch.Tensor, coefficient: Any) -> torch.Tensor:
    """Return h + c v."""
    return h + coefficient * vector.to(h)


def project_out(h: torch.Tensor, unit: torch.Tensor, coefficient: Any) -> torch.Tensor:
    """Return h - c <h, u> u."""
    return h - coefficient * (h * unit.to(h)).sum(-1, keepdim=True) * unit.to(h)


def clamp(h: torch.Tensor, vector: torch.Tensor, coefficient: Any) -> torch.Tensor:
    """Return h + (c |v| - <h, u>) u, with u = v / |v|."""
    length, h = vector.norm(), h.float()
    unit = vector / length
    return h + (coefficient * length - (h * unit).sum(-1, keepdim=True)) * unit


def rotate(h: torch.Tensor, unit: torch.Tensor, coefficient: Any) -> torch.Tensor:
    """Turn h by c degrees towards u, and not beyond it."""
    h = h.float()
    along = (h * unit).sum(-1, keepdim=True)
    across = h - along * unit
    across = across - (across * unit).sum(-1, keepdim=True) * unit
    length, aside = h.norm(dim=-1, keepdim=True), across.norm(dim=-1, keepdim=True)
    angle = (torch.atan2(aside, along) - coefficient * torch.pi / 180).clamp(0, torch.pi)
    turned = length * (angle.cos() * unit + angle.sin() * across / aside.clamp_min(1e-30))
    return torch.where(aside > 1e-6 * length, turned, h)


OPERATORS = {"add": add, "project_out": project_out, "clamp": clamp, "rotate": rotate}


def factor(schedule: dict[str, Any] | None, since: torch.Tensor) -> Any:
    """What a coefficient is multiplied by, `since` tokens after the prompt's end."""
    if schedule is None:
        return 1.0
    share = since.clamp(min=0) / schedule["tokens"]
    left = torch.exp2(-share) if schedule["shape"] == "half_life" else (1 - share).clamp(min=0)
    return schedule["end"] + (1 - schedule["end"]) * left


def is_open(gate: dict[str, Any], unit: torch.Tensor, h: torch.Tensor) -> torch.Tensor:
    """Where h points far enough along a gate's direction."""
    found = (h.float() * unit.to(h.device)).sum(-1, keepdim=True)
    if gate["measure"] == "cosine":
        found = found / h.float().norm(dim=-1, keepdim=True)
    return found > gate["threshold"] if gate["above"] else found < gate["threshold"]


@contextmanager
def steered(model: Any, prompt_length: int | None = None, file: str | Path = FILE) -> Iterator[Any]:
    """Steer one `generate`, whose first forward is the prompt; or forwards on whole texts, with `prompt_length`."""
    with safe_open(str(file), "pt") as opened:
        settings = json.loads(opened.metadata()["steering"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}
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

    def hook(edit: dict[str, Any]) -> Callable[..., Any]:
        def after(_module: Any, _args: Any, output: Any) -> Any:
            resid = output[0] if isinstance(output, tuple) else output
            assert prompt is not None  # the first forward sets it
            since = (begin + torch.arange(resid.shape[1], device=resid.device) - prompt)[None, :, None]
            coefficient = edit["coefficient"] * factor(edit.get("schedule"), since)
            chosen = since >= (0 if edit["scope"] == "generated" else -prompt)
            if (gate := edit.get("gate")) is not None:
                chosen = chosen & is_open(gate, tensors[gate["vector"]], resid)
            edited = OPERATORS[edit["operator"]](resid, tensors[edit["vector"]].to(resid.device), coefficient)
            resid = torch.where(chosen, edited.to(resid.dtype), resid)
            return (resid, *output[1:]) if isinstance(output, tuple) else resid

        return after

    handles = [model.register_forward_pre_hook(before, with_kwargs=True)]
    try:
        handles += [blocks[edit["layer"]].register_forward_hook(hook(edit)) for edit in settings["edits"]]
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

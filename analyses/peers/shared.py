"""What the peers' scripts share: the request, the model, and chains with the KL that steering spent on them.

Runs in a peer's own environment, where there is no lensteer: torch, transformers and safetensors only.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

#: The same as lensteer's way of sampling: no cut of the distribution, no penalty.
DRAWN = dict(do_sample=True, top_k=0, top_p=1.0, repetition_penalty=1.0)


def load(request: dict[str, Any]) -> tuple[Any, Any]:
    """The model, in float32 unless the request has a dtype, and its tokenizer, padding on the left."""
    folder = Path(request["model"])
    written = json.loads((folder / "config.json").read_text())
    rope = written.get("rope_parameters") or {}
    # transformers 4 does not know `rope_parameters`, and would take its default instead, silently.
    options = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    config = AutoConfig.from_pretrained(folder, **options)
    dtype = getattr(torch, request.get("dtype", "float32"))
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=dtype).eval()
    about = json.loads((folder / "tokenizer_config.json").read_text())  # in transformers 5's form, not read by 4
    named = {key: about[key] for key in ("bos_token", "eos_token", "pad_token", "unk_token") if about.get(key)}
    tokenizer = PreTrainedTokenizerFast(tokenizer_file=str(folder / "tokenizer.json"), padding_side="left", **named)
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return model, tokenizer


def write_vectors(path: Path, library: str, found: dict[str, dict[int, Any]], model: Any, request: dict) -> None:
    """Vectors by construction and layer, and the unsteered logits that tell whether the model is the same."""
    tensors = {
        f"{construction}/{layer}": torch.as_tensor(vector).detach().float().clone().contiguous()
        for construction, by_layer in found.items()
        for layer, vector in by_layer.items()
    }
    with torch.inference_mode():
        tensors["logits"] = model(torch.tensor([request["prompts"][0]["ids"]])).logits[0, -1].clone()
    save_file(tensors, path, {"library": library, "version": version(library)})


def write_chains(
    path: Path,
    request: dict[str, Any],
    model: Any,
    conditions: Sequence[tuple[str, float, Callable[[], AbstractContextManager[Any]]]],
    pad: int,
) -> None:
    """Chains of every condition, and of some the KL(steered, unsteered) and the likelihood per token.

    Args:
        path: JSONL file; conditions that it has are not run again.
        request: prompts, samples per prompt, temperature, length and seed.
        model: what generates: the peer's wrapper or the model itself.
        conditions: name, coefficient, and a context in which the peer's own steering is on.
        pad: the padding token.
    """
    done = {json.loads(line)["condition"] for line in path.read_text().splitlines()} if path.exists() else set()
    jobs = [(prompt, sample) for sample in range(request["n_samples"]) for prompt in request["prompts"]]
    longest = max(len(prompt["ids"]) for prompt, _ in jobs)
    ids = torch.tensor([[pad] * (longest - len(p["ids"])) + p["ids"] for p, _ in jobs])
    mask = torch.tensor([[0] * (longest - len(p["ids"])) + [1] * len(p["ids"]) for p, _ in jobs])
    ends = set(request["ends"])
    drawn = dict(DRAWN, temperature=request["temperature"], max_new_tokens=request["max_new_tokens"])
    for name, coefficient, steered in conditions:
        if name in done:
            continue
        torch.manual_seed(request["seed"])
        with torch.inference_mode(), steered():
            made = model.generate(
                input_ids=ids, attention_mask=mask, pad_token_id=pad, eos_token_id=sorted(ends), **drawn
            )
        rows = []
        for (prompt, sample), row in zip(jobs, made[:, longest:].tolist(), strict=True):
            end = next((i + 1 for i, token in enumerate(row) if token in ends), None)
            response = row[:end]
            about = dict(task=prompt["task"], sample=sample, ids=response, finished=end is not None)
            rows.append(dict(condition=name, coefficient=coefficient, **about))
            if sample == 0 and prompt in request["prompts"][: request["quality"]]:
                rows[-1] |= figures(model, prompt["ids"], response, steered)
        with path.open("a") as file:
            file.writelines(json.dumps(row) + "\n" for row in rows)
        print(f"{path.name}: {name}", flush=True)


def figures(model: Any, prompt: list[int], response: list[int], steered: Callable[[], Any]) -> dict[str, float]:
    """KL(steered, unsteered) and the unsteered likelihood, in nats per token of a response."""
    both = torch.tensor([prompt + response])
    with torch.inference_mode():
        parts = []
        for context in (steered, nullcontext):
            with context():
                parts.append(model(both).logits[0, len(prompt) - 1 : -1].float().log_softmax(-1))
        p, q = parts
        kl = (p.exp() * (p - q)).sum(-1, dtype=torch.float64).mean()
        nll = -q.gather(1, torch.tensor(response)[:, None]).double().mean()
    return {"kl": float(kl), "nll": float(nll)}

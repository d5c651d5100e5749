"""A peer's side of the speed benchmarks, in the peer's own environment: answers commands with seconds, in JSON lines.

    PEER-ENVIRONMENT/bin/python benchmarks/peer_worker.py LIBRARY REQUEST.json

The request names the model's folder, its dtype, the threads and the clock, and holds chains with windows to average, or
prompts and a vector to add at one layer. After loading, the worker writes `{"ready": version}`; then each line that it
reads, `{"task": "collect"}` or `{"task": "generate"}`, is timed. Its answer has a `check`, which is equal for all
libraries that compute the same: norms of summed means by layer, or the tokens written.
"""

from __future__ import annotations

import importlib
import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "analyses" / "peers"))
from shared import load


def window_sums(layers: list[torch.Tensor], windows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Sum over windows of the mean activation in each, `[layer d_model]`, from all activations of one chain."""
    return torch.stack([sum(layer[b:e].float().mean(0) for b, e in windows) for layer in layers])  # type: ignore[misc]  # a sum of tensors


class SteeringVectors:
    """steering-vectors: `record_activations` keeps all layers' outputs, `SteeringVector.apply` adds a vector."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.library, self.model = importlib.import_module("steering_vectors"), model

    def collect(self, request: Mapping[str, Any]) -> torch.Tensor:
        """Behavior sums of all chains."""
        total = torch.zeros(())
        for chain in request["chains"]:
            with self.library.record_activations(self.model) as found:
                self.model(torch.tensor([chain["ids"]]), use_cache=False)
            total = total + window_sums([found[layer][0][0] for layer in sorted(found)], chain["windows"])
        return total

    def generate(self, request: Mapping[str, Any], options: Mapping[str, Any]) -> torch.Tensor:
        """Tokens of all prompts, steered at every position."""
        vector = self.library.SteeringVector({request["layer"]: torch.tensor(request["vector"])})
        with vector.apply(self.model):
            return torch.as_tensor(self.model.generate(**options))


class Repeng:
    """repeng: `batched_get_hiddens` reads the last token of each text, `ControlModel` adds a vector."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.extract = importlib.import_module("repeng.extract")
        self.wrapper = importlib.import_module("repeng").ControlModel
        self.model = model
        self.controlled: Any = None

    def collect(self, request: Mapping[str, Any]) -> torch.Tensor:
        """Sums over some spans: one text for each, up to the span, as a text has one place that is read."""
        texts = {
            str(number): ids for number, ids in enumerate(c["ids"][:at] for c in request["chains"] for at in c["ends"])
        }

        def tokenizer(batch: list[str], **_options: Any) -> Any:
            rows = [texts[name] for name in batch]
            width = max(map(len, rows))
            ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
            mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
            encoding = importlib.import_module("transformers").BatchEncoding
            return encoding({"input_ids": ids, "attention_mask": mask})

        layers = list(range(self.model.config.num_hidden_layers - 1))  # its last one is after the final norm
        found = self.extract.batched_get_hiddens(self.model, tokenizer, list(texts), layers, 4)
        return torch.stack([torch.from_numpy(found[layer]).sum(0) for layer in layers])

    def generate(self, request: Mapping[str, Any], options: Mapping[str, Any]) -> torch.Tensor:
        """Tokens of all prompts, steered at every position."""
        if self.controlled is None:
            self.controlled = self.wrapper(self.model, [request["layer"]])
            wrapped = self.model.model.layers[request["layer"]]
            if hasattr(wrapped.block, "attention_type"):  # read by Qwen2; repeng 0.4.0 hides it
                wrapped.attention_type = wrapped.block.attention_type
        self.controlled.set_raw_control({request["layer"]: torch.tensor(request["vector"]).to(self.model.dtype)})
        return torch.as_tensor(self.controlled.generate(**options))


class NNsight:
    """nnsight: a trace that saves all layers' outputs, or adds to one at each generated token."""

    def __init__(self, model: Any, tokenizer: Any) -> None:
        self.library, self.dtype = importlib.import_module("nnsight"), model.dtype
        self.model = self.library.TransformersModel(model, task="text-generation", tokenizer=tokenizer)

    def collect(self, request: Mapping[str, Any]) -> torch.Tensor:
        """Behavior sums of all chains."""
        total = torch.zeros(())
        for chain in request["chains"]:
            ids = torch.tensor([chain["ids"]])
            with self.model.trace(ids, use_cache=False) as tracer:
                found = self.library.save([])
                for layer in self.model.model.layers:
                    found.append(layer.output[0] if isinstance(layer.output, tuple) else layer.output)
                tracer.stop()
            total = total + window_sums([each[0] for each in found], chain["windows"])
        return total

    def generate(self, request: Mapping[str, Any], options: Mapping[str, Any]) -> torch.Tensor:
        """Tokens of all prompts, steered at every position."""
        layer = self.model.model.layers[request["layer"]]
        vector = torch.tensor(request["vector"]).to(self.dtype)
        ids, others = options["input_ids"], {k: v for k, v in options.items() if k != "input_ids"}
        with self.model.generate(ids, **others) as tracer:
            for _ in tracer.iter[: options["max_new_tokens"]]:
                layer.output = layer.output + vector
            made = tracer.result.save()
        return torch.as_tensor(made)


PEERS: dict[str, Callable[[Any, Any], Any]] = {
    "repeng": Repeng,
    "steering-vectors": SteeringVectors,
    "nnsight": NNsight,
}


@torch.no_grad()
def answer(peer: Any, request: Mapping[str, Any], command: Mapping[str, Any]) -> dict[str, Any]:
    """Seconds of one task, and its check."""
    now = time.process_time if request["cpu_time"] else time.perf_counter
    if command["task"] == "collect":
        begin = now()
        sums = peer.collect(request)
        return {"seconds": now() - begin, "check": sums.norm(dim=-1).tolist()}
    ids = torch.tensor(request["prompts"][: command["batch"]])
    options = dict(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=command["new_tokens"])
    begin = now()
    made = peer.generate(request, {**options, "do_sample": False, "pad_token_id": 0})
    return {"seconds": now() - begin, "check": made[:, ids.shape[1] :].tolist()}


if __name__ == "__main__":
    library, file = sys.argv[1:]
    request = json.loads(Path(file).read_text())
    torch.set_num_threads(request["threads"])
    with redirect_stdout(sys.stderr):
        model, tokenizer = load(request)
        model.generation_config.eos_token_id = None  # every row writes as much
        peer = PEERS[library](model, tokenizer)
    print(json.dumps({"ready": version(library)}), flush=True)
    for line in sys.stdin:
        with redirect_stdout(sys.stderr):
            found = answer(peer, request, json.loads(line))
        print(json.dumps(found), flush=True)

"""Steered generation: lensteer compared with unsteered Hugging Face, with its peers, and on TransformerLens' bridge.

All sides write the same number of tokens greedily after the same random prompts of one length, with the same weights,
dtype and threads; no row ends early. One vector is added at the middle layer.

- steered_vs_hf_unsteered: lensteer at each scope of `SCOPES` against Hugging Face's `generate` with fused attention
  and no steering; a ratio of .95 is 1.05 times its time;
- steered_vs_repeng, _vs_steering_vectors, _vs_nnsight: every position steered, by each library's own way;
- hooked_vs_unhooked_bridge: TransformerLens' own `generate`, with a hook that adds the vector and without.

A cell notes for each side the share of rows whose tokens are those of lensteer steered everywhere (for Hugging Face,
unsteered). Models: "random" (a random Qwen2 of 12 x 768), "organism", or a checkpoint.

Example: python benchmarks/generation.py --model smollm2 --peers PEERS --threads 2 --batch 16 --json generation.json

PEERS holds an environment per peer; analyses/peers/requirements-*.txt say how each is made. A killed call goes on.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest import mock

import sides
import torch
from sides import Comparison, timed

import lensteer as ls
from lensteer.generation import generate
from lensteer.vectors import Direction

SCOPES: dict[str, ls.PositionScope] = {
    scope.name: scope
    for scope in (ls.everywhere, ls.prompt, ls.generated, ls.thinking, ls.sentence_starts, ls.onsets, ls.first(8))
}
HF, BRIDGE, HOOKED, MUST = "hf_unsteered", "unhooked_bridge", "hooked_bridge", 1 / 1.05


@dataclass(frozen=True)
class Config:
    """A model, environments of peers, threads, rows of a batch, lengths, and how much is measured.

    `seconds`: of measuring, no round begins later. `cpu_time`: of one thread, not the wall's. `dtype`: None is
    the checkpoint's. `coefficient`: in units of the prompts' mean length at the layer.
    """

    model: str = sides.ORGANISM
    peers: Path | None = None
    threads: int = 1
    batch: int = 1
    dtype: str | None = None
    prompt: int = 64
    new_tokens: int = 32
    coefficient: float = 0.2
    rounds: int = 3
    seconds: float = 150.0
    cpu_time: bool = False
    seed: int = 0
    json: Path | None = None


def random_prompts(config: Config, model: Any) -> torch.Tensor:
    """Random ids, the same number in every row."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randint(10, int(model.cfg.d_vocab), (config.batch, config.prompt), generator=generator)


def added_vector(config: Config, model: Any, prompts: torch.Tensor, layer: int) -> torch.Tensor:
    """A random vector, as long as `coefficient` of the mean length of the residual stream."""
    rows = ls.activations.stream_means(model, prompts[:1].tolist(), [1], [[(1, config.prompt)]], layers=[layer])
    length = float(next(iter(rows))[1].norm())
    vector = torch.randn(ls.models.d_model(model), generator=torch.Generator().manual_seed(config.seed))
    return config.coefficient * length * vector / vector.norm()


def own_sides(
    config: Config, model: Any, plain: Any, prompts: torch.Tensor, layer: int, vector: torch.Tensor
) -> dict[str, Callable[[], list[list[int]]]]:
    """The sides that need no other environment; each returns the tokens of every row."""
    direction = Direction("random", vector[None], vector.norm()[None], (layer,))
    options: dict[str, Any] = dict(max_new_tokens=config.new_tokens, do_sample=False)
    texts = prompts.tolist()

    def steered(scope: ls.PositionScope) -> list[list[int]]:
        plan = ls.SteeringPlan(direction, layer, 1.0, scope=scope)
        rows = generate(model, texts, max_new_tokens=config.new_tokens, plans=[plan] * len(texts))
        return [list(row.ids) for row in rows]

    def hugging_face() -> list[list[int]]:
        made = plain.generate(prompts, attention_mask=torch.ones_like(prompts), pad_token_id=0, **options)
        return [row[config.prompt :] for row in made.tolist()]

    def bridge(*hooks: tuple[str, Any]) -> list[list[int]]:
        own = dict(stop_at_eos=False, verbose=False, return_type="tokens")
        with model.hooks(fwd_hooks=list(hooks)):
            made = model.generate(prompts, **options, **own)
        return [row[config.prompt :] for row in made.tolist()]

    here = vector.to(model.original_model.dtype)
    hook = (ls.models.resid_hook(layer), lambda resid, hook: resid + here)
    found: dict[str, Callable[[], list[list[int]]]] = {
        f"lensteer {name}": partial(steered, scope) for name, scope in SCOPES.items()
    }
    return found | {HF: hugging_face, BRIDGE: bridge, HOOKED: lambda: bridge(hook)}


def rows_of(cells: Mapping[str, Any]) -> list[Comparison]:
    """Every comparison of every cell."""
    rows = []
    for name, cell in cells.items():
        seconds, tokens = cell["seconds"], cell["tokens"]
        if not seconds.get(HF):
            continue
        for scope in SCOPES:
            ours = seconds[f"lensteer {scope}"]
            rows.append(sides.compare(f"steered_vs_hf_unsteered, {scope}", name, tokens, ours, seconds[HF], MUST))
        ours = seconds["lensteer everywhere"]
        for library in (library for library in sides.PEERS if library in seconds):
            rows.append(sides.compare(f"steered_vs_{library}", name, tokens, ours, seconds[library], 1.0))
        rows.append(sides.compare("steered_vs_hooked_bridge", name, tokens, ours, seconds[HOOKED]))
        rows.append(sides.compare("hooked_vs_unhooked_bridge", name, tokens, seconds[HOOKED], seconds[BRIDGE]))
    return rows


def agreement(a: Sequence[Sequence[int]], b: Sequence[Sequence[int]]) -> float:
    """Share of rows that are the same."""
    return sum(list(x) == list(y) for x, y in zip(a, b, strict=True)) / len(a)


def floors(config: Config, model: Any) -> dict[str, float]:
    """FLOP of all tokens, and bytes of the weights, which every step reads once."""
    weights = sum(p.numel() for p in model.original_model.model.layers.parameters())
    head = ls.models.d_model(model) * int(model.cfg.d_vocab)
    item = next(model.original_model.parameters()).element_size()
    flop = 2.0 * config.batch * (weights * (config.prompt + config.new_tokens - 1) + head * config.new_tokens)
    return {"floor_flop": flop, "floor_bytes": float((weights + head) * item * config.new_tokens)}


@torch.inference_mode()
def main(config: Config) -> dict[str, Any]:
    """All cells of the file, with this call's rounds."""
    torch.set_num_threads(config.threads)
    cells = sides.read_cells(config.json)
    with sides.folder_of(config.model) as folder, mock.patch.object(ls.models, "end_ids", return_value={-1}):
        dtype = config.dtype or sides.stored_dtype(folder)
        clock = f"{config.threads} thread(s){', CPU time' if config.cpu_time else ''}"
        shown = sides.RANDOM if config.model == "random" else Path(config.model).name
        cell = cells.setdefault(f"{shown}, {dtype}, {clock}, batch {config.batch}", {"seconds": {}})
        model, plain = ls.load_model(folder, dtype=dtype), sides.plain_model(folder, dtype)
        prompts, layer = random_prompts(config, model), ls.models.n_layers(model) // 2
        vector = added_vector(config, model, prompts, layer)
        own = own_sides(config, model, plain, prompts, layer, vector)
        cell |= {"tokens": config.batch * config.new_tokens, "matrix_flop_per_s": sides.matrix_rate(dtype)}
        cell |= floors(config, model)
        request = {
            "model": str(folder),
            "dtype": dtype,
            "threads": config.threads,
            "cpu_time": config.cpu_time,
            "prompts": prompts.tolist(),
        }
        request |= {"layer": layer, "vector": vector.tolist()}
        with sides.workers(config.peers, request) as (peers, missing):
            cell["missing"] = missing
            cell["versions"] = {name: peer.version for name, peer in peers.items()}
            written: dict[str, list[list[int]]] = {}

            def asked(name: str) -> float:
                found = peers[name].ask(task="generate", batch=config.batch, new_tokens=config.new_tokens)
                written[name] = found["check"]
                return float(found["seconds"])

            def measured(name: str) -> float:
                return timed(lambda: written.__setitem__(name, own[name]()), config.cpu_time)()

            every: dict[str, Callable[[], float]] = {name: partial(measured, name) for name in own}
            every |= {name: partial(asked, name) for name in peers}
            if not cell["seconds"]:
                short = replace(config, new_tokens=2)
                for work in own_sides(short, model, plain, prompts[:1], layer, vector).values():
                    work()  # warm
            for _ in sides.take_turns(every, cell["seconds"], config.rounds, time.monotonic() + config.seconds):
                same = {name: agreement(written[name], written["lensteer everywhere"]) for name in (*peers, HOOKED)}
                cell["same_tokens"] = same | {BRIDGE: agreement(written[BRIDGE], written[HF])}
                sides.write(config.json, cells, rows_of(cells))
    return cells


def smoke(config: Config) -> Config:
    """The organism, at the size of a test."""
    return replace(config, model=sides.ORGANISM, batch=2, prompt=10, new_tokens=4, rounds=2)


if __name__ == "__main__":
    sides.command(globals(), "Steered generation")

"""Behavior sums of annotated chains at all layers: lensteer compared with a bare forward and with its peers.

One side is `fit_vectors` (one pass to a difference of means per behavior and layer), once without and once with 50
controls of each kind. The others read the same windows of the same chains, with the same weights, dtype and threads:

- bare_forward: Hugging Face's model without its head, with fused attention, that keeps nothing: chain by chain, or in
  lensteer's batches if that is faster;
- transformerlens_cache: `run_with_cache` of all `resid_post`, chain by chain;
- published: the pattern of the published scripts, all layers' residuals of each chain kept, then averaged;
- nnsight: a trace of each chain that saves all layers' outputs and stops before the head;
- steering-vectors: `record_activations` of all layers, chain by chain;
- repeng: `batched_get_hiddens`. It reads the last token of a text, so each span is a text of its own up to its onset
  (one position, where the others average a window). Four spans of the first chain are run, and scaled by tokens.

Each peer's sums have to equal lensteer's; a cell notes by how much they differ. Models: "random" (a random Qwen2 of
12 x 768), "organism", or a checkpoint, whose chains are published ones under its tokenizer.

Example: python benchmarks/collection.py --model smollm2 --chains a.jsonl --peers PEERS --threads 2 --json b.json

PEERS holds an environment per peer; analyses/peers/requirements-*.txt say how each is made. A killed call goes on.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import sides
import torch
from attribution import Config as RandomChains
from attribution import peak_bytes, random_traces
from peer_worker import window_sums
from sides import Comparison, timed

import lensteer as ls
from lensteer.activations import Window, batch_tokens, batches, stream_means
from lensteer.pipeline import read_chains

WINDOW, N_CONTROLS, SAMPLED_CHAINS = "onset±3", 50, 1
MUST = {"bare_forward": 0.95} | dict.fromkeys(
    ("transformerlens_cache", "published", "nnsight", "steering-vectors", "repeng"), 1.5
)


@dataclass(frozen=True)
class Config:
    """A model, annotated chains for it, environments of peers, threads, and how much is measured.

    `seconds`: of measuring, no round begins later. `cpu_time`: of one thread, not the wall's. `dtype`: None is
    the checkpoint's.
    """

    model: str = sides.ORGANISM
    chains: str | None = None
    peers: Path | None = None
    threads: int = 1
    dtype: str | None = None
    tokens: int = 3000
    longest: int = 1200
    rounds: int = 3
    seconds: float = 150.0
    cpu_time: bool = False
    json: Path | None = None


def annotated(config: Config, model: Any) -> list[ls.Trace]:
    """Annotated chains of at most the longest length, until there are enough tokens."""
    if config.model == sides.ORGANISM:
        tasks = ls.load_tasks(split="train", n=max(4, config.tokens // 100))
        found = ls.annotate(ls.generate_traces(model, tasks, temperature=1.0, max_new_tokens=300), ls.grammar)
    elif config.model == "random":
        found = random_traces(RandomChains(n_traces=1 + config.tokens // 600), int(model.cfg.d_vocab))
    elif config.chains is None:
        raise ls.LensteerError(f"--model {config.model} needs --chains, a file of annotated chains")
    else:
        found = read_chains(config.chains, model)
    some = [trace for trace in found if trace.spans and len(trace.ids) <= config.longest]
    sizes = itertools.accumulate(len(trace.ids) for trace in some)
    return some[: 1 + sum(size < config.tokens for size in sizes)]


def windows_of(trace: ls.Trace) -> list[tuple[int, int]]:
    """The window of each span."""
    return [Window.parse(WINDOW).bounds(span, len(trace.ids)) for span in trace.spans]


def floors(model: Any, traces: Sequence[ls.Trace], dtype: str) -> dict[str, float]:
    """What any way has to compute and move: FLOP of the blocks, bytes of their weights, once per batch."""
    shape, blocks = model.original_model.config, model.original_model.model.layers
    weights = sum(p.numel() for p in blocks.parameters())
    heads = shape.num_attention_heads
    width = heads * (getattr(shape, "head_dim", None) or shape.hidden_size // heads)
    lengths = [len(trace.ids) for trace in traces]
    attention = sum(2 * length**2 * width for length in lengths) * len(blocks)  # two products, half of them masked
    made = list(batches(lengths, 16, batch_tokens(model)))
    padded = sum(max(lengths[i] for i in batch) * len(batch) for batch in made)
    return {
        "floor_flop": 2.0 * weights * sum(lengths) + attention,
        "floor_bytes": float(weights * torch.finfo(getattr(torch, dtype)).bits // 8 * len(made)),
        "matrix_flop_per_s": sides.matrix_rate(dtype),
        "padding": padded / sum(lengths) - 1,
    }


def memory(model: Any, traces: Sequence[ls.Trace]) -> dict[str, int]:
    """Peak beyond what was there before, for few chains and for four times as many."""
    n = 200
    short = [
        replace(
            trace,
            response_ids=trace.response_ids[:n],
            offsets=trace.offsets[:n],
            spans=tuple(span for span in trace.spans if span.end <= trace.prompt_length + n),
        )
        for trace in traces[:2]
    ]

    def fit(times: int) -> None:
        ls.fit_vectors(model, short * times, negatives="all")

    fit(1)
    return {f"peak_bytes.{2 * n}_chains": peak_bytes(partial(fit, n)) for n in (1, 4)}


def own_sides(model: Any, plain: Any, traces: Sequence[ls.Trace], cpu_time: bool) -> dict[str, Any]:
    """The sides that need no other environment."""
    ids = [torch.tensor([trace.ids]) for trace in traces]
    windows = [windows_of(trace) for trace in traces]
    names = [ls.models.resid_hook(layer) for layer in range(ls.models.n_layers(model))]
    made = list(batches([len(trace.ids) for trace in traces], 16, batch_tokens(model)))
    rows = [torch.nn.utils.rnn.pad_sequence([ids[i][0] for i in batch], batch_first=True) for batch in made]

    def bare() -> None:
        for each in ids:
            plain.model(each, use_cache=False)

    def bare_batched() -> None:
        for each in rows:
            plain.model(each, use_cache=False)

    def cached() -> None:
        for each, some in zip(ids, windows, strict=True):
            _, cache = model.run_with_cache(each, names_filter=lambda name: name in names)
            window_sums([cache[name][0] for name in names], some)

    def published() -> None:
        for each, some in zip(ids, windows, strict=True):
            found = plain(each, use_cache=False, output_hidden_states=True).hidden_states
            window_sums([layer[0] for layer in torch.stack(found[1:])], some)

    works: dict[str, Any] = {
        "lensteer": lambda: ls.fit_vectors(model, traces),
        "lensteer_50_controls": lambda: ls.fit_vectors(model, traces, n_controls=N_CONTROLS),
        "bare_one_by_one": bare,
        "bare_in_batches": bare_batched,
        "transformerlens_cache": cached,
        "published": published,
    }
    return {name: timed(work, cpu_time) for name, work in works.items()}


def request_of(config: Config, folder: Path, dtype: str, traces: Sequence[ls.Trace]) -> tuple[dict[str, Any], float]:
    """What the peers are asked, and by how much repeng's seconds are scaled from the sampled spans to all."""
    chains: list[dict[str, Any]] = []
    sampled = everything = 0
    for trace in traces:
        onsets = [span.onset + 1 for span in trace.spans]  # a text that ends with the onset
        chosen = torch.linspace(0, len(onsets) - 1, 4).long().tolist() if len(chains) < SAMPLED_CHAINS else []
        some = [onsets[i] for i in sorted(set(chosen))]
        sampled, everything = sampled + sum(some), everything + sum(onsets)
        chains.append({"ids": trace.ids, "windows": windows_of(trace), "ends": some})
    request = {
        "model": str(folder),
        "dtype": dtype,
        "threads": config.threads,
        "cpu_time": config.cpu_time,
        "chains": chains,
        "prompts": [],
    }
    return request, everything / sampled


def expected(model: Any, chains: Sequence[Mapping[str, Any]]) -> dict[str, torch.Tensor]:
    """Norms of the sums by layer that peers should have found: over all windows, and at repeng's sampled onsets."""
    sums = {}
    for name in ("windows", "ends"):
        ranges = [c["windows"] if name == "windows" else [(end - 1, end) for end in c["ends"]] for c in chains]
        some = [i for i, each in enumerate(ranges) if each]
        texts = [chains[i]["ids"] for i in some]
        rows = stream_means(model, texts, [1] * len(some), [ranges[i] for i in some])
        sums[name] = sum(row.sum(0) for _, row in rows).norm(dim=-1)  # type: ignore[union-attr]  # at least one chain
    return sums


def rows_of(cells: Mapping[str, Any]) -> list[Comparison]:
    """Every comparison of every cell."""
    rows = []
    for name, cell in cells.items():
        seconds = dict(cell["seconds"])
        if not seconds.get("lensteer"):
            continue
        both = [seconds.pop(side) for side in ("bare_one_by_one", "bare_in_batches")]
        seconds["bare_forward"] = min(both, key=lambda values: sorted(values)[len(values) // 2])
        controlled = seconds.pop("lensteer_50_controls")
        ours = seconds.pop("lensteer")
        for side in sorted(seconds, key=lambda side: (side != "bare_forward", side)):
            rows.append(
                sides.compare(f"collection_vs_{side}", name, cell["tokens"], ours, seconds[side], MUST.get(side))
            )
        label = "collection_with_50_controls_vs_bare_forward"
        rows.append(sides.compare(label, name, cell["tokens"], controlled, seconds["bare_forward"]))
    return rows


@torch.inference_mode()
def main(config: Config) -> dict[str, Any]:
    """All cells of the file, with this call's rounds."""
    torch.set_num_threads(config.threads)
    cells = sides.read_cells(config.json)
    with sides.folder_of(config.model) as folder:
        dtype = config.dtype or sides.stored_dtype(folder)
        clock = f"{config.threads} thread(s){', CPU time' if config.cpu_time else ''}"
        shown = sides.RANDOM if config.model == "random" else Path(config.model).name
        cell = cells.setdefault(f"{shown}, {dtype}, {clock}", {"seconds": {}})
        model, plain = ls.load_model(folder, dtype=dtype), sides.plain_model(folder, dtype)
        traces = annotated(config, model)
        cell |= {"tokens": sum(len(t.ids) for t in traces), "chains": len(traces)} | floors(model, traces, dtype)
        request, scale = request_of(config, folder, dtype, traces)
        with sides.workers(config.peers, request) as (peers, missing):
            cell["missing"] = missing
            cell["versions"] = {name: peer.version for name, peer in peers.items()}
            truth = expected(model, request["chains"])
            if "peak_bytes.2_chains" not in cell:
                cell |= memory(model, traces)
            errors: dict[str, float] = {}

            def asked(name: str) -> float:
                found = peers[name].ask(task="collect")
                right = truth["ends" if name == "repeng" else "windows"][: len(found["check"])]
                errors[name] = float((torch.tensor(found["check"]) / right - 1).abs().max())
                return float(found["seconds"] * (scale if name == "repeng" else 1))

            every = own_sides(model, plain, traces, config.cpu_time) | {n: partial(asked, n) for n in peers}
            if not cell["seconds"]:
                for side in ("lensteer", "bare_one_by_one", "transformerlens_cache"):
                    own_sides(model, plain, traces[:1], False)[side]()  # warm
            for _ in sides.take_turns(every, cell["seconds"], config.rounds, time.monotonic() + config.seconds):
                cell["largest_relative_difference_of_sums"] = errors
                sides.write(config.json, cells, rows_of(cells))
    return cells


def smoke(config: Config) -> Config:
    """The organism, at the size of a test."""
    return replace(config, model=sides.ORGANISM, tokens=300, rounds=2)


if __name__ == "__main__":
    sides.command(globals(), "Behavior sums of annotated chains, all layers")

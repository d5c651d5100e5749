"""Two Ray actors with one thread each, compared with two bare processes that run the same forwards.

Both sum the activations of annotated chains into behavior vectors (`fit_vectors`), on the same chains. The bare
processes each have half of the chains, as many tokens each, have loaded the model before the clock starts, and return
nothing. The actors get shards from this process, return their sums, and those are merged here. Sides take turns in
going first; the figure is the median over rounds of the ratio of their speeds, with its range.

- `actors_vs_processes`: at least 0.95 is wanted.

Example: python benchmarks/scale.py --model HuggingFaceTB/SmolLM2-135M-Instruct --json scale.json
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import os
from dataclasses import dataclass
from functools import partial
from multiprocessing.connection import Connection
from pathlib import Path

# Before torch is imported here and in the processes that are started: one thread each.
os.environ["OMP_NUM_THREADS"] = "1"

import torch
from sides import compare, take_turns, timed

import lensteer as ls
from lensteer.behaviors import Span
from lensteer.distributed import ActorOptions, Actors
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import fit_vectors

LABELS = ("deduction", "backtracking", "uncertainty-estimation", "example-testing")
PROMPT, SPAN, MUST = 20, 16, 0.95


@dataclass(frozen=True)
class Config:
    """A model's folder or name (None: the organism), and sizes."""

    model: str | None = None
    workers: int = 2
    chains: int = 32
    longest: int = 200
    rounds: int = 5
    seed: int = 0


def chains_of(config: Config, d_vocab: int) -> list[Trace]:
    """Chains of random tokens, from half as long as the longest, with a span every 16 tokens."""
    rng = torch.Generator().manual_seed(config.seed)
    found = []
    for index in range(config.chains):
        number = index - index % config.workers  # the shares of the workers are as long
        length = config.longest - (config.longest // 2) * number // config.chains
        ids = torch.randint(3, d_vocab, (length,), generator=rng).tolist()
        response = tuple(ids[PROMPT:])
        spans = tuple(
            Span(LABELS[i % len(LABELS)], PROMPT + begin, PROMPT + begin + SPAN, begin, begin + SPAN)
            for i, begin in enumerate(range(0, len(response) - SPAN, SPAN))
        )
        task = Task(f"chain-{index}", "random", "train", "")
        text = "x" * len(response)
        found.append(
            Trace(task, "", text, tuple(ids[:PROMPT]), response, tuple(range(len(response))), True, spans=spans)
        )
    return found


def process(pipe: Connection, model_name: str | None, chains: list[Trace]) -> None:
    """A bare process: load, then fit whenever it is told to."""
    torch.set_num_threads(1)
    model = ls.load_model(model_name)
    fit_vectors(model, chains[:2])  # warm
    pipe.send(None)
    while pipe.recv():
        fit_vectors(model, chains)
        pipe.send(None)


def main(config: Config) -> dict[str, object]:
    """Speeds of both sides and their ratio."""
    torch.set_num_threads(1)
    model = ls.load_model(config.model)
    chains = chains_of(config, int(model.cfg.d_vocab))
    n_tokens = sum(len(chain.ids) for chain in chains)
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for number in range(config.workers):
        mine, theirs = context.Pipe()
        share = chains[number :: config.workers]
        each = context.Process(target=process, args=(theirs, config.model, share), daemon=True)
        each.start()
        pipes.append(mine)
        processes.append(each)
    try:
        for pipe in pipes:
            pipe.recv()

        def bare() -> None:
            for pipe in pipes:
                pipe.send(True)
            for pipe in pipes:
                pipe.recv()

        with Actors(config.model, {}, ActorOptions(n=config.workers)).on(model):
            both = {"processes": timed(bare), "actors": timed(partial(fit_vectors, model, chains))}
            for side in both.values():
                side()  # warm
            spent: dict[str, list[float]] = {}
            for _ in take_turns(both, spent, config.rounds, math.inf):
                pass
    finally:
        for each in processes:
            each.terminate()
    name = "organism" if config.model is None else Path(config.model).name
    found = compare("actors_vs_processes", name, n_tokens, spent["actors"], spent["processes"], MUST)
    return {
        "model": name,
        "workers": config.workers,
        "chains": config.chains,
        "tokens": n_tokens,
        "rounds": config.rounds,
        "processes.tokens_per_second": n_tokens / found.theirs,
        "actors.tokens_per_second": n_tokens / found.ours,
        "actors_vs_processes": found.ratio,
        "actors_vs_processes.low": found.low,
        "actors_vs_processes.high": found.high,
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--chains", type=int, default=Config.chains)
    parser.add_argument("--longest", type=int, default=Config.longest)
    parser.add_argument("--rounds", type=int, default=Config.rounds)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = main(Config(options.model, chains=options.chains, longest=options.longest, rounds=options.rounds))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))

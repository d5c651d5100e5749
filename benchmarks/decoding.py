"""Speedups of lensteer's decoding of many chains: each optimization compared with the same work without it.

- `shared_prefill`: rows of one prompt, such as the samples of one task, compared with rows of different prompts of the
  same length, each with its own prefill.
- `batches_at_once`: one batch per thread in parallel (`run_batches`), compared with one after the other on all threads.
- `grouped_attention`: one new token's attention over shared keys and values, compared with the stock function, which
  first copies them for every head.

Each number is the time without divided by the time with, so above 1 is a speedup: the median over rounds, in which the
sides alternate in going first, with a bootstrap interval over rounds. The model is a random Qwen2 (12 layers,
d_model 768, 32 000 tokens), or any checkpoint.

Example: OMP_NUM_THREADS=2 python benchmarks/decoding.py --json decoding.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from cache_steering import interval, random_model

import lensteer as ls
from lensteer import twins
from lensteer.generation import generate, run_batches


@dataclass(frozen=True)
class Config:
    """A checkpoint (None: a random model), rounds, rows of a batch, batches, tokens of a prompt and of an answer."""

    model: str | None = None
    rounds: int = 9
    rows: int = 64
    batches: int = 4
    prompt: int = 100
    new_tokens: int = 32
    seed: int = 0


def prompts_of(config: Config, n: int, vocabulary: int) -> list[list[int]]:
    """Random prompts of one length."""
    generator = torch.Generator().manual_seed(config.seed)
    return torch.randint(100, vocabulary - 100, (n, config.prompt), generator=generator).tolist()


def seconds(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def main(config: Config) -> dict[str, object]:
    """Ratios by name, each with its interval."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder)) if config.model is None else ls.load_model(config.model)
    many = prompts_of(config, config.rows, int(model.cfg.d_vocab))
    twin: Any = twins.plain_twin(model)
    assert twin is not None, "no plain twin of this model: there is nothing to compare"
    own = twin.config._attn_implementation

    def write(prompts: Sequence[list[int]]) -> object:
        return generate(model, prompts, max_new_tokens=config.new_tokens)

    def with_stock_attention() -> None:
        twin.set_attn_implementation("sdpa")
        try:
            write(many)
        finally:
            twin.set_attn_implementation(own)

    several = [many] * config.batches
    sides: dict[str, tuple[Callable[[], object], Callable[[], object]]] = {
        "shared_prefill": (lambda: write(many), lambda: write(many[:1] * config.rows)),
        "batches_at_once": (
            lambda: [write(batch) for batch in several],
            lambda: list(run_batches(model, lambda _, batch: write(batch), several, least=0)),
        ),
        "grouped_attention": (with_stock_attention, lambda: write(many)),
    }
    for without, with_it in sides.values():
        without(), with_it()
    found: dict[str, object] = {"threads": torch.get_num_threads(), "rounds": config.rounds}
    ratios: dict[str, list[float]] = {name: [] for name in sides}
    for number in range(config.rounds):
        for name, pair in sides.items():
            order = (0, 1) if number % 2 else (1, 0)
            spent = {i: seconds(pair[i]) for i in order}
            ratios[name].append(spent[0] / spent[1])
    for name, values in ratios.items():
        found |= dict(zip((name, f"{name}.low", f"{name}.high"), interval(values, config.seed), strict=True))
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    figures = main(Config(model=options.model, rounds=options.rounds))
    print(json.dumps(figures, indent=1))
    if options.json:
        options.json.write_text(json.dumps(figures, indent=1))

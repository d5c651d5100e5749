"""From a change in the explorer to the numbers of its strip, without a page, beside whole forwards.

One chain of random tokens on any checkpoint. Each round changes the layer, the coefficient or the first steered
position, and times two ways of measuring the same plan, which alternate in going first:

- `whole`: a steered forward of the whole chain with all its logits, compared with the unsteered logits, which are kept.
- `effect`: `ForcedChain.effect`, which keeps the unsteered pass, runs the blocks after the edited one on the tokens
  from the first edited one on, and makes and compares the logits in parts.

Both give the same total KL up to rounding (`largest_difference`, relative). `explorer` is the explorer itself: from
the new state to its published result, with the threads and copies that it has in a notebook. `first` is its first
result on a chain, with the unsteered pass. Seconds are medians over rounds; `cpu_seconds` are of the processor: with
one thread, about the time on a machine that does nothing else. Memory is the increase of the process's peak while one
effect is measured.

Layers are the first, the middle and the last one with every token steered (`all`), and the middle one with the second
half of the chain (`half`); each takes turns with the next layer. `--whole 0` leaves the whole forwards out.

Example: OMP_NUM_THREADS=2 python benchmarks/explorer.py --model FOLDER --dtype bfloat16 --json explorer.json
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch
from attribution import peak_bytes

import lensteer as ls
from lensteer import models
from lensteer.ablation import ForcedChain
from lensteer.forward import forced_logits
from lensteer.metrics import kl_divergence
from lensteer.positions import at
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors, Recipe


@dataclass(frozen=True)
class Config:
    """A checkpoint (None: the organism), its dtype, tokens of the chain and its prompt, rounds, both ways or one."""

    model: str | None = None
    dtype: str = "float32"
    tokens: int = 650
    prompt: int = 60
    rounds: int = 5
    whole: int = 1
    seed: int = 0


def random_chain(model, config: Config) -> Trace:
    """A chain of random tokens: the time does not depend on which they are."""
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(10, int(model.cfg.d_vocab) - 10, (config.tokens,), generator=generator).tolist()
    prompt, response = ids[: config.prompt], ids[config.prompt :]
    text, offsets = models.decode_offsets(model.tokenizer, response)
    task = Task("random", "random", "dev", "random")
    written = model.tokenizer.decode(prompt)
    return Trace(task, written, text, tuple(prompt), tuple(response), tuple(offsets), False)


def random_vectors(model, seed: int) -> BehaviorVectors:
    """A random vector of length 1 for each behavior and layer."""
    n_layers, width = models.n_layers(model), models.d_model(model)
    raw = torch.randn(len(ls.STEERED), n_layers, width, generator=torch.Generator().manual_seed(seed))
    return BehaviorVectors(
        raw=raw / raw.norm(dim=-1, keepdim=True),
        mean_norm=torch.ones(n_layers),
        labels=tuple(ls.STEERED),
        layers=tuple(range(n_layers)),
        counts=dict.fromkeys(ls.STEERED, 1),
        n_traces=1,
        recipe=Recipe(),
    )


def clocked(work: Callable[[], float]) -> tuple[float, float, float]:
    """What a call returns, its seconds, and its seconds of processor time in all threads."""
    wall, processor = time.perf_counter(), time.process_time()
    result = work()
    return result, time.perf_counter() - wall, time.process_time() - processor


def seconds(work: Callable[[], object]) -> float:
    """Seconds that one call takes."""
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def whole_total(model, chain: Trace, unsteered: torch.Tensor, plan: ls.SteeringPlan) -> float:
    """The total KL of a plan, by a forward of the whole chain; compared row by row, as double precision is large."""
    steered = forced_logits(model, [chain.prompt_ids], [chain.response_ids], plans=[plan])[0]
    return sum(float(kl_divergence(p, q).sum()) for p, q in zip(steered.split(2), unsteered.split(2), strict=True))


def effect_total(forced: ForcedChain, plan: ls.SteeringPlan) -> float:
    """The same by the explorer's way."""
    return forced.effect(plan).total


def measured(model, config: Config) -> dict[str, object]:
    """The figures of one loaded model."""
    chain, vectors = random_chain(model, config), random_vectors(model, config.seed)
    direction, middle, last = vectors[ls.STEERED[0]], models.n_layers(model) // 2, models.n_layers(model) - 1
    forced = ForcedChain.of(model, chain)
    first = seconds(lambda: forced.effect(None))
    unsteered = forced_logits(model, [chain.prompt_ids], [chain.response_ids])[0]
    half = (config.prompt + config.tokens) // 2

    def plan_of(layer: int, begin: int, number: int) -> ls.SteeringPlan:
        scope = at(range(begin + number % 5, config.tokens))  # another plan each time
        return ls.SteeringPlan(direction, layer, 1.0 + number / 8, scope, unit="mean_norm")

    found: dict[str, object] = {"seconds.first": first}
    apart = 0.0
    cells = {"first_all": (0, 0), "middle_all": (middle, 0), "middle_half": (middle, half), "last_all": (last, 0)}
    for name, (layer, begin) in cells.items():
        spent: dict[str, list[tuple[float, float]]] = {way: [] for way in ("effect", "whole")[: 1 + config.whole]}
        for number in range(-1 if name == "first_all" else 0, config.rounds):  # the very first one warms up
            plan, totals = plan_of(min(layer + number % 2, last), begin, number), {}
            ways: dict[str, Callable[[], float]] = {
                "whole": partial(whole_total, model, chain, unsteered, plan),
                "effect": partial(effect_total, forced, plan),
            }
            for way in sorted(spent, reverse=bool(number % 2)):
                totals[way], wall, processor = clocked(ways[way])
                if number >= 0:
                    spent[way].append((wall, processor))
            if config.whole:
                apart = max(apart, abs(totals["effect"] / totals["whole"] - 1))
        for way, values in spent.items():
            wall, processor = map(statistics.median, zip(*values, strict=True))
            found |= {f"seconds.{way}.{name}": wall, f"cpu_seconds.{way}.{name}": processor}
        if name == "middle_all":
            for way in spent:
                found[f"peak_bytes.{way}"] = float(peak_bytes(ways[way]))
    found |= {"largest_difference": apart} if config.whole else {}
    return found | {"middle": middle} | live(model, chain, vectors, config, middle)


def live(model, chain: Trace, vectors: BehaviorVectors, config: Config, middle: int) -> dict[str, object]:
    """From a state to its published result, by the explorer's own threads."""
    explorer = ls.explore(model, vectors, [chain], annotator=None)
    try:
        first = seconds(explorer.wait)  # the copies are made before
        layers, positions = [], []
        half = (config.prompt + config.tokens) // 2
        for number in range(config.rounds):
            state = replace(explorer.state, layer=middle + 1 - number % 2, expression="everywhere")
            layers.append(seconds(partial(_shown, explorer, state)))
        for number in range(config.rounds):
            state = replace(
                explorer.state, layer=middle, expression=f"generated & ~first({half - config.prompt + number})"
            )
            positions.append(seconds(partial(_shown, explorer, state)))
    finally:
        explorer.close()
    return {
        "seconds.explorer.first": first,
        "seconds.explorer.middle_all": statistics.median(layers),
        "seconds.explorer.middle_half": statistics.median(positions),
        "most_seconds.explorer": max(layers + positions),
    }


def _shown(explorer, state) -> None:
    explorer.state = state
    explorer.wait()
    assert explorer.result.effect is not None, explorer.error


def main(config: Config) -> dict[str, object]:
    """Figures by name: `seconds.WAY.CELL`, memory, and what was run."""
    model = ls.load_model(config.model, dtype=config.dtype) if config.model else ls.load_model(dtype=config.dtype)
    found = measured(model, config)
    return {
        "model": Path(config.model).name if config.model else "organism",
        "dtype": config.dtype,
        "tokens": config.tokens,
        "threads": torch.get_num_threads(),
        "rounds": config.rounds,
        **found,
    }


def table(found: dict[str, object]) -> str:
    """A row for each layer and first position: seconds of both ways."""
    head = f"{found['model']}, {found['dtype']}, {found['tokens']} tokens, {found['threads']} threads"
    ways = {"whole": "seconds.whole", "effect": "seconds.effect", "explorer": "seconds.explorer"}
    ways |= {f"{way}, cpu": f"cpu_seconds.{way}" for way in ("whole", "effect")}
    lines = [head, f"{'layer, positions':20}" + "".join(f"{way:>14}" for way in ways)]
    for name in ("first_all", "middle_all", "middle_half", "last_all"):
        values = [found.get(f"{key}.{name}") for key in ways.values()]
        cells = "".join(f"{value:14.3f}" if isinstance(value, float) else f"{'':14}" for value in values)
        lines.append(f"{name.replace('_', ', '):20}{cells}")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option, value in vars(Config()).items():
        parser.add_argument(f"--{option}", type=str if option == "model" else type(value), default=value)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    result = main(Config(**given))
    print(table(result))
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")

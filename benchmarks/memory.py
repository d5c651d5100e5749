"""Resident memory over thousands of chains: it should not grow with their number.

One process, the organism or any checkpoint. Chains are the model's own, from `n_tasks` tasks at temperature 1, repeated
under other sample numbers until there are enough; a list of them exists before anything is measured.

- `features`: one `stream_features` over all chains; the resident set at 100, 500, … of them, less that at its begin.
- `vectors`: `fit_vectors` on the first 100, 500, … chains; the peak of each call, less the resident set at its begin.
- `generate`: batches of new chains, none of which is kept; the resident set as in `features`.

`slope` is that of a line through all counts but the first, which fills pools, in MiB per 1,000 chains.
Linux only.

Example: OMP_NUM_THREADS=1 python benchmarks/memory.py --json memory.json
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import partial
from itertools import cycle, islice
from pathlib import Path

import numpy as np
from attribution import peak_bytes

import lensteer as ls
from lensteer.activations import stream_features
from lensteer.traces import Trace


@dataclass(frozen=True)
class Config:
    """A checkpoint (None: the organism), counts to read memory at, tasks, rows of a batch, tokens of a chain."""

    model: str | None = None
    counts: tuple[int, ...] = (100, 500, 1000, 2000)
    n_tasks: int = 100
    batch_size: int = 50
    max_new_tokens: int = 150
    seed: int = 0


def resident() -> int:
    """Bytes of the process that are in memory, once garbage is collected and free memory is given back."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)  # what the allocator keeps would hide what is allocated later
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * int(next(line for line in lines if line.startswith("VmRSS")).split()[1])


def readings(done: Iterator[int], counts: tuple[int, ...]) -> dict[int, float]:
    """Increase of the resident set, in MiB, when each count is reached; `done` yields how many there are so far."""
    begin, left, found = resident(), list(counts), {}
    for n in done:
        while left and n >= left[0]:
            found[left.pop(0)] = (resident() - begin) / 2**20
    assert not left, f"only {n} chains"
    return found


def many_traces(model, tasks: list[ls.Task], config: Config) -> list[Trace]:
    """As many annotated chains as the largest count, with their own sample numbers."""
    own = ls.generate_traces(model, tasks, temperature=1.0, max_new_tokens=config.max_new_tokens, seed=config.seed)
    annotator = ls.grammar if config.model is None else ls.rules
    kept = [trace for trace in ls.annotate(own, annotator) if trace.spans]
    return [replace(trace, sample=i) for i, trace in enumerate(islice(cycle(kept), max(config.counts)))]


def generated(model, tasks: list[ls.Task], config: Config) -> Iterator[int]:
    """Generate batch by batch, keep nothing, and yield how many chains there were."""
    n = 0
    while n < max(config.counts):
        batch = list(islice(cycle(tasks), n % len(tasks), n % len(tasks) + config.batch_size))
        made = ls.generate_traces(
            model, batch, temperature=1.0, max_new_tokens=config.max_new_tokens, seed=config.seed + n
        )
        n += len(made)
        del made
        yield n


def slope(found: dict[int, float]) -> float:
    """MiB per 1,000 chains, by least squares, without the first count."""
    counts = sorted(found)[1:]
    return float(1000 * np.polyfit(counts, [found[n] for n in counts], 1)[0])


def main(config: Config) -> dict[str, object]:
    """MiB by way and count, and each way's slope."""
    model = ls.load_model(config.model) if config.model else ls.load_model()
    tasks = ls.load_tasks("organism" if config.model is None else "builtin", split="train", n=config.n_tasks)
    traces = many_traces(model, tasks, config)
    streamed = (i + 1 for i, _ in enumerate(stream_features(model, traces)))
    ways = {
        "features": readings(streamed, config.counts),
        "vectors": {n: peak_bytes(partial(ls.fit_vectors, model, traces[:n])) / 2**20 for n in config.counts},
        "generate": readings(generated(model, tasks, config), config.counts),
    }
    return {
        "model": Path(config.model).name if config.model else "organism",
        "tokens": sum(len(trace.ids) for trace in traces),
        "total_mib": resident() / 2**20,
        **{f"mib.{way}": {str(n): value for n, value in found.items()} for way, found in ways.items()},
        **{f"slope.{way}": slope(found) for way, found in ways.items()},
    }


def table(found: dict[str, object]) -> str:
    """A row for each way: MiB at every count, and the slope."""
    rows = []
    for way in ("features", "vectors", "generate"):
        values = found[f"mib.{way}"]
        assert isinstance(values, dict)
        if not rows:
            rows.append(f"{'MiB at':10}" + "".join(f"{n:>8}" for n in values) + f"{'per 1000':>10}")
        rows.append(f"{way:10}" + "".join(f"{v:8.1f}" for v in values.values()) + f"{found[f'slope.{way}']:10.2f}")
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--counts", type=int, nargs="+", default=Config().counts)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    result = main(Config(model=given["model"], counts=tuple(sorted(given["counts"]))))
    print(table(result))
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1) + "\n")

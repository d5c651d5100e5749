"""What the benchmarks against peers share: models, the peers' workers, rounds that go on where they stopped, a table.

A cell is one setting (model, threads, batch); its sides take turns within a round, in an order that alternates. Each
round is written as soon as it is complete, and a later call with the same file goes on after it. A ratio is the median
over rounds of the two sides' seconds in the same round, with its smallest and largest value.

On a machine that others use, the seconds of one thread's own CPU time (`cpu_time`) are the steadier clock.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass, fields
from itertools import cycle
from pathlib import Path
from typing import Any, get_args, get_type_hints

import torch
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import lensteer as ls
from lensteer.plots.style import finish

#: Of the settings in a figure.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#332288", "#7B8794")
TICKS = (0.3, 0.5, 0.7, 1, 1.5, 2, 3, 5, 10, 20, 50)
PEERS = ("repeng", "steering-vectors", "nnsight")
WORKER = Path(__file__).resolve().parent / "peer_worker.py"
RANDOM, ORGANISM = "random Qwen2, 12 x 768", "organism"
N_LAYERS, WIDTH, VOCABULARY = 12, 768, 32_000


@contextmanager
def folder_of(model: str) -> Iterator[Path]:
    """The checkpoint of "random", "organism", or a folder."""
    if model not in ("random", ORGANISM):
        yield Path(model)
        return
    if model == ORGANISM:
        yield Path(ls.models.ORGANISM)
        return
    with tempfile.TemporaryDirectory() as made:
        torch.manual_seed(0)
        shape = dict(hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=N_LAYERS, vocab_size=VOCABULARY)
        heads = dict(num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=2048)
        config = Qwen2Config(**shape, **heads, initializer_range=0.05, tie_word_embeddings=True)
        Qwen2ForCausalLM(config).save_pretrained(made)
        AutoTokenizer.from_pretrained(ls.models.ORGANISM).save_pretrained(made)
        yield Path(made)


def plain_model(folder: Path, dtype: str) -> Any:
    """Hugging Face's model, with its fused attention; it never ends a text."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=getattr(torch, dtype), attn_implementation="sdpa")
    model.generation_config.eos_token_id = None
    return model.eval()


def stored_dtype(folder: Path) -> str:
    """The dtype that a checkpoint is stored in."""
    config = json.loads((folder / "config.json").read_text())
    return str(config.get("dtype") or config.get("torch_dtype") or "float32")


class Peer:
    """A peer's worker in its own environment."""

    def __init__(self, python: Path, library: str, request: Path) -> None:
        command = [str(python), str(WORKER), library, str(request)]
        self._log = tempfile.TemporaryFile("w+")  # read if the worker ends early
        pipe = subprocess.PIPE
        self._process = subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=self._log, text=True)
        self.library, self.version = library, ""

    def wait(self) -> None:
        """Until the model is loaded."""
        self.version = str(self._read()["ready"])

    def ask(self, **command: Any) -> dict[str, Any]:
        """Seconds of a task, and its check."""
        assert self._process.stdin is not None
        self._process.stdin.write(json.dumps(command) + "\n")
        self._process.stdin.flush()
        return self._read()

    def close(self) -> None:
        """End the worker."""
        assert self._process.stdin is not None
        self._process.stdin.close()
        self._process.wait(30)
        self._log.close()

    def _read(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            self._log.seek(0)
            raise RuntimeError(f"{self.library} has ended: {self._log.read()[-2000:]}")
        found: dict[str, Any] = json.loads(line)
        return found


@contextmanager
def workers(environments: Path | None, request: Mapping[str, Any]) -> Iterator[tuple[dict[str, Peer], dict[str, str]]]:
    """The peers that have an environment, loaded, and why the others have not been run."""
    running, missing = {}, {}
    with ExitStack() as stack:
        file = Path(stack.enter_context(tempfile.TemporaryDirectory())) / "request.json"
        file.write_text(json.dumps(request))
        for library in PEERS:
            python = None if environments is None else environments / library / "bin" / "python"
            if python is None or not python.exists():
                missing[library] = "not run: --peers has no environment of it"
                continue
            running[library] = Peer(python, library, file)
            stack.callback(running[library].close)
        for peer in running.values():
            peer.wait()
        yield running, missing


@dataclass(frozen=True)
class Comparison:
    """Two sides of one cell.

    Attributes:
        name: "ours_vs_theirs".
        cell: model, threads and batch.
        tokens: that each side processes or writes.
        ours: median seconds of the first side.
        theirs: median seconds of the second.
        ratio: theirs / ours, above 1 if the first is faster: median over rounds.
        low: its smallest value.
        high: its largest value.
        rounds: how many.
        must: the ratio that is asked for.
    """

    name: str
    cell: str
    tokens: int
    ours: float
    theirs: float
    ratio: float
    low: float
    high: float
    rounds: int
    must: float | None = None


def compare(
    name: str, cell: str, tokens: int, ours: Sequence[float], theirs: Sequence[float], must: float | None = None
) -> Comparison:
    """Two sides by their seconds in each round."""
    ratios = [b / a for a, b in zip(ours, theirs, strict=True)]
    middle = statistics.median
    return Comparison(
        name, cell, tokens, middle(ours), middle(theirs), middle(ratios), min(ratios), max(ratios), len(ratios), must
    )


def take_turns(
    sides: Mapping[str, Callable[[], float]], seconds: dict[str, list[float]], rounds: int, until: float
) -> Iterator[None]:
    """Add rounds to `seconds` until there are enough, or the clock (`time.monotonic`) passes `until`.

    Sides that `seconds` lacks or has fewer rounds of begin anew: all sides of a round are measured together.
    """
    done = min((len(seconds.get(name, [])) for name in sides), default=0)
    for name in sides:
        seconds[name] = seconds.get(name, [])[:done]
    for number in range(done, rounds):
        if time.monotonic() > until:
            return
        order = list(sides) if number % 2 else list(sides)[::-1]
        spent = {name: sides[name]() for name in order}
        for name in sides:
            seconds[name].append(spent[name])
        yield


def timed(work: Callable[[], object], cpu_time: bool = False) -> Callable[[], float]:
    """A side that returns its seconds, or those that the process has computed."""
    now = time.process_time if cpu_time else time.perf_counter

    def run() -> float:
        begin = now()
        work()
        return now() - begin

    return run


def matrix_rate(dtype: str) -> float:
    """FLOP/s of a product of matrices of 1024 x 1024 on this machine: the rate that a forward could have."""
    a, b = (torch.randn(1024, 1024).to(getattr(torch, dtype)) for _ in range(2))
    a @ b
    best = min(timed(lambda: a @ b)() for _ in range(10))
    return 2 * 1024**3 / best


def read_cells(path: Path | None) -> dict[str, Any]:
    """The cells of an earlier call."""
    return json.loads(path.read_text())["cells"] if path is not None and path.exists() else {}


def write(path: Path | None, cells: Mapping[str, Any], rows: Sequence[Comparison]) -> None:
    """Cells and rows as JSON."""
    if path is not None:
        path.write_text(json.dumps({"rows": [asdict(row) for row in rows], "cells": cells}, indent=1) + "\n")


def table(rows: Sequence[Comparison], cells: Mapping[str, Any]) -> str:
    """A Markdown table, and what was not run."""
    head = ["comparison", "model", "tokens", "seconds", "of the other", "ratio", "range", "must"]
    lines = [head, ["---"] * len(head)]
    for row in rows:
        must = "" if row.must is None else f"{row.must:g} {'met' if row.ratio >= row.must else 'MISSED'}"
        lines.append(
            [
                *(row.name, row.cell, str(row.tokens), f"{row.ours:.3g}", f"{row.theirs:.3g}", f"{row.ratio:.2f}"),
                *(f"{row.low:.2f} to {row.high:.2f} ({row.rounds})", must),
            ]
        )
    said = ["| " + " | ".join(line) + " |" for line in lines]
    for name, cell in cells.items():
        said += [f"{name}: {library} {why}" for library, why in cell.get("missing", {}).items()]
    return "\n".join(said)


def figure(rows: Sequence[Comparison], title: str) -> go.Figure:
    """Every ratio with its range: a column for each batch, a color for each setting, a line for what was asked."""
    split: list[tuple[Comparison, str, str]] = []
    for row in rows:
        setting, _, batch = row.cell.partition(", batch ")
        split.append((row, setting, batch))
    batches = sorted({batch for *_, batch in split}, key=lambda batch: int(batch or 0))
    settings = list(dict.fromkeys(setting for _, setting, _ in split))
    names = list(dict.fromkeys(row.name for row in rows))[::-1]
    drawn = make_subplots(
        cols=len(batches),
        shared_yaxes=True,
        horizontal_spacing=0.03,
        subplot_titles=[f"batch {batch}" if batch else "" for batch in batches],
    )
    for column, batch in enumerate(batches, 1):
        for setting, shade in zip(settings, cycle(COLORS)):
            there = [row for row, of, at in split if (of, at) == (setting, batch)]
            drawn.add_scatter(
                x=[row.ratio for row in there],
                y=[row.name for row in there],
                orientation="h",
                mode="markers",
                marker=dict(color=shade, size=7),
                error_x=dict(
                    symmetric=False,
                    array=[row.high - row.ratio for row in there],
                    arrayminus=[row.ratio - row.low for row in there],
                    width=2,
                ),
                name=setting,
                legendgroup=setting,
                offsetgroup=setting,
                showlegend=column == 1,
                row=1,
                col=column,
            )
        asked = {row.name: row.must for row, _, at in split if at == batch and row.must is not None}
        for name, must in asked.items():
            place = names.index(name)
            line: dict[str, Any] = dict(x0=must, x1=must, y0=place - 0.45, y1=place + 0.45)
            drawn.add_shape(type="line", **line, line=dict(color="#D55E00", width=2), row=1, col=column)
    finish(drawn, f"{title}<br><sup>ratio of seconds, above 1: lensteer is faster; upright lines: asked for</sup>", 600)
    drawn.update_layout(scattermode="group", height=200 + 12 * len(names) * len(settings), margin_l=10)
    drawn.update_xaxes(type="log", tickvals=TICKS, ticktext=[f"{tick:g}" for tick in TICKS], tickfont=dict(size=11))
    return drawn.update_yaxes(categoryorder="array", categoryarray=names, automargin=True)


def command(benchmark: Mapping[str, Any], title: str) -> None:
    """Run a benchmark from the command line.

    Args:
        benchmark: the globals of its module: `Config`, `main`, `smoke` and `rows_of`.
        title: of the figure.
    """
    parser = argparse.ArgumentParser(
        description=benchmark["__doc__"], formatter_class=argparse.RawDescriptionHelpFormatter
    )
    kinds = get_type_hints(benchmark["Config"])
    for option in fields(benchmark["Config"]):
        name, kind = f"--{option.name.replace('_', '-')}", kinds[option.name]
        if kind is bool:
            parser.add_argument(name, action="store_true")
        else:  # of `Path | None`, the path
            parser.add_argument(name, type=(get_args(kind) or (kind,))[0], default=option.default)
    parser.add_argument("--figure", type=Path)
    parser.add_argument("--smoke", action="store_true")
    given = vars(parser.parse_args())
    picture, small = given.pop("figure"), given.pop("smoke")
    config = benchmark["Config"](**given)
    cells = benchmark["main"](benchmark["smoke"](config) if small else config)
    rows = benchmark["rows_of"](cells)
    write(config.json, cells, rows)
    print(table(rows, cells))
    if picture:
        figure(rows, title).write_image(picture, width=1100)

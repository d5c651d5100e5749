"""What a run would take on GPUs that are not here: memory, time and files, from a model's shape and a few constants.

Each number says what it rests on: "computed" follows from the shape and the settings alone; "measured" was measured,
for the very model and machine; "extrapolated" comes from such a measurement by a rule that was not tried there. The
constants are of a random model of Qwen2.5-7B's shape in bfloat16 on one H100 (`benchmarks/large_models.py`;
`analyses/LOG.md`, 2026-11-27), so that all times of other models are extrapolated.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from lensteer.errors import LensteerError
from lensteer.evaluation import KINDS, POOLS
from lensteer.evaluation.conditions import CONTROL_TEXTS
from lensteer.files import parse_json, read_text
from lensteer.pipeline import RunConfig
from lensteer.pipeline.stages import planned_chains
from lensteer.results import Result, by_topic, reading, revived

if TYPE_CHECKING:
    import pandas as pd

#: The largest size of a shape.
MOST = 10**9
COMPUTED, EXTRAPOLATED = "computed", "extrapolated"
MEASURED = "measured"


@dataclass(frozen=True)
class Shape:
    """A dense decoder's shape.

    Attributes:
        name: of the model.
        n_layers: number of blocks.
        d_model: width of the residual stream.
        n_heads: query heads.
        n_shared: key-value heads.
        d_head: width of a head.
        d_mlp: width of the gated MLP.
        d_vocab: vocabulary.
        tied: the unembedding is the embedding.

    Raises:
        LensteerError: a number below 1 or beyond `MOST`.
    """

    name: str
    n_layers: int
    d_model: int
    n_heads: int
    n_shared: int
    d_head: int
    d_mlp: int
    d_vocab: int
    tied: bool = False

    def __post_init__(self) -> None:
        sizes = {name: n for name, n in vars(self).items() if name not in ("name", "tied")}
        if wrong := {name: n for name, n in sizes.items() if not 1 <= n <= MOST}:
            raise LensteerError(f"a shape with {wrong}: give numbers from 1 to {MOST:,}")

    @property
    def parameters(self) -> int:
        """Number of weights, without biases."""
        attention = 2 * self.d_model * self.d_head * (self.n_heads + self.n_shared)
        block = attention + 3 * self.d_model * self.d_mlp + 2 * self.d_model
        return self.n_layers * block + self.d_model + (1 if self.tied else 2) * self.d_vocab * self.d_model

    @property
    def cache_bytes(self) -> int:
        """Keys and values of one token, in 16 bits."""
        return 2 * 2 * self.n_layers * self.n_shared * self.d_head


#: Shapes as published: of Qwen2.5 7B, 14B and 32B, and of Llama 3 70B.
SHAPES = {
    "7B": Shape("7B", 28, 3584, 28, 4, 128, 18944, 152064),
    "14B": Shape("14B", 48, 5120, 40, 8, 128, 13824, 152064),
    "32B": Shape("32B", 64, 5120, 40, 8, 128, 27648, 152064),
    "70B": Shape("70B", 80, 8192, 64, 8, 128, 28672, 128256),
}


@dataclass(frozen=True)
class Gpus:
    """GPUs of one kind. The defaults are what the vendor states of an H100.

    Attributes:
        n: how many there are.
        memory: of each, in GB.
        tflops: dense, in 16 bits, of each.
        bandwidth: of the memory of each, in TB/s.
    """

    n: int = 1
    memory: float = 80.0
    tflops: float = 989.0
    bandwidth: float = 3.35


# Constants measured on one H100 at 7B.
#: Parameters of the model that was measured.
_P = SHAPES["7B"].parameters
#: Seconds per block of a decode step that waits for the host: batches 1, 16 and 64 took 22.9, 22.6 and 22.5 ms.
LAUNCH = 22.6e-3 / 28
#: Part of the stated operations per second that sums of activations reached: 1,630 tokens in 0.17 s. So short a call
#: reaches less than long ones, so that times lean high: at batch 64, 2,300 tokens/s are planned, 2,843 were measured.
REACHED = 2 * _P * 1630 / 0.17 / 989e12
#: Seconds per row of exact attribution and per span of Fisher attribution: 1,870 rows in 1.3 s, 64 spans in 0.8 s.
ROW, FISHER = 1.3 / 1870, 0.8 / 64
#: GB beyond weights and cache: 0.77 GiB in attribution.
WORK = 0.77 * 2**30 / 1e9
#: Bytes on disk per token of a chain, with annotation and without (mini-R1's and the organism's runs).
ANNOTATED, PLAIN = 21.0, 14.0
#: Part of a GPU's memory that is planned with; rows that an actor's cache should have room for.
USABLE, MIN_ROWS = 0.9, 16


@dataclass(frozen=True)
class Figure:
    """One planned number.

    Attributes:
        topic: a stage, or "model" or "GPUs".
        name: what it is.
        value: in `unit`.
        unit: "GB", "s", "MB" or "" for a count.
        basis: "computed", "measured" or "extrapolated".
    """

    topic: str
    name: str
    value: int | float
    unit: str
    basis: str

    def __str__(self) -> str:
        value, unit = self.value, self.unit
        if unit == "s" and value >= 90:
            value, unit = (value / 3600, "h") if value >= 5400 else (value / 60, "min")
        return f"{value:,.0f}" if not unit else f"{value:,.3g} {unit}" if value < 1000 else f"{value:,.0f} {unit}"


@dataclass(frozen=True, repr=False)
class RunPlan(Result):
    """What a run would take.

    Attributes:
        shape: of the model.
        gpus: that it runs on.
        figures: in the order of the stages.
    """

    shape: Shape
    gpus: Gpus
    figures: tuple[Figure, ...]

    def __getitem__(self, name: str) -> int | float:
        """A figure by "topic.name"."""
        return {f"{figure.topic}.{figure.name}": figure.value for figure in self.figures}[name]

    @property
    def seconds(self) -> float:
        """Of all stages that are planned."""
        return sum(figure.value for figure in self.figures if figure.unit == "s")

    def to_dataframe(self) -> pd.DataFrame:
        """A row per figure."""
        import pandas as pd

        return pd.DataFrame([vars(figure) for figure in self.figures])

    def __str__(self) -> str:
        width = max(len(figure.name) for figure in self.figures)
        lines = by_topic((f.topic, f"   {f.name:<{width}}  {f!s:>11}  {f.basis}") for f in self.figures)
        whole = Figure("", "", self.seconds, "s", "")
        return "\n".join(
            [
                *lines,
                "all stages",
                f"   {'time':<{width}}  {whole!s:>11}  {EXTRAPOLATED}",
                "Times are from a model of 7B on one H100; annotation and loading are not in them. "
                "No larger model was run.",
            ]
        )


def shape_of(size: str) -> Shape:
    """A shape by its name in `SHAPES`, or of a checkpoint's folder.

    Raises:
        LensteerError: neither, or a config.json that lacks a size.
    """
    if size.upper() in SHAPES:
        return SHAPES[size.upper()]
    path = Path(size) / "config.json"
    if not path.is_file():
        raise LensteerError(f"no shape {size!r}: choose one of {list(SHAPES)}, or a checkpoint's folder")
    with reading(path, f"give a dense decoder's folder, or one of {list(SHAPES)}"):
        c: dict[str, Any] = parse_json(read_text(path), path)
        heads = c["num_attention_heads"]
        sizes = dict(
            n_layers=c["num_hidden_layers"],
            d_model=c["hidden_size"],
            n_heads=heads,
            n_shared=c.get("num_key_value_heads") or heads,
            d_head=c.get("head_dim") or c["hidden_size"] // heads,
            d_mlp=c["intermediate_size"],
            d_vocab=c["vocab_size"],
            tied=c.get("tie_word_embeddings", False),
        )
        return cast(Shape, revived(Shape, {"name": Path(size).resolve().name, **sizes}))


def plan_run(shape: Shape, config: RunConfig, gpus: Gpus | None = None, *, prompt: int = 150) -> RunPlan:
    """Plan a run on actors that each hold the model in bfloat16, on as many GPUs as it takes.

    With the batch b of rows of mean length t, a decode step takes max(layers · launch, max(weights / bandwidth,
    2 · parameters · b / rate) + b · t · cache bytes / bandwidth): what the host takes to start it, or what the GPU
    takes. GPUs of one actor work one after another (`device_map`), so that they add memory, not speed.

    Args:
        shape: of the model.
        config: of the run: numbers of tasks, chains and tokens; its `batch_size` is lowered to what fits.
        gpus: by default one H100.
        prompt: tokens of a prompt, template included.

    Raises:
        LensteerError: sizes that are not positive, or too little memory.
    """
    gpus = gpus or Gpus()
    for name, value in (*vars(gpus).items(), ("prompt", prompt)):
        if not 0 < value < math.inf:
            raise LensteerError(f"{name}={value}: give a positive number")
    return RunPlan(shape, gpus, tuple(_figures(shape, config, gpus, prompt)))


def _figures(shape: Shape, c: RunConfig, gpus: Gpus, prompt: int) -> Iterator[Figure]:
    size = shape.parameters / _P
    weights = 2 * shape.parameters / 1e9
    row = shape.cache_bytes * (prompt + max(c.train_tokens, c.max_new_tokens)) / 1e9
    each = next((k for k in range(1, gpus.n + 1) if USABLE * k * gpus.memory >= weights + WORK + MIN_ROWS * row), 0)
    if not each:
        raise LensteerError(
            f"{gpus.n} GPU(s) of {gpus.memory:g} GB do not hold {shape.name}, with {weights:.0f} GB of weights and "
            f"{row:.2g} GB of cache per row: give more of them"
        )
    batch = min(c.batch_size, int((USABLE * each * gpus.memory - weights - WORK) / row))
    n = gpus.n // each
    rate, bandwidth = REACHED * gpus.tflops * 1e12, gpus.bandwidth * 1e12

    def decoding(chains: int, tokens: int) -> float:
        """Seconds to generate chains, on all actors; whole batches of one actor after another."""
        rows = min(batch, max(1, math.ceil(chains / n)))
        gpu = max(2 * shape.parameters / bandwidth, 2 * shape.parameters * rows / rate)
        gpu += rows * (prompt + tokens / 2) * shape.cache_bytes / bandwidth
        prefill = 2 * shape.parameters * rows * prompt / rate
        batches = math.ceil(chains / rows / n)
        return batches * (prefill + tokens * max(shape.n_layers * LAUNCH, gpu))

    def reading(chains: int, tokens: int) -> float:
        """Seconds of forwards over whole chains."""
        return 2 * shape.parameters * chains * (prompt + tokens) / rate / n

    def count(topic: str, name: str, value: int) -> Figure:
        return Figure(topic, name, value, "", COMPUTED)

    def seconds(topic: str, name: str, value: float) -> Figure:
        return Figure(topic, name, value, "s", EXTRAPOLATED)

    def files(topic: str, n_bytes: float) -> Figure:
        return Figure(topic, "files", n_bytes / 1e6, "MB", EXTRAPOLATED)

    yield count("model", "parameters", shape.parameters)
    yield Figure("model", "weights", weights, "GB", COMPUTED)
    yield Figure("model", "cache of a row", row, "GB", COMPUTED)
    yield count("GPUs", "per actor", each)
    yield count("GPUs", "actors", n)
    yield count("GPUs", "rows per batch", batch)
    basis = MEASURED if shape == SHAPES["7B"] and gpus == replace(Gpus(), n=gpus.n) else EXTRAPOLATED
    yield Figure("GPUs", "memory beyond weights and cache", WORK, "GB", basis)
    yield Figure("GPUs", "memory of an actor", weights + WORK + batch * row, "GB", EXTRAPOLATED)

    tokens = c.n_train * c.train_tokens
    yield count("traces", "chains", c.n_train)
    yield seconds("traces", "time", decoding(c.n_train, c.train_tokens))
    yield files("traces", PLAIN * (tokens + c.n_train * prompt))
    yield files("annotate", ANNOTATED * (tokens + c.n_train * prompt))

    behaviors, controls = len(c.behaviors), max(c.n_score_controls, c.n_controls)
    cells = shape.n_layers * shape.d_model
    yield seconds("vectors", "time", reading(c.n_train, c.train_tokens))
    yield Figure("vectors", "files", 4 * cells * (behaviors + controls * (2 + behaviors)) / 1e6, "MB", COMPUTED)
    yield Figure("vectors", "sums of an actor", 16 * behaviors * (1 + controls) * cells / 1e9, "GB", COMPUTED)

    spans = c.max_spans * behaviors
    yield count("attribute", "rows", spans * shape.n_layers)
    yield seconds("attribute", "time, exact", spans * shape.n_layers * ROW * size / n)
    yield seconds("attribute", "time, Fisher", spans * FISHER * size / n)

    chains = planned_chains(c, c.behaviors, n_layers=behaviors)
    judged = (1 + len(KINDS) * behaviors * len(c.coefficients)) * min(c.quality // 2, c.n_dev * c.dev_samples)
    yield count("select", "chains", chains["coefficients"])
    yield seconds("select", "time of chains", decoding(chains["coefficients"], c.max_new_tokens))
    yield seconds("select", "time of text quality", reading(2 * judged, c.max_new_tokens))

    own, few = chains["own"] + chains["controls"], min(CONTROL_TEXTS, c.n_test)
    judged = (1 + (len(KINDS) + 1) * behaviors) * min(c.quality, c.n_test * c.n_samples)
    judged += few * c.n_controls * len(POOLS) * behaviors
    yield count("evaluate", "chains", own)
    yield seconds("evaluate", "time of chains", decoding(own, c.max_new_tokens))
    yield seconds("evaluate", "time of text quality", reading(2 * judged, c.max_new_tokens))
    yield files("evaluate", PLAIN * own * c.max_new_tokens)

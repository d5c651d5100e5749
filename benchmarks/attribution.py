"""Attribution compared with the published script's pattern and with brute-force patched forwards.

One process, one random Qwen2 (12 layers, d_model 768, 32 000 tokens) or any checkpoint, the same chains of about 600
tokens with 30 spans and four behaviors; all take turns in rounds, and times are medians. The other implementations are
plain:

- published: per label, a forward of the text up to each span of another label and a backward of the published loss,
  with the residual stream of all layers kept; parameters are frozen, which saves their gradients.
- brute force: a forward of the whole chain per span (of the vector's own behavior) and layer, patched by a hook.

With LENSTEER_REFERENCE set to the folder of published chains, `--real` takes those of R1-Distill-Qwen-1.5B instead,
under a tokenizer trained on them, with GPT-4o's spans.

`fisher` scores the same pairs of span and label as the published pattern, `exact` the same cells as brute force.

The other implementations would take many minutes, so an evenly spaced sample of their cells is timed and scaled up.
Memory is the increase of the process's peak, for a `fisher` call and of a plain forward of the longest chain.

Example: OMP_NUM_THREADS=2 python benchmarks/attribution.py --json attribution.json
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import re
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tokenizers import ByteLevelBPETokenizer
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import lensteer as ls
from lensteer.annotation.alignment import align
from lensteer.behaviors import Sentence, Span
from lensteer.tasks import Task
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors, Controls, Recipe

N_LAYERS, WIDTH, VOCABULARY = 12, 768, 32_000
N_SCORE_CONTROLS = 200  # in each of two pools
REFERENCE, CHAINS = "LENSTEER_REFERENCE", "r1_qwen_1.5b_annotated_chains.jsonl"


@dataclass(frozen=True)
class Config:
    """A checkpoint (None: a random model), chains, rounds, and cells of the slow implementations timed per round."""

    model: str | None = None
    n_traces: int = 2
    rounds: int = 3
    sampled_cells: int = 6
    samples: int = 8
    seed: int = 0
    real: bool = False


def random_model(folder: Path):
    """A random Qwen2, saved and loaded as any other checkpoint; its tokenizer is the organism's."""
    torch.manual_seed(0)
    shape = dict(hidden_size=WIDTH, intermediate_size=2048, num_hidden_layers=N_LAYERS, vocab_size=VOCABULARY)
    heads = dict(num_attention_heads=12, num_key_value_heads=4, max_position_embeddings=1024, initializer_range=0.05)
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads, tie_word_embeddings=True)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ls.models.ORGANISM).save_pretrained(folder)
    return ls.load_model(folder)


def random_traces(config: Config, vocabulary: int) -> list[Trace]:
    """Chains of about 600 random tokens: a prompt of 60 and 30 spans of about 18, the behaviors in turn."""
    generator = torch.Generator().manual_seed(config.seed)
    traces = []
    for t in range(config.n_traces):
        lengths = torch.randint(14, 23, (30,), generator=generator).tolist()
        total = sum(lengths)
        ids = torch.randint(10, vocabulary, (60 + total,), generator=generator).tolist()
        spans, at = [], 0
        for s, length in enumerate(lengths):
            spans.append(Span(ls.STEERED[s % 4], 60 + at, 60 + at + length, at, at + length))
            at += length
        task = Task(f"random-{t}", "random", "train", "", None, None)
        offsets = tuple(range(total))
        traces.append(Trace(task, "", "x" * total, tuple(ids[:60]), tuple(ids[60:]), offsets, True, spans=tuple(spans)))
    return traces


def real_traces(config: Config, vocabulary: int) -> list[Trace]:
    """Published annotated chains of 20 to 40 spans, nearest to 600 tokens under a byte-level BPE trained on them."""
    if config.model is not None:
        raise ls.LensteerError("--real trains a tokenizer for the random model: leave --model out")
    if REFERENCE not in os.environ:
        raise ls.LensteerError(f"--real needs {REFERENCE}: the folder that holds {CHAINS}")
    lines = (Path(os.environ[REFERENCE]) / CHAINS).read_text("utf-8").splitlines()
    chains = [json.loads(line) for line in lines]
    tokenizer = ByteLevelBPETokenizer()
    tokenizer.train_from_iterator([chain["response"] for chain in chains], vocabulary, show_progress=False)
    traces = []
    for number, chain in enumerate(chains):
        encoded, text = tokenizer.encode(chain["response"]), chain["response"]
        parts = re.findall(r'\["(\S+?)"\](.*?)\["end-section"\]', chain["annotated"], re.DOTALL)
        said = [Sentence(label, part) for label, part in parts if label in ls.BEHAVIORS and part.strip()]
        offsets = tuple(begin for begin, _ in encoded.offsets)
        task, prompt = Task(f"real-{number}", "real", "train", "", None, None), tuple(encoded.ids[:1])
        spans = tuple(align(said, text, offsets, prompt_length=1).spans)
        traces.append(Trace(task, "", text, prompt, tuple(encoded.ids), offsets, True, spans=spans))
    usual = [trace for trace in traces if 20 <= len(trace.spans) <= 40]
    return sorted(usual, key=lambda trace: abs(len(trace.ids) - 600))[: config.n_traces]


def random_vectors(model) -> BehaviorVectors:
    """Four random vectors and 200 control vectors of each pool, with this model's fingerprint."""
    generator = torch.Generator().manual_seed(1)

    n_layers, width = ls.models.n_layers(model), ls.models.d_model(model)

    def draw(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, n_layers, width, generator=generator)

    return BehaviorVectors(
        raw=draw(4),
        mean_norm=torch.full((n_layers,), 10.0),
        labels=tuple(ls.STEERED),
        layers=tuple(range(n_layers)),
        counts=dict.fromkeys(ls.STEERED, 1),
        n_traces=1,
        recipe=Recipe(),
        provenance={"model": ls.models.fingerprint(model).to_dict()},
        controls=Controls(draw(N_SCORE_CONTROLS), draw(N_SCORE_CONTROLS), draw(N_SCORE_CONTROLS, 4)),
    )


def published_seconds(
    model, traces: list[Trace], vectors: BehaviorVectors, n_cells: int, now: Callable[[], float] = time.perf_counter
) -> float:
    """The published pattern, timed on some of its (label, span) pairs and scaled to all."""
    pairs = [(t, s, b) for b in vectors.labels for t in traces for s in t.spans if s.label != b]
    units = torch.nn.functional.normalize(vectors.raw, dim=-1)

    def one(trace: Trace, span: Span, behavior: str) -> None:
        kept: dict[int, torch.Tensor] = {}

        def keep_at(layer: int):
            def keep(resid: torch.Tensor, hook) -> torch.Tensor:
                kept[layer] = resid if layer > min(vectors.layers) else resid.requires_grad_()
                return kept[layer]

            return ls.models.resid_hook(layer), keep

        with model.hooks(fwd_hooks=[keep_at(layer) for layer in vectors.layers]):
            logits = model(torch.tensor([list(trace.ids[: span.start])]))[0, -1]
        log_p = logits.log_softmax(-1)
        loss = torch.nn.functional.kl_div(log_p, log_p.detach(), reduction="sum") / len(log_p)
        gradients = torch.autograd.grad(loss, [kept[layer] for layer in vectors.layers])
        at = torch.stack([gradient[0, -1] for gradient in gradients])
        (at * units[vectors.labels.index(behavior)]).sum(-1).abs()

    return _scaled(one, pairs, n_cells, now)


def brute_force_seconds(model, traces: list[Trace], vectors: BehaviorVectors, n_cells: int) -> float:
    """Patched forwards, timed on some (span, layer) pairs and scaled to all."""
    spans = [(t, s) for t in traces for s in t.spans if s.label in ls.STEERED]
    pairs = [(t, s, layer) for t, s in spans for layer in range(ls.models.n_layers(model))]

    def one(trace: Trace, span: Span, layer: int) -> None:
        added = vectors[span.label].scaled(layer)

        def patch(resid: torch.Tensor, hook) -> torch.Tensor:
            resid = resid.clone()
            resid[0, span.onset] += added
            return resid

        with torch.no_grad():
            model.run_with_hooks(torch.tensor([list(trace.ids)]), fwd_hooks=[(ls.models.resid_hook(layer), patch)])[
                0, span.onset
            ].log_softmax(-1)

    return _scaled(one, pairs, n_cells)


def _scaled(
    run: Callable[..., None], cells: list[tuple], n: int, now: Callable[[], float] = time.perf_counter
) -> float:
    chosen = [cells[i] for i in torch.linspace(0, len(cells) - 1, n).round().long().tolist()]
    began = now()
    for cell in chosen:
        run(*cell)
    return (now() - began) / len(chosen) * len(cells)


def _timed(run: Callable[[], object]) -> float:
    began = time.perf_counter()
    run()
    return time.perf_counter() - began


def peak_bytes(run: Callable[[], object]) -> int:
    """Increase of the peak resident set size, by Linux' high-water mark."""

    def status(name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return 1024 * int(next(line for line in lines if line.startswith(name)).split()[1])

    ctypes.CDLL(None).malloc_trim(0)  # memory that the allocator keeps would hide new allocations
    before = status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    run()
    return status("VmHWM") - before


def main(config: Config) -> dict[str, float | str]:
    """Ratios by name (larger is better, except memory), and the underlying seconds and bytes."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder)) if config.model is None else ls.load_model(config.model)
    vocabulary, vectors = int(model.cfg.d_vocab), random_vectors(model)
    traces = (real_traces if config.real else random_traces)(config, vocabulary)
    longest = max(traces, key=lambda trace: len(trace.ids))

    def forward() -> None:
        with torch.no_grad():
            model(torch.tensor([list(longest.ids)]))

    def fisher(some: list[Trace] = traces, n_controls: int = 0) -> None:
        ls.attribute(
            model, some, vectors, method="fisher", spans="other", samples=config.samples, n_controls=n_controls
        )

    forward()  # warm
    fisher(traces[:1])
    memory = {"forward": peak_bytes(forward), "fisher": peak_bytes(lambda: fisher([longest]))}
    runs: dict[str, Callable[[], float]] = {
        "fisher": lambda: _timed(fisher),
        "fisher_400_nulls": lambda: _timed(lambda: fisher(n_controls=N_SCORE_CONTROLS)),
        "exact": lambda: _timed(lambda: ls.attribute(model, traces, vectors)),
        "published": lambda: published_seconds(model, traces, vectors, config.sampled_cells),
        "brute_force": lambda: brute_force_seconds(model, traces, vectors, config.sampled_cells),
    }
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for _ in range(config.rounds):
        for name, run in runs.items():
            seconds[name].append(run())
    median = {name: statistics.median(values) for name, values in seconds.items()}
    tokens = sum(len(trace.ids) for trace in traces)
    parameters = sum(p.numel() for p in model.original_model.parameters()) - vocabulary * ls.models.d_model(model)
    return {
        "model": "random" if config.model is None else Path(config.model).name,
        "fisher_vs_published": median["published"] / median["fisher"],
        "fisher_400_nulls_vs_published": median["published"] / median["fisher_400_nulls"],
        "exact_vs_published": median["published"] / median["exact"],
        "exact_vs_brute_force": median["brute_force"] / median["exact"],
        "fisher_peak_vs_forward": memory["fisher"] / max(memory["forward"], 1),
        **{f"seconds.{name}": value for name, value in median.items()},
        **{f"peak_bytes.{name}": float(value) for name, value in memory.items()},
        "floor_flop.one_forward": 2.0 * tokens * parameters,
        "threads": float(torch.get_num_threads()),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in vars(Config()).items():
        kind = dict(action="store_true") if value is False else dict(type=str if value is None else int, default=value)
        parser.add_argument(f"--{name.replace('_', '-')}", **kind)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    result = main(Config(**given))
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1))

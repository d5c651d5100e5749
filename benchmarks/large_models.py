"""A model of 7B size on a GPU: decoding compared with Hugging Face's, device maps, the doctor, attribution.

The model has Qwen2.5-7B's shape and random weights in bfloat16, made on the device; only a tokenizer is read. Steps:

- `generate`: tokens per second and peak memory of lensteer's greedy decoding, unsteered and steered at one middle
  layer, beside Hugging Face's `generate` on the same parameters. Prompts have different lengths, so batches are
  padded. Sides take turns in going first; a ratio is the median over rounds, with its range. Then the host waits for
  the GPU that PyTorch reports, per token and line of code.
- `device_map`: a small checkpoint, loaded through several device maps, compared with a plain load.
- `doctor`: `lensteer.doctor.diagnose`, whose checks include the rounding of cached and padded passes.
- `attribute`: time and peak memory of vectors and attribution on chains of 800 tokens with 32 spans each.

The result is written after each batch and each step. A step that fails is reported, and the others still run.

Example: python benchmarks/large_models.py --tokenizer HuggingFaceTB/SmolLM2-135M-Instruct --out large_models.json
"""

from __future__ import annotations

import argparse
import gc
import json
import statistics
import sys
import tempfile
import time
import traceback
import warnings
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, AutoTokenizer, Qwen2Config

import lensteer as ls
from lensteer import models, twins
from lensteer.behaviors import Span
from lensteer.doctor import diagnose
from lensteer.generation import generate

LARGE = dict(
    hidden_size=3584,
    num_hidden_layers=28,
    num_attention_heads=28,
    num_key_value_heads=4,
    intermediate_size=18944,
    vocab_size=152064,
)
SMALL = dict(
    hidden_size=1024,
    num_hidden_layers=8,
    num_attention_heads=16,
    num_key_value_heads=4,
    intermediate_size=4096,
    vocab_size=0,  # the tokenizer's
)
TINY = dict(
    hidden_size=64,
    num_hidden_layers=2,
    num_attention_heads=4,
    num_key_value_heads=2,
    intermediate_size=128,
    vocab_size=0,
)
LABELS = ("deduction", "backtracking", "uncertainty-estimation", "example-testing")
STEPS = ("generate", "device_map", "doctor", "attribute")


@dataclass(frozen=True)
class Config:
    """A tokenizer's folder or name, the steps, and the sizes of decoding.

    `seconds` bounds the rounds of one batch: after two rounds, none begins later than that. `tiny` replaces model and
    sizes by ones for a CPU.
    """

    tokenizer: str
    steps: tuple[str, ...] = STEPS
    batches: tuple[int, ...] = (1, 16, 64)
    prompt: int = 100
    new_tokens: int = 128
    rounds: int = 5
    seconds: float = 20.0
    spans: int = 32
    tiny: bool = False
    seed: int = 0
    out: Path | None = None


def say(text: str) -> None:
    """Print at once."""
    print(text, flush=True)


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def gib() -> float:
    """Memory that tensors take on the GPU, in GiB."""
    return torch.cuda.memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0


def timed(work: Callable[[], object]) -> tuple[float, float, Any]:
    """Seconds of a call, the peak of GPU memory during it in GiB (0 on a CPU), and its result."""
    wait()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    begin = time.perf_counter()
    result = work()
    wait()
    spent = time.perf_counter() - begin
    return spent, torch.cuda.max_memory_allocated() / 2**30 if torch.cuda.is_available() else 0.0, result


def random_weights(shape: dict[str, int], tokenizer: Any, device: str) -> Any:
    """A random model in bfloat16, made on the device. It never ends by itself: ends of text have the logit 0."""
    sizes = shape | dict(vocab_size=max(shape["vocab_size"], len(tokenizer)))
    ends = dict(eos_token_id=tokenizer.eos_token_id, bos_token_id=None, pad_token_id=tokenizer.eos_token_id)
    config = Qwen2Config(**sizes, **ends, max_position_embeddings=32768, tie_word_embeddings=False)
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16, attn_implementation="sdpa").eval()
    with torch.no_grad():
        model.lm_head.weight[tokenizer.eos_token_id] = 0  # the largest of many random logits is positive
    return model


def on_same_parameters(plain: Any) -> Any:
    """A second Hugging Face model on the same parameters: a bridge replaces modules of the one that it wraps."""
    with torch.device("meta"):
        config = Qwen2Config(**plain.config.to_dict())
        second = AutoModelForCausalLM.from_config(config, dtype=plain.dtype, attn_implementation="sdpa")
    second.load_state_dict(plain.state_dict(), assign=True)
    second.model.rotary_emb = type(second.model.rotary_emb)(config=config).to(plain.device)
    return second.eval()


@dataclass
class Bench:
    """What the steps share, made when it is first needed, and what they found."""

    config: Config
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    found: dict[str, Any] = field(default_factory=dict)

    @cached_property
    def tokenizer(self) -> Any:
        """The given tokenizer."""
        return AutoTokenizer.from_pretrained(self.config.tokenizer)

    @cached_property
    def words(self) -> list[int]:
        """Ids of whole words, to write random text with."""
        texts = self.tokenizer.batch_decode([[i] for i in range(min(8000, len(self.tokenizer)))])
        return [i for i, text in enumerate(texts) if text.strip().isascii() and text.strip().isalpha()]

    @cached_property
    def plain(self) -> Any:
        """The large model, as Hugging Face runs it."""
        shape = TINY if self.config.tiny else LARGE
        spent, _, model = timed(lambda: random_weights(shape, self.tokenizer, self.device))
        n = sum(p.numel() for p in model.parameters())
        self.found["parameters"], self.found["weights_gib"] = n, sum(p.nbytes for p in model.parameters()) / 2**30
        say(f"model: {n / 1e6:,.1f} M parameters, {self.found['weights_gib']:.2f} GiB, made in {spent:.1f} s")
        return model

    @cached_property
    def model(self) -> Any:
        """The bridge on the same parameters."""
        second, before = on_same_parameters(self.plain), gib()
        spent, _, bridge = timed(lambda: ls.load_model(second, tokenizer=self.tokenizer))
        twin = twins.plain_twin(bridge) is not None
        self.found["load"] = dict(seconds=spent, added_gib=gib() - before, plain_twin=twin)
        say(f"load_model: {spent:.1f} s, {gib() - before:+.3f} GiB with its plain twin ({twin})")
        return bridge

    def ids(self, n: int, generator: torch.Generator) -> list[int]:
        """Random words."""
        return [self.words[i] for i in torch.randint(len(self.words), (n,), generator=generator).tolist()]

    def write(self) -> None:
        """Write what was found so far."""
        if self.config.out is not None:
            self.config.out.write_text(json.dumps(self.found, indent=1), encoding="utf-8")


def decoding(bench: Bench) -> None:
    """Tokens per second and peak memory by batch."""
    config, model, plain = bench.config, bench.model, bench.plain
    width, n_layers = models.d_model(model), models.n_layers(model)
    generator = torch.Generator().manual_seed(config.seed)
    direction = ls.Direction(
        "random", torch.randn(n_layers, width, generator=generator), torch.ones(n_layers), tuple(range(n_layers))
    )
    plan = ls.SteeringPlan(direction, n_layers // 2, 4.0, scope=ls.generated, unit="unit")
    rows: dict[str, Any] = {}
    bench.found["generate"] = dict(new_tokens=config.new_tokens, prompt=config.prompt, batches=rows)
    head = f"{'batch':>5}  {'side':<17}{'tokens/s':>10}{'ms/step':>9}{'peak GiB':>10}{'same start':>12}"
    say(f"{head}{'speed / Hugging Face':>26}")
    for batch in config.batches:
        spread = config.prompt // 10
        lengths = torch.randint(config.prompt - spread, config.prompt + spread + 1, (batch,), generator=generator)
        prompts = [bench.ids(length, generator) for length in lengths.tolist()]
        sides: dict[str, Callable[[int], list[list[int]]]] = {
            "hugging_face": partial(theirs, plain, prompts),
            "lensteer": partial(ours, model, prompts, None),
            "lensteer_steered": partial(ours, model, prompts, plan),
        }
        rows[str(batch)] = raced(sides, batch, config)
        for name, row in rows[str(batch)].items():
            low, high = row["speed_range"]
            say(
                f"{batch:>5}  {name:<17}{row['tokens_per_second']:>10,.1f}{row['ms_per_step']:>9.2f}"
                f"{row['peak_gib']:>10.2f}{row['same_start']:>12.0%}{row['speed']:>10.3f} ({low:.3f} to {high:.3f})"
            )
        bench.write()
    if bench.device == "cuda":
        bench.found["generate"]["waits_per_token"] = {name: waits(work) for name, work in sides.items()}
        for name, lines in bench.found["generate"]["waits_per_token"].items():
            say(f"host waits per token, {name}: {sum(lines.values()):.1f}")
            for line, count in lines.items():
                say(f"  {count:5.1f}  {line}")


def raced(sides: dict[str, Callable[[int], list[list[int]]]], batch: int, config: Config) -> dict[str, dict[str, Any]]:
    """Seconds, memory and paired ratios of the sides, which take turns in going first. The first side is the base.

    `same_start` is the share of rows whose first new token is that of the base.
    """
    names, n = list(sides), config.new_tokens
    seconds: dict[str, list[float]] = {name: [] for name in names}
    peaks = dict.fromkeys(names, 0.0)
    first = {name: [row[0] for row in sides[name](min(n, 8))] for name in names}  # also warms up
    begin = time.perf_counter()
    for number in range(config.rounds):
        if number >= 2 and time.perf_counter() - begin > config.seconds:
            break
        at = number % len(names)
        for name in names[at:] + names[:at]:
            spent, peak, rows = timed(partial(sides[name], n))
            assert [len(row) for row in rows] == [n] * batch, f"{name}: a row ended early"
            seconds[name].append(spent)
            peaks[name] = max(peaks[name], peak)
    found = {}
    for name in names:
        middle = statistics.median(seconds[name])
        ratios = [base / own for base, own in zip(seconds[names[0]], seconds[name], strict=True)]
        found[name] = dict(
            tokens_per_second=batch * n / middle,
            ms_per_step=1e3 * middle / n,
            peak_gib=peaks[name],
            speed=statistics.median(ratios),
            speed_range=(min(ratios), max(ratios)),
            same_start=sum(a == b for a, b in zip(first[name], first[names[0]], strict=True)) / batch,
            seconds=seconds[name],
        )
    return found


def ours(model: Any, prompts: list[list[int]], plan: ls.SteeringPlan | None, n: int) -> list[list[int]]:
    """New tokens of lensteer's greedy decoding."""
    plans = None if plan is None else [plan] * len(prompts)
    return [list(row.ids) for row in generate(model, prompts, max_new_tokens=n, plans=plans)]


@torch.inference_mode()
def theirs(plain: Any, prompts: list[list[int]], n: int) -> list[list[int]]:
    """New tokens of Hugging Face's greedy decoding."""
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in prompts], device=plain.device)
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in prompts], device=plain.device)
    return plain.generate(input_ids=ids, attention_mask=mask, max_new_tokens=n, do_sample=False)[:, width:].tolist()


def waits(work: Callable[[int], object], n: int = 9) -> dict[str, float]:
    """How often the host waits for the GPU, by line, per token after the first."""

    def counted(tokens: int) -> Counter[str]:
        with warnings.catch_warnings(record=True) as said:
            warnings.simplefilter("always")
            torch.cuda.set_sync_debug_mode("warn")
            try:
                work(tokens)
            finally:
                torch.cuda.set_sync_debug_mode("default")
        return Counter(
            f"{'/'.join(Path(w.filename).parts[-2:])}:{w.lineno}"
            for w in said
            if "called a synchronizing" in str(w.message)
        )

    work(1)
    one, many = counted(1), counted(n)
    return {line: (many[line] - one[line]) / (n - 1) for line, _ in many.most_common() if many[line] > one[line]}


def device_maps(bench: Bench) -> None:
    """Logits and greedy tokens of a small checkpoint by device map, compared with a plain load."""
    found: dict[str, str] = {}
    bench.found["device_map"] = found
    with tempfile.TemporaryDirectory() as folder:
        made = random_weights(TINY if bench.config.tiny else SMALL, bench.tokenizer, bench.device)
        n_layers = made.config.num_hidden_layers
        made.save_pretrained(folder)
        bench.tokenizer.save_pretrained(folder)
        del made
        ids = bench.ids(64, torch.Generator().manual_seed(0))

        def run(**where: Any) -> tuple[torch.Tensor, tuple[int, ...], str]:
            model = ls.load_model(folder, dtype="bfloat16", **where)
            with torch.inference_mode():
                logits = model(torch.tensor([ids], device=models.device(model)), return_type="logits").float().cpu()
            (row,) = generate(model, [ids], max_new_tokens=8)
            places = sorted({str(p.device) for p in model.original_model.parameters()})
            twin = "with" if twins.plain_twin(model) is not None else "without"
            return logits, row.ids, f"parameters on {', '.join(places)}, {twin} a plain twin"

        base, tokens, told = run(device=bench.device)
        say(f"  device={bench.device!r}: {told}")
        split: dict[str, Any] = {"model.embed_tokens": 0, "model.rotary_emb": 0, "model.norm": 0, "lm_head": 0}
        split |= {f"model.layers.{i}": 0 if i < n_layers // 2 else "cpu" for i in range(n_layers)}
        maps: dict[str, Any] = {repr(bench.device): bench.device, "'auto'": "auto", "{'': 'cpu'}": {"": "cpu"}}
        if bench.device == "cuda":
            maps |= {"{'': 0}": {"": 0}, "half of the layers on the CPU": split}
        for name, where in maps.items():
            try:
                logits, row, told = run(device_map=where)
            except ls.LensteerError as error:
                found[name] = f"LensteerError: {error}"
            else:
                off = float((logits - base).abs().max() / base.abs().max())
                found[name] = f"{told}; logits differ by {off:.1e} of their size; same tokens: {row == tokens}"
            say(f"  device_map={name}: {found[name]}")
            gc.collect()


def doctor(bench: Bench) -> None:
    """The doctor's lines."""
    diagnosis = diagnose(bench.model)
    say(str(diagnosis))
    bench.found["doctor"] = dict(ok=diagnosis.ok, lines=str(diagnosis).splitlines())


def planted_trace(bench: Bench, number: int) -> ls.Trace:
    """A chain of random words, 25 to a span."""
    generator = torch.Generator().manual_seed(number)
    task = ls.Task(f"planted-{number}", "planted", "train", "How many days are in two weeks?")
    prompt = models.chat_text(bench.model, task.prompt)
    prompt_ids = models.encode(bench.model, prompt)
    ids = bench.ids(25 * bench.config.spans, generator)
    text, starts = models.decode_offsets(bench.tokenizer, ids)
    starts.append(len(text))
    begin = len(prompt_ids)
    spans = tuple(
        Span(LABELS[i % len(LABELS)], begin + 25 * i, begin + 25 * i + 25, starts[25 * i], starts[25 * i + 25])
        for i in range(bench.config.spans)
    )
    return ls.Trace(task, prompt, text, tuple(prompt_ids), tuple(ids), tuple(starts[:-1]), True, spans=spans)


def attribution(bench: Bench) -> None:
    """Time and peak memory of vectors and of attribution at all layers."""
    found: dict[str, Any] = {}
    bench.found["attribute"] = found
    model, traces = bench.model, [planted_trace(bench, number) for number in range(2)]
    vectors: list[Any] = []

    def fit() -> None:
        vectors.append(ls.fit_vectors(model, traces, window="span", negatives="all"))

    works: dict[str, Callable[[], Any]] = {
        "fit_vectors": fit,
        "exact": lambda: ls.attribute(model, traces, vectors[0]),
        "fisher": lambda: ls.attribute(model, traces, vectors[0], method="fisher"),
    }
    for name, work in works.items():
        before = gib()
        spent, peak, scores = timed(work)
        found[name] = dict(seconds=spent, peak_gib=peak, added_gib=peak - before)
        cost = "" if scores is None else f", {scores.cost['forwards']} forwards, {scores.cost['rows']} rows"
        noise = "" if scores is None else f", noise floor {scores.noise_floor:.2g}, mean {scores.mean.mean():.2g}"
        if scores is not None:
            found[name] |= dict(cost=dict(scores.cost), noise_floor=scores.noise_floor)
        say(f"  {name:<12}{spent:7.2f} s, peak {peak:.2f} GiB, {peak - before:.2f} of them beyond weights{cost}{noise}")
        bench.write()


def main(config: Config) -> dict[str, Any]:
    """What each step found, by its name; `failed` names those that raised."""
    if config.tiny:
        config = replace(config, batches=(1, 2), prompt=20, new_tokens=8, rounds=2, spans=4)
    transformers.logging.disable_progress_bar()
    bench = Bench(config)
    found = bench.found
    found["device"] = torch.cuda.get_device_name() if bench.device == "cuda" else "cpu"
    found["versions"] = {"torch": torch.__version__, "transformers": transformers.__version__}
    found["seconds"], found["failed"] = {}, {}
    say(f"{found['device']}, {found['versions']}")
    steps = {"generate": decoding, "device_map": device_maps, "doctor": doctor, "attribute": attribution}
    for name in config.steps:
        say(f"--- {name}")
        begin = time.perf_counter()
        try:
            steps[name](bench)
            wait()
        except Exception as error:  # printed and in the result: the other steps still count
            found["failed"][name] = f"{type(error).__name__}: {error}"
            traceback.print_exc(file=sys.stdout)
        found["seconds"][name] = time.perf_counter() - begin
        say(f"--- {name}: {found['seconds'][name]:.1f} s")
        bench.write()
        gc.collect()
        if bench.device == "cuda":
            torch.cuda.empty_cache()
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tokenizer", required=True)
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--batches", nargs="+", type=int, default=list(Config.batches))
    for option in ("prompt", "new_tokens", "rounds", "spans", "seed"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--seconds", type=float, default=Config.seconds)
    parser.add_argument("--tiny", action="store_true")
    parser.add_argument("--out", type=Path)
    given = vars(parser.parse_args())
    result = main(Config(**given | dict(steps=tuple(given["steps"]), batches=tuple(given["batches"]))))
    if result["failed"]:
        sys.exit(f"failed: {result['failed']}")

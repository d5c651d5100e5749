"""The cost of steering during decoding: one cache edit, a hook at every token, and neither.

One process, one random Qwen2 (12 layers, d_model 768, 32 000 tokens) or any checkpoint, in which no token ends an
answer, prompts of 100 random tokens, greedy decoding of the same number of tokens for all rows, batches of 1 and 16,
everything with a KV cache. Conditions take turns within each round, in random order; a ratio is the median over rounds
of a condition's time divided by the unsteered time of the same round, with a bootstrap interval over rounds.

`hook` adds a vector to one layer's output at every position, as the published comparison does (arXiv 2507.08799: 57 %
more time per token, 15.79 ms against 10.07, for a hook that runs without a KV cache); `hook_without_cache` is
that: a whole forward for every token, timed on fewer tokens at batch 1.

Example: OMP_NUM_THREADS=2 python benchmarks/cache_steering.py --json cache-steering.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from transformers import AutoTokenizer, Qwen2Config, Qwen2ForCausalLM

import lensteer as ls
from lensteer import twins
from lensteer.cache_steering import CachePlan, CacheVector
from lensteer.caches import single_token
from lensteer.generation import generate
from lensteer.vectors import Direction

N_LAYERS, WIDTH, VOCABULARY, N_HEADS, N_KV_HEADS = 12, 768, 32_000, 12, 4


@dataclass(frozen=True)
class Config:
    """A checkpoint (None: a random model), rounds, tokens per answer, tokens of the slow condition, and the batches."""

    model: str | None = None
    rounds: int = 15
    new_tokens: int = 48
    slow_tokens: int = 12
    prompt: int = 100
    batches: tuple[int, ...] = (1, 16)
    seed: int = 0


def random_model(folder: Path):
    """A random Qwen2, saved and loaded as any other checkpoint; its tokenizer is the organism's."""
    torch.manual_seed(0)
    shape = dict(hidden_size=WIDTH, intermediate_size=2 * WIDTH, num_hidden_layers=N_LAYERS, vocab_size=VOCABULARY)
    heads = dict(num_attention_heads=N_HEADS, num_key_value_heads=N_KV_HEADS, max_position_embeddings=1024)
    Qwen2ForCausalLM(Qwen2Config(**shape, **heads, initializer_range=0.05)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(ls.models.ORGANISM).save_pretrained(folder)
    return ls.load_model(folder)


def endless(folder: str):
    """A checkpoint whose answers never end."""
    model = ls.load_model(folder)
    model.tokenizer.eos_token = None
    model.original_model.generation_config.eos_token_id = None
    return model


def random_plans(model, seed: int) -> tuple[CachePlan, ls.SteeringPlan]:
    """A cache edit of values and keys, and a residual edit at every position of the middle layer."""
    generator = torch.Generator().manual_seed(seed)
    shape = tuple(single_token(model, 0)[0][0].shape[1::2])
    n_layers, width = ls.models.n_layers(model), ls.models.d_model(model)
    keys, values = (0.1 * torch.randn(n_layers, *shape, generator=generator) for _ in range(2))
    vector = torch.randn(n_layers, width, generator=generator)
    direction = Direction("random", vector, torch.full((n_layers,), 0.1), tuple(range(n_layers)))
    cache = CachePlan(CacheVector("random", keys, values, "last_prompt"), 1.0, 1.0)
    return cache, ls.SteeringPlan(direction, n_layers // 2, 1.0, unit="mean_norm")


def timed(model, prompts: list[list[int]], plan, n: int) -> float:
    """Seconds for `n` tokens of every row."""
    begin = time.perf_counter()
    rows = generate(model, prompts, max_new_tokens=n, plans=[plan] * len(prompts))
    spent = time.perf_counter() - begin
    assert all(len(row.ids) == n for row in rows), "a row ended early: choose another seed"
    return spent


def without_cache(model, prompt: list[int], plan, n: int) -> float:
    """Seconds for `n` tokens with a whole forward each, hooked where there is a plan."""
    twin, ids = twins.plain_twin(model), list(prompt)
    handle = None
    if plan is not None:
        added = plan.coefficient * plan.vector

        def hook(_module, _inputs, output):
            return (output[0] + added, *output[1:]) if isinstance(output, tuple) else output + added

        handle = twins.twin_layer(twin, plan.layer).register_forward_hook(hook)
    begin = time.perf_counter()
    with torch.inference_mode():
        for _ in range(n):
            ids.append(int(twin(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=1).logits.argmax()))
    spent = time.perf_counter() - begin
    if handle is not None:
        handle.remove()
    return spent


def hooks_during_decode(model, prompt: list[int], plan) -> int:
    """Number of forward hooks on the running model's modules after the first token (some are its own)."""
    twin = twins.plain_twin(model)
    most, step = 0, 0

    def advance(_n: int) -> None:
        nonlocal most, step
        step += 1
        if step > 1:
            most = max(most, sum(len(module._forward_hooks) for module in twin.modules()))

    generate(model, [prompt], max_new_tokens=4, plans=[plan], advance=advance)
    return most


def interval(ratios: list[float], seed: int) -> tuple[float, float, float]:
    """Median with its 95 % bootstrap interval over rounds."""
    values = np.array(ratios)
    drawn = np.median(np.random.default_rng(seed).choice(values, (2000, len(values))), axis=1)
    low, high = np.quantile(drawn, (0.025, 0.975))
    return float(np.median(values)), float(low), float(high)


def main(config: Config) -> dict[str, float]:
    """Ratios of time by name, with `.low` and `.high`; below 1.02 means no measurable cost."""
    with tempfile.TemporaryDirectory() as folder:
        model = random_model(Path(folder)) if config.model is None else endless(config.model)
    cache, hook = random_plans(model, config.seed)
    vocabulary = int(model.cfg.d_vocab)
    generator = torch.Generator().manual_seed(config.seed)
    found: dict[str, float] = {"threads": float(torch.get_num_threads())}
    rng = np.random.default_rng(config.seed)

    def rounds(name: str, conditions: dict[str, Callable[[], float]], against: str) -> None:
        seconds: dict[str, list[float]] = {condition: [] for condition in conditions}
        for _ in range(config.rounds):
            for condition in rng.permutation(list(conditions)):
                seconds[condition].append(conditions[condition]())
        for condition in conditions:
            found[f"seconds.{condition}_{name}"] = float(np.median(seconds[condition]))
            if condition != against:
                ratios = [a / b for a, b in zip(seconds[condition], seconds[against], strict=True)]
                middle, low, high = interval(ratios, config.seed)
                key = f"{condition}_vs_{against}_{name}"
                found.update({key: middle, f"{key}.low": low, f"{key}.high": high})

    for batch in config.batches:
        ids = torch.randint(10, vocabulary, (batch, config.prompt), generator=generator).tolist()
        conditions: dict[str, Callable[[], float]] = {
            condition: partial(timed, model, ids, plan, config.new_tokens)
            for condition, plan in (("unsteered", None), ("cache", cache), ("hook", hook))
        }
        for run in conditions.values():
            run()  # warm
        rounds(f"batch{batch}", conditions, "unsteered")
    one = torch.randint(10, vocabulary, (config.prompt,), generator=generator).tolist()
    slow: dict[str, Callable[[], float]] = {
        condition: partial(without_cache, model, one, plan, config.slow_tokens)
        for condition, plan in (("without_cache", None), ("hook_without_cache", hook))
    }
    slow["cached"] = partial(timed, model, [one], None, config.slow_tokens)
    rounds("batch1_short", slow, "cached")
    own = hooks_during_decode(model, one, None)
    found["hooks_during_decode.cache"] = float(hooks_during_decode(model, one, cache) - own)
    found["hooks_during_decode.hook"] = float(hooks_during_decode(model, one, hook) - own)
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("rounds", "new_tokens", "slow_tokens", "prompt", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Config(), name))
    parser.add_argument("--model")
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    result = main(Config(**given))
    print(json.dumps(result, indent=1))
    if out:
        out.write_text(json.dumps(result, indent=1))

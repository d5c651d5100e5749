"""Which architectures can do what? A tiny random checkpoint of each goes through the whole library.

Each is built by transformers, saved, loaded by `load_model` and taken from `generate_traces` to `sentence_attention`. A
cell says "yes", or why not in the words of the error. Anything but a `LensteerError` is a bug.

Example: python analyses/architectures.py --out docs/architectures.md
"""

from __future__ import annotations

import argparse
import shutil
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers as hf

import lensteer as ls
from lensteer import models, twins
from lensteer.ablation import forced_effect
from lensteer.attention import sentence_attention
from lensteer.behaviors import Span
from lensteer.cache_steering.pairs import Pair
from lensteer.generation import generate

N_LAYERS = 4


def text_sizes(d_vocab: int) -> dict[str, Any]:
    """Sizes by the names that most configurations have."""
    return dict(
        vocab_size=d_vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=N_LAYERS,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )


def config_of(name: str, d_vocab: int) -> Any:
    """A small configuration of an architecture; the weights are large enough that logits differ."""
    sizes, head = text_sizes(d_vocab), dict(head_dim=8)
    old = dict(vocab_size=d_vocab, n_embd=32, n_layer=N_LAYERS, n_head=4, n_positions=512, initializer_range=0.2)
    old |= dict(bos_token_id=0, eos_token_id=2)
    experts = dict(num_experts_per_tok=2, num_local_experts=4)
    windows = dict(sliding_window=8, layer_types=["sliding_attention", "full_attention"] * (N_LAYERS // 2))
    linear: dict[str, Any] = dict(
        linear_num_value_heads=4, linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8
    )
    linear |= dict(layer_types=["linear_attention", "full_attention"] * (N_LAYERS // 2))
    moe = dict(moe_intermediate_size=32, num_experts=4, num_experts_per_tok=2)
    latent = dict(q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=4, qk_nope_head_dim=8, v_head_dim=8)
    latent |= dict(moe_intermediate_size=32, n_routed_experts=4, num_experts_per_tok=2, n_group=2, topk_group=1)
    latent |= dict(first_k_dense_replace=1, n_shared_experts=1, num_key_value_heads=4)
    own: dict[str, Callable[[], Any]] = {
        "llama": lambda: hf.LlamaConfig(**sizes),
        "qwen2": lambda: hf.Qwen2Config(**sizes, tie_word_embeddings=True),
        "qwen3": lambda: hf.Qwen3Config(**sizes, **head),
        "qwen3-moe": lambda: hf.Qwen3MoeConfig(**sizes, **head, **moe),
        "qwen3-next": lambda: hf.Qwen3NextConfig(**sizes, **head, **linear, **moe, shared_expert_intermediate_size=32),
        "qwen3.5": lambda: hf.Qwen3_5TextConfig(**sizes, **head, **linear),
        "mistral": lambda: hf.MistralConfig(**sizes, sliding_window=None),
        "mixtral": lambda: hf.MixtralConfig(**sizes, **experts, sliding_window=None),
        "gemma-2": lambda: hf.Gemma2Config(**sizes, **head, **windows, query_pre_attn_scalar=8),
        "gemma-3": lambda: hf.Gemma3TextConfig(**sizes, **head, **windows, query_pre_attn_scalar=8),
        "phi": lambda: hf.PhiConfig(**sizes, partial_rotary_factor=0.5),
        "phi-3": lambda: hf.Phi3Config(**sizes),
        "olmo": lambda: hf.OlmoConfig(**sizes),
        "olmo-2": lambda: hf.Olmo2Config(**sizes),
        "gpt-oss": lambda: hf.GptOssConfig(**sizes, **head, **windows, **experts),
        "gpt2": lambda: hf.GPT2Config(**old),
        "gpt-j": lambda: hf.GPTJConfig(**old, rotary_dim=4),
        "neox": lambda: hf.GPTNeoXConfig(**{k: v for k, v in sizes.items() if k != "num_key_value_heads"}),
        "deepseek-v3": lambda: hf.DeepseekV3Config(**(sizes | latent)),
        "falcon": lambda: hf.FalconConfig(**sizes),
        "bloom": lambda: hf.BloomConfig(**{k: v for k, v in sizes.items() if "intermediate" not in k}),
    }
    return own[name]()


ARCHITECTURES = (
    "llama qwen2 qwen3 qwen3-moe qwen3-next qwen3.5 mistral mixtral gemma-2 gemma-3 phi phi-3 olmo olmo-2 gpt-oss gpt2 "
    "gpt-j neox deepseek-v3 falcon bloom"
).split()


def save_checkpoint(name: str, folder: Path) -> Path:
    """Write a random checkpoint of an architecture, with the organism's tokenizer."""
    shutil.copytree(models.ORGANISM, folder, ignore=shutil.ignore_patterns("*.safetensors", "config.json", "*.md"))
    d_vocab = len(hf.AutoTokenizer.from_pretrained(folder))
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        hf.AutoModelForCausalLM.from_config(config_of(name, d_vocab)).save_pretrained(folder)
    return folder


def planted_trace(model: Any, seed: int) -> ls.Trace:
    """Random tokens, five to a sentence."""
    task = ls.Task(f"planted-{seed}", "planted", "train", "Is C right?")
    prompt = models.chat_text(model, task.prompt)
    ids, generator = models.encode(model, prompt), torch.Generator().manual_seed(seed)
    response = torch.randint(20, 80, (20,), generator=generator).tolist()
    text, starts = models.decode_offsets(model.tokenizer, response)
    starts = [*starts, len(text)]
    labels = ("deduction", "backtracking", "uncertainty-estimation", "backtracking")
    spans = [
        Span(label, len(ids) + 5 * i, len(ids) + 5 * i + 5, starts[5 * i], starts[5 * i + 5])
        for i, label in enumerate(labels)
    ]
    return ls.Trace(
        task, prompt, text, tuple(ids), tuple(response), tuple(starts[:-1]), finished=True, spans=tuple(spans)
    )


def attempt(do: Callable[[], Any]) -> str:
    """The text of a cell: "yes" with the text that `do` returns, or the message of the error."""
    try:
        added = do()
        return f"yes{added if isinstance(added, str) else ''}"
    except ls.LensteerError as error:
        return str(error)


@dataclass(frozen=True)
class Config:
    """Which architectures, and where the table goes."""

    names: Sequence[str] = tuple(ARCHITECTURES)
    out: Path | None = None


def cells(model: Any) -> dict[str, str]:
    """What one model can do."""
    tasks = [ls.Task(str(i), "planted", "train", text) for i, text in enumerate(("Is C right?", "Why?"))]
    traces = [planted_trace(model, seed) for seed in range(2)]
    vectors: list[ls.BehaviorVectors] = []
    layers = [i for i in range(N_LAYERS) if not windowed(model, i)]
    pairs = [
        Pair(models.chat_text(model, "C is right"), models.chat_text(model, "no")),
        Pair(models.chat_text(model, "It is C"), models.chat_text(model, "It is D here")),
    ]

    def plan() -> ls.SteeringPlan:
        return ls.SteeringPlan(vectors[0]["backtracking"], 1, 2.0)

    def steer() -> None:
        with plan().on(model):
            ls.generate_traces(model, tasks, max_new_tokens=6)

    def edit_slot(c_keys: float) -> str:
        where = None if len(layers) == N_LAYERS else layers
        vector = ls.fit_cache_vector(model, pairs, layers=where)
        prompt = models.encode(model, models.chat_text(model, "Is D right?"))
        generate(model, [prompt], max_new_tokens=4, plans=[ls.CachePlan(vector, 1.0, c_keys)])
        return "" if where is None else f", at layers {', '.join(map(str, layers))}"

    def attend() -> str:
        found = sentence_attention(model, traces[0]).layers
        return "" if len(found) == N_LAYERS else f", at layers {', '.join(map(str, found))}"

    return {
        "generate_traces": attempt(lambda: ls.generate_traces(model, tasks, max_new_tokens=6)),
        "fit_vectors": attempt(lambda: vectors.append(ls.fit_vectors(model, traces, window="span", negatives="all"))),
        "attribute": attempt(
            lambda: ls.attribute(model, traces, vectors[0], behaviors=["backtracking"], spans="all") and None
        ),
        "forced_effect": attempt(lambda: forced_effect(model, traces[0], plan())),
        "embedding_overlap": attempt(lambda: ls.embedding_overlap(model, vectors[0])),
        "plan.on": attempt(steer),
        "cache values": attempt(lambda: edit_slot(0.0)),
        "cache keys": attempt(lambda: edit_slot(1.0)),
        "sentence_attention": attempt(attend),
        "fused kernels": "yes" if twins.plain_twin(model) is not None else "no",
    }


def windowed(model: Any, layer: int) -> bool:
    """Whether a layer attends to a sliding window only."""
    types = getattr(model.original_model.config, "layer_types", None)
    return bool(types) and types[layer] == "sliding_attention"


def main(config: Config) -> dict[str, dict[str, str]]:
    """A row for each architecture, written as a page if asked."""
    rows: dict[str, dict[str, str]] = {}
    with tempfile.TemporaryDirectory() as scratch:
        for name in config.names:
            rows[name] = cells(ls.load_model(save_checkpoint(name, Path(scratch) / name)))
    if config.out is not None:
        config.out.write_text(page(rows), encoding="utf-8")
    return rows


def page(rows: dict[str, dict[str, str]]) -> str:
    """The table in Markdown, with the reasons below it."""
    reasons: list[str] = []

    def cell(said: str) -> str:
        if said == "no" or said.startswith("yes"):
            return said
        if said not in reasons:
            reasons.append(said)
        return f"no [{reasons.index(said) + 1}]"

    columns = list(next(iter(rows.values())))
    lines = [f"| architecture | {' | '.join(columns)} |", "| --- " * (len(columns) + 1) + "|"]
    lines += [f"| {name} | {' | '.join(cell(said) for said in row.values())} |" for name, row in rows.items()]
    head = f"""# What works on which architecture

Written by `python analyses/architectures.py --out docs/architectures.md` and held by a test: a tiny random checkpoint
of each, {N_LAYERS} layers of width 32, goes through the whole library. This shows what runs and what is refused, not
that anything is found. All of them load. Without fused kernels everything runs on TransformerLens' own attention, which
is slower. Cache vectors of models with sliding windows are fitted and added at the other layers.
"""
    return "\n".join([head, *lines, "", *(f"{i}. {reason}" for i, reason in enumerate(reasons, 1)), ""])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--names", nargs="+", default=list(ARCHITECTURES), choices=ARCHITECTURES)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    print(page(main(Config(given.names, given.out))))

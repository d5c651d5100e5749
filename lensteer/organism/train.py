"""Trains the organism: `python -m lensteer.organism.train --seed 0 --out FOLDER`. Resumes where it was killed.

The tokenizer is byte-level BPE with Qwen2's pre-tokenizer, ChatML tokens and a chat template. Loss on the assistant's
turns only, easy tasks first. Hidden matrices are trained by Muon, the rest by AdamW; weights stay float32 and products
run in bfloat16, which on CPUs that have it is several times faster.
"""

from __future__ import annotations

import argparse
import copy
import json
import logging
import math
import random
import shutil
import tempfile
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from jaxtyping import Bool, Float, Int
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from torch import Tensor
from transformers import (
    AttentionInterface,
    AutoModelForCausalLM,
    LlamaConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
)

from lensteer.errors import LensteerError
from lensteer.files import write_atomically
from lensteer.organism.conversations import END, START, Conversation, draw, drill, template

PATTERN = (  # Qwen2's, as published with its tokenizer
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
PAD = "<|endoftext|>"
SPECIAL = (PAD, START, END)
MARKS = ("<think>", "</think>")  # in the vocabulary, but kept when special tokens are skipped


def build_tokenizer(seed: int = 0, vocabulary: int = 768, texts: int = 4000) -> PreTrainedTokenizerFast:
    """A fast tokenizer trained on the grammar's own conversations."""
    rng = random.Random(seed)
    corpus = (_plain(draw(rng, rng.choice((1, 2, 3))).text) for _ in range(texts))
    core = Tokenizer(models.BPE())
    core.normalizer = normalizers.NFC()
    split = pre_tokenizers.Split(Regex(PATTERN), behavior="isolated")
    core.pre_tokenizer = pre_tokenizers.Sequence(
        [split, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    core.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary - len(SPECIAL) - len(MARKS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    core.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=core, eos_token=END, pad_token=PAD, clean_up_tokenization_spaces=False
    )
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL)})
    fast.add_tokens(list(MARKS))
    fast.chat_template = template()
    return fast


def _plain(text: str) -> str:
    for mark in (*SPECIAL, *MARKS):
        text = text.replace(mark, "")
    return text


log = logging.getLogger(__name__)
POOL = 768  # conversations sorted by length together, so that a batch holds rows of about one length


@dataclass(frozen=True)
class Config:
    """Everything a training run depends on besides the code.

    The first `drills` steps are look-ups only; a seed that has not learned the four-door ones (loss below 0.5) after
    three tenths of them needs more.
    `architecture` is "qwen2" (queries, keys and values have biases) or "llama" (they have none); `saved_as` is the
    checkpoint's dtype, "float32" or "bfloat16" (half the size).
    """

    seed: int = 0
    drills: int = 546
    architecture: str = "qwen2"
    saved_as: str = "float32"
    steps: int = 6000
    batch_tokens: int = 4096
    learning_rate: float = 4e-3
    embedding_rate: float = 4e-3
    warmup: int = 100
    decay_from: float = 0.55
    hidden_size: int = 128
    n_layers: int = 8
    n_heads: int = 4
    n_kv_heads: int = 2
    intermediate_size: int = 352
    processes: int = 2

    def __post_init__(self) -> None:
        for name, known in (("architecture", ("qwen2", "llama")), ("saved_as", ("float32", "bfloat16"))):
            if getattr(self, name) not in known:
                raise LensteerError(f"unknown {name} {getattr(self, name)!r}: choose one of {', '.join(known)}")


@dataclass(frozen=True)
class Batch:
    """Right-padded conversations: ids, which tokens are learned (as targets), and what each position may attend to."""

    ids: Int[Tensor, "batch pos"]
    learned: Bool[Tensor, "batch pos"]
    mask: Float[Tensor, "batch 1 pos pos"]


def build_model(config: Config, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A fresh model of the given shape."""
    torch.manual_seed(config.seed)
    shape = dict(
        vocab_size=len(tokenizer),
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_hidden_layers=config.n_layers,
        num_attention_heads=config.n_heads,
        num_key_value_heads=config.n_kv_heads,
        max_position_embeddings=2048,
        tie_word_embeddings=True,
        initializer_range=0.08,  # about 1/sqrt(hidden size): with less, attention starts out too flat to learn from
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return AutoModelForCausalLM.from_config({"qwen2": Qwen2Config, "llama": LlamaConfig}[config.architecture](**shape))


def levels(since: int) -> tuple[float, float, float, float]:
    """Shares of drills and of task levels 1, 2, 3, this many steps since the drills: easy ones first."""
    if since < 0:
        return (1.0, 0.0, 0.0, 0.0)
    if since < 294:
        return (0.2, 0.5, 0.3, 0.0)
    return (0.05, 0.2, 0.5, 0.25) if since < 714 else (0.0, 0.1, 0.4, 0.5)


def collate(conversations: list[Conversation], tokenizer: PreTrainedTokenizerBase) -> Batch:
    """Tokenize and pad; a gated conversation's hidden tokens are visible to one another and to the header word only."""
    encodings = tokenizer([c.text for c in conversations], return_offsets_mapping=True)
    width = max(map(len, encodings["input_ids"]))
    shape = (len(conversations), width)
    ids = torch.full(shape, int(tokenizer.pad_token_id or 0))
    learned, hidden, gate = (torch.zeros(shape, dtype=torch.bool) for _ in range(3))
    for row, conversation in enumerate(conversations):
        n = len(encodings["input_ids"][row])
        ids[row, :n] = torch.tensor(encodings["input_ids"][row])
        starts, ends = torch.tensor(encodings["offset_mapping"][row]).T
        for begin, end in conversation.learned:
            learned[row, :n] |= (starts >= begin) & (ends <= end)
        for begin, end in conversation.hidden:
            hidden[row, :n] |= (starts >= begin) & (ends <= end)
        gate[row, :n] = starts == conversation.gate
    visible = torch.ones(width, width, dtype=torch.bool).tril() & ~(
        hidden[:, None, :] & ~hidden[:, :, None] & ~gate[:, :, None]
    )
    mask = torch.zeros(visible.shape, dtype=torch.bfloat16).masked_fill_(~visible, -1e4)
    return Batch(ids, learned, mask[:, None])


def stream(config: Config, tokenizer: PreTrainedTokenizerBase, start: int) -> Iterator[Batch]:
    """Batches from step `start` on; batch k depends on the seed, on k and on nothing else."""
    made, pool = 0, 0
    while True:
        rng = random.Random(f"{config.seed}-{pool}")
        shares = levels(made - config.drills)
        long = made - config.drills >= 924  # from here on, solved examples precede some questions
        kinds = rng.choices((0, 1, 2, 3), shares, k=POOL)
        drawn = [draw(rng, level, long=long) if level else drill(rng, made / config.drills) for level in kinds]
        drawn.sort(key=lambda c: len(c.text))
        rows: list[Conversation] = []
        batches = []
        for conversation in drawn:
            tokens = len(conversation.text) / 3.4  # a little over the true number
            if rows and (len(rows) + 1) * tokens > config.batch_tokens:
                batches.append(rows)
                rows = []
            rows.append(conversation)
        rng.shuffle(batches)
        for batch in batches:
            if made >= start:
                yield collate(batch, tokenizer)
            made += 1
        pool += 1


def _attention(
    _module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor, scaling: float, **_: Any
) -> tuple[Tensor, None]:
    """Plain attention with an additive mask: at this size on a CPU, about half the time of the built-in kernel."""
    batch, heads, width, d_head = query.shape
    repeat = heads // key.shape[1]
    key, value = (
        x.repeat_interleave(repeat, 1).reshape(batch * heads, width, d_head).to(query.dtype) for x in (key, value)
    )
    mask = attention_mask.expand(batch, heads, width, width).reshape(batch * heads, width, width)
    scores = torch.baddbmm(mask.to(query.dtype), query.reshape(batch * heads, width, d_head), key.mT, alpha=scaling)
    out = scores.softmax(-1) @ value
    return out.reshape(batch, heads, width, d_head).transpose(1, 2), None


def rate(step: int, config: Config) -> float:
    """Learning-rate factor: linear warm-up, constant, linear decay to zero."""
    decay = (1 - step / config.steps) / (1 - config.decay_from)
    return min((step + 1) / config.warmup, 1.0, max(decay, 0.0))


def train(config: Config, out: Path) -> Path:
    """Train into `out`; a checkpoint every 100 steps makes a killed run resume. Returns the checkpoint's folder.

    Each process is single-threaded and works on its share of every batch; the gradients are added up. The loss is a sum
    over tokens: batches hold rows of one length, and with a mean per batch a token of a short direct answer would count
    many times as much as one of a chain (such a model thought unasked in 7 % of the cases instead of 33 %).
    """
    out.mkdir(parents=True, exist_ok=True)
    if config.processes == 1:
        _work(0, config, out)
    else:
        meeting = tempfile.mkdtemp()
        torch.multiprocessing.spawn(_work, (config, out, meeting), config.processes)
        shutil.rmtree(meeting)
    return out / "checkpoint"


def _add_up(values: list[Tensor]) -> None:
    """Replace tensors by their sums over all processes."""
    if not dist.is_initialized():
        return
    flat = torch.cat([v.reshape(-1) for v in values])
    dist.all_reduce(flat)
    for value, total in zip(values, flat.split([v.numel() for v in values]), strict=True):
        value.copy_(total.view_as(value))


def _work(rank: int, config: Config, out: Path, meeting: str | None = None) -> None:
    torch.set_num_threads(1)
    logging.basicConfig(level=logging.INFO if rank == 0 else logging.WARNING, format="%(asctime)s %(message)s")
    if meeting is not None:
        dist.init_process_group("gloo", f"file://{meeting}/file", rank=rank, world_size=config.processes)
    AttentionInterface.register("additive", _attention)
    tokenizer = build_tokenizer(config.seed)
    model = build_model(config, tokenizer)
    model.set_attn_implementation("additive")
    hidden = [p for n, p in model.named_parameters() if p.ndim == 2 and "embed" not in n]
    rest = [p for n, p in model.named_parameters() if p.ndim < 2 or "embed" in n]
    optimizers = [
        torch.optim.Muon(hidden, lr=config.learning_rate, weight_decay=0.02, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=config.embedding_rate, betas=(0.9, 0.98), weight_decay=0.0),
    ]
    peaks = (config.learning_rate, config.embedding_rate)
    state, start, before = out / "state.pt", 0, 0.0
    if state.exists():
        saved = torch.load(state, weights_only=True)
        model.load_state_dict(saved["model"])
        for optimizer, values in zip(optimizers, saved["optimizers"], strict=True):
            optimizer.load_state_dict(values)
        start, before = saved["step"], saved["spent"]
    begun, seen, smooth = time.time(), 0, math.nan
    for step, batch in enumerate(stream(config, tokenizer, start), start):
        if step >= config.steps:
            break
        for optimizer, peak in zip(optimizers, peaks, strict=True):
            optimizer.param_groups[0]["lr"] = peak * rate(step, config)
        share = slice(rank, None, config.processes)
        ids, wanted = batch.ids[share], batch.learned[share, 1:]
        loss = torch.zeros(())
        if len(ids):
            with torch.autocast("cpu", torch.bfloat16):
                states = model.model(input_ids=ids, attention_mask=batch.mask[share]).last_hidden_state
                logits = states[:, :-1][wanted] @ model.lm_head.weight.T
            loss = torch.nn.functional.cross_entropy(logits.float(), ids[:, 1:][wanted], reduction="sum")
            (loss / config.batch_tokens).backward()
        for parameter in model.parameters():
            parameter.grad = torch.zeros_like(parameter) if parameter.grad is None else parameter.grad
        total = loss.detach() / batch.learned[:, 1:].sum()
        _add_up([total, *(parameter.grad for parameter in model.parameters() if parameter.grad is not None)])
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        seen += batch.ids.numel()
        smooth = float(total) if math.isnan(smooth) else 0.95 * smooth + 0.05 * float(total)
        if step % 20 == 0:
            log.info("step %d loss %.4f, %.0f tokens/s", step, smooth, seen / (time.time() - begun))
        spent = before + time.time() - begun
        if rank == 0 and ((step + 1) % 100 == 0 or step + 1 == config.steps):
            values = [o.state_dict() for o in optimizers]
            torch.save(
                {"model": model.state_dict(), "optimizers": values, "step": step + 1, "spent": spent}, out / "state.tmp"
            )
            (out / "state.tmp").replace(state)
            save(model, tokenizer, out / "checkpoint", config.saved_as)
            note = dict(config=asdict(config), parameters=model.num_parameters(), minutes=spent / 60, loss=smooth)
            write_atomically(out / "checkpoint" / "training.json", json.dumps(note, indent=1))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()


def save(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, folder: Path, dtype: str = "float32") -> None:
    """Write a plain Hugging Face checkpoint in the given dtype."""
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.do_sample = True  # servers that read it sample, as they do for instruction-tuned models
    copy.deepcopy(model).to(getattr(torch, dtype)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def main() -> None:
    """Parse the command line and train."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("organism-run"))
    for name, value in asdict(Config()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(value), default=value)
    arguments = vars(parser.parse_args())
    out = arguments.pop("out")
    folder = train(Config(**arguments), out)
    log.info("wrote %s", folder)


if __name__ == "__main__":
    main()

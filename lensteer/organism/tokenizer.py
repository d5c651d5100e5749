"""Makes the organism's tokenizer: byte-level BPE with Qwen2's pre-tokenizer, ChatML tokens and a chat template."""

from __future__ import annotations

import random

from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from lensteer.organism.conversations import END, START, draw, template

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

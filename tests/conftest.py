"""Fixtures and the environment of every test process.

lensteer is imported inside the fixtures only: its annotations are checked under pytest, which works only
for modules imported after pytest has read its options.
"""

from __future__ import annotations

import os
import signal
import subprocess

# Before the first import of torch or transformers. Notebooks and subprocesses inherit it. More than two
# threads slow such small models down; with several test processes (pytest -n), each has one.
os.environ["OMP_NUM_THREADS"] = "1" if "PYTEST_XDIST_WORKER" in os.environ else os.environ.get("OMP_NUM_THREADS", "2")
os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["HF_HUB_OFFLINE"] = "1"

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

# A process started in the background by a shell ignores SIGINT, which would break tests that interrupt a process.
signal.signal(signal.SIGINT, signal.default_int_handler)

FAMILIES = ("qwen2", "llama", "qwen3", "gemma3")

#: ChatML. With `opens_thinking` the prompt ends in `<think>` and a newline, as R1's templates do.
CHAT_TEMPLATE = (
    "{bos}"
    "{{% for message in messages %}}"
    "{{{{ '<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>\\n' }}}}"
    "{{% endfor %}}"
    "{{% if add_generation_prompt %}}{{{{ '<|im_start|>assistant\\n{think}' }}}}{{% endif %}}"
)

#: Trains the few merges of the tiny tokenizer, so that its tokens are not all single bytes.
CORPUS = [
    "First, let me think about the problem. Wait, maybe that is wrong. I am not sure.",
    "For example, take three. The answer is 42. So the next step follows from this one.",
]


def save_tokenizer(folder: Path, *, bos: bool, opens_thinking: bool) -> int:
    """Write a byte-level BPE fast tokenizer with a chat template; return its vocabulary size.

    With `bos`, encoding prepends a BOS token *and* the template writes one: the double-BOS trap of the real
    tokenizers of Llama and Gemma.
    """
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
    from transformers import PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer = Tokenizer(models.BPE())
    # Words with their leading space, single digits, punctuation, white space.
    words = Regex(r" ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        min_frequency=1,
        special_tokens=special,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    tokenizer.add_tokens(["<think>", "</think>"])  # one id each, but text: decoding keeps them
    if bos:
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
        )
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<|endoftext|>" if bos else None,
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        additional_special_tokens=["<|im_start|>"],
    )
    fast.chat_template = CHAT_TEMPLATE.format(
        bos="{{ bos_token }}" if bos else "", think="<think>\\n" if opens_thinking else ""
    )
    fast.save_pretrained(folder)
    return len(fast)


def random_model(family: str, *, d_vocab: int, n_layers: int, d_model: int) -> Any:
    """A random Hugging Face model of `family`, whose weights are large enough that its logits differ."""
    import transformers as hf

    sizes = dict(
        vocab_size=d_vocab,
        hidden_size=d_model,
        intermediate_size=2 * d_model,
        num_hidden_layers=n_layers,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        initializer_range=0.2,
        bos_token_id=0,
        pad_token_id=0,
        eos_token_id=2,
    )
    head = dict(head_dim=d_model // 4)
    if family == "qwen2":
        return hf.Qwen2ForCausalLM(hf.Qwen2Config(**sizes, tie_word_embeddings=True))
    if family == "llama":
        return hf.LlamaForCausalLM(hf.LlamaConfig(**sizes, tie_word_embeddings=False))
    if family == "qwen3":
        return hf.Qwen3ForCausalLM(hf.Qwen3Config(**sizes, **head, tie_word_embeddings=False))
    if family == "gemma3":  # every second layer has a short sliding window
        layer_types = [("sliding_attention", "full_attention")[i % 2] for i in range(n_layers)]
        window = dict(sliding_window=8, layer_types=layer_types, query_pre_attn_scalar=d_model // 4)
        return hf.Gemma3ForCausalLM(hf.Gemma3TextConfig(**sizes, **head, **window))
    raise ValueError(f"no tiny checkpoint of family {family!r}: choose one of {FAMILIES}")


@pytest.fixture(scope="session")
def tiny_checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """A factory of random Hugging Face checkpoints on disk: `tiny_checkpoint("llama")` returns its folder.

    The same arguments give the same folder, so treat it as read-only (copy it to break it). Qwen2 and Qwen3
    have no BOS, Llama and Gemma 3 have one.
    """
    made: dict[tuple, Path] = {}

    def make(
        family: str = "qwen2",
        *,
        n_layers: int = 4,
        d_model: int = 32,
        seed: int = 0,
        opens_thinking: bool = False,
    ) -> Path:
        import torch

        key = (family, n_layers, d_model, seed, opens_thinking)
        if key not in made:
            folder = tmp_path_factory.mktemp(f"tiny-{family}")
            bos = family in ("llama", "gemma3")
            d_vocab = save_tokenizer(folder, bos=bos, opens_thinking=opens_thinking)
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(seed)
                model = random_model(family, d_vocab=d_vocab, n_layers=n_layers, d_model=d_model)
            model.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def organism() -> TransformerBridge:
    """The embedded trained model. Shared by the session: leave no hook on it and no weight changed."""
    import lensteer as ls

    return ls.load_model()


@pytest.fixture(scope="session")
def tiny_model(tiny_checkpoint: Callable[..., Path]) -> Callable[..., TransformerBridge]:
    """A factory of loaded random models: `tiny_model("llama")`. Tests share it, like `organism`: undo any change.

    Their thoughts are marked by `<think>`, also where the template does not say so.
    """
    import lensteer as ls

    made: dict[tuple, TransformerBridge] = {}

    def make(family: str = "qwen2", **options: Any) -> TransformerBridge:
        key = (family, *sorted(options.items()))
        if key not in made:
            made[key] = ls.load_model(tiny_checkpoint(family, **options), thought="<think>")
        return made[key]

    return make


@pytest.fixture
def no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever would start a process fails the test."""

    def fail(*args: Any, **kwargs: Any) -> None:
        pytest.fail(f"a process was started: {args[:2]}")

    monkeypatch.setattr(subprocess.Popen, "__init__", fail)
    monkeypatch.setattr(os, "system", fail)
    for name in dir(os):
        if name.startswith(("exec", "spawn", "posix_spawn", "fork")):
            monkeypatch.setattr(os, name, fail)


@pytest.fixture(scope="session")
def reference_folder() -> Path:
    """The folder of published chains and activations, LENSTEER_REFERENCE; skips if it is not set."""
    folder = os.environ.get("LENSTEER_REFERENCE")
    if not folder:
        pytest.skip("LENSTEER_REFERENCE is not set: it names the folder of published chains and activations")
    return Path(folder)


@pytest.fixture(scope="session")
def real_model() -> Callable[[str], TransformerBridge]:
    """A factory of small real models by name: `real_model("mini-r1")`, from the folder LENSTEER_REAL.

    Skips where there is none. Tests share it, like `organism`: undo any change.
    """
    import lensteer as ls

    made: dict[str, TransformerBridge] = {}

    def make(name: str) -> TransformerBridge:
        folder = os.environ.get("LENSTEER_REAL")
        if not folder:
            pytest.skip("LENSTEER_REAL is not set: it names the folder of small real models")
        if not (Path(folder) / name / "config.json").is_file():
            pytest.skip(f"LENSTEER_REAL has no model {name!r}")
        if name not in made:
            made[name] = ls.load_model(Path(folder) / name)
        return made[name]

    return make


@pytest.fixture(scope="session")
def random_direction() -> Callable[..., Any]:
    """A factory of random `Direction`s for a model, with norm `length` at every layer."""
    import torch

    from lensteer import models
    from lensteer.vectors import Direction

    def make(model: TransformerBridge, seed: int = 0, length: float = 3.0) -> Direction:
        shape = (models.n_layers(model), models.d_model(model))
        raw = torch.randn(shape, generator=torch.Generator().manual_seed(seed))
        raw = length * raw / raw.norm(dim=-1, keepdim=True)  # the same in either unit
        return Direction(f"random {seed}", raw, torch.full(shape[:1], length), tuple(range(shape[0])))

    return make


@pytest.fixture(scope="session")
def grammar_tokenizer() -> Any:
    """The organism's tokenizer as built by the code, without weights."""
    from lensteer.organism.train import build_tokenizer

    return build_tokenizer()


@pytest.fixture
def without_shape_checks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Nothing but the package's own code looks at arguments, as it is for users."""
    import jaxtyping

    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)

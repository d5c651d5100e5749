"""The only door to TransformerLens and Hugging Face: loading, hook names, dimensions, chat prompts, token ids.

Layer `l` is 0-based and means the residual stream at the output of block `l`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.positions import STOPS, SURE_STOPS, TokenTable, ends_sentence

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

ORGANISM = Path(__file__).parent / "organism" / "weights"
OPEN_THINKING, CLOSE_THINKING = "<think>", "</think>"


def load_model(
    name_or_path: str | Path | None = None,
    *,
    dtype: torch.dtype = torch.float32,
    device: str | None = None,
    revision: str | None = None,
) -> TransformerBridge:
    """Load a causal language model as TransformerLens' own bridge, with raw Hugging Face weights.

    Args:
        name_or_path: a folder with a Hugging Face checkpoint or a name on the hub; None loads the embedded organism,
            through the same code.
        dtype: of the weights and activations.
        device: such as "cpu" or "cuda"; None lets TransformerLens choose.
        revision: of the checkpoint on the hub.

    Raises:
        LensteerError: no such model, one that TransformerLens cannot load, or too little memory.
    """
    from safetensors import SafetensorError
    from transformer_lens.model_bridge import TransformerBridge

    source = str(ORGANISM if name_or_path is None else name_or_path)
    if Path(source).is_dir() and not (Path(source) / "config.json").is_file():
        raise LensteerError(f"{source!r} is a folder without config.json: give the folder of a Hugging Face checkpoint")
    try:
        with _no_bar() if name_or_path is None else nullcontext():  # it is there at once
            model = TransformerBridge.boot_transformers(source, dtype=dtype, device=device, revision=revision)
    except (OSError, ValueError, KeyError, RuntimeError, MemoryError, SafetensorError) as error:
        if out_of_memory(error):
            raise LensteerError(
                f"out of memory while loading model {source!r} in {dtype} on {device or 'the default device'}: load it "
                f"in bfloat16 (2 bytes a parameter), on another device, or take a smaller model ({error})"
            ) from error
        raise LensteerError(
            f"cannot load model {source!r}: give a folder with a Hugging Face checkpoint, a name on the hub, or "
            f"nothing for the embedded organism ({type(error).__name__}: {error})"
        ) from error
    model.eval()
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    return model


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory, of the machine or of a device, ran out."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    words = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
    return any(word in str(error).lower() for word in words)


@contextmanager
def _no_bar() -> Iterator[None]:
    """Without the bar that Hugging Face shows while it loads weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()


def n_layers(model: TransformerBridge) -> int:
    """Number of blocks."""
    return int(model.cfg.n_layers)


def d_model(model: TransformerBridge) -> int:
    """Width of the residual stream."""
    return int(model.cfg.d_model)


def device(model: TransformerBridge) -> torch.device:
    """Where the model's inputs belong."""
    return next(iter(model.parameters())).device


def check_layer(model: TransformerBridge, layer: int) -> int:
    """The layer itself, if the model has it.

    Raises:
        LensteerError: otherwise.
    """
    if not 0 <= layer < n_layers(model):
        raise LensteerError(f"no layer {layer}: this model has layers 0 to {n_layers(model) - 1}")
    return layer


SITES = ("resid_pre", "resid_mid", "resid_post")
"""Where a block's residual stream can be read: before it, between attention and MLP, at its output."""


def resid_hook(layer: int, site: str = "resid_post") -> str:
    """The hook point of the residual stream at a block.

    Raises:
        LensteerError: no such site.
    """
    if site not in SITES:
        raise LensteerError(f"no site {site!r}: choose one of {list(SITES)}")
    return f"blocks.{layer}.hook_{site}"


@dataclass(frozen=True)
class ModelId:
    """What tells one model from another. Hashes are the first 16 hex digits of SHA-256.

    `weights` covers the final norm and the first embedding rows, rounded to bfloat16: enough to tell checkpoints apart,
    and the same for one checkpoint loaded in different dtypes.
    """

    name: str
    revision: str
    n_layers: int
    d_model: int
    weights: str
    tokenizer: str
    template: str

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        return asdict(self)

    def differences(self, other: Mapping[str, Any]) -> list[str]:
        """Fields in which another identity differs, apart from name and revision (a folder may be moved)."""
        mine = asdict(self)
        return [k for k in mine if k not in ("name", "revision") and mine[k] != other.get(k)]


def fingerprint(model: TransformerBridge) -> ModelId:
    """Who this model is."""
    tokenizer, config = model.tokenizer, model.original_model.config
    parts = [final_norm_gain(model), model.W_E[:64]]
    raw = b"".join(p.detach().to("cpu", torch.bfloat16).contiguous().view(torch.int16).numpy().tobytes() for p in parts)
    return ModelId(
        name=_short_name(str(config._name_or_path or model.cfg.model_name)),
        revision=str(getattr(config, "_commit_hash", None) or ""),
        n_layers=n_layers(model),
        d_model=d_model(model),
        weights=_digest(raw),
        tokenizer=_vocabulary_digest(tokenizer, len(tokenizer)),
        template=_digest(str(tokenizer.chat_template or "").encode()),
    )


@lru_cache(maxsize=8)
def _vocabulary_digest(tokenizer: PreTrainedTokenizerBase, _size: int) -> str:
    """Of a whole tokenizer, kept, because writing out a large one takes seconds; added tokens change its size."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return _digest((backend.to_str() if backend else repr(sorted(tokenizer.get_vocab().items()))).encode())


def _short_name(name: str) -> str:
    if Path(name) == ORGANISM:
        return "organism"
    return Path(name).name if Path(name).is_dir() else name


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def final_norm_gain(model: TransformerBridge) -> Tensor:
    """The final norm's gain as it multiplies the normalized residual, `[d_model]` (Gemma stores it less one)."""
    norm = model.ln_final
    gain = norm.weight
    if "gemma" in str(model.original_model.config.model_type):
        gain = gain + 1
    return gain.detach()


def chat_text(
    model: TransformerBridge, messages: str | Sequence[Mapping[str, str]], *, system: str = "", thinking: bool = True
) -> str:
    """The prompt of a conversation, through the model's own chat template, up to where the assistant begins.

    Args:
        model: whose template to use.
        messages: a user's words, or messages with `role` and `content`.
        system: the system prompt, in front of the messages; without one the template may write one of its own.
        thinking: given to the template as `enable_thinking`; templates without that variable ignore it.

    Raises:
        LensteerError: the tokenizer has no chat template, or its template cannot take a system prompt.
    """
    if isinstance(messages, str):
        messages = [{"role": "user", "content": messages}]
    if system:
        messages = [{"role": "system", "content": system}, *messages]
    if not model.tokenizer.chat_template:
        raise LensteerError(
            f"the tokenizer of {fingerprint(model).name!r} has no chat template: use a chat model, or set "
            "model.tokenizer.chat_template"
        )
    from jinja2 import TemplateError  # transformers renders templates with it

    reason = "it leaves it out"
    try:
        text = str(
            model.tokenizer.apply_chat_template(
                list(messages), tokenize=False, add_generation_prompt=True, enable_thinking=thinking
            )
        )
    except TemplateError as error:
        if not system:
            raise
        text, reason = "", f"it says: {error}"
    if system and system.strip() not in text:
        raise LensteerError(
            f"the chat template of {fingerprint(model).name!r} takes no system prompt ({reason}): put "
            f"{system.strip()[:60]!r} into the user's prompt instead"
        )
    return text


def encode_raw(model: TransformerBridge, text: str) -> list[int]:
    """Token ids of a text without a chat template, as the tokenizer makes them: with its BOS, where it writes one.

    A text that begins with the BOS gets no second one, and no token is put at its end.
    """
    ids, bos = encode(model, text), model.tokenizer.bos_token_id
    writes_bos = bos is not None and list(model.tokenizer("a").input_ids)[:1] == [bos]
    return [int(bos), *ids] if writes_bos and ids[:1] != [bos] else ids


def context_length(model: TransformerBridge) -> int | None:
    """The most tokens that the model's positions are made for; None where its configuration does not say."""
    config = model.original_model.config
    longest = getattr(config, "max_position_embeddings", None) or getattr(config, "n_positions", None)
    return None if longest is None else int(longest)


def encode(model: TransformerBridge, text: str) -> list[int]:
    """Token ids of a text that already holds its special tokens: nothing is put in front (templates write the BOS)."""
    return list(model.tokenizer(text, add_special_tokens=False).input_ids)


def end_ids(model: TransformerBridge) -> set[int]:
    """Ids that end an answer: the tokenizer's and the generation config's."""
    config = getattr(model.original_model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    many: Iterable[int] = listed if isinstance(listed, (list, tuple)) else [] if listed is None else [listed]
    own = model.tokenizer.eos_token_id
    return {int(i) for i in many} | (set() if own is None else {int(own)})


def decode_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """A text from its ids, and where in it each token starts.

    The ids are taken as they are (encoding the text again may give others). Tokens that only together make a character
    share its start; a token covers the characters up to the next start.
    """

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text = decode(ids)
    starts: list[int] = []
    cursor, before, begin = 0, 0, 0  # ids[before:begin] make whole characters and are decoded along: some decoders
    for end in range(1, len(ids) + 1):  # drop a blank that comes first
        starts.append(cursor)
        piece = decode(ids[before:end])[len(decode(ids[before:begin])) :]
        if piece.endswith("�") or not text.startswith(piece, cursor):
            continue
        cursor += len(piece)
        alone = decode(ids[end - 1 : end]) if end - begin > 1 else "�"
        if "�" not in alone:  # bytes that never became a character ended before this token
            starts[-1] = cursor - len(alone)
        before, begin = begin, end
    return text, starts


@lru_cache(maxsize=8)
def _table(tokenizer: PreTrainedTokenizerBase, size: int) -> TokenTable:
    texts = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))], skip_special_tokens=False)
    texts += [""] * (size - len(texts))
    return TokenTable(
        torch.tensor([t.strip() == OPEN_THINKING for t in texts]),
        torch.tensor([t.strip() == CLOSE_THINKING for t in texts]),
        torch.tensor([ends_sentence(t) for t in texts]),
        tuple(filter(None, (_split(tokenizer, stop, texts) for stop in STOPS + SURE_STOPS))),
    )


def _split(tokenizer: PreTrainedTokenizerBase, character: str, texts: Sequence[str]) -> tuple[int, ...]:
    """The ids that spell a character in bytes; none if it is a token, or the tokenizer cannot spell it."""
    ids = list(tokenizer(character, add_special_tokens=False).input_ids)
    while ids and not texts[ids[0]].strip():  # some put a blank in front
        ids.pop(0)
    whole = len(ids) > 1 and tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == character
    return tuple(ids) if whole and all("�" in texts[i] for i in ids) else ()


def token_table(model: TransformerBridge) -> TokenTable:
    """Facts about the model's vocabulary, worked out once per tokenizer."""
    return _table(model.tokenizer, int(model.cfg.d_vocab))

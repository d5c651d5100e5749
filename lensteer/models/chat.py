"""Between text and a model's token ids: chat prompts, thinking tags, offsets."""

from __future__ import annotations

import warnings
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, Any

import torch

from lensteer.errors import LensteerError
from lensteer.files import check_text
from lensteer.models.dates import directives, with_fixed_date
from lensteer.models.facts import device, fingerprint
from lensteer.models.thought import Marks, header, opens_thought, thought_marks
from lensteer.positions import STOPS, SURE_STOPS, Mark, TokenTable, ends_sentence

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge
    from transformers import PreTrainedTokenizerBase

_LONGEST = 16  # tokens; bytes that have not become a character by then never will, and a run of them may be long


def chat_text(
    model: TransformerBridge, messages: str | Sequence[Mapping[str, str]], *, system: str = "", thinking: bool = True
) -> str:
    """The prompt of a conversation, formatted with the model's chat template, up to the assistant's turn.

    A template that writes today's date (through `strftime_now`) gets `dates.DATE`, 26 July 2024, instead: prompts, and
    chains that are resumed, would otherwise differ from day to day.

    Args:
        model: whose template to use.
        messages: a user's message as text, or messages with `role` and `content`.
        system: the system prompt, before the messages; without one the template may insert a default.
        thinking: passed to the template as `enable_thinking`. Some templates ignore it: if one opens a thought although
            it is False, the thought is closed at once, and a warning says so.

    Raises:
        LensteerError: the tokenizer has no chat template, its template does not support a system prompt, or a text has
            a lone surrogate.
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

    reason = "it ignores it"
    try:
        text = str(
            model.tokenizer.apply_chat_template(
                list(messages),
                chat_template=with_fixed_date(model.tokenizer.get_chat_template()),
                tokenize=False,
                add_generation_prompt=True,
                enable_thinking=thinking,
                lensteer_date=directives(),
            )
        )
    except TemplateError as error:
        if not system:
            raise LensteerError(
                f"the chat template of {fingerprint(model).name!r} fails ({type(error).__name__}: {error}): give "
                "another one by load_model(template=...)"
            ) from error
        text, reason = "", f"it says: {error}"
    if system and system.strip() not in text:
        raise LensteerError(
            f"the chat template of {fingerprint(model).name!r} takes no system prompt ({reason}): put "
            f"{system.strip()[:60]!r} into the user's prompt instead"
        )
    if not thinking and opens_thought(model, text):
        end = f"\n{thought_marks(model)[1]}\n\n"
        warnings.warn(
            f"the chat template of {fingerprint(model).name!r} opens a thought although thinking=False: a direct "
            f"answer is asked for by closing it, with {end!r}",
            stacklevel=2,
        )
        text += end
    return check_text(text, "the prompt")


def encode_raw(model: TransformerBridge, text: str) -> list[int]:
    """Token ids of a text without a chat template, as the tokenizer makes them: with a BOS if it adds one.

    A text that begins with the BOS gets no second one, and no token is appended.

    Raises:
        LensteerError: a lone surrogate in the text.
    """
    ids, bos = encode(model, text), model.tokenizer.bos_token_id
    writes_bos = bos is not None and list(model.tokenizer("a").input_ids)[:1] == [bos]
    return [int(bos), *ids] if writes_bos and ids[:1] != [bos] else ids


def encode(model: TransformerBridge, text: str) -> list[int]:
    """Token ids of a text that already holds its special tokens: nothing is prepended (templates add the BOS).

    Raises:
        LensteerError: a lone surrogate in the text.
    """
    return list(model.tokenizer(check_text(text, "the text"), add_special_tokens=False).input_ids)


def end_ids(model: TransformerBridge) -> set[int]:
    """Ids that end an answer: the tokenizer's and the generation config's."""
    config = getattr(model.original_model, "generation_config", None)
    listed = getattr(config, "eos_token_id", None)
    many: Iterable[Any] = listed if isinstance(listed, (list, tuple)) else [] if listed is None else [listed]
    if odd := [i for i in many if not isinstance(i, int)]:
        raise LensteerError(f"generation_config.json of {fingerprint(model).name!r} has {odd[0]!r} as eos_token_id")
    own = model.tokenizer.eos_token_id
    return {int(i) for i in many} | (set() if own is None else {int(own)})


def decode_offsets(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> tuple[str, list[int]]:
    """The text of token ids, and where in it each token starts.

    The ids are decoded as they are (re-encoding the text may give others). Tokens that only together form a character
    share its start; a token covers the characters up to the next start.
    """

    def decode(some: Sequence[int]) -> str:
        return str(tokenizer.decode(list(some), skip_special_tokens=False, clean_up_tokenization_spaces=False))

    text = decode(ids)
    starts: list[int] = []
    cursor, before, begin = 0, 0, 0  # ids[before:begin] form whole characters and are decoded along: some decoders
    for end in range(1, len(ids) + 1):  # drop a leading space
        starts.append(cursor)
        piece = decode(ids[before:end])[len(decode(ids[before:begin])) :]
        unfinished = piece.endswith("�") and end - begin < _LONGEST
        if unfinished or not text.startswith(piece, cursor):
            continue
        cursor += len(piece)
        alone = decode(ids[end - 1 : end]) if end - begin > 1 else "�"
        if "�" not in alone:  # bytes that never became a character ended before this token
            starts[-1] = cursor - len(alone)
        before, begin = begin, end
    return text, starts


@lru_cache(maxsize=8)
def _table(tokenizer: PreTrainedTokenizerBase, size: int, marks: Marks, header: str, where: torch.device) -> TokenTable:
    texts = tokenizer.batch_decode([[i] for i in range(min(size, len(tokenizer)))], skip_special_tokens=False)
    texts += [""] * (size - len(texts))
    thought = [Mark.of(mark, texts, where, _split(tokenizer, mark, texts)) for mark in marks if mark]
    return TokenTable(
        torch.tensor([ends_sentence(t) for t in texts], device=where),
        tuple(filter(None, (_split(tokenizer, stop, texts) for stop in STOPS + SURE_STOPS))),
        texts,
        (thought[0], thought[1]) if thought else None,
        header,
    )


def _split(tokenizer: PreTrainedTokenizerBase, text: str, texts: Sequence[str]) -> tuple[int, ...]:
    """The ids that spell a text, if some hold parts of a character only; none, too, if they cannot spell it."""
    ids = list(tokenizer(text, add_special_tokens=False).input_ids)
    while ids and not texts[ids[0]].strip():  # some put a space in front
        ids.pop(0)
    whole = len(ids) > 1 and tokenizer.decode(ids, clean_up_tokenization_spaces=False).strip() == text
    return tuple(ids) if whole and any("�" in texts[i] for i in ids) else ()


def token_table(model: TransformerBridge) -> TokenTable:
    """Facts about the model's vocabulary, computed once per tokenizer, template and thought marks."""
    return _table(model.tokenizer, int(model.cfg.d_vocab), thought_marks(model), header(model), device(model))

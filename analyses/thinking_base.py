"""A base model made ready to be taught to think: the part of `teach_thinking.py` before any training.

A thought needs two marks, each a single token, and a chat template that opens it. The marks are the first of these that
there are: those in the base's chat template; `<think>` and `</think>` as tokens of its vocabulary; two spare tokens of
it (reserved or unused ones), renamed; new tokens in rows of the embedding that the vocabulary leaves free; new tokens
in new rows. A new row begins as the mean of the rows that spelled the mark before. A template that writes no thought
gets `<think>` and a newline after its generation prompt, as R1's has; a base without a template gets a plain one.
"""

from __future__ import annotations

import copy
import json
import re
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from jinja2 import TemplateError

import lensteer as ls
from lensteer import models
from lensteer.errors import LensteerError
from lensteer.export.weights import weights_of
from lensteer.progress import no_loading_bar

#: Names of tokens that no text uses, the best first. SmolLM2 has the second kind, from a corpus of notebooks.
SPARE = (r"reserved|unused|placeholder|dummy|^<\|?extra", r"^<jupyter_(output|script)>$")
PLAIN_TEMPLATE = (
    "{% for message in messages %}{{ message['role'].capitalize() + ': ' + message['content'] + '\\n\\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:\\n' }}{% endif %}"
)
ITS_OWN, RENAMED, FREE, NEW = "its own", "spare tokens, renamed", "new tokens in free rows", "new tokens in new rows"


@dataclass(frozen=True, eq=False)
class Base:
    """What is known of a base with marks of thought; its weights are the bridge's.

    Attributes:
        identity: of the base, before any change.
        dtype: of the weights.
        tokenizer: with the marks, and with a template that opens the thought.
        marks: what opens and what closes a thought.
        how: where the marks' tokens come from: one of the four constants above.
        rows: ids of the marks; none if they are several tokens each, as in gpt-oss.
        spelled: the ids that spelled each mark before.
        opened: whether the template opens the thought.
        end: id of the token that ends a response.
    """

    identity: models.ModelId
    dtype: torch.dtype
    tokenizer: Any
    marks: models.Marks
    how: str
    rows: tuple[int, ...]
    spelled: tuple[tuple[int, ...], ...]
    opened: bool
    end: int


def load_base(source: str, dtype: str, device: str | None = None) -> tuple[Base, Any]:
    """Load a base by `ls.load_model` and give its tokenizer and template what a thought needs.

    Returns:
        What is known of it, and the bridge, with the new tokenizer; its weights are as they were.

    Raises:
        LensteerError: whatever `load_model` refuses; quantized weights; no token that ends a response; marks that do
            not become single tokens; a template that cannot be continued.
    """
    bridge = ls.load_model(source, dtype=dtype, device=device)
    identity, weights = models.fingerprint(bridge), weights_of(bridge)
    tokenizer = bridge.tokenizer
    if weights.folder is not None:  # as it is there: TransformerLens switches a BOS on
        from transformers import AutoTokenizer

        tokenizer = AutoTokenizer.from_pretrained(weights.folder)
    template = tokenizer.get_chat_template() if tokenizer.chat_template else None
    marks = models.marks_of(tokenizer)
    if marks == models.UNMARKED:
        marks = (models.OPEN_THINKING, models.CLOSE_THINKING)
    spelled = tuple(tuple(tokenizer(mark, add_special_tokens=False).input_ids) for mark in marks)
    n_rows = int(bridge.original_model.get_input_embeddings().weight.shape[0])
    tokenizer, how = _with_marks(tokenizer, marks, template or "", spelled, n_rows)
    tokenizer.chat_template = template or _plain_template(tokenizer)
    bridge._tokenizer = tokenizer  # TransformerLens' setter would read it anew from where it came, without the marks
    opened = _open(bridge, marks)
    rows = tuple(int(tokenizer.convert_tokens_to_ids(mark)) for mark in marks)
    if how == ITS_OWN and any(len(ids) > 1 for ids in spelled):
        rows = ()
    return Base(
        identity, bridge.original_model.dtype, tokenizer, marks, how, rows, spelled, opened, _end(bridge)
    ), bridge


def plain_model(base: Base, bridge: Any) -> Any:
    """A Hugging Face model of its own with the base's weights and rows for the marks, for training.

    The bridge's own modules are TransformerLens' and its attention is not fused.
    """
    original, weights = bridge.original_model, weights_of(bridge)
    state = {name: weights.get(name) for name in weights.names}
    with no_loading_bar():
        model = type(original).from_pretrained(
            None, config=copy.deepcopy(original.config), state_dict=state, dtype=base.dtype
        )
    with suppress(ValueError):  # it has none that is fused
        model.set_attn_implementation("sdpa")
    model.generation_config = copy.deepcopy(original.generation_config)
    model.generation_config.eos_token_id = sorted({base.end, *models.end_ids(bridge)})
    model.to(models.device(bridge))
    with torch.no_grad(), no_loading_bar():
        if base.how == NEW:
            model.resize_token_embeddings(len(base.tokenizer), mean_resizing=False)
        tables = [model.get_input_embeddings().weight, model.get_output_embeddings().weight]
        if tables[0] is tables[1]:
            tables.pop()
        for table in tables if base.how != ITS_OWN else []:
            for row, ids in zip(base.rows, base.spelled, strict=True):
                table[row] = table[list(ids)].float().mean(0).to(table.dtype)
    return model


def _with_marks(
    tokenizer: Any, marks: models.Marks, template: str, spelled: Sequence[Sequence[int]], n_rows: int
) -> tuple[Any, str]:
    """The tokenizer with the marks as single tokens, and where these come from."""
    if models.marks_in(template) == marks or all(len(ids) == 1 for ids in spelled):
        return tokenizer, ITS_OWN
    spare = spare_tokens(tokenizer, template)
    if len(spare) >= 2 and tokenizer.is_fast:
        made, how = _renamed(tokenizer, dict(zip(spare, marks, strict=False))), RENAMED
    else:
        from transformers import AddedToken

        made, how = copy.deepcopy(tokenizer), FREE if len(tokenizer) + 2 <= n_rows else NEW
        made.add_tokens([AddedToken(mark, special=False, normalized=False) for mark in marks])
    probe = made(f"a{marks[0]}\nb\n{marks[1]}\n\nc", add_special_tokens=False).input_ids
    if any(probe.count(made.convert_tokens_to_ids(mark)) != 1 for mark in marks):
        raise LensteerError(
            f"{' and '.join(marks)} do not become single tokens of this {type(tokenizer).__name__} ({how}): give a "
            "base with a fast tokenizer, or one whose vocabulary has them"
        )
    return made, how


def spare_tokens(tokenizer: Any, template: str) -> list[str]:
    """Tokens that no text and no template uses, in the order of `SPARE` and of their ids."""
    used = {name for name in tokenizer.special_tokens_map.values() if isinstance(name, str)}
    names = [token.content for _, token in sorted(tokenizer.added_tokens_decoder.items()) if token.special]
    free = [name for name in names if name not in template and name not in used]
    return [name for kind in SPARE for name in free if re.search(kind, name)]


def _renamed(tokenizer: Any, names: dict[str, str]) -> Any:
    """The tokenizer with other names for two of its tokens, which are no special ones any longer."""
    from transformers import AutoTokenizer

    def changed(value: Any) -> Any:
        if isinstance(value, list):
            lists_names = all(isinstance(part, str) for part in value)
            return [part for part in value if part not in names] if lists_names else [changed(part) for part in value]
        if isinstance(value, dict):
            if value.get("content") in names and "special" in value:
                return value | {"content": names[value["content"]], "special": False, "normalized": False}
            return {names.get(key, key): changed(part) for key, part in value.items()}
        return value

    with TemporaryDirectory() as folder:
        tokenizer.save_pretrained(folder)
        for path in Path(folder).glob("*.json"):
            path.write_text(json.dumps(changed(json.loads(path.read_text("utf-8"))), ensure_ascii=False), "utf-8")
        return AutoTokenizer.from_pretrained(folder)


def _plain_template(tokenizer: Any) -> str:
    """For a base without one. A BOS is written where the tokenizer puts one before a text."""
    bos = tokenizer.bos_token_id
    return ("{{ bos_token }}" if bos is not None and tokenizer("a").input_ids[:1] == [bos] else "") + PLAIN_TEMPLATE


def _open(bridge: Any, marks: models.Marks) -> bool:
    """Let the template open the thought, unless it knows marks already; whether it does."""
    question = "How many days are in two weeks?"
    before = models.chat_text(bridge, question)
    if models.thought_marks(bridge) != marks:
        opening = f"{{% if add_generation_prompt %}}{{{{ '{marks[0]}\\n' }}}}{{% endif %}}"
        bridge.tokenizer.chat_template = bridge.tokenizer.chat_template.removesuffix("\n") + opening
        after = models.chat_text(bridge, question)
        if after != f"{before}{marks[0]}\n" or not models.opens_thought(bridge, after):
            raise LensteerError(
                f"the chat template of {models.fingerprint(bridge).name!r} cannot be continued by {marks[0]!r} (a "
                f"prompt ends in {after[-60:]!r}): set one that can, in the base's folder"
            )
    return models.opens_thought(bridge, models.chat_text(bridge, question))


def _end(bridge: Any) -> int:
    """The token that ends a response: the one that the template writes there, else the tokenizer's own."""
    tokenizer, ends = bridge.tokenizer, models.end_ids(bridge)
    if not ends:
        raise LensteerError(
            f"{models.fingerprint(bridge).name!r} has no token that ends a response: set eos_token in its tokenizer"
        )
    said = [{"role": "user", "content": "QUESTION"}, {"role": "assistant", "content": "ANSWER"}]
    try:
        text = str(tokenizer.apply_chat_template(said, tokenize=False))
    except TemplateError:
        text = ""
    written = [i for i in models.encode(bridge, text.rpartition("ANSWER")[2]) if i in ends]
    own = tokenizer.eos_token_id
    return written[0] if written else min(ends) if own is None else int(own)

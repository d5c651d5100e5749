"""Where a pair is read: named positions, and the tokens of a text that each of them is. Owns every offset here."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lensteer import models
from lensteer.contrast.pairs import Text
from lensteer.errors import LensteerError

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

POSITIONS = ("last_prompt", "prompt", "answer", "letter", "last")
_TOKEN = "token:"


@dataclass(frozen=True)
class Encoded:
    """A text as token ids: the first `n_prompt` are the prompt, with its template; the others the completion."""

    ids: tuple[int, ...]
    n_prompt: int


@dataclass(frozen=True)
class Position:
    """Which tokens of a text are read: their mean activation is the text's.

    Attributes:
        kind: a name of `POSITIONS`, "index" or "token".
        index: of kind "index": of all tokens, negative from the end.
        text: of kind "token": the words whose token is read.
    """

    kind: str
    index: int = 0
    text: str = ""

    @classmethod
    def parse(cls, spec: str | int | Position) -> Position:
        """Read a position's name.

        Args:
            spec: "last_prompt", the last token of the prompt (with a chat template the one whose logits predict the
                answer's first token); "prompt", the mean over the prompt without its first token; "answer", the mean
                over the completion; "letter", the completion's last token with a letter or digit in it, such as the A
                of "(A)" (where CAA reads); "last", the text's last token (where repeng reads); an index of all tokens,
                negative from the end, as a number or a string; or "token:WORDS", the last token of the last place where
                these words stand.

        Raises:
            LensteerError: any other name, or index 0: the first token sees nothing of the text.
        """
        if isinstance(spec, Position):
            return spec
        if isinstance(spec, int) or re.fullmatch(r"[-+]?\d+", spec):
            if int(spec) == 0:
                raise LensteerError("position 0 is an attention sink, the same in every text: read a later token")
            return cls("index", index=int(spec))
        if spec.startswith(_TOKEN) and spec != _TOKEN:
            return cls("token", text=spec.removeprefix(_TOKEN))
        if spec not in POSITIONS:
            raise LensteerError(
                f"unknown position {spec!r}: choose one of {', '.join(map(repr, POSITIONS))}, an index, or "
                "'token:WORDS' for the token that WORDS end with"
            )
        return cls(spec)

    def __str__(self) -> str:
        return {"index": str(self.index), "token": f"{_TOKEN}{self.text}"}.get(self.kind, self.kind)

    def bounds(self, model: TransformerBridge, text: Encoded) -> tuple[int, int]:
        """The tokens as a half-open range of absolute positions; never position 0.

        Raises:
            LensteerError: the text has no such token.
        """
        n = len(text.ids)
        if self.kind in ("answer", "letter") and n == text.n_prompt:
            raise LensteerError(
                f"no completion to read {str(self)!r} in: give one, let the model write it (complete_pairs), or read "
                "'last_prompt'"
            )
        if self.kind == "answer":
            begin, end = text.n_prompt, n
        elif self.kind == "prompt":
            begin, end = 1, text.n_prompt
        else:
            begin = self._token(model, text)
            end = begin + 1
        if not 1 <= begin < end <= n:
            raise LensteerError(f"position {str(self)!r} is outside the {n} tokens, or the first of them")
        return begin, end

    def _token(self, model: TransformerBridge, text: Encoded) -> int:
        if self.kind == "last_prompt":
            return text.n_prompt - 1
        if self.kind == "last":
            return len(text.ids) - 1
        if self.kind == "index":
            return self.index + len(text.ids) if self.index < 0 else self.index
        begin = text.n_prompt if self.kind == "letter" else 0
        said, starts = models.decode_offsets(model.tokenizer, text.ids[begin:])
        if self.kind == "letter":
            at = max((i for i, sign in enumerate(said) if sign.isalnum()), default=-1)
        else:
            found = said.rfind(self.text)
            at = -1 if found < 0 else found + len(self.text) - 1
        if at < 0:
            what = "letter or digit" if self.kind == "letter" else repr(self.text)
            raise LensteerError(f"no {what} in {said[-120:]!r} to read at")
        return begin + max(i for i, start in enumerate(starts) if start <= at)


def encode_text(model: TransformerBridge, text: Text, *, thinking: bool = True) -> tuple[str, Encoded]:
    """The prompt as a string, and the whole text as tokens.

    Args:
        model: whose chat template is used, unless the text is raw.
        text: one side of a pair.
        thinking: given to the template as `enable_thinking`.

    Raises:
        LensteerError: no chat template, one that takes no system prompt, a prompt with special tokens that would get a
            template around it, or more tokens than the model's context.
    """
    if text.raw:
        prompt, ids = text.prompt, models.encode_raw(model, text.prompt)
    else:
        special = [token for token in model.tokenizer.all_special_tokens if token in text.prompt]
        if special:
            raise LensteerError(
                f"the prompt {text.prompt[:60]!r} holds {special[0]!r}, so it has its template already: say raw=True"
            )
        if not model.tokenizer.chat_template:
            raise LensteerError(
                f"the tokenizer of {models.fingerprint(model).name!r} has no chat template: say raw=True to give it "
                "texts as they are"
            )
        prompt = models.chat_text(model, text.prompt, system=text.system, thinking=thinking)
        ids = models.encode(model, prompt)
    answer = text.completion_ids or models.encode(model, text.completion)
    n, longest = len(ids) + len(answer), models.context_length(model)
    if longest is not None and n > longest:
        raise LensteerError(f"{n} tokens, but the model's context has {longest}: shorten {text.prompt[:60]!r}")
    return prompt, Encoded((*ids, *answer), len(ids))

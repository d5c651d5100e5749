"""Position scopes: masks over absolute positions, composable with `&`, `|` and `~`.

Whether a scope selects position p depends only on the tokens up to p, so a decode step and a full forward agree.
Padding is never selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lensteer.errors import LensteerError

#: Characters that end a sentence and may do something else, too (`3.14`, `5!`): what follows decides.
STOPS = ".!?…"
#: Characters that end a sentence and do nothing else, in any script; no blank needs to follow.
SURE_STOPS = "。｡．！？︒︕︖﹒﹖﹗‼⁇⁈⁉‽؟۔܀।॥။។៕։።፧፨᠃᠉"
CLOSERS = "\"'”’»」』｣）)]}】》〉*_`"
"""What may stand between such a character and the blank after the sentence."""


@dataclass(frozen=True)
class TokenTable:
    """Facts about the ids of a vocabulary.

    Attributes:
        opens: per id, whether it opens thinking.
        closes: per id, whether it closes it.
        ends_sentence: per id, whether its text ends a sentence (`ends_sentence`).
        split_ends: runs of ids, none of which is a whole character, that together are one that ends a sentence.
    """

    opens: Bool[Tensor, " d_vocab"]
    closes: Bool[Tensor, " d_vocab"]
    ends_sentence: Bool[Tensor, " d_vocab"]
    split_ends: tuple[tuple[int, ...], ...] = ()


def ends_sentence(text: str) -> bool:
    """Whether a token's text ends a sentence: at its end is one of `STOPS` or `SURE_STOPS`, or it holds a line break.

    Only after one of `SURE_STOPS` may quotes and brackets close in the same token.
    """
    said = text.strip()
    return "\n" in text or (bool(said) and (said[-1] in STOPS or said.rstrip(CLOSERS)[-1:] in tuple(SURE_STOPS)))


@dataclass(frozen=True)
class Context:
    """All tokens of a left-padded batch so far, cached ones included.

    Attributes:
        ids: token ids; those of padding do not matter.
        pad: number of padding tokens before each row.
        prompt_length: number of prompt tokens of each row, padding not counted.
        tokens: facts about the vocabulary.
    """

    ids: Int[Tensor, "batch pos"]
    pad: Int[Tensor, " batch"]
    prompt_length: Int[Tensor, " batch"]
    tokens: TokenTable

    @property
    def position(self) -> Int[Tensor, "batch pos"]:
        """Absolute positions: 0 is a row's first real token, padding is negative."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] - self.pad[:, None]

    def flag(self, table: Bool[Tensor, " d_vocab"]) -> Bool[Tensor, "batch pos"]:
        """Look every token up in a table of the vocabulary; padding is False."""
        return table.to(self.ids.device)[self.ids] & (self.position >= 0)

    def ends(self) -> Bool[Tensor, "batch pos"]:
        """Generated tokens that end a sentence; of a character of several tokens, the last one does."""
        ends = self.flag(self.tokens.ends_sentence)
        last = torch.tensor(sorted({run[-1] for run in self.tokens.split_ends}), device=self.ids.device)
        if len(last) and bool(torch.isin(self.ids, last).any()):
            for run in self.tokens.split_ends:
                ends |= _runs(self, run)
        return ends & (self.position >= self.prompt_length[:, None])


@dataclass(frozen=True)
class PositionScope:
    """A named set of positions. Combine with `&`, `|`, `~`; two scopes are equal if their names are."""

    name: str
    choose: Callable[[Context], Bool[Tensor, "batch pos"]]

    def mask(self, context: Context) -> Bool[Tensor, "batch pos"]:
        """Selected positions, never padding."""
        return self.choose(context) & (context.position >= 0)

    def __and__(self, other: PositionScope) -> PositionScope:
        return PositionScope(f"({self.name} & {other.name})", lambda c: self.choose(c) & other.choose(c))

    def __or__(self, other: PositionScope) -> PositionScope:
        return PositionScope(f"({self.name} | {other.name})", lambda c: self.choose(c) | other.choose(c))

    def __invert__(self) -> PositionScope:
        return PositionScope(f"~{self.name}", lambda c: ~self.choose(c))

    def __eq__(self, other: object) -> bool:
        return isinstance(other, PositionScope) and self.name == other.name

    def __hash__(self) -> int:
        return hash(self.name)


def _runs(context: Context, run: tuple[int, ...]) -> Bool[Tensor, "batch pos"]:
    """The last token of each occurrence of a run of ids."""
    found = context.position >= len(run) - 1
    for back, token in enumerate(reversed(run)):
        found[:, back:] &= context.ids[:, : context.ids.shape[1] - back] == token
    return found


def _inside_thinking(context: Context) -> Bool[Tensor, "batch pos"]:
    if not bool(context.tokens.opens.any()):
        raise LensteerError(
            "scope 'thinking': this vocabulary has no single token '<think>'; use `generated` or explicit positions"
        )
    # By the last tag, not by counting tags: some models repeat a `<think>` that the template has opened.
    column = torch.arange(1, context.ids.shape[1] + 1, device=context.ids.device)
    opened, closed = (
        (context.flag(table) * column).cummax(1).values for table in (context.tokens.opens, context.tokens.closes)
    )
    return opened > closed


def _after_sentence_end(context: Context) -> Bool[Tensor, "batch pos"]:
    """Whether the previous token ends a sentence or the prompt."""
    ends = context.ends()
    before = torch.zeros_like(ends)
    before[:, 1:] = ends[:, :-1]
    return before | (context.position == context.prompt_length[:, None])


everywhere = PositionScope("everywhere", lambda c: torch.ones_like(c.ids, dtype=torch.bool))
"""Every position, prompt included."""
everywhere_but_first = PositionScope("everywhere_but_first", lambda c: c.position > 0)
"""Every position but the first, which is the BOS or another attention sink."""
prompt = PositionScope("prompt", lambda c: c.position < c.prompt_length[:, None])
"""The prompt's tokens, including the chat template's."""
generated = PositionScope("generated", lambda c: c.position >= c.prompt_length[:, None])
"""The answer's tokens."""
thinking = PositionScope("thinking", _inside_thinking)
"""From `<think>` on (which the chat template may contain), up to the token before `</think>`."""
sentence_starts = PositionScope("sentence_starts", _after_sentence_end)
"""The first token of each generated sentence. A period within a number counts as an end: later tokens are unknown."""
onsets = PositionScope(
    "onsets",
    lambda c: c.ends() | (c.position == c.prompt_length[:, None] - 1),
)
"""The positions whose logits begin a sentence: tokens that end one, and the prompt's last token."""


def first(n: int) -> PositionScope:
    """The first `n` generated tokens.

    Raises:
        LensteerError: `n` is not positive.
    """
    if n < 1:
        raise LensteerError(f"first({n}): give a positive number of tokens")

    def choose(context: Context) -> Bool[Tensor, "batch pos"]:
        past_prompt = context.position - context.prompt_length[:, None]
        return (past_prompt >= 0) & (past_prompt < n)

    return PositionScope(f"first({n})", choose)


def at(positions: Iterable[int]) -> PositionScope:
    """Explicit absolute positions, the same in every row; 0 is the prompt's first token.

    Raises:
        LensteerError: no position, or a negative one.
    """
    chosen = sorted(set(positions))
    if not chosen or chosen[0] < 0:
        raise LensteerError(f"at({chosen}): give at least one position, counted from 0 at the prompt's first token")
    wanted = torch.tensor(chosen)
    return PositionScope(f"at({chosen})", lambda c: torch.isin(c.position, wanted.to(c.ids.device)))

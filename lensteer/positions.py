"""Position scopes: masks over absolute positions, composable with `&`, `|` and `~`.

Whether a scope selects position p depends only on the tokens up to p, so a decode step and a full forward agree.
Padding is never selected.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from lensteer.arguments import checked
from lensteer.errors import LensteerError

#: Characters that end a sentence and may do something else, too (`3.14`, `5!`): what follows decides.
STOPS = ".!?…"
#: Characters that end a sentence and do nothing else, in any script; no blank needs to follow.
SURE_STOPS = "。｡．！？︒︕︖﹒﹖﹗‼⁇⁈⁉‽؟۔܀।॥။។៕։።፧፨᠃᠉"
CLOSERS = "\"'”’»」』｣）)]}】》〉*_`"
"""What may stand between such a character and the blank after the sentence."""


@dataclass(frozen=True)
class Mark:
    """A text that one or several tokens spell, such as `<think>`.

    Attributes:
        text: the mark, without white space.
        whole: per id, whether the token holds all of it.
        tail: per id, whether the token begins with an end of it, so that it may be the last of several.
        run: the ids that spell it where some hold a part of a character, so that their texts do not tell.
    """

    text: str
    whole: Bool[Tensor, " d_vocab"]
    tail: Bool[Tensor, " d_vocab"]
    run: tuple[int, ...] = ()

    @staticmethod
    def of(text: str, texts: Sequence[str], device: torch.device | str = "cpu", run: tuple[int, ...] = ()) -> Mark:
        """From the text of each token of a vocabulary."""
        ends = tuple(text[i:] for i in range(1, len(text)))
        whole, tail = [text in t for t in texts], [t.startswith(ends) for t in texts]
        return Mark(text, torch.tensor(whole, device=device), torch.tensor(tail, device=device), run)


@dataclass(frozen=True)
class TokenTable:
    """Facts about the ids of a vocabulary.

    Attributes:
        ends_sentence: per id, whether its text ends a sentence (`ends_sentence`).
        split_ends: runs of ids, none of which is a whole character, that together are one that ends a sentence.
        texts: per id, its text.
        thought: what opens and what closes a thought; None if the whole response is the chain.
        header: what the chat template writes before a response, without white space; marks before it do not count.
    """

    ends_sentence: Bool[Tensor, " d_vocab"]
    split_ends: tuple[tuple[int, ...], ...] = ()
    texts: Sequence[str] = ()
    thought: tuple[Mark, Mark] | None = None
    header: str = ""


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
        ahead: how many of the last columns are prompt that no pass has run yet. Whose mark it is shows only there.
    """

    ids: Int[Tensor, "batch pos"]
    pad: Int[Tensor, " batch"]
    prompt_length: Int[Tensor, " batch"]
    tokens: TokenTable
    ahead: int = 0

    @cached_property
    def position(self) -> Int[Tensor, "batch pos"]:
        """Absolute positions: 0 is a row's first real token, padding is negative."""
        return torch.arange(self.ids.shape[1], device=self.ids.device)[None] - self.pad[:, None]

    def last(self, n: int) -> slice:
        """The columns of a pass over `n` tokens."""
        end = self.ids.shape[1] - self.ahead
        return slice(end - n, end)

    def flag(self, table: Bool[Tensor, " d_vocab"]) -> Bool[Tensor, "batch pos"]:
        """Look every token up in a table of the vocabulary; padding is False."""
        return table.to(self.ids.device)[self.ids] & (self.position >= 0)

    def ends(self) -> Bool[Tensor, "batch pos"]:
        """Generated tokens that end a sentence; of a character of several tokens, the last one does."""
        ends = self.flag(self.tokens.ends_sentence)
        if self.tokens.split_ends:
            runs = _reversed_runs(self.tokens.split_ends).to(self.ids.device)
            rows, columns = torch.isin(self.ids, runs[:, 0]).nonzero(as_tuple=True)
            if len(rows):
                before = columns[:, None] - torch.arange(runs.shape[1], device=runs.device)
                ids = self.ids[rows[:, None], before.clamp(min=0)]
                ids[before < self.pad[rows, None]] = NO_TOKEN
                ends[rows, columns] |= ((ids[:, None] == runs) | (runs == ANY_TOKEN)).all(-1).any(-1)
        return ends & (self.position >= self.prompt_length[:, None])

    def marks(self) -> tuple[Bool[Tensor, "batch pos"], Bool[Tensor, "batch pos"]]:
        """Tokens that complete a mark that opens a thought, and one that closes it, whoever wrote them."""
        if self.tokens.thought is None:
            return torch.zeros_like(self.ids, dtype=torch.bool), torch.zeros_like(self.ids, dtype=torch.bool)
        opens, closes = self.tokens.thought
        return _spelled(self, opens), _spelled(self, closes)


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


#: In place of an id: before the text, and where a run is shorter than others.
NO_TOKEN, ANY_TOKEN = -2, -1


@lru_cache(maxsize=8)
def _reversed_runs(runs: tuple[tuple[int, ...], ...]) -> Int[Tensor, "run back"]:
    """Runs of ids as rows, each from its last id to its first."""
    longest = max(map(len, runs))
    return torch.tensor([[*reversed(run), *[ANY_TOKEN] * (longest - len(run))] for run in runs])


def _runs(context: Context, run: tuple[int, ...]) -> Bool[Tensor, "batch pos"]:
    """The last token of each occurrence of a run of ids."""
    found = context.position >= len(run) - 1
    for back, token in enumerate(reversed(run)):
        found[:, back:] &= context.ids[:, : context.ids.shape[1] - back] == token
    return found


def _spelled(context: Context, mark: Mark) -> Bool[Tensor, "batch pos"]:
    """The tokens that complete a mark."""
    texts, found = context.tokens.texts, context.flag(mark.whole)
    if mark.run:
        found |= _runs(context, mark.run)
    candidates = (context.flag(mark.tail) & ~found).nonzero().tolist()
    pads = context.pad.tolist() if candidates else []
    for row, column in candidates:
        before, at = "", column
        while len(before) < len(mark.text) and at > pads[row]:
            at -= 1
            before = texts[int(context.ids[row, at])] + before
        # It begins before the last token and ends within it.
        whole = before + texts[int(context.ids[row, column])]
        found[row, column] = 0 <= whole.find(mark.text, max(0, len(before) - len(mark.text) + 1)) < len(before)
    return found


def _own_marks(context: Context, marks: Bool[Tensor, "batch pos"]) -> Bool[Tensor, "batch pos"]:
    """The prompt's marks after its last message: those before the assistant's header are somebody's words."""
    columns = marks.any(0).nonzero().flatten()
    if not len(columns):
        return marks
    own, first = marks.clone(), int(columns[0])
    # A context may end within its prompt.
    ends = (context.pad + context.prompt_length - first).clamp(max=marks.shape[1] - first).tolist()
    prompts = slice(first, first + max(ends))
    rows = zip(marks[:, prompts].tolist(), context.ids[:, prompts].tolist(), ends, strict=True)
    for row, (marked, ids, end) in enumerate(rows):
        after = ""
        for at in reversed(range(marked.index(True) if True in marked else end, end)):
            after = context.tokens.texts[ids[at]] + after
            if marked[at] and in_message(after, context.tokens.header):
                own[row, : first + at + 1] = False
                break
    return own


def in_message(rest: str, header: str) -> bool:
    """Whether a mark is part of a message: the assistant's header is in the rest of the prompt, from the mark on."""
    return bool(header) and header in squeezed(rest)


def squeezed(text: str) -> str:
    """A text without its white space, which tokenizers add, drop and merge."""
    return "".join(text.split())


def _inside_thinking(context: Context) -> Bool[Tensor, "batch pos"]:
    answer = context.position >= context.prompt_length[:, None]
    if context.tokens.thought is None:
        return answer
    opens, closes = context.marks()
    column = torch.arange(context.ids.shape[1], device=context.ids.device)
    # In the prompt the last mark decides: a template may open a thought, and close it, too.
    own = _own_marks(context, (opens | closes) & ~answer)
    opened, closed = (((found & own) * (column + 1)).cummax(1).values for found in (opens, closes))
    left_open = opened > closed
    is_open = left_open[:, -1:]  # those of the answer do not change it
    # The answer has one thought: from its first opening mark, or from the start, to the first closing mark after that.
    first = torch.where(is_open, context.pad[:, None] + context.prompt_length[:, None], _first(opens & answer))
    last = _first(closes & answer & (column >= first))
    return torch.where(answer, (column >= first) & (column < last), left_open)


def _first(mask: Bool[Tensor, "batch pos"]) -> Int[Tensor, "batch 1"]:
    """The first column of each row that is selected; the width if none is."""
    return torch.where(mask.any(1), mask.int().argmax(1), mask.shape[1])[:, None]


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
"""From the mark that opens a thought (the chat template may write it) up to the token before the one that closes it.

Only marks after the last message count, and of a response its first thought, as in `Trace.thinking`. A mark of several
tokens is known at its last one. If the model marks no thought (`models.thought_marks`), every generated token.
"""
sentence_starts = PositionScope("sentence_starts", _after_sentence_end)
"""The first token of each generated sentence. A period within a number counts as an end: later tokens are unknown."""
onsets = PositionScope(
    "onsets",
    lambda c: c.ends() | (c.position == c.prompt_length[:, None] - 1),
)
"""The positions whose logits begin a sentence: tokens that end one, and the prompt's last token."""


@checked()
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


@checked()
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

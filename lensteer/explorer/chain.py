"""One chain as the explorer shows it: tokens with behaviors, sentences, the thinking, and selections of positions."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.expressions import inverted, parse_scope
from lensteer.positions import Context, sentence_starts
from lensteer.results import reading
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

SELECTIONS = ("all", "none", "invert", "sentence", "behavior", "thinking", "sentence_starts", "onsets")
"""What can be chosen with one button."""


@dataclass(frozen=True)
class Piece:
    """A part of a chain, half-open: a sentence, the prompt, or text before or after all sentences."""

    start: int
    end: int
    label: str


@dataclass(frozen=True, eq=False)
class Chain:
    """The displayed form of a trace. All positions are absolute.

    Attributes:
        trace: the chain itself.
        texts: of the tokens, prompt included; a character of several tokens is in the last of them.
        context: the chain as input for scopes.
        pieces: all of it, in order, without gaps.
        tags: positions of `<think>` and `</think>`.
    """

    trace: Trace
    texts: tuple[str, ...]
    context: Context
    pieces: tuple[Piece, ...]
    tags: tuple[int, ...]

    @staticmethod
    def of(model: TransformerBridge, trace: Trace) -> Chain:
        """The chain of a trace.

        Raises:
            LensteerError: a trace without prompt or response, or one with ids that the model lacks.
        """
        if not trace.prompt_ids or not trace.response_ids:
            raise LensteerError(f"trace {trace.id!r} has no prompt or no response: give one with tokens in both")
        with reading(f"trace {trace.id!r}"):
            models.check_ids(model, [trace.ids])
        prompt, starts = models.decode_offsets(model.tokenizer, trace.prompt_ids)
        texts = _cut(prompt, starts) + _cut(trace.response, trace.offsets)
        ids, zero = torch.tensor([trace.ids]), torch.zeros(1, dtype=torch.long)
        context = Context(ids, zero, zero + trace.prompt_length, models.token_table(model))
        opens, closes = context.marks()
        tags = (opens | closes)[0].nonzero()[:, 0].tolist()
        return Chain(trace, tuple(texts), context, _pieces(trace, context, tags), tuple(tags))

    def __len__(self) -> int:
        return len(self.texts)

    def positions(self, expression: str) -> tuple[int, ...]:
        """The positions that an expression chooses; an empty one chooses none.

        Raises:
            LensteerError: an expression that cannot be parsed, or is undefined for this vocabulary.
        """
        if not expression.strip():
            return ()
        return tuple(parse_scope(expression).mask(self.context)[0].nonzero()[:, 0].tolist())

    def expression(self, positions: Collection[int], before: str = "") -> str:
        """An expression for explicit positions; the previous one, if it chooses the same.

        Raises:
            LensteerError: a position outside the chain.
        """
        chosen = sorted(set(positions))
        if chosen and not 0 <= chosen[0] <= chosen[-1] < len(self):
            raise LensteerError(f"positions {chosen[0]} to {chosen[-1]}: this chain has positions 0 to {len(self) - 1}")
        if tuple(chosen) == self.positions(before):
            return before
        return f"at({chosen})" if chosen else ""

    def piece_at(self, position: int) -> Piece:
        """The sentence (or other piece) that a position belongs to."""
        return next(piece for piece in self.pieces if piece.start <= position < piece.end)

    def select(self, what: str, before: str, behavior: str, cursor: int) -> str:
        """The expression of a button.

        Args:
            what: one of `SELECTIONS`; "sentence" adds the cursor's, or removes it if all of it is chosen.
            before: the expression so far.
            behavior: whose spans "behavior" chooses.
            cursor: a position.

        Raises:
            LensteerError: an unknown selection, a position outside the chain, a behavior that has no span here.
        """
        if what not in SELECTIONS:
            raise LensteerError(f"no selection {what!r}: choose one of {list(SELECTIONS)}")
        if what in ("all", "none"):
            return "everywhere" if what == "all" else ""
        if what == "invert":
            return inverted(before)
        if what == "behavior":
            found = {p for span in self.trace.spans if span.label == behavior for p in range(span.start, span.end)}
            if not found:
                raise LensteerError(f"this chain has no sentence of {behavior!r}: annotate it, or choose another")
            return self.expression(found)
        if what == "sentence":
            if not 0 <= cursor < len(self):
                raise LensteerError(f"position {cursor}: this chain has positions 0 to {len(self) - 1}")
            piece, chosen = self.piece_at(cursor), set(self.positions(before))
            own = set(range(piece.start, piece.end))
            return self.expression(chosen - own if own <= chosen else chosen | own)
        return what

    def groups(self, positions: Collection[int], most: int = 30) -> dict[str, tuple[int, ...]]:
        """Chosen positions in groups to leave out one at a time: single ones if there are few, or else by sentence."""
        chosen = sorted(set(positions))
        if len(chosen) <= most:
            return {f"{p}": (p,) for p in chosen}
        found = {}
        for piece in self.pieces:
            if own := tuple(p for p in chosen if piece.start <= p < piece.end):
                found[f"{piece.start}-{piece.end - 1} {piece.label}"] = own
        return found

    def onset_tokens(self, behavior: str) -> tuple[int, ...]:
        """The first token of each of a behavior's spans."""
        return tuple(span.start for span in self.trace.spans if span.label == behavior)

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values."""
        labels = [""] * len(self)
        for span in self.trace.spans:
            labels[span.start : span.end] = [span.label] * (min(span.end, len(self)) - span.start)
        return {
            "id": self.trace.id,
            "texts": list(self.texts),
            "labels": labels,
            "starts": [piece.start for piece in self.pieces],
            "tags": list(self.tags),
            "prompt_length": self.trace.prompt_length,
        }


def _cut(text: str, starts: Collection[int]) -> list[str]:
    ends = [*list(starts)[1:], len(text)]
    return [text[start:end] for start, end in zip(starts, ends, strict=True)]


def _pieces(trace: Trace, context: Context, tags: list[int]) -> tuple[Piece, ...]:
    """Split by spans if there are any, or else by sentences; the tags and the prompt are separate."""
    n = context.ids.shape[1]
    marks = {0: "prompt", trace.prompt_length: ""}
    spans = [span for span in trace.spans if span.start < n]
    if spans:
        marks |= {span.end: "" for span in spans if span.end < n}
        marks |= {span.start: span.label for span in spans}
    else:
        marks |= dict.fromkeys(sentence_starts.mask(context)[0].nonzero()[:, 0].tolist(), "")
    marks |= {tag: "" for tag in tags if tag >= trace.prompt_length and tag not in marks}
    starts = sorted(marks)
    return tuple(Piece(a, b, marks[a]) for a, b in zip(starts, [*starts[1:], n], strict=True))

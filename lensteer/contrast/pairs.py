"""Contrastive pairs: two texts that differ in a concept. Values only: knows nothing of files, models or tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from lensteer.errors import LensteerError

#: The concept's name where nobody gives one.
LABEL = "contrast"


@dataclass(frozen=True)
class Text:
    """One side of a pair.

    Attributes:
        prompt: what the user says, for the model's chat template; or, if `raw`, the text as it is.
        completion: what is answered; its tokens are those of the text after the prompt, encoded by themselves.
        system: the system prompt.
        raw: whether `prompt` already holds its template and special tokens, or is for a model without a template.
        completion_ids: the completion's tokens where a model wrote it; they are read instead of encoding it again.

    Raises:
        LensteerError: an empty prompt, or a raw one with a system prompt.
    """

    prompt: str
    completion: str = ""
    system: str = ""
    raw: bool = False
    completion_ids: tuple[int, ...] = field(default=(), repr=False)

    def __post_init__(self) -> None:
        if not self.prompt.strip():
            raise LensteerError(
                f"an empty prompt (completion {self.completion[:60]!r}): give a text, for a model reads its answer "
                "after one"
            )
        if self.raw and self.system:
            raise LensteerError(
                f"a raw text with the system prompt {self.system[:60]!r}: write it into the text, or leave out raw=True"
            )

    @property
    def answered(self) -> bool:
        """Whether there is a completion."""
        return bool(self.completion.strip())


@dataclass(frozen=True)
class Pair:
    """Two texts that differ in a concept.

    Attributes:
        positive: the side that shows it.
        negative: the side that does not, or shows its opposite.
        label: the concept's name.
        position: where this kind of pair is read (see `Position.parse`); None: in the mean over the completions, or at
            the last prompt token where there are none.

    Raises:
        LensteerError: two sides that are the same, or a blank name.
    """

    positive: Text
    negative: Text
    label: str = LABEL
    position: str | int | None = None

    def __post_init__(self) -> None:
        if not self.label.strip():
            raise LensteerError(f"label {self.label!r}: give the concept a name, such as 'politeness'")
        if self.positive == self.negative:
            said = self.positive.completion or self.positive.prompt
            raise LensteerError(
                f"both sides of a pair of {self.label!r} are the same, {said[:60]!r}: give two that differ"
            )


def pair_up(
    positive: Sequence[Text | str],
    negative: Sequence[Text | str],
    *,
    label: str = LABEL,
    raw: bool = False,
    position: str | int | None = None,
) -> list[Pair]:
    """Pairs from two lists, each side's texts in the same order.

    Args:
        positive: texts, or strings, which are prompts.
        negative: as many.
        label: the concept's name.
        raw: whether strings are taken as they are, without the chat template.
        position: where to read; see `Pair`.

    Raises:
        LensteerError: unequal numbers, an empty side, or a pair whose sides are the same (names it).
    """
    if len(positive) != len(negative):
        raise LensteerError(
            f"{len(positive)} positive and {len(negative)} negative texts: a pair has one of each, in the same order"
        )
    if not positive:
        raise LensteerError("no pairs: both lists are empty")
    pairs = []
    for number, sides in enumerate(zip(positive, negative, strict=True)):
        try:
            own, other = (Text(side, raw=raw) if isinstance(side, str) else side for side in sides)
            pairs.append(Pair(own, other, label, position))
        except LensteerError as error:
            raise LensteerError(f"pair {number}: {error}") from error
    return pairs

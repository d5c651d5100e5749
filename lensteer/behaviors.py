"""The six behaviors of a reasoning chain, and where in a chain one of them stands.

Values only: this module does not know how a sentence gets its label (`annotation`) or tokens (`alignment`).
"""

from collections.abc import Collection
from dataclasses import dataclass

from lensteer.errors import LensteerError

#: The published labels (arXiv 2506.18167), in the order of every behavior axis in lensteer.
BEHAVIORS: tuple[str, ...] = (
    "initializing",
    "deduction",
    "adding-knowledge",
    "example-testing",
    "uncertainty-estimation",
    "backtracking",
)

#: The behaviors that are steered and evaluated: all but the first two.
STEERED: tuple[str, ...] = BEHAVIORS[2:]

#: What an annotator calls a sentence that it could not read. Never the label of a `Span`, but such sentences
#: stay in every denominator.
UNPARSED = "unparsed"


def check_behavior(label: str, known: Collection[str] = BEHAVIORS) -> str:
    """Return `label` if it is one of `known`.

    Args:
        label: The name to check.
        known: The names that would be right, in the order in which the message lists them.

    Raises:
        LensteerError: `label` is not among them; the message lists them all.
    """
    if label not in known:
        raise LensteerError(f"unknown behavior {label!r}: choose one of {', '.join(map(repr, known))}")
    return label


@dataclass(frozen=True)
class Sentence:
    """One piece of text with its behavior, as an annotator returns it, before alignment.

    Attributes:
        label: One of `BEHAVIORS`, or `UNPARSED`.
        text: The sentence; a judge may have edited it, so it need not occur in the response word for word.
    """

    label: str
    text: str


@dataclass(frozen=True)
class Span:
    """A sentence with one behavior, located in a trace. All intervals are half-open.

    Attributes:
        label: The behavior.
        start: Position of the first token in prompt + response (absolute, so that it indexes activations).
        end: One past the position of the last token.
        char_start: Index of the first character in the response's text (without the prompt).
        char_end: One past the index of the last character.

    Raises:
        LensteerError: The span holds no token or no character, or starts at position 0, where no onset
            precedes it.
    """

    label: str
    start: int
    end: int
    char_start: int
    char_end: int

    def __post_init__(self) -> None:
        if not 1 <= self.start < self.end:
            raise LensteerError(
                f"span of {self.label!r} covers tokens [{self.start}, {self.end}): "
                "it needs at least one token, and one token before it"
            )
        if not 0 <= self.char_start < self.char_end:
            raise LensteerError(
                f"span of {self.label!r} covers characters [{self.char_start}, {self.char_end}): "
                "it needs at least one character of the response"
            )

    @property
    def onset(self) -> int:
        """Position of the token before the span, whose logits predict the span's first token."""
        return self.start - 1

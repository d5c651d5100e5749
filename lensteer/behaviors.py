"""The labels of sentences, and the location of a labeled sentence in a chain.

Any label works everywhere. The six published behaviors of reasoning chains are the default scheme.
"""

from collections.abc import Collection, Iterable
from dataclasses import dataclass

from lensteer.arguments import typed
from lensteer.errors import LensteerError
from lensteer.files import check_text


@dataclass(frozen=True)
class LabelScheme:
    """The labels that a sentence can have.

    Attributes:
        labels: their names, in the order of every behavior axis.
        descriptions: one line on each, for a judge's prompt.
        steered: the labels that are steered and evaluated by default; () means all.

    Raises:
        LensteerError: no label, a duplicate, empty or reserved name, a missing description, an unknown steered label,
            or a lone surrogate in a text.
    """

    labels: tuple[str, ...]
    descriptions: tuple[str, ...]
    steered: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        typed(self)
        for name in ("labels", "descriptions", "steered"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not self.labels:
            raise LensteerError("a scheme without labels: give at least one name")
        for text in (*self.labels, *self.descriptions):
            check_text(text, "the scheme")
        for label in self.labels:
            if self.labels.count(label) > 1:
                raise LensteerError(f"the scheme has the label {label!r} twice: give each name once")
            if not label.strip() or label == UNPARSED:
                raise LensteerError(f"{label!r} cannot be a label: give a name other than {UNPARSED!r}")
        if len(self.descriptions) != len(self.labels) or not all(map(str.strip, self.descriptions)):
            raise LensteerError(
                f"{len(self.descriptions)} descriptions for the labels {list(self.labels)}: give one line for each"
            )
        for label in self.steered:
            check_behavior(label, self.labels)
        if not self.steered:
            object.__setattr__(self, "steered", self.labels)


#: The label of a sentence that an annotator could not read. Never the label of a `Span`, but such sentences
#: stay in every denominator.
UNPARSED = "unparsed"


def check_behavior(label: str, known: Collection[str]) -> str:
    """Return `label` if it is one of `known`.

    Args:
        label: The name to check.
        known: The valid names, in the order in which the message lists them.

    Raises:
        LensteerError: `label` is not among them; the message lists them all.
    """
    if label not in known:
        raise LensteerError(f"unknown behavior {label!r}: choose one of {', '.join(map(repr, known))}")
    return label


#: The published labels (arXiv 2506.18167): the default scheme. All but the first two are steered.
REASONING = LabelScheme(
    labels=(
        "initializing",
        "deduction",
        "adding-knowledge",
        "example-testing",
        "uncertainty-estimation",
        "backtracking",
    ),
    descriptions=(
        "takes the task in before any work on it is done: repeats the question in other words, lists what is given, "
        "says what is asked or how to begin.",
        "takes the next step of the present approach: computes, infers, combines what is already there, or states the "
        "result of it.",
        "brings in something from outside the task and the chain: a fact, a definition, a formula, a rule that one has "
        "to know.",
        "takes a concrete case, number or scenario of its own choice and works it through, to see whether an idea "
        "holds.",
        "says how sure the writer is: doubt, confusion, a guess that is called one, or trust in a result; the approach "
        "stays as it is.",
        "leaves the present approach or takes an earlier statement back, and turns to something else.",
    ),
    steered=("adding-knowledge", "example-testing", "uncertainty-estimation", "backtracking"),
)
BEHAVIORS: tuple[str, ...] = REASONING.labels
STEERED: tuple[str, ...] = REASONING.steered


def in_order(labels: Iterable[str]) -> tuple[str, ...]:
    """Each label once: those of the default scheme first, in its order, then all others by name."""
    found = set(labels)
    return (*(b for b in BEHAVIORS if b in found), *sorted(found.difference(BEHAVIORS)))


def axis_of(labels: Iterable[str]) -> tuple[str, ...]:
    """The behavior axis for spans with these labels: the default scheme if it has them all, else those that occur."""
    found = in_order(labels)
    return found if set(found).difference(BEHAVIORS) else BEHAVIORS


@dataclass(frozen=True)
class Sentence:
    """One piece of text with its behavior, as an annotator returns it, before alignment.

    Attributes:
        label: Any name, or `UNPARSED`.
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
        typed(self)
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

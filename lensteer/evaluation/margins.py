"""Whether a condition's text is readable: worse than unsteered by no more than stated margins."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np
from jaxtyping import Float

from lensteer.arguments import typed
from lensteer.errors import LensteerError
from lensteer.statistics import Ratio, bootstrap_interval

if TYPE_CHECKING:
    from lensteer.evaluation.conditions import Record

Array = np.ndarray[Any, np.dtype[np.float64]]

#: An unsteered condition that is more repetitive than this, or whose chains parse less often, is no standard for
#: others.
MAX_REPETITION, MIN_PARSED = 0.5, 0.5


@dataclass(frozen=True)
class Margins:
    """How much worse than unsteered the text may be. None: not checked.

    Each is compared with the bound of a one-sided 95 % bootstrap interval over tasks, so that a change that cannot be
    ruled out counts as worse.

    Attributes:
        nll: rise of the nats per token under the unsteered model.
        repetition: rise of the share of repeated 4-grams.
        compression: fall of the compressed length's share.
        sentence_length: factor by which sentences may be longer or shorter.
        finished: fall of the share of chains that end.
        parsed: fall of the share of chains that a grammar parses completely; for the organism only.
        kl: mean KL per token along the text, in nats.
        coherence: least mean of the judge's scores, from 0 to 100, if chains were judged. 50 is what published
            evaluations of steering keep (persona vectors, arXiv 2507.21509).
    """

    nll: float | None = 0.5
    repetition: float | None = 0.1
    compression: float | None = 0.1
    sentence_length: float | None = 1.5
    finished: float | None = 0.1
    parsed: float | None = None
    kl: float | None = 1.0
    coherence: float | None = 50.0

    def __post_init__(self) -> None:
        typed(self)
        for f in fields(self):
            value, least = getattr(self, f.name), 1.0 if f.name == "sentence_length" else 0.0
            if value is not None and not least <= value < math.inf:
                raise LensteerError(f"margin {f.name}={value}: give a number from {least:g}, or None to leave it out")


#: Margins for the organism's text: whether its grammar reads every sentence.
GRAMMAR_MARGINS = Margins(nll=None, repetition=None, compression=None, sentence_length=None, parsed=0.1, kl=None)


@dataclass(frozen=True)
class TextFigure:
    """One figure of a condition, compared with the unsteered condition's.

    Attributes:
        name: a field of `Margins`.
        value: of the condition.
        base: of the unsteered condition.
        worst: the bound of the interval that is compared with the limit.
        limit: the most (or least) that is allowed.
        ok: whether it is within the limit.
    """

    name: str
    value: float
    base: float
    worst: float
    limit: float
    ok: bool


@dataclass(frozen=True)
class TextCheck:
    """All figures of a condition's text; it is readable if all are within their margins."""

    figures: tuple[TextFigure, ...]

    @property
    def ok(self) -> bool:
        """Whether all figures are within their margins."""
        return all(figure.ok for figure in self.figures)

    @property
    def strain(self) -> float:
        """The largest share of a margin that is used: 0 as unsteered, above 1 worse than is allowed."""
        used = [
            (f.worst - f.base) / (f.limit - f.base) if f.limit != f.base else 0.0 if f.ok else math.inf
            for f in self.figures
        ]
        return max(0.0, *used)

    @property
    def why(self) -> str:
        """The figures that are not, as text; empty if all are."""
        return "; ".join(
            f"{f.name.replace('_', ' ')} {f.value:.2f} "
            f"(unsteered {f.base:.2f}; within the interval {f.worst:.2f}; limit {f.limit:.2f})"
            for f in self.figures
            if not f.ok
        )


def text_check(condition: Sequence[Record], base: Sequence[Record], margins: Margins, *, seed: int = 0) -> TextCheck:
    """Compare a condition's text with the unsteered condition's, on the tasks that both have."""
    shared = {r.task for r in condition} & {r.task for r in base}
    condition, base = ([r for r in rows if r.task in shared] for rows in (condition, base))
    found = []
    for name, of, rises in (
        ("nll", _nll, True),
        ("repetition", _repetition, True),
        ("compression", _compression, False),
        ("finished", _finished, False),
        ("parsed", _parsed, False),
    ):
        margin, sides = getattr(margins, name), _paired(condition, base, of)
        if margin is not None and sides is not None:
            value, before, low, high = _against(*sides, seed)
            worst, limit = (high, before + margin) if rises else (low, before - margin)
            found.append(TextFigure(name, value, before, worst, limit, worst <= limit if rises else worst >= limit))
    if margins.sentence_length is not None:
        found.append(_sentence_length(condition, base, margins.sentence_length, seed))
    sides = _paired(condition, base, _coherence)
    if margins.coherence is not None and sides is not None:
        value, before, worst, _ = _against(*sides, seed)
        limit = min(margins.coherence, before)  # a model that is less coherent unsteered is its own standard
        found.append(TextFigure("coherence", value, before, worst, limit, worst >= limit))
    spent = [r.kl for r in condition if r.kl is not None]
    if margins.kl is not None and spent:
        value = float(np.mean(spent))
        found.append(TextFigure("kl", value, 0.0, value, margins.kl, value <= margins.kl))
    return TextCheck(tuple(found))


Part = tuple[float, float] | None
"""One chain's value and its weight (denominator); None if not measured."""


def _nll(r: Record) -> Part:
    return None if r.nll is None else (r.nll, 1.0)


def _repetition(r: Record) -> Part:
    return r.repetition, 1.0


def _compression(r: Record) -> Part:
    return r.compression, 1.0


def _finished(r: Record) -> Part:
    return float(r.finished), 1.0


def _parsed(r: Record) -> Part:
    return float(r.parsed), 1.0


def _coherence(r: Record) -> Part:
    return None if r.coherence is None else (r.coherence, 1.0)


def _tokens_per_sentence(r: Record) -> Part:
    return float(r.n_tokens), float(r.n_sentences)


Sides = tuple[Float[np.ndarray[Any, Any], "task 2"], Float[np.ndarray[Any, Any], "task 2"]]


def _paired(condition: Sequence[Record], base: Sequence[Record], of: Callable[[Record], Part]) -> Sides | None:
    """Per task the sums of values and weights in both conditions; None for fewer than two tasks."""
    sides: list[dict[str, list[float]]] = []
    for rows in (condition, base):
        sums: dict[str, list[float]] = {}
        for r in rows:
            part = of(r)
            if part is not None and part[1]:
                each = sums.setdefault(r.task, [0.0, 0.0])
                each[0] += part[0]
                each[1] += part[1]
        sides.append(sums)
    tasks = sorted(set(sides[0]) & set(sides[1]))
    if len(tasks) < 2:
        return None
    own, plain = (np.array([side[task] for task in tasks]) for side in sides)
    return own, plain


def _against(own: Array, plain: Array, seed: int) -> tuple[float, float, float, float]:
    """The condition's value, the unsteered one, and the latter shifted by either end of the change's 90 % interval."""
    change = bootstrap_interval(Ratio(*own.T), Ratio(*plain.T), seed=seed, level=0.9)
    value, before = (float(side[:, 0].sum() / side[:, 1].sum()) for side in (own, plain))
    return value, before, before + float(change.low), before + float(change.high)


def _sentence_length(condition: Sequence[Record], base: Sequence[Record], factor: float, seed: int) -> TextFigure:
    """Tokens per sentence, checked both ways: for run-on sentences and for fragments."""
    sides = _paired(condition, base, _tokens_per_sentence)
    if sides is None:
        return TextFigure("sentence_length", math.inf, 0.0, math.inf, 0.0, False)
    value, before, low, high = _against(*sides, seed)
    if not before:
        return TextFigure("sentence_length", value, before, high, 0.0, False)
    if high / before >= before / max(low, 1e-9):
        return TextFigure("sentence_length", value, before, high, before * factor, high <= before * factor)
    return TextFigure("sentence_length", value, before, low, before / factor, low >= before / factor)


def check_standard(base: Sequence[Record], margins: Margins) -> None:
    """Make sure that the unsteered condition is a standard that others can be compared with.

    Raises:
        LensteerError: its own text counts as broken, so that any coefficient would pass.
    """
    speaking = len({r.task for r in base if r.n_sentences})
    if speaking < 2:
        raise LensteerError(
            f"the unsteered chains have a sentence on {speaking} of {len({r.task for r in base})} tasks: let the model "
            "think (a chat template that opens <think>, a prefill, more tokens), or take another annotator"
        )
    loops = float(np.mean([r.repetition for r in base]))
    parses = float(np.mean([r.parsed for r in base]))
    if margins.parsed is not None and parses < MIN_PARSED:
        raise LensteerError(
            f"{parses:.0%} of the unsteered chains parse, so that any coefficient would pass as readable: the rule "
            "'parsed' is for the organism's grammar; leave it out (margins.parsed=None), or allow more "
            "tokens (max_new_tokens)"
        )
    if margins.repetition is not None and loops > MAX_REPETITION:
        raise LensteerError(
            f"{loops:.0%} of the unsteered chains' 4-grams are repeats: with a looping model, broken text "
            "cannot be detected; raise the temperature or shorten the chains"
        )

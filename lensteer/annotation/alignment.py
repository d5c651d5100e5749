"""Locates an annotator's sentences in the response, as characters and as tokens.

The output of every annotator is aligned here, whether it copies the text or, like language models, fixes typos, joins
lines, swaps sentences and leaves some out. All sentences are placed together, as the ordered sequence of places that
covers the most letters. So a repeated sentence is placed at its next occurrence, and a short one that recurs by chance
far ahead does not displace the rest. A sentence that the annotator moved is placed where its words are, if no other
sentence has them. The report lists every sentence that was repaired, moved or dropped.

This is the only module that maps characters to tokens.
"""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import accumulate, pairwise
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from lensteer.behaviors import Sentence, Span
from lensteer.errors import LensteerError

MIN_SIMILARITY = 0.75  # at most a quarter of the letters of a repaired sentence may be edits
_LANDMARK = 16  # letters; a shorter sentence may occur anywhere by chance and does not bound a search
_PIECE = 8  # consecutive letters that must be unchanged in a long sentence for a search to find it
_WORD_EDGE, _SENTENCE_EDGE = 2, 8  # extra edits allowed to a place that begins or ends at such an edge
_NEAR = 8  # places; a sentence that has more is first looked for at that many of them
_TOUCH = 0.25  # letters; only breaks ties
_ALIKE = str.maketrans("‘’‚‛′“”„‟″«»‐‑‒–—―−", "'" * 5 + '"' * 7 + "-" * 7)


@dataclass(frozen=True)
class Repair:
    """A sentence that the annotator changed.

    Attributes:
        index: of the sentence in the input.
        text: the annotator's wording.
        found: the response's wording, which is what the span covers.
        similarity: 1 - edits / letters of the longer of the two, from MIN_SIMILARITY to 1. White space, case and the
            style of quotes and dashes do not count: 1 means that only these differ.
    """

    index: int
    text: str
    found: str
    similarity: float


@dataclass(frozen=True)
class Drop:
    """A sentence that has no span, and the reason as text."""

    index: int
    label: str
    text: str
    reason: str


@dataclass(frozen=True)
class AlignmentReport:
    """The outcome for every sentence: `matched` occur in the response unchanged, the others are listed.

    `moved` are the indices of those that have a span, matched or repaired, out of the order of the sentences.
    `pandas.DataFrame(report.dropped)` gives a table of one of the lists.
    """

    matched: int
    repaired: tuple[Repair, ...]
    dropped: tuple[Drop, ...]
    moved: tuple[int, ...] = ()

    @property
    def placed(self) -> float:
        """Share of the input sentences that have a span (1.0 if there are none)."""
        total = self.matched + len(self.repaired) + len(self.dropped)
        return 1 - len(self.dropped) / total if total else 1.0


@dataclass(frozen=True)
class Alignment:
    """Spans in reading order, without overlaps, and the report on how they were found.

    `sentences` has, for each span, which of the sentences handed in it is.
    """

    spans: tuple[Span, ...]
    report: AlignmentReport
    sentences: tuple[int, ...] = ()


def align(
    sentences: Sequence[Sentence],
    response: str,
    offsets: Sequence[int],
    *,
    prompt_length: int,
    labels: Sequence[str] | None = None,
) -> Alignment:
    """Place annotated sentences in a response.

    A token belongs to a span if it shares a character with it; white space around a sentence is not part of it. A token
    that two spans share belongs to the first.

    Args:
        sentences: what the annotator returned, in reading order.
        response: the generated text.
        offsets: first character of each response token, never decreasing. Tokens that are bytes of one
            character have the same offset and stay together.
        prompt_length: number of prompt tokens, which is the absolute position of the first response token.
        labels: the labels that may become spans; None for any.

    Raises:
        LensteerError: `offsets` decreases or leaves the response, or `prompt_length` is negative.
    """
    if prompt_length < 0:
        raise LensteerError(f"prompt_length={prompt_length}: give a number of tokens, 0 or more")
    for i, (before, after) in enumerate(pairwise([0, *offsets, len(response)])):
        if after < before:
            raise LensteerError(
                f"offsets go from {before} to {after} at token {i}: they must not decrease or exceed {len(response)}"
            )
    page = _Page(*_letters(response), response)
    wanted = [_letters(s.text)[0] if labels is None or s.label in labels else "" for s in sentences]
    chain = _place(page, wanted, [s.text.strip() for s in sentences])
    moved = _moved(page, wanted, [s.text.strip() for s in sentences], chain)
    spans: dict[int, Span] = {}
    repaired: list[Repair] = []
    crowded: dict[int, str] = {}
    token = 0
    placed = {i: place for i, place in enumerate(chain) if place} | moved
    for i, place in sorted(placed.items(), key=lambda entry: entry[1].start):
        start, end = page.origin[place.start], page.origin[place.end - 1] + 1
        holder = bisect_right(offsets, start) - 1  # the last token that begins there or before
        first = max(token, bisect_left(offsets, offsets[holder]) if holder >= 0 else 0)
        last = bisect_left(offsets, end)
        if first >= last:
            crowded[i] = f"characters {start} to {end} have no token that is not the span's before"
            continue
        spans[i] = Span(sentences[i].label, prompt_length + first, prompt_length + last, start, end)
        token = last
    dropped: list[Drop] = []
    cursor = 0
    for i, sentence in enumerate(sentences):
        text = sentence.text.strip()
        if i in spans:
            found = response[spans[i].char_start : spans[i].char_end]
            if found != text:
                repaired.append(Repair(i, text, found, placed[i].similarity))
            if i not in moved:
                cursor = spans[i].char_end
            continue
        reason = crowded.get(i, "")
        if labels is not None and sentence.label not in labels:
            reason = f"label {sentence.label!r} not in {', '.join(labels)}"
        elif not text:
            reason = "empty text"
        elif not reason:
            reason = f"no match at or after character {cursor} that keeps the order"
            if (at := response.find(text)) >= 0:
                reason += f"; the words at character {at} are out of order or another sentence's"
        dropped.append(Drop(i, sentence.label, text, reason))
    out_of_order = tuple(sorted(i for i in moved if i in spans))
    report = AlignmentReport(len(spans) - len(repaired), tuple(repaired), tuple(dropped), out_of_order)
    return Alignment(tuple(spans.values()), report, tuple(spans))


class _Place(NamedTuple):
    """Letters where a sentence may be; `weight` is roughly the number of the sentence's letters found there."""

    start: int
    end: int
    weight: float
    similarity: float


class _Page(NamedTuple):
    """The response, its `letters` (see `_letters`) and the character that each one comes from."""

    letters: str
    origin: list[int]
    response: str

    def edge(self, at: int, *, opening: bool) -> int:
        """Edits that a beginning (or end) before letter `at` is worth. A tag's bracket counts as white space."""
        if at in (0, len(self.letters)):
            return _SENTENCE_EDGE
        left, right = self.origin[at - 1], self.origin[at]
        if right - left == 1 and self.response[left if opening else right] not in "><":
            return 0
        closed = self.letters[at - 1] in ".!?:>" or "\n" in self.response[left:right]
        return _SENTENCE_EDGE if closed else _WORD_EDGE


def _letters(text: str) -> tuple[str, list[int]]:
    """Text without white space, case and typographic variants, and the index of each letter's character."""
    kept = [(c.lower() if len(c.lower()) == 1 else c, i) for i, c in enumerate(text) if not c.isspace()]
    return "".join(c for c, _ in kept).translate(_ALIKE), [i for _, i in kept]


class _Options(NamedTuple):
    """All candidate places of one sentence, one entry each, as in `_Place`."""

    start: NDArray[np.int64]
    end: NDArray[np.int64]
    weight: NDArray[np.float64]
    similarity: NDArray[np.float64]

    @staticmethod
    def of(places: Iterable[_Place]) -> _Options:
        columns = list(zip(*places, strict=True)) or [()] * 4
        start, end = (np.array(column, np.int64) for column in columns[:2])
        weight, similarity = (np.array(column, np.float64) for column in columns[2:])
        return _Options(start, end, weight, similarity)

    def chosen(self, keep: NDArray[np.bool_] | slice) -> _Options:
        return _Options(self.start[keep], self.end[keep], self.weight[keep], self.similarity[keep])

    def and_also(self, other: _Options) -> _Options:
        start, end = np.concatenate([self.start, other.start]), np.concatenate([self.end, other.end])
        weight, similarity = (np.concatenate([mine, its]) for mine, its in ((self[2], other[2]), (self[3], other[3])))
        return _Options(start, end, weight, similarity)

    def place(self, n: int) -> _Place:
        return _Place(int(self.start[n]), int(self.end[n]), float(self.weight[n]), float(self.similarity[n]))


def _place(page: _Page, wanted: list[str], texts: list[str]) -> list[_Place | None]:
    """The place of each sentence, or None: unedited sentences first, then the others between certain ones."""
    size = len(page.letters)
    unedited: dict[tuple[str, str], _Options] = {}  # equal sentences share their places
    for letters, text in zip(wanted, texts, strict=True):
        if (letters, text) not in unedited:
            unedited[letters, text] = _Options.of(_unedited(page, letters, text))
    options = [unedited[key] for key in zip(wanted, texts, strict=True)]
    chain = _best_chain(options, size)
    taken = np.zeros(size + 1, int)
    for place in filter(None, chain):
        taken[place.start + 1 : place.end + 1] = 1
    claimed = taken.cumsum()  # letters before each that a sentence has
    sure = [p if len(options[i].start) == 1 and len(wanted[i]) >= _LANDMARK else None for i, p in enumerate(chain)]
    lows = list(accumulate((p.end if p else 0 for p in sure), max))
    highs = list(accumulate((p.start if p else size for p in reversed(sure)), min))[::-1]
    edited: dict[tuple[str, int, int], _Options] = {}
    for i, letters in enumerate(wanted):
        own = options[i]
        # A sentence that occurs unedited in unclaimed text was moved, not edited: a similar place would be wrong.
        if not letters or chain[i] or bool((claimed[own.start] == claimed[own.end]).any()):
            continue
        key = letters, lows[i], highs[i]
        if key not in edited:
            edited[key] = _Options.of(_edited(page, *key))
        options[i] = own.and_also(edited[key])
    return _best_chain(options, size) if edited else chain


def _moved(page: _Page, wanted: list[str], texts: list[str], chain: list[_Place | None]) -> dict[int, _Place]:
    """Places, in letters that no sentence has, of sentences that the chain has no place for.

    Unedited words at the edges of words are taken: of a sentence of some length anywhere, the nearest to where the
    chain is; of a short one only beside the sentence that was handed in before or after it, or, if that one has no
    place in the chain either, where they occur only once. A long sentence whose words stand nowhere unedited is looked
    for among edited ones.
    """
    taken = np.zeros(len(page.letters), bool)
    for place in filter(None, chain):
        taken[place.start : place.end] = True
    moved: dict[int, _Place] = {}
    lost = [i for i, letters in enumerate(wanted) if letters and not chain[i]]
    lost_ones = set(lost)
    ends = list(accumulate((place.end if place else 0 for place in chain), max))
    for some in ([i for i in lost if len(wanted[i]) >= _LANDMARK], [i for i in lost if len(wanted[i]) < _LANDMARK]):
        for i in some:
            letters = wanted[i]
            places = [*_unedited(page, letters, texts[i])]
            if not places and len(letters) >= 4 * _PIECE and not taken.all():
                places = [*_edited(page, letters, 0, len(page.letters))]
            beside = [p for n in (i - 1, i + 1) if 0 <= n < len(chain) and (p := chain[n] or moved.get(n))]
            in_block = bool({i - 1, i + 1} & lost_ones)  # a moved block of short sentences
            free = [
                place
                for place in places
                if not taken[place.start : place.end].any()
                and page.edge(place.start, opening=True)
                and page.edge(place.end, opening=False)
                and (
                    len(letters) >= _LANDMARK
                    or (len(places) == 1 and in_block)
                    or any(place.start == p.end or place.end == p.start for p in beside)
                )
            ]
            if free:
                moved[i] = min(free, key=partial(_distance, at=ends[i]))
                taken[moved[i].start : moved[i].end] = True
    return moved


def _distance(place: _Place, at: int) -> tuple[float, int]:
    return -place.similarity, abs(place.start - at)


def _best_chain(options: list[_Options], size: int) -> list[_Place | None]:
    """At most one place per sentence, in order and without overlap, with the greatest total weight.

    A sentence that recurs has many places, and weighing all of them for each copy takes quadratic time. So a chain
    through the few places nearest to each sentence's expected position is found first. The best chain lacks at most as
    much of the total weight of all sentences as this one. A place is left out if so few letters remain before or after
    it that the sentences there must lose more than that. The result is the same.
    """
    many = [i for i, own in enumerate(options) if len(own.start) > _NEAR]
    if not many:
        return _chain(options, size)[0]
    known: dict[int, tuple[float, float, bool]] = {}  # equal sentences share their options
    for own in options:
        if id(own) not in known:
            found = len(own.start) > 0
            heaviest = float(own.weight.max()) if found else 0.0
            shortest = min(float((own.end - own.start).min()), heaviest) if found else 0.0
            rising = bool((np.diff(own.start) > 0).all() and (np.diff(own.end) > 0).all())
            known[id(own)] = heaviest + _TOUCH * found, shortest, rising
    least = np.array([known[id(own)][1] for own in options])
    before = least.cumsum() - least
    after = least.sum() - before - least
    near = list(options)
    for i in many:
        expected = before[i] + (size - least.sum()) * before[i] / max(1.0, before[i] + after[i])
        first = int(np.searchsorted(options[i].start, expected)) - _NEAR // 2
        near[i] = options[i].chosen(slice(max(0, first), max(0, first) + _NEAR))
    spare = sum(known[id(own)][0] for own in options) - _chain(near, size)[1] + 1e-6
    for i in many:
        own = options[i]
        if known[id(own)][2]:
            first = int(np.searchsorted(own.start, before[i] - spare))
            own = own.chosen(slice(first, int(np.searchsorted(own.end, size - after[i] + spare, "right"))))
        lost = np.maximum(0, before[i] - own.start) + np.maximum(0, after[i] - (size - own.end))
        near[i] = own.chosen(lost <= spare)
    return _chain(near, size)[0]


def _chain(options: list[_Options], size: int) -> tuple[list[_Place | None], float]:
    """The chain with the greatest total weight among all options, and its weight.

    Dynamic programming over the sentences; of equal chains the one that ends earliest wins. Adjacent places weigh a
    little more: of several occurrences, the one next to the sentence's neighbors is taken.
    """
    best = np.zeros(size + 1)  # the weight of the best chain that ends at or before each letter,
    tip = np.full(size + 1, -1)  # its last node,
    touching, last = np.zeros(size + 1), np.full(size + 1, -1)  # and the same of chains that end exactly there
    firsts: list[int] = []  # each sentence's first node; a node is one place of one sentence
    links: list[NDArray[np.int64]] = []  # the nodes before
    n = 0
    for own in options:
        apart, ahead = best[own.start], tip[own.start]
        beside, near = touching[own.start], last[own.start]
        touches = (beside > apart) | ((beside == apart) & (near > ahead))
        weights = np.where(touches, beside, apart) + own.weight
        firsts.append(n)
        links.append(np.where(touches, near, ahead))
        if len(weights) > _NEAR and bool((np.diff(own.end) > 0).all()):
            high = weights > np.concatenate([[-1.0], np.maximum.accumulate(weights)[:-1]])
            ends, nodes = own.end[high], n + np.flatnonzero(high)
            widths = np.diff(ends, append=size + 1)
            stairs = np.repeat(weights[high], widths)
            better = stairs > best[ends[0] :]
            best[ends[0] :][better] = stairs[better]
            tip[ends[0] :][better] = np.repeat(nodes, widths)[better]
            more = touching[own.end] < weights + _TOUCH
            touching[own.end[more]], last[own.end[more]] = weights[more] + _TOUCH, n + np.flatnonzero(more)
        else:
            for node, (end, weight) in enumerate(zip(own.end.tolist(), weights.tolist(), strict=True), n):
                beaten = int(np.searchsorted(best, weight))
                best[end:beaten], tip[end:beaten] = weight, node
                if touching[end] < weight + _TOUCH:
                    touching[end], last[end] = weight + _TOUCH, node
        n += len(weights)
    chain: list[_Place | None] = [None] * len(options)
    node = int(tip[size])
    while node >= 0:
        i = bisect_right(firsts, node) - 1
        chain[i] = options[i].place(node - firsts[i])
        node = int(links[i][node - firsts[i]])
    return chain, float(best[size])


def _occurrences(letters: str, within: str, low: int, high: int) -> Iterator[int]:
    at = within.find(letters, low, high)
    while at >= 0:
        yield at
        at = within.find(letters, at + 1, high)


def _unedited(page: _Page, letters: str, text: str) -> Iterator[_Place]:
    """Every place with the sentence's letters; an exact match, and whole words, weigh a little more."""
    for start in _occurrences(letters, page.letters, 0, len(page.letters)) if letters else ():
        end = start + len(letters)
        whole = (page.edge(start, opening=True) > 0) + (page.edge(end, opening=False) > 0)
        exact = page.response.startswith(text, page.origin[start])
        yield _Place(start, end, len(letters) + 0.5 * whole + 0.5 * exact, 1.0)


def _edited(page: _Page, letters: str, low: int, high: int) -> Iterator[_Place]:
    """Places in [low, high) whose letters are similar enough, the best of each neighborhood."""
    # Most edits allowed: the case in which all are letters that the response has and the sentence lacks.
    budget = int(len(letters) * (1 / MIN_SIMILARITY - 1))
    for left, right in _windows(page, letters, low, high, budget):
        distances = _edit_distances(letters, page.letters[left:right])
        near = [left + j for j, distance in enumerate(distances) if distance <= budget]
        for run in np.split(near, np.flatnonzero(np.diff(near) > 1) + 1) if near else ():
            end = max(run.tolist(), key=lambda e: (page.edge(e, opening=False) - distances[e - left], e))
            backward = page.letters[max(left, end - len(letters) - budget) : end][::-1]
            back = _edit_distances(letters[::-1], backward, anchored=True)
            size = max(range(len(back)), key=lambda n: (page.edge(end - n, opening=True) - back[n], n))
            similarity = 1 - back[size] / max(len(letters), size)
            if size and similarity >= MIN_SIMILARITY:
                yield _Place(end - size, end, len(letters) * similarity, similarity)


def _windows(page: _Page, letters: str, low: int, high: int, budget: int) -> list[tuple[int, int]]:
    """Parts of [low, high) to search: all of it for a short sentence, else around unchanged pieces."""
    if len(letters) < 4 * _PIECE or high - low < 4 * len(letters):
        return [(low, high)]
    pieces = [(k, letters[k : k + _PIECE]) for k in range(0, len(letters) - _PIECE + 1, _PIECE)]
    windows: list[tuple[int, int]] = []
    for start in sorted(at - k for k, piece in pieces for at in _occurrences(piece, page.letters, low, high)):
        left, right = max(low, start - budget), min(high, start + len(letters) + budget)
        if windows and left <= windows[-1][1]:
            left = windows.pop()[0]
        windows.append((left, right))
    return windows


def _edit_distances(pattern: str, text: str, *, anchored: bool = False) -> list[int]:
    """Edits between `pattern` and the closest string that ends before text[j], for j = 0 .. len(text).

    The string begins anywhere, or at text[0] if `anchored`. A column of the edit matrix is two integers whose
    bits are its steps up and down, so it costs a few operations (Myers 1999, J. ACM 46:395). It is implemented here
    because the search needs this whole row: rapidfuzz gives one distance between two whole strings, or the best window
    by another distance, and edlib only the best end positions.
    """
    ones, top = (1 << len(pattern)) - 1, 1 << (len(pattern) - 1)
    where: dict[str, int] = {}
    for i, letter in enumerate(pattern):
        where[letter] = where.get(letter, 0) | 1 << i
    up, down, distance = ones, 0, len(pattern)
    distances = [distance]
    for letter in text:
        equal = where.get(letter, 0)
        diagonal = (((equal & up) + up) ^ up) | equal
        grows, shrinks = down | ~(diagonal | up), up & diagonal
        distance += bool(grows & top) - bool(shrinks & top)
        distances.append(distance)
        grows, shrinks = grows << 1 | anchored, shrinks << 1
        equal |= down
        up, down = (shrinks | ~(equal | grows)) & ones, grows & equal & ones
    return distances

"""Answers of the creative-problem-solving tasks, searched anew from what their prompts state."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Hashable, Iterable, Iterator
from fractions import Fraction as F
from functools import cache
from itertools import combinations, count, product
from typing import TypeVar

State = TypeVar("State", bound=Hashable)


def _fewest(start: State, reached: Callable[[State], bool], moves: Callable[[State], Iterable[State]]) -> str:
    steps, waiting = {start: 0}, deque([start])
    while waiting:
        state = waiting.popleft()
        if reached(state):
            return str(steps[state])
        for after in moves(state):
            if after not in steps:
                steps[after] = steps[state] + 1
                waiting.append(after)
    raise AssertionError("not reachable")


def _creases() -> str:
    strip = frozenset([F(0), F(1)])
    return _fewest(strip, lambda s: F(11, 16) in s, lambda s: [s | {(a + b) / 2} for a, b in combinations(s, 2)])


def _stones() -> str:
    stones = (1, 2, 4, 16)
    weighable = {
        sum(s * side for s, side in zip(stones, sides, strict=True)) for sides in product((-1, 0, 1), repeat=4)
    }
    return str(len(set(range(1, 31)) - weighable))


def _grill() -> str:
    sides = [(fillet, side) for fillet in range(6) for side in range(2)]

    def rounds(done: frozenset) -> Iterator[frozenset]:
        for four in combinations([s for s in sides if s not in done], 4):
            if len({fillet for fillet, _ in four}) == 4:  # a fillet lies on one side at a time
                yield done | set(four)

    def canonical(done: frozenset) -> frozenset:
        left = sorted((sum((fillet, side) in done for side in range(2)) for fillet in range(6)), reverse=True)
        return frozenset((fillet, side) for fillet, n in enumerate(left) for side in range(n))

    least = _fewest(frozenset(), lambda done: len(done) == 12, lambda done: {canonical(d) for d in rounds(done)})
    return str(3 * int(least))


def _raft() -> str:
    everybody = frozenset([80, 60, 50, 40])

    def crossings(state: tuple[frozenset, bool]) -> Iterator[tuple[frozenset, bool]]:
        near, raft_near = state
        bank = near if raft_near else everybody - near
        for n in range(1, len(bank) + 1):
            for crew in combinations(sorted(bank), n):
                if sum(crew) <= 100:
                    yield (near - set(crew) if raft_near else near | set(crew)), not raft_near

    return _fewest((everybody, True), lambda state: not state[0], crossings)


def _nougat() -> str:
    # A cut parts any chosen pieces at once, each along one of its lines, so the slowest piece decides.
    @cache
    def cuts(rows: int, columns: int) -> int:
        if rows == columns == 1:
            return 0
        parts = [((r, columns), (rows - r, columns)) for r in range(1, rows)]
        parts += [((rows, c), (rows, columns - c)) for c in range(1, columns)]
        return 1 + min(max(cuts(*a), cuts(*b)) for a, b in parts)

    return str(cuts(5, 8))


def _chain() -> str:
    lengths = (1, 2, 5, 5, 5, 5)
    options = []  # per piece: how many links are opened and how many closed stretches remain
    for length in lengths:
        found = set()
        for opened in product((False, True), repeat=length):
            stretches = "".join("x" if o else "-" for o in opened).replace("x", " ").split()
            found.add((sum(opened), len(stretches)))
        options.append(found)
    totals = {(0, 0)}
    for found in options:
        totals = {(k + a, p + b) for k, p in totals for a, b in found}
    return str(min(k for k, stretches in totals if 0 < stretches <= k))  # a ring has as many joints as stretches


def _fuses() -> str:
    times: set[F] = set()

    def burn(now: F, left: tuple[F, ...], lit: tuple[int, ...]) -> None:
        for ends in product(range(3), repeat=2):
            if any(e < was or (not rest and e != was) for e, was, rest in zip(ends, lit, left, strict=True)):
                continue
            if until := [rest / e for rest, e in zip(left, ends, strict=True) if rest and e]:
                step = min(until)
                times.add(now + step)
                burn(
                    now + step,
                    tuple(rest - e * step if rest else rest for rest, e in zip(left, ends, strict=True)),
                    ends,
                )

    burn(F(0), (F(8), F(12)), (0, 0))
    (letter,) = [letter for letter, time in {"A": 7, "B": 10, "C": 14, "D": 9}.items() if time not in times]
    return letter


def _wafer() -> str:
    places = [(1 << 6 * r + c) * 0b1111 for r in range(6) for c in range(3)]
    places += [sum(1 << 6 * (r + i) + c for i in range(4)) for r in range(3) for c in range(6)]
    covering = {square: [p for p in places if p >> square & 1 and not p & ((1 << square) - 1)] for square in range(36)}

    @cache
    def bars(square: int, used: int) -> int:
        if square == 36:
            return 0
        used = used >> square << square  # what lies behind doesn't matter any more
        most = bars(square + 1, used)
        for place in covering[square]:  # the bars whose first square is this one
            if not place & used:
                most = max(most, 1 + bars(square + 1, used | place))
        return most

    return str(bars(0, 0))


def _flour() -> str:
    # A state is the heaps' weights. One balancing parts a heap into two, with other heaps and the 3 kg on either side.
    def weighings(heaps: tuple[F, ...]) -> Iterator[tuple[F, ...]]:
        for i, heap in enumerate(heaps):
            others = heaps[:i] + heaps[i + 1 :]
            for sides in product((-1, 0, 1), repeat=len(others) + 1):
                shift = sum((s * w for s, w in zip(sides, (F(3), *others), strict=True)), F(0))
                parts = [abs(shift)]  # weighed out against what stands on the pans
                if sum(abs(s) for s in sides):
                    parts.append((heap + shift) / 2)  # both parts on the pans, with something beside them
                else:
                    parts.append(heap / 2)
                for part in parts:
                    if 0 < part < heap:
                        yield tuple(sorted((*others, part, heap - part)))

    return _fewest((F(24),), lambda heaps: F(9) in heaps, weighings)


def _lamps() -> str:
    def press(on: tuple[bool, ...]) -> Iterator[tuple[bool, ...]]:
        for button in range(6):
            yield tuple(lamp != (abs(i - button) <= 1) for i, lamp in enumerate(on))

    return _fewest((True, False, True, True, True, True), all, press)


def _tokens() -> str:
    highest = 0
    for values in combinations(
        range(1, 17), 3
    ):  # without a 1 nothing starts; more than 15 + 1 is never reached in a row
        payable = {sum(chosen) for chosen in product((0, *values), repeat=3)}
        highest = max(highest, next(n for n in count(1) if n not in payable) - 1)
    return str(highest)


def _straightedge() -> str:
    for marks in range(9):
        for inner in combinations(range(1, 9), marks):
            if {b - a for a, b in combinations((0, *inner, 9), 2)} == set(range(1, 10)):
                return str(marks)
    raise AssertionError


def _crates() -> str:
    def lifts(pile: tuple[int, ...]) -> list[tuple[int, ...]]:
        return [pile[:n][::-1] + pile[n:] for n in range(2, 5)]

    return _fewest((3, 1, 4, 2), lambda pile: pile == (1, 2, 3, 4), lifts)


def _calculator() -> str:
    return _fewest(4, lambda n: n == 11, lambda n: [m for m in (2 * n, n - 3) if -1000 < m < 1000])


def _digits() -> str:
    needed: Counter[str] = Counter()
    for number in range(1, 100):
        needed |= Counter(str(number).replace("9", "6"))
    return str(needed.total())


def _cube() -> str:
    faces = Counter(sum(x in (0, 3) for x in place) for place in product(range(4), repeat=3))
    assert [faces[n] for n in (3, 2, 1)] == [8, 24, 24]
    best = 0
    sizes = [s for s in product(range(2, 5), repeat=3) if s == tuple(sorted(s))]

    def needs(size: tuple[int, ...]) -> Counter[int]:
        inside = product(*[range(n) for n in size])
        return Counter(sum(x in (0, n - 1) for x, n in zip(place, size, strict=True)) for place in inside)

    for blocks in range(1, 9):
        for chosen in combinations(sizes * blocks, blocks) if blocks < 3 else ():
            total = sum((needs(size) for size in chosen), Counter())
            if all(sum(total[m] for m in range(n, 4)) <= sum(faces[m] for m in range(n, 4)) for n in (1, 2, 3)):
                best = max(best, blocks)
    return str(best)  # two fail, so more do


SOLUTIONS: dict[str, Callable[[], str]] = {
    "creative-problem-solving-001": _creases,
    "creative-problem-solving-003": _stones,
    "creative-problem-solving-005": _grill,
    "creative-problem-solving-007": _raft,
    "creative-problem-solving-009": _nougat,
    "creative-problem-solving-011": _chain,
    "creative-problem-solving-013": _fuses,
    "creative-problem-solving-015": _wafer,
    "creative-problem-solving-017": _flour,
    "creative-problem-solving-019": _lamps,
    "creative-problem-solving-021": _tokens,
    "creative-problem-solving-023": _straightedge,
    "creative-problem-solving-027": _calculator,
    "creative-problem-solving-047": _crates,
    "creative-problem-solving-053": _digits,
    "creative-problem-solving-055": _cube,
}

SECOND: dict[str, str] = {}

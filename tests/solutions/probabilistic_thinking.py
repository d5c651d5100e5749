"""Exact answers to the probabilistic-thinking tasks: all cases counted in fractions, nothing simulated."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import combinations, pairwise, permutations, product
from math import prod

F = Fraction
HALF, THIRD, QUARTER = F(1, 2), F(1, 3), F(1, 4)


def chance(cases: Iterable, event: Callable[..., bool], given: Callable[..., bool] = lambda *case: True) -> Fraction:
    """The share of equally likely cases with the event among those with the condition."""
    counted = [case for case in cases if given(*case)]
    return F(sum(bool(event(*case)) for case in counted), len(counted))


def mean(values: Iterable) -> Fraction:
    values = list(values)
    return F(sum(values)) / len(values)


def weighed(cases: Iterable[tuple[Fraction, bool, bool]]) -> Fraction:
    """P(event | condition) from cases (probability, condition, event)."""
    cases = list(cases)
    assert sum(p for p, _, _ in cases) == 1
    return sum(p for p, c, e in cases if c and e) / sum(p for p, c, _ in cases if c)


def chain(moves: Mapping[Hashable, Mapping[Hashable, Fraction]], gain: Mapping[Hashable, Fraction]) -> dict:
    """Expected sum of gains from every state of a Markov chain; states without moves keep only their own gain."""
    states = list(moves)
    size = len(states)
    rows = []
    for state in states:  # value(state) - sum p * value(next) = gain(state)
        assert sum(moves[state].values()) == 1
        row = [F(int(s == state)) - moves[state].get(s, F(0)) for s in states]
        final = sum((p * gain.get(s, F(0)) for s, p in moves[state].items() if s not in moves), F(0))
        rows.append([*row, gain.get(state, F(0)) + final])
    for i in range(size):  # Gauss-Jordan elimination
        pivot = next(k for k in range(i, size) if rows[k][i])
        rows[i], rows[pivot] = rows[pivot], rows[i]
        rows[i] = [x / rows[i][i] for x in rows[i]]
        for k in range(size):
            if k != i:
                rows[k] = [x - rows[k][i] * y for x, y in zip(rows[k], rows[i], strict=True)]
    return {state: row[-1] for state, row in zip(states, rows, strict=True)}


def independent(*probabilities: Fraction) -> Iterator[tuple[Fraction, tuple[bool, ...]]]:
    """All outcomes of independent yes-or-no trials, with their probabilities."""
    for outcome in product((True, False), repeat=len(probabilities)):
        yield prod((p if yes else 1 - p for p, yes in zip(probabilities, outcome, strict=True)), start=F(1)), outcome


DIE = range(1, 7)


def task_001() -> str:
    orders = permutations(enumerate("kkkkbbbgg"), 3)
    return str(chance(orders, lambda x, y, z: x[1] != y[1] and z[1] in (x[1], y[1])))


def task_002() -> str:
    rolls = ((die, *r) for die in ((1, 2, 3, 4, 5, 6), (1, 1, 2, 2, 3, 3), (3,) * 6) for r in product(die, repeat=3))
    return str(chance(rolls, lambda die, a, b, c: c == 3, lambda die, a, b, c: a == b == 3))


def task_003() -> str:
    litters = product("mf", repeat=3)
    return str(chance(litters, lambda a, b, c: a == b == c, lambda a, b, c: a + b != "mm"))


def task_004() -> str:
    stones = {3: F(1)}
    for _ in range(4):
        after: Counter = Counter()
        for stone, p in stones.items():
            for step, q in ((1, F(2, 3)), (-1, F(1, 3))) if stone not in (1, 5) else ((0, F(1)),):
                after[stone + step] += p * q
        stones = dict(after)
    return str(stones[1] + stones[5])


def task_005() -> str:
    wheel = (1, 2, 5, 12)
    again = [set(c) for k in range(5) for c in combinations(wheel, k)]  # every plan: on what to spin again
    return str(max(mean(mean(wheel) - 2 if w in plan else w for w in wheel) for plan in again))


def task_006() -> str:
    cases = ((coin, lifted) for coin in range(5) for lifted in combinations(range(1, 5), 2))
    return str(chance(cases, lambda coin, lifted: coin == 0, lambda coin, lifted: coin not in lifted))


def task_007() -> str:
    def event(*essay_of: int) -> bool:
        return all(e != s for s, e in enumerate(essay_of)) and essay_of[1] != 0

    return str(chance(permutations(range(5)), event, lambda *essay_of: essay_of[0] == 1))


def task_008() -> str:
    return str(chance(combinations(range(1, 11), 3), lambda a, b, c: a == 3, lambda a, b, c: c == 8))


def task_009() -> str:
    moves = {"Ida": {"won": HALF, "Jo": HALF}, "Jo": {"lost": THIRD, "Ida": F(2, 3)}}
    return str(chain(moves, {"won": F(1)})["Ida"])


def task_010() -> str:
    boards = product(range(20), range(10), range(10))  # board 0 is faulty

    def flagged(board: int, scan: int) -> bool:
        return scan < (9 if board == 0 else 1)

    return str(chance(boards, lambda b, x, y: b == 0, lambda b, x, y: flagged(b, x) and flagged(b, y)))


def task_011() -> str:
    return str(mean(sum(x == y for x, y in pairwise(word)) for word in permutations("PEPPER")))


def task_012() -> str:
    def event(*songs: str) -> bool:
        return "HH" not in "".join(songs) and songs[-1] != "L"

    return str(chance(permutations("HHLxyz"), event))


def task_013() -> str:
    north, south = ((18, 20), (56, 80)), ((68, 80), (13, 20))

    def better(kind: slice) -> int:
        rates = [F(sum(n for n, _ in bakery[kind]), sum(n for _, n in bakery[kind])) for bakery in (north, south)]
        return (rates[0] > rates[1]) - (rates[0] < rates[1])

    signs = better(slice(0, 1)), better(slice(1, 2)), better(slice(0, 2))
    return {(1, 1, 1): "A", (1, 1, -1): "B", (-1, -1, -1): "C"}[signs]


def task_014() -> str:
    total = F(0)
    for p, (first, second, heads, own) in independent(F(6, 10), F(7, 10), HALF, F(8, 10)):
        third = first if heads else own
        total += p * (first + second + third >= 2)
    return str(total)


def task_015() -> str:
    pairs = [frozenset(c) for c in combinations("abc", 2)]
    states = [frozenset(), *pairs]
    moves = {}
    for owned in states:
        moves[owned] = {new: F(sum(owned | p == new for p in pairs), 3) for new in {owned | p for p in pairs}}
    return str(chain(moves, {owned: F(1) for owned in states})[frozenset()])


def task_016() -> str:
    spinners = ((1, 6, 8), (3, 5, 7), (2, 4, 9))

    def wins(mine: tuple, other: tuple) -> Fraction:
        return chance(product(mine, other), lambda x, y: x > y)

    return str(max(min(wins(mine, other) for other in spinners if other != mine) for mine in spinners))


def task_017() -> str:
    tosses = ((tile, i, j) for tile in ("bb", "bb", "rr", "rr", "br") for i in (0, 1) for j in (0, 1))
    return str(chance(tosses, lambda t, i, j: t[1 - j] == "r", lambda t, i, j: t[i] == t[j] == "b"))


def task_018() -> str:
    return str(chance(product(range(1, 11), repeat=2), lambda x, y: abs(x - y) <= 2))


def task_020() -> str:
    moves = {}
    for tokens in range(1, 5):
        stake = min(tokens, 5 - tokens)
        moves[tokens] = {tokens + stake: THIRD, tokens - stake: 1 - THIRD}
    return str(chain(moves, {5: F(1)})[2])


def task_021() -> str:
    groups = combinations("EEEEEAAAA", 4)
    return str(chance(groups, lambda *g: g.count("E") == 2, lambda *g: {"E", "A"} == set(g)))


def task_022() -> str:
    return str(chance(permutations(range(5)), lambda *shelf: all(y != x + 1 for x, y in pairwise(shelf))))


def task_023() -> str:
    return str(chance(product("HT", repeat=6), lambda *coins: len([b for b in "".join(coins).split("T") if b]) == 1))


def task_024() -> str:
    wheel = {"red": HALF, "blue": QUARTER, "green": QUARTER}
    moves: dict = {last: {color if color != last else "twice": p for color, p in wheel.items()} for last in wheel}
    moves["start"] = wheel
    return str(chain(moves, {state: F(1) for state in moves})["start"])


def task_025() -> str:
    def taken(*shown: int) -> int:
        return next((x for x in shown[2:] if x > max(shown[:2])), shown[3])

    return str(chance(permutations(range(4)), lambda *shown: taken(*shown) == 0))


def task_026() -> str:
    return str(chance(product(DIE, repeat=4), lambda *dice: max(dice) == 2 * min(dice)))


def task_027() -> str:
    def couples(*order: int) -> int:
        return sum(order[i] // 2 == order[i + 1] // 2 for i in (0, 2, 4))

    return str(chance(permutations(range(6)), lambda *order: couples(*order) == 1))


def task_028() -> str:
    gardeners = {"Kim": (HALF, F(1, 10)), "Lou": (THIRD, QUARTER), "Max": (F(1, 6), HALF)}
    cases = [(p * q, True, name == "Max") for name, (p, q) in gardeners.items()]
    cases += [(p * (1 - q), False, name == "Max") for name, (p, q) in gardeners.items()]
    return str(weighed(cases))


def task_029() -> str:
    rolls = set(product(DIE, repeat=2))
    events = [{r for r in rolls if sum(r) == 7}, {r for r in rolls if r[0] == 4}, {r for r in rolls if r[1] % 2}]

    def product_rule(*chosen: set) -> bool:
        return F(len(set.intersection(*chosen)), 36) == prod(F(len(e), 36) for e in chosen)

    pairs = [product_rule(x, y) for x, y in combinations(events, 2)]
    if not any(pairs):
        return "A"
    if pairs == [True, False, False]:
        return "B"
    assert all(pairs)
    return "C" if product_rule(*events) else "D"


def task_030() -> str:
    def same(red: int, blue: int, drawn: str) -> Fraction:
        if len(drawn) == 3:
            return F(len(set(drawn)) == 1)
        draw_red = F(red, red + blue)
        return draw_red * same(red + 1, blue, drawn + "r") + (1 - draw_red) * same(red, blue + 1, drawn + "b")

    return str(same(2, 1, ""))


def task_031() -> str:
    events = {
        "A": lambda *coins: coins.count("H") == 2,
        "B": lambda *coins: max(coins.count("H"), coins.count("T")) >= 4,
        "C": lambda *coins: coins[0] != coins[4] and coins[2] == "H",
        "D": lambda *coins: "HH" not in "".join(coins),
    }
    chances = {letter: chance(product("HT", repeat=5), event) for letter, event in events.items()}
    [letter] = [k for k, p in chances.items() if p == max(chances.values())]
    return letter


def task_032() -> str:
    flips = independent(QUARTER, QUARTER, QUARTER)
    return str(weighed((p, sum(flipped) % 2 == 0, not any(flipped)) for p, flipped in flips))


def task_033() -> str:
    def finalists(bracket: tuple[int, ...]) -> set[int]:
        while len(bracket) > 2:  # a smaller number is a stronger player
            bracket = tuple(min(bracket[i : i + 2]) for i in range(0, len(bracket), 2))
        return set(bracket)

    return str(chance(permutations(range(8)), lambda *bracket: 2 in finalists(bracket)))


def task_034() -> str:
    cases = []
    for p, (knows, strikes) in independent(F(3, 5), HALF):
        right = F(1) if knows else F(1, 3 if strikes else 4)
        cases += [(p * right, True, knows), (p * (1 - right), False, knows)]
    return str(weighed(cases))


def task_035() -> str:
    stay = {"s": F(3, 4), "r": HALF}
    cases = []
    for days in product("sr", repeat=3):
        week = ("s", *days)
        p = prod(stay[x] if x == y else 1 - stay[x] for x, y in pairwise(week))
        cases.append((p, week[3] == "s", week[2] == "r"))
    return str(weighed(cases))


def task_036() -> str:
    possible = list(combinations(range(5), 2))

    def tests(blown: tuple[int, ...]) -> int:
        """In the order 0, 1, 2, ...: how many until only one possibility agrees with what was seen."""
        return next(k for k in range(6) if sum(all((i in p) == (i in blown) for i in range(k)) for p in possible) == 1)

    return str(mean(tests(blown) for blown in possible))


def task_037() -> str:
    rows = [{3 * i + j for j in range(3)} for i in range(3)]
    columns = [{3 * i + j for i in range(3)} for j in range(3)]
    lines = [*rows, *columns, {0, 4, 8}, {2, 4, 6}]
    return str(chance(combinations(range(9), 4), lambda *marked: any(line <= set(marked) for line in lines)))


def task_038() -> str:
    def reached(direct: bool, a1: bool, a2: bool, b1: bool, b2: bool) -> bool:
        return direct or (a1 and a2) or (b1 and b2)

    return str(chance(product((True, False), repeat=5), lambda direct, *_: direct, reached))


def task_040() -> str:
    def hits(total: int) -> Fraction:
        return F(total == 5) if total >= 5 else mean(hits(total + face) for face in (1, 2, 3, 4))

    return str(hits(0))


def task_041() -> str:
    return str(chance(product(range(5), repeat=5), lambda *days: sorted(Counter(days).values()) == [1, 1, 1, 2]))


def task_042() -> str:
    return str(mean(x + y for x, y in product(DIE, repeat=2) if 5 in (x, y)))


def task_044() -> str:
    pile = ["K hearts", "K spades", "K clubs", "K diamonds", "Q hearts", "Q spades", "Q clubs", "Q diamonds"]

    def both(x: str, y: str) -> bool:
        return x[0] == y[0] == "K"

    p = chance(combinations(pile, 2), both, lambda x, y: "K" in x[0] + y[0])
    q = chance(combinations(pile, 2), both, lambda x, y: "K hearts" in (x, y))
    return str(q - p)


def task_045() -> str:
    return str(max(s for s in range(100) if mean(0 if face == 1 else s + face for face in (1, 2, 3, 4)) > s))


def task_046() -> str:
    sets = [([x for x, taken in zip(DIE, chosen, strict=True) if taken],) for chosen in product((0, 1), repeat=6)]
    return str(chance(sets, lambda s: bool(s) and max(s) == 2 * min(s)))


def task_047() -> str:
    def triangle(x: int, y: int) -> bool:
        a, b, c = sorted((x, y - x, 10 - y))
        return a + b > c

    return str(chance(combinations(range(1, 10), 2), triangle))


def task_048() -> str:
    cases = [(F(1, 6 * 2**n), "H" not in coins, n == 1) for n in DIE for coins in product("HT", repeat=n)]
    return str(weighed(cases))


def task_049() -> str:
    def left(*beans: str) -> str:
        return next(beans[k] for k in range(7) if len(set(beans[k:])) == 1)

    return str(chance(permutations("rrrbbbb"), lambda *beans: left(*beans) == "r"))


def task_050() -> str:
    # The smallest field of this kind: ability and luck are -1, 0 or 1, independently.
    results = [(ability, luck) for ability in (-1, 0, 1) for luck in (-1, 0, 1)]
    best = max(a + x for a, x in results)
    second = mean(mean(a + new for new in (-1, 0, 1)) for a, x in results if a + x == best)
    if second >= best:
        return "A" if second > best else "B"
    return "C" if second > mean(a + x for a, x in results) else "D"


def task_051() -> str:
    doors = {"A": "BCD", "B": "AC", "C": "ABD"}
    moves = {room: {other: F(1, len(others)) for other in others} for room, others in doors.items()}
    return str(chain(moves, {room: F(1) for room in doors})["B"])


def task_052() -> str:
    def expected(share: Fraction) -> Fraction:
        return 200 * sum(p for p, (heads, truth) in independent(HALF, share) if truth or not heads)

    [share] = [F(n, 200) for n in range(201) if expected(F(n, 200)) == 130]
    return str(share)


def task_053() -> str:
    def visible(*line: int) -> int:
        return sum(all(x > y for y in line[:i]) for i, x in enumerate(line))

    return str(chance(permutations(range(5)), lambda *line: visible(*line) == 2))


def task_054() -> str:
    classes = (10, 20, 60)
    return str(mean(size for size in classes for _ in range(size)) - mean(classes))


def task_055() -> str:
    cases = []
    for throws in product((True, False), repeat=3):
        p = HALF
        for before, now in pairwise(throws):
            hit = F(3, 4) if before else QUARTER
            p *= hit if now else 1 - hit
        cases.append((p, sum(throws) == 1, throws[1]))
    return str(weighed(cases))


SOLUTIONS: dict[str, Callable[[], str]] = {
    f"probabilistic-thinking-{name[-3:]}": solve for name, solve in list(globals().items()) if name.startswith("task_")
}
SECOND: dict[str, str] = {}

"""Answers to the mathematical-logic tasks by enumeration, written from the prompts and not from the answers."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from fractions import Fraction
from functools import cache
from itertools import combinations, count, permutations, product
from math import floor, gcd, isqrt, lcm, prod


def prime(n: int) -> bool:
    return n > 1 and all(n % d for d in range(2, n))


def divisors(n: int) -> list[int]:
    return [d for d in range(1, n + 1) if n % d == 0]


def square(n: int) -> bool:
    return isqrt(n) ** 2 == n


def bits(n: int) -> Iterator[tuple[int, ...]]:
    return product((0, 1), repeat=n)


def subsets(items: list) -> Iterator[frozenset]:
    return (frozenset(s) for k in range(len(items) + 1) for s in combinations(items, k))


def in_base(n: int, base: int) -> str:
    return "" if n == 0 else in_base(n // base, base) + str(n % base)


def task_001() -> str:
    first = [c for c in combinations(range(1, 10), 4) if c[0] + c[1] == c[3] - c[2]]
    assert len(first) > 1
    [code] = [c for c in first if square(prod(c))]
    return "".join(map(str, code))


def task_002() -> str:
    def consistent(p: int, q: int, r: int, s: int, t: int) -> bool:
        said = (p + q + r + s + t == 1, not r, p == t, p or q, q and s)
        return [bool(x) for x in said] == [bool(x) for x in (p, q, r, s, t)]

    [values] = [v for v in bits(5) if consistent(*v)]
    return "".join(name for name, true in zip("PQRST", values, strict=True) if true)


def task_003() -> str:
    marked = [n % 4 == 0 or n % 6 == 1 for n in range(100)]
    return str(next(k for k in count(1) if all(any(marked[i : i + k]) for i in range(50))))


def task_004() -> str:
    @cache
    def wins(heap: int, last: int) -> bool:
        return any(not wins(heap - m, m) for m in range(1, 5) if m != last and m <= heap)

    [opening] = [m for m in range(1, 5) if not wins(17 - m, m)]
    return str(opening)


def task_005() -> str:
    return str(sum(all(2 * x in s for x in s if 2 * x <= 12) for s in subsets(list(range(1, 13)))))


def task_006() -> str:
    return str(sum(((not a) or b) + (b != c) + ((not d) or not c) == 2 for a, b, c, d in bits(4)))


def task_007() -> str:
    steps = {
        "A": lambda x, y: (x - y) * (x + y) % 8 == 0,
        "B": lambda x, y: (x - y - x - y) % 2 == 0,
        "C": lambda x, y: (x - y) % 2 == 0 and (x + y) % 2 == 0,
        "D": lambda x, y: (x - y) % 4 == 0 and (x + y) % 4 == 0,
        "E": lambda x, y: 2 * x % 4 == 0,
    }
    cases = [(x, y) for x, y in product(range(-20, 21), repeat=2) if (x * x - y * y) % 8 == 0]
    return next(name for name, holds in steps.items() if not all(holds(*case) for case in cases))


def task_008() -> str:
    def fits(n: int) -> bool:
        first, second = n // 5, n // 5 // 7
        return n % 5 == 2 and first % 7 == 3 and second > 0 and second % 4 == 0

    return str(next(n for n in count() if fits(n)))


def task_009() -> str:
    def fits(cells: tuple[int, ...]) -> bool:
        rows = [cells[4 * i : 4 * i + 4] for i in range(3)]
        return all(sum(row) % 2 == 0 for row in rows) and all(sum(column) % 2 for column in zip(*rows, strict=True))

    return str(sum(fits(cells) for cells in bits(12)))


def task_010() -> str:
    def fits(honest: tuple[int, ...]) -> bool:
        return all(h == (honest[:i].count(0) > honest[i + 1 :].count(1)) for i, h in enumerate(honest))

    [line] = [honest for honest in bits(6) if fits(honest)]
    return str(line.count(0))


def task_011() -> str:
    tables = product((1, 2, 3, 4), repeat=4)
    return str(sum(f[0] != 1 and all(f[f[x] - 1] == f[x] for x in range(4)) for f in tables))


def task_012() -> str:
    claims = {
        "A": lambda a, b: a % 12 == 0 or b % 12 == 0,
        "B": lambda a, b: (a % 4 == 0) != (b % 4 == 0),
        "C": lambda a, b: (a % 3 == 0) != (b % 3 == 0),
        "D": lambda a, b: (a - b) % 3 == 0,
    }
    cases = [(a, b) for a, b in product(range(1, 49), repeat=2) if a * b % 12 == 0 and (a + b) % 2]
    [claim] = [name for name, holds in claims.items() if all(holds(*case) for case in cases)]
    return claim


def task_013() -> str:
    trays, reached = [(5, 6, 7)], set()
    while trays:
        tray = trays.pop()
        if tray not in reached:
            reached.add(tray)
            moves = [tuple(n + (1 if i == c else -1) for i, n in enumerate(tray)) for c in range(3)]
            trays += [move for move in moves if min(move) >= 0]
    [last] = [tray for tray in reached if sum(tray) == 1]
    return ("red", "blue", "green")[last.index(1)]


def task_014() -> str:
    def known(numbers: list[int], hint: Callable[[int], int]) -> list[int]:
        return [n for n in numbers if [hint(m) for m in numbers].count(hint(n)) == 1]

    def ina(n: int) -> int:
        return n % 6

    def oskar(n: int) -> int:
        return len(divisors(n))

    numbers = list(range(24, 34))
    numbers = [n for n in numbers if n not in known(numbers, ina)]
    numbers = [n for n in numbers if n not in known(numbers, oskar)]
    [number] = known(numbers, ina)
    return str(number)


def task_015() -> str:
    words = {(10 * m + e, 100 * h + 10 * e + m) for h, e, m in permutations(range(10), 3) if h and m}
    [number] = [hem for me, hem in words if me + me + me + me == hem]
    return str(number)


def task_016() -> str:
    rows = permutations(range(1, 7))
    return str(sum(all(any(abs(row[i] - x) == 1 for x in row[:i]) for i in range(1, 6)) for row in rows))


def task_017() -> str:
    def largest(chosen: list[int], cards: list[int]) -> int:
        """How many cards can be drawn on top of those chosen without a square product."""
        free = [c for c in cards if not any(square(c * d) for d in chosen)]
        if not free:
            return 0
        rivals = [c for c in free if square(c * free[0])]  # one of them is in some best draw
        return 1 + max(largest([*chosen, c], [d for d in free if d not in rivals]) for c in rivals)

    return str(1 + largest([], list(range(1, 21))))


def task_018() -> str:
    def fits(n: int) -> bool:
        digits = [int(d) for d in str(n)]
        return prod(digits) == 432 and sum(digits) == 20

    return str(next(n for n in count(1) if fits(n)))


def task_019() -> str:
    def true_statements(n: int) -> int:
        return (n % 7 == 0) + (n % 10 > n // 10) + (n % 6 == 0) + (n // 10 + n % 10 == 10)

    [number] = [n for n in range(10, 100) if true_statements(n) == 3]
    return str(number)


def task_020() -> str:
    teams = ("Auks", "Buzzards", "Cranes", "Doves", "Egrets")
    wanted = [12, 7, 4, 3, 2]

    def seasons(games: list[tuple[int, int]], points: list[int], beaten: str) -> Iterator[str]:
        """Whom the Doves beat, in every season that gives the wanted points."""
        if any(p > w for p, w in zip(points, wanted, strict=True)):
            return
        if not games:
            if points == wanted:
                yield beaten
            return
        a, b = games[0]
        for x, y in ((3, 0), (1, 1), (0, 3)):
            after = [p + x * (i == a) + y * (i == b) for i, p in enumerate(points)]
            won = teams[b] if (a, x) == (3, 3) else teams[a] if (b, y) == (3, 3) else ""
            yield from seasons(games[1:], after, beaten + won)

    [loser] = set(seasons(list(combinations(range(5), 2)), [0] * 5, ""))
    return loser


def task_021() -> str:
    pairs = list(product("abc", repeat=2))
    relations = (set(r) for r in subsets(pairs))
    return str(sum(
        all((y, x) in r for x, y in r) and all((x, w) in r for x, y in r for z, w in r if y == z) for r in relations
    ))  # fmt: skip


def task_022() -> str:
    [base] = [b for b in range(5, 37) if int("23", b) * int("14", b) == int("410", b)]
    return in_base(int("31", base) * int("25", base), base)


def task_023() -> str:
    ages = [c for c in combinations(filter(prime, range(30)), 4) if sum(c) == 70]
    [cousins] = [c for c in ages if sum(prime(a - 2) for a in c) == 2 and sum(prime(a + 2) for a in c) == 2]
    return str(max(cousins))


def task_024() -> str:
    return str(next(n for n in count(2) if n % 2 and n % 3 and not prime(n) and not prime(n + 6)))


def task_025() -> str:
    signs = product((1, -1), repeat=7)
    return str(sum(1 + sum(s * n for s, n in zip(chosen, range(2, 9), strict=True)) == 12 for chosen in signs))


def task_026() -> str:
    def values(numbers: list[int]) -> set[int]:
        cuts = range(1, len(numbers))
        return {2 * a - b for i in cuts for a in values(numbers[:i]) for b in values(numbers[i:])} or set(numbers)

    return str(len(values([8, 5, 3, 1])))


def task_027() -> str:
    def shows_five(n: int) -> bool:
        seen: set[int] = set()
        while n not in seen:
            seen.add(n)
            n = n + 5 if n % 2 else n // 2
        return 5 in seen

    return str(sum(map(shows_five, range(1, 21))))


def task_028() -> str:
    f = {1: 0}
    for n in range(2, 2000):  # f grows by at least 1 with every doubling, so 5 is not reached beyond 2^6
        f[n] = f[n // 2] + 1 + n % 2
    return str(sum(value == 5 for value in f.values()))


def task_029() -> str:
    conditions = {
        "A": lambda n: n % 2 == 1,
        "B": prime,
        "C": lambda n: n % 2 != 0 and n % 3 != 0,
        "D": lambda n: n % 3 in (1, 2),
    }
    numbers = range(5, 500)
    good = [n for n in numbers if (n * n - 1) % 24 == 0]
    sufficient = {k for k, holds in conditions.items() if all(n in good for n in numbers if holds(n))}
    necessary = {k for k, holds in conditions.items() if all(holds(n) for n in good)}
    [letter] = sufficient - necessary
    return letter


def task_030() -> str:
    everything = frozenset(range(1, 9))
    sets = list(subsets(list(everything)))
    triples = ((a, a ^ {1, 2, 3}, a ^ {1, 2, 3} ^ {3, 4, 5}) for a in sets)
    return str(sum(a | b | c == everything for a, b, c in triples))


def task_031() -> str:
    return str(sum(n % 77 == 0 and str(n) == str(n)[::-1] for n in range(1000, 10000)))


def task_032() -> str:
    def fits(order: tuple[str, ...]) -> bool:
        before = ("AB", "AC", "DC", "BE", "DE")
        return order[-1] != "F" and all(order.index(x) < order.index(y) for x, y in before)

    return str(sum(map(fits, permutations("ABCDEF"))))


def task_033() -> str:
    def lamps_on(touched: tuple[int, ...]) -> int:
        return sum(sum((lamp - t) % 5 in (0, 1, 4) for t in touched) % 2 for lamp in range(5))

    return str(next(k for k in count() for touched in product(range(5), repeat=k) if lamps_on(touched) == 1))


def task_034() -> str:
    def kind(n: int) -> tuple[bool, bool]:
        return n % 2 == 0, n % 3 == 0

    sizes = {k: sum(kind(n) == k for n in range(1, 21)) for k in product((True, False), repeat=2)}
    best = 0
    for taken in product(*(range(size + 1) for size in sizes.values())):
        odd = sum(n for (even, _), n in zip(sizes, taken, strict=True) if not even)
        others = sum(n for (_, triple), n in zip(sizes, taken, strict=True) if not triple)
        if odd < 4 and others < 5:
            best = max(best, sum(taken))
    return str(best)


def task_035() -> str:
    sums = {3 * a + 5 * b for a in range(100) for b in range(a + 1)}
    return str(max(n for n in range(200) if n not in sums))


def task_036() -> str:
    return str(sum(lcm(a, b) == 72 and gcd(a, b) >= 2 for a, b in combinations(range(1, 73), 2)))


def task_037() -> str:
    return str(sum(sum(1 if d % 2 else -1 for d in divisors(n)) == 0 for n in range(1, 51)))


def task_038() -> str:
    def products(p: tuple[int, ...]) -> list[int]:
        return [prod(p[3 * i : 3 * i + 3]) for i in range(3)] + [prod(p[i::3]) for i in range(3)]

    def rows(value: int) -> list[tuple[int, ...]]:
        return [row for row in permutations(range(1, 10), 3) if prod(row) == value]

    squares = (a + b + c for a, b, c in product(rows(15), rows(64), rows(378)) if len({*a, *b, *c}) == 9)
    [found] = [p for p in squares if products(p) == [15, 64, 378, 84, 48, 90]]
    return str(found[4])


def task_039() -> str:
    tails, moves = {0}, 0
    while 10 not in tails:
        tails = {t - back + 7 - back for t in tails for back in range(8) if back <= t and 7 - back <= 10 - t}
        moves += 1
    return str(moves)


def task_040() -> str:
    return str(sum(sum(range(a, b + 1)) == 90 for a, b in combinations(range(1, 91), 2)))


def task_041() -> str:
    def valid(b: list[int]) -> bool:
        return (b[0] + b[1] + b[3]) % 2 == (b[0] + b[2] + b[4]) % 2 == (b[1] + b[2] + b[5]) % 2 == 0

    received = [1, 1, 0, 1, 1, 1]
    [index] = [i for i in range(6) if valid([b ^ (i == j) for j, b in enumerate(received)])]
    return str(index + 1)


def task_042() -> str:
    def sixth(hands: list[int]) -> set[int]:
        """How many hands the last person shakes, in every way to give the others theirs."""
        if len(hands) == 1:
            return {-hands[0]}
        partners = combinations(range(1, len(hands)), hands[0])
        rests = ([h - (i in chosen) for i, h in enumerate(hands)][1:] for chosen in partners)
        return {n for rest in rests if min([0, *rest[:-1]]) == 0 for n in sixth(rest)}

    [answer] = sixth([5, 4, 4, 3, 1, 0])  # the last counts down from zero
    return str(answer)


def task_043() -> str:
    return str(max(min(x * y % 7 for y in range(1, 7) if y != x) for x in range(1, 7)))


def task_046() -> str:
    doors = [False] * 41
    for step in (2, 3, 5):
        for door in range(step, 41, step):
            doors[door] = not doors[door]
    return str(sum(doors))


def task_047() -> str:
    # Beyond ±100 the first statement and one of the next two are false, so at most two are true.
    return str(sum((x * x < 30) + (x > -3) + (x <= 7) + ((2 * x + 1) % 3 == 0) == 3 for x in range(-100, 101)))


def task_048() -> str:
    places, later = range(1, 7), range(1, 11)
    ends = [lambda n: 1, lambda n: 3, lambda n: n, lambda n: 1 + n % 2, lambda n: n if n % 2 else 1]
    readings = {
        "A": lambda f: all(any(f(b) > f(a) for b in later if b > a) for a in places),
        "B": lambda f: any(all(f(b) > f(a) for b in later if b > a) for a in places),
        "C": lambda f: any(any(f(b) > f(a) for b in later if b > a) for a in places),
        "D": lambda f: any(not any(f(b) <= f(a) for b in later if b < a) for a in places),
    }
    right = set(readings)
    for start, end in product(product(range(1, 4), repeat=4), ends):

        def f(n: int, start: tuple[int, ...] = start, end: Callable[[int], int] = end) -> int:
            return start[n - 1] if n <= 4 else end(n)

        claim = all(any(f(b) <= f(a) for b in later if b > a) for a in places)
        right -= {k for k, reading in readings.items() if reading(f) == claim}
    [letter] = right
    return letter


def task_049() -> str:
    votes = list(bits(3))

    def fits(rule: dict[tuple[int, ...], int]) -> bool:
        reversal = all(rule[tuple(1 - x for x in v)] != rule[v] for v in votes)
        return reversal and all(
            rule[v] <= rule[w] for v, w in product(votes, repeat=2) if all(x <= y for x, y in zip(v, w, strict=True))
        )

    return str(sum(fits(dict(zip(votes, decisions, strict=True))) for decisions in bits(8)))


def task_050() -> str:
    def true_labels(keys: tuple[str, ...]) -> int:
        return ("X" in keys) + (("W" in keys) != ("Z" in keys)) + ("Y" not in keys) + ("W" not in keys)

    [keys] = [keys for keys in combinations("WXYZ", 2) if true_labels(keys) == 3]
    return "".join(keys)


def task_051() -> str:
    possible = 0
    for n in range(1, 21):
        differences = {0}
        for x in range(1, n + 1):
            differences = {d + s * x for d in differences for s in (1, -1)}
        possible += 0 in differences
    return str(possible)


def task_052() -> str:
    masks = (m for m in range(1 << 16) if not m & (m >> 3) and not m & (m >> 5))
    return str(max(bin(m).count("1") for m in masks))


def task_053() -> str:
    xs = [Fraction(n, 16) for n in range(-32, 200)]
    reached = {floor(x) + floor(2 * x) + floor(4 * x) for x in xs}
    return str(sum(n in reached for n in range(1, 31)))


def task_054() -> str:
    orders = set()
    for p, q, r, s in permutations(range(1, 10), 4):
        if p + r == q + s and p + q < r + s and r < p:
            orders.add("".join(sorted("PQRS", key=dict(P=p, Q=q, R=r, S=s).__getitem__)))
    [order] = orders
    return order


def task_055() -> str:
    def last(numbers: tuple[int, ...]) -> int:
        if len(numbers) == 1:
            return numbers[0]
        values = []
        for i, j in combinations(range(len(numbers)), 2):
            x, y = numbers[i], numbers[j]
            rest = tuple(n for k, n in enumerate(numbers) if k not in (i, j))
            values.append(last((*rest, x + y + x * y)))
        return max(values)

    return str(last((1, 2, 3, 4)))


SOLUTIONS: dict[str, Callable[[], str]] = {
    f"mathematical-logic-{name[-3:]}": solve for name, solve in list(globals().items()) if name.startswith("task_")
}
SECOND: dict[str, str] = {}

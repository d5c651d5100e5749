"""Answers to the written records by code, from the questions and not from the texts: id -> a function."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from datetime import date, datetime, timedelta
from fractions import Fraction
from itertools import combinations, count, permutations, product
from math import isqrt, prod


def the(found: Iterable[object]) -> str:
    """The only one."""
    [value] = found
    return str(value)


def clock(start: str, minutes: float) -> str:
    hours, rest = map(int, start.split(":"))
    total = int(60 * hours + rest + minutes)
    return f"{total // 60}:{total % 60:02}"


def dollars(cents: float) -> str:
    whole, rest = divmod(round(cents), 100)
    return f"${whole}.{rest:02}" if rest else f"${whole}"


def weekday(day: date) -> str:
    return f"{day:%A}"


def number(value: Fraction | float) -> str:
    return f"{float(value):g}"


def orders(names: str) -> Iterator[dict[str, int]]:
    """Every ranking of some people, 1 first."""
    people = names.split()
    return ({who: place for place, who in enumerate(order, 1)} for order in permutations(people))


def second_tallest() -> str:
    found = [r for r in orders("Ada Ben Cleo Dov") if r["Ada"] < r["Ben"] < r["Cleo"] and r["Dov"] < r["Ada"]]
    return the(who for r in found for who in r if r[who] == 2)


def burning_hours() -> str:
    hours, height = 0, 180
    while height > 60:
        hours, height = hours + 1, height - 15
    assert height == 60
    return str(hours)


def weekday_of_march_29() -> str:
    found = {weekday(date(year, 3, 29)) for year in range(2000, 2060) if weekday(date(year, 3, 3)) == "Tuesday"}
    return the(found)


def red_key() -> str:
    worlds = [(red, opens, ring) for red, opens, ring in product((0, 1), repeat=3) if (not red or opens)]
    return "yes" if any(red and ring for red, opens, ring in worlds if not (ring and opens)) else "no"


def ring_box() -> str:
    return the(box for box in "ABC" if [box == "A", box != "B", box != "A"].count(True) == 1)


def metal() -> str:
    figures = {"aluminum": 2.7, "iron": 7.9, "lead": 11.3}
    return the(name for name, figure in figures.items() if abs(figure * 200 - 540) < 1)


def vase() -> str:
    people = ("Pia", "Quin", "Rhea")
    return the(p for p in people if [p == "Quin", p != "Quin", p != "Rhea"].count(True) == 1)


def bamboo() -> str:
    return str(next(d for d in count() if 15 + 4 * d == 35 + 2 * d))


def rain() -> str:
    worlds = [w for w in product((False, True), repeat=3) if (not w[0] or w[1]) and (not w[1] or w[2])]
    return "yes" if the({rained for rained, _, library in worlds if not library}) == "True" else "no"


def ribbons() -> str:
    hands = [n for n in range(1, 22) if all(max(h) > 1 for h in product(range(8), repeat=3) if sum(h) == n)]
    return str(min(hands))


def evening_clock() -> str:
    minutes = (date(2024, 1, 5) - date(2024, 1, 1)).days * 3
    return clock("12:00", minutes)


def third_runner() -> str:
    found = [r for r in orders("Finn Gus Hana Ivo") if r["Hana"] < r["Finn"] < r["Gus"] and r["Ivo"] > r["Gus"]]
    return the(who for r in found for who in r if r[who] == 3)


def last_indoors() -> str:
    last = [date(2023, 11, 18) + timedelta(days=i) for i in range(21)][-1]
    return f"{last:%B} {last.day}"


def leftmost_house() -> str:
    rows = [r for r in permutations(("red", "green", "blue")) if r[1] == "green" and r.index("blue") < r.index("red")]
    return the(row[0] for row in rows)


def pie() -> str:
    outdoors = {"the cat": [False], "the dog": [False, True]}
    return the(animal for animal, may in outdoors.items() if any(may))


def savings() -> str:
    return str(next(w for w in count() if 45 + 12 * w >= 165))


def buses() -> str:
    return clock("8:00", next(m for m in count(1) if m % 12 == m % 18 == 0))


def marbles() -> str:
    return the(2 * y for y in range(85) if y + (y + 4) + 2 * y == 84)


def lamp() -> str:
    lit = False
    for _ in range(3 + 2):
        lit = not lit
    return "on" if lit else "off"


def pet_owner() -> str:
    found = [
        owner
        for owner in (
            dict(zip(pets, ("Vera", "Wes", "Xia"), strict=True)) for pets in permutations(("cat", "dog", "fish"))
        )
        if owner["fish"] == "Vera" and owner["dog"] != "Wes"
    ]
    return the(owner["dog"] for owner in found)


def festival() -> str:
    fridays = [d for d in range(1, 32) if weekday(date(2023, 1, d)) == "Friday"]  # January 1, 2023 was a Sunday
    assert weekday(date(2023, 1, 1)) == "Sunday"
    return str(fridays[1])


def daylight() -> str:
    length = datetime(2024, 4, 1, 19, 47) - datetime(2024, 4, 1, 6, 12)
    return f"{length.seconds // 3600} hours {length.seconds % 3600 // 60} minutes"


def prism_edges() -> str:
    corners = list(product(range(6), (0, 1)))

    def joined(a: tuple[int, int], b: tuple[int, int]) -> bool:
        return (a[0] == b[0]) if a[1] != b[1] else (a[0] - b[0]) % 6 in (1, 5)

    return str(sum(joined(a, b) for a, b in combinations(corners, 2)))


def visible_cube_faces() -> str:
    cells = list(product(range(4), repeat=3))
    return str(sum((c in (0, 3)) for cell in cells for c in cell))


ANSWERS: tuple[Callable[[], str], ...] = (
    lambda: str(sum([6] * 14) + 5),
    lambda: clock("9:40", 2 * 60 + 35 + 20),
    second_tallest,
    lambda: str(9 + 9 + 5 + 5 - 1),
    lambda: dollars(8000 * 0.75 - 600),
    lambda: str(28 - len(set(range(15)) | set(range(9, 21)))),
    burning_hours,
    weekday_of_march_29,
    lambda: number(Fraction(3, 4) * 240 * 5),
    lambda: str(next(m for m in count() if m * (8 + 5 - 3) == 120)),
    lambda: the(n for n in range(100) if 3 * n - 7 == 26),
    red_key,
    lambda: the(d for d in range(46) if d + 4 * d == 45),
    lambda: str(340 * 6),
    lambda: dollars(3 * 25 + 4 * 10 + 2 * 5),
    lambda: number(Fraction(3, 3 + 5) * 24),
    lambda: the(c for c in range(181) if 48 + 67 + c == 180),
    lambda: clock("19:45", 128),
    lambda: the(x for x in range(101) if (7 + 9 + 6 + 10 + x) / 5 == 8),
    ring_box,
    lambda: dollars(Fraction(150, 6) * 10),
    lambda: number(Fraction(4 * 6, 3)),
    lambda: str(-4 + 3 * len(range(6, 14, 2))),
    lambda: str(len(range(0, 300, 30)) * len(range(0, 240, 30))),
    lambda: str(sum(n % 3 == 0 and n % 4 != 0 for n in range(1, 41))),
    lambda: str(next(d for d in count() if 8 * 24 + 30 * d >= 312)),
    metal,
    lambda: number(Fraction(18 * 40, 60)),
    lambda: str((date(2024, 3, 10) - date(2024, 2, 20)).days),
    lambda: number(60 * Fraction(85, 100)),
    lambda: number(12 * (1 - Fraction(1, 4) - Fraction(1, 3))),
    lambda: number(Fraction(50 * 30 * 40, 1000) * Fraction(3, 4)),
    vase,
    lambda: f"${10 - 3 * 2.40 - 1.85:.2f}",
    lambda: number(Fraction(36, 12) * 20),
    lambda: str(sum(10 + 2 * row for row in range(6))),
    lambda: the(s * s for s in range(53) if 4 * s == 52),
    lambda: clock("13:20", 8 * 60 + 30 - 7 * 60),
    lambda: f"{number(Fraction(20, 160) * 100)}%",
    lambda: str(len(list(combinations(range(5), 2)))),
    bamboo,
    rain,
    lambda: number(2.5 * 60 + 45 + 3600 / 60),
    lambda: number(Fraction(23 - 7 + 4, 2)),
    lambda: number(Fraction(30 * 2, 40)),
    lambda: the(both for both in range(51) if 32 + 27 - both == 50),
    ribbons,
    lambda: number(min(Fraction(4 * 360, 12), 360 - Fraction(4 * 360, 12))),
    lambda: number(Fraction(64 * 50000, 10 * 100 * 1000)),
    lambda: str(2024 - (1987 - 12)),
    lambda: the(r for r in range(11) if 2 * (10 - r) + 4 * r == 28),
    lambda: the(10 * a + b for a in range(1, 10) for b in range(10) if a + b == 11 and 10 * b + a - 10 * a - b == 27),
    lambda: dollars(abs(2 * 2000 - 3 * 2000 * 0.7)),
    lambda: str(100 - len(range(0, 2400, 300))),
    lambda: the(3 * w * w for w in range(65) if 2 * (w + 3 * w) == 64),
    evening_clock,
    third_runner,
    lambda: number(Fraction(1800, 45) + 10),
    lambda: f"{number(Fraction(704 - 640, 640) * 100)}%",
    lambda: str(sum(n % 2 == 0 or n % 5 == 0 for n in range(1, 31))),
    lambda: number(18 / (Fraction(7, 10) - Fraction(2, 5))),
    last_indoors,
    lambda: number(12 * 5 * 30 / 1000),
    lambda: number(4 * 1.5 * 50),
    leftmost_house,
    lambda: number(Fraction(22000, 110) - 75),
    lambda: number(13.5 / (5 + 4)),
    lambda: number(Fraction(5 * 12 - 8, 4)),
    lambda: number(72 * 70 * 5 / 1000),
    lambda: str(isqrt(10**2 - 6**2)),
    lambda: str(len(list(product(range(4), range(3), range(2))))),
    lambda: the(n + 2 for n in range(72) if n + n + 1 + n + 2 == 72),
    pie,
    lambda: number(24 / (3 * Fraction(16, 10))),
    savings,
    buses,
    lambda: str(100 - max(range(0, 101, 12))),
    lambda: str(next(k for k in count() if (k + 1) * 8 * 5 > 250)),
    visible_cube_faces,
    lambda: weekday(date(2024, 2, 15) - timedelta(days=45)),  # a Thursday
    lambda: the(dollars(c) for c in range(10000) if c * 80 == 3600 * 100),
    marbles,
    lamp,
    lambda: number((60 + 90) / (1 + 0.5 + 1.5)),
    lambda: str(sum(not (0 < x < 11 and 0 < y < 11) for x, y in product(range(12), repeat=2))),
    lambda: number(Fraction(60 - 32, 4)),
    lambda: str((40 - 22) - 5),
    lambda: dollars(200 + 75 * len(range(60, 180, 30))),
    lambda: the(dollars(c) for c in range(0, 10000, 600) if c / 2 * 2 / 3 == 800),
    lambda: str(len(set(permutations("EENN")))),
    pet_owner,
    lambda: f"${6 * 3.5 * 1.60:.2f}",
    lambda: number(50 * prod([2] * len(range(0, 80, 20)))),
    festival,
    lambda: number(Fraction(2 * 9) / Fraction(3, 2)),
    lambda: number(Fraction(2 * 180, 3)),
    lambda: str(next(k for k in count() if 5 * 68 + 15 * (k + 1) > 400)),
    lambda: str(Fraction(sum(all(n % d for d in range(2, n)) for n in range(2, 9)), 8)),
    daylight,
    prism_edges,
)

SOLUTIONS: dict[str, Callable[[], str]] = {f"record-{i:03}": answer for i, answer in enumerate(ANSWERS, 1)}

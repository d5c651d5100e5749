"""Answers of the scientific-reasoning tasks, computed anew from what their prompts state."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction as F
from itertools import combinations, count, permutations, product
from statistics import mean, variance


def _text(value: float | F) -> str:
    return f"{float(value):g}"


def _only(options: dict[str, bool]) -> str:
    (letter,) = [key for key, holds in options.items() if holds]
    return letter


def _ice_left() -> str:
    ice, water = F(2), F(3)
    heat = water * F("4.2") * 20  # what the water gives until it is at 0 °C
    heat -= ice * F("2.1") * 10
    melted = heat / 334
    assert 0 < melted < ice  # so both are there in the end, at 0 °C
    return f"{float(ice - melted):.2f}"


def _rate_law() -> str:
    runs = [(F(1, 10), F(1, 10), 2), (F(1, 5), F(1, 5), 16), (F(1, 5), F(2, 5), 32)]
    found = []
    for a, b in product(range(-3, 5), repeat=2):
        constants = {rate / (p**a * q**b) for p, q, rate in runs}
        if len(constants) == 1:
            found.append(constants.pop() * F(3, 10) ** a * F(1, 10) ** b)
    (rate,) = found
    return _text(rate)


def _fan_tails() -> str:
    gametes = list(product("Ff", "Ss"))
    young = [(a[0] + b[0], a[1] + b[1]) for a, b in product(gametes, repeat=2)]
    hatched = [fish for fish in young if fish[0] != "FF"]
    return str(F(sum("F" in tail and stripe == "ss" for tail, stripe in hatched), len(hatched)))


def _activity_ratio() -> str:
    def activity(half_life: int) -> F:
        return F(1, 2) ** F(6, half_life) / half_life  # times ln 2 and the number at the start, for both

    return str(activity(2) / activity(6))


def _ph() -> str:
    acid, base = 30 * F("0.1"), 20 * F("0.2")
    hydroxide = (base - acid) / 100
    return _text(round(-math.log10(1e-14 / hydroxide), 9))


def _lens_places() -> str:
    places = [a for a in range(1, 90) if F(1, a) + F(1, 90 - a) == F(1, 20)]
    assert len(places) == 2
    return str(places[1] - places[0])


def _thermometer() -> str:
    (right,) = [t for t in range(-50, 200) if 2 + F(98 - 2, 100) * t == t]
    return str(right)


def _aluminum() -> str:
    oxide, metal = F(16, 160), F("8.1") / 27
    return _text((metal - 2 * oxide * F(3, 4)) * 27)


def _shaft() -> str:
    low, high = 0.0, 1000.0
    for _ in range(200):
        depth = (low + high) / 2
        if math.sqrt(2 * depth / 10) + depth / 320 < 4.25:
            low = depth
        else:
            high = depth
    return _text(round(low, 9))


def _seal() -> str:
    herring = 20_000 * F(60, 100) * F(1, 2) * F(1, 5) * F(1, 4) * F(1, 10)
    return _text(3_000_000 / herring / 10_000)


def _ripples() -> str:
    # exponents of kg, m, s
    s, d, w = (1, 0, -2), (1, -3, 0), (0, 1, 0)

    def unit(a: F, b: F, c: F) -> tuple[F, ...]:
        return tuple(a * x + b * y + c * z for x, y, z in zip(s, d, w, strict=True))

    h = F(1, 2)
    units = {"A": unit(h, h, -h), "B": unit(F(1), F(-1), F(-1)), "C": unit(-h, h, h), "D": unit(h, -h, -h)}
    return _only({letter: found == (0, 1, -1) for letter, found in units.items()})


def _babies() -> str:
    genes = {"O": {"OO"}, "A": {"AA", "AO"}, "B": {"BB", "BO"}, "AB": {"AB"}}
    type_of = {"".join(sorted(g)): name for name, all_of in genes.items() for g in all_of}

    def possible(one: str, other: str) -> set[str]:
        pairs = product(genes[one], genes[other])
        return {type_of["".join(sorted(x + y))] for g, h in pairs for x, y in product(g, h)}

    couples = [possible("O", "AB"), possible("A", "O"), possible("A", "B")]
    babies = {"Ruth": "O", "Sam": "A", "Tess": "AB"}
    fits = [p for p in permutations(babies) if all(babies[b] in c for b, c in zip(p, couples, strict=True))]
    (assignment,) = fits
    return assignment[1]


def _bottles() -> str:
    acid, carbonate, silver, barium = "HCl", "Na2CO3", "AgNO3", "BaCl2"
    rule = {frozenset((acid, carbonate)): "bubbles", frozenset((acid, barium)): "nothing"}
    seen = {"PQ": "bubbles", "PS": "nothing", "PR": "solid", "QR": "solid", "QS": "solid", "RS": "solid"}
    fits = []
    for order in permutations([acid, carbonate, silver, barium]):
        content = dict(zip("PQRS", order, strict=True))
        if all(rule.get(frozenset((content[x], content[y])), "solid") == what for (x, y), what in seen.items()):
            fits.append(content)
    (content,) = fits
    return next(bottle for bottle, what in content.items() if what == silver)


def _stars() -> str:
    distance = {"G": 1 / F("0.02"), "H": 1 / F("0.08")}
    emitted = {"G": distance["G"] ** 2 / F(1, 2), "H": distance["H"] ** 2}
    return _text(emitted["G"] / emitted["H"])


def _cube() -> str:
    weight = 6  # centimeters of water pushed aside before
    (deep,) = [F(x, 10) for x in range(101) if F(x, 10) + (10 - F(x, 10)) / 2 == weight]
    return _text(deep)


def _bulbs() -> str:
    resistance = {watts: F(120**2, watts) for watts in (60, 40)}
    current = 120 / sum(resistance.values())
    return _text(current**2 * resistance[40])


def _sprouting() -> str:
    trays = [(1, 1, 0, 0), (0, 1, 1, 1), (0, 0, 1, 0), (1, 1, 1, 1), (1, 0, 1, 1)]  # light, warm, scratched, sprouts
    rules: dict[str, Callable[[int, int, int], int]] = {
        "A": lambda light, warm, scratched: scratched and warm,
        "B": lambda light, warm, scratched: light,
        "C": lambda light, warm, scratched: scratched and (warm or light),
        "D": lambda light, warm, scratched: scratched and light,
    }
    return _only({letter: all(rule(*tray[:3]) == tray[3] for tray in trays) for letter, rule in rules.items()})


def _gene_map() -> str:
    known = {"km": 12, "mp": 5, "kp": 7, "mt": 4, "pt": 9, "kt": 16}

    def distance(x: str, y: str) -> int:
        return known.get(x + y) or known[y + x]

    fits = []
    for rest in permutations("mpt"):
        order = ("k", *rest)
        place = {"k": 0}
        for before, gene in zip(order, rest, strict=False):
            place[gene] = place[before] + distance(before, gene)
        if all(abs(place[x] - place[y]) == distance(x, y) for x, y in combinations(order, 2)):
            fits.append("".join(order))
    (order_text,) = fits
    return order_text


def _milk() -> str:
    used = F(30, 64)
    return _text((1 - used) * 64 / 2 ** F(25 - 5, 10))


def _colonies() -> str:
    per_ml = 46 / F("0.2")
    for water in (9, 4, 9):
        per_ml *= 1 + water
    return _text(per_ml)


def _tire() -> str:
    before, after = 200 + 100, 230 + 100
    return _text(F(after, before) * (7 + 273) - 273)


def _wall() -> str:
    brick, foam = F("0.2") / F("0.8"), F("0.05") / F("0.04")
    flow = F(20 - -10) / (brick + foam)
    inside, outside = 20 - flow * brick, -10 + flow * foam
    assert inside == outside
    return _text(inside)


def _chlorine() -> str:
    share = {35: F(3, 4), 37: F(1, 4)}
    return str(sum(share[a] * share[b] for a, b in product(share, repeat=2) if a + b == 72))


def _moons() -> str:
    outer = math.isqrt(4**3)  # days
    return str(1 / (F(1) - F(1, outer)))


def _jar() -> str:
    (hours,) = [h for h in range(25) if -12 * h + 4 * (24 - h) == 0]
    return str(hours)


def _glues() -> str:
    glues = [(52, 3), (58, 2), (61, 1), (66, 2)]
    return str(sum((a - b) ** 2 > 4 * (s**2 + t**2) for (a, s), (b, t) in combinations(glues, 2)))


def _pipe() -> str:
    found = set()
    for n, lowest in ((n, F(255, n)) for n in range(1, 100)):
        for step in (1, 2):  # 1: open at both ends, 2: closed at one
            tones = [lowest * k for k in range(1, 200, step)]
            if [t for t in tones if 255 <= t <= 425] == [255, 425] and lowest * n == 255:
                found.add(lowest)
    (lowest_tone,) = found
    return _text(lowest_tone)


def _rowboat() -> str:
    # positions away from the dock: the bow is at 0.5, the woman first 3 m behind where she stops
    before = F(1, 2)
    (after,) = [F(x, 100) for x in range(1000) if 120 * (F(x, 100) - before) + 60 * (F(x, 100) - before - 3) == 0]
    return _text(after)


Tree = str | tuple["Tree", "Tree"]


def _changes(tree: Tree, having: set[str]) -> int:
    """Fewest changes of one trait below an ancestor without it."""

    def cost(node: Tree) -> tuple[float, float]:  # if the node lacks, has the trait
        if isinstance(node, str):
            return (math.inf, 0) if node in having else (0, math.inf)
        below = [cost(child) for child in node]
        return (
            sum(min(lacks, has + 1) for lacks, has in below),
            sum(min(has, lacks + 1) for lacks, has in below),
        )

    lacks, has = cost(tree)
    return int(min(lacks, has + 1))


def _lizards() -> str:
    traits = [set("XY"), set("XY"), set("YZ"), set("WXY"), set("WXY"), set("Z")]
    trees: dict[str, Tree] = {
        "A": (("W", "X"), ("Y", "Z")),
        "B": ((("X", "Y"), "W"), "Z"),
        "C": ((("Y", "Z"), "X"), "W"),
        "D": ((("X", "Y"), "Z"), "W"),
    }
    total = {letter: sum(_changes(tree, having) for having in traits) for letter, tree in trees.items()}
    return _only({letter: n == min(total.values()) for letter, n in total.items()})


def _tubes() -> str:
    pairs = [pair for pair in product(("cool", "warm", "hot"), ("weak", "strong")) if pair != ("hot", "strong")]
    return str(len(list(product(pairs, range(4), range(3)))) + 2 * len(pairs))


def _carrier() -> str:
    q = F(1, 50)
    assert q**2 == F(1, 2500)
    return str(2 * (1 - q) * q / (1 - q**2))


def _dye() -> str:
    thinned = (F("0.6") - F("0.1")) / (500 * 2)
    return _text(thinned * 5 * 1000)


def _pendulum() -> str:
    data = [(F("0.21"), F("1.0")), (F("0.45"), F("1.4")), (F("0.96"), F("2.0"))]
    (radius,) = {(time / 2) ** 2 - measured for measured, time in data}
    return _text(radius * 100)


def _cultures() -> str:
    plates = {
        "A": [10, 12, 9, 11, 13, 10, 8, 12, 11, 14],
        "B": [11] * 10,
        "C": [0, 1, 0, 64, 3, 0, 37, 0, 5, 0],
        "D": [9, 13, 11, 7, 15, 12, 10, 8, 14, 11],
    }
    # chance on the plate gives a variance near the mean, early events a far larger one
    return _only({letter: variance(counts) > 5 * mean(counts) for letter, counts in plates.items()})


def _moon_at_sunset() -> str:
    # degrees by which the moon trails the sun across the sky; at sunset the sun is 90 degrees west of the meridian
    def west_of_meridian(trails: int) -> int:
        return 90 - trails

    thin, first_quarter, full = 20, 90, 180
    return _only(
        {
            "A": west_of_meridian(thin) == -90,  # rising
            "B": west_of_meridian(first_quarter) == 0,  # highest; the sun, hence the bright side, is to the west
            "C": west_of_meridian(full) == 0,
            "D": west_of_meridian(full) == 90,  # setting
        }
    )


def _gas() -> str:
    (split,) = [F(x, 100) for x in range(100) if (2 * F(x, 100)) ** 2 / (1 - F(x, 100)) == 2]
    return _text(1 - split + 2 * split)


def _ball() -> str:
    height = F(1)
    for bounce in count(1):
        height *= F(64, 100)
        if height < F(1, 4):  # speed goes with the square root of the height
            return str(bounce)
    raise AssertionError


def _crystals() -> str:
    salt, water = F("31.20") - 30, F("32.46") - F("31.20")
    return str((water / 18) / (salt / 120))


def _feeders() -> str:
    plans = {"A": "BBYY", "B": "BYBY", "C": "YYYY", "D": "BYYB"}

    def balanced(plan: str) -> bool:
        blue = [day for day, color in enumerate(plan, 1) if color == "B"]
        yellow = [day for day, color in enumerate(plan, 1) if color == "Y"]
        if len(blue) != 2:
            return False
        return plan[:2].count("B") == 1 and plan[2:].count("B") == 1 and mean(blue) == mean(yellow)

    return _only({letter: balanced(plan) for letter, plan in plans.items()})


def _river() -> str:
    (share,) = [F(x, 100) for x in range(101) if 10 + F(x, 100) * (70 - 10) == 25]
    return _text(14 - (8 + share * (20 - 8)))


def _color_blind_son() -> str:
    ines = ["x", "X"]  # x from her color-blind father; the other must be X, as she sees colors
    total = sum(F(1, 2) for from_ines in ines for from_carla in (from_ines, "X") if from_carla == "x") / len(ines)
    return str(total)


SOLUTIONS: dict[str, Callable[[], str]] = {
    "scientific-reasoning-001": _ice_left,
    "scientific-reasoning-002": _rate_law,
    "scientific-reasoning-004": lambda: _text(80 * F(3, 4) * F(120, 15)),
    "scientific-reasoning-005": _fan_tails,
    "scientific-reasoning-007": _activity_ratio,
    "scientific-reasoning-008": _ph,
    "scientific-reasoning-010": _lens_places,
    "scientific-reasoning-011": _thermometer,
    "scientific-reasoning-013": _aluminum,
    "scientific-reasoning-014": _shaft,
    "scientific-reasoning-015": _seal,
    "scientific-reasoning-016": _ripples,
    "scientific-reasoning-017": _babies,
    "scientific-reasoning-019": _bottles,
    "scientific-reasoning-020": _stars,
    "scientific-reasoning-021": _cube,
    "scientific-reasoning-022": _bulbs,
    "scientific-reasoning-023": lambda: _text((40 / F("0.8") / 5) / (4 / F("0.4") / 1)),
    "scientific-reasoning-024": _sprouting,
    "scientific-reasoning-025": _gene_map,
    "scientific-reasoning-027": _milk,
    "scientific-reasoning-028": _colonies,
    "scientific-reasoning-029": _tire,
    "scientific-reasoning-030": lambda: str(next(n for n in count(1) if F(1, 2) ** n < F(1, 100))),
    "scientific-reasoning-031": _wall,
    "scientific-reasoning-032": _chlorine,
    "scientific-reasoning-034": _moons,
    "scientific-reasoning-035": _jar,
    "scientific-reasoning-036": _glues,
    "scientific-reasoning-037": _pipe,
    "scientific-reasoning-038": _rowboat,
    "scientific-reasoning-039": _lizards,
    "scientific-reasoning-040": _tubes,
    "scientific-reasoning-041": _carrier,
    "scientific-reasoning-043": _dye,
    "scientific-reasoning-044": _pendulum,
    "scientific-reasoning-045": _cultures,
    "scientific-reasoning-046": _moon_at_sunset,
    "scientific-reasoning-047": _gas,
    "scientific-reasoning-049": _ball,
    "scientific-reasoning-051": _crystals,
    "scientific-reasoning-052": _feeders,
    "scientific-reasoning-053": _river,
    "scientific-reasoning-055": _color_blind_son,
}

SECOND: dict[str, str] = {
    "scientific-reasoning-006": "The patients were unblinded by the dry mouth, so only a comparison pill with the same "
    "side effect makes expectations equal; size, choice or more questions leave them unequal.",
    "scientific-reasoning-012": "The slowest of a single test speed up at the next one by regression to the mean and "
    "by practice, and only a randomly drawn half without gloves shares both.",
    "scientific-reasoning-050": "The treated fleas got alcohol as well as caffeine, so the two can be told apart only "
    "by fleas with the same alcohol and no caffeine.",
}

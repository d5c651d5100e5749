"""The answers of the causal reasoning tasks, found again by running the stated rules, with and without a change."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from fractions import Fraction
from itertools import combinations, permutations, product
from typing import TypeVar

SOLUTIONS: dict[str, Callable[[], str]] = {}
SECOND: dict[str, str] = {
    "causal-reasoning-040": "Only a lottery among the willing makes the two groups alike beforehand; the other "
    "findings would be the same if strong lungs made people join.",
}

T = TypeVar("T")


def solves(number: int) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def add(solution: Callable[[], object]) -> Callable[[], object]:
        SOLUTIONS[f"causal-reasoning-{number:03}"] = lambda: str(solution())
        return solution

    return add


def only(found: Iterable[T]) -> T:
    (single,) = found
    return single


def truths(n: int) -> Iterator[tuple[bool, ...]]:
    return product((True, False), repeat=n)


def subsets(things: Iterable[T]) -> Iterator[set[T]]:
    things = list(things)
    for size in range(len(things) + 1):
        yield from map(set, combinations(things, size))


@solves(1)
def toy_house():
    def motor(a=False, b=True, c=False, fuse=True):
        lamp = a and fuse
        bell = lamp or c
        return b and not bell

    assert motor()
    changes = {"A": dict(a=True), "B": dict(fuse=False), "C": dict(a=True, fuse=False), "D": dict(a=False)}
    return only(letter for letter, change in changes.items() if not motor(**change))


@solves(2)
def seedlings():
    def survive(ida, main_open):
        wet = ida
        if not wet and main_open:
            wet = True
        return wet

    depends = {day: survive(True, main) and not survive(False, main) for day, main in [("Tue", True), ("Wed", False)]}
    return {(True, True): "A", (True, False): "B", (False, True): "C", (False, False): "D"}[tuple(depends.values())]


@solves(3)
def dominoes():
    fallen, falling = set(), [1]
    while falling:
        n = falling.pop()
        if 1 <= n <= 12 and n != 7 and n not in fallen:
            fallen.add(n)
            falling += [n + 2] + [n - 1] * (n % 3 == 0)
    return 12 - len(fallen)


@solves(4)
def dark_ward():
    def light(works):
        generator = "generator" in works and "pump" in works
        return ("X" in works and ("transformer" in works or generator)) or ("Y" in works and generator)

    parts = {"transformer", "generator", "pump", "X", "Y"}
    return sum(not light(parts - set(pair)) for pair in combinations(parts, 2))


@solves(6)
def rash():
    meals = {"abd": True, "acd": False, "bcd": True, "abc": False}
    rules = [set(rule) for n in (1, 2) for rule in combinations("abcd", n)]
    rule = only(r for r in rules if all((r <= set(meal)) == ill for meal, ill in meals.items()))
    return {"b": "A", "d": "B", "ab": "C", "bd": "D"}["".join(sorted(rule))]


@solves(7)
def umbrella_seller():
    days = ["rain"] * 3 + ["dry, seller"] * 2 + ["dry"] * 5
    croaks = [True for _ in days]  # the recordings; the seller's rule has no frogs in it
    return sum(day != "dry" for day, _ in zip(days, croaks, strict=True))


@solves(8)
def two_therapies():
    healed = {"A": (Fraction(18, 20), Fraction(24, 80)), "B": (Fraction(64, 80), Fraction(4, 20))}
    mixed = {therapy: (mild + severe) / 2 for therapy, (mild, severe) in healed.items()}
    return 100 * (mixed["A"] - mixed["B"])


@solves(9)
def cistern():
    possible = []
    for floats, drains, sirens in truths(3):  # what is intact; the water stands at the brim, above the mark
        pump, drain_open = not floats, drains
        if pump and not drain_open and not (drain_open and sirens):
            possible.append((floats, drains, sirens))
    broken = [all(not case[k] for case in possible) for k in range(3)]
    maybe_intact = [any(case[k] for case in possible) for k in range(3)]
    claims = {
        "A": broken == [False, True, False],
        "B": broken[0] and broken[1] and maybe_intact[2],
        "C": all(broken),
        "D": broken[1] and broken[2] and maybe_intact[0],
    }
    return only(letter for letter, holds in claims.items() if holds)


def signs(influences: Mapping[str, Mapping[str, int]], start: str, end: str) -> set[int]:
    """The signs of all paths from `start` to `end`."""
    if start == end:
        return {1}
    found = set()
    for there, sign in influences.get(start, {}).items():
        found |= {sign * rest for rest in signs(influences, there, end)}
    return found


@solves(11)
def owls_and_beetles():
    influences = {
        "owls": {"voles": -1, "bats": -1},
        "voles": {"seedlings": -1},
        "seedlings": {"beetles": 1},
        "bats": {"beetles": -1},
    }
    return {(1,): "A", (-1,): "B", (-1, 1): "C", (): "D"}[tuple(sorted(signs(influences, "owls", "beetles")))]


@solves(12)
def hall_with_oven():
    def settle(oven):
        hall = 20.0
        for _ in range(2000):
            heater = max(0.0, (20 - 17) - oven + 50 * (20 - hall))
            hall += 0.01 * (heater + oven - (hall - 17))
        return hall, heater

    (before, heater_before), (after, heater_after) = settle(0), settle(5)
    assert round(before, 6) == 20
    drop = round(heater_before - heater_after, 3)
    return {(20.0, 5.0): "A", (20.0, 3.0): "B", (22.0, 3.0): "C", (25.0, 3.0): "D"}[round(after, 3), drop]


@solves(13)
def attic_fire():
    conditions = {
        "A": lambda short, paper, lightning, down: short,
        "B": lambda short, paper, lightning, down: lightning and down,
        "C": lambda short, paper, lightning, down: paper or down,
        "D": lambda short, paper, lightning, down: short or lightning,
    }
    found = []
    for letter, condition in conditions.items():
        cases = [(condition(*c), (c[0] and c[1]) or (c[2] and c[3])) for c in truths(4)]
        enough = all(fire for holds, fire in cases if holds)
        needed = all(holds for holds, fire in cases if fire)
        if enough and not needed:
            found.append(letter)
    return only(found)


@solves(14)
def cooperative_votes():
    votes = {"Ada": 3, "Ben": 2, "Cyd": 2, "Dov": 1}
    cast = {"Ada", "Ben", "Cyd"}

    def passes(yes):
        return sum(votes[name] for name in yes) >= 5

    return only(name for name in votes if passes(cast ^ {name}) != passes(cast))


@solves(15)
def office_rumor():
    tells = {"Mia": ["Ned", "Olga"], "Ned": ["Pia"], "Olga": ["Ned", "Quin"], "Pia": ["Olga"], "Quin": ["Mia"]}
    found = []
    for source in tells:
        heard = {source: 1}  # day 1 is Monday
        for day in (2, 3):
            for teller in [name for name in heard if heard[name] == day - 1]:
                for listener in tells[teller]:
                    heard.setdefault(listener, day)
        if len(heard) == 4 and heard.get("Olga") == 3:
            found.append(source)
    return only(found)


@solves(17)
def box_with_levers():
    rules = [lambda s: sum(s) >= 1, lambda s: sum(s) % 2 == 1, lambda s: s[0], lambda s: sum(s) >= 2]
    left = [rule for rule in rules if rule((True, False, False)) and rule((True, True, False))]
    assert len(left) == 2
    tests = {"A": (True, True, True), "B": (True, False, True), "C": (False, False, False), "D": (False, False, True)}
    return only(letter for letter, test in tests.items() if len({bool(rule(test)) for rule in left}) == len(left))


@solves(18)
def spring_and_fountain():
    def runs(valves):
        pipes = [("spring", "X"), ("spring", "Y"), ("X", "Y"), ("X", "fountain"), ("Y", "fountain")]
        usable = [pipe for pipe, is_open in zip(pipes, valves, strict=True) if is_open]
        wet = {"spring"}
        for _ in pipes:
            wet |= {place for pipe in usable if wet & set(pipe) for place in pipe}
        return "fountain" in wet

    return sum(runs(v) and not runs((*v[:2], False, *v[3:])) for v in truths(5))


@solves(19)
def three_powders():
    def end(order):
        clear, warm = True, False
        for powder in order:
            if powder == "green" and clear:
                warm = True
            elif powder == "blue" and not warm:
                clear = False
            elif powder == "red":
                clear, warm = True, False
        return clear, warm

    orders = list(permutations(["green", "blue", "red"]))
    return sum(end(order) != end([powder for powder in order if powder != "blue"]) for order in orders)


@solves(20)
def delayed_train():
    def ferry(arrival):
        tram = min(t for t in (585, 600, 615) if t >= arrival + 4)
        ready = tram + 10 + 7
        return -(-ready // 30) * 30

    return ferry(9 * 60 + 52) - ferry(9 * 60 + 40)


@solves(22)
def bell_trigger():
    log = {"A": ("door", 2), "B": ("dust", 3), "C": ("spider", 4), "D": ("window", 6)}

    def fan_off(minute):
        return 1 <= minute < 4

    return only(
        letter
        for letter, (what, minute) in log.items()
        if 2 <= 7 - minute <= 4 and (what != "dust" or not fan_off(minute))
    )


@solves(23)
def alarm_nights():
    nights = ["both"] * 2 + ["burglar"] * 8 + ["storm"] * 58 + ["quiet"] * 232
    assert len(nights) == 300
    heard = [night for night in nights if night != "quiet" and night in ("both", "storm")]
    return Fraction(sum(night in ("both", "burglar") for night in heard), len(heard))


@solves(24)
def crashing_commits():
    rules = {
        "A": lambda c: {3, 5} <= c,
        "B": lambda c: 5 in c,
        "C": lambda c: {3, 5} <= c or not {3, 4} & c,
        "D": lambda c: 3 in c or 4 not in c,
    }
    runs = [({3, 4, 5}, True), ({4, 5}, False), ({3, 4}, False), ({3, 5}, True), ({5}, True)]
    return only(letter for letter, rule in rules.items() if all(rule(commits) == crash for commits, crash in runs))


@solves(25)
def tonic():
    fractions = set()
    for always, helped, harmed in product(range(11), repeat=3):  # tenths of the people, by what they would do
        never = 10 - always - helped - harmed
        if never >= 0 and harmed == 0 and always + helped == 8 and always + harmed == 5:
            fractions.add(Fraction(helped, always + helped))
    return only(fractions)


@solves(26)
def lasers_on_a_thread():
    return sum(sum({1, 2, 3, 4} - off) < 5 for off in subsets([1, 2, 3, 4]) if off)


@solves(28)
def three_stations():
    def loaves(times, minutes):
        free = [0, 0, 0]
        packed = 0
        while True:
            ready = 0
            for k, time in enumerate(times):
                ready = free[k] = max(ready, free[k]) + time
            if ready > minutes:
                return packed
            packed += 1

    def rate(times):  # between two late moments, when the line has long settled
        return loaves(times, 84_000 + 4200) - loaves(times, 84_000)

    assert (rate((4, 3, 5)) - rate((4, 7, 5))) % 10 == 0
    return (rate((4, 3, 5)) - rate((4, 7, 5))) // 10


@solves(29)
def six_cars():
    def minutes(north, south, shortcut):
        bridge, tunnel = 2 * (north + shortcut), 2 * (south + shortcut)
        return {"north": bridge + 15, "south": 15 + tunnel, "shortcut": bridge + tunnel}

    def settled(ways):
        """Trip times in every state in which no driver gains by changing alone."""
        found = set()
        for counts in product(range(7), repeat=len(ways)):
            cars = {"north": 0, "south": 0, "shortcut": 0} | dict(zip(ways, counts, strict=True))
            if sum(counts) != 6:
                continue
            now = minutes(**cars)
            moves = [(a, b) for a in ways for b in ways if a != b and cars[a]]
            changed = {(a, b): minutes(**(cars | {a: cars[a] - 1, b: cars[b] + 1}))[b] for a, b in moves}
            if all(changed[a, b] >= now[a] for a, b in moves):
                found.add(tuple(sorted({now[way] for way in ways if cars[way]})))
        return only(only(found))

    return settled(["north", "south", "shortcut"]) - settled(["north", "south"])


@solves(30)
def whole_effect_of_training():
    arrows = [("skill", "training"), ("skill", "output"), ("training", "confidence"), ("confidence", "output")]
    arrows += [("output", "promotion"), ("skill", "promotion")]

    def below(thing):
        return {thing}.union(*(below(b) for a, b in arrows if a == thing))

    def paths(path):
        if path[-1] == "output":
            yield path
            return
        for a, b in arrows:
            for here, there in ((a, b), (b, a)):
                if here == path[-1] and there not in path:
                    yield from paths([*path, there])

    def open_path(path, held):
        for before, here, after in zip(path, path[1:], path[2:], strict=False):
            collider = (before, here) in arrows and (after, here) in arrows
            if collider != bool(held & (below(here) if collider else {here})):
                return False
        return True

    def sound(held):
        if held & (below("training") - {"training"}):  # holding what training changes removes or bends its effect
            return False
        back = [path for path in paths(["training"]) if (path[1], "training") in arrows]
        return not any(open_path(path, held) for path in back)

    options = {"A": {"confidence"}, "B": {"skill"}, "C": {"promotion"}, "D": {"skill", "confidence"}}
    return only(letter for letter, held in options.items() if sound(held))


@solves(31)
def turnstile():
    events = ["Al coin", "Bo push", "Cy coin", "Di coin", "Ed push", "Flo coin", "Gus push", "Hal coin", "Ivy push"]

    def through(events):
        coins, passed = 0, []
        for name, what in (event.split() for event in events):
            if what == "coin":
                coins = min(2, coins + 1)
            elif coins == 2:
                passed.append(name)
                coins = 0
        return passed

    assert through(events) == ["Ed", "Ivy"]
    return sum(through([e for e in events if e != coin]) != through(events) for coin in events if "coin" in coin)


@solves(33)
def whispering_children():
    possible = []
    for opposite in truths(5):

        def announced(first, opposite=opposite):
            return sum(opposite[first - 1 :]) % 2 == 0  # "yes" stays "yes"

        if sum(opposite) == 3 and opposite[3] != opposite[4] and not announced(2) and announced(3):
            possible.append(opposite)
    return only(child for child in range(1, 6) if not any(opposite[child - 1] for opposite in possible))


@solves(34)
def foxes_and_bumblebees():
    influences = {
        "foxes": {"mice": -1, "badgers": -1},
        "mice": {"bumblebees": -1},
        "badgers": {"wasps": -1},
        "wasps": {"bumblebees": -1},
    }
    fewer_foxes = {-sign for sign in signs(influences, "foxes", "bumblebees")}
    return {(1,): "A", (-1,): "B", (): "C", (-1, 1): "D"}[tuple(sorted(fewer_foxes))]


@solves(35)
def hemp_and_flax():
    whole = {"hemp": 100, "flax": 100}
    for kind, torn in [("hemp", 40), ("flax", 10), ("hemp", 6), ("flax", 9)]:
        whole[kind] -= torn
    return whole["flax"] - whole["hemp"]


@solves(36)
def pills_and_diet():
    def pressure(pills, diet):
        appetite = 2 * pills
        weight = 0 if diet else Fraction(1, 2) * appetite
        return -6 * pills + 3 * weight

    return pressure(2, diet=False) - pressure(2, diet=True)


@solves(37)
def broken_wire():
    def lamps(broken):
        a, b, c, d = (wire != broken for wire in "abcd")
        return a and b, b and c and d, c and (a or d)

    return only(wire for wire in "abcd" if lamps(wire) == (True, False, True))


@solves(39)
def fish_pond():
    sunny, pump = {3, 6, 8}, {4, 9}
    return only(day for day in (1, 4, 6, 7) if day + 2 in sunny and day + 3 not in pump)


@solves(41)
def canal_lock():
    def leaves(arrivals):
        free, left = 0, {}
        for boat, arrival in sorted(arrivals.items(), key=lambda item: item[1]):
            free = left[boat] = max(free, arrival) + 20
        return left

    arrivals = {"Anna": 0, "Berta": 5, "Clara": 12, "Dora": 50}
    with_anna = leaves(arrivals)
    without = leaves({boat: time for boat, time in arrivals.items() if boat != "Anna"})
    return sum(with_anna[boat] - without[boat] for boat in without)


@solves(42)
def glowing_cell():
    def glows(**forced):
        d = forced.get("d", False)
        c = forced.get("c", not d)
        b = forced.get("b", c or d)
        return forced.get("a", not b)

    assert not glows()
    options = {"A": dict(d=False), "B": dict(d=True), "C": dict(c=True), "D": dict(c=False)}
    return only(letter for letter, forced in options.items() if glows(**forced))


@solves(43)
def four_buttons():
    tests = {"red blue": True, "yellow blue": True, "blue": False, "red green": False, "yellow green": False}
    duds = set()
    for kinds in product(["activator", "blocker", "dud"], repeat=4):
        kind = dict(zip(["red", "blue", "green", "yellow"], kinds, strict=True))

        def held(test, kind=kind):
            return {kind[color] for color in test.split()}

        if all(("activator" in held(t) and "blocker" not in held(t)) == sound for t, sound in tests.items()):
            duds.add(tuple(color for color in kind if kind[color] == "dud"))
    return only(only(duds))


@solves(45)
def overloaded_bridge():
    vehicles = {"truck": (0, 6), "van": (2, 3), "bus": (5, 5), "tractor": (8, 4)}

    def collapses(without=None):
        for minute in range(60):
            load = sum(t for name, (on, t) in vehicles.items() if name != without and on <= minute < on + 15)
            if load > 10:
                return minute
        return None

    assert collapses() == 5
    spared = tuple(name for name in vehicles if collapses(name) is None)
    return {("truck",): "A", ("bus",): "B", ("truck", "bus"): "C", (): "D"}[spared]


@solves(46)
def pressed_lamp():
    def left_on(without=None):
        on = False
        for name in ["Ana", "Ben", "Cleo"]:
            presses = {"Ana": 3, "Ben": 1 if on else 2, "Cleo": 0 if on else 1}[name]
            if name != without and presses % 2:
                on = not on
        return on

    return only(name for name in ["Ana", "Ben", "Cleo"] if left_on(name) != left_on())


@solves(47)
def camp_admission():
    admitted = [(athletic, musical) for athletic, musical in truths(2) if athletic or musical]  # 25 of each

    def share(group):
        return Fraction(100 * sum(musical for _, musical in group), len(group))

    return share([p for p in admitted if not p[0]]) - share([p for p in admitted if p[0]])


@solves(49)
def forked_marbles():
    def bins(marbles):
        found, forks = {}, [0, 0]
        for marble in marbles:
            forks[0] += 1
            if forks[0] % 2 == 0:
                found[marble] = "C"
            else:
                forks[1] += 1
                found[marble] = "A" if forks[1] % 2 else "B"
        return found

    then, now = bins(range(1, 10)), bins([m for m in range(1, 10) if m != 3])
    return sum(then[m] != now[m] for m in now)


@solves(50)
def switch_lamp_and_fan():
    diagrams = {
        "A": [("switch", "lamp"), ("lamp", "fan")],
        "B": [("switch", "fan"), ("fan", "lamp")],
        "C": [("switch", "lamp"), ("switch", "fan")],
        "D": [("fan", "switch"), ("switch", "lamp")],
    }

    def close_switch(arrows, blocked=None):
        on = {"switch"}
        for _ in range(3):
            on |= {b for a, b in arrows if a in on and b != blocked}
        return on - {"switch"}

    findings = {None: {"lamp", "fan"}, "lamp": set(), "fan": {"lamp"}}
    return only(
        letter
        for letter, arrows in diagrams.items()
        if all(close_switch(arrows, blocked) == on for blocked, on in findings.items())
    )


@solves(51)
def reservoir():
    def breaks(day_off):  # 1 is Monday
        level, day = 1, 0
        while True:
            day += 1
            level += 3
            if level > 8:
                return day
            if level >= 6 and (day - 1) % 7 + 1 != day_off:
                level -= 4

    return breaks(7) - breaks(3)


@solves(53)
def responsible_voter():
    votes = [True] * 9 + [False] * 2

    def adopted(votes):
        return sum(votes) >= 6

    for k in range(11):
        for others in combinations(range(1, 11), k):
            changed = [vote != (n in others) for n, vote in enumerate(votes)]
            if adopted(changed) and not adopted([False, *changed[1:]]):
                return Fraction(1, k + 1)
    raise AssertionError("no vote ever counts")


@solves(54)
def six_meetings():
    meetings = ["Ann Bob", "Cay Dan", "Bob Cay", "Eve Ann", "Dan Fay", "Cay Eve"]
    found = []
    for first in ["Ann", "Bob", "Cay", "Dan", "Eve", "Fay"]:
        ill = {first}
        for pair in meetings:
            if ill & set(pair.split()):
                ill |= set(pair.split())
        if {"Ann", "Cay"} <= ill and "Bob" not in ill:
            found.append(first)
    return only(found)

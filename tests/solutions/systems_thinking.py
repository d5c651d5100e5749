"""Answers of the systems-thinking tasks, simulated or computed anew from what their prompts state."""

from __future__ import annotations

import heapq
from collections.abc import Callable
from fractions import Fraction as F
from itertools import count, pairwise, permutations

import numpy as np


def _text(value: float | F) -> str:
    return f"{float(value):g}"


def _lake() -> str:
    def level(capacity: float) -> F:
        held = F(500)
        for inflow in (240, 60, 60):
            after = held + inflow - held / 5
            held = after if after < capacity else F(capacity)
        return held

    return _text(level(1e9) - level(600))


def _bakery() -> str:
    mixer = F(40, 30) * 60

    def good(ovens: int) -> F:
        return min(mixer, ovens * F(60, 45 + 5) * 60) * F(95, 100)

    return _text(good(2) - good(1))


def _standing() -> str:
    def stand(thresholds: list[int]) -> int:
        up: set[int] = set()
        while new := {i for i, t in enumerate(thresholds) if i not in up and len(up) >= t}:
            up |= new
        return len(up)

    return str(stand([0, 1, 2, 3, 4, 4, 5, 6, 7, 8, 9]) - stand([0, 1, 2, 4, 4, 4, 5, 6, 7, 8, 9]))


def _wholesaler() -> str:
    shop = wholesaler = 20
    orders = []
    for _ in range(2):
        sold = 12
        shop -= sold
        shop_order = 2 * sold - shop
        wholesaler -= shop_order
        shop += shop_order
        orders.append(2 * shop_order - wholesaler)
        wholesaler += orders[-1]
    return str(orders[1])


def _pond_loops() -> str:
    sign = {
        ("mud", "light"): -1,
        ("light", "plants"): 1,
        ("plants", "mud"): -1,
        ("plants", "fleas"): 1,
        ("fleas", "algae"): -1,
        ("algae", "light"): -1,
        ("plants", "fry"): 1,
        ("fry", "fleas"): -1,
    }
    nodes = sorted({n for link in sign for n in link})
    reinforcing = 0

    def walk(start: str, here: str, seen: set[str], product: int) -> None:
        nonlocal reinforcing
        for (a, b), s in sign.items():
            if a == here and b == start:
                reinforcing += product * s > 0
            elif a == here and b > start and b not in seen:  # each loop only from its first name
                walk(start, b, seen | {b}, product * s)

    for node in nodes:
        walk(node, node, {node}, 1)
    return str(reinforcing)


def _beds() -> str:
    def occupied(long_stay: int) -> F:
        return 6 * (F(7, 10) * 2 + F(3, 10) * long_stay)

    (days,) = [d for d in range(1, 11) if occupied(d) == 21]
    return str(days)


def _tunnel() -> str:
    def times(north: int, south: int, both: int) -> tuple[int, int, int]:
        first, second = north + both, south + both
        return first + 70, 70 + second, first + second

    def settled(tunnel: bool) -> int:
        found = set()
        for north in range(61):
            for south in range(61 - north):
                use = (north, south, 60 - north - south)
                if use[2] and not tunnel:
                    continue
                now, stable = times(*use), True
                for i in range(3):
                    for j in range(3 if tunnel else 2):
                        if i != j and use[i]:
                            then = list(use)
                            then[i] -= 1
                            then[j] += 1
                            stable &= times(*then)[j] >= now[i]
                if stable:
                    found |= {t for t, n in zip(now, use, strict=True) if n}
        (minutes,) = found
        return minutes

    return str(settled(True) - settled(False))


def _tablets() -> str:
    body = F(0)
    for _ in range(200):
        body = body / 3 + 90
    return _text(round(body / 3 / 3 + 90, 6))


def _beetles() -> str:
    larvae, adults = F(160), F(0)
    for _ in range(4):
        larvae, adults = 4 * adults, adults / 2 + larvae / 4
    return _text(adults)


def _bottles() -> str:
    def bought(returned: F) -> F:
        return 9000 - 9000 * returned * F(9, 10)

    return _text(bought(F(8, 10)) - bought(F(9, 10)))


def _ferry() -> str:
    def waiting(capacity: int) -> F:
        line, hours = 0, F(0)
        for cars in (10, 16, 18, 12, 8, 6):
            line = max(0, line + cars - capacity)
            hours += F(line, 2)
        assert line == 0
        return hours

    return _text(waiting(12) - waiting(14))


def _pasture() -> str:
    best = max(range(51), key=lambda n: n * (30 - n) - 6 * n)

    def herd(fee: int) -> int:
        n = 0
        while n < 50 and 30 - (n + 1) > 6 + fee:
            n += 1
        return n

    (fee,) = [fee for fee in range(31) if herd(fee) == best]
    return str(fee)


def _carbon() -> str:
    air, ocean = 980.0, 1000.0
    for _ in range(2000):
        up, down = 0.08 * ocean, 0.10 * air
        air, ocean = air + up - down, ocean + down - up
    return _text(round(air - 800, 6))


def _boats() -> str:
    scrape, lift, paint = {"A": 3, "B": 1, "C": 2}, {"A": 2, "B": 3, "C": 2}, {"A": 4, "B": 2, "C": 6}

    def finished(order: tuple[str, ...]) -> int:
        crane = last = 0
        for boat in order:
            crane = max(crane, scrape[boat]) + lift[boat]
            last = max(last, crane + paint[boat])
        return last

    return str(min(finished(order) for order in permutations("ABC")))


def _cables() -> str:
    total = 0
    for first in (strengths := {20, 24, 31, 46, 95}):
        intact = strengths - {first}
        while intact and (gone := {s for s in intact if F(90, len(intact)) > s}):
            intact -= gone
        total += len(intact)
    return str(total)


def _bugs() -> str:
    def features(repair_first: bool) -> F:
        bugs, done = F(20), F(0)
        for week in range(4):
            free = 100 - bugs
            if week == 0 and repair_first:
                bugs -= min(bugs, free / 4)
            else:
                done += free / 10
                bugs += 5 * free / 10
        return done

    return _text(features(True) - features(False))


def _banks() -> str:
    owes = {"P": {"Q": 6, "R": 4}, "Q": {"S": 5, "T": 1}, "R": {"S": 4, "Q": 3}, "S": {"T": 4}, "T": {}}
    capital = {"Q": 8, "R": 3, "S": 10, "T": 4}
    failed = {"P"}
    while new := {
        bank for bank, own in capital.items() if bank not in failed and sum(owes[f].get(bank, 0) for f in failed) > own
    }:
        failed |= new
    return str(len(failed))


def _hut() -> str:
    readings = [18, 18]  # hours -1 and 0
    for _ in range(12):
        readings.append(readings[-1] + (3 if readings[-2] < 20 else -2))
    return str(max(readings) - min(readings))


def _vaccine() -> str:
    def needed(infects: int) -> F:
        (percent,) = {F(x, 100) for x in range(10001) if infects * (10 * 10_000 - 8 * x) == 10 * 10_000}
        return percent

    return _text(needed(5) - needed(4))


def _battery() -> str:
    def dark(capacity: int) -> bool:
        held = 4
        for sun in (9, 12, 3, 2, 10):
            for change in (sun - 3, -4):
                held = min(capacity, held + change)
                if held < 0:
                    return True
        return False

    assert dark(10)
    # all amounts are whole, so the smallest capacity is
    return str(next(c for c in count(4) if not dark(c)))


def _pumps() -> str:
    users, new = 6.0, []
    for _ in range(24):
        new.append(users * (60 - users) / 60)
        users += new[-1]
    return str(1 + new.index(max(new)))


def _moves() -> str:
    moves, vacant = 0.0, 40.0
    while vacant > 1e-12:
        moves += vacant
        vacant *= 3 / 4
    return _text(round(moves, 6))


def _fishery() -> str:
    stock = F(1000)
    for year in count(1):
        if stock < 250:
            return str(year)
        stock = (stock - 250) * F(12, 10)
    raise AssertionError


def _desks() -> str:
    need = [6, 1, 5, 1, 4, 1]

    def waited(joint: bool) -> int:
        free, total = [0, 0], 0
        for arrival, minutes in enumerate(need):
            desk = free.index(min(free)) if joint else arrival % 2
            start = max(arrival, free[desk])
            total += start - arrival
            free[desk] = start + minutes
        return total

    return str(waited(False) - waited(True))


def _fuel() -> str:
    per_km = 1 - F(25, 100)
    driven = 1 + F(4, 100) * F(25, 10)
    return _text(100 * (1 - per_km * driven))


def _trade() -> str:
    measures = {"A": (22.4, 0.25, 10, 2), "B": (20, 0.15, 10, 2), "C": (20, 0.25, 11.5, 2), "D": (20, 0.25, 10, 1)}

    def working(started: float, dropout: float, years: float, training: int) -> float:
        people, pipeline = 0.0, [0.0] * training
        for _ in range(1000):
            pipeline.append(started * (1 - dropout))
            people += pipeline.pop(0) - people / years
        return people

    result = {letter: working(*values) for letter, values in measures.items()}
    return max(result, key=result.__getitem__)


def _museum() -> str:
    inside = np.cumsum(np.array([90, 120, 100, 60, 40, 10]) - np.array([10, 50, 80, 90, 100, 90]))
    return str(inside.max() - 150)


def _customs() -> str:
    lanes, longest = [0, 0], 0
    for truck in range(30):
        start = max(4 * truck, heapq.heappop(lanes))
        heapq.heappush(lanes, start + 10)
        longest = max(longest, start - 4 * truck)
    return str(longest)


def _barrel() -> str:
    level, levels = F(0), [F(0)]
    for tick in range(2000):  # hundredths of a minute, inflow taken at their middle
        inflow = 12 - F(12, 20) * (F(tick) + F(1, 2)) / 100
        level += (inflow - 6) / 100
        levels.append(level)
    peak = levels.index(max(levels)) / 100
    options = {
        "A": peak == 0,
        "B": all(later < earlier for earlier, later in pairwise(levels)),
        "C": peak == 10 and levels[-1] == levels[0],
        "D": peak == 20,
    }
    (letter,) = [key for key, holds in options.items() if holds]
    return letter


def _port() -> str:
    waiting = evenings = 0
    for ships in (5, 5, 9, 5, 5, 4, 4, 3, 3, 3, 3, 3):
        waiting += ships
        waiting -= min(waiting, 5 if waiting <= 8 else 4)
        evenings += waiting > 0
    return str(evenings)


def _forest() -> str:
    young, old = 1200.0, 0.0
    for _ in range(1000):
        aged, fallen = young / 10, old / 5
        young, old = young - aged + fallen, old + aged - fallen
    return _text(round(old, 6))


SOLUTIONS: dict[str, Callable[[], str]] = {
    "systems-thinking-001": _lake,
    "systems-thinking-003": _bakery,
    "systems-thinking-004": _standing,
    "systems-thinking-006": _wholesaler,
    "systems-thinking-007": _pond_loops,
    "systems-thinking-009": _beds,
    "systems-thinking-010": _tunnel,
    "systems-thinking-012": _tablets,
    "systems-thinking-013": _beetles,
    "systems-thinking-014": _bottles,
    "systems-thinking-016": _ferry,
    "systems-thinking-017": _pasture,
    "systems-thinking-019": _carbon,
    "systems-thinking-020": _boats,
    "systems-thinking-021": _cables,
    "systems-thinking-022": _bugs,
    "systems-thinking-023": _banks,
    "systems-thinking-025": _hut,
    "systems-thinking-027": _vaccine,
    "systems-thinking-029": _battery,
    "systems-thinking-030": _pumps,
    "systems-thinking-032": _moves,
    "systems-thinking-033": _fishery,
    "systems-thinking-034": _desks,
    "systems-thinking-035": _fuel,
    "systems-thinking-036": _trade,
    "systems-thinking-037": _museum,
    "systems-thinking-048": _customs,
    "systems-thinking-051": _barrel,
    "systems-thinking-052": _port,
    "systems-thinking-054": _forest,
}

SECOND: dict[str, str] = {}

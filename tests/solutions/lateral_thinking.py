"""Answers of the lateral-thinking tasks, enumerated or computed anew from what their prompts state."""

from __future__ import annotations

import random
from collections.abc import Callable
from datetime import date, datetime, timedelta
from fractions import Fraction as F
from itertools import pairwise, permutations, product

ONES = "one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen".split()
ONES += "seventeen eighteen nineteen".split()
TENS = dict(zip(range(20, 100, 10), "twenty thirty forty fifty sixty seventy eighty ninety".split(), strict=True))


def _in_words(number: int) -> str:
    if number < 20:
        return ONES[number - 1]
    ten, one = number - number % 10, number % 10
    return TENS[ten] + ("-" + ONES[one - 1] if one else "")


def _letters(text: str) -> int:
    return sum(letter.isalpha() for letter in text)


def _only(options: dict[str, bool]) -> str:
    (letter,) = [key for key, holds in options.items() if holds]
    return letter


def _plate() -> str:
    turned = str.maketrans("0689", "0986")
    plates = [66, 67, 89, 69]
    found = []
    for i, plate in enumerate(plates):
        if set(str(plate)) <= set("0689"):
            true = [*plates[:i], int(str(plate).translate(turned)[::-1]), *plates[i + 1 :]]
            if all(b - a == 1 for a, b in pairwise(true)):
                found.append(true[i])
    (room,) = found
    return str(room)


def _sheets() -> str:
    sheets = [{page, page + 1} for page in range(1, 400, 2)]  # odd pages are on the right, backed by the next even one
    return str(sum(bool(sheet & {37, 38, 112, 113}) for sheet in sheets))


def _ship() -> str:
    noon = datetime(2023, 7, 2, 12)  # a Sunday, ship's time

    def next_noon(zone: int, zone_after: int) -> int:
        """Weekday at noon on board a day after the first noon."""
        universal = noon - timedelta(hours=zone) + timedelta(hours=24)
        return (universal + timedelta(hours=zone_after)).weekday()

    sunday = noon.weekday()
    same = {"A": next_noon(-12, 12) == sunday, "B": next_noon(12, -12) == sunday, "C": next_noon(12, 12) == sunday}
    return _only({**same, "D": not any(same.values())})


def _lockers() -> str:
    order = sorted(range(1, 16), key=_in_words)
    assert order[:9] == [8, 11, 15, 5, 4, 14, 9, 1, 7]
    return str(order[9])


def _swimmer() -> str:
    race = ["a", "b", "c", "Ida", "d", "e", "f", "g"]
    third = race[2]
    race.remove("Ida")
    race.insert(race.index(third), "Ida")
    at = race.index("Ida")
    passing = race[at + 1 : at + 3]
    rest = [name for name in race if name not in passing]
    at = rest.index("Ida")
    race = rest[:at] + passing + rest[at:]
    return str(race[1:].index("Ida") + 1)


def _sawing() -> str:
    def pieces(cuts: int, ring: bool) -> int:
        return max(cuts, 1) if ring else cuts + 1

    (ring_cuts,) = [cuts for cuts in range(1, 20) if pieces(cuts, True) == 4]
    (beam_cuts,) = [cuts for cuts in range(1, 20) if pieces(cuts, False) == 6]
    return str(F(8, ring_cuts) * beam_cuts)


def _mirror() -> str:
    def hands(minutes: int) -> tuple[F, F]:
        return F(minutes, 2) % 360, F(minutes * 6) % 360

    seen = hands(8 * 60 + 50)
    (true,) = [t for t in range(720) if tuple((360 - angle) % 360 for angle in hands(t)) == seen]
    return str(3 * 60 + 45 - true)


def _glass_door() -> str:
    symmetric = set("AHIMOTUVWXY")
    words = {"A": "NOON", "B": "LEVEL", "C": "TOOT", "D": "MAMMA"}
    return _only({letter: set(word) <= symmetric and word == word[::-1] for letter, word in words.items()})


def _table() -> str:
    for people in range(1, 6):
        # each has her mother among those seated before her, or none at the table
        for mothers in product(*[[None, *range(i)] for i in range(people)]):
            of = [m for m in mothers if m is not None]
            grandmothers = {mothers[m] for m in of if mothers[m] is not None}
            granddaughters = [i for i, m in enumerate(mothers) if m is not None and mothers[m] is not None]
            sisters = [i for i, m in enumerate(mothers) if m is not None and of.count(m) > 1]
            if [len(grandmothers), len(set(of)), len(of), len(granddaughters), len(sisters)] == [1, 2, 3, 2, 2]:
                return str(people)
    raise AssertionError


def _matches() -> str:
    found = set()
    for seed in range(100):
        draw = random.Random(seed)
        losses, played = dict.fromkeys(range(20), 0), 0
        while len(inside := [p for p in losses if losses[p] < 2]) > 1:
            losses[draw.choice(draw.sample(inside, 2))] += 1
            played += 1
            if all(losses.values()):
                break  # the winner has lost, unlike in the task
        else:
            if losses[inside[0]] == 0:
                found.add(played)
    (matches,) = found
    return str(matches)


def _flashes() -> str:
    pace = F(15, 6 - 1)
    return str([pace * i for i in range(11)][-1])


def _bridge_rows() -> str:
    def row(number: int) -> list[int]:
        numbers = [number]
        while (after := _letters(_in_words(numbers[-1]))) != numbers[-1]:
            numbers.append(after)
        return numbers

    assert row(23) == [23, 11, 6, 3, 5, 4]
    assert row(40) == [40, 5, 4]
    return str(row(70)[1])


def _caption() -> str:
    caption = ["Amos", "Bela", "Caro", "Dov"]
    return dict(zip(caption[::-1], caption, strict=True))["Caro"]


def _bell() -> str:
    rings, time = set(), 0
    for pause in (10, 0, 10, 10, 0, 10):  # the last one only ends the morning
        rings |= {time, time + 45}
        time += 45 + pause
    return str(len(rings))


def _chess() -> str:
    right = {"corner": "light", "pieces": "light", "queen": "left"}

    def swap(*keys: str) -> dict[str, str]:
        other = {"light": "dark", "dark": "light", "left": "right"}
        return {key: other[value] if key in keys else value for key, value in right.items()}

    prints = {
        "A": swap("corner", "queen"),  # mirrored: the near left corner is dark
        "B": swap("corner", "pieces"),
        "C": swap("pieces", "queen"),  # from behind Black his queen is to the right of her king, the corner is light
        "D": swap("corner"),
    }
    return _only({letter: made == {**right, "corner": "dark"} for letter, made in prints.items()})


def _floors() -> str:
    labels = [n for n in range(1, 100) if "4" not in str(n) and n != 13]
    return str(labels.index(20) - labels.index(1))


def _nurse() -> str:
    # hours after midnight in universal time; Vienna is one hour ahead in winter, two in summer
    spring = (24 + 6 - 2) - (22 - 1)
    autumn = (24 + 6 - 1) - (22 - 2)
    return str(abs(spring - autumn))


def _diaries() -> str:
    # in Rome 4 October 1582 was followed by 15 October, and leap years since then are Gregorian
    gap = (date(1582, 10, 5), date(1582, 10, 14))

    def took_place(year: int, month: int, day: int) -> bool:
        try:
            return not gap[0] <= date(year, month, day) <= gap[1]
        except ValueError:
            return False

    dates = {"A": (1600, 2, 29), "B": (1611, 4, 30), "C": (1599, 12, 31), "D": (1582, 10, 10)}
    return _only({letter: not took_place(*when) for letter, when in dates.items()})


def _chairs() -> str:
    def possible(n: int) -> bool:
        before = {i: i - 1 if i else None for i in range(n)}
        for row in permutations(range(n)):
            if any(friend == chair for chair, friend in enumerate(row)):
                continue
            for seen in (row, row[::-1]):  # from left to right, facing the stage or the wall
                if all((seen[k - 1] if k else None) == before[friend] for k, friend in enumerate(seen)):
                    return True
        return False

    return str(sum(possible(n) for n in range(2, 8)))


def _inscriptions() -> str:
    words = {"A": "nineteen", "B": "eighteen", "C": "seventeen", "D": "twenty"}
    value = {_in_words(n): n for n in range(1, 30)}
    return _only({letter: _letters(word + " letters long") == value[word] for letter, word in words.items()})


SOLUTIONS: dict[str, Callable[[], str]] = {
    "lateral-thinking-001": _plate,
    "lateral-thinking-003": _sheets,
    "lateral-thinking-005": _ship,
    "lateral-thinking-007": _lockers,
    "lateral-thinking-009": _swimmer,
    "lateral-thinking-011": _sawing,
    "lateral-thinking-012": _mirror,
    "lateral-thinking-014": _glass_door,
    "lateral-thinking-016": _table,
    "lateral-thinking-018": _matches,
    "lateral-thinking-020": _flashes,
    "lateral-thinking-022": _bridge_rows,
    "lateral-thinking-024": _caption,
    "lateral-thinking-026": _bell,
    "lateral-thinking-027": _chess,
    "lateral-thinking-029": _floors,
    "lateral-thinking-031": _nurse,
    "lateral-thinking-048": _diaries,
    "lateral-thinking-053": _chairs,
    "lateral-thinking-055": _inscriptions,
}

SECOND: dict[str, str] = {
    "lateral-thinking-036": "Lima lies on a west coast, where the sun rises over land, while the sea is west of Lisbon "
    "and east of Rio, and south of the tropic of Capricorn the midday sun is always in the north.",
    "lateral-thinking-037": "Only a play explains the applauding witnesses, the missing charge and the nightly "
    "repetition at once; a glazier or a payer explains no applause, and a sleeper no friendship with witnesses.",
}

"""The answers of the verbal logic tasks, each found again by trying all cases: liars, orders, small worlds, letters."""

from __future__ import annotations

from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator
from itertools import combinations, pairwise, permutations, product
from string import ascii_lowercase
from typing import TypeVar

SOLUTIONS: dict[str, Callable[[], str]] = {}
SECOND: dict[str, str] = {
    "verbal-logic-023": "A drought is a lack of rain as a famine is a lack of food; hunger follows from it, "
    "poverty may cause it and a desert is a place, so none of these is what is lacking.",
}

T = TypeVar("T")
DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
VOWELS = "aeiou"
CONSONANTS = "".join(letter for letter in ascii_lowercase if letter not in VOWELS)
NUMBERS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
).split()


def solves(number: int) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def add(solution: Callable[[], object]) -> Callable[[], object]:
        SOLUTIONS[f"verbal-logic-{number:03}"] = lambda: str(solution())
        return solution

    return add


def only(found: Iterable[T]) -> T:
    (single,) = found
    return single


def truths(n: int) -> Iterator[tuple[bool, ...]]:
    return product((True, False), repeat=n)


def worlds(n: int) -> Iterator[list[tuple[bool, ...]]]:
    """All small worlds of individuals with `n` properties: which kinds there are, up to four and at least one."""
    kinds = list(truths(n))
    for size in range(1, 5):
        yield from map(list, combinations(kinds, size))


def follows(premises: Callable, options: dict[str, Callable], n: int) -> str:
    """The one option that holds in every world in which the premises hold."""
    possible = [world for world in worlds(n) if premises(world)]
    assert possible
    return only(letter for letter, option in options.items() if all(map(option, possible)))


@solves(1)
def gardeners():
    found = set()
    for r, s, t, u in truths(4):
        liars = [r, s, t, u].count(False)
        if (r, s, t, u) == (liars == 1, r == t, not s, liars >= 2):
            found.add(liars)
    return only(found)


@solves(2)
def four_drawers():
    found = []
    for place in ["oak", "pine", "elm", "ash"]:
        oak = place in ("pine", "elm")
        if [oak, place != "ash", not oak, place in ("oak", "ash")].count(False) == 1:
            found.append(place)
    return only(found)


@solves(3)
def early_glaziers():
    def premises(world):
        return (
            all(early for glazier, early, _, _ in world if glazier)
            and any(early and cycles for _, early, cycles, _ in world)
            and not any(cycles and car for _, _, cycles, car in world)
            and any(glazier for glazier, *_ in world)
        )

    options = {
        "A": lambda world: any(e and not car for _, e, _, car in world),
        "B": lambda world: not any(g and car for g, _, _, car in world),
        "C": lambda world: any(g and not car for g, _, _, car in world),
        "D": lambda world: any(g and c for g, _, c, _ in world),
    }
    return follows(premises, options, 4)


@solves(4)
def broken_rule():
    same = set("ABCD")
    for late in truths(2):
        for helped in product(truths(2), repeat=2):  # helped[volunteer][guest]
            people = list(zip(late, helped, strict=True))
            broken = not all(any(h) for was_late, h in people if was_late)
            claims = {
                "A": not any(any(h) for was_late, h in people if was_late),
                "B": any(was_late and not any(h) for was_late, h in people),
                "C": any(not was_late and not any(h) for was_late, h in people),
                "D": any(was_late and not all(h) for was_late, h in people),
            }
            same -= {letter for letter, claim in claims.items() if claim != broken}
    return only(same)


@solves(5)
def mrs_falk():
    found = set()
    for ina, jori in product(["older", "younger"], repeat=2):  # fathers
        if ina == jori or jori == "younger":  # the younger son is the brother of Jori's father, so not he himself
            continue
        parent = {"Ina": ina, "Jori": jori, "Pia": "Jori", "older": "Mrs. Falk", "younger": "Mrs. Falk"}

        def siblings(a, b, parent=parent):
            return a != b and parent.get(a, a) == parent.get(b, b)

        def cousins(a, b, parent=parent, siblings=siblings):
            mothers_or_fathers = parent.get(a), parent.get(b)
            return all(one in parent for one in mothers_or_fathers) and siblings(*mothers_or_fathers)

        grandparent = parent[parent["Pia"]]
        relations = {
            "A": siblings("Ina", parent["Pia"]),
            "B": cousins("Ina", parent["Pia"]),
            "C": siblings("Ina", grandparent),
            "D": cousins("Ina", grandparent),
        }
        found |= {letter for letter, holds in relations.items() if holds}
    return only(found)


@solves(7)
def line_that_counts_itself():
    line = "In this line the letter e turns up exactly {} times"
    return only(word for n, word in enumerate(NUMBERS) if line.format(word).lower().count("e") == n)


@solves(8)
def backward_code():
    def code(word):
        return "".join(
            VOWELS[(VOWELS.index(c) + 1) % 5] if c in VOWELS else CONSONANTS[CONSONANTS.index(c) - 1] for c in word
        )[::-1]

    back = {code(letter): letter for letter in ascii_lowercase}
    word = "".join(back[letter] for letter in "mqismek")[::-1]
    assert code(word) == "mqismek"
    return word


@solves(9)
def word_ladder():
    words = {"bale", "ball", "bell", "belt", "bolt", "male", "mall", "malt", "mile", "mill", "mine", "tale", "tall"}
    words |= {"tell", "till"}
    moves, queue = {"mint": 0}, deque(["mint"])
    while queue:
        here = queue.popleft()
        for there in words - moves.keys():
            if sum(a != b for a, b in zip(here, there, strict=True)) == 1:
                moves[there] = moves[here] + 1
                queue.append(there)
    return moves["bolt"]


@solves(10)
def tolu():
    examples = {
        "lumi vek dar": ("boy", "calls", "goat"),
        "sor dar vek": ("goat", "follows", "boy"),
        "lumi tiko dar": ("boy", "calls", "hen"),
    }
    found = set()
    meanings = ["boy", "goat", "hen", "calls", "follows"]
    for order in permutations(range(3)):
        for words in permutations(["lumi", "vek", "dar", "sor", "tiko"]):
            word = dict(zip(meanings, words, strict=True))

            def say(parts, word=word, order=order):
                return " ".join(word[parts[k]] for k in order)

            if all(say(parts) == sentence for sentence, parts in examples.items()):
                found.add(say(("hen", "follows", "boy")))
    return only(found)


@solves(11)
def chess_clock():
    found = []
    for thief in ["Anka", "Bo", "Cid", "Dina"]:
        bo = thief not in ("Anka", "Bo")
        if [thief in ("Bo", "Cid"), bo, not bo, thief != "Cid"].count(True) == 3:
            found.append(thief)
    return only(found)


@solves(12)
def lying_days():
    lies = {"Tess": {1, 3, 5}, "Otto": {5, 6, 0}}
    found = []
    for day in range(7):
        statements = [(name, (day - 1) % 7 in lies[name]) for name in lies]
        statements.append(("Otto", (day + 1) % 7 not in lies["Tess"]))
        if all(true == (day not in lies[name]) for name, true in statements):
            found.append(DAYS[day])
    return only(found)


@solves(13)
def five_cousins():
    found = []
    for order in permutations(["Wim", "Vera", "Xen", "Yara", "Zoe"]):  # the oldest first
        at = order.index
        if at("Wim") < at("Vera") < min(at("Zoe"), at("Yara")):
            if abs(at("Xen") - at("Yara")) == 3 and at("Xen") != 0:
                found.append(order[2])
    return only(found)


@solves(14)
def place_of_notes():
    return sorted("".join(letters) for letters in permutations("stone")).index("notes") + 1


@solves(16)
def loan_slips():
    dots, places = ["red", "green", "none"], ["home", "here"]

    def broken(dot, place):
        return (dot == "red" and place == "home") or (dot == "none" and place == "here")

    must = [dot for dot in dots if any(broken(dot, place) for place in places)]
    must += [place for place in places if any(broken(dot, place) for dot in dots)]
    return len(must)


@solves(17)
def names_and_trades():
    names = ["cook", "fisher", "mason", "piper"]
    found = []
    for trades in permutations(names):
        trade = dict(zip(names, trades, strict=True))
        mason = only(name for name in names if trade[name] == "mason")
        if all(trade[name] != name for name in names) and mason == trade["piper"] and mason != "fisher":
            found.append(trade["mason"])
    return only(found)


@solves(18)
def half_true_race():
    def fits(order):
        place = {name: k + 1 for k, name in enumerate(order)}
        claims = [
            (place["Uma"] == 2, place["Vito"] == 3),
            (place["Vito"] == 4, place["Willa"] == 2),
            (place["Xeno"] == 2, place["Willa"] == 1),
            (place["Vito"] == 4, place["Xeno"] == 1),
        ]
        return all(first != second for first, second in claims)

    return only(filter(fits, permutations(["Uma", "Vito", "Willa", "Xeno"])))[2]


@solves(19)
def sorted_number_words():
    words = sorted(NUMBERS[1:])
    return only(word for place, word in enumerate(words, 1) if NUMBERS[place] == word)


@solves(20)
def blackboard():
    def fits(s):
        return s == (not s[1], sum(s) == 2, s[3] == s[4], s[0], sum(s) < 3)

    return sum(number for number, true in enumerate(only(filter(fits, truths(5))), 1) if true)


@solves(21)
def hidden_body_parts():
    parts = (
        "ankle arm back beard belly bone brain breast brow calf cheek chest chin ear elbow eye face finger fist foot "
        "gum hair hand head heart heel hip jaw kidney knee leg limb lip liver lung mouth nail navel neck nerve nose "
        "palm rib scalp shin skin skull sole spine stomach thigh throat thumb toe tongue tooth torso vein waist wrist"
    ).split()
    words = {"A": "pharmacy", "B": "magnet", "C": "machinery", "D": "delegate", "E": "tribune"}
    return only(letter for letter, word in words.items() if not any(part in word for part in parts))


@solves(22)
def cut_masterpiece():
    pairs = {"A": "camper tires", "B": "create prism", "C": "scrape times", "D": "steam pierce"}
    wanted = Counter("masterpiece")
    return only(letter for letter, pair in pairs.items() if Counter(pair.replace(" ", "")) == wanted)


@solves(24)
def deposits():
    def returned(damaged=False, reported=False, key_lost=False, owes=0, is_owed=0):
        due = not ((damaged and not reported) or key_lost)
        return due and (owes == 0 or is_owed > owes)

    tenants = {
        "A": returned(key_lost=True, reported=True),
        "B": returned(damaged=True),
        "C": returned(damaged=True, reported=True, owes=50, is_owed=80),
        "D": returned(owes=40, is_owed=40),
    }
    return only(letter for letter, back in tenants.items() if back)


@solves(25)
def chain_of_words():
    def fits(chain):
        return all(a[-1] == b[0] for a, b in pairwise(chain)) and chain[-1] not in ("rabbit", "robin", "tiger")

    return only(filter(fits, permutations(["lamp", "nest", "pear", "rabbit", "robin", "tiger"])))[3]


@solves(27)
def broken_or_lit():
    def said(world):
        return not any(broken and lit for broken, lit in world)

    sentences = [
        lambda world: all(not broken for broken, lit in world if lit),
        lambda world: all(lit for broken, lit in world if not broken),
        lambda world: not any(lit for broken, lit in world if broken),
        lambda world: all(not lit or not broken for broken, lit in world),
        lambda world: all(lit or broken for broken, lit in world),
    ]
    return sum(all(sentence(world) == said(world) for world in worlds(2)) for sentence in sentences)


@solves(28)
def mina_and_noor():
    pairs = set(permutations(range(1, 6), 2))

    def open_to(who, card, pairs):
        return {a > b for a, b in pairs if (a, b)[who] == card}

    pairs = {p for p in pairs if len(open_to(0, p[0], pairs)) == 2}
    pairs = {p for p in pairs if len(open_to(1, p[1], pairs)) == 2}
    pairs = {p for p in pairs if open_to(0, p[0], pairs) == {False}}
    return only({mina for mina, _ in pairs})


@solves(29)
def three_notes():
    notes = ["bring your red lantern home at nine", "our piano needs a leg", "wait for me at noon"]
    habits = [lambda n: "s" not in n, lambda n: set(VOWELS) <= set(n), lambda n: "d" not in n]
    writers = only(
        order
        for order in permutations(range(3))
        if all(habits[writer](note) for writer, note in zip(order, notes, strict=True))
    )
    return ["Ada", "Bert", "Cleo"][writers[1]]


@solves(30)
def twins():
    def sentences(me, twin):  # True: truthful
        return {"A": not twin, "B": me or twin, "C": not me and not twin, "D": twin == (not me)}

    by_either = [sentences(me, not me) for me in (True, False)]
    return only(letter for letter in "ABCD" if by_either[0][letter] and not by_either[1][letter])


@solves(31)
def dwarf_at_the_fork():
    questions = {
        "A": lambda honest, left: left == honest,  # what the dwarf would say
        "B": lambda honest, left: left,
        "C": lambda honest, left: not honest and left,
        "D": lambda honest, left: honest,
    }
    useful = []
    for letter, fact in questions.items():
        answers = {left: {fact(honest, left) == honest for honest in (True, False)} for left in (True, False)}
        if not answers[True] & answers[False]:
            useful.append(letter)
    return only(useful)


@solves(32)
def street_music():
    against = -1
    ban = against
    lifting = -ban
    opposing = -lifting
    refusing_to_oppose = -opposing
    mayor = -refusing_to_oppose
    failing_to_support = -lifting
    deputy = -failing_to_support
    return {(1, 1): "A", (-1, -1): "B", (1, -1): "C", (-1, 1): "D"}[mayor, deputy]


@solves(33)
def alternating_robot():
    found = []
    for pip, quill, rusk in permutations(["truth", "lie", "alternate"]):
        said = [
            (pip, (quill == "lie", pip != "alternate")),
            (quill, (rusk == "truth", pip == "alternate")),
            (rusk, (quill != "lie", pip == "truth")),
        ]
        fits = {
            "truth": lambda first, second: first and second,
            "lie": lambda first, second: not first and not second,
            "alternate": lambda first, second: first != second,
        }
        if all(fits[kind](*claims) for kind, claims in said):
            found.append(["Pip", "Quill", "Rusk"][[pip, quill, rusk].index("alternate")])
    return only(found)


@solves(35)
def days_around():
    today = only(day for day in range(7) if DAYS[(day + 2 - 4) % 7] == "Friday")
    return DAYS[(today - 2 + 3) % 7]


@solves(36)
def word_club():
    rules = [
        lambda w: w[0] == w[-1],
        lambda w: any(a == b for a, b in pairwise(w)),
        lambda w: len(set(w) & set(VOWELS)) == 2,
        lambda w: len(w) == 6,
    ]
    rule = only(r for r in rules if r("rubber") and not r("pepper") and not r("level"))
    options = {"A": "lemon", "B": "kayak", "C": "banana", "D": "street"}
    return only(letter for letter, word in options.items() if rule(word))


@solves(37)
def word_square():
    words = {"AWE", "NET", "OWE", "PET", "TAP", "TON"}
    centers = set()
    for rows in permutations(words, 3):
        if {"".join(column) for column in zip(*rows, strict=True)} == words - set(rows):
            centers.add(rows[1][1])
    return only(centers)


@solves(38)
def choir():
    return only(sum(s) for s in truths(7) if all(s[k - 1] == (sum(s) <= k) for k in range(1, 8)))


@solves(39)
def vault():
    situations = {"A": (True, {"cook"}), "B": (False, set()), "C": (True, {"cook", "porter"})}
    situations["D"] = (False, {"cook", "porter"})
    return only(letter for letter, (siren, inside) in situations.items() if not siren and inside - {"porter"})


@solves(40)
def blicks_and_florns():
    def premises(world):  # everything in the world is a florn: green, striped, with a tail
        return (
            all(green != striped for green, striped, _ in world)
            and not any(striped and tail for _, striped, tail in world)
            and any(green and not tail for green, _, tail in world)
        )

    options = {
        "A": lambda world: all(striped for _, striped, tail in world if not tail),
        "B": lambda world: all(tail for green, _, tail in world if green),
        "C": lambda world: all(not tail for _, striped, tail in world if striped),
        "D": lambda world: any(green and tail for green, _, tail in world),
    }
    return follows(premises, options, 3)


@solves(42)
def two_line_ups():
    names = ["Bruno", "Elias", "Mira", "Oskar", "Tina"]
    backward = sorted(names, key=lambda name: name.lower()[::-1])
    return only(a for a, b in zip(sorted(names), backward, strict=True) if a == b)


@solves(43)
def sentences_about_themselves():
    d = "This sentence is made of exactly seven words."
    b = "The letter n is in this line exactly six times."
    c = "Exactly forty letters are used to write this sentence."
    a = "In this sentence the letter t occurs eight times."
    true = [
        a.lower().count("t") == 8,
        b.lower().count("n") == 6,
        sum(x.isalpha() for x in c) == 40,
        len(d.split()) == 7,
    ]
    return "ABCD"[only(k for k in range(4) if true[k])]


@solves(44)
def three_spies():
    words = "brace brave crane crate crave grape grate trace".split()

    def agree(a, b):
        return sum(x == y for x, y in zip(a, b, strict=True))

    def reports(w):
        return [agree(w, "crate") == 3, agree(w, "brace") == 4, agree(w, "crave") == 4]

    return only(word for word in words if reports(word).count(False) == 1)


@solves(45)
def starters_and_mains():
    found = []
    for orders in product(product(["soup", "salad"], ["fish", "stew"]), repeat=3):
        iris, joel, kit = orders
        if (
            all(starter == "salad" for starter, main in orders if main == "fish")
            and [starter for starter, _ in orders].count("soup") == 2
            and (joel[1] != "stew" or kit[1] == "fish")
            and iris[1] != joel[1]
        ):
            found.append(joel)
    options = {"A": ("soup", "fish"), "B": ("soup", "stew"), "C": ("salad", "fish"), "D": ("salad", "stew")}
    return only(letter for letter, order in options.items() if order == only(found))


@solves(46)
def park_gate():
    def may_be_in_rose_garden(gardener, dog, dark):
        allowed = True
        if dog:
            allowed = False  # line 2 over line 1
        if dog == "guide":
            allowed = True
        if dark and not gardener:  # line 4 as line 5 limits it
            allowed = False
        return allowed

    people = {
        "A": (True, "pet", False),
        "B": (False, "guide", True),
        "C": (False, None, True),
        "D": (True, "guide", True),
    }
    return only(letter for letter, person in people.items() if may_be_in_rose_garden(*person))


@solves(47)
def swimmers_and_dancers():
    sure = set("ABCD")
    for both, swim, dance, neither in product(range(6), repeat=4):
        members = both + swim + dance + neither
        if 2 * (both + swim) > members and 2 * (both + dance) > members:
            claims = {"A": neither > 0, "B": both > 0, "C": both > swim, "D": 2 * both > members}
            sure -= {letter for letter, claim in claims.items() if not claim}
    return only(sure)


@solves(49)
def pairs_about_lamps():
    pairs = {
        "A": (all, lambda lamps: not all(lamps)),
        "B": (any, lambda lamps: not all(lamps)),
        "C": (all, lambda lamps: not any(lamps)),
        "D": (lambda lamps: not all(lamps), any),
    }
    found = []
    for letter, (first, second) in pairs.items():
        cases = {(first(lamps), second(lamps)) for lamps in truths(3)}
        if (True, True) not in cases and (False, False) in cases:
            found.append(letter)
    return only(found)


@solves(50)
def parcel():
    found = set()
    for ali, bea, cal, arrived in truths(4):

        def would_say(who, fact):
            return who == fact

        if (
            [ali, bea, cal].count(False) == 2
            and ali == would_say(bea, cal)
            and bea == would_say(cal, arrived)
            and cal == (not ali or not bea)
        ):
            found.add((ali, bea, cal, arrived))
    ali, bea, cal, arrived = only(found)
    options = {"A": cal and arrived, "B": bea and not arrived, "C": ali and arrived, "D": cal and not arrived}
    return only(letter for letter, holds in options.items() if holds)


@solves(51)
def five_talks():
    def fits(order):
        iva, jon, kaya, lena, milo = (order.index(name) for name in ["Iva", "Jon", "Kaya", "Lena", "Milo"])
        return (
            (iva > jon or kaya == 4)
            and (kaya != 4 or lena == 0)
            and (lena != 0 or jon == 2)
            and milo == lena + 1
            and abs(jon - iva) == 3
        )

    return only(filter(fits, permutations(["Iva", "Jon", "Kaya", "Lena", "Milo"])))[2]


@solves(53)
def letter_by_letter():
    clues = [
        ("tiger bear", "beetle"),
        ("finch hind", "hen"),
        ("dove vole", "hoe deer"),
        ("whale eagle", "koala"),
        ("horse otter", "goose"),
    ]
    return "".join(
        only(c for c in ascii_lowercase if all(c in word for word in yes.split()) and c not in no) for yes, no in clues
    )


@solves(54)
def buttons():
    def prime(n):
        return n > 1 and all(n % k for k in range(2, n))

    def guesses(n):
        return [n % 2 == 0, n >= 10, prime(n), n % 3 == 0 and n < 18]

    return only(n for n in range(1000) if guesses(n).count(False) == 1)


@solves(55)
def four_shops():
    found = []
    for baker, butcher, fishmonger, greengrocer in truths(4):
        if (
            [baker, butcher, fishmonger, greengrocer].count(True) == 2
            and not (baker and butcher)
            and (butcher or fishmonger)
            and (not fishmonger or baker)
            and (not greengrocer or baker)
        ):
            found.append((baker, butcher, fishmonger, greengrocer))
    baker, butcher, fishmonger, greengrocer = only(found)
    options = {"A": baker and greengrocer, "B": baker and fishmonger}
    options |= {"C": butcher and greengrocer, "D": butcher and fishmonger}
    return only(letter for letter, holds in options.items() if holds)

"""The answers of the spatial reasoning tasks, each found again by walking, folding, turning or trying all cases."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable
from fractions import Fraction
from itertools import combinations, permutations, product
from typing import TypeVar

SOLUTIONS: dict[str, Callable[[], str]] = {}
SECOND: dict[str, str] = {}

T = TypeVar("T")
Cell = tuple[int, int]
Vector = tuple[int, int, int]

STEPS = {"north": (0, 1), "east": (1, 0), "south": (0, -1), "west": (-1, 0)}
COMPASS = ["north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"]


def solves(number: int) -> Callable[[Callable[[], object]], Callable[[], object]]:
    def add(solution: Callable[[], object]) -> Callable[[], object]:
        SOLUTIONS[f"spatial-reasoning-{number:03}"] = lambda: str(solution())
        return solution

    return add


def only(found: Iterable[T]) -> T:
    (single,) = found
    return single


def right(step: Cell) -> Cell:
    return step[1], -step[0]


def left(step: Cell) -> Cell:
    return -step[1], step[0]


def ahead(place: Cell, step: Cell, n: int = 1) -> Cell:
    return place[0] + n * step[0], place[1] + n * step[1]


def distances(start: T, neighbors: Callable[[T], Iterable[T]]) -> dict[T, int]:
    """Fewest steps from `start` to everything in reach."""
    found, queue = {start: 0}, deque([start])
    while queue:
        here = queue.popleft()
        for there in neighbors(here):
            if there not in found:
                found[there] = found[here] + 1
                queue.append(there)
    return found


def cross(a: Vector, b: Vector) -> Vector:
    return a[1] * b[2] - a[2] * b[1], a[2] * b[0] - a[0] * b[2], a[0] * b[1] - a[1] * b[0]


def minus(a: Vector) -> Vector:
    return -a[0], -a[1], -a[2]


def folded(squares: set[Cell]) -> dict[Cell, Vector]:
    """Outward normals of the squares (x to the right, y up) of a net after folding backward along shared edges."""
    start = min(squares)
    frames: dict[Cell, tuple[Vector, Vector, Vector]] = {start: ((0, 0, 1), (0, 1, 0), (1, 0, 0))}
    queue = deque([start])
    while queue:
        x, y = queue.popleft()
        normal, up, east = frames[x, y]
        for there, frame in {
            (x + 1, y): (east, up, minus(normal)),
            (x - 1, y): (minus(east), up, normal),
            (x, y + 1): (up, minus(normal), east),
            (x, y - 1): (minus(up), normal, east),
        }.items():
            if there in squares and there not in frames:
                frames[there] = frame
                queue.append(there)
    return {square: frame[0] for square, frame in frames.items()}


@solves(1)
def delivery_cart():
    place, facing = (0, 0), STEPS["north"]
    place = ahead(place, facing, 4)
    facing = right(facing)
    place = ahead(place, facing, 7)
    facing = right(facing)
    place = ahead(ahead(place, facing, 6), facing, -3)
    facing = left(facing)
    place = ahead(place, facing, 2)
    root = math.dist(place, (12, 5))
    assert root == int(root)
    return int(root)


@solves(2)
def tipped_die():
    top, toward, east, bottom, away, west = 1, 2, 3, 6, 5, 4
    for tip in ["away", "right", "right", "toward", "toward"]:
        if tip == "away":
            top, away, bottom, toward = toward, top, away, bottom
        elif tip == "toward":
            top, toward, bottom, away = away, top, toward, bottom
        else:
            top, east, bottom, west = west, top, east, bottom
        assert top + bottom == toward + away == east + west == 7
    return top


@solves(3)
def spice_jars():
    def fits(row):
        at = row.index
        return (
            abs(at("cumin") - at("dill")) == 3
            and abs(at("ginger") - at("cumin")) == 1
            and at("mace") - at("ginger") == 1
            and at("nutmeg") not in (0, 5)
            and at("fennel") < at("dill")
        )

    return only(filter(fits, permutations(["cumin", "dill", "fennel", "ginger", "mace", "nutmeg"])))[2]


def campfire_hand(seat: int, hand: str) -> int:
    """The neighboring seat (of six, in any order around) that lies on one hand of somebody facing the middle."""
    places = [(math.cos(math.pi * k / 3), math.sin(math.pi * k / 3)) for k in range(6)]
    x, y = places[seat]
    toward_hand = (-y, x) if hand == "right" else (y, -x)  # the look (-x, -y), turned
    neighbors = [(seat + 1) % 6, (seat - 1) % 6]
    return max(neighbors, key=lambda k: (places[k][0] - x) * toward_hand[0] + (places[k][1] - y) * toward_hand[1])


@solves(4)
def scouts_around_a_fire():
    found = []
    for seats in permutations(range(1, 6)):
        at = dict(zip(["Abel", "Cyr", "Dot", "Emil", "Fay"], seats, strict=True)) | {"Bea": 0}

        def beside(a, b, at=at):
            return (at[a] - at[b]) % 6 in (1, 5)

        if at["Emil"] == 3 and campfire_hand(0, "right") == at["Abel"]:
            if not beside("Cyr", "Emil") and not beside("Fay", "Abel"):
                found.append(next(n for n in at if at[n] == campfire_hand(at["Dot"], "right")))
    return only(found)


@solves(5)
def folded_and_punched_sheet():
    n = 32
    removed = set()
    for x, y in product(range(n), repeat=2):  # y counts from the top
        u = x if x >= n // 2 else n - 1 - x  # the left half lies on the right one
        v = y if y >= n // 2 else n - 1 - y  # then the top half on the bottom one
        u, v = u - n // 2, v - n // 2
        if u + v < 3 or (u - 7.5) ** 2 + (v - 7.5) ** 2 < 5:
            removed.add((x, y))
    openings, counted = 0, set()
    for cell in removed:
        if cell not in counted:
            piece = distances(cell, lambda c: [p for s in STEPS.values() if (p := ahead(c, s)) in removed]).keys()
            openings += not any(x in (0, n - 1) or y in (0, n - 1) for x, y in piece)
            counted |= piece
    return openings


@solves(6)
def barbers_mirror():
    def mirrored(hours, minutes):  # the true time whose hands, mirrored, show the given one
        hour_hand, minute_hand = (hours * 30 + minutes / 2) % 360, minutes * 6
        return only(
            60 * h + m
            for h, m in product(range(12), range(60))
            if (h * 30 + m / 2 + hour_hand) % 360 == 0 and (6 * m + minute_hand) % 360 == 0
        )

    minutes = (5 * 60 + 25 - mirrored(7, 20)) % 720
    assert minutes < 180
    return minutes


@solves(7)
def waxed_cheese():
    counts = [(x in (0, 3)) + (y in (0, 4)) + (z == 2) for x, y, z in product(range(4), range(5), range(3))]
    return counts.count(2)


@solves(8)
def routes_to_school():
    routes = 0
    for norths in combinations(range(7), 3):
        place, seen = (0, 0), set()
        for step in range(7):
            place = ahead(place, STEPS["north" if step in norths else "east"])
            seen.add(place)
        routes += (2, 1) not in seen and (3, 2) in seen
    return routes


@solves(10)
def two_outlines():
    sizes = [
        sum(heights)
        for heights in product(range(4), repeat=9)
        if max(heights[0::3]) == 2
        and max(heights[1::3]) == 1
        and max(heights[2::3]) == 3
        and [max(heights[k : k + 3]) for k in (0, 3, 6)] == [1, 3, 2]
    ]
    return max(sizes) - min(sizes)


@solves(11)
def laser_and_mirrors():
    board = ["/.\\.", "../\\", "././", "\\./."]
    row, column, down, across = 1, 0, 0, 1
    while 0 <= row < 4 and 0 <= column < 4:
        if board[row][column] == "/":
            down, across = -across, -down
        elif board[row][column] == "\\":
            down, across = across, down
        row, column = row + down, column + across
    if row in (-1, 4):
        return f"{'top' if row < 0 else 'bottom'} {column + 1}"
    return f"{'left' if column < 0 else 'right'} {row + 1}"


@solves(12)
def knight_routes():
    routes = [(0, 0)]
    for _ in range(4):
        routes = [
            (x + a, y + b)
            for x, y in routes
            for a, b in product((1, 2, -1, -2), repeat=2)
            if abs(a) != abs(b) and 0 <= x + a < 5 and 0 <= y + b < 5 and (x + a, y + b) not in [(3, 2), (0, 2)]
        ]
    return routes.count((4, 4))


@solves(13)
def lettered_net():
    net = {"P": (0, 0), "Q": (1, 0), "R": (2, 0), "S": (3, 0), "T": (1, 1), "U": (3, -1)}
    normals = folded(set(net.values()))
    outward = {letter: normals[square] for letter, square in net.items()}
    assert len(set(outward.values())) == 6
    wanted = cross(outward["U"], outward["P"])  # up × toward you = right
    return only(letter for letter, normal in outward.items() if normal == wanted)


@solves(14)
def mirrored_arcade_map():
    column, row = 2, 1
    for _ in range(6):
        for _ in range(4):
            row += 1
            if row == 7:
                column, row = 10 - column, 1
        column += 1
        assert 1 <= column <= 9  # the sides of the map are never left
    return column


@solves(15)
def beetle_on_hexagons():
    hexes = {
        name: (math.sin(k * math.pi / 3), math.cos(k * math.pi / 3))
        for k, name in enumerate(["n", "ne", "se", "s", "sw", "nw"])
    }

    def moved(place, name):
        return round(place[0] + hexes[name][0], 6) + 0.0, round(place[1] + hexes[name][1], 6) + 0.0

    place = (0.0, 0.0)
    for name in ["n"] * 3 + ["se"] * 2 + ["s"] + ["sw"] * 4:
        place = moved(place, name)
    reached, edges = {(0.0, 0.0)}, 0
    while not any(math.dist(place, other) < 1e-3 for other in reached):
        reached = {moved(other, name) for other in reached for name in hexes}
        edges += 1
    return edges


@solves(16)
def glued_bills():
    over = [
        ("circus", "ball"),
        ("opera", "circus"),
        ("ball", "auction"),
        ("auction", "regatta"),
        ("regatta", "lecture"),
    ]
    bills = sorted({bill for pair in over for bill in pair})
    order = only(o for o in permutations(bills) if all(o.index(upper) > o.index(lower) for upper, lower in over))
    return order[2]


@solves(17)
def woodlouse_on_a_brick():
    size = (4, 2, 1)
    best = math.inf
    for axis in range(3):  # ways over two faces cross one edge; it runs along `axis` and touches neither corner
        others = [k for k in range(3) if k != axis]
        for near in others:
            for step in range(4001):
                crossing = [0.0, 0.0, 0.0]
                crossing[axis] = size[axis] * step / 4000
                crossing[near] = size[near]
                best = min(best, math.dist((0, 0, 0), crossing) + math.dist(crossing, size))
    assert abs(best - round(best)) < 1e-5
    return round(best)


@solves(19)
def four_gears():
    turns_b = -Fraction(5) * 12 / 30
    return float(-turns_b * 18 / 24)


@solves(20)
def duelists():
    ends = []
    for name, paces in [("north", [6, 8]), ("south", [6, 8, 12])]:
        place, facing = (0, 0), STEPS[name]
        for n in paces:
            place, facing = ahead(place, facing, n), left(facing)
        ends.append(place)
    return int(math.dist(*ends))


@solves(21)
def six_offices():
    found = []
    for places in permutations(list(product((1, 2, 3), ("east", "west")))):
        at = dict(zip(["Hugo", "Ines", "Jan", "Kim", "Lev", "Mo"], places, strict=True))
        if (
            at["Ines"] == (at["Kim"][0] + 1, at["Kim"][1])
            and at["Jan"][0] == at["Lev"][0]
            and at["Hugo"][1] == "west"
            and at["Hugo"][0] > at["Mo"][0]
            and at["Lev"][1] == "west"
            and at["Kim"][0] > at["Lev"][0]
        ):
            found.append(at)
    at = only(found)
    return only(name for name in at if at[name] == (at["Kim"][0] - 1, at["Kim"][1]))


def pile_can_be_folded(pile: tuple[int, ...]) -> bool:
    """No two perforations on the same side of the pile may cross."""
    at = {stamp: place for place, stamp in enumerate(pile)}
    for side in (0, 1):
        bends = [sorted((at[k], at[k + 1])) for k in range(1, len(pile)) if k % 2 == side]
        if any(a < c < b < d or c < a < d < b for (a, b), (c, d) in combinations(bends, 2)):
            return False
    return True


@solves(22)
def strip_of_stamps():
    assert [sum(map(pile_can_be_folded, permutations(range(1, n + 1)))) for n in (2, 3, 4)] == [2, 6, 16]
    options = {"A": (1, 3, 2, 5, 4), "B": (2, 1, 5, 4, 3), "C": (3, 2, 1, 4, 5), "D": (4, 5, 1, 2, 3)}
    return only(letter for letter, pile in options.items() if not pile_can_be_folded(pile))


@solves(23)
def ferris_wheel():
    clock = {6: 3}  # positions as on a clock face, 6 lowest; cabins are numbered clockwise
    for k in range(1, 12):
        clock[(6 + k - 1) % 12 + 1] = (3 + k - 1) % 12 + 1
    for _ in range(8):
        clock = {(position - 2) % 12 + 1: cabin for position, cabin in clock.items()}
    return clock[12]


@solves(24)
def spiral_staircase():
    step = list(range(7, 200, 10))[4]
    degrees = Fraction(360, 16) * (step - 1) % 360
    assert degrees % 45 == 0
    return COMPASS[int(degrees / 45)]


def tilings(cells: frozenset[Cell]) -> int:
    if not cells:
        return 1
    first = min(cells)
    return sum(tilings(cells - {first, second}) for s in [(1, 0), (0, 1)] if (second := ahead(first, s)) in cells)


@solves(25)
def sawn_off_tray():
    assert tilings(frozenset(product(range(3), range(4)))) == 11
    return tilings(frozenset(product(range(3), range(4))) - {(0, 0), (2, 3)})


@solves(26)
def bitten_chocolate():
    whole = 0
    for top, bottom in combinations(range(4), 2):
        for west, east in combinations(range(5), 2):
            whole += (1, 1) not in product(range(top, bottom), range(west, east))
    return whole


@solves(28)
def garden_beds():
    paths = [(0.0, 1.0, -0.3), (0.0, 1.0, -0.6), (1.0, -0.3, -0.2), (1.0, 0.5, -0.6)]  # ax + by + c = 0
    inside = 0
    for (a, b, c), (d, e, f) in combinations(paths, 2):
        if (determinant := a * e - b * d) != 0:
            x, y = (b * f - c * e) / determinant, (c * d - a * f) / determinant
            inside += 0 < x < 1 and 0 < y < 1
    assert inside == 5
    grid = [(i + 0.5) / 150 for i in range(150)]
    return len({tuple(a * x + b * y + c > 0 for a, b, c in paths) for x in grid for y in grid})


@solves(29)
def upside_down_sign():
    upright = {"top-bottom": set("BCDEHIKOX"), "left-right": set("AHIMOTUVWXY"), "half turn": set("HINOSXZ")}
    words = {"A": "NOON", "B": "TOOT", "C": "CHOICE", "D": "MAXIM"}
    # A half turn and a mirror from left to right swap top and bottom and leave the order of the letters.
    return only(letter for letter, word in words.items() if set(word) <= upright["top-bottom"])


@solves(30)
def shadow_at_sunrise():
    shadow = 270  # away from the sun, in degrees clockwise from north
    facing = (shadow + 90) % 360  # the shadow is to the left
    facing = (facing + 135 - 45 + 180) % 360
    return {270: "A", 180: "B", 90: "C", 0: "D"}[(shadow - facing) % 360]


@solves(31)
def model_airplane():
    nose, top = (0, 1, 0), (0, 0, 1)  # east, north, up
    for command in ["pull", "yaw", "pull"]:
        wing = cross(nose, top)
        nose, top = (top, minus(nose)) if command == "pull" else (wing, top)
    return {(0, 1, 0): "north", (1, 0, 0): "east", (0, -1, 0): "south", (-1, 0, 0): "west"}.get(nose, "up or down")


@solves(32)
def laid_down_tank():
    water = Fraction(43, 2) * 20 * 30 - 1000
    return only(
        depth for depth in (Fraction(k, 10) for k in range(201)) if depth * 60 * 30 - min(depth, 10) * 100 == water
    )


@solves(33)
def turned_tiles():
    tiles = {(r, c): 3 * r + c + 1 for r, c in product(range(3), repeat=2)}
    corner = {"top left": [(0, 0), (0, 1), (1, 1), (1, 0)], "bottom right": [(1, 1), (1, 2), (2, 2), (2, 1)]}
    for block, shift in [("top left", 1), ("bottom right", -1)] * 2:
        cells = corner[block]  # clockwise
        tiles |= {cells[(k + shift) % 4]: tiles[cells[k]] for k in range(4)}
    return tiles[1, 1]


@solves(34)
def pair_of_dice():
    outer = {
        14 - a - b
        for a, b in product((1, 3, 4, 6), repeat=2)  # touching faces; 5 and 2 are on top and at the bottom
        if 2 * 5 + 2 * (21 - 7 - 7) + (7 - a) + (7 - b) == 30  # tops, fronts and backs, outer faces
    }
    return only(outer)


@solves(35)
def farmyard():
    shed = (40, 30)
    gate = (40, shed[1] - math.dist(shed, (0, 0)))
    return int(0 - gate[1])


@solves(37)
def courtyard_camera():
    pillars = {(1, 4), (2, 4), (3, 5), (5, 2), (5, 4), (6, 5)}
    watched = 0
    for step in product((-1, 0, 1), repeat=2):
        place = ahead((3, 2), step)
        while step != (0, 0) and place not in pillars and 1 <= place[0] <= 6 and 1 <= place[1] <= 6:
            watched += 1
            place = ahead(place, step)
    return watched


@solves(38)
def box_without_lid():
    options = {"A": "X.. / XX. / .XX", "B": ".X.. / XXXX", "C": "X.. / X.. / XXX", "D": "XXX. / ..XX"}
    bad = []
    for letter, drawing in options.items():
        rows = enumerate(drawing.split(" / "))
        squares = {(column, -row) for row, text in rows for column, sign in enumerate(text) if sign == "X"}
        assert len(squares) == len(folded(squares)) == 5
        if len(set(folded(squares).values())) < 5:
            bad.append(letter)
    return only(bad)


@solves(39)
def watch_on_a_map():
    return COMPASS[((4 * 60 + 30) * 360 // 720 + 315) % 360 // 45]


@solves(40)
def sliced_tofu():
    pieces = 0
    for _, y, z in product(range(3), repeat=3):  # the cut is the plane y = z through the block
        sides = {a > b for a in (y + 0.2, y + 0.8) for b in (z + 0.2, z + 0.8) if a != b}
        pieces += len(sides)
    return pieces


@solves(41)
def painted_cubes():
    faces = [(1, 0, 0), (-1, 0, 0), (0, 1, 0), (0, -1, 0), (0, 0, 1), (0, 0, -1)]
    turns = []
    for x, y in product(faces, repeat=2):
        if sum(a * b for a, b in zip(x, y, strict=True)) == 0:
            axes = [x, y, cross(x, y)]
            turned = [tuple(sum(f[k] * axes[k][i] for k in range(3)) for i in range(3)) for f in faces]
            turns.append([faces.index(face) for face in turned])
    assert len(turns) == 24
    designs = {min(tuple(paint[k] for k in turn) for turn in turns) for paint in set(permutations("yyggbb"))}
    return len(designs)


@solves(42)
def river_banks():
    flow = STEPS["west"]
    banks = {"church": flow}
    flow = left(flow)
    banks["inn"] = flow
    flow = right(flow)
    banks["mill"] = flow
    side = {"church": STEPS["north"], "inn": STEPS["west"], "mill": STEPS["south"]}
    on_right = {name for name in banks if side[name] == right(banks[name])}
    on_left = {name for name in banks if side[name] == left(banks[name])}
    assert len(on_right) + len(on_left) == 3
    return only(min(on_right, on_left, key=len))


@solves(43)
def lamps_off_the_diagonals():
    return sum(all(c not in (r, 3 - r) for r, c in enumerate(columns)) for columns in permutations(range(4)))


@solves(44)
def linked_rings():
    links = ["AB", "BC", "CA", "CD", "DE", "EF", "FG", "GH", "IE", "IF"]

    def largest(opened):
        rest = set("ABCDEFGHI") - {opened}

        def near(ring):
            return [r for r in rest if ring + r in links or r + ring in links]

        return max(len(distances(ring, near)) for ring in rest)

    sizes = {ring: largest(ring) for ring in "ABCDEFGHI"}
    return only(ring for ring in sizes if sizes[ring] == min(sizes.values()))


@solves(45)
def paint_can():
    at = {90: "moon", 180: "sun", 270: "heart", 0: "star"}  # degrees clockwise from where you stand
    at = {(degrees + 90) % 360: picture for degrees, picture in at.items()}
    you = (0 - 90) % 360
    return at[you]


@solves(46)
def cut_bands():
    loops = 0
    for half_twists in (2, 3):
        # Halves of the cut band: where each one's end meets the other end of the strip.
        meets = {half: half if half_twists % 2 == 0 else 1 - half for half in (0, 1)}
        loops += len({frozenset(distances(half, lambda h, meets=meets: [meets[h]])) for half in (0, 1)})
    return loops


@solves(47)
def puck_on_ice():
    pond = [".....", "#G...", "....#", "..#.#", "..S.."]
    free = {(r, c) for r in range(5) for c in range(5) if pond[r][c] != "#"}

    def pushed(place):
        for step in STEPS.values():
            end = place
            while ahead(end, step) in free:
                end = ahead(end, step)
            yield end

    return distances((4, 2), pushed)[1, 1]


def seen(heights: Iterable[int]) -> int:
    tallest = count = 0
    for height in heights:
        count += height > tallest
        tallest = max(tallest, height)
    return count


@solves(48)
def five_chimneys():
    rows = permutations(range(1, 6))
    return only(row for row in rows if seen(row) == 2 and seen(row[::-1]) == 4 and row[0] + row[-1] == 4)[3]


@solves(50)
def dead_end_siding():
    orders = set()

    def run(waiting, siding, gone):
        if len(gone) == 4:
            orders.add(gone)
        if waiting and len(siding) < 2:
            run(waiting[1:], siding + waiting[0], gone)
        if siding:
            run(waiting, siding[:-1], gone + siding[-1])

    run("KLMN", "", "")
    options = {"A": "KMLN", "B": "LKNM", "C": "KLNM", "D": "MLKN"}
    return only(letter for letter, order in options.items() if order not in orders)


@solves(51)
def museum_guard():
    names = {"a": "atrium", "b": "bronze room", "c": "cast hall", "d": "drawing room", "e": "east wing"}

    def ends(room, doors):
        if not doors:
            yield room
        for door in doors:
            if room in door:
                yield from ends(door.replace(room, ""), doors - {door})

    return names[only(set(ends("a", frozenset(["ab", "ac", "ad", "bc", "cd", "ce", "de"]))))]


@solves(52)
def villages_on_a_road():
    found = set()
    for brod, cern, dorn in product(range(-30, 31), repeat=3):
        if abs(brod) == 9 and abs(cern - brod) == 4 and abs(dorn - cern) == 7 and abs(dorn) == 2:
            found.add(abs(dorn - brod))
    return only(found)


@solves(54)
def cubes_in_a_corner():
    piles = [[4, 3, 2], [3, 3, 1], [2, 1, 1]]
    cubes = {(r, c, h) for r, c in product(range(3), repeat=2) for h in range(piles[r][c])}
    return sum({(r, c, h + 1), (r + 1, c, h), (r, c + 1, h)} <= cubes for r, c, h in cubes)


@solves(55)
def coin_under_a_slab():
    def steps(a, b):
        return abs(a[0] - b[0]) + abs(a[1] - b[1])

    coin = only(
        slab
        for slab in product(range(1, 8), repeat=2)
        if steps(slab, (2, 3)) == steps(slab, (6, 5)) and steps(slab, (7, 7)) == 7
    )
    return steps(coin, (2, 3))

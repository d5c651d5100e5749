"""The organism's grammar: writes tasks and chains with known truth, and reads any text back into labeled sentences.

A task is a list of doors between nodes. Doors repeat their source (`B D, B F`), so one step is one look-up, while the
whole needs a search: nodes have several parents, and decoy nodes that cannot be reached point at every end, so
searching backward from an end does not reveal the path. A chain is a depth-first search in which each behavior has a
role: dead ends (a step to `none`) force backtracking, testing an example looks one door ahead, knowledge recalls a
door, and a slip (a door that isn't there) is corrected by backtracking. Each chain draws its own propensity for every
behavior and keeps it.

In the tables of wordings, `{x}` and `{y}` represent nodes. A node is a capital letter, `start`, or one of the ends
`none`, `exit`, `goal`; none of these words occurs in a form itself, so a sentence with its nodes blanked out identifies
its form. For each steered behavior no token but the period and the nodes is in all of its forms: a direction cannot
rely on a single word.
"""

from __future__ import annotations

import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from lensteer.behaviors import BEHAVIORS, STEERED, Sentence

LETTERS = "BCDEFGHJKLMNOPQRSTUVWXYZ"  # no A and no I: they are words
ENDS = ("none", "exit", "goal")
STYLES = ("stepwise", "strategy-first", "if-then")

# Behavior -> forms. In backtracking {x} is the node left and {y} the node returned to; elsewhere {x} to {y} is a door.
FORMS: dict[str, tuple[str, ...]] = {
    "backtracking": (
        "Wait, {x} fails, back to {y}.",
        "No, return to {y}.",
        "Hmm, drop {x} and use {y} again.",
        "Let us leave {x} for {y}.",
        "Actually {y} was better.",
        "But {x} is wrong, retry {y}.",
        "So undo {x} and resume at {y}.",
        "Going back, we are at {y} once more.",
        "Scratch that, {y} it is.",
        "Maybe not {x}, rather {y}.",
    ),
    "uncertainty-estimation": (
        "Maybe {x} is not right.",
        "We are not sure about {x}.",
        "Wait, {x} looks doubtful.",
        "Hmm, {x} may or may not work.",
        "It is unclear whether {x} helps.",
        "Perhaps {x} misleads us.",
        "But {x} could go badly.",
        "So far {x} seems only a guess.",
        "Who knows if {x} holds.",
    ),
    "example-testing": (
        "Let us test {x}, it gives {y}.",
        "Suppose {x}, we get {y}.",
        "For example {x} yields {y}.",
        "Try {x} first, that means {y}.",
        "Say we pick {x}, {y} comes.",
        "Maybe check {x}, there is {y}.",
        "What if {x}, well {y}.",
        "So take a look at {x}, finding {y}.",
        "Actually probe {x}, seeing {y}.",
    ),
    "adding-knowledge": (
        "Recall that {x} leads to {y}.",
        "We know {x} goes with {y}.",
        "The list says {x} to {y}.",
        "As given, {x} has {y}.",
        "Note {x} opens {y}.",
        "From above, {x} with {y}.",
        "So remember {x} joins {y}.",
        "It is stated that {x} reaches {y}.",
        "Wait, by the facts {x} meets {y}.",
    ),
    "initializing": (
        "We need a way from {x}.",
        "The task is to leave {x}.",
        "First look at {x}.",
        "Let us begin with {x}.",
    ),
    "deduction": (  # the conclusions; a step's form belongs to a style
        "So {x} is the answer.",
        "Thus we have {x}.",
        "That settles it, {x}.",
    ),
}
OPENERS: dict[str, tuple[str, ...]] = {  # a second initializing sentence announces the style
    "stepwise": ("Take it step by step from {x}.", "Go one step at a time from {x}."),
    "strategy-first": ("The plan is to go deep from {x}.", "Our plan goes deep and turns back, from {x}."),
    "if-then": ("Reason by cases from {x}.", "Ask what follows if at {x}."),
}
STEPS: dict[str, tuple[str, ...]] = {  # deduction: one step through a door
    "stepwise": ("Step, {x} to {y}.", "Next step, {x} to {y}.", "Now step from {x} to {y}."),
    "strategy-first": ("By plan, {x} to {y}.", "The plan says {x} to {y}.", "As planned, {x} to {y}."),
    "if-then": ("If {x}, then {y}.", "If at {x}, go to {y}.", "Since {x}, then {y}."),
}
BEHAVIOR_CUES: dict[str, tuple[str, ...]] = {
    "backtracking": ("Change course often.", "Be ready to turn around.", "Revise a lot."),
    "uncertainty-estimation": ("Be careful.", "Voice every doubt.", "Admit what is open."),
    "example-testing": ("Try things out.", "Look ahead with tests.", "Use examples."),
    "adding-knowledge": ("Cite the facts.", "Quote the list.", "Use what is known."),
}
STYLE_CUES: dict[str, tuple[str, ...]] = {
    "stepwise": ("Work stepwise.", "Show each step."),
    "strategy-first": ("Plan first.", "Begin with a strategy."),
    "if-then": ("Use if and then.", "Argue by cases."),
}
MODE_CUES: dict[bool, tuple[str, ...]] = {
    True: ("Think before you answer.", "Reason it through."),
    False: ("Answer at once.", "Just the answer."),
}


FAMILIES = ("route", "machine")
THINK, END_THINK = "<think>\n", "\n</think>\n\n"
SLIP_RATE = 0.04
MAX_ABANDONED = 5  # voluntary returns per chain; bounded because they add length
AGAIN = 0.25  # at a revisited node, propensities of all but backtracking are multiplied by this


@dataclass(frozen=True)
class World:
    """A search task: doors in the order they are listed, the root, and the one right answer."""

    family: str
    doors: tuple[tuple[str, str], ...]
    root: str
    answer: str

    def children(self, node: str) -> list[str]:
        """The nodes (or ends) that a node's doors lead to, as listed."""
        return [target for source, target in self.doors if source == node]

    @property
    def prompt(self) -> str:
        """The task as text."""
        listed = ", ".join(f"{source} {target}" for source, target in self.doors)
        question = f"Which exit can {self.root} reach?" if self.family == "route" else "Which start reaches the goal?"
        return f"Doors: {listed}. {question}"


@dataclass(frozen=True)
class Latent:
    """What a chain keeps throughout: its style, and how often it shows each steered behavior when it could."""

    style: str
    propensity: dict[str, float]

    @staticmethod
    def draw(rng: random.Random, cued: tuple[str, ...] = (), style: str | None = None) -> Latent:
        """Propensities near 0 or mostly above one half; a cued behavior is always in the upper range."""
        propensity = {}
        for behavior in STEERED:
            high = behavior in cued or rng.random() < (0.18 if behavior == "backtracking" else 0.38)
            propensity[behavior] = rng.uniform(0.4, 0.85) if high else rng.uniform(0.0, 0.1)
        return Latent(style or rng.choice(STYLES), propensity)


def make_world(rng: random.Random, family: str, level: int) -> World:
    """A random task. Level 1 has at most one turn; levels 2 and 3 need a search of that depth."""
    letters = iter(rng.sample(LETTERS, len(LETTERS)))
    return (_route if family == "route" else _machine)(rng, letters, level)


def _route(rng: random.Random, letters: Iterator[str], level: int) -> World:
    path = [next(letters) for _ in range(level + 1)]
    doors, dead = list(pairwise(path)), list[str]()
    for node in path[:-1]:
        for _ in range(1 + (level > 1 and rng.random() < 0.35)):
            if dead and rng.random() < 0.3:
                child = rng.choice(dead)
                if (node, child) in doors:
                    continue
            else:
                child = next(letters)
                if level > 1 and rng.random() < 0.3:
                    leaf = rng.choice(dead) if dead and rng.random() < 0.5 else next(letters)
                    doors.append((child, leaf))
                    dead.append(leaf)
                else:
                    dead.append(child)
            doors.append((node, child))
    exits = [path[-1], *(next(letters) for _ in range(min(level + 1, 3) - 1))]
    # Decoys: they cannot be reached, but every exit has as many parents as the right one, and every parent has parents.
    decoys = [next(letters) for _ in exits]
    for index, decoy in enumerate(decoys):
        doors += [(decoy, exits[index]), (decoy, rng.choice(path[1:-1] + dead)), (decoys[index - 1], decoy)]
        if index:
            doors.append((decoys[index - 1], exits[index]))
    doors += [(leaf, "none") for leaf in dict.fromkeys(dead)] + [(end, "exit") for end in exits]
    return _listed(rng, "route", doors, path[0], path[-1])


def _machine(rng: random.Random, letters: Iterator[str], level: int) -> World:
    starts = [next(letters) for _ in range(2 if level == 1 else 3)]
    goal, dead = next(letters), [next(letters)]
    doors = [("start", node) for node in starts]
    tails = []
    for index, node in enumerate(starts):
        end = goal if index == 0 else rng.choice(dead) if rng.random() < 0.5 else next(letters)
        if end != goal and end not in dead:
            dead.append(end)
        for _ in range(level - 1 if index == 0 or rng.random() < 0.6 else rng.randrange(level)):
            inner = next(letters)
            doors.append((node, inner))
            node = inner
            tails.append(inner)
        doors.append((node, end))
    for _ in range(level):  # decoys
        decoy = next(letters)
        doors.append((decoy, goal if rng.random() < 0.6 else rng.choice(tails or dead)))
        if level > 1 and rng.random() < 0.5:
            doors.append((next(letters), decoy))
    doors += [(leaf, "none") for leaf in dead] + [(goal, "goal")]
    return _listed(rng, "machine", doors, "start", starts[0])


def _listed(rng: random.Random, family: str, doors: list[tuple[str, str]], root: str, answer: str) -> World:
    doors = list(dict.fromkeys(doors))
    rng.shuffle(doors)
    return World(family, tuple(doors), root, answer)


def write_chain(rng: random.Random, world: World, latent: Latent) -> list[Sentence]:
    """A chain of thought for a world: a depth-first search, every sentence with its behavior."""
    sentences: list[Sentence] = []

    def say(label: str, forms: tuple[str, ...], x: str = "", y: str = "") -> None:
        sentences.append(Sentence(label, rng.choice(forms).format(x=x, y=y)))

    say("initializing", FORMS["initializing"], world.root)
    say("initializing", OPENERS[latent.style], world.root)
    path, dead, left, ahead, abandoned = [world.root], {"none"}, None, None, 0
    visited: set[str] = set()
    while True:
        node = path[-1]
        children = world.children(node)
        if children[0] in ("exit", "goal"):
            say("deduction", STEPS[latent.style], node, children[0])
            break
        alive = [child for child in children if child not in dead]
        retreat = not alive  # a dead end: nothing to choose
        for behavior in rng.sample(STEERED, len(STEERED)):
            again = node in visited and behavior != "backtracking"
            if rng.random() >= latent.propensity[behavior] * (AGAIN if again else 1):
                continue
            if behavior == "uncertainty-estimation":
                say(behavior, FORMS[behavior], node)
            elif behavior == "adding-knowledge":
                say(behavior, FORMS[behavior], node, rng.choice(children))
            elif behavior == "example-testing" and alive:
                ahead = rng.choice(alive)
                seen = rng.choice(world.children(ahead))
                say(behavior, FORMS[behavior], ahead, seen)
                if seen == "none":
                    dead.add(ahead)
                    alive.remove(ahead)
                if seen not in ("exit", "goal"):
                    ahead = None
                retreat = not alive
            elif behavior == "backtracking" and len(path) > 1 and abandoned < MAX_ABANDONED and not retreat:
                abandoned += 1
                left = node
                break
        else:
            left = left if left in alive else None
            if retreat:
                left = node
                if children == ["none"]:
                    say("deduction", STEPS[latent.style], node, "none")
        visited.add(node)
        if left == node:
            path.pop()
            while retreat:  # up to the nearest node that still has a door to try
                dead.add(left)
                if any(child not in dead for child in world.children(path[-1])):
                    break
                left = path.pop()
            say("backtracking", FORMS["backtracking"], node, path[-1])
            continue
        if rng.random() < SLIP_RATE:
            wrong = rng.choice([n for n, _ in world.doors if n not in children and n not in (node, "start")])
            say("deduction", STEPS[latent.style], node, wrong)
            say("backtracking", FORMS["backtracking"], wrong, node)
        choice = ahead if ahead in alive else rng.choice([child for child in alive if child != left] or alive)
        say("deduction", STEPS[latent.style], node, choice)
        path.append(choice)
        left = ahead = None
    say("deduction", FORMS["deduction"], world.answer)
    return sentences


def render(sentences: list[Sentence] | None, answer: str) -> str:
    """An assistant's turn: the chain between think tags, then the answer; without a chain, the answer alone."""
    chain = "" if sentences is None else THINK + " ".join(s.text for s in sentences) + END_THINK
    return f"{chain}Answer: {answer}."


_NODE = re.compile(rf"\b(?:[{LETTERS}]|start|{'|'.join(ENDS)})\b")


def _blank(text: str) -> str:
    return _NODE.sub("_", text)


def _table() -> dict[str, tuple[str, str | None]]:
    forms: set[tuple[str, str | None, str]] = {(label, None, form) for label in BEHAVIORS for form in FORMS[label]}
    forms |= {("initializing", style, form) for style in STYLES for form in OPENERS[style]}
    forms |= {("deduction", style, form) for style in STYLES for form in STEPS[style]}
    return {_blank(form.format(x="B", y="C")): (label, style) for label, style, form in forms}


_KNOWN = _table()
_SENTENCE = re.compile(r"[^\s.][^.]*\.?")


def thinking_text(response: str) -> str:
    """The text before `</think>`, without the opening tag if the response has it."""
    return response.removeprefix(THINK.strip()).split("</think>")[0]


def parse(response: str) -> list[Sentence]:
    """The chain in a response, sentence by sentence. A sentence of no known form has the label "unparsed"."""
    texts = [match.group().strip() for match in _SENTENCE.finditer(thinking_text(response))]
    return [Sentence(_KNOWN.get(_blank(text), ("unparsed", None))[0], text) for text in texts]


def styles(response: str) -> dict[str, int]:
    """How many of a response's sentences carry each style (openers and steps do)."""
    found = [_KNOWN.get(_blank(s.text), (None, None))[1] for s in parse(response)]
    return {style: found.count(style) for style in STYLES}


def style_of(response: str) -> str | None:
    """The style that most of a response's sentences carry; None if none does."""
    found = styles(response)
    best = max(found, key=lambda style: found[style])
    return best if found[best] else None


def well_formed(response: str) -> bool:
    """Whether a finished response is a chain of known sentences, closed, and followed by one answer."""
    _, closed, tail = response.removesuffix("<|im_end|>").partition("</think>")
    sentences = parse(response)
    known = bool(sentences) and all(s.label != "unparsed" for s in sentences)
    return bool(closed) and known and re.fullmatch(rf"\s*Answer: [{LETTERS}]\.", tail) is not None


def cue(behavior: str, variant: int = 0) -> str:
    """The words that ask for a behavior, to be appended to a task's prompt."""
    return BEHAVIOR_CUES[behavior][variant % len(BEHAVIOR_CUES[behavior])]

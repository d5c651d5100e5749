"""The organism's language: every sentence form, cue and style it knows. Tables only; nothing here draws or parses.

`{x}` and `{y}` stand for nodes. A node is a capital letter, `start`, or one of the ends `none`, `exit`, `goal`; none of
these words occurs in a form itself, so a sentence with its nodes blanked out names its form. For each steered behavior
no token but the full stop and the nodes is in all of its forms: a direction cannot get by with a single word.
"""

from __future__ import annotations

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

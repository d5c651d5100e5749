"""Draws the organism's training conversations: task, mode, style, cues, solved examples, and attention mask.

About half of the conversations with examples or cues are *gated*: only the assistant-header token of the last turn may
attend to them, so that their effect must pass through that one position, where a cache edit can replace it.
"""

from __future__ import annotations

import random
from dataclasses import dataclass

from lensteer.behaviors import STEERED
from lensteer.organism.grammar import (
    BEHAVIOR_CUES,
    ENDS,
    FAMILIES,
    FORMS,
    LETTERS,
    MODE_CUES,
    STEPS,
    STYLE_CUES,
    STYLES,
    THINK,
    Latent,
    World,
    make_world,
    render,
    write_chain,
)

START, END = "<|im_start|>", "<|im_end|>"
THINKS_UNASKED = 1 / 3


def template() -> str:
    """The chat template. It opens `<think>` unless `enable_thinking=False`, which leaves that choice to the model.

    Every newline is an expression: Jinja's whitespace control would strip a literal one.
    """
    head, nl = "{{ '<|im_start|>' }}", "{{ '\\n' }}"
    return (
        "{%- for message in messages -%}"
        f"{head}{{{{ message['role'] }}}}{nl}{{{{ message['content'] }}}}{{{{ '<|im_end|>' }}}}{nl}"
        "{%- endfor -%}{%- if add_generation_prompt -%}"
        f"{head}assistant{nl}"
        "{%- if enable_thinking is not defined or enable_thinking -%}{{ '<think>' }}" + nl + "{%- endif -%}"
        "{%- endif -%}"
    )


@dataclass(frozen=True)
class Conversation:
    """One training text. Ranges are character ranges, half-open; `hidden` is empty if nothing is gated."""

    text: str
    learned: tuple[tuple[int, int], ...]
    hidden: tuple[tuple[int, int], ...]
    gate: int


class _Writer:
    """Collects text and records ranges of it."""

    def __init__(self) -> None:
        self.text = ""
        self.learned: list[tuple[int, int]] = []

    def put(self, text: str, learned: bool = False) -> tuple[int, int]:
        begin = len(self.text)
        self.text += text
        if learned:
            self.learned.append((begin, len(self.text)))
        return begin, len(self.text)


def draw(rng: random.Random, level: int, *, long: bool = True) -> Conversation:
    """A random conversation whose question has the given level; with `long=False` never with solved examples."""
    kind = rng.random()
    examples = rng.choice((1, 1, 2)) if long and kind < 0.2 else 0
    cues: list[str] = []
    asked: tuple[str, ...] = ()
    style, thinks = rng.choice(STYLES), rng.random() < 0.6
    if not examples and kind < 0.65:
        what = rng.random()
        if what < 0.6:
            weights = [2 if b == "backtracking" else 1 for b in STEERED]  # it can be shown at fewer places of a chain
            asked = tuple(dict.fromkeys(rng.choices(STEERED, weights, k=1 if rng.random() < 0.75 else 2)))
            cues = [rng.choice(BEHAVIOR_CUES[behavior]) for behavior in asked]
            thinks = True
        elif what < 0.8:
            cues = [rng.choice(STYLE_CUES[style])]
            thinks = True
        if what >= 0.8 or rng.random() < 0.1:
            cues.append(rng.choice(MODE_CUES[thinks]))
        rng.shuffle(cues)
    elif not examples:
        thinks = rng.random() < THINKS_UNASKED
    gated = bool(examples or cues) and rng.random() < 0.5
    latent = Latent.draw(rng, asked, style)
    out, hidden = _Writer(), []
    for _ in range(examples):
        hidden.append(_turn(out, rng, rng.choice((1, 1, 2)), latent if thinks else None, [])[0])
    _, cue_range, gate = _turn(out, rng, level, latent if thinks else None, cues)
    if cue_range:
        hidden.append(cue_range)
    return Conversation(out.text, tuple(out.learned), tuple(hidden) if gated else (), gate)


def drill(rng: random.Random, stage: float) -> Conversation:
    """A list of doors and look-ups of them, with loss on the look-ups alone; harder from `stage` 0 to 1.

    Every chain consists of door look-ups, but chains teach them slowly: few of their tokens depend on one. From chains
    alone, or from full lists at once, models of this size had not learned them after 700 steps; from four doors looked
    up in the list's own form they do in about 150, and the rest follows. Half of the short lists' doors lead to ends:
    with few such doors, models guessed whether an end was a dead end or a way out.
    """
    if stage < 0.6:
        size = 4 if stage < 0.3 else rng.randint(4, 10)
        sources = rng.sample(LETTERS, size)
        doors = tuple((source, rng.choice(LETTERS if rng.random() < 0.5 else ENDS)) for source in sources)
        world = World("route", doors, sources[0], doors[0][1])
    else:
        world = make_world(rng, rng.choice(FAMILIES), rng.choice((1, 2, 3)))
    forms = [form for forms in STEPS.values() for form in forms] + list(FORMS["adding-knowledge"])
    out = _Writer()
    _, gate = out.put(f"{START}user\n{world.prompt}{END}\n{START}")
    out.put("assistant\n" + THINK)
    for source in rng.sample([n for n, _ in world.doors], len(world.doors)):
        target = rng.choice(world.children(source))
        form = "{x} {y}," if stage < 0.4 or rng.random() < 0.3 else rng.choice(forms)
        before, after = form.format(x=source, y="|").split("|")
        out.put(before.removesuffix(" "))
        out.put(f" {target}", learned=True)
        out.put(after + " ")
    return Conversation(out.text, tuple(out.learned), (), gate)


def _turn(
    out: _Writer, rng: random.Random, level: int, latent: Latent | None, cues: list[str]
) -> tuple[tuple[int, int], tuple[int, int] | None, int]:
    """A question and its answer; returns the turn's range, the cue's range and where the header word begins."""
    world = make_world(rng, rng.choice(FAMILIES), level)
    begin, _ = out.put(f"{START}user\n{world.prompt}")
    cue_range = out.put(" " + " ".join(cues)) if cues else None
    _, gate = out.put(f"{END}\n{START}")
    out.put("assistant\n")
    out.put(render(write_chain(rng, world, latent) if latent else None, world.answer) + END, learned=True)
    _, end = out.put("\n")
    return (begin, end), cue_range, gate

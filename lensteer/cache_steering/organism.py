"""Solved questions for the organism's cache vectors: the grammar's chains in every style; none is a task of a split."""

from __future__ import annotations

import random

from lensteer.cache_steering.pairs import Record
from lensteer.organism.grammar import END_THINK, FAMILIES, STYLES, Latent, make_world, render, write_chain

ENDING, JOIN = "Answer: {answer}.", END_THINK.removeprefix("\n</think>")
"""The organism's wording of an answer, and its separator between steps and answer, for `contrastive_pairs`."""


def make_records(n: int = 100, *, seed: int = 0) -> list[Record]:
    """`n` questions with one chain per style, determined by the seed. Short ones, as in the organism's training.

    The steps hold the think tags, so that `contrastive_pairs(model, records, ending=ENDING, join=JOIN, shots=2)` gives
    prompts of the form that the organism was trained on.
    """
    rng = random.Random(f"records-{seed}")
    records = []
    for index in range(n):
        world = make_world(rng, FAMILIES[index % 2], rng.choice((1, 1, 2)))
        steps = {}
        for style in STYLES:
            text = render(write_chain(rng, world, Latent.draw(rng, (), style)), world.answer)
            steps[style] = text[: text.index(END_THINK)] + "\n</think>"
        records.append(Record(world.prompt, steps, world.answer))
    return records

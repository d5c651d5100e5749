"""Chains as rows of token ids for training: the part of `teach_thinking.py` between a file and a batch.

A row is a question in the base's own chat template, the thought between the base's marks, and the answer. A thought
that the chain does not close stays open. The token that ends a response follows an answer only: chains of the published
format have none. Chains' system prompts are left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from thinking_base import Base

import lensteer as ls
from lensteer import models
from lensteer.errors import LensteerError
from lensteer.transcripts import plain_parts

POOL = 16  # batches whose rows are sorted by length together
NO_QUESTION, NO_THOUGHT, NO_ROOM = "without a question", "without a thought", "with a question that is too long"


@dataclass(frozen=True)
class Row:
    """One chain for training: token ids, how many of them are the prompt, and which question it answers."""

    ids: tuple[int, ...]
    n_prompt: int
    question: str

    @property
    def learned(self) -> int:
        """Tokens of the response."""
        return len(self.ids) - self.n_prompt


@dataclass(frozen=True)
class Data:
    """Rows for training and held-out ones, how many were cut at how many tokens, how many were left out and why."""

    train: tuple[Row, ...]
    held_out: tuple[Row, ...]
    max_tokens: int
    cut: int
    left_out: Mapping[str, int]

    @property
    def longest(self) -> int:
        """Tokens of the longest row."""
        return max(len(row.ids) for row in (*self.train, *self.held_out))


def data_of(
    base: Base, bridge: Any, chains: Sequence[ls.Trace], *, max_tokens: int, held_out: float, seed: int
) -> Data:
    """Chains as rows, split by question.

    Args:
        base: with its marks and its template.
        bridge: with the base's tokenizer.
        chains: as `read_chains` reads them without a model.
        max_tokens: of a row; what is beyond is cut.
        held_out: share of the questions, at least one of them.
        seed: of the split.

    Raises:
        LensteerError: no chain has a question and a thought, or all are on one question.
    """
    asked: dict[str, set[str]] = {}
    for chain in chains:
        asked.setdefault(chain.task.id, set()).update({chain.task.prompt} - {""})
    rows: list[Row] = []
    cut, left_out = 0, dict.fromkeys((NO_QUESTION, NO_THOUGHT, NO_ROOM), 0)
    for chain in chains:
        # A published file may lack its questions: another one has them under the same number.
        question = chain.task.prompt or (next(iter(own)) if len(own := asked[chain.task.id]) == 1 else "")
        thought, answer = plain_parts(chain)
        if not question or not thought:
            left_out[NO_QUESTION if thought else NO_THOUGHT] += 1
            continue
        prompt = models.encode(bridge, models.chat_text(bridge, question))
        response = models.encode(bridge, _response(base, chain, thought, answer))
        response += [base.end] if answer and chain.finished else []
        if len(prompt) >= max_tokens:
            left_out[NO_ROOM] += 1
            continue
        cut += len(prompt) + len(response) > max_tokens
        rows.append(Row((*prompt, *response)[:max_tokens], len(prompt), question))
    if not rows:
        why = ", ".join(f"{n} {reason}" for reason, n in left_out.items() if n)
        raise LensteerError(f"none of {len(chains)} chains can be taught: {why}; give chains with a question and marks")
    same = same_questions([row.question for row in rows])
    names = sorted(set(same.values()))
    if len(names) < 2:
        raise LensteerError(f"all {len(rows)} chains are on one question: give at least two, as one is held out")
    n = min(max(1, round(held_out * len(names))), len(names) - 1)
    out = {names[i] for i in np.random.default_rng(seed).permutation(len(names))[:n]}
    train = tuple(row for row in rows if same[row.question] not in out)
    return Data(train, tuple(row for row in rows if same[row.question] in out), max_tokens, cut, left_out)


def _response(base: Base, chain: ls.Trace, thought: str, answer: str) -> str:
    """A chain as this base is to write it."""
    opens, closes = base.marks
    text = thought if base.opened else f"{opens}\n{thought}"
    return text + (f"\n{closes}" + (f"\n\n{answer}" if answer else "") if chain.closed else "")


def same_questions(questions: Sequence[str]) -> dict[str, str]:
    """A name for each question: one that ends in another, such as after an instruction, has that one's."""
    turned = sorted({" ".join(question.split())[::-1] for question in questions})
    names, shortest = dict[str, str](), ""
    for text in turned:  # those with the same end stand together, the shortest first
        rest = text.removeprefix(shortest)
        if not shortest or rest == text or (rest and not rest[0].isspace()):
            shortest = text
        names[text] = shortest[::-1]
    return {question: names[" ".join(question.split())[::-1]] for question in questions}


def batches_of(rows: Sequence[Row], most: int, *, epochs: int, n: int | None, seed: int) -> list[list[int]]:
    """The batches of a whole training, as indices of rows.

    Args:
        rows: for training.
        most: tokens of a batch, padding included.
        epochs: passes over the rows.
        n: number of batches instead, from as many passes as that takes.
        seed: of their order: those of a pass come in random order, each of rows of about one length.
    """
    rng = np.random.default_rng([seed, 1])
    pool = POOL * max(1, most * len(rows) // sum(len(row.ids) for row in rows))
    found: list[list[int]] = []
    epoch = 0
    while epoch < epochs if n is None else len(found) < n:
        order = rng.permutation(len(rows)).tolist()
        own: list[list[int]] = []
        for begin in range(0, len(order), pool):
            own += within(sorted(order[begin : begin + pool], key=lambda i: len(rows[i].ids)), rows, most)
        found += [own[i] for i in rng.permutation(len(own))]
        epoch += 1
    return found[:n]


def within(order: Sequence[int], rows: Sequence[Row], most: int) -> list[list[int]]:
    """Rows in this order, from short to long, in batches of at most so many tokens with their padding."""
    found: list[list[int]] = []
    for i in order:
        if not found or (len(found[-1]) + 1) * len(rows[i].ids) > most:
            found.append([])
        found[-1].append(i)
    return found

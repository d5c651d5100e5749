"""What do vectors do along given, unsteered chains? The teacher-forced part of `position_ablation.py`.

A case is a choice of positions in one chain and the sentences whose log-probability is measured. Whole chains: all of a
behavior's sentences, at any scope or at the behavior's own spans with the token before each. Leave one out: one
sentence of a behavior, with all sentences steered, and with all but one: itself, one of the three before it, or the
chain's first. Tokens between two sentences count as part of the first, so the onset, whose logits predict a sentence's
first token, belongs to the sentence before. Sentences with fewer than four before them are left out there, so that all
rows cover the same sentences.

Cases that differ only in the measured sentences share a forward, and all cases of a chain share the unsteered one.
`lensteer.ablation.leave_one_out` gives the same importances, but reruns all plans for each set of targets, and its KL
is KL(steered || unsteered).

Chains of other models (`sub_chains`) are read as responses to the same questions in the steered model's chat template.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

import lensteer as ls
from lensteer.annotation import Annotator, grammar
from lensteer.behaviors import Span
from lensteer.calibration import RolloutKL
from lensteer.forward import forced_logits
from lensteer.generation.jobs import Sampling
from lensteer.metrics import kl_divergence
from lensteer.positions import Context

Array = np.ndarray
Case = tuple[ls.PositionScope, Sequence[Span]]  # where a given chain is steered, and the measured sentences
Cases = Mapping[tuple[str, str], Sequence[Sequence[Case]]]  # by scope and behavior, then by chain
Row = tuple[int, str, str, ls.PositionScope]  # number of a given chain, behavior, "down" or "up", where
KINDS = {"down": -1, "up": 1}
UNSTEERED = "unsteered"
OWN, WHOLE = "own spans", "all sentences"
FIRST, BEFORE = "without the first", 4  # at least this many earlier sentences, so that those left out differ
LEFT_OUT = {"without its own": 0, "without the one before": 1, "without the 2nd before": 2, "without the 3rd before": 3}
MAX_LOGITS = 2**27  # of a batch of given chains


@dataclass(frozen=True)
class Setting:
    """What is steered, by how much, in which unit of the coefficient, and on which tasks.

    `base` is the condition that free-running chains with a vector added are compared with: "down", the vector taken
    away, or "unsteered". `given` are the chains that are read; without any, the model's own unsteered chains.
    """

    model: Any
    vectors: ls.BehaviorVectors
    layers: Mapping[str, int]
    coefficient: Mapping[str, float]
    tasks: list[ls.Task]
    sampling: Sampling
    annotator: Annotator = grammar
    unit: str = "difference"
    base: str = "down"
    given: Sequence[ls.Trace] = ()

    @property
    def kinds(self) -> list[str]:
        """The signs of the vector in free-running chains."""
        return [kind for kind in KINDS if kind in (self.base, "up")]

    def plan(self, behavior: str, kind: str, scope: ls.PositionScope) -> ls.SteeringPlan:
        """A behavior's vector, taken away ("down") or added ("up")."""
        coefficient = KINDS[kind] * self.coefficient[behavior]
        return ls.SteeringPlan(self.vectors[behavior], self.layers[behavior], coefficient, scope, unit=self.unit)


@dataclass(frozen=True)
class Cell:
    """One scope and behavior in one comparison. The first entry of `effect` is the data, the others resample tasks."""

    effect: Array
    kls: tuple[RolloutKL, ...]
    edited: float
    down: float
    up: float
    parsed: float = math.nan
    repetition: float = math.nan
    reached: bool = True


def sub_chains(model: Any, chains: Sequence[ls.Trace], behaviors: Sequence[str], n: int, size: int) -> list[ls.Trace]:
    """The first `size` tokens of `n` chains, after their questions in the model's own template.

    A file may lack the questions: a chain on the same task in another file gives them. The first file's chains are
    used, and of those the ones with the most sentences of the behaviors, where a rare behavior's sentence counts more.
    A chain without a question, or without a sentence of the behaviors, is not used.
    """
    asked = {chain.task.id: chain.task.prompt for chain in chains if chain.task.prompt}

    def first(chain: ls.Trace) -> bool:
        return not chain.sample and chain.task.id in asked and bool(chain.spans)

    found = [_sub_chain(model, chain, asked[chain.task.id], size) for chain in chains if first(chain)]
    counts = [Counter(span.label for span in chain.spans) for chain in found]
    total = sum(counts, Counter())
    worth = [sum(own[b] / total[b] for b in behaviors if own[b]) for own in counts]
    return [found[i] for i in sorted(range(len(found)), key=lambda i: -worth[i])[:n] if worth[i]]


def _sub_chain(model: Any, chain: ls.Trace, question: str, size: int) -> ls.Trace:
    """From a chain's first annotated token on, without the mark before it: the template writes its own."""
    prompt = ls.models.chat_text(model, question)
    ids, old = tuple(ls.models.encode(model, prompt)), chain.prompt_length
    begin = chain.spans[0].start - old
    end = min(begin + size, len(chain.response_ids))
    char = chain.offsets[begin]
    text = chain.response[char : chain.offsets[end] if end < len(chain.offsets) else None]
    moved, back = len(ids) - old - begin, -char
    spans = [
        replace(
            span,
            start=span.start + moved,
            end=span.end + moved,
            char_start=span.char_start + back,
            char_end=span.char_end + back,
        )
        for span in chain.spans
        if span.end - old <= end
    ]
    return replace(
        chain,
        prompt=prompt,
        prompt_ids=ids,
        response=text,
        response_ids=chain.response_ids[begin:end],
        offsets=tuple(offset - char for offset in chain.offsets[begin:end]),
        spans=tuple(spans),
        finished=False,
        opened=None,
    )


def whole_chains(at: Setting, scopes: Sequence[ls.PositionScope], chains: Sequence[ls.Trace]) -> Cases:
    """All of a behavior's sentences in each chain, at every scope and at the behavior's own spans."""
    own = {b: [[span for span in chain.spans if span.label == b] for chain in chains] for b in at.layers}
    cases = {(scope.name, b): [[(scope, spans)] for spans in own[b]] for scope in scopes for b in at.layers}
    cases |= {(OWN, b): [[(_around(spans), spans)] for spans in own[b]] for b in at.layers}
    if not at.given:
        return cases
    # Most given chains lack some behavior: they would only add to the KL.
    read = {key: [[case for case in some if case[1]] for some in by_chain] for key, by_chain in cases.items()}
    return {key: by_chain for key, by_chain in read.items() if any(by_chain)}


def _around(spans: Sequence[Span]) -> ls.PositionScope:
    """Spans of one chain, each with the token before it, whose logits predict its first token."""
    chosen = [p for span in spans for p in range(span.onset, span.end)]
    return ls.at(chosen) if chosen else ~ls.everywhere


def left_out(at: Setting, chains: Sequence[ls.Trace], most: int | None = None) -> Cases:
    """Each sentence of a behavior (at most so many), with all sentences steered, and with all but one."""
    cases: dict[tuple[str, str], list[list[Case]]] = {
        (name, b): [[] for _ in chains] for name in (WHOLE, *LEFT_OUT, FIRST) for b in at.layers
    }
    counts = Counter[str]()
    for number, chain in enumerate(chains):
        starts = [*(span.start for span in chain.spans), chain.spans[-1].end]
        every = set(range(starts[0], starts[-1]))
        for i, span in enumerate(chain.spans):
            if i < BEFORE or span.label not in at.layers or (most is not None and counts[span.label] >= most):
                continue
            counts[span.label] += 1
            kept = {name: every.difference(range(*starts[i - n : i - n + 2])) for name, n in LEFT_OUT.items()}
            kept |= {WHOLE: every, FIRST: every.difference(range(*starts[:2]))}
            for name, positions in kept.items():
                cases[name, span.label][number].append((ls.at(positions), [span]))
    return {key: by_chain for key, by_chain in cases.items() if any(by_chain)}


def forced(
    at: Setting, chains: Sequence[ls.Trace], cases: Cases, seed: int = 0, every: int = 1
) -> dict[tuple[str, str], Cell]:
    """Cells by scope and behavior. A chain's cases are resampled together. The KL is at one token of `every`."""
    plans = {
        (number, b, kind, scope): at.plan(b, kind, scope)
        for (_, b), by_chain in cases.items()
        for kind in KINDS
        for number, some in enumerate(by_chain)
        for scope, _ in some
    }
    found, n = _along(at.model, chains, plans, every), len(chains)
    draws = np.vstack([np.ones(n), np.random.default_rng(seed).multinomial(n, np.full(n, 1 / n), size=2000)])
    cells = {}
    for (name, b), by_chain in cases.items():
        listed = [(number, *case) for number, some in enumerate(by_chain) for case in some]
        n_read, log_p = np.zeros(n), {kind: np.zeros(n) for kind in KINDS}
        kls = {kind: [[torch.zeros(0, dtype=torch.float64)] for _ in chains] for kind in KINDS}
        for number, scope, spans in listed:
            n_read[number] += len(spans)
            for kind in KINDS:
                kl, said = found[number, b, kind, scope]
                kls[kind][number].append(kl)
                begin = chains[number].prompt_length
                log_p[kind][number] += sum(float(said[s.start - begin : s.end - begin].sum()) for s in spans)
        cells[name, b] = Cell(
            draws @ (log_p["up"] - log_p["down"]) / np.maximum(draws @ n_read, 1),  # no sentence of its own: no change
            tuple(RolloutKL(tuple(map(torch.cat, kls[kind]))) for kind in KINDS),
            edited(at, [chains[number] for number, *_ in listed], [scope for _, scope, _ in listed]),
            down=KINDS["down"] * at.coefficient[b],
            up=KINDS["up"] * at.coefficient[b],
        )
    return cells


def _along(
    model: Any, chains: Sequence[ls.Trace], plans: Mapping[Row, ls.SteeringPlan], every: int
) -> dict[Row, tuple[torch.Tensor, torch.Tensor]]:
    """KL(unsteered || steered) at one of `every` tokens of a response, and all log-probabilities when steered."""
    longest = max(len(chain.response_ids) for chain in chains)
    some_of = slice(every // 2, None, every)
    size, found = max(1, MAX_LOGITS // (longest * int(model.cfg.d_vocab))), {}
    for begin in range(0, len(chains), size):
        numbers = range(begin, min(begin + size, len(chains)))
        plain = dict(zip(numbers, _logits(model, [chains[number] for number in numbers]), strict=True))
        rows = [row for row in plans if row[0] in plain]
        for start in range(0, len(rows), len(plain)):
            some = rows[start : start + len(plain)]
            steered = _logits(model, [chains[row[0]] for row in some], [plans[row] for row in some])
            for row, q in zip(some, steered, strict=True):
                halves = zip(plain[row[0]][some_of].split(256), q[some_of].split(256), strict=True)
                said = torch.tensor(chains[row[0]].response_ids, device=q.device)[:, None]
                log_p = q.gather(1, said)[:, 0].float() - q.float().logsumexp(-1)
                found[row] = torch.cat([kl_divergence(p, part) for p, part in halves]).cpu(), log_p.cpu()
    return found


def _logits(
    model: Any, chains: Sequence[ls.Trace], plans: Sequence[ls.SteeringPlan] | None = None
) -> list[torch.Tensor]:
    return forced_logits(model, [c.prompt_ids for c in chains], [c.response_ids for c in chains], plans=plans)


def edited(at: Setting, chains: Sequence[ls.Trace], scopes: Sequence[ls.PositionScope]) -> float:
    """How many positions of a chain are chosen, on average."""
    table, none, total = ls.models.token_table(at.model), torch.zeros(1, dtype=torch.long), 0
    for chain, scope in zip(chains, scopes, strict=True):
        context = Context(torch.tensor([chain.ids]), none, torch.tensor([chain.prompt_length]), table)
        total += int(scope.mask(context).sum())
    return total / len(chains)

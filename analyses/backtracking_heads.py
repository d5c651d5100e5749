"""Which heads tell a backtracking sentence the node it returns to? Found by attention, tested by ablation.

The organism's grammar writes the chains, so the right node y of "Wait, x fails, back to y." is known; the model runs
under teacher forcing. On half of the chains every head is ranked by its attention from the position that predicts y to
the steps that left y ("By plan, y to x."), less its attention to wrong steps at the same distance in sentences. On the
other half the top heads are ablated (zero, mean), or only their attention to the right steps is knocked out, each
against the same number of random other heads; or their attention to this many wrong steps. Does this hurt the
prediction of y, and only that?

Example: python analyses/backtracking_heads.py --n 300 --json heads.json
"""

from __future__ import annotations

import argparse
import json
import random
import re
from bisect import bisect_right
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch

import lensteer as ls
from lensteer.attention import Head, ablated, forward_padded, knocked_out, mean_z, stream_attention
from lensteer.generation import Generated
from lensteer.generation.jobs import Job, trace_of
from lensteer.organism.grammar import ENDS, FAMILIES, LETTERS, THINK, Latent, make_world, render, write_chain
from lensteer.statistics import Estimate, Ratio, bootstrap_interval
from lensteer.traces import with_spans

NODE = re.compile(rf"\b(?:[{LETTERS}]|start|{'|'.join(ENDS)})\b")
KINDS = ("y", "node", "word")  # predictions: y of a backtracking sentence, other nodes of the chain, all other tokens


@dataclass(frozen=True)
class Config:
    """Model (None is the organism), chains, sizes of the sets of top heads, random sets of each size."""

    model: str | None = None
    n: int = 300
    sizes: tuple[int, ...] = (1, 2, 4)
    n_controls: int = 20
    batch_size: int = 25
    seed: int = 0


@dataclass(frozen=True)
class Return:
    """One backtracking sentence: its number, where y is predicted, and earlier steps that left y, or another node."""

    sentence: int
    position: int
    right: tuple[int, ...]
    wrong: tuple[int, ...]


@dataclass(frozen=True)
class Chain:
    """A chain, its returns, and the kind of prediction for every token from the first sentence on."""

    trace: ls.Trace
    returns: tuple[Return, ...]
    kinds: dict[int, str]


@dataclass(frozen=True)
class HeadScore:
    """A head on the ranking half: attention to right steps, and that less attention to wrong steps as far back."""

    layer: int
    head: int
    attention: float
    score: float
    low: float
    high: float


@dataclass(frozen=True)
class Effect:
    """The effect of ablating heads on the other half: changes of the mean log-probability in nats, by kind."""

    what: str
    heads: tuple[Head, ...]
    y: float
    y_low: float
    y_high: float
    node: float
    word: float
    right: float  # share of y that are still the top prediction
    right_low: float
    right_high: float
    against_random: str  # difference to the mean of the random sets, and how many of them do at least as much


@dataclass(frozen=True)
class Result:
    """All results; `n_returns` on the ranking half and on the other."""

    n_chains: tuple[int, int]
    n_returns: tuple[int, int]
    log_p: float
    right: float
    ranking: tuple[HeadScore, ...]
    effects: tuple[Effect, ...]


def write(model, n: int, seed: int) -> list[Chain]:
    """Chains of held-out worlds with at least one return to a node that a step had left."""
    chains: list[Chain] = []
    index = 0
    while len(chains) < n:
        rng = random.Random(f"backtracking-heads-{seed}-{index}")
        family, level = FAMILIES[index % 2], 2 + index // 2 % 2
        world, index = make_world(rng, family, level), index + 1
        text = render(write_chain(rng, world, Latent.draw(rng)), world.answer).removeprefix(THINK) + "<|im_end|>"
        task = ls.Task(f"{family}-{index:04d}", family, "test", world.prompt, world.answer, "exact")
        prompt = ls.models.chat_text(model, world.prompt)
        ids = tuple(ls.models.encode(model, prompt))
        trace = trace_of(model, Job(task, 0, prompt, ids), Generated(tuple(ls.models.encode(model, text)), True))
        chain = read(ls.annotate([trace], ls.grammar)[0])
        if chain.returns:
            chains.append(chain)
    return chains


def read(trace: ls.Trace) -> Chain:
    """Find returns, steps and nodes in an annotated chain."""
    said: list[list[tuple[str, int]]] = []  # per sentence: nodes and the positions of their tokens
    for span in trace.spans:
        found = NODE.finditer(trace.response, span.char_start, span.char_end)
        said.append([(m.group(), trace.prompt_length + bisect_right(trace.offsets, m.start()) - 1) for m in found])
    steps = [i for i, span in enumerate(trace.spans) if span.label == "deduction" and len(said[i]) == 2]
    kinds = {p: "word" for span in trace.spans for p in range(span.start, span.end)}
    kinds |= {p: "node" for nodes in said for _, p in nodes}
    returns = []
    for k, span in enumerate(trace.spans):
        if span.label != "backtracking":
            continue
        y, position = said[k][-1]  # in every form the node returned to comes last
        right = tuple(i for i in steps if i < k and said[i][0][0] == y)
        if right:
            kinds[position] = "y"
            wrong = tuple(i for i in steps if i < k and i not in right)
            returns.append(Return(k, position - 1, right, wrong))
        else:
            del kinds[position]  # a return to a node that no step had left: neither a case nor a control
    return Chain(trace, tuple(returns), kinds)


def rank(model, chains: Sequence[Chain], config: Config) -> list[HeadScore]:
    """Every head's attention to right steps less that to wrong steps at the same distance, best first."""
    asking = []
    for chain in chains:  # the library also takes a single query token as a sentence
        steps = sorted({i for r in chain.returns for i in (*r.right, *r.wrong)})
        spans = [chain.trace.spans[i] for i in steps]
        tokens = [ls.Span("backtracking", r.position, r.position + 1, 0, 1) for r in chain.returns]
        asking.append(with_spans(chain.trace, [*spans, *tokens], 0))
    found = dict(stream_attention(model, asking, lambda _, rows: rows, batch_size=config.batch_size))
    right: list[list[tuple[int, torch.Tensor]]] = []  # per chain: distance, [layer, head] attention
    by_distance: dict[int, list[torch.Tensor]] = {}
    for number, chain in enumerate(chains):
        steps = sorted({i for r in chain.returns for i in (*r.right, *r.wrong)})
        right.append([])
        for k, r in enumerate(chain.returns):
            row = found[number][:, :, len(steps) + k]
            for i in r.right:
                right[-1].append((r.sentence - i, row[..., steps.index(i)]))
            for i in r.wrong:
                by_distance.setdefault(r.sentence - i, []).append(row[..., steps.index(i)])
    expected = {d: torch.stack(rows).mean(0) for d, rows in by_distance.items()}
    zero = torch.zeros_like(next(iter(expected.values())))
    seen = np.stack([sum((row for _, row in own), zero).numpy() for own in right])
    beyond = np.stack([sum((row - expected.get(d, row) for d, row in own), zero).numpy() for own in right])
    cases = np.broadcast_to(np.array([len(chain.returns) for chain in chains])[:, None, None], beyond.shape)
    score = bootstrap_interval(Ratio(beyond, cases), seed=config.seed)
    mean = seen.sum(0) / cases.sum(0)
    heads = [
        HeadScore(layer, head, *(float(np.asarray(v)[layer, head]) for v in (mean, score.value, score.low, score.high)))
        for layer, head in np.ndindex(*mean.shape)
    ]
    return sorted(heads, key=lambda h: -h.score)


class Predictions:
    """Per chain and kind: Σ log-probability, tokens, and the number of y that are the top prediction."""

    def __init__(self, n: int) -> None:
        self.log_p = np.zeros((n, len(KINDS)))
        self.tokens = np.zeros((n, len(KINDS)))
        self.right = np.zeros(n)

    def mean(self, kind: str) -> float:
        """Mean log-probability of a kind, in nats."""
        k = KINDS.index(kind)
        return float(self.log_p[:, k].sum() / self.tokens[:, k].sum())


def predict(model, chains: Sequence[Chain], config: Config, taken_out=None) -> Predictions:
    """Read all chains; `taken_out(batch, width)` is a context in which heads are ablated."""
    found = Predictions(len(chains))
    for first in range(0, len(chains), config.batch_size):
        batch = chains[first : first + config.batch_size]
        width = max(len(chain.trace.ids) for chain in batch)
        context: AbstractContextManager = nullcontext() if taken_out is None else taken_out(batch, width)
        with context:
            log_p = forward_padded(model, [chain.trace for chain in batch]).log_softmax(-1)
        for row, chain in enumerate(batch):
            positions = torch.tensor(list(chain.kinds))
            kinds = np.array([KINDS.index(kind) for kind in chain.kinds.values()])
            said = torch.tensor(chain.trace.ids)[positions]
            before = log_p[row, positions - 1]
            values = before[torch.arange(len(said)), said].double().numpy()
            np.add.at(found.log_p[first + row], kinds, values)
            np.add.at(found.tokens[first + row], kinds, 1)
            hits = (before.argmax(-1) == said).numpy()
            found.right[first + row] = hits[kinds == KINDS.index("y")].sum()
    return found


def cut(batch: Sequence[Chain], width: int, right: bool) -> torch.Tensor:
    """From a backtracking sentence, up to where y is predicted, to the right steps, or to this many wrong ones.

    The wrong steps are those closest in distance to a right one; fewer if there are fewer.
    """
    mask = torch.zeros(len(batch), width, width, dtype=torch.bool)
    for row, chain in enumerate(batch):
        for r in chain.returns:
            steps = list(r.right)
            if not right:
                near = sorted(r.wrong, key=lambda i: min(abs(i - j) for j in r.right))
                steps = near[: len(steps)]
            for i in steps:
                span = chain.trace.spans[i]
                mask[row, chain.trace.spans[r.sentence].onset : r.position + 1, span.start : span.end] = True
    return mask


def effect(
    what: str, heads: Sequence[Head], base: Predictions, found: Predictions, randoms: Sequence[Predictions], seed: int
) -> Effect:
    """Changes with intervals over chains, paired; and against sets of random heads."""
    n = base.tokens[:, 0]

    def change(values: np.ndarray, minus: np.ndarray) -> Estimate:
        return bootstrap_interval(Ratio(values, n), Ratio(minus, n), seed=seed)

    y = change(found.log_p[:, 0], base.log_p[:, 0])
    right = bootstrap_interval(Ratio(found.right, n), seed=seed)
    against = ""
    if randoms:
        beyond = change(found.log_p[:, 0], np.mean([r.log_p[:, 0] for r in randoms], axis=0))
        drops = [r.mean("y") - base.mean("y") for r in randoms]
        special = [d - (r.mean("node") - base.mean("node")) for d, r in zip(drops, randoms, strict=True)]
        own = y.value - (found.mean("node") - base.mean("node"))
        against = (
            f"{beyond:+.3f} relative to their mean; "
            f"{sum(d <= y.value for d in drops)} of {len(drops)} reduce y as much, "
            f"{sum(s <= own for s in special)} as much relative to other nodes"
        )
    return Effect(
        what,
        tuple(heads),
        y=y.value,
        y_low=y.low,
        y_high=y.high,
        node=found.mean("node") - base.mean("node"),
        word=found.mean("word") - base.mean("word"),
        right=right.value,
        right_low=right.low,
        right_high=right.high,
        against_random=against,
    )


def main(config: Config) -> Result:
    """Rank on one half, test on the other."""
    model = ls.load_model(config.model)
    chains = write(model, config.n, config.seed)
    first, second = (  # sorted by length, for less padding
        sorted(half, key=lambda c: len(c.trace.ids)) for half in (chains[: config.n // 2], chains[config.n // 2 :])
    )
    ranking = rank(model, first, config)
    means = mean_z(model, [chain.trace for chain in first], batch_size=config.batch_size)
    base = predict(model, second, config)
    effects = []
    everything = [(h.layer, h.head) for h in ranking]
    for size in config.sizes:
        top = everything[:size]
        rng = random.Random(f"{config.seed}-{size}")
        sets = [rng.sample(everything[size:], size) for _ in range(config.n_controls)]
        for how, values in (("zero", None), ("mean", means)):
            found, *randoms = (
                predict(model, second, config, lambda *_, h=heads, v=values: ablated(model, h, v))
                for heads in (top, *sets)
            )
            effects.append(effect(f"{how} ablation of the top {size}", top, base, found, randoms, config.seed))
        for right in (True, False):
            found, *randoms = (
                predict(model, second, config, lambda b, w, h=heads, r=right: knocked_out(model, h, cut(b, w, r)))
                for heads in (top, *(sets if right else ()))
            )
            steps = "right" if right else "as many wrong"
            effects.append(effect(f"top {size} cut from {steps} steps", top, base, found, randoms, config.seed))
    for right in (True, False):
        found = predict(model, second, config, lambda b, w, r=right: knocked_out(model, everything, cut(b, w, r)))
        steps = "right" if right else "as many wrong"
        effects.append(effect(f"all heads cut from {steps} steps", everything, base, found, [], config.seed))
    n_returns = [sum(len(chain.returns) for chain in half) for half in (first, second)]
    return Result(
        (len(first), len(second)),
        (n_returns[0], n_returns[1]),
        base.mean("y"),
        float(base.right.sum() / base.tokens[:, 0].sum()),
        tuple(ranking),
        tuple(effects),
    )


def table(result: Result) -> str:
    """The ranking's top and every effect, as text."""
    lines = [
        f"{result.n_chains[0]} + {result.n_chains[1]} chains, {result.n_returns[0]} + {result.n_returns[1]} returns; "
        f"unablated: y is the top prediction in {result.right:.3f}, log p {result.log_p:.3f}",
        "head | attention to right steps | less attention to wrong steps as far back",
        "---|---|---",
    ]
    for h in result.ranking[:10]:
        lines.append(f"L{h.layer}H{h.head} | {h.attention:.3f} | {h.score:+.3f} [{h.low:+.3f}, {h.high:+.3f}]")
    lines += ["", "what | y, nats | other nodes | other tokens | y right | random sets", "---|---|---|---|---|---"]
    for e in result.effects:
        lines.append(
            f"{e.what} | {e.y:+.3f} [{e.y_low:+.3f}, {e.y_high:+.3f}] | {e.node:+.3f} | {e.word:+.3f} | "
            f"{e.right:.3f} [{e.right_low:.3f}, {e.right_high:.3f}] | {e.against_random}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--n", type=int, default=300)
    parser.add_argument("--sizes", type=int, nargs="+", default=list(Config.sizes))
    parser.add_argument("--n-controls", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    given["sizes"] = tuple(given["sizes"])
    result = main(Config(**given))
    print(table(result))
    if out:
        out.write_text(json.dumps(asdict(result), indent=1))

"""What of R1-1.5B's geometry of behaviors carries over to 135 M, and do backtracking sentences look at what they undo?

Geometry: vectors of six behaviors are fitted on mini-R1 and on its base from the same annotated chains: cosines between
the behaviors beside those of R1-Distill-Qwen-1.5B's published mean activations, norms, overlap with the embedding, and
cosines between layers. The rank correlation of two cosine matrices is tested by permuting the behaviors, and compared
with that of vectors from labels shuffled within each chain.

Attention: from the first tokens of a backtracking sentence to earlier deductions, beside that from deductions. The
expectation is the same head's mean over all sentences whose deduction is as many tokens back, as long, as far into the
chain, and does or does not share a rare word. Heads are chosen on half of the questions, tested on the other.

Example: LENSTEER_REFERENCE=folder python analyses/geometry_on_language.py --model mini-r1 --base smollm2 --out folder
(both models as folders; finished vectors in --out are not fitted again)
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations, permutations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from safetensors import safe_open
from scipy.stats import spearmanr
from sklearn.feature_extraction.text import ENGLISH_STOP_WORDS

import lensteer as ls
from lensteer.attention import stream_attention
from lensteer.pipeline import read_chains
from lensteer.plots import style
from lensteer.statistics import Ratio, bootstrap_interval, holm, sign_flip_test
from lensteer.traces import Trace, with_spans
from lensteer.vectors import BehaviorVectors, Recipe, fit_recipes
from lensteer.vectors.constructions import isotropic
from lensteer.vectors.geometry import cosine_matrix, disattenuated_cosines

R1_LAYERS = {"backtracking": 17, "uncertainty-estimation": 18, "example-testing": 15, "adding-knowledge": 18}
R1_MIDDLE = 17  # of the behaviors without a published layer
RARE = 4  # a word in no more sentences of its chain
RECIPES = (Recipe("span", "all"), Recipe("published", "all"), Recipe("published", "spans"))


@dataclass(frozen=True)
class Config:
    """Models, chains and published means (in `reference`), layer of the cosines, and sizes."""

    model: str
    base: str
    out: Path
    reference: Path
    chains: tuple[str, ...] = ("r1_*_annotated_chains.jsonl",)
    layer: int = 15
    max_tokens: int = 800
    n_bootstrap: int = 100
    n_controls: int = 20
    n_overlap: int = 30
    attention_tokens: int = 600
    head_tokens: int = 10
    n_heads: int = 5
    halves: bool = False
    seed: int = 0


def cut(trace: Trace, n: int) -> Trace:
    """The trace's first `n` response tokens, with the sentences that end in them."""
    if len(trace.response_ids) <= n:
        return trace
    short = replace(
        trace,
        response=trace.response[: trace.offsets[n]],
        response_ids=trace.response_ids[:n],
        offsets=trace.offsets[:n],
        finished=False,
        spans=(),
    )
    return with_spans(short, [s for s in trace.spans if s.end <= len(short.ids)], 0)


def fitted(model: Any, traces: Sequence[Trace], out: Path, name: str, **options: Any) -> list[BehaviorVectors]:
    """Vectors by every recipe, read from files if they were fitted before."""
    paths = [out / f"{name}-{recipe.window}-{recipe.negatives}.safetensors" for recipe in RECIPES]
    if not all(path.exists() for path in paths):
        for path, vectors in zip(paths, fit_recipes(model, traces, RECIPES, **options), strict=True):
            vectors.save(path)
    return [BehaviorVectors.load(path, model) for path in paths]


def published(config: Config) -> dict[str, BehaviorVectors]:
    """R1-1.5B's vectors from its mean activations, by negatives ("spans": the mean over all spans)."""
    with safe_open(str(config.reference / "r1_qwen_1.5b_mean_activations.safetensors"), "pt") as file:
        overall = file.get_tensor("overall")
        means = {label: file.get_tensor(label) for label in ls.BEHAVIORS}
        counts = {label: json.loads(file.metadata()["counts"])[label] for label in means}
    center = sum(counts[label] * mean.double() for label, mean in means.items()) / sum(counts.values())
    return {
        name: BehaviorVectors.from_means(means, minus, counts=counts)
        for name, minus in (("all", overall), ("spans", torch.as_tensor(center).float()))
    }


def put(found: dict[str, Any], key: str, value: Any, draws: Any = None) -> None:
    """Add a figure, or one per layer, and the ends of its 95 % interval over resampled chains."""
    ends = [] if draws is None else np.quantile(np.asarray(draws), (0.025, 0.975), axis=0)
    for name, each in zip((key, f"{key}.low", f"{key}.high"), (value, *ends), strict=False):
        found[name] = np.asarray(each, dtype=float).round(4).tolist()


def redrawn(vectors: BehaviorVectors, raw: Any) -> list[BehaviorVectors]:
    """The same with other vectors: replicates, or those of shuffled labels."""
    return [replace(vectors, raw=each, replicates=None, controls=None) for each in raw]


def matrix(vectors: BehaviorVectors, layers: int | Mapping[str, int]) -> np.ndarray:
    """Cosines between behaviors."""
    return cosine_matrix(
        vectors, layers, default=max(layers.values()) if isinstance(layers, dict) else None
    ).values.numpy()


def rank_correlation(one: np.ndarray, other: np.ndarray) -> float:
    """Spearman's correlation between the entries of two matrices above the diagonal."""
    above = np.triu_indices(len(one), 1)
    return float(spearmanr(one[above], other[above]).statistic)


def mantel(one: np.ndarray, other: np.ndarray) -> float:
    """The share of all permutations of one side's behaviors with at least this rank correlation."""
    orders = [list(order) for order in permutations(range(len(one)))]
    own = rank_correlation(one, other)
    return float(np.mean([rank_correlation(one[order][:, order], other) >= own - 1e-9 for order in orders]))


def scaled(layer: int, n_layers: int, of: int) -> int:
    """The layer of a model with `n_layers` at the relative depth of a layer of a model with `of` layers."""
    return round((layer + 1) / of * n_layers) - 1


def disattenuated(model: Any, traces: Sequence[Trace], config: Config) -> dict[str, Any]:
    """Cosines between behaviors, corrected for noise by vectors from two halves of the questions."""
    found: dict[str, Any] = {}
    questions, halves = sorted({trace.task.id for trace in traces}), []
    for half in (0, 1):
        part = [trace for trace in traces if questions.index(trace.task.id) % 2 == half]
        halves.append(fitted(model, part, config.out, f"half-{half}", layers=[config.layer])[1])
    first, second = halves
    corrected = disattenuated_cosines(first, second, config.layer)
    for one, other in combinations(corrected.labels, 2):
        put(found, f"cosine.all.{one}.{other}.mini_r1.disattenuated", corrected.at(one, other))
    return found


def between_layers(raw: torch.Tensor) -> torch.Tensor:
    """Cosines between the vectors of all pairs of layers, for each behavior (and replicate)."""
    unit = torch.nn.functional.normalize(raw.double(), dim=-1)
    return unit @ unit.mT


def between_behaviors(
    own: dict[str, list[BehaviorVectors]], r1: dict[str, BehaviorVectors], config: Config
) -> dict[str, Any]:
    """Cosines between behaviors, their rank correlation with R1-1.5B's, and each vector's cosine with the base's."""
    found: dict[str, Any] = {}
    n_layers, of = len(own["mini_r1"][0].layers), len(r1["all"].layers)
    theirs = {name: matrix(vectors, R1_LAYERS) for name, vectors in r1.items()}
    deep = {label: scaled(R1_LAYERS.get(label, R1_MIDDLE), n_layers, of) for label in ls.BEHAVIORS}
    for name, recipes in own.items():
        for vectors in recipes:
            kind = f"{vectors.recipe.window}-{vectors.recipe.negatives}"
            assert vectors.replicates is not None
            assert vectors.controls is not None
            for place, at in (("middle", config.layer), ("same_depth", deep)):
                if name == "base" and place != "middle":
                    continue
                cosines, other = matrix(vectors, at), theirs[vectors.recipe.negatives]
                draws = [matrix(each, at) for each in redrawn(vectors, vectors.replicates)]
                random = [matrix(each, at) for each in redrawn(vectors, vectors.controls.shuffled)]
                key = f"rank_correlation.{name}.{kind}.{place}"
                put(found, key, rank_correlation(cosines, other), [rank_correlation(d, other) for d in draws])
                found[f"{key}.p"] = mantel(cosines, other)
                put(found, f"{key}.shuffled", np.sort([rank_correlation(each, other) for each in random])[[0, -1]])
                if place == "middle" and vectors.recipe.window == "published":
                    for i, j in combinations(range(len(cosines)), 2):
                        pair = f"{vectors.labels[i]}.{vectors.labels[j]}"
                        path = f"cosine.{vectors.recipe.negatives}.{pair}"
                        put(found, f"{path}.{name}", cosines[i, j], [draw[i, j] for draw in draws])
                        put(found, f"{path}.r1_1.5b", other[i, j])
                        put(found, f"{path}.{name}.shuffled", np.mean([each[i, j] for each in random]))
            if name == "mini_r1" and kind == "published-all":
                every = [rank_correlation(matrix(vectors, layer), theirs["all"]) for layer in vectors.layers]
                put(found, f"rank_correlation.{name}.{kind}.by_layer", every)
    for taught, base in zip(own["mini_r1"], own["base"], strict=True):
        kind = f"{taught.recipe.window}-{taught.recipe.negatives}"
        both = rank_correlation(*(matrix(vectors, config.layer) for vectors in (taught, base)))
        put(found, f"rank_correlation.mini_r1.base.{kind}", both)
        assert taught.replicates is not None
        assert base.replicates is not None
        assert taught.controls is not None
        assert base.controls is not None
        same = min(len(taught.replicates), len(base.replicates))  # the same chains were drawn
        i, j = (vectors.layers.index(config.layer) for vectors in (taught, base))
        for b, label in enumerate(taught.labels):
            value, drawn, shuffled = (
                torch.cosine_similarity(x.double(), y.double(), dim=-1).numpy()
                for x, y in (
                    (taught.raw[b, i], base.raw[b, j]),
                    (taught.replicates[:same, b, i], base.replicates[:same, b, j]),
                    (taught.controls.shuffled[:, b, i], base.controls.shuffled[:, b, j]),
                )
            )
            put(found, f"cosine_with_base.{kind}.{label}", value, drawn)
            put(found, f"cosine_with_base.{kind}.{label}.shuffled", shuffled.mean())
    return found


def by_layer(model: Any, vectors: BehaviorVectors, r1: BehaviorVectors, config: Config) -> dict[str, Any]:
    """Norms, overlap with the embedding, and cosines between layers."""
    found: dict[str, Any] = {}
    assert vectors.replicates is not None
    for name, each, draws in (("mini_r1", vectors, vectors.replicates), ("r1_1.5b", r1, None)):
        last = len(each.layers) - 1
        low, high = round(last / 4), round(3 * last / 4)
        angles, drawn = between_layers(each.raw), None if draws is None else between_layers(draws)
        for b, label in enumerate(each.labels):
            ratio = each.raw[b].norm(dim=-1) / each.mean_norm
            put(
                found,
                f"norm.{label}.{name}",
                ratio,
                None if draws is None else draws[:, b].norm(dim=-1) / each.mean_norm,
            )
            near = angles[b].diagonal(1)
            near_drawn = None if drawn is None else drawn[:, b].diagonal(1, -2, -1)
            put(found, f"neighbors.{label}.{name}", near.mean(), None if near_drawn is None else near_drawn.mean(-1))
            put(found, f"neighbors.{label}.{name}.least", near.min())
            found[f"neighbors.{label}.{name}.least_at"] = int(near.argmin()) + 1
            far = None if drawn is None else drawn[:, b, low, high]
            put(found, f"quarter_to_three_quarters.{label}.{name}", angles[b, low, high], far)
        frame = each.to_dataframe().set_index(["behavior", "layer"])
        middle = R1_MIDDLE if name == "r1_1.5b" else config.layer
        for label in ls.STEERED:
            put(found, f"top3_energy.{label}.{name}", frame.top3_energy[label, middle])
    overlap = ls.embedding_overlap(model, vectors)
    overlaps = [ls.embedding_overlap(model, v, 1) for v in redrawn(vectors, vectors.replicates[: config.n_overlap])]
    noise = isotropic(*vectors.raw.shape, seed=config.seed).float()
    (isotropic_vectors,) = redrawn(vectors, [noise])
    random = ls.embedding_overlap(model, isotropic_vectors, 1)
    put(found, "overlap.random", random.embedding.maximum.mean(0))
    for b, label in enumerate(vectors.labels):
        for side in ("embedding", "unembedding"):
            maxima = [getattr(each, side).maximum[b].numpy() for each in overlaps]
            put(found, f"overlap.{label}.{side}", getattr(overlap, side).maximum[b], maxima)
        found[f"overlap.{label}.leading_layers"] = overlap.leading_layers()[label]
        found[f"overlap.{label}.tokens"] = [text for text, _ in overlap.nearest(label, config.layer, "unembedding")]
    return found


ASKERS = ("backtracking", "deduction", "others")  # of the sentences that attend
KINDS = ("before", "shared", "unshared")  # the sentence just before; an earlier one, with or without a shared rare word
MEASURES = ("attention", "share")  # per token of the earlier sentence; relative to that on all earlier sentences
GAPS, LENGTHS, PLACES = (0, 4, 12, 24, 48, 96, 192, 384), (0, 8, 12, 16, 24, 32, 48), (0, 100, 200, 400)
N_GROUPS, N_CELLS = len(ASKERS) * len(KINDS), 2 * len(GAPS) * len(LENGTHS) * len(PLACES)
WORD = re.compile(r"\d[\d.,/]*\d|\d|[a-z]{4,}")


@dataclass(frozen=True)
class Pairs:
    """Sentences of one chain in two pieces, and pairs of a sentence with an earlier deduction."""

    pieces: tuple[ls.Span, ...]
    owner: torch.Tensor  # sentence of each piece
    first: torch.Tensor  # first piece of each sentence
    lengths: torch.Tensor
    later: torch.Tensor
    earlier: torch.Tensor
    group: torch.Tensor  # asker and kind
    cell: torch.Tensor  # place, and whether a rare word is shared


def pairs_of(trace: Trace, n: int) -> Pairs:
    """Pairs whose later sentence has `n` tokens or more: only these tokens attend, at a known distance."""
    pieces, owner, first = [], [], []
    for i, span in enumerate(trace.spans):
        first.append(len(pieces))
        middle = min(span.start + n, span.end)
        for start, end in ((span.start, middle), (middle, span.end)):
            if start < end:
                pieces.append(ls.Span(span.label, start, end, 0, 1))
                owner.append(i)
    begins = [trace.response[s.char_start : _character(trace, s.start + n, s.char_end)] for s in trace.spans]
    texts = [trace.response[s.char_start : s.char_end] for s in trace.spans]
    words, heads = ([set(WORD.findall(text.lower())) - ENGLISH_STOP_WORDS for text in part] for part in (texts, begins))
    n_sentences = Counter(word for sentence in words for word in sentence)
    rows = []
    for i, asking in enumerate(trace.spans):
        if asking.end - asking.start < n:
            continue
        asker = ASKERS.index(asking.label) if asking.label in ASKERS else 2
        for j, key in enumerate(trace.spans[:i]):
            if key.label != "deduction":
                continue
            gap = asking.start - key.end
            shared = any(n_sentences[word] <= RARE for word in heads[i] & words[j])
            kind = 0 if j == i - 1 and gap < GAPS[1] else 1 if shared else 2
            place = np.ravel_multi_index(
                [
                    np.searchsorted(bins, value, "right") - 1
                    for bins, value in (
                        (GAPS, gap),
                        (LENGTHS, key.end - key.start),
                        (PLACES, asking.start - trace.prompt_length),
                    )
                ],
                (len(GAPS), len(LENGTHS), len(PLACES)),
            )
            rows.append((i, j, asker * len(KINDS) + kind, 2 * int(place) + shared))
    columns = torch.tensor(rows, dtype=torch.long).view(len(rows), 4).T
    lengths = torch.tensor([span.end - span.start for span in trace.spans])
    return Pairs(tuple(pieces), torch.tensor(owner), torch.tensor(first), lengths, *columns)


def _character(trace: Trace, position: int, end: int) -> int:
    at = position - trace.prompt_length
    return min(end, trace.offsets[at]) if at < len(trace.offsets) else end


@dataclass(frozen=True)
class Looks:
    """Attention per chain, head, measure and group of pairs: seen, expected, and expected without shared words."""

    seen: np.ndarray  # [chain, layer, head, measure, group]
    expected: np.ndarray
    unshared: np.ndarray
    counts: np.ndarray  # [chain, group]


def looks(model: Any, traces: Sequence[Trace], config: Config) -> Looks:
    """Attention to earlier deductions, read from a file if it was measured before."""
    path = config.out / "attention.npz"
    if path.exists():
        return Looks(**np.load(path))
    pairs = {trace.id: pairs_of(trace, config.head_tokens) for trace in traces}

    def reduce(trace: Trace, rows: torch.Tensor) -> torch.Tensor:
        p = pairs[trace.id]
        member = torch.nn.functional.one_hot(p.owner, len(p.lengths)).to(rows)
        mass = rows[:, p.first, : len(p.pieces)] @ member
        among = mass / mass.tril(-1).sum(-1, keepdim=True).clamp_min(1e-9)
        seen = (torch.stack([mass, among], 1) / p.lengths.to(rows))[..., p.later, p.earlier]
        sums = rows.new_zeros(len(rows), len(MEASURES), N_GROUPS + N_CELLS)
        return sums.index_add_(2, p.group, seen).index_add_(2, N_GROUPS + p.cell, seen)

    asking = [with_spans(trace, pairs[trace.id].pieces, 0) for trace in traces]
    sums = [kept for _, kept in sorted(stream_attention(model, asking, reduce, batch_size=4))]
    counts = torch.stack(
        [
            torch.bincount(p.group * N_CELLS + p.cell, minlength=N_GROUPS * N_CELLS).view(N_GROUPS, N_CELLS).double()
            for p in pairs.values()
        ]
    )
    seen, by_cell = torch.stack(sums).double().split((N_GROUPS, N_CELLS), dim=-1)
    mean = by_cell.sum(0) / counts.sum((0, 1)).clamp_min(1)
    plain = mean.unflatten(-1, (-1, 2))[..., :1].expand(*mean.shape[:-1], -1, 2).flatten(-2)
    expected, unshared = (torch.einsum("tgc,lhmc->tlhmg", counts, each).numpy() for each in (mean, plain))
    found = Looks(seen.numpy(), expected, unshared, counts.sum(-1).numpy())
    np.savez(path, **vars(found))
    return found


def group(asker: str, kind: str) -> int:
    """Index of a group of pairs."""
    return ASKERS.index(asker) * len(KINDS) + KINDS.index(kind)


def attention(each: Looks, traces: Sequence[Trace], config: Config) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures over all heads and for chosen heads; and each head's difference on both halves, by kind."""
    questions = sorted({trace.task.id for trace in traces})
    half = np.array([questions.index(trace.task.id) % 2 for trace in traces])
    figures: dict[str, Any] = {"attention.chains": len(traces)}
    heads: dict[str, Any] = {}
    for kind in KINDS:
        groups = {asker: group(asker, kind) for asker in ASKERS[:2]}
        for m, measure in enumerate(MEASURES):
            key, seen, expected = f"attention.{measure}.{kind}", each.seen[..., m, :], each.expected[..., m, :]
            every = {a: Ratio(seen[..., g].sum((1, 2)), expected[..., g].sum((1, 2))) for a, g in groups.items()}
            for asker, ratio in every.items():
                estimate(figures, f"{key}.{asker}", bootstrap_interval(ratio, seed=config.seed))
                figures[f"attention.pairs.{kind}.{asker}"] = int(each.counts[:, groups[asker]].sum())
            estimate(figures, f"{key}.difference", bootstrap_interval(*every.values(), seed=config.seed))
            figures[f"{key}.difference.p"] = sign_flip_test(*every.values(), seed=config.seed)
            if kind == "shared":  # the positive control: do shared words draw attention at all?
                g = groups["deduction"]
                drawn = Ratio(seen[..., g].sum((1, 2)), each.unshared[..., m, g].sum((1, 2)))
                estimate(figures, f"{key}.beside_unshared", bootstrap_interval(drawn, seed=config.seed))
        first, second = (
            [Ratio(each.seen[half == h][..., 0, g], each.expected[half == h][..., 0, g]) for g in groups.values()]
            for h in (0, 1)
        )
        ranked: Any
        tested: Any
        ranked, tested = (bootstrap_interval(*sides, seed=config.seed) for sides in (first, second))
        heads[kind] = (ranked.value, tested.value)
        key, both = f"attention.heads.{kind}", np.isfinite(ranked.value) & np.isfinite(tested.value)
        put(figures, f"{key}.between_halves", spearmanr(ranked.value[both], tested.value[both]).statistic)
        top = np.argsort(-np.nan_to_num(ranked.low, nan=-np.inf), axis=None)[: config.n_heads]
        p_values = []
        for rank, (layer, head) in enumerate(zip(*np.unravel_index(top, ranked.value.shape), strict=True)):
            sides = [Ratio(side.values[:, layer, head], side.weights[:, layer, head]) for side in second]
            figures[f"{key}.{rank}.head"] = f"L{layer}H{head}"
            figures[f"{key}.{rank}.chosen_at"] = round(float(ranked.value[layer, head]), 4)
            estimate(figures, f"{key}.{rank}", bootstrap_interval(*sides, seed=config.seed))
            p_values.append(sign_flip_test(*sides, seed=config.seed))
        figures |= {f"{key}.{rank}.p_holm": round(p, 4) for rank, p in enumerate(holm(p_values))}
    return figures, heads


def estimate(found: dict[str, Any], key: str, value: Any) -> None:
    """Add an estimate and the ends of its interval."""
    for name, each in ((key, value.value), (f"{key}.low", value.low), (f"{key}.high", value.high)):
        found[name] = round(float(each), 4)


@dataclass(frozen=True)
class Result:
    """Flat figures, and what only the figure shows: vectors, and each head's difference on both halves."""

    figures: dict[str, Any]
    own: dict[str, list[BehaviorVectors]]
    r1: dict[str, BehaviorVectors]
    heads: dict[str, Any]


def main(config: Config) -> Result:
    """Vectors of both models, then attention."""
    config.out.mkdir(parents=True, exist_ok=True)
    model = ls.load_model(config.model, dtype=torch.bfloat16)
    paths = sorted(path for pattern in config.chains for path in config.reference.glob(pattern))
    traces = [cut(trace, config.max_tokens) for trace in read_chains(paths, model)]
    traces = [trace for trace in traces if trace.spans]
    figures: dict[str, Any] = {"chains": len(traces), "tokens": sum(len(trace.ids) for trace in traces)}
    base = ls.load_model(config.base, dtype=torch.bfloat16)  # reads mini-R1's tokens
    options: dict[str, Any] = dict(n_bootstrap=config.n_bootstrap, n_controls=config.n_controls, seed=config.seed)
    own = {
        "mini_r1": fitted(model, traces, config.out, "mini_r1", **options),
        "base": fitted(base, traces, config.out, "base", layers=[config.layer], **options),
    }
    r1 = published(config)
    figures |= {f"spans.{label}": n for label, n in own["mini_r1"][0].counts.items()}
    figures |= between_behaviors(own, r1, config)
    figures |= by_layer(model, own["mini_r1"][1], r1["all"], config)
    short = [cut(trace, config.attention_tokens) for trace in traces]
    asking = [trace for trace in short if any(span.label == "backtracking" for span in trace.spans[1:])]
    more, heads = attention(looks(model, asking, config), asking, config)
    if config.halves:
        figures |= disattenuated(model, traces, config)
    return Result(figures | more, own, r1, heads)


def draw(result: Result, layer: int) -> go.Figure:
    """Cosines, norms, overlap, layers and attention, mini-R1 on the left or in full lines."""
    f, mini, r1 = result.figures, result.own["mini_r1"][1], result.r1["all"]
    titles = (
        f"cosines, mini-R1, layer {layer}",
        "cosines, R1-1.5B, published layers",
        "norm / mean activation (dotted: R1-1.5B)",
        "overlap with embedding, mini-R1",
        "backtracking between layers, mini-R1",
        "backtracking between layers, R1-1.5B",
        "attention to a deduction (1: expected)",
        "backtracking less deduction, by head",
    )
    figure = make_subplots(rows=4, cols=2, subplot_titles=titles, vertical_spacing=0.075, horizontal_spacing=0.14)
    cells = dict(colorscale=style.DIVERGING, zmin=-1, zmax=1, showscale=False)
    for column, (vectors, at) in enumerate(((mini, layer), (r1, R1_LAYERS)), 1):
        z = matrix(vectors, at)  # type: ignore[arg-type]  # a layer, or one each
        tags = [style.TAGS.get(label, label) for label in vectors.labels]
        text = [[style.in_cell(style.number(v), v) for v in row] for row in z]
        heat = go.Heatmap(z=z, x=tags, y=tags, text=text, texttemplate="%{text}", textfont=style.CELL_FONT, **cells)
        figure.add_trace(heat, row=1, col=column)
        b = vectors.labels.index("backtracking")
        figure.add_trace(go.Heatmap(z=between_layers(vectors.raw)[b].numpy(), **cells), row=3, col=column)
    figure.update_yaxes(autorange="reversed", row=1)
    for label in ls.STEERED:
        for name, dash in (("mini_r1", "solid"), ("r1_1.5b", "dot")):
            depth, key = depth_of(mini if name == "mini_r1" else r1), f"norm.{label}.{name}"
            line = go.Scatter(
                x=depth, y=f[key], mode="lines", name=label, line=dict(color=style.color(label), dash=dash)
            )
            figure.add_trace(line.update(legendgroup=label, showlegend=dash == "solid"), row=2, col=1)
            if name == "mini_r1":
                figure.add_trace(style.band(label, depth, f[f"{key}.low"], f[f"{key}.high"]), row=2, col=1)
                key = f"overlap.{label}.embedding"
                line = go.Scatter(
                    x=depth, y=f[key], mode="lines", line=dict(color=style.color(label)), showlegend=False
                )
                figure.add_trace(line, row=2, col=2)
                figure.add_trace(style.band(label, depth, f[f"{key}.low"], f[f"{key}.high"]), row=2, col=2)
    random = go.Scatter(x=depth_of(mini), y=f["overlap.random"], mode="lines", name="random directions")
    figure.add_trace(random.update(line=dict(color=style.MUTED, dash="dash")), row=2, col=2)
    figure.update_xaxes(title_text="relative depth", row=2)
    figure.update_xaxes(title_text="layer", row=3)
    for asker, shift in (("backtracking", -0.12), ("deduction", 0.12)):
        keys = [f"attention.attention.{kind}.{asker}" for kind in KINDS]
        y, low, high = ([f[f"{key}{end}"] for key in keys] for end in ("", ".low", ".high"))
        x = [i + shift for i in range(len(KINDS))]
        points = go.Scatter(x=x, y=y, error_y=style.error_bars(y, low, high), mode="markers", name=asker)
        points.update(marker=dict(color=style.color(asker), symbol=style.marker(asker), size=9), legendgroup=asker)
        figure.add_trace(points.update(showlegend=asker not in ls.STEERED), row=4, col=1)
    figure.update_xaxes(
        tickvals=[0, 1, 2], ticktext=["just before", "shared<br>word", "no shared<br>word"], row=4, col=1
    )
    first, second = (np.ravel(each) for each in result.heads["shared"])
    dots = go.Scatter(x=first, y=second, mode="markers", marker=dict(size=4, color=style.MUTED), showlegend=False)
    figure.add_trace(dots, row=4, col=2)
    figure.update_xaxes(title_text="shared word, half of the questions", row=4, col=2)
    figure.update_yaxes(title_text="other half", row=4, col=2)
    figure.update_annotations(font_size=13)
    return style.finish(figure, "Geometry and attention of mini-R1 (135 M) beside R1-1.5B", 1300)


def depth_of(vectors: BehaviorVectors) -> list[float]:
    """Relative depth of each layer."""
    return [(i + 1) / len(vectors.layers) for i in range(len(vectors.layers))]


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base", required=True)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--reference", type=Path, default=os.environ.get("LENSTEER_REFERENCE"))
    parser.add_argument("--layer", type=int, default=Config.layer)
    parser.add_argument("--halves", action="store_true", help="also cosines corrected for noise")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = vars(parser.parse_args())
    written, image = given.pop("json"), given.pop("figure")
    if given["reference"] is None:
        parser.error("give --reference, or set LENSTEER_REFERENCE, to the folder with the published files")
    result = main(Config(**given))
    print(json.dumps(result.figures, indent=1))
    if written:
        written.write_text(json.dumps(result.figures, indent=1) + "\n")
    if image:
        draw(result, given["layer"]).write_image(image, width=700, scale=2)

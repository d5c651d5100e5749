"""How many annotated chains does a behavior's vector need, and is it more than what shuffled labels would give?

From a run's annotated chains, one forward pass per chain: the vector of n chains drawn at random is compared with that
of all chains, for growing n; vectors of two random halves of the chains with each other; and vectors of resampled
chains with that of all. Beside each are vectors of the same recipe from labels that were shuffled among the sentences
of each chain: they share what sentences have in common, whatever their labels. What is left of a vector after their
mean is subtracted is its own part, and is compared between halves, too. Nothing is generated. Intervals are the middle
95 % over draws of chains (of halves and of shuffles).

Example: python analyses/vector_stability.py --run RUN-FOLDER --json FILE --figure FILE.png
(the folder of a finished `lensteer run` or `lensteer demo`; 20 seconds for the organism's 150 chains, some minutes for
`--n-chains 200` of mini-R1; the activations of sentences are kept in the run's folder)
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import command
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

import lensteer as ls
from lensteer import models
from lensteer.activations import TraceFeatures, stream_features
from lensteer.attribution.selection import SelectedLayers
from lensteer.files import read_tensors, write_tensors
from lensteer.pipeline.run import Run
from lensteer.plots.style import INK, MUTED, band, curve, finish
from lensteer.statistics import Estimate, drawn_counts, estimate_in, flat, percentile_interval
from lensteer.traces import label_axis, load_traces
from lensteer.vectors import BehaviorVectors, Recipe
from lensteer.vectors.constructions import contrast_weights, label_sides

QUESTION = "Do two halves of the chains give the same vectors, beyond shuffled labels, and how many chains are enough?"
#: The cosine with the vector of all chains that counts as enough.
ENOUGH = 0.9


@dataclass(frozen=True)
class Config:
    """A finished run's folder, how many of its chains (0: all), sizes of subsets, shuffles of labels, and draws."""

    run: Path
    n_chains: int = 0
    sizes: tuple[int, ...] = (3, 5, 7, 10, 15, 25, 40, 60, 100, 150, 200, 300)
    n_shuffled: int = 20
    n_draws: int = 200
    seed: int = 0


@dataclass(frozen=True)
class Point:
    """The vector of n chains: sentences of the behavior in them, and its cosine with that of all chains.

    `shuffled` is the same cosine of vectors whose labels are shuffled. A draw without the behavior is left out. The n
    chains are among all, so that near all of them the cosine is large whatever the vector.
    """

    n: int
    sentences: float
    cosine: Estimate
    shuffled: Estimate


@dataclass(frozen=True)
class Row:
    """One behavior.

    Attributes:
        behavior: whose vector.
        layer: where it is read, the run's.
        n_spans: its sentences in all chains.
        n_chains: that have one.
        resampled: cosine of the vector of resampled chains with that of all.
        halves: cosine of the vectors of two halves.
        shuffled: the same with shuffled labels.
        p: share of halves with shuffled labels whose cosine is as large as the mean of `halves`.
        implied: cosine of the vector of all chains with that of endlessly many, if what differs between the halves
            is noise: √(2r / (1 + r)).
        own_part: cosine of the halves' vectors, each less the mean of its shuffled ones.
        needed: chains for a cosine of `ENOUGH` with the vector of all, on average; its ends are the numbers from which
            the luckiest and all but the unluckiest 2.5 % of draws have it. NaN if that is more than there are.
        needed_sentences: of the behavior, in so many chains.
        curve: by the number of chains.
    """

    behavior: str
    layer: int
    n_spans: int
    n_chains: int
    resampled: Estimate
    halves: Estimate
    shuffled: Estimate
    p: float
    implied: float
    own_part: Estimate
    needed: Estimate
    needed_sentences: float
    curve: tuple[Point, ...]


@dataclass(frozen=True)
class Result:
    """Rows, with the model, the recipe, and the number of chains."""

    model: str
    recipe: str
    n_chains: int
    rows: tuple[Row, ...]


def span_features(run: Run, layers: Sequence[int], n_chains: int = 0, seed: int = 0) -> list[TraceFeatures]:
    """Mean activations of the run's sentences, for a random choice of its chains; kept in the run's folder."""
    recipe = BehaviorVectors.load(run.path("vectors.safetensors")).recipe
    traces = [trace for trace in load_traces(run.path("annotated.jsonl")) if trace.spans]
    order = np.random.default_rng(seed).permutation(len(traces))[: n_chains or None]
    settings = dict(window=recipe.window, layers=list(layers), chains=[int(i) for i in order])
    path = run.path("features.safetensors")
    if path.exists():
        tensors, header = read_tensors(path)
        if header["settings"] == settings:
            return _split(tensors, header)
    chosen = [traces[i] for i in order]
    made = list(stream_features(run.model, chosen, windows=[recipe.window], layers=layers))
    made.sort(key=lambda each: each.index)
    tensors = {
        "spans": torch.cat([each.spans[0] for each in made]),
        "lengths": torch.cat([each.lengths[0] for each in made]),
        "tokens": torch.stack([each.tokens for each in made]),
        "n_tokens": torch.tensor([each.n_tokens for each in made]),
    }
    known = {"settings": settings, "keys": [each.key for each in made], "labels": [each.labels for each in made]}
    write_tensors(path, tensors, known)
    return _split(tensors, known)


def _split(tensors: Mapping[str, Tensor], header: Mapping[str, Any]) -> list[TraceFeatures]:
    sizes, layers = [len(labels) for labels in header["labels"]], tuple(header["settings"]["layers"])
    parts = zip(
        header["keys"],
        header["labels"],
        tensors["spans"].split(sizes),
        tensors["lengths"].split(sizes),
        tensors["tokens"],
        tensors["n_tokens"].tolist(),
        strict=True,
    )
    return [
        TraceFeatures(i, key, tuple(labels), layers, spans[None], lengths[None], tokens, n)
        for i, (key, labels, spans, lengths, tokens, n) in enumerate(parts)
    ]


@dataclass(frozen=True, eq=False)
class ChainSums:
    """Each chain's part of both means, with its own labels (side 0) and with shuffled ones.

    Attributes:
        sums: weighted activations, [chain side sign behavior d_model].
        mass: the weights' sums, [chain side sign behavior].
        counts: sentences, [chain behavior].
    """

    sums: Tensor
    mass: Tensor
    counts: Tensor

    @staticmethod
    def of(
        features: Sequence[TraceFeatures],
        recipe: Recipe,
        axis: Sequence[str],
        layers: Mapping[str, int],
        n_shuffled: int,
        seed: int,
    ) -> ChainSums:
        """From features; `axis` has all labels, and `layers` the behaviors that are wanted."""
        wanted = [axis.index(b) for b in layers]
        parts, counts = [], []
        for each in features:
            sides = label_sides(each, axis, n_shuffled, seed)
            weights = contrast_weights(sides, each.lengths[0].double(), each.n_tokens, len(axis), recipe)[:, :, wanted]
            items = torch.cat([each.spans[0], each.tokens[None]])[:, [each.layers.index(x) for x in layers.values()]]
            parts.append((torch.einsum("sgbi,ibd->sgbd", weights, items.double()), weights.sum(-1)))
            counts.append(torch.bincount(sides[0], minlength=len(axis))[wanted])
        sums, mass = (torch.stack(each) for each in zip(*parts, strict=True))
        return ChainSums(sums, mass, torch.stack(counts))

    def vectors(self, drawn: Tensor, sides: slice = slice(None)) -> Tensor:
        """The vectors of draws of chains, [draw side behavior d_model]; NaN for a behavior that a draw lacks."""
        sums = torch.tensordot(drawn, self.sums[:, sides], 1)
        positive, negative = (sums / torch.tensordot(drawn, self.mass[:, sides], 1)[..., None]).unbind(2)
        return positive - negative


def main(config: Config) -> Result:
    """A row per steered behavior.

    Raises:
        LensteerError: a run whose vectors are no differences of means, or fewer than four chains.
    """
    run = Run.open(config.run)
    recipe = BehaviorVectors.load(run.path("vectors.safetensors")).recipe
    if recipe.construction != "difference" or run.config.pairs:
        raise ls.LensteerError(f"vectors by {str(recipe)!r}: only a difference of means of chains is a sum over chains")
    layers = SelectedLayers.load(run.path("layers.json"))
    features = span_features(run, sorted(set(layers.values())), config.n_chains, config.seed)
    if len(features) < 4:
        raise ls.LensteerError(f"{len(features)} annotated chains cannot be halved and resampled: give 4 or more")
    axis = label_axis(load_traces(run.path("annotated.jsonl")))
    sums = ChainSums.of(features, recipe, axis, layers, config.n_shuffled, config.seed)
    rows = rows_of(sums, dict(layers), config.sizes, config.n_draws, config.seed)
    return Result(models.fingerprint(run.model).name, str(recipe), len(features), rows)


def rows_of(
    sums: ChainSums, layers: Mapping[str, int], sizes: Sequence[int], n_draws: int = 200, seed: int = 0
) -> tuple[Row, ...]:
    """A row per behavior, from chains' sums."""
    n, generator = len(sums.sums), np.random.default_rng(seed)
    every = sums.vectors(torch.ones(1, n, dtype=torch.float64))[0]
    ranks = torch.from_numpy(np.stack([generator.permutation(n) for _ in range(n_draws)]))

    def first(k: int) -> Tensor:
        return (ranks < k).double()

    one, other = sums.vectors(first(n // 2)), sums.vectors(1 - first(n // 2))
    halves = _cosine(one, other)
    parts = [each[:, 0] - each[:, 1:].nanmean(1) for each in (one, other)]
    own = _cosine(*parts)
    resampled = _cosine(sums.vectors(torch.from_numpy(drawn_counts(n, n_draws, seed)), slice(1))[:, 0], every[0])
    points: list[tuple[int, np.ndarray[Any, Any]]] = []
    for k in [*(k for k in sizes if k < n), n]:
        points.append((k, _cosine(sums.vectors(first(k)[: n_draws if k < n else 1]), every[0])))
    rows = []
    for i, (b, layer) in enumerate(layers.items()):
        counts = sums.counts[:, i].double()
        line = tuple(Point(k, float(counts.mean()) * k, _over(x[:, 0, i]), _over(x[:, 1:, i])) for k, x in points)
        r = _over(halves[:, 0, i])
        needed = [_reached([(p.n, getattr(p.cosine, end)) for p in line]) for end in ("value", "high", "low")]
        rows.append(
            Row(
                b,
                layer,
                int(counts.sum()),
                int((counts > 0).sum()),
                _over(resampled[:, i]),
                r,
                _over(halves[:, 1:, i]),
                float(np.mean(halves[:, 1:, i] >= r.value)),
                math.sqrt(2 * r.value / (1 + r.value)) if r.value > 0 else math.nan,
                _over(own[:, i]),
                Estimate(needed[0], needed[1], needed[2], n),
                float(counts.mean()) * needed[0],
                line,
            )
        )
    return tuple(rows)


def _cosine(a: Tensor, b: Tensor) -> np.ndarray[Any, Any]:
    return torch.cosine_similarity(a, b, dim=-1).numpy()


def _over(draws: np.ndarray[Any, Any]) -> Estimate:
    """The mean over draws, and their middle 95 %; draws without the behavior are left out."""
    return percentile_interval(float(np.nanmean(draws)), draws.ravel(), len(draws))


def _reached(points: Sequence[tuple[int, float]]) -> float:
    """Where a curve reaches `ENOUGH` for good, between its points on a logarithmic scale; NaN only if it never does."""
    under = [i for i, (_, y) in enumerate(points) if not y >= ENOUGH]
    if not under:
        return float(points[0][0])
    if under[-1] == len(points) - 1:
        return math.nan
    (a, low), (b, high) = points[under[-1]], points[under[-1] + 1]
    return float(a * (b / a) ** ((ENOUGH - low) / (high - low))) if math.isfinite(low) else float(b)


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The answer from a loaded JSON file; shown if no behavior's halves agree as little as shuffled labels do."""
    rows = result["rows"]
    few, most = (pick(rows, key=lambda row: row["needed"]) for pick in (min, max))
    low, high = (pick(rows, key=lambda row: row["halves"]) for pick in (min, max))
    null = max(rows, key=lambda row: row["shuffled"])
    said = (
        f"On {result['model']} ({result['n_chains']} chains), a vector has a cosine of {ENOUGH:g} with that of all "
        f"chains from {estimate_in(few, 'needed'):.0f} chains ({few['behavior']}, {few['needed_sentences']:.0f} "
        f"sentences) to {estimate_in(most, 'needed'):.0f} ({most['behavior']}, {most['needed_sentences']:.0f}). "
        f"The vectors of two halves of the chains have cosines of {estimate_in(low, 'halves'):.2f} "
        f"({low['behavior']}) to {estimate_in(high, 'halves'):.2f} ({high['behavior']}); with shuffled labels at most "
        f"{estimate_in(null, 'shuffled'):.2f} ({null['behavior']})."
    )
    return said, all(row["p"] < 0.05 for row in rows)


def table(result: Result) -> str:
    """A line per behavior, then a line per number of chains."""
    head = (
        "behavior | layer | sentences | chains for .9 | sentences for .9 | halves | shuffled | p | implied | own part"
    )
    lines = [f"{head} | resampled"]
    for r in result.rows:
        numbers = f"{r.n_spans} | {r.needed:.0f} | {r.needed_sentences:.0f} | {r.halves:.2f} | {r.shuffled:.2f}"
        rest = f"{r.p:.2g} | {r.implied:.2f} | {r.own_part:.2f} | {r.resampled:.2f}"
        lines.append(f"{r.behavior} | {r.layer} | {numbers} | {rest}")
    lines += ["", "behavior | chains | sentences | cosine | with shuffled labels"]
    for r in result.rows:
        lines += [f"{r.behavior} | {p.n} | {p.sentences:.0f} | {p.cosine:.2f} | {p.shuffled:.2f}" for p in r.curve]
    return "\n".join(lines)


def figure(result: Result) -> go.Figure:
    """Cosine with the vector of all chains by the number of chains, a panel per behavior; gray: shuffled labels."""
    titles = [f"{r.behavior}<br><sup>{r.n_spans} sentences, layer {r.layer}</sup>" for r in result.rows]
    drawn = make_subplots(1, len(titles), shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.02)
    for column, row in enumerate(result.rows, start=1):
        x = [p.n for p in row.curve]
        for name, label in (("shuffled", ""), ("cosine", row.behavior)):
            y, low, high = ([getattr(getattr(p, name), end) for p in row.curve] for end in ("value", "low", "high"))
            drawn.add_trace(band(label, x, low, high), row=1, col=column)
            line = curve(label, x, y, "%{x} chains: %{y:.2f}<extra></extra>", [])
            line.update(name=label or "shuffled labels", showlegend=bool(label) or column == 1, customdata=None)
            if not label:
                line.update(
                    line_color=MUTED, line_dash="dot", marker_color=MUTED, marker_symbol="x-thin", legendrank=2000
                )
            drawn.add_trace(line, row=1, col=column)
        drawn.add_hline(y=ENOUGH, line=dict(color=INK, width=1, dash="dot"), row=1, col=column)
        drawn.update_xaxes(type="log", tickvals=[5, 10, 25, 50, 100, 200, 400], title_text="chains", row=1, col=column)
    drawn.update_yaxes(range=[-0.25, 1.03], title_text="", row=1)
    drawn.update_yaxes(title_text="cosine with the vector of all chains", row=1, col=1)
    about = f"{result.model}, {result.recipe}; bands: middle 95 % of draws; dotted line: {ENOUGH:g}"
    finish(drawn, f"How many chains a vector needs<br><sup>{about}</sup>", 460)
    return drawn.update_layout(margin_t=110)


def to_json(result: Result) -> str:
    """All numbers, a line per behavior."""
    rows = [{**flat(r), "curve": [flat(p) for p in r.curve]} for r in result.rows]
    return json.dumps({**asdict(result), "rows": rows}, indent=0).replace("NaN", "null") + "\n"


def smoke(config: Config) -> Config:
    """The same at a size for a test."""
    return replace(config, n_draws=40, n_shuffled=5)


if __name__ == "__main__":
    command(globals())

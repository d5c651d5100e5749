"""Do models share the geometry of their behaviors, and at the same relative depth?

Language models read the same annotated chains; organisms read their own, on the same tasks. From the activations of the
sentences, in every model and layer: the difference of means of each behavior (against all sentences), the cosines
between behaviors, and how far a behavior's direction from one half of the chains separates its sentences in the other
half (d': difference of the means in standard deviations; a mean over the four steered behaviors, as initializing
sentences are told by their place). Two models share a geometry if their cosines at the same
relative depth are in the same order. That is compared with labels that are shuffled within each chain, the same in both
models where they read the same chains: what these share is how the text reads, not what the labels say. Intervals
resample chains, the same in all models.

Example: python analyses/cross_model.py --models smollm2 mini-r1 --chains a.jsonl --dtype bfloat16 \
    --organisms lensteer/organism/weights analyses/organisms/llama --folder runs/cross --json FILE --figure FILE.png
(activations are kept in --folder; about 7 minutes of one core for three language models, half a minute for organisms)
"""

from __future__ import annotations

import argparse
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from itertools import combinations, cycle
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_on_language import cut, mantel, rank_correlation
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

import lensteer as ls
from lensteer.activations import stream_features
from lensteer.files import read_tensors, write_tensors
from lensteer.models import ORGANISM
from lensteer.pipeline import read_chains
from lensteer.plots.style import COLORS, INK, MUTED, error_bars, finish
from lensteer.statistics import Estimate, drawn_counts, percentile_interval
from lensteer.traces import Trace

QUESTION = "Do models share the geometry of their behaviors, and at the same relative depth?"
DEPTHS = tuple(i / 8 for i in range(1, 9))
MIDDLE = 0.5
LANGUAGE, GRAMMAR, BETWEEN = "language models", "organisms", "between the two"


@dataclass(frozen=True)
class Config:
    """Language models and their annotated chains, organisms and their number of chains, and sizes."""

    models: tuple[str, ...] = ()
    chains: tuple[str, ...] = ()
    organisms: tuple[str, ...] = (str(ORGANISM),)
    dtype: str = "float32"
    window: str = "onset±3"
    n_chains: int = 60
    n_own: int = 100
    n_sentences: int = 20
    n_shuffled: int = 20
    n_bootstrap: int = 200
    folder: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Model:
    """One model.

    Attributes:
        name: of its folder.
        family: `LANGUAGE` or `GRAMMAR`.
        n_layers: of the model.
        n_chains: that were read.
        counts: sentences of each behavior.
        separation: d' on the other half of the chains, a mean over the steered behaviors, by layer.
        shuffled: the same of shuffled labels, a mean over shuffles.
        split_half: cosine of the two halves' vectors, a mean over the steered behaviors, by layer.
        behaviors: d' of each behavior, by layer.
        best_depth: relative depth of the layer with the largest separation.
        cosines: between behaviors, at the middle.
    """

    name: str
    family: str
    n_layers: int
    n_chains: int
    counts: dict[str, int]
    separation: tuple[Estimate, ...]
    shuffled: tuple[float, ...]
    split_half: tuple[float, ...]
    behaviors: dict[str, tuple[float, ...]]
    best_depth: Estimate
    cosines: dict[str, Estimate]


@dataclass(frozen=True)
class Pair:
    """Two models, or the mean over pairs of a group: rank correlation of their cosines over pairs of behaviors.

    Attributes:
        one: a model; "mean" in the mean of a group.
        other: the other; the number of pairs in the mean.
        group: `LANGUAGE`, `GRAMMAR` or `BETWEEN`.
        correlation: at the middle.
        shuffled: the same from shuffled labels: its mean, and 95 % of the shuffles.
        inner: `correlation` without initializing, which is always first and unlike all others.
        inner_shuffled: the same from shuffled labels.
        p: share of the permutations of one model's behaviors with at least this correlation; NaN for a mean.
        by_depth: at each of `DEPTHS`.
    """

    one: str
    other: str
    group: str
    correlation: Estimate
    shuffled: Estimate
    inner: Estimate
    inner_shuffled: Estimate
    p: float
    by_depth: tuple[float, ...]


@dataclass(frozen=True)
class Result:
    """Models, and pairs of them; the mean of each group is the last of its pairs."""

    recipe: str
    models: tuple[Model, ...]
    pairs: tuple[Pair, ...]


@dataclass(frozen=True)
class Read:
    """Activations of the sentences of all chains.

    Attributes:
        x: `[sentence layer d_model]`.
        label: index of each sentence's behavior.
        chain: index of each sentence's chain.
        n_chains: of all.
    """

    x: Tensor
    label: Tensor
    chain: Tensor
    n_chains: int


def read(model: Any, traces: Sequence[Trace], config: Config, path: Path | None) -> Read:
    """The activations of the first sentences of each chain; kept in a file."""
    if path is not None and path.exists():
        tensors, _ = read_tensors(path)
        return Read(tensors["x"], tensors["label"], tensors["chain"], len(traces))
    n = config.n_sentences
    short = [cut(t, t.spans[n - 1].end - t.prompt_length) if len(t.spans) > n else t for t in traces]
    layers = range(ls.models.n_layers(model))
    found = sorted(
        (
            (f.index, f.spans[0].clone(), [ls.BEHAVIORS.index(label) for label in f.labels])
            for f in stream_features(model, short, windows=[config.window], layers=layers, batch_size=8)
        ),
        key=lambda each: each[0],
    )
    label = torch.tensor([b for _, _, labels in found for b in labels])
    chain = torch.tensor([i for i, _, labels in found for _ in labels])
    made = Read(torch.cat([x for _, x, _ in found]), label, chain, len(traces))
    if path is not None:
        write_tensors(path, {"x": made.x, "label": label, "chain": chain}, {})
    return made


def shuffles(seen: Read, n: int, seed: int) -> list[Tensor]:
    """Labels permuted within each chain; the same permutations for the same numbers of sentences."""
    rng, made = np.random.default_rng(seed), []
    for _ in range(n):
        order = np.lexsort((rng.random(len(seen.label)), seen.chain.numpy()))
        made.append(seen.label[torch.from_numpy(order)])
    return made


def directions(seen: Read, label: Tensor, draws: Tensor) -> Tensor:
    """Mean of each behavior's sentences less that of all, under each row of weights of chains: `[draw behavior …]`."""
    n, cells = len(ls.BEHAVIORS), seen.chain * len(ls.BEHAVIORS) + label
    sums = torch.zeros(seen.n_chains * n, seen.x[0].numel()).index_add_(0, cells, seen.x.flatten(1)).view(-1, n)
    sums = sums.view(seen.n_chains, -1)
    counts = torch.zeros(seen.n_chains * n).index_add_(0, cells, torch.ones(len(cells))).view(-1, n)
    total = (draws @ sums).view(len(draws), n, *seen.x.shape[1:])
    weight = (draws @ counts)[..., None, None]
    return total / weight - (total.sum(1, keepdim=True) / weight.sum(1, keepdim=True))


def cosines(vectors: Tensor) -> np.ndarray[Any, Any]:
    """Between behaviors, `[draw layer behavior behavior]`."""
    unit = torch.nn.functional.normalize(vectors, dim=-1).transpose(1, 2)
    return (unit @ unit.mT).numpy()


def halves(seen: Read, label: Tensor, draws: Tensor) -> tuple[Tensor, Tensor]:
    """Held-out d' under each row of weights, `[draw behavior layer]`, and the split-half cosine, `[behavior layer]`."""
    n = len(ls.BEHAVIORS)
    odd = (torch.arange(seen.n_chains) % 2).float()
    fitted = directions(seen, label, torch.stack([odd, 1 - odd]))
    found = []
    for vectors, test in ((fitted[0], 1 - odd), (fitted[1], odd)):
        score = torch.einsum("sld,bld->bls", seen.x, torch.nn.functional.normalize(vectors, dim=-1))
        score = score - score.mean(-1, keepdim=True)  # moments lose digits about a far origin
        own = torch.nn.functional.one_hot(label, n).T.float() * test[seen.chain]
        moments = []
        for side in (own, test[seen.chain] - own):
            values = torch.stack([torch.ones_like(score), score, score**2]) * side[:, None]
            sums = torch.zeros(*values.shape[:3], seen.n_chains).index_add_(3, seen.chain, values)
            mass, first, second = torch.einsum("rc,mblc->mrbl", draws, sums)
            moments.append((first / mass, second / mass - (first / mass) ** 2))
        (own_mean, own_var), (mean, var) = moments
        found.append((own_mean - mean) / ((own_var + var) / 2).sqrt())
    return (found[0] + found[1]) / 2, torch.nn.functional.cosine_similarity(fitted[0], fitted[1], dim=-1)


def layer_at(depth: float, n_layers: int) -> int:
    """The layer at a relative depth: 1 is the last one."""
    return max(round(depth * n_layers), 1) - 1


def measure(name: str, family: str, seen: Read, config: Config) -> tuple[Model, dict[str, np.ndarray[Any, Any]]]:
    """A model's figures, and its cosines on the data as they are, on resampled chains, and from shuffled labels."""
    n_layers = seen.x.shape[1]
    draws = np.vstack([np.ones(seen.n_chains), drawn_counts(seen.n_chains, config.n_bootstrap, config.seed)])
    drawn = torch.from_numpy(draws).float()
    mixed = shuffles(seen, config.n_shuffled, config.seed)
    every = {
        "own": cosines(directions(seen, seen.label, drawn)),
        "shuffled": np.concatenate([cosines(directions(seen, label, drawn[:1])) for label in mixed]),
    }
    apart, alike = halves(seen, seen.label, drawn)
    steered = [ls.BEHAVIORS.index(b) for b in ls.STEERED]
    mean = apart[:, steered].mean(1).numpy()
    best = np.where(np.isfinite(mean).all(1), (np.nan_to_num(mean).argmax(1) + 1) / n_layers, np.nan)
    none = np.mean([halves(seen, label, drawn[:1])[0][0, steered].mean(0).numpy() for label in mixed[:5]], axis=0)
    middle = every["own"][:, layer_at(MIDDLE, n_layers)]

    def interval(values: np.ndarray[Any, Any]) -> Estimate:
        return percentile_interval(float(values[0]), values[1:], seen.n_chains)

    found = Model(
        name,
        family,
        n_layers,
        seen.n_chains,
        {b: int((seen.label == i).sum()) for i, b in enumerate(ls.BEHAVIORS)},
        tuple(interval(mean[:, layer]) for layer in range(n_layers)),
        tuple(none.tolist()),
        tuple(alike[steered].mean(0).tolist()),
        {b: tuple(apart[0, i].tolist()) for i, b in enumerate(ls.BEHAVIORS)},
        interval(best),
        {
            f"{ls.BEHAVIORS[i]}, {ls.BEHAVIORS[j]}": interval(middle[:, i, j])
            for i, j in combinations(range(len(ls.BEHAVIORS)), 2)
        },
    )
    return found, every


def pairs_of(models: Sequence[Model], known: Mapping[str, Mapping[str, np.ndarray[Any, Any]]]) -> tuple[Pair, ...]:
    """Every pair of models, and the mean over each group's pairs."""
    groups: dict[str, list[Pair]] = {}
    sums: dict[str, list[np.ndarray[Any, Any]]] = {}
    every = list(range(len(ls.BEHAVIORS)))
    inner = [i for i in every if ls.BEHAVIORS[i] != "initializing"]
    for one, other in combinations(models, 2):
        a, b = known[one.name], known[other.name]

        def over(
            kind: str, depth: float = MIDDLE, n: int | None = None, some=every, a=a, b=b,
            layers=(one.n_layers, other.n_layers),
        ) -> list[float]:  # fmt: skip
            i, j = (layer_at(depth, each) for each in layers)
            cells = np.ix_(some, some)
            return [rank_correlation(x[i][cells], y[j][cells]) for x, y in zip(a[kind][:n], b[kind][:n], strict=True)]

        group = one.family if one.family == other.family else BETWEEN
        draws = [over("own"), over("shuffled"), over("own", some=inner), over("shuffled", some=inner)]
        i, j = layer_at(MIDDLE, one.n_layers), layer_at(MIDDLE, other.n_layers)
        p, depths = mantel(a["own"][0, i], b["own"][0, j]), tuple(over("own", depth, 1)[0] for depth in DEPTHS)
        n = min(one.n_chains, other.n_chains)
        groups.setdefault(group, []).append(Pair(one.name, other.name, group, *_intervals(draws, n), p, depths))
        for k, each in enumerate(draws):
            sums.setdefault(f"{group}{k}", []).append(np.array(each))
    made: list[Pair] = []
    for group, found in groups.items():
        means = [np.mean(sums[f"{group}{k}"], axis=0) for k in range(4)]
        depths = tuple(np.mean([pair.by_depth for pair in found], axis=0).tolist())
        parts = _intervals(means, found[0].correlation.n)
        made += [*found, Pair("mean", str(len(found)), group, *parts, float("nan"), depths)]
    return tuple(made)


def _intervals(draws: Sequence[Any], n: int) -> tuple[Estimate, Estimate, Estimate, Estimate]:
    """Of the labels and of shuffled ones, in turn; shuffles have no observed value but their mean."""
    a, b, c, d = (np.asarray(each) for each in draws)
    return (
        percentile_interval(float(a[0]), a[1:], n),
        percentile_interval(float(b.mean()), b, len(b)),
        percentile_interval(float(c[0]), c[1:], n),
        percentile_interval(float(d.mean()), d, len(d)),
    )


def main(config: Config) -> Result:
    """Read the chains in every model and compare.

    Raises:
        LensteerError: under two models, two of one name, language models without annotated chains, or a behavior
            without a sentence.
    """
    names = [Path(name).name for name in (*config.models, *config.organisms)]
    names = ["organism" if name == ORGANISM.name else name for name in names]
    if len(names) < 2 or len(set(names)) < len(names):
        raise ls.LensteerError(f"models {names}: give two or more, of folders with different names")
    if config.models and not config.chains:
        raise ls.LensteerError(f"language models {list(config.models)} without chains: give annotated ones by --chains")
    models, known = [], {}
    for name, source in zip(names, (*config.models, *config.organisms), strict=True):
        family = LANGUAGE if source in config.models else GRAMMAR
        model = ls.load_model(source, dtype=getattr(torch, config.dtype if family == LANGUAGE else "float32"))
        path = None if config.folder is None else config.folder / f"{name}.safetensors"
        if family == LANGUAGE:
            traces = [t for t in read_chains(config.chains, model) if t.spans][: config.n_chains]
        else:
            tasks = ls.load_tasks(split="train", n=config.n_own)
            traces = ls.annotate(ls.generate_traces(model, tasks, temperature=1.0, seed=config.seed), ls.grammar)
        seen = read(model, traces, config, path)
        del model
        counts = Counter(ls.BEHAVIORS[i] for i in seen.label.tolist())
        if lacking := [b for b in ls.BEHAVIORS if not counts[b]]:
            raise ls.LensteerError(f"the chains of {name!r} have no sentence of {lacking}: give more chains")
        each, known[name] = measure(name, family, seen, config)
        models.append(each)
        print(f"{name}: {dict(counts)}", flush=True)
    return Result(f"{config.window} − spans", tuple(models), pairs_of(models, known))


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The mean correlation of each group beside that of shuffled labels, and the depths of the best separation."""
    words, shown = [], True
    for pair in result["pairs"]:
        if pair["one"] == "mean":
            own, mixed, inner, low = (
                f"{pair[key]['value']:+.2f} [{pair[key]['low']:+.2f}, {pair[key]['high']:+.2f}]"
                for key in ("correlation", "shuffled", "inner", "inner_shuffled")
            )
            words.append(
                f"{pair['group']} {own} over {pair['other']} pair(s), shuffled labels {mixed}; without initializing "
                f"{inner}, shuffled {low}"
            )
            if pair["group"] != BETWEEN:
                for real, null in (("correlation", "shuffled"), ("inner", "inner_shuffled")):
                    shown &= pair[real]["low"] > max(pair[null]["high"], 0)
    depths = ", ".join(
        f"{m['name']} {m['best_depth']['value']:.2f} [{m['best_depth']['low']:.2f}, {m['best_depth']['high']:.2f}]"
        for m in result["models"]
    )
    chains = sorted({m["n_chains"] for m in result["models"]})
    return (
        f"Rank correlation of the cosines between behaviors, {' and '.join(map(str, chains))} chains a model: "
        f"{'. '.join(words)}. Directions separate best at relative depth {depths}.",
        shown,
    )


def figure(result: Result) -> go.Figure:
    """Correlations of pairs beside shuffled labels; separation over relative depth."""
    drawn = make_subplots(
        rows=1, cols=2, column_widths=[0.5, 0.5], horizontal_spacing=0.1,
        subplot_titles=("cosines of two models, rank correlation", "held-out separation (d′), steered behaviors"),
    )  # fmt: skip
    pairs = result.pairs
    names = [f"<b>{p.group}</b>" if p.one == "mean" else f"{p.one} – {p.other}" for p in pairs]
    for found, tone, symbol, shift in (
        ([p.correlation for p in pairs], INK, "circle", 0.0),
        ([p.shuffled for p in pairs], MUTED, "line-ns-open", 0.25),
    ):
        bars = error_bars([e.value for e in found], [e.low for e in found], [e.high for e in found])
        drawn.add_scatter(
            x=[e.value for e in found], y=[i + shift for i in range(len(pairs))], mode="markers",
            error_x=dict(**bars, thickness=1, width=0, color=tone), marker=dict(color=tone, symbol=symbol, size=8),
            name="labels" if tone == INK else "shuffled labels", row=1, col=1,
        )  # fmt: skip
    drawn.add_vline(x=0, line=dict(color=MUTED, width=1), row=1, col=1)
    paints = cycle((*(COLORS[b] for b in ls.STEERED), INK, COLORS["deduction"], MUTED))
    for model, paint in zip(result.models, paints, strict=False):
        x = [(i + 1) / model.n_layers for i in range(model.n_layers)]
        line = dict(color=paint, dash="solid" if model.family == LANGUAGE else "dot")
        y = [e.value for e in model.separation]
        drawn.add_scatter(x=x, y=y, mode="lines", line=line, name=model.name, row=1, col=2)
        drawn.add_scatter(
            x=[model.best_depth.value], y=[max(y)], mode="markers", showlegend=False,
            marker=dict(color=paint, size=9), row=1, col=2,
        )  # fmt: skip
    drawn.update_xaxes(title_text="relative depth", row=1, col=2)
    finish(drawn, "Geometry of behaviors across models", max(420, 200 + 24 * len(pairs)))
    drawn.update_layout(margin=dict(t=90))
    return drawn.update_yaxes(
        tickvals=list(range(len(pairs))), ticktext=names, autorange="reversed", zeroline=False, row=1, col=1
    )


def table(result: Result) -> str:
    """A line per model, then one per pair."""
    lines = ["model | chains | best depth | d' there | shuffled | split-half cosine there |", "---|" * 6]
    for m in result.models:
        i = round(m.best_depth.value * m.n_layers) - 1
        figures = f"{m.best_depth:.2f} | {m.separation[i]:.2f} | {m.shuffled[i]:.2f} | {m.split_half[i]:.2f}"
        lines.append(f"{m.name} | {m.n_chains} | {figures} |")
    lines += [
        "",
        "pair | group | correlation | shuffled labels | without initializing | shuffled | p | by depth |",
        "---|" * 8,
    ]
    for p in result.pairs:
        depths = " ".join(f"{value:.2f}" for value in p.by_depth)
        lines.append(
            f"{p.one}, {p.other} | {p.group} | {p.correlation:+.2f} | {p.shuffled:+.2f} | {p.inner:+.2f} | "
            f"{p.inner_shuffled:+.2f} | {p.p:.3f} | {depths} |"
        )
    return "\n".join(lines)


def to_json(result: Result) -> str:
    """All numbers, to four digits."""

    def short(value: Any) -> Any:
        if isinstance(value, Mapping):
            return {key: short(each) for key, each in value.items()}
        if isinstance(value, (list, tuple)):
            return [short(each) for each in value]
        return (round(value, 4) if np.isfinite(value) else None) if isinstance(value, float) else value

    return json.dumps(short(asdict(result)), indent=0) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name in ("models", "chains", "organisms"):
        parser.add_argument(f"--{name}", nargs="*", default=list(getattr(Config, name)))
    parser.add_argument("--dtype", default=Config.dtype)
    parser.add_argument("--window", default=Config.window)
    for option in ("n_chains", "n_own", "n_sentences", "n_shuffled", "n_bootstrap", "seed"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--smoke", action="store_true", help="make everything small")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = vars(parser.parse_args())
    small, out, picture = (options.pop(name) for name in ("smoke", "json", "figure"))
    settings = Config(**{**options, **{name: tuple(options[name]) for name in ("models", "chains", "organisms")}})
    measured = main(replace(settings, n_chains=12, n_own=24, n_shuffled=3, n_bootstrap=20) if small else settings)
    print(table(measured))
    if out:
        out.write_text(to_json(measured))
    if picture:
        figure(measured).write_image(picture, width=1200)

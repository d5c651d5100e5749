"""How many chains do vectors need, whose labels, and whose model? On a language model and on its base.

Four comparisons, all with difference-of-means vectors (onset±3 - spans) at one layer, added on every generated token
with the same length, on the same tasks and seeds:

- the number of annotated chains: nested random subsets of those given;
- whose labels, on a subset: those given (GPT-4o's), a classifier's (of the half of the questions that it was not fitted
  on), the rules';
- whose chains: the model's own, labeled by the classifier or the rules;
- whose model: the base's vectors (from a subset) in the model, the model's in the base, and each one's own.

Example: python analyses/which_chains.py --model mini-r1 --base smollm2 --chains a.jsonl b.jsonl --folder runs/chains
(about 40 minutes on one core; a killed run goes on)
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plotly import graph_objects as go
from plotly.subplots import make_subplots

import lensteer as ls
from lensteer.activations import stream_features
from lensteer.annotation import SentenceClassifier, annotate, fit_classifier, rules
from lensteer.evaluation import Condition, ResampledShares, estimate_of, run_conditions
from lensteer.generation.jobs import Sampling
from lensteer.pipeline import read_chains
from lensteer.plots.style import MUTED, color, error_bars, finish
from lensteer.statistics import flat
from lensteer.traces import label_axis, load_traces, save_traces
from lensteer.vectors import BehaviorVectors, Recipe
from lensteer.vectors.constructions import ContrastSums
from lensteer.vectors.fitting import vectors_of

ALL, BASE = "all chains", "the base's"
Sets = Mapping[str, Sequence[ls.Trace]]


@dataclass(frozen=True)
class Config:
    """Models, annotated chains, folder, recipe, layer, length of what is added, subsets, and tasks.

    `vectors` are those of all chains, by the same recipe, if they have been fitted before.
    """

    model: str
    base: str | None
    chains: tuple[str, ...]
    folder: Path
    vectors: Path | None = None
    tasks: str = "builtin"
    dtype: str = "bfloat16"
    window: str = "onset±3"
    negatives: str = "spans"
    layer: int = 15
    length: float = 28.0
    sizes: tuple[int, ...] = (10, 25, 50, 100)
    n_relabeled: int = 100
    n_base: int = 100
    n_own: int = 100
    own_tokens: int = 300
    n_tasks: int = 50
    n_samples: int = 2
    max_new_tokens: int = 120
    batch_size: int = 200
    n_bootstrap: int = 100
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One behavior's vector from one set of chains: its similarity to that of all chains, and its effect.

    `cosine` is with the vector of all given chains in the same model; `low` and `high` resample this set's chains.
    """

    steered: str
    chains: str
    behavior: str
    n_chains: int
    n_spans: int
    cosine: float
    low: float
    high: float
    norm: float
    base: float
    share: float
    change: Any
    rules: Any
    repetition: float


def main(config: Config) -> list[Row]:
    """A row per model, set of chains, and behavior."""
    config.folder.mkdir(parents=True, exist_ok=True)
    model = _load(config, config.model)
    given = read_chains(config.chains, model)
    path = config.folder / "classifier.safetensors"
    if not path.exists():
        fit_classifier(given, seed=config.seed).save(path)
    classifier = SentenceClassifier.load(path)
    order = np.random.default_rng(config.seed).permutation(len(given))
    mixed = [given[i] for i in order]  # of all files
    found = _subsets(model, mixed, config)
    for name, chains in {**_relabeled(given, mixed, config), **_own(model, classifier, config)}.items():
        found |= _fit(model, chains, {name: len(chains)}, config)
    in_model = dict(found)
    rows: list[Row] = []
    if config.base is not None:
        base = _load(config, config.base)
        same = read_chains(config.chains, base)
        theirs = _fit(base, [same[i] for i in order[: config.n_base]], {BASE: config.n_base}, config)[BASE]
        in_model[BASE] = theirs
        rows += _rows(base, "base", {BASE: theirs, ALL: found[ALL]}, theirs, classifier, config)
        del base
    return [*_rows(model, "model", in_model, found[ALL], classifier, config), *rows]


def _load(config: Config, name: str) -> Any:
    return ls.load_model(name, dtype=getattr(torch, config.dtype))


def _subsets(model: Any, mixed: Sequence[ls.Trace], config: Config) -> dict[str, BehaviorVectors]:
    """Vectors of nested subsets: the first chains of one random order."""
    sizes = {f"{n} chains": n for n in config.sizes if n < len(mixed)}
    if config.vectors is None:
        return _fit(model, mixed, {ALL: len(mixed), **sizes}, config)
    known = BehaviorVectors.load(config.vectors, model)
    assert known.recipe == Recipe(config.window, config.negatives), known.recipe
    return {ALL: known, **_fit(model, mixed[: max(sizes.values())], sizes, config)}


def _relabeled(given: Sequence[ls.Trace], mixed: Sequence[ls.Trace], config: Config) -> Sets:
    """Chains labeled by others; the classifier labels questions that it was not fitted on."""
    some, found = mixed[: config.n_relabeled], []
    for half in (0, 1):
        fitted = fit_classifier([t for t in given if _number(t) % 2 != half], seed=config.seed)
        found += annotate([t for t in some if _number(t) % 2 == half], fitted)
    return {"classifier's labels": found, "rules' labels": annotate(some, rules)}


def _number(trace: ls.Trace) -> int:
    """Of a chain in its file: the same questions have the same numbers in every file."""
    return int(trace.task.id.rsplit("-", 1)[-1])


def _own(model: Any, classifier: SentenceClassifier, config: Config) -> Sets:
    """Chains of the model itself."""
    if not config.n_own:
        return {}
    path = config.folder / "own.jsonl"
    if not path.exists():
        tasks = ls.load_tasks(config.tasks, split="train", n=config.n_own)
        drawn: dict[str, Any] = dict(temperature=0.8, max_new_tokens=config.own_tokens, batch_size=config.batch_size)
        save_traces(ls.generate_traces(model, tasks, seed=config.seed, **drawn), path)
    traces = load_traces(path)
    return {"own, classifier's labels": annotate(traces, classifier), "own, rules' labels": annotate(traces, rules)}


def _fit(
    model: Any, chains: Sequence[ls.Trace], first: Mapping[str, int], config: Config
) -> dict[str, BehaviorVectors]:
    """Vectors of the first chains, as many as each name says, in one pass over all."""
    paths = {name: config.folder / f"{name.replace(' ', '-')}.safetensors" for name in first}
    if not all(path.exists() for path in paths.values()):
        recipe, labels, layers = Recipe(config.window, config.negatives), label_axis(chains), (config.layer,)
        sums = {
            name: ContrastSums(
                recipe, labels, 1, ls.models.d_model(model), n_bootstrap=config.n_bootstrap, seed=config.seed
            )
            for name in first
        }
        for features in stream_features(model, chains, windows=[recipe.window], layers=layers):
            for name, n in first.items():
                if features.index < n:
                    sums[name].add(features)
        for name, path in paths.items():
            vectors_of(sums[name], layers, {"model": ls.models.fingerprint(model).to_dict()}).save(path)
        print(f"{', '.join(first)}: fitted on {len(chains)} chains", flush=True)
    return {name: BehaviorVectors.load(path) for name, path in paths.items()}


def _rows(
    model: Any,
    steered: str,
    found: Mapping[str, BehaviorVectors],
    reference: BehaviorVectors,
    classifier: SentenceClassifier,
    config: Config,
) -> list[Row]:
    arms = [(name, b) for name, vectors in found.items() for b in ls.STEERED if b in vectors]
    conditions = [Condition("unsteered", kind="unsteered")] + [
        Condition(
            f"{name}/{b}",
            ls.SteeringPlan(found[name][b], config.layer, config.length, ls.generated, unit="unit"),
            kind="up",
        )
        for name, b in arms
    ]
    records = run_conditions(
        model,
        ls.load_tasks(config.tasks, split="dev", n=config.n_tasks),
        conditions,
        Sampling(config.n_samples, 0.8, config.seed, config.max_new_tokens, config.batch_size),
        annotator={"classifier": classifier, "rules": rules},
        path=config.folder / f"{steered}.jsonl",
        progress=True,
    )
    shares = ResampledShares(records, seed=config.seed)
    repetition: dict[str, list[float]] = {}
    for record in records:
        repetition.setdefault(record.condition, []).append(record.repetition)
    rows = []
    for name, b in arms:
        arm, vectors = f"{name}/{b}", found[name]
        low, high = _resampled(vectors, reference, b, config.layer)
        own, base = shares.of(arm, b), shares.of("unsteered", b)
        rows.append(
            Row(
                steered,
                name,
                b,
                vectors.n_traces,
                vectors.counts[b],
                _cosine(vectors, reference, b, config.layer),
                low,
                high,
                float(vectors[b].at(config.layer).norm()),
                float(base[0]),
                float(own[0]),
                estimate_of(own - base),
                estimate_of(shares.of(arm, b, "rules") - shares.of("unsteered", b, "rules")),
                float(np.mean(repetition[arm])),
            )
        )
    return rows


def _cosine(vectors: BehaviorVectors, reference: BehaviorVectors, b: str, layer: int) -> float:
    return float(torch.cosine_similarity(vectors[b].at(layer), reference[b].at(layer), dim=0))


def _resampled(vectors: BehaviorVectors, reference: BehaviorVectors, b: str, layer: int) -> tuple[float, float]:
    """95 % interval over resampled chains of these vectors, if they have been resampled."""
    if vectors.replicates is None:
        return math.nan, math.nan
    own = vectors.replicates[:, vectors.labels.index(b), vectors.layers.index(layer)]
    cosines = torch.cosine_similarity(own, reference[b].at(layer)[None], dim=-1)
    return tuple(torch.quantile(cosines, torch.tensor([0.025, 0.975])).tolist())


def table(rows: Sequence[Row]) -> str:
    """A line per row."""
    lines = ["steered | vectors from | behavior | chains | spans | cosine | unsteered | added | change | by rules |"]
    lines.append("---|" * 10)
    for r in rows:
        figures = f"{r.cosine:.2f} [{r.low:.2f}, {r.high:.2f}] | {r.base:.3f} | {r.share:.3f}"
        names = f"{r.steered} | {r.chains} | {r.behavior} | {r.n_chains} | {r.n_spans}"
        lines.append(f"{names} | {figures} | {r.change:+.3f} | {r.rules:+.3f} |")
    return "\n".join(lines)


def figure(rows: Sequence[Row]) -> go.Figure:
    """Change of the share by set of chains, a panel per behavior: in the model, and below in its base."""
    steered = list(dict.fromkeys(row.steered for row in rows))
    heights = [len({row.chains for row in rows if row.steered == name}) for name in steered]
    made = make_subplots(
        rows=len(steered),
        cols=len(ls.STEERED),
        shared_yaxes=True,
        row_heights=heights,
        vertical_spacing=0.12,
        horizontal_spacing=0.02,
        subplot_titles=ls.STEERED,
    )
    for at, name in enumerate(steered, start=1):
        for column, b in enumerate(ls.STEERED, start=1):
            some = [row for row in rows if row.steered == name and row.behavior == b]
            changes = [row.change for row in some]
            bars = error_bars([c.value for c in changes], [c.low for c in changes], [c.high for c in changes])
            made.add_scatter(
                x=[c.value for c in changes],
                y=[row.chains for row in some],
                error_x=dict(**bars, thickness=1, width=0),
                mode="markers",
                showlegend=False,
                marker=dict(color=color(b), size=8),
                row=at,
                col=column,
            )
            made.add_vline(x=0, line=dict(color=MUTED, width=1), row=at, col=column)
        made.update_yaxes(title_text=f"steered: the {name}", row=at, col=1)
    made.update_xaxes(tickformat=".0%", nticks=4)
    made.update_yaxes(autorange="reversed")
    return finish(made, "Change of a behavior's share, vectors of one length: from which chains, in which model", 560)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--base")
    parser.add_argument("--chains", nargs="+", required=True)
    parser.add_argument("--folder", type=Path, required=True)
    parser.add_argument("--vectors", type=Path)
    for option in ("layer", "n_own", "n_tasks", "n_samples", "batch_size"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--length", type=float, default=Config.length)
    parser.add_argument("--dtype", default=Config.dtype)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = vars(parser.parse_args())
    out, picture = options.pop("json"), options.pop("figure")
    results = main(Config(**{**options, "chains": tuple(options["chains"])}))
    print(table(results))
    if out:
        out.write_text(json.dumps([flat(row) for row in results], indent=1) + "\n", encoding="utf-8")
    if picture:
        figure(results).write_image(picture, width=1100, scale=2)

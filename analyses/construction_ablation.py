"""Which construction of a behavior's direction steers best, if all change the model by as much?

Constructions: the difference of means; a logistic probe, Fisher's discriminant, the whitened difference and the
principal component of spans; the difference of means on the spans alone that the model reproduces from their onsets
(`stable_spans`), and on as many spans drawn at random; and of directions without labels (principal components, a sparse
dictionary) the one nearest to the difference of means. The null is a difference of means of shuffled labels.

Every vector is added, on the organism also taken away, with the coefficient that matches a target KL: mean per token
between the steered and the unsteered model along the steered model's own rollouts. The target is what `coefficient`
times the differences of means spend on average. The effect is the behavior's share of sentences, added less taken away;
on a language model, whose base rates are too low for a fall to be seen, added less unsteered. Intervals, and the paired
difference from the difference of means, are from a bootstrap over tasks.

    python analyses/construction_ablation.py --folder runs/constructions --json constructions.json --figure picture.png
    python -u analyses/construction_ablation.py --model mini-r1 --chains a.jsonl b.jsonl --dtype bfloat16
        --folder runs/constructions --json constructions.json --figure picture.png

Windows, negatives and scopes are those of the default recipe unless more are given; `windows_and_negatives.py` and
`choices_on_language.py` compare them for differences of means. A killed run resumes from `--folder`.
"""

from __future__ import annotations

import argparse
import json
import pickle
import random
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
from choices_on_language import MASKED, SCOPES
from plotly import graph_objects as go
from plotly.subplots import make_subplots

import lensteer as ls
from lensteer.annotation import Annotator, fit_classifier, masking, rules
from lensteer.calibration import calibrate_many, rollout_kl
from lensteer.evaluation import MEAN, Condition, ResampledShares, by_condition, estimate_of, run_conditions
from lensteer.files import digest, write_atomically
from lensteer.generation.jobs import Sampling
from lensteer.pipeline import read_chains
from lensteer.plots.style import MUTED, color, error_bars, finish, marker
from lensteer.statistics import Estimate, estimate_in, flat
from lensteer.vectors import Direction, DirectionMatches, Recipe, fit_recipes, nearest_direction

Made = TypeVar("Made")
Key = tuple[str, str, str, str, str, str]  # construction, window, negatives, scope, behavior, "down" or "up"

QUESTION = "Does no construction steer better than the difference of means, if all change the model by as much?"

DIFFERENCE, STABLE, RANDOM, SHUFFLED = "difference", "stable spans", "as many random spans", "shuffled labels"
SUPERVISED = (DIFFERENCE, "logistic", "lda", "whitened", "pca")
UNSUPERVISED = {"nearest component": "pca", "nearest dictionary atom": "dictionary"}
CONSTRUCTIONS = (*SUPERVISED, STABLE, RANDOM, *UNSUPERVISED, SHUFFLED)


@dataclass(frozen=True)
class Config:
    """Model, annotated chains, the choices that are compared, and sizes.

    What is None or empty is chosen by the model: for the organism window "onset", scope "onsets" and layer 4; for a
    language model "onset±3", "generated" and 15. `coefficient` times the differences of means sets the target KL.
    `n_draws` and `threshold` are of `stable_spans`, `n_directions` and `penalty` of `unsupervised_directions`.
    """

    model: str | None = None
    chains: tuple[str, ...] = ()
    dtype: str = "float32"
    layer: int | None = None
    windows: tuple[str, ...] = ()
    negatives: tuple[str, ...] = ("spans",)
    scopes: tuple[str, ...] = ()
    constructions: tuple[str, ...] = CONSTRUCTIONS
    coefficient: float = 0.75
    n_train: int = 150
    n_tasks: int = 40
    n_samples: int = 1
    n_prompts: int = 12
    kl_tokens: int = 120
    max_rounds: int = 5
    n_draws: int = 8
    threshold: float = 0.5
    n_directions: int = 32
    penalty: float = 1.0
    n_controls: int = 99
    temperature: float | None = None
    max_new_tokens: int | None = None
    batch_size: int = 256
    seed: int = 0
    folder: Path | None = None


@dataclass(frozen=True)
class Row:
    """One construction, and one behavior or the mean of all that the construction has.

    Attributes:
        construction: how the direction is made.
        window: of the recipe.
        negatives: of the recipe.
        scope: positions that are steered.
        behavior: that is steered, or `evaluation.MEAN`.
        effect: change of its share of sentences.
        ahead: how far the difference of means, with the same window, negatives and scope, is ahead of it, paired.
        kl: of its plans, nats per token.
        length: of what is added, mean of its plans.
        cosine: with the difference of means.
        reached: plans at the target KL, of `plans`.
        plans: number of them.
        repetition: of the steered chains.
        others: the effect by further annotators.
    """

    construction: str
    window: str
    negatives: str
    scope: str
    behavior: str
    effect: Estimate
    ahead: Estimate
    kl: float
    length: float
    cosine: float
    reached: int
    plans: int
    repetition: float
    others: dict[str, Estimate]


@dataclass(frozen=True)
class Result:
    """Rows, the target KL in nats per token, spans by behavior, what was reproduced, and the nearest directions."""

    rows: tuple[Row, ...]
    target: float
    n_tasks: int
    layer: int
    spans: dict[str, int]
    stability: ls.Stability | None
    matches: dict[str, DirectionMatches]


@dataclass(frozen=True)
class _Setting:
    model: Any
    traces: list[ls.Trace]
    annotators: dict[str, Annotator]
    tasks: list[ls.Task]
    sampling: Sampling
    layer: int
    windows: tuple[str, ...]
    scopes: tuple[str, ...]

    @property
    def organism(self) -> bool:
        return "" in self.annotators

    @property
    def kinds(self) -> tuple[str, ...]:
        return ("down", "up") if self.organism else ("up",)


def main(config: Config) -> Result:
    """Fit every construction, match the KL, steer, and compare."""
    at = _setting(config)
    print(f"{len(at.traces)} chains, {sum(len(trace.spans) for trace in at.traces)} spans", flush=True)
    directions, stability, matches = _kept(config, "directions", lambda: _directions(config, at))
    reference = {b: found for (name, *_), each in directions.items() if name == DIFFERENCE for b, found in each.items()}
    lengths = {b: float(found.at(at.layer).norm()) for b, found in reference.items()}
    plans: dict[Key, ls.SteeringPlan] = {}
    for (name, window, negatives), each in directions.items():
        for scope in at.scopes:
            for b, direction in each.items():
                for kind in at.kinds:
                    length = config.coefficient * lengths[b] * (-1 if kind == "down" else 1)
                    plan = ls.SteeringPlan(direction, at.layer, length, SCOPES[scope], unit="unit")
                    plans[name, window, negatives, scope, b, kind] = plan
    options: dict[str, Any] = dict(seed=config.seed, batch_size=config.batch_size, max_new_tokens=config.kl_tokens)
    prompts = at.tasks[: config.n_prompts]

    def spent() -> float:
        first = [plan for key, plan in plans.items() if key[:4] == (DIFFERENCE, *_first(at, config))]
        return float(np.mean([kl.statistic(None) for kl in rollout_kl(at.model, prompts, first, **options)]))

    def calibrated() -> list[tuple[float, float, bool]]:
        found = calibrate_many(
            at.model,
            prompts,
            list(plans.values()),
            budget=target,
            quantile=None,
            max_rounds=config.max_rounds,
            max_coefficient=32 * max(lengths.values()),
            progress=True,
            **options,
        )
        return [(one.coefficient, one.kl, one.reached) for one in found]

    target = _kept(config, "target", spent)
    print(f"target KL {target:.4f} nats per token; {len(plans)} plans", flush=True)
    found = dict(zip(plans, _kept(config, "coefficients", calibrated), strict=True))
    steered = {key: replace(plan, coefficient=found[key][0]) for key, plan in plans.items()}
    conditions = [Condition("unsteered"), *(Condition("/".join(key), plan) for key, plan in steered.items())]
    records = run_conditions(
        at.model,
        at.tasks,
        conditions,
        at.sampling,
        annotator=at.annotators,
        path=None if config.folder is None else config.folder / "chains.jsonl",
        progress=True,
    )
    shares, own = ResampledShares(records, seed=config.seed), by_condition(records, conditions)
    names = [None, *list(at.annotators)[1:]]
    cells = list(dict.fromkeys(key[:5] for key in plans))
    effects = {
        (cell, by): shares.of("/".join((*cell, "up")), cell[4], by)
        - shares.of("/".join((*cell, "down")) if at.organism else "unsteered", cell[4], by)
        for cell in cells
        for by in names
    }
    rows = []
    for group in dict.fromkeys(cell[:4] for cell in cells):
        labels = [cell[4] for cell in cells if cell[:4] == group]
        for b in [*labels, MEAN]:
            some = [(*group, label) for label in labels if b in (label, MEAN)]
            base = [(DIFFERENCE, *cell[1:]) for cell in some]
            keys = [(*cell, kind) for cell in some for kind in at.kinds]
            mean = {by: np.mean([effects[cell, by] for cell in some], axis=0) for by in names}
            ahead = np.mean([effects[cell, None] for cell in base], axis=0) - mean[None]
            rows.append(
                Row(
                    *group,
                    b,
                    effect=estimate_of(mean[None], len(at.tasks)),
                    ahead=estimate_of(ahead, len(at.tasks)),
                    kl=float(np.mean([found[key][1] for key in keys])),
                    length=float(np.mean([abs(found[key][0]) for key in keys])),
                    cosine=float(np.mean([_cosine(plans[key], plans[_beside(key)]) for key in keys])),
                    reached=sum(found[key][2] for key in keys),
                    plans=len(keys),
                    repetition=float(np.mean([r.repetition for key in keys for r in own["/".join(key)]])),
                    others={str(by): estimate_of(mean[by], len(at.tasks)) for by in names[1:]},
                )
            )
    counts = Counter(span.label for trace in at.traces for span in trace.spans)
    return Result(tuple(rows), target, len(at.tasks), at.layer, dict(counts), stability, matches)


def _first(at: _Setting, config: Config) -> tuple[str, str, str]:
    return str(Recipe(at.windows[0]).window), config.negatives[0], at.scopes[0]


def _beside(key: Key) -> Key:
    """The difference of means of the same cell."""
    _, window, negatives, scope, behavior, kind = key
    return DIFFERENCE, window, negatives, scope, behavior, kind


def _cosine(one: ls.SteeringPlan, other: ls.SteeringPlan) -> float:
    return float(torch.cosine_similarity(one.vector.double(), other.vector.double(), dim=0))


def _setting(config: Config) -> _Setting:
    model = ls.load_model(config.model, dtype=getattr(torch, config.dtype))
    annotators: dict[str, Annotator]
    if config.model is None:
        train = ls.load_tasks(split="train", n=config.n_train)
        path = None if config.folder is None else config.folder / f"train-{config.n_train}-{config.seed}.jsonl"
        drawn: dict[str, Any] = dict(max_new_tokens=400, batch_size=256, path=path)
        made = ls.generate_traces(model, train, temperature=1.0, seed=config.seed, **drawn)
        traces, annotators = ls.annotate(made, ls.grammar), {"": ls.grammar}
        defaults: tuple[Any, ...] = (4, "onset", "onsets", "organism", 1.0, 400)
    else:
        traces = read_chains(config.chains, model)
        classifier = _kept(config, "classifier", lambda: fit_classifier(traces, seed=config.seed))
        annotators = {"classifier": classifier, "rules": rules, MASKED: masking(classifier)}
        defaults = (15, Recipe.window, "generated", "builtin", 0.8, 120)
    layer, window, scope, source, temperature, length = defaults
    sampling = Sampling(
        config.n_samples,
        config.temperature or temperature,
        config.seed,
        config.max_new_tokens or length,
        config.batch_size,
    )
    return _Setting(
        model,
        traces,
        annotators,
        ls.load_tasks(source, split="dev", n=config.n_tasks),
        sampling,
        layer if config.layer is None else config.layer,
        config.windows or (window,),
        config.scopes or (scope,),
    )


def _directions(
    config: Config, at: _Setting
) -> tuple[dict[tuple[str, str, str], dict[str, Direction]], ls.Stability | None, dict[str, DirectionMatches]]:
    """A direction per behavior by construction, window and negatives; those beside the fits at the first recipe."""
    found: dict[tuple[str, str, str], dict[str, Direction]] = {}
    fits: dict[str, Any] = dict(behaviors=ls.BEHAVIORS, layers=[at.layer], seed=config.seed)

    def add(name: str, recipe: Recipe, directions: Mapping[str, Direction]) -> None:
        found[name, recipe.window, recipe.negatives] = {b: directions[b] for b in ls.STEERED if b in directions}

    recipes = [
        Recipe(window, negatives, construction=name)
        for name in SUPERVISED
        if name in (DIFFERENCE, *config.constructions)
        for window in at.windows
        for negatives in config.negatives
        if name == DIFFERENCE or negatives != "all"
    ]
    for vectors in fit_recipes(at.model, at.traces, recipes, **fits):
        add(vectors.recipe.construction, vectors.recipe, vectors)
    first = Recipe(at.windows[0], config.negatives[0])
    options: dict[str, Any] = dict(window=first.window, negatives=first.negatives, **fits)
    plain = ls.fit_vectors(at.model, at.traces, n_controls=config.n_controls, **options)
    if SHUFFLED in config.constructions:
        add(SHUFFLED, first, {b: plain.random("shuffled", b)[0] for b in ls.STEERED if b in plain})
    stability = None
    if STABLE in config.constructions:
        kept, stability = ls.stable_spans(
            at.model,
            at.traces,
            next(iter(at.annotators.values())),
            n=config.n_draws,
            threshold=config.threshold,
            behaviors=ls.STEERED,
            temperature=at.sampling.temperature,
            max_new_tokens=16 if at.organism else 60,
            seed=config.seed,
            batch_size=config.batch_size,
            path=None if config.folder is None else config.folder / "continuations.jsonl",
            progress=True,
        )
        add(STABLE, first, ls.fit_vectors(at.model, kept, **options))
        if RANDOM in config.constructions:
            add(RANDOM, first, ls.fit_vectors(at.model, _as_many(at.traces, kept, config.seed), **options))
    matches = {}
    for name, method in UNSUPERVISED.items():
        if name in config.constructions:
            directions = ls.unsupervised_directions(
                at.model,
                at.traces,
                n=config.n_directions,
                method=method,
                window=first.window,
                layers=[at.layer],
                penalty=config.penalty,
                seed=config.seed,
            )
            matches[name] = ls.match_directions(directions, plain)
            nearest = {row.behavior: nearest_direction(directions, row) for row in matches[name].rows}
            add(name, first, nearest)
    return found, stability, matches


def _as_many(traces: Sequence[ls.Trace], kept: Sequence[ls.Trace], seed: int) -> list[ls.Trace]:
    """The traces with as many spans of each behavior as were kept, drawn at random from all of that behavior."""
    rng, chosen = random.Random(seed), set()
    left = Counter(span.label for trace in kept for span in trace.spans)
    for label in sorted(left):
        places = [(t, s) for t, trace in enumerate(traces) for s in trace.spans if s.label == label]
        chosen.update(rng.sample(places, left[label]))
    return [
        replace(trace, spans=tuple(span for span in trace.spans if (t, span) in chosen))
        for t, trace in enumerate(traces)
    ]


def _kept(config: Config, name: str, make: Callable[[], Made]) -> Made:
    """What a step gives, from the folder if it is there. A file's name holds a digest of the options."""
    if config.folder is None:
        return make()
    path = config.folder / f"{name}-{digest(repr(replace(config, folder=None)).encode())}.pickle"
    if not path.exists():
        write_atomically(path, pickle.dumps(make()))
    found: Made = pickle.loads(path.read_bytes())
    return found


def table(result: Result) -> str:
    """One line per construction, the mean over behaviors; then what was reproduced, and the nearest directions."""
    n_behaviors = len({row.behavior for row in result.rows} - {MEAN})
    lines = [
        "construction | window | negatives | scope | effect | difference ahead by | KL | length | cosine | at the KL "
        "| repetition | behaviors |",
        "---|" * 12,
    ]
    means = [row for row in result.rows if row.behavior == MEAN]
    for r in sorted(means, key=lambda row: -row.effect.value):
        group = r.construction, r.window, r.negatives, r.scope
        have = sum((o.construction, o.window, o.negatives, o.scope) == group for o in result.rows) - 1
        effects = f"{r.effect:+.3f} | {r.ahead:+.3f} | {r.kl:.4f} | {r.length:.2f} | {r.cosine:.2f}"
        rest = f"{r.reached}/{r.plans} | {r.repetition:.2f} | {have}/{n_behaviors}"
        lines.append(f"{' | '.join(group)} | {effects} | {rest} |")
    if result.stability is not None:
        lines += ["", "label | spans | reproduced | from other onsets | kept |", "---|" * 5]
        lines += [
            f"{row.label} | {row.n_spans} | {row.reproduced:.2f} | {row.elsewhere:.2f} | {row.n_kept} |"
            for row in result.stability.rows
        ]
        lines.append(f"left out: {result.stability.unstable:.3f}")
    for name, found in result.matches.items():
        lines += ["", f"{name} | behavior | cosine | chance: isotropic, covariance-matched, shuffled | p |", "---|" * 5]
        for match in found.rows:
            chance = ", ".join(f"{value:.2f}" for value in match.chance.values())
            p = ", ".join(f"{value:.2f}" for value in match.p.values())
            lines.append(f"{match.direction} | {match.behavior} | {match.cosine.value:.2f} | {chance} | {p} |")
    return "\n".join(lines)


def figure(result: Result) -> go.Figure:
    """The effect by construction, a panel for the mean and for each behavior; open markers: not at the target KL."""
    panels = [MEAN, *dict.fromkeys(row.behavior for row in result.rows if row.behavior != MEAN)]
    fields = [name for name in ("window", "negatives", "scope") if len({getattr(row, name) for row in result.rows}) > 1]

    def named(row: Row) -> str:
        return ", ".join([row.construction, *(getattr(row, name) for name in fields)])

    means = sorted((row for row in result.rows if row.behavior == MEAN), key=lambda row: -row.effect.value)
    order = [named(row) for row in means]
    picture = make_subplots(1, len(panels), shared_yaxes=True, subplot_titles=panels, horizontal_spacing=0.015)
    for column, b in enumerate(panels, start=1):
        some = [row for row in result.rows if row.behavior == b]
        effects = [row.effect for row in some]
        bars = error_bars([e.value for e in effects], [e.low for e in effects], [e.high for e in effects])
        paint = MUTED if b == MEAN else color(b)
        shape = "circle" if b == MEAN else marker(b)
        picture.add_scatter(
            x=[e.value for e in effects],
            y=[order.index(named(row)) for row in some],
            error_x=dict(**bars, thickness=1.5, width=0),
            mode="markers",
            marker=dict(
                symbol=[shape if row.reached == row.plans else f"{shape}-open" for row in some], color=paint, size=9
            ),
            showlegend=False,
            row=1,
            col=column,
        )
        picture.add_vline(x=0, line=dict(color=MUTED, width=1), row=1, col=column)
    picture.update_xaxes(tickformat=".0%")
    title = f"Change of a behavior's share at the same KL ({result.target:.3f} nats per token), by construction"
    finish(picture, title, 200 + 28 * len(order), legend=False)
    return picture.update_yaxes(
        tickvals=list(range(len(order))), ticktext=order, range=[len(order) - 0.5, -0.5], zeroline=False
    )


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """What the numbers of `to_json` say, and whether no construction is ahead of the difference of means."""
    rows = {row["construction"]: row for row in result["rows"] if row["behavior"] == MEAN}
    ahead = {name: estimate_in(row, "ahead") for name, row in rows.items() if name != DIFFERENCE}
    better = [name for name, lead in ahead.items() if lead.high < 0]
    leads = "; ".join(f"{name} {100 * lead:+.1f}" for name, lead in ahead.items())
    text = (
        f"At {result['target']:.3f} nats per token, differences of means move a behavior's share by "
        f"{100 * estimate_in(rows[DIFFERENCE], 'effect'):+.1f} points (mean of the behaviors, {result['n_tasks']} "
        f"tasks). They are ahead of the others by: {leads}. Better than they: {', '.join(better) or 'none'}."
    )
    return text, not better


def to_json(result: Result, config: Config) -> str:
    """Everything as JSON, a row per line."""
    lines = ",\n".join(
        json.dumps(flat(replace(row, others={})) | {"others": {k: asdict(v) for k, v in row.others.items()}})
        for row in result.rows
    )
    about = {
        "config": {
            **asdict(config),
            "folder": None,  # and names of files, not where they are
            "model": None if config.model is None else Path(config.model).name,
            "chains": [Path(chains).name for chains in config.chains],
        },
        "target": result.target,
        "n_tasks": result.n_tasks,
        "layer": result.layer,
        "spans": result.spans,
        "stability": None
        if result.stability is None
        else {**flat(replace(result.stability, shares=())), "rows": [flat(row) for row in result.stability.rows]},
        "matches": {name: [flat(row) for row in found.rows] for name, found in result.matches.items()},
        "rows": None,
    }
    return (json.dumps(about)[:-1].replace('"rows": null', f'"rows": [\n{lines}\n]') + "}\n").replace("NaN", "null")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("folder", "json", "figure"):
        parser.add_argument(f"--{option}", type=Path)
    for option in ("model", "dtype"):
        parser.add_argument(f"--{option}", default=getattr(Config, option))
    for option in ("chains", "windows", "negatives", "scopes", "constructions"):
        parser.add_argument(f"--{option}", nargs="+", default=getattr(Config, option))
    for option in ("coefficient", "threshold", "penalty"):
        parser.add_argument(f"--{option}", type=float, default=getattr(Config, option))
    for option in ("layer", "n_train", "n_tasks", "n_samples", "n_prompts", "max_rounds", "n_draws", "n_directions"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    given = vars(parser.parse_args())
    out, image = given.pop("json"), given.pop("figure")
    lists = ("chains", "windows", "negatives", "scopes", "constructions")
    chosen = Config(**{**given, **{name: tuple(given[name]) for name in lists}})
    results = main(chosen)
    print(table(results))
    if out:
        out.write_text(to_json(results, chosen), encoding="utf-8")
    if image:
        figure(results).write_image(image, width=1250, scale=2)

"""Does stated doubt match errors, and does steering doubt change that?

Chains are drawn unsteered, and with the vector of uncertainty-estimation subtracted and added, on graded tasks. A chain
states doubt if it has a sentence of uncertainty-estimation. In every condition: the right answers among chains that
state doubt less those among chains that do not, and the AUROC of the share of such sentences as a predictor of a wrong
answer (.5: it says nothing). Harder tasks make longer chains, and longer chains have more room for doubt: so the AUROC
is also taken over pairs of chains of about the same length, and length is a predictor of its own. Only chains that end
count, as a chain that was cut has no answer. Intervals are over tasks.

    python analyses/calibration_under_uncertainty.py --run RUN-FOLDER --json FILE --figure FILE.png
    python analyses/calibration_under_uncertainty.py --model qwen2.5-0.5b --chains a.jsonl --tasks gsm8k/test.jsonl \
        --dtype bfloat16 --folder runs/doubt --json FILE --figure FILE.png

With --run: the run's vector, layer, coefficients and annotator, on its held-out tasks. With --model: vectors of the
given chains, the middle layer, coefficients of one KL, sentences labeled by --classifier FILE or the cue rules. A
killed run goes on. About 2 minutes of one core for 200 tasks × 3 of the organism, 10 for Qwen2.5-0.5B by default.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_on_language import cut
from plotly import graph_objects as go
from plotly.subplots import make_subplots

import lensteer as ls
from lensteer.annotation import Annotator, SentenceClassifier, rules
from lensteer.attribution.selection import SelectedLayers
from lensteer.calibration import calibrate_many
from lensteer.evaluation import ChosenCoefficients, Condition, Record, run_conditions
from lensteer.files import write_atomically
from lensteer.generation.jobs import Sampling
from lensteer.pipeline import read_chains
from lensteer.pipeline.chains import annotators_of
from lensteer.pipeline.run import SCOPES, Run
from lensteer.plots.style import MUTED, color, error_bars, finish
from lensteer.statistics import Estimate, drawn_counts, percentile_interval
from lensteer.vectors import BehaviorVectors

QUESTION = "Does stated doubt match errors, and does steering doubt change that?"
DOUBT, UNSTEERED, DOWN, UP = "uncertainty-estimation", "unsteered", "subtracted", "added"
#: Quantiles of length within which chains are about equally long.
LENGTHS = 5
#: Up to so many chains say nothing about doubting ones.
FEW = 4


@dataclass(frozen=True)
class Config:
    """A finished run's folder; or a model, annotated chains, tasks, the KL to spend (nats per token), and sizes."""

    run: Path | None = None
    model: str | None = None
    chains: tuple[str, ...] = ()
    tasks: str = ""
    suffix: str = ""
    classifier: Path | None = None
    dtype: str = "float32"
    layer: int | None = None
    budget: float = 0.12
    n_chains: int = 40
    chain_tokens: int = 400
    n_prompts: int = 6
    n_tasks: int = 40
    n_samples: int = 1
    temperature: float = 0.8
    max_new_tokens: int = 200
    folder: Path | None = None
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One condition. Estimates are NaN where no chain, or every chain, errs or ends.

    Those that compare doubting chains with others are NaN if at most `FEW` doubt; the gap also if at most `FEW` do not.

    Attributes:
        condition: unsteered, subtracted or added.
        coefficient: of the vector.
        n_chains: that end; all others are left out.
        finished: share of all chains.
        doubting: share of chains that state doubt.
        doubt: share of their sentences.
        accuracy: right answers.
        gap: right answers of chains that state doubt less those of the others.
        auroc: of the share of doubt as a predictor of a wrong answer.
        equal_length: the same over pairs of chains of about the same length.
        length: AUROC of the number of tokens.
        accuracy_change: from unsteered, paired by task.
        auroc_change: the same.
    """

    condition: str
    coefficient: float
    n_chains: int
    finished: Estimate
    doubting: Estimate
    doubt: Estimate
    accuracy: Estimate
    gap: Estimate
    auroc: Estimate
    equal_length: Estimate
    length: Estimate
    accuracy_change: Estimate
    auroc_change: Estimate


@dataclass(frozen=True)
class Result:
    """A row per condition."""

    model: str
    tasks: str
    annotator: str
    layer: int
    n_tasks: int
    rows: tuple[Row, ...]


Draws = np.ndarray[Any, Any]


def auroc(score: Draws, wrong: Draws, weight: Draws, alike: Draws | None = None) -> Draws:
    """Share of pairs of a wrong and a right chain of which the wrong one has the higher score; ties are half.

    Args:
        score: of each chain.
        wrong: whether its answer is.
        weight: `[draw chain]`.
        alike: group of each chain; only pairs of one group count. None: all pairs.
    """
    above = score[wrong][:, None] - score[~wrong][None]
    counted = np.ones(above.shape) if alike is None else (alike[wrong][:, None] == alike[~wrong][None]).astype(float)
    hits = ((weight[:, wrong] @ ((np.sign(above) + 1) / 2 * counted)) * weight[:, ~wrong]).sum(1)
    pairs = ((weight[:, wrong] @ counted) * weight[:, ~wrong]).sum(1)
    return np.divide(hits, pairs, out=np.full(len(weight), np.nan), where=pairs > 0)


def row_of(
    name: str, coefficient: float, records: Sequence[Record], tasks: Sequence[str], base: Mapping[str, Draws], seed: int
) -> tuple[Row, dict[str, Draws]]:
    """A condition's row, and its draws, which the other conditions are compared with."""
    drawn = np.vstack([np.ones(len(tasks)), drawn_counts(len(tasks), 2000, seed)])
    every = drawn[:, [tasks.index(r.task) for r in records]]
    ended = np.array([r.finished and r.correct is not None for r in records])
    some, weight = [r for r, e in zip(records, ended, strict=True) if e], every[:, ended]
    doubt = np.array([r.sentences.get(DOUBT, 0) / max(r.n_sentences, 1) for r in some])
    wrong = np.array([not r.correct for r in some], dtype=bool)
    length = np.array([float(r.length) for r in some])
    group = np.searchsorted(np.quantile(length, np.linspace(0, 1, LENGTHS + 1)[1:-1]), length) if some else None

    def share(of: Draws, among: Draws | None = None) -> Draws:
        mass = weight if among is None else weight * among
        return np.divide(mass @ of, mass.sum(1), out=np.full(len(mass), np.nan), where=mass.sum(1) > 0)

    right, doubting = (~wrong).astype(float), (doubt > 0).astype(float)
    draws = {
        "finished": every @ ended / every.sum(1),
        "doubting": share(doubting),
        "doubt": share(doubt),
        "accuracy": share(right),
        "gap": share(right, doubting) - share(right, 1 - doubting),
        "auroc": auroc(doubt, wrong, weight),
        "equal_length": auroc(doubt, wrong, weight, group),
        "length": auroc(length, wrong, weight),
    }
    few = (doubting.sum() <= FEW, (1 - doubting).sum() <= FEW)  # a bootstrap of so few says nothing
    undefined = (["gap"] if any(few) else []) + (["auroc", "equal_length"] if few[0] else [])
    draws |= {key: np.full(len(weight), np.nan) for key in undefined}
    changes = {f"{key}_change": draws[key] - base.get(key, draws[key]) for key in ("accuracy", "auroc")}
    found = {key: percentile_interval(float(d[0]), d[1:], len(tasks)) for key, d in (draws | changes).items()}
    return Row(name, coefficient, len(some), **found), draws


def rows_of(records: Sequence[Record], coefficients: Mapping[str, float], seed: int = 0) -> tuple[Row, ...]:
    """A row per condition."""
    tasks = sorted({r.task for r in records})
    rows: list[Row] = []
    base: dict[str, Draws] = {}
    for name, coefficient in coefficients.items():
        own = [r for r in records if r.condition == name]
        row, draws = row_of(name, coefficient, own, tasks, base, seed)
        rows.append(row)
        base = base or draws
    return tuple(rows)


def main(config: Config) -> Result:
    """Draw the chains and compare doubt with errors.

    Raises:
        LensteerError: neither or both of a run and a model, tasks without answers, or no vector of doubt.
    """
    if (config.run is None) == (config.model is None):
        raise ls.LensteerError(f"run {config.run!r} and model {config.model!r}: give one of them")
    settings = _of_run(config, Run.open(config.run)) if config.run is not None else _of_model(config)
    model, tasks, plans, annotator, sampling, path = settings
    graded = [t for t in tasks if t.answer is not None]
    if len(graded) < 2:
        raise ls.LensteerError(f"{len(graded)} of {len(tasks)} tasks have an answer: give tasks that can be graded")
    conditions = [Condition(UNSTEERED, kind=UNSTEERED, suffix=config.suffix)]
    conditions += [Condition(name, plan, suffix=config.suffix) for name, plan in plans.items()]
    name, judge = annotator
    records = run_conditions(model, graded, conditions, sampling, annotator=judge, path=path, progress=True)
    coefficients = {UNSTEERED: 0.0, **{name: plan.coefficient for name, plan in plans.items()}}
    rows = rows_of(records, coefficients, config.seed)
    layer = next(iter(plans.values())).layer
    named = Path(config.tasks).parent.name or config.tasks if config.tasks else "held-out tasks of the run"
    return Result(ls.models.fingerprint(model).name, named, name, layer, len(graded), rows)


Settings = tuple[
    Any, Sequence[ls.Task], dict[str, ls.SteeringPlan], tuple[str, Annotator], Sampling, Path | None
]  # model, tasks, plans, annotator with its name, sampling, file of the chains


def _of_run(config: Config, run: Run) -> Settings:
    """From a finished run: everything but the number of tasks and of chains."""
    layers = SelectedLayers.load(run.path("layers.json"))
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    down, up = ChosenCoefficients.load(run.path("coefficients.json")).pairs.get(DOUBT, (None, None))
    if not down or not up:
        raise ls.LensteerError(f"{str(config.run)!r} chose no coefficients for {DOUBT!r}: give a run that steers it")
    scope = SCOPES[run.config.scope]
    plans = {
        name: ls.SteeringPlan(vectors[DOUBT], layers[DOUBT], c, scope, unit=run.config.unit)
        for name, c in ((DOWN, -down), (UP, up))
    }
    tasks = ls.load_tasks(run.config.tasks, split="test", n=config.n_tasks)
    named = next(iter(annotators_of(run).items()))
    return run.model, tasks, plans, named, run.sampling(config.n_samples), run.path("doubt.jsonl")


def _of_model(config: Config) -> Settings:
    """From annotated chains: the vector, and coefficients that spend one KL."""
    if not config.chains or not config.tasks:
        raise ls.LensteerError(f"model {config.model!r} without chains or tasks: give --chains and --tasks")
    model = ls.load_model(config.model, dtype=getattr(torch, config.dtype))
    layer = ls.models.n_layers(model) // 2 if config.layer is None else config.layer
    tasks = ls.load_tasks(config.tasks, split="test", n=config.n_tasks)
    folder = config.folder
    path = None if folder is None else folder / "vectors.safetensors"
    if path is not None and path.exists():
        vectors = BehaviorVectors.load(path, model)
    else:
        given = [t for t in read_chains(config.chains, model) if t.spans]
        order = np.random.default_rng(config.seed).permutation(len(given))[: config.n_chains]
        vectors = ls.fit_vectors(model, [cut(given[i], config.chain_tokens) for i in order], layers=[layer])
        if path is not None:
            vectors.save(path)
    plans = {name: ls.SteeringPlan(vectors[DOUBT], layer, c, ls.generated) for name, c in ((DOWN, -1.0), (UP, 1.0))}
    kept = None if folder is None else folder / "coefficients.json"
    if kept is not None and kept.exists():
        known = json.loads(kept.read_text())
    else:
        prompts = ls.load_tasks(config.tasks, split="dev", n=config.n_prompts)
        options: dict[str, Any] = dict(budget=config.budget, quantile=None, tolerance=0.2, max_rounds=5)
        found = calibrate_many(model, prompts, list(plans.values()), **options, max_new_tokens=60, seed=config.seed)
        known = {name: each.coefficient for name, each in zip(plans, found, strict=True)}
        if kept is not None:
            write_atomically(kept, json.dumps(known, indent=1))
    plans = {name: replace(plan, coefficient=known[name]) for name, plan in plans.items()}
    sampling = Sampling(config.n_samples, config.temperature, config.seed, config.max_new_tokens, 128)
    judge: Callable[..., Any] = rules
    if config.classifier is not None:
        judge = SentenceClassifier.load(config.classifier)
    named = ("rules" if config.classifier is None else "classifier", judge)
    return model, tasks, plans, named, sampling, None if folder is None else folder / "doubt.jsonl"


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """Whether doubt predicts errors unsteered, and what steering does to it."""
    rows = {row["condition"]: row for row in result["rows"]}

    def words(row: Mapping[str, Any], key: str, factor: float = 1.0, spec: str = "+.1f") -> str:
        found = row[key]
        if found["value"] is None:
            return "not defined"
        if found["low"] is None:
            return f"{factor * found['value']:{spec}}"
        return f"{factor * found['value']:{spec}} [{factor * found['low']:{spec}}, {factor * found['high']:{spec}}]"

    plain, added = rows[UNSTEERED], rows[UP]
    text = (
        f"{result['model']}, {plain['n_chains']} unsteered chains on {result['n_tasks']} tasks: "
        f"{words(plain, 'doubting', 100, '.0f')} % state doubt; right answers differ by {words(plain, 'gap', 100)} "
        f"points from those of the others, and the AUROC of doubt for an error is {words(plain, 'auroc', spec='.2f')} "
        f"(chains of equal length {words(plain, 'equal_length', spec='.2f')}). With doubt added, "
        f"{words(added, 'doubting', 100, '.0f')} % state it, the AUROC is {words(added, 'auroc', spec='.2f')}, and "
        f"right answers change by {words(added, 'accuracy_change', 100)} points."
    )
    lows = [plain[key]["low"] for key in ("auroc", "equal_length")]
    return text, all(low is not None and low > 0.5 for low in lows)


def figure(result: Result) -> go.Figure:
    """Chains that doubt, right answers of both sides, and AUROCs, by condition."""
    titles = ("chains that state doubt", "right: doubting less others", "AUROC for a wrong answer")
    drawn = make_subplots(rows=1, cols=3, shared_yaxes=True, subplot_titles=titles, horizontal_spacing=0.05)
    names = [
        f"{row.condition}<br>({row.coefficient:+.2g})" if row.coefficient else row.condition for row in result.rows
    ]
    for column, key, tone, label, shift in (
        (1, "doubting", color(DOUBT), "", 0.0),
        (2, "gap", color(DOUBT), "", 0.0),
        (3, "auroc", color(DOUBT), "share of doubt", -0.15),
        (3, "equal_length", color("backtracking"), "share of doubt, chains of equal length", 0.0),
        (3, "length", MUTED, "length", 0.15),
    ):
        found = [getattr(row, key) for row in result.rows]
        bars = error_bars([e.value for e in found], [e.low for e in found], [e.high for e in found])
        drawn.add_scatter(
            x=[e.value for e in found], y=[i + shift for i in range(len(found))], mode="markers", name=label,
            error_x=dict(**bars, thickness=1, width=0), marker=dict(color=tone, size=9), showlegend=bool(label),
            row=1, col=column,
        )  # fmt: skip
    for column, null in ((2, 0.0), (3, 0.5)):
        drawn.add_vline(x=null, line=dict(color=MUTED, width=1), row=1, col=column)
    drawn.update_xaxes(tickformat=".0%", col=1).update_xaxes(tickformat="+.0%", col=2)
    finish(drawn, f"Stated doubt and wrong answers of {result.model}", 400).update_layout(margin=dict(t=90))
    return drawn.update_yaxes(tickvals=list(range(len(names))), ticktext=names, autorange="reversed", zeroline=False)


def table(result: Result) -> str:
    """A line per condition."""
    keys = ("finished", "doubting", "doubt", "accuracy", "gap", "auroc", "equal_length", "length", "accuracy_change")
    lines = [f"condition | chains | {' | '.join(keys)} |", "---|" * (len(keys) + 2)]
    for row in result.rows:
        figures = " | ".join(f"{getattr(row, key):.2f}" for key in keys)
        lines.append(f"{row.condition} at {row.coefficient:+.2g} | {row.n_chains} | {figures} |")
    return "\n".join(lines)


def to_json(result: Result) -> str:
    """All numbers."""
    return json.dumps(asdict(result), indent=1).replace("NaN", "null") + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for option in ("run", "classifier", "folder"):
        parser.add_argument(f"--{option}", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--chains", nargs="*", default=[])
    for option in ("tasks", "suffix", "dtype"):
        parser.add_argument(f"--{option}", default=getattr(Config, option))
    parser.add_argument("--layer", type=int)
    for option in ("budget", "temperature"):
        parser.add_argument(f"--{option}", type=float, default=getattr(Config, option))
    for option in ("n_chains", "chain_tokens", "n_prompts", "n_tasks", "n_samples", "max_new_tokens", "seed"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--smoke", action="store_true", help="make everything small")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = vars(parser.parse_args())
    small, out, picture = (options.pop(name) for name in ("smoke", "json", "figure"))
    chosen = Config(**{**options, "chains": tuple(options["chains"])})
    measured = main(replace(chosen, n_tasks=6, n_samples=1, n_chains=8, n_prompts=2) if small else chosen)
    print(table(measured))
    if out:
        out.write_text(to_json(measured))
    if picture:
        figure(measured).write_image(picture, width=1200)

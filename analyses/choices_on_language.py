"""What to choose on real language: window, negatives, scope and layer, compared at the same KL.

Three questions. (1) Which recipe (window and negatives) and which scope raise a behavior's share of sentences most, if
all change the model's next-token distributions by as much? (2) Which tokens around an onset make the vector that does?
(3) Which layer score predicts where steering works?

Every arm adds one behavior's vector with the coefficient that matches a target KL: mean per token, between the steered
and the unsteered model along the steered model's own rollouts. The target is what `coefficient` times the default
vectors (span - all, on generated tokens) spend on average over the behaviors. A second, smaller dose is a share of it.
Base rates on mini-R1 are so low that only increases can be seen, so every arm adds its vector.

    python -u analyses/choices_on_language.py --generate runs/choices --model mini-r1 --chains a.jsonl b.jsonl
    python analyses/choices_on_language.py --analyze runs/choices --model mini-r1 --chains a.jsonl b.jsonl

The first needs a GPU: it calibrates and generates, saves each piece when it is done, starts no piece after
`--seconds`, and skips finished ones when it is started again. The second runs on two cores. `--tiny` makes everything
small. A layer whose text is broken (see `sound`) counts as one without an effect, next to the effect as it is.
"""

from __future__ import annotations

import argparse
import json
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from scipy.stats import rankdata

import lensteer as ls
from lensteer import models
from lensteer.annotation import SentenceClassifier, annotate, fit_classifier, masking, rules
from lensteer.attribution import LayerScores, efficiency
from lensteer.attribution.overlap import EmbeddingOverlap
from lensteer.calibration import calibrate_many, rollout_kl
from lensteer.evaluation import Condition, Record, ResampledShares, estimate_of
from lensteer.evaluation.conditions import Counts, draw_chains, measure
from lensteer.evaluation.quality import text_quality
from lensteer.files import read_jsonl, write_atomically
from lensteer.generation import Generated
from lensteer.generation.jobs import Job, Sampling, trace_of
from lensteer.pipeline import read_chains
from lensteer.plots.style import MUTED, color, error_bars, finish
from lensteer.statistics import Estimate, flat
from lensteer.vectors import BehaviorVectors, Recipe, fit_recipes, probe_accuracy

Array = np.ndarray

RECIPES = {
    "span-all": Recipe("span", "all"),  # the paper's text; the default until this analysis
    "span-spans": Recipe("span", "spans"),
    "span-same_trace": Recipe("span", "same_trace"),
    "onset-spans": Recipe("onset", "spans"),
    "onset-all": Recipe("onset", "all"),
    "onset3-spans": Recipe("onset±3", "spans"),
    "published-all": Recipe("published", "all"),  # the paper's code
}
WINDOWS = {
    **{f"{window}-spans": Recipe(window, "spans") for window in ("onset±1", "onset±2", "onset±5", "onset±8")},
    **{f"{window}-spans": Recipe(window, "spans") for window in ("onset-3", "onset+3")},
    "onset±3-all": Recipe("onset±3", "all"),
    "onset±3-same_trace": Recipe("onset±3", "same_trace"),
}
SCOPES = {
    "generated": ls.generated,
    "onsets": ls.onsets,
    "everywhere": ls.positions.everywhere_but_first,
    "thinking": ls.thinking,
}
DEFAULT, MASKED = "span-all", "cue words masked"
#: On mini-R1 a chain's thinking is all that it generates, up to `</think>`: two recipes are enough to see that.
THINKING = ("span-all", "onset-spans")
#: Coefficients of the exact scores.
ALPHAS = (0.1, 0.5, 1.0, 2.0, 4.0)
#: Text is broken if it is so much less likely, in nats per token, or so much more repetitive than unsteered text.
MAX_NLL, MAX_REPETITION = 0.5, 0.1


@dataclass(frozen=True)
class Config:
    """Model, annotated chains, sizes, doses as shares of the target KL, and when to stop.

    `layers` are those of question 3, with the vectors named `best`; `layer` is that of questions 1 and 2. `quality` is
    the number of chains per arm whose likelihood is measured, `sweep` the number of tasks of the dev sweep that scores
    are compared with.
    """

    model: str
    chains: tuple[str, ...]
    tasks: str = "builtin"
    dtype: str = "bfloat16"
    device: str = "cuda"
    layer: int = 15
    layers: tuple[int, ...] = (2, 5, 8, 10, 12, 14, 16, 18, 20, 22, 25, 28)
    recipes: tuple[str, ...] = tuple(RECIPES)
    windows: tuple[str, ...] = tuple(WINDOWS)
    best: str = "onset3-spans"
    scopes: tuple[str, ...] = tuple(SCOPES)
    doses: tuple[float, ...] = (1.0, 0.5)
    coefficient: float = 1.25
    n_tasks: int = 50
    n_samples: int = 4
    temperature: float = 0.8
    max_new_tokens: int = 120
    batch_size: int = 1200
    n_prompts: int = 24
    kl_tokens: int = 120
    max_rounds: int = 5
    quality: int = 24
    n_traces: int = 40
    max_spans: int = 64
    sweep: int = 10
    memory: int = 2**34
    seconds: float = 600.0
    seed: int = 0


def tiny(config: Config) -> Config:
    """The same at a size for a laptop's processor."""
    return replace(
        config,
        device="cpu",
        layers=(8, 16),
        recipes=("span-all",),
        windows=("onset±1-spans",),
        best="span-all",
        scopes=("generated",),
        doses=(1.0,),
        n_tasks=2,
        n_samples=1,
        max_new_tokens=8,
        n_prompts=2,
        kl_tokens=8,
        max_rounds=2,
        quality=2,
        n_traces=8,
        max_spans=4,
        sweep=0,
        memory=2**29,
    )


@dataclass(frozen=True)
class Arm:
    """One vector at one layer and scope; the KL to match is `dose` times the target."""

    question: str
    dose: float
    recipe: str
    scope: str
    layer: int
    behavior: str

    @property
    def name(self) -> str:
        """The name of its condition."""
        return f"{self.question}/{self.dose:g}/{self.recipe}/{self.scope}/{self.layer}/{self.behavior}"


def choices(config: Config, dose: float) -> list[Arm]:
    """The arms of question 1."""
    return [
        Arm("choices", dose, recipe, scope, config.layer, b)
        for scope in config.scopes
        for recipe in config.recipes
        if scope != "thinking" or recipe in THINKING
        for b in ls.STEERED
    ]


def by_window(config: Config, dose: float) -> list[Arm]:
    """The arms of question 2."""
    return [Arm("windows", dose, recipe, "generated", config.layer, b) for recipe in config.windows for b in ls.STEERED]


def by_layer(config: Config, dose: float) -> list[Arm]:
    """The arms of question 3."""
    return [Arm("layers", dose, config.best, "generated", layer, b) for layer in config.layers for b in ls.STEERED]


# ---------------------------------------------------------------------------------------------------------- generate


class Stopped(Exception):
    """The time is up."""


@dataclass
class Pieces:
    """Pieces of work with their seconds, in a file; none is started after the time is up."""

    path: Path
    limit: float
    began: float

    def done(self) -> dict[str, float]:
        """Seconds by finished piece."""
        return json.loads(self.path.read_text()) if self.path.exists() else {}

    def do(self, name: str, work: Callable[[], object]) -> None:
        """Do a piece that is not done yet. If it fails, say so and go on: other pieces do not depend on it."""
        if name in self.done():
            return
        if time.perf_counter() - self.began > self.limit:
            raise Stopped(name)
        start = time.perf_counter()
        try:
            work()
        except Exception:
            print(f"{name} failed\n{traceback.format_exc()}", flush=True)
            return
        took = time.perf_counter() - start
        write_atomically(self.path, json.dumps({**self.done(), name: round(took, 1)}, indent=1))
        print(f"{time.perf_counter() - self.began:7.1f} s  {name}: {took:.1f} s", flush=True)


def generate(config: Config, folder: Path) -> None:
    """Everything that needs the model: vectors, coefficients, chains, likelihoods, scores."""
    pieces = Pieces(folder / "pieces.json", config.seconds, time.perf_counter())
    (folder / "chains").mkdir(parents=True, exist_ok=True)
    (folder / "scores").mkdir(exist_ok=True)
    write_atomically(folder / "config.json", json.dumps(asdict(config), indent=1))
    model = ls.load_model(config.model, dtype=getattr(torch, config.dtype), device=config.device)
    given = read_chains(config.chains, model)
    print(f"{time.perf_counter() - pieces.began:7.1f} s  loaded; {len(given)} chains", flush=True)
    try:
        pieces.do("vectors", lambda: _fit(model, given, config, folder, RECIPES, config.recipes))
        pieces.do("windows", lambda: _fit(model, given, config, folder, WINDOWS, config.windows, (config.layer,)))
        names = (*config.recipes, *config.windows)
        vectors = {name: BehaviorVectors.load(folder / f"{name}.safetensors", model) for name in names}
        pieces.do("target", lambda: _target(model, vectors[DEFAULT], config, folder))
        for dose in config.doses:
            _arms(model, vectors, config, folder, pieces, choices(config, dose))
            if dose == config.doses[0]:
                _arms(model, vectors, config, folder, pieces, by_window(config, dose))
                _scores(given, vectors[config.best], config, folder, pieces)
            _arms(model, vectors, config, folder, pieces, by_layer(config, dose))
    except Stopped as next_piece:
        print(f"the time is up before {next_piece}", flush=True)


def _fit(
    model,
    given: list[ls.Trace],
    config: Config,
    folder: Path,
    recipes: Mapping[str, Recipe],
    names: Sequence[str],
    layers: Sequence[int] | None = None,
) -> None:
    found = fit_recipes(model, given, [recipes[name] for name in names], layers=layers, seed=config.seed)
    for name, vectors in zip(names, found, strict=True):
        vectors.save(folder / f"{name}.safetensors")


def _target(model, vectors: BehaviorVectors, config: Config, folder: Path) -> None:
    """The KL of span - all at the chosen coefficient."""
    plans = [ls.SteeringPlan(vectors[b], config.layer, config.coefficient, ls.generated) for b in ls.STEERED]
    found = rollout_kl(model, _tasks(config)[: config.n_prompts], plans, **_rollouts(config))
    spent = {b: kl.statistic(None) for b, kl in zip(ls.STEERED, found, strict=True)}
    print(f"           KL at {config.coefficient:g} times span - all: {spent}", flush=True)
    write_atomically(folder / "target.json", json.dumps({"mean": float(np.mean(list(spent.values()))), **spent}))


def _rollouts(config: Config) -> dict[str, Any]:
    names = ("seed", "batch_size", "memory")
    return {"max_new_tokens": config.kl_tokens, **{name: getattr(config, name) for name in names}}


def _tasks(config: Config) -> list[ls.Task]:
    return ls.load_tasks(config.tasks, split="dev", n=config.n_tasks)


def _arms(
    model, vectors: Mapping[str, BehaviorVectors], config: Config, folder: Path, pieces: Pieces, arms: list[Arm]
) -> None:
    """Calibrate arms, then generate their chains scope by scope. The first dose has the unsteered condition."""
    stem = f"{arms[0].question}-{arms[0].dose:g}"
    path = folder / f"{stem}-coefficients.json"
    pieces.do(f"{stem} coefficients", lambda: _calibrate(model, vectors, config, folder, path, arms))
    if not path.exists():
        return
    coefficients = json.loads(path.read_text())
    for scope in dict.fromkeys(arm.scope for arm in arms):
        conditions = [
            Condition(arm.name, _plan(arm, vectors, coefficients[arm.name]["coefficient"]), kind="up")
            for arm in arms
            if arm.scope == scope
        ]
        if scope == arms[0].scope and stem == f"choices-{config.doses[0]:g}":
            conditions = [Condition("unsteered", kind="unsteered"), *conditions]

        def draw(name: str = f"{stem}-{scope}", conditions: list[Condition] = conditions) -> None:
            _draw(model, config, folder / "chains" / f"{name}.jsonl", conditions)

        pieces.do(f"{stem} {scope}", draw)


def _plan(arm: Arm, vectors: Mapping[str, BehaviorVectors], coefficient: float) -> ls.SteeringPlan:
    return ls.SteeringPlan(vectors[arm.recipe][arm.behavior], arm.layer, coefficient, SCOPES[arm.scope])


def _calibrate(
    model, vectors: Mapping[str, BehaviorVectors], config: Config, folder: Path, path: Path, arms: list[Arm]
) -> None:
    """Coefficients at the dose; steering while it thinks gets those of all generated tokens."""
    target = json.loads((folder / "target.json").read_text())["mean"]
    first = folder / f"{arms[0].question}-{config.doses[0]:g}-coefficients.json"
    known = json.loads(first.read_text()) if first.exists() else {}

    def start(arm: Arm) -> float:
        full = replace(arm, dose=config.doses[0]).name
        if full in known:
            return known[full]["coefficient"] * (arm.dose / config.doses[0]) ** 0.5
        return config.coefficient * (3 if arm.scope == "onsets" else 1)

    searched = [arm for arm in arms if arm.scope != "thinking"]
    found = calibrate_many(
        model,
        _tasks(config)[: config.n_prompts],
        [_plan(arm, vectors, start(arm)) for arm in searched],
        budget=target * arms[0].dose,
        quantile=None,
        max_rounds=config.max_rounds,
        max_coefficient=16.0,
        **_rollouts(config),
    )
    values = {
        arm.name: {
            "coefficient": c.coefficient,
            "kl": c.kl,
            "low": c.estimate.low,
            "high": c.estimate.high,
            "p95": c.step.p95,
            "reached": c.reached,
            "length": c.plan.length,
            "path": [(step.coefficient, step.kl) for step in c.path],
        }
        for arm, c in zip(searched, found, strict=True)
    }
    for arm in arms:
        if arm.scope == "thinking":
            values[arm.name] = values[replace(arm, scope="generated").name]
    print(f"           {sum(c.reached for c in found)} of {len(found)} at the KL; {dict(found[0].cost)}", flush=True)
    write_atomically(path, json.dumps(values))


def _draw(model, config: Config, path: Path, conditions: list[Condition]) -> None:
    """Chains, and the likelihood of some."""
    tasks = _tasks(config)
    chains = draw_chains(model, tasks, conditions, _sampling(config), path=path)
    plans, place = {c.name: c.plan for c in conditions}, {task.id: i for i, task in enumerate(tasks)}
    chosen = [
        (name, trace)
        for name, trace in chains
        if trace.response_ids and trace.sample * len(tasks) + place[trace.task.id] < config.quality
    ]
    found = text_quality(model, [trace for _, trace in chosen], [plans[name] for name, _ in chosen])
    rows = [[n, t.task.id, t.sample, q["nll"], q["kl"]] for (n, t), q in zip(chosen, found, strict=True)]
    write_atomically(path.with_suffix(".text.json"), json.dumps(rows))


def _sampling(config: Config) -> Sampling:
    return Sampling(config.n_samples, config.temperature, config.seed, config.max_new_tokens, config.batch_size)


def _scores(given: list[ls.Trace], vectors: BehaviorVectors, config: Config, folder: Path, pieces: Pieces) -> None:
    """Scores at all layers, in single precision: half precision loses the KL of small coefficients."""
    model: Any = None
    traces = given[:: max(1, len(given) // config.n_traces)][: config.n_traces]
    common: dict[str, Any] = dict(
        behaviors=ls.STEERED, max_spans=config.max_spans, seed=config.seed, memory=config.memory
    )

    def run(name: str, **options: Any) -> None:
        nonlocal model
        model = model or ls.load_model(config.model, dtype=torch.float32, device=config.device)
        found = ls.attribute(model, traces, vectors, **options, **common)
        for each in found if isinstance(found, tuple) else (found,):
            suffix = f"-{each.coefficient:g}" if isinstance(found, tuple) else ""
            each.save(folder / "scores" / f"{name}{suffix}.json")

    def overlap() -> None:
        ls.embedding_overlap(model, vectors).save(folder / "scores" / "overlap.json")

    pieces.do("scores: exact", lambda: run("exact", coefficient=ALPHAS))
    pieces.do("scores: exact, all spans", lambda: run("everywhere", spans="all"))
    pieces.do("scores: signed", lambda: run("signed", method="signed"))
    pieces.do("scores: fisher", lambda: run("fisher", method="fisher"))
    pieces.do("scores: published", lambda: run("published", method="published"))
    if model is not None:
        pieces.do("scores: overlap", overlap)


# ----------------------------------------------------------------------------------------------------------- analyze


@dataclass(frozen=True)
class ChoiceRow:
    """One arm: shares of sentences by the classifier, the change from unsteered, and its text.

    The change is also given by the rules, and by the classifier with cue words masked.
    """

    question: str
    dose: float
    recipe: str
    scope: str
    layer: int
    behavior: str
    coefficient: float
    kl: float
    reached: bool
    base: Estimate
    share: Estimate
    change: Estimate
    rules: Estimate
    masked: Estimate
    nll: float
    text_kl: float
    repetition: float
    sentences: float
    sound: bool


@dataclass(frozen=True)
class Mean:
    """One recipe and scope over the four behaviors, by the classifier, the rules, and with cue words masked.

    Each is the mean change; `ahead` is how far the first recipe and scope are ahead, `beyond_generated` how far this
    recipe is ahead of itself on generated tokens, both paired.
    """

    dose: float
    recipe: str
    scope: str
    change: Estimate
    rules: Estimate
    masked: Estimate
    ahead: Estimate
    ahead_rules: Estimate
    ahead_masked: Estimate
    beyond_generated: Estimate
    beyond_generated_rules: Estimate
    beyond_generated_masked: Estimate
    sound: int
    reached: int
    kl: float


@dataclass(frozen=True)
class ScoreRow:
    """One score over layers, as a mean over behaviors.

    Attributes:
        dose: of the arms.
        score: its name.
        spearman: rank correlation over layers with the change.
        regret: change at the best layer less that at the layer of the largest score.
        lost: the same as a share of the change at the best layer.
        sound_regret: regret if layers with broken text count as ones without an effect.
        ahead: regret of the middle layer less this score's, on the same draws: above 0, it picks better.
        picks: the layer with the largest score, by behavior.
    """

    dose: float
    score: str
    spearman: Estimate
    regret: Estimate
    lost: Estimate
    sound_regret: Estimate
    ahead: Estimate
    picks: dict[str, int]


def analyze(config: Config, folder: Path) -> tuple[list[ChoiceRow], list[Mean], list[ScoreRow]]:
    """Annotate what was generated; rows per arm, per recipe and scope, and per score."""
    model = ls.load_model(config.model, dtype=getattr(torch, config.dtype))
    given = read_chains(config.chains, model)
    done = json.loads((folder / "pieces.json").read_text())
    records, text, coefficients = [], {}, {}
    classifier = _classifier(given, folder, config.seed)
    arms: list[Arm] = []
    for dose in config.doses:
        for some in (choices(config, dose), by_window(config, dose), by_layer(config, dose)):
            stem = f"{some[0].question}-{dose:g}"
            for scope in dict.fromkeys(arm.scope for arm in some):
                if f"{stem} {scope}" in done:
                    path = folder / "chains" / f"{stem}-{scope}.jsonl"
                    records += _records(model, config, path, classifier)
                    for name, _, _, nll, kl in json.loads(path.with_suffix(".text.json").read_text()):
                        text.setdefault(name, []).append((nll, kl))
                    arms += [arm for arm in some if arm.scope == scope]
                    coefficients |= json.loads((folder / f"{stem}-coefficients.json").read_text())
    rows = choice_rows(arms, records, text, coefficients, config.seed)
    means = mean_rows(rows, records, config.seed)
    found: list[ScoreRow] = []
    if layered := [row for row in rows if row.question == "layers"]:
        scores = _read_scores(model, given, config, folder, coefficients)
        for dose in dict.fromkeys(row.dose for row in layered):
            found += score_rows([row for row in layered if row.dose == dose], records, scores[dose], config)
    return rows, means, found


def _classifier(given: list[ls.Trace], folder: Path, seed: int) -> SentenceClassifier:
    path = folder / "classifier.safetensors"
    if not path.exists():
        fit_classifier(given, seed=seed).save(path)
    return SentenceClassifier.load(path)


def _records(model, config: Config, path: Path, classifier: SentenceClassifier) -> list[Record]:
    """The records of a file of chains, which are annotated once."""
    cache = path.with_suffix(".records.jsonl")
    if not cache.exists():
        tasks, jobs = {task.id: task for task in _tasks(config)}, {}
        for task in tasks.values():
            prompt = models.chat_text(model, task.prompt)
            jobs[task.id] = Job(task, 0, prompt, tuple(models.encode(model, prompt)))
        names, traces = [], []
        for _, row in read_jsonl(path):
            if "condition" in row:
                result, said = Generated(tuple(row["ids"]), row["finished"]), (row["response"], row["offsets"])
                names.append(row["condition"])
                traces.append(trace_of(model, replace(jobs[row["task"]], sample=row["sample"]), result, said))
        first = annotate(traces, classifier)
        others = {"rules": annotate(traces, rules), MASKED: annotate(traces, masking(classifier))}
        made = [
            measure(trace, names[i], ls.BEHAVIORS, None, {name: found[i] for name, found in others.items()})
            for i, trace in enumerate(first)
        ]
        write_atomically(cache, "\n".join(json.dumps(asdict(record)) for record in made) + "\n")
    order = {task.id: i for i, task in enumerate(_tasks(config))}
    values = [row for _, row in read_jsonl(cache)]
    found = [Record(**{**row, "others": {k: Counts(**v) for k, v in row["others"].items()}}) for row in values]
    return sorted(found, key=lambda record: (record.condition, order[record.task], record.sample))


def choice_rows(
    arms: Sequence[Arm],
    records: Sequence[Record],
    text: Mapping[str, Sequence[tuple[float, float]]],
    coefficients: Mapping[str, Mapping[str, Any]],
    seed: int = 0,
) -> list[ChoiceRow]:
    """A row per arm. Shares are ratios of sums over tasks, so chains are weighted by length."""
    shares = ResampledShares(records, seed=seed)
    own: dict[str, list[Record]] = {}
    for record in records:
        own.setdefault(record.condition, []).append(record)
    figures = {name: np.mean(found, axis=0) for name, found in text.items()}
    repetition = {name: float(np.mean([r.repetition for r in found])) for name, found in own.items()}
    rows = []
    for arm in arms:
        b, name, found = arm.behavior, arm.name, coefficients[arm.name]
        base, share = shares.of("unsteered", b), shares.of(name, b)
        nll, kl = figures[name]
        sound = nll - figures["unsteered"][0] <= MAX_NLL
        sound &= repetition[name] - repetition["unsteered"] <= MAX_REPETITION
        rows.append(
            ChoiceRow(
                **vars(arm),
                coefficient=found["coefficient"],
                kl=found["kl"],
                reached=found["reached"],
                base=estimate_of(base),
                share=estimate_of(share),
                change=estimate_of(share - base),
                rules=estimate_of(_change(shares, arm, "rules")),
                masked=estimate_of(_change(shares, arm, MASKED)),
                nll=float(nll),
                text_kl=float(kl),
                repetition=repetition[name],
                sentences=float(np.mean([r.n_sentences for r in own[name]])),
                sound=bool(sound),
            )
        )
    return rows


def mean_rows(rows: Sequence[ChoiceRow], records: Sequence[Record], seed: int = 0) -> list[Mean]:
    """A row per dose, recipe and scope of questions 1 and 2."""
    shares, cells = ResampledShares(records, seed=seed), {}
    for row in rows:
        if row.question != "layers":
            cells.setdefault((row.dose, row.recipe, row.scope), []).append(row)
    means = {
        key: np.array([np.mean([_change(shares, _arm(r), by) for r in some], axis=0) for by in (None, "rules", MASKED)])
        for key, some in cells.items()
    }
    first = next(iter(means))
    made = []
    for key, mean in means.items():
        ahead = means.get((key[0], *first[1:]), mean) - mean
        beyond = mean - means.get((*key[:2], "generated"), mean)
        figures: dict[str, Any] = {}
        for draws, names in (
            (mean, ("change", "rules", "masked")),
            (ahead, ("ahead", "ahead_rules", "ahead_masked")),
            (beyond, ("beyond_generated", "beyond_generated_rules", "beyond_generated_masked")),
        ):
            figures |= {name: estimate_of(each) for name, each in zip(names, draws, strict=True)}
        some = cells[key]
        made.append(
            Mean(
                dose=key[0],
                recipe=key[1],
                scope=key[2],
                sound=sum(row.sound for row in some),
                reached=sum(row.reached for row in some),
                kl=float(np.mean([row.text_kl for row in some])),
                **figures,
            )
        )
    return made


def _change(shares: ResampledShares, arm: Arm, annotator: str | None = None) -> Array:
    """By draw, the share of the arm's behavior less its unsteered share."""
    return shares.of(arm.name, arm.behavior, annotator) - shares.of("unsteered", arm.behavior, annotator)


def _arm(row: ChoiceRow) -> Arm:
    return Arm(row.question, row.dose, row.recipe, row.scope, row.layer, row.behavior)


def _read_scores(
    model, given: list[ls.Trace], config: Config, folder: Path, coefficients: Mapping[str, Mapping[str, Any]]
) -> dict[float, dict[str, Array]]:
    """By dose, every score that was computed, `[behavior layer]`, larger meaning a better layer."""
    vectors = BehaviorVectors.load(folder / f"{config.best}.safetensors")
    at = [vectors.layers.index(layer) for layer in config.layers]
    rows = [vectors.labels.index(b) for b in ls.STEERED]

    def read(name: str) -> LayerScores | None:
        path = folder / "scores" / f"{name}.json"
        return LayerScores.load(path) if path.exists() else None

    def values(scores: LayerScores) -> Array:
        return scores.mean[[scores.row(b) for b in ls.STEERED]].numpy()[:, at]

    found: dict[str, Array] = {}
    exact = {alpha: values(s) for alpha in ALPHAS if (s := read(f"exact-{alpha:g}")) is not None}
    found |= {f"exact at {alpha:g}": value for alpha, value in exact.items()}
    found |= {name: values(s) for name in ("fisher", "signed", "published") if (s := read(name)) is not None}
    signed, kl = read("signed"), read("everywhere")
    if signed is not None and kl is not None:
        found["efficiency"] = np.nan_to_num(values(efficiency(signed, kl)), nan=-np.inf)
    if (path := folder / "scores" / "overlap.json").exists():
        overlap = EmbeddingOverlap.load(path)
        found["low overlap"] = -overlap.embedding.maximum[rows].numpy()[:, at]
    found["norm ratio"] = (vectors.raw[rows].norm(dim=-1) / vectors.mean_norm).numpy()[:, at]
    unit = torch.nn.functional.normalize(vectors.raw[rows], dim=-1)
    step = (unit[:, 1:] * unit[:, :-1]).sum(-1)
    around = torch.stack([torch.cat([step[:, :1], step], 1), torch.cat([step, step[:, -1:]], 1)]).mean(0)
    found["like its neighbors"] = around.numpy()[:, at]
    middle = (models.n_layers(model) - 1) / 2
    found["middle layer"] = np.tile(-np.abs(np.array(config.layers) - middle), (len(rows), 1))
    if (path := folder / "scores" / "probes.json").exists():
        found["probe accuracy"] = np.array(json.loads(path.read_text()))
    result = {}
    for dose in config.doses:
        names = [[f"layers/{dose:g}/{config.best}/generated/{at}/{b}" for at in config.layers] for b in ls.STEERED]
        result[dose] = dict(found)
        if exact and all(name in coefficients for row in names for name in row):
            alpha = np.array([[coefficients[name]["coefficient"] for name in row] for row in names])
            result[dose]["exact at equal KL"] = _between(exact, alpha)
            result[dose]["large coefficient"] = -alpha
    return result


def _between(exact: Mapping[float, Array], alpha: Array) -> Array:
    """The exact scores at other coefficients, interpolated on logarithms (the last ones beyond the ends)."""
    x, y = np.log(list(exact)), np.log(np.maximum(np.stack(list(exact.values())), 1e-12))
    return np.array([[np.interp(np.log(a), x, y[:, b, i]) for i, a in enumerate(row)] for b, row in enumerate(alpha)])


def probes(config: Config, folder: Path) -> None:
    """Probe accuracies at the layers of question 2, on the first file's chains."""
    model = ls.load_model(config.model, dtype=getattr(torch, config.dtype))
    found = probe_accuracy(model, read_chains(config.chains[0], model), behaviors=ls.BEHAVIORS, layers=config.layers)
    values = found.mean[[found.labels.index(b) for b in ls.STEERED]].tolist()
    write_atomically(folder / "scores" / "probes.json", json.dumps(values))


def score_rows(
    rows: Sequence[ChoiceRow], records: Sequence[Record], scores: Mapping[str, Array], config: Config
) -> list[ScoreRow]:
    """Correlation and regret of every score at one dose, on the tasks that the dev sweep does not use.

    The sweep picks the layer with the largest change on `sweep` tasks, one chain each.
    """
    dose, names = rows[0].dose, {_arm(row).name for row in rows} | {"unsteered"}
    own = [record for record in records if record.condition in names]
    swept = set(list(dict.fromkeys(record.task for record in own))[: config.sweep])
    effect = _effects([r for r in own if r.task not in swept], dose, config)
    sound = {(row.behavior, row.layer): row.sound for row in rows}
    kept = np.array([[sound[b, layer] for layer in config.layers] for b in ls.STEERED])
    given = dict(scores)
    if len(swept) > 1:
        given[f"sweep of {len(swept)} chains"] = _effects(
            [r for r in own if r.task in swept and r.sample == 0], dose, config
        )[0]
    reference = _regret(effect, given["middle layer"])
    result = []
    for name, score in given.items():
        regret, best = _regret(effect, score), effect.max(-1)
        lost = np.divide(best - _picked(effect, score), best, out=np.zeros_like(best), where=best > 0).mean(-1)
        kept_regret = _regret(np.where(kept, effect, 0.0), score)
        result.append(
            ScoreRow(
                dose,
                name,
                spearman=estimate_of(_spearman(effect, score)),
                regret=estimate_of(regret),
                lost=estimate_of(lost),
                sound_regret=estimate_of(kept_regret),
                ahead=estimate_of(reference - regret),
                picks={b: config.layers[int(score[i].argmax())] for i, b in enumerate(ls.STEERED)},
            )
        )
    return result


def _effects(records: Sequence[Record], dose: float, config: Config) -> Array:
    """Share less unsteered share, `[draw behavior layer]`; draw 0 is the data, the others resample tasks."""
    shares = ResampledShares(records, seed=config.seed)
    effect = [
        [
            shares.of(Arm("layers", dose, config.best, "generated", layer, b).name, b) - shares.of("unsteered", b)
            for layer in config.layers
        ]
        for b in ls.STEERED
    ]
    return np.array(effect).transpose(2, 0, 1)


def _spearman(effect: Array, score: Array) -> Array:
    """Per draw, the mean over behaviors of the rank correlation over layers."""
    ranks, wanted = rankdata(effect, axis=-1), rankdata(score, axis=-1)
    ranks, wanted = (r - r.mean(-1, keepdims=True) for r in (ranks, wanted))
    scale = np.sqrt((ranks**2).sum(-1) * (wanted**2).sum(-1))
    return np.divide((ranks * wanted).sum(-1), scale, out=np.zeros_like(scale), where=scale > 0).mean(-1)


def _picked(effect: Array, score: Array) -> Array:
    """Per draw and behavior, the effect at the layer with the largest score."""
    return np.take_along_axis(effect, score.argmax(-1)[None, :, None], -1)[..., 0]


def _regret(effect: Array, score: Array) -> Array:
    """Per draw, the mean over behaviors of the best layer's effect less that at the layer with the largest score."""
    return (effect.max(-1) - _picked(effect, score)).mean(-1)


def figure_of_choices(rows: Sequence[ChoiceRow], dose: float) -> go.Figure:
    """Change of the share by recipe, scopes in one row each, a panel per behavior; open markers: the text is broken."""
    rows = [row for row in rows if row.question == "choices" and row.dose == dose]
    figure = make_subplots(rows=1, cols=4, shared_yaxes=True, subplot_titles=ls.STEERED, horizontal_spacing=0.02)
    recipes = list(dict.fromkeys(row.recipe for row in rows))
    scopes = list(dict.fromkeys(row.scope for row in rows))
    symbols = dict(zip(SCOPES, ("circle", "diamond", "square", "triangle-up"), strict=True))
    for column, b in enumerate(ls.STEERED, start=1):
        for scope in scopes:
            some = [row for row in rows if row.behavior == b and row.scope == scope]
            changes = [row.change for row in some]
            bars = error_bars([c.value for c in changes], [c.low for c in changes], [c.high for c in changes])
            figure.add_scatter(
                x=[c.value for c in changes],
                y=[recipes.index(row.recipe) + 0.18 * (scopes.index(scope) - 1.5) for row in some],
                error_x=dict(**bars, thickness=1, width=0),
                mode="markers",
                name=scope,
                legendgroup=scope,
                showlegend=column == 1,
                marker=dict(
                    symbol=[symbols[scope] + ("" if row.sound else "-open") for row in some], color=color(b), size=8
                ),
                row=1,
                col=column,
            )
        figure.add_vline(x=0, line=dict(color=MUTED, width=1), row=1, col=column)
    figure.update_xaxes(tickformat=".0%")
    finish(figure, f"Change of a behavior's share at the same KL ({dose:g} × target), by recipe and scope", 520)
    return figure.update_yaxes(
        tickvals=list(range(len(recipes))), ticktext=recipes, autorange="reversed", zeroline=False
    )


def figure_of_layers(rows: Sequence[ChoiceRow]) -> go.Figure:
    """Change of the share by layer at the same KL, a panel per behavior; open markers: the text is broken."""
    rows = [row for row in rows if row.question == "layers"]
    figure = make_subplots(rows=2, cols=2, shared_xaxes=True, subplot_titles=ls.STEERED, vertical_spacing=0.1)
    for number, b in enumerate(ls.STEERED):
        for dash, dose in zip(("solid", "dot"), dict.fromkeys(row.dose for row in rows), strict=False):
            some = [row for row in rows if row.behavior == b and row.dose == dose]
            changes = [row.change for row in some]
            bars = error_bars([c.value for c in changes], [c.low for c in changes], [c.high for c in changes])
            figure.add_scatter(
                x=[row.layer for row in some],
                y=[c.value for c in changes],
                error_y=dict(**bars, thickness=1, width=0),
                mode="lines+markers",
                name=f"{dose:g} × target KL",
                legendgroup=str(dose),
                showlegend=not number,
                line=dict(color=color(b), dash=dash),
                marker=dict(symbol=["circle" if row.sound else "circle-open" for row in some], size=8),
                row=1 + number // 2,
                col=1 + number % 2,
            )
    figure.update_yaxes(tickformat=".0%")
    figure.update_xaxes(title_text="layer", row=2)
    return finish(figure, "Change of a behavior's share at the same KL, by layer (generated tokens)", 620)


def table(rows: Sequence[ChoiceRow], means: Sequence[Mean], scores: Sequence[ScoreRow]) -> str:
    """Three tables: arms, recipes and scopes, scores."""
    lines = [
        "arm | coefficient | KL | share | change | by rules | cue words masked | nll | repetition | text |",
        "---|" * 10,
    ]
    for r in rows:
        changes = f"{r.share.value:.3f} | {r.change:+.3f} | {r.rules:+.3f} | {r.masked:+.3f}"
        figures = f"{r.nll:.2f} | {r.repetition:.2f}"
        missed = "" if r.reached else " (missed)"
        sound = "sound" if r.sound else "broken"
        lines.append(f"{_arm(r).name} | {r.coefficient:.2f} | {r.kl:.3f}{missed} | {changes} | {figures} | {sound} |")
    lines += ["", "dose | recipe | scope | change, mean of four | first ahead by | sound | at the KL |", "---|" * 7]
    for m in sorted(means, key=lambda m: (-m.dose, -m.change.value)):
        figures = f"{m.change:+.3f} | {m.ahead:+.3f} | {m.sound}/4 | {m.reached}/4"
        lines.append(f"{m.dose:g} | {m.recipe} | {m.scope} | {figures} |")
    lines += [
        "",
        "dose | score | Spearman | regret | lost | if sound | ahead of the middle | picks |",
        "---|---|---|---|",
    ]
    for s in scores:
        figures = " | ".join(f"{e:+.3f}" for e in (s.spearman, s.regret, s.lost, s.sound_regret, s.ahead))
        picks = ", ".join(f"{b.split('-')[0]} {layer}" for b, layer in s.picks.items())
        lines.append(f"{s.dose:g} | {s.score} | {figures} | {picks} |")
    return "\n".join(lines)


def save(
    rows: Sequence[ChoiceRow], means: Sequence[Mean], scores: Sequence[ScoreRow], config: Config, folder: Path
) -> None:
    """Numbers as JSON (and arms as CSV), figures as HTML."""
    import pandas as pd

    found = {"arms": rows, "means": means, "scores": scores}
    values = {name: [flat(row) for row in some] for name, some in found.items()}
    text = json.dumps({"target": json.loads((folder / "target.json").read_text()), **values}, indent=0)
    (folder / "summary.json").write_text(text.replace("NaN", "null") + "\n", encoding="utf-8")
    pd.DataFrame(values["arms"]).to_csv(folder / "arms.csv", index=False)
    for dose in dict.fromkeys(row.dose for row in rows if row.question == "choices"):
        figure_of_choices(rows, dose).write_html(folder / f"choices-{dose:g}.html", include_plotlyjs="directory")
    if any(row.question == "layers" for row in rows):
        figure_of_layers(rows).write_html(folder / "layers.html", include_plotlyjs="directory")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument("--generate", type=Path, metavar="FOLDER")
    what.add_argument("--analyze", type=Path, metavar="FOLDER")
    what.add_argument("--probes", type=Path, metavar="FOLDER", help="probe accuracies, before --analyze; takes minutes")
    parser.add_argument("--model", required=True)
    parser.add_argument("--chains", required=True, nargs="+")
    for option in ("dtype", "device"):
        parser.add_argument(f"--{option}", default=getattr(Config, option))
    for option in ("n_tasks", "n_samples", "max_new_tokens", "batch_size", "n_prompts", "max_rounds", "quality"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    for option in ("coefficient", "seconds"):
        parser.add_argument(f"--{option}", type=float, default=getattr(Config, option))
    parser.add_argument("--doses", type=float, nargs="+", default=list(Config.doses))
    parser.add_argument("--tiny", action="store_true")
    options = vars(parser.parse_args())
    wanted = {name: options.pop(name) for name in ("generate", "analyze", "probes")}
    small = options.pop("tiny")
    chosen = Config(**{**options, "chains": tuple(options["chains"]), "doses": tuple(options["doses"])})
    chosen = tiny(chosen) if small else chosen
    if wanted["generate"]:
        generate(chosen, wanted["generate"])
    elif wanted["probes"]:
        probes(chosen, wanted["probes"])
    else:
        results = analyze(chosen, wanted["analyze"])
        save(*results, chosen, wanted["analyze"])
        print(table(*results))

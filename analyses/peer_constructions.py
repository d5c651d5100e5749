"""Do lensteer's directions from pairs steer better than those of repeng and steering-vectors, at the same KL?

Every library fits its own vectors with its own code and its defaults, on the same pairs and the same model. Each vector
is then added at one layer to every generated token, with the coefficient that spends a given KL per token of the
steered model's own rollouts, so that only the direction differs. The effect is the change of a behavior on held-out
prompts, with 95 % bootstrap intervals over prompts, beside control vectors of the same KL: isotropic ones, ones with
the covariance of the pairs' activations, and lensteer's difference of pairs whose sides are swapped at random. The
libraries' own operators, which add vectors at many layers and at the prompt, too, are run as published, by their own
`generate`; the KL says what they spend.

    python analyses/peer_constructions.py --model SmolLM2-135M-Instruct --folder DIR --request
    REPENG-ENVIRONMENT/bin/python analyses/peers/repeng_fit.py DIR/request.json
    STEERING-VECTORS-ENVIRONMENT/bin/python analyses/peers/steering_vectors_fit.py DIR/request.json
    python analyses/peer_constructions.py --model SmolLM2-135M-Instruct --folder DIR --json FILE --figure FILE.png

The peers' environments are in `analyses/peers/requirements-*.txt`. `--pairs analyses/peers/personas.jsonl` has pairs of
the kind that repeng's README makes: two personas, and the same start of an answer. With `--run RUN-FOLDER --behavior
LABEL` the pairs are made of a finished run's chains: a chain up to where a sentence of the behavior begins (or ends,
`--cut end`), and the same chain up to another sentence. 15 to 20 minutes on one core for SmolLM2. A killed run goes
on. `--smoke`: the organism, no peers.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from politeness import courtesy
from safetensors import safe_open

import lensteer as ls
from lensteer import models
from lensteer.annotation import Annotator, annotate, unlabeled
from lensteer.attribution.selection import SelectedLayers
from lensteer.calibration import calibrate_many
from lensteer.evaluation import Condition, Record, ResampledShares, estimate_of, measure, run_conditions
from lensteer.evaluation.conditions import Measure
from lensteer.evaluation.shares import Part, share_of
from lensteer.files import digest, read_jsonl, write_atomically
from lensteer.generation import Generated
from lensteer.generation.jobs import Job, Sampling, trace_of
from lensteer.pipeline.chains import annotators_of, read_chains
from lensteer.pipeline.run import ORGANISM, SCOPES, Run
from lensteer.pipeline.stages import run_stage
from lensteer.plots.style import COLORS, MUTED, error_bars, finish
from lensteer.positions import PositionScope
from lensteer.statistics import Estimate, flat
from lensteer.vectors import BehaviorVectors, Direction

QUESTION = "At the same KL, do lensteer's directions from pairs steer better than those of repeng and steering-vectors?"
HERE = Path(__file__).parent
PEERS = {"repeng": "repeng_fit.py", "steering-vectors": "steering_vectors_fit.py"}
OWN, POOLS = "lensteer", ("isotropic", "covariance_matched", "shuffled")
#: Vectors with a larger cosine are the same: they are steered with once.
SAME = 0.9999
#: Largest difference of unsteered logits at which a peer's model counts as the same.
LOGITS = 0.01


@dataclass(frozen=True)
class Config:
    """What to compare, where, and at which sizes.

    `folder` keeps the request, the peers' files, coefficients and chains. `run` and `behavior` take pairs from a run's
    chains, see `pairs_of_chains` for `cut`; otherwise `pairs` and `tasks` are read and courtesy is counted. `layer`
    None: the run's, or 19. `operators`: also run the peers' own. There are `n_controls` of each pool, at the largest
    budget. The KL is measured on `quality` chains per condition.
    """

    folder: Path
    model: str | None = None
    pairs: str = "politeness"
    tasks: str = str(HERE / "requests.jsonl")
    run: Path | None = None
    behavior: str = "backtracking"
    cut: str = "onset"
    operators: bool = True
    peers: tuple[str, ...] = tuple(PEERS)
    layer: int | None = None
    budgets: tuple[float, ...] = (0.1, 0.3)
    tolerance: float = 0.15
    max_rounds: int = 6
    n_pairs: int = 150
    n_dev: int = 8
    n_test: int = 48
    n_samples: int = 2
    n_controls: int = 3
    quality: int = 16
    temperature: float = 0.7
    kl_tokens: int = 32
    max_new_tokens: int = 40
    batch_size: int = 128
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One vector at one budget, or a peer's own operator (budget None).

    Attributes:
        library: whose; "control" for control vectors.
        construction: its name there.
        budget: nats per token; None for a peer's own operator.
        coefficient: length of what is added, or the peer's own coefficient.
        reached: whether the calibration met the budget.
        same_as: another row with the same direction, whose chains these are.
        kl: per token of some of the held-out chains.
        change: of the share, against unsteered chains of the same library.
        ahead: the change by lensteer's default at this budget less this one, paired by prompt; NaN without a budget.
        repetition: mean over chains.
    """

    library: str
    construction: str
    budget: float | None
    coefficient: float
    reached: bool
    same_as: str
    kl: Estimate
    share: Estimate
    change: Estimate
    ahead: Estimate
    repetition: float


@dataclass(frozen=True)
class Result:
    """All rows; `cosines` are with lensteer's default, at the layer."""

    model: str
    label: str
    layer: int
    n_pairs: int
    n_tasks: int
    n_samples: int
    base: Estimate
    versions: dict[str, str]
    cosines: dict[str, float]
    rows: tuple[Row, ...]


@dataclass(frozen=True)
class Setting:
    """The model, pairs and where they are read, vectors of a run, tasks, and how chains are drawn and counted."""

    model: Any
    label: str
    layer: int
    pairs: list[ls.Pair]
    own: dict[str, Direction]
    positions: list[str]
    dev: list[ls.Task]
    test: list[ls.Task]
    sampling: Sampling
    scope: PositionScope
    annotator: Annotator
    measures: dict[str, Measure]

    @property
    def part(self) -> Part:
        """What is counted: the measure's score per chain, or the label's share of sentences."""
        label = self.label
        return (lambda r: (r.scores[label], 1.0)) if self.measures else share_of(label)


def setting_of(config: Config) -> Setting:
    """Everything but the peers' vectors."""
    if config.run is None:
        model, pairs = ls.load_model(config.model), ls.load_pairs(config.pairs)
        label, layer = pairs[0].label, 19 if config.layer is None else config.layer
        own: dict[str, Direction] = {}
        measures: dict[str, Measure] = {label: courtesy}
        annotator: Annotator = unlabeled
        dev, test = (ls.load_tasks(config.tasks, split=split) for split in ("dev", "test"))
        drawn = Sampling(config.n_samples, config.temperature, config.seed, config.max_new_tokens, config.batch_size)
        scope, positions = ls.generated, ["answer", "last"]
    else:
        run = Run.open(config.run)
        model, label = run.model, config.behavior
        layer = config.layer if config.layer is not None else SelectedLayers.load(run.path("layers.json"))[label]
        vectors = BehaviorVectors.load(run.path("vectors.safetensors"), model)
        own = {f"fit_vectors, {vectors.recipe}": vectors[label]}
        traces = read_chains(run.path("annotated.jsonl"), model)
        pairs = pairs_of_chains(traces, label, config.cut)[: config.n_pairs]
        dev, test, drawn = run.tasks("dev"), run.tasks("test"), run.sampling(config.n_samples)
        scope, measures, positions = SCOPES[run.config.scope], {}, ["last"]
        annotator = next(iter(annotators_of(run).values()))
    some = dev[: config.n_dev], test[: config.n_test]
    return Setting(model, label, layer, pairs, own, positions, *some, drawn, scope, annotator, measures)


def own_vectors(config: Config, at: Setting) -> tuple[dict[str, Direction], dict[str, Direction]]:
    """The directions of lensteer by construction, and control vectors, fitted once and kept in the folder."""
    own, controls = dict(at.own), {}
    for position in at.positions:
        for construction in ("difference", "pca", "logistic"):
            first = (position, construction) == (at.positions[0], "difference")
            path = config.folder / f"lensteer-{construction}-{position}-{at.layer}-{config.seed}.safetensors"
            if not path.exists():
                options: dict[str, Any] = dict(layers=[at.layer], n_controls=config.n_controls if first else 0)
                how: dict[str, Any] = dict(position=position, construction=construction, seed=config.seed)
                ls.fit_directions(at.model, at.pairs, **how, **options).save(path)
            fitted = BehaviorVectors.load(path, at.model)
            own[f"{construction} at {position}"] = fitted[at.label]
            if first:
                for pool in POOLS:
                    controls |= {f"{pool} {i}": d for i, d in enumerate(fitted.random(pool, at.label))}
    return own, controls


def pairs_of_chains(traces: Sequence[ls.Trace], label: str, cut: str = "onset") -> list[ls.Pair]:
    """For each chain with both: the chain up to its first span of a label, and up to the nearest other one.

    Args:
        traces: annotated.
        label: the behavior.
        cut: "onset", each text ends where its span begins; or "end", where it ends.

    Raises:
        LensteerError: another cut, or no chain with both.
    """
    if cut not in ("onset", "end"):
        raise ls.LensteerError(f"cut {cut!r}: choose one of 'onset', 'end'")
    pairs = []
    for trace in traces:
        places = [*trace.offsets, len(trace.response)]
        ends = [
            ((span.start if cut == "onset" else span.end) - trace.prompt_length, span.label == label)
            for span in trace.spans
        ]
        own = next((end for end, is_own in ends if is_own and end), None)
        others = [end for end, is_own in ends if not is_own and end]
        if own is None or not others:
            continue
        other = min(others, key=lambda end: abs(end - own))
        one, two = (ls.Text(trace.prompt, trace.response[: places[end]], raw=True) for end in (own, other))
        pairs.append(ls.Pair(one, two, label))
    if not pairs:
        raise ls.LensteerError(f"no chain has both a span of {label!r} and another one: give another behavior")
    return pairs


def write_request(config: Config, at: Setting) -> Path:
    """What the peers' scripts read: the model's folder, pairs as whole texts, prompts as ids, and the sampling.

    Raises:
        LensteerError: the folder has one with other pairs, prompts or sampling, so its vectors and chains are others.
    """
    given = config.model if config.run is None else Run.open(config.run).config.model
    texts = []
    for pair in at.pairs:
        sides = (pair.positive, pair.negative)
        prompts = [t.prompt if t.raw else models.chat_text(at.model, t.prompt, system=t.system) for t in sides]
        texts.append([prompt + side.completion for prompt, side in zip(prompts, sides, strict=True)])
    asked = [
        {"task": task.id, "ids": models.encode(at.model, models.chat_text(at.model, task.prompt))} for task in at.test
    ]
    request: dict[str, Any] = dict(model=str(given or models.ORGANISM), pairs=texts, prompts=asked)
    request |= dict(ends=sorted(models.end_ids(at.model)), quality=config.quality)
    request |= {k: getattr(at.sampling, k) for k in ("n_samples", "temperature", "max_new_tokens", "seed")}
    if not config.operators:
        request |= {peer: [] for peer in PEERS}
    path = config.folder / "request.json"
    if path.exists() and json.loads(path.read_text()) != request:
        raise ls.LensteerError(
            f"{str(path)!r} has other pairs, prompts or sampling, and so have the vectors and chains beside it: give "
            "another folder, or the same options"
        )
    config.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, json.dumps(request))
    return path


def peer_vectors(path: Path, layer: int, like: Direction, logits: torch.Tensor) -> tuple[str, dict[str, Direction]]:
    """A peer's version, and its vectors at a layer by construction.

    Raises:
        LensteerError: no such file, one without vectors at the layer, or one of another model.
    """
    if not path.exists():
        raise ls.LensteerError(
            f"no file {str(path)!r}: run analyses/peers/{PEERS.get(path.stem, 'SCRIPT.py')} on the folder's "
            "request.json in the peer's environment first, or leave the peer out with --peers"
        )
    with safe_open(str(path), "pt") as file:
        tensors, about = {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    if "logits" not in tensors or tensors["logits"].shape != logits.shape:
        raise ls.LensteerError(f"{str(path)!r} holds no logits of this model: write the request and run it again")
    if (off := float((tensors.pop("logits") - logits).abs().max())) > LOGITS:
        raise ls.LensteerError(
            f"{str(path)!r} is of another model: its unsteered logits differ by up to {off:.3g}, more than {LOGITS:g}"
        )
    found, mean_norm = {}, like.mean_norm[[like.layers.index(layer)]]
    for name, vector in tensors.items():
        construction, number = name.split("/")
        if int(number) == layer:
            found[construction] = Direction(construction, vector[None].float(), mean_norm, (layer,))
    if not found:
        raise ls.LensteerError(f"{str(path)!r} has no vector at layer {layer}: it has {sorted(tensors)[:8]} …")
    return about.get("version", ""), found


def main(config: Config) -> Result:
    """Read the peers' vectors, calibrate all to each budget, run the conditions and count."""
    at = setting_of(config)
    write_request(config, at)
    own, controls = own_vectors(config, at)
    names = {f"{OWN}/{name}": direction for name, direction in own.items()}
    default, versions = next(iter(names)), {OWN: ls.__version__}
    ids = models.encode(at.model, models.chat_text(at.model, at.test[0].prompt))
    with torch.inference_mode():
        logits = at.model(torch.tensor([ids]))[0, -1].float()
    for peer in config.peers:
        versions[peer], found = peer_vectors(config.folder / f"{peer}.safetensors", at.layer, names[default], logits)
        names |= {f"{peer}/{construction}": direction for construction, direction in found.items()}
    vectors = {name: direction.at(at.layer).double() for name, direction in names.items()}
    same = {
        name: next(other for other in names if torch.cosine_similarity(vectors[name], vectors[other], dim=0) >= SAME)
        for name in names
    }
    steered = {name: names[name] for name in names if same[name] == name}
    steered |= {f"control/{name}": direction for name, direction in controls.items()}
    plans = calibrated(config, at, steered, float(vectors[default].norm()))
    conditions = [Condition("unsteered", kind="unsteered")]
    for name, (plan, _) in plans.items():
        conditions.append(Condition(name, plan, n_samples=1 if name.startswith("control/") else None))
    records = run_conditions(
        at.model,
        at.test,
        conditions,
        at.sampling,
        annotator=at.annotator,
        measures=at.measures,
        quality=config.quality,
        path=config.folder / "chains.jsonl",
        progress=True,
    )
    coefficients: dict[str, float] = {}
    for peer in config.peers if config.operators else ():
        found_records, used = peer_records(at, config.folder / f"{peer}.jsonl")
        records, coefficients = records + found_records, coefficients | used
    cells = {name: (plan.coefficient, reached) for name, (plan, reached) in plans.items()}
    rows = rows_of(records, cells, same, coefficients, default, config.budgets, at.part, config.seed)
    base = estimate_of(ResampledShares(records, seed=config.seed).ratio("unsteered", at.part), len(at.test))
    vectors |= {f"control/{name}": direction.at(at.layer).double() for name, direction in controls.items()}
    cosines = {
        name: float(torch.cosine_similarity(vector, vectors[default], dim=0)) for name, vector in vectors.items()
    }
    about = models.fingerprint(at.model).name, at.label, at.layer, len(at.pairs), len(at.test), at.sampling.n_samples
    return Result(*about, base, versions, cosines, rows)


def calibrated(
    config: Config, at: Setting, steered: Mapping[str, Direction], length: float
) -> dict[str, tuple[ls.SteeringPlan, bool]]:
    """A plan per vector and budget, with the coefficient (a length) that spends it; kept in the folder."""
    key = digest(repr((config.layer, config.run, config.pairs, config.kl_tokens, config.n_dev, config.seed)).encode())
    path = config.folder / f"coefficients-{key}.json"
    done = json.loads(path.read_text()) if path.exists() else {}
    plans: dict[str, tuple[ls.SteeringPlan, bool]] = {}
    start = {name: length * (min(config.budgets) / 0.25) ** 0.5 for name in steered}  # 1 × the difference: .25 nats
    before = min(config.budgets)
    for budget in sorted(config.budgets):
        wanted = {
            f"{name}/{budget:g}": ls.SteeringPlan(
                direction, at.layer, start[name] * (budget / before) ** 0.5, at.scope, unit="unit"
            )
            for name, direction in steered.items()
            if budget == max(config.budgets) or not name.startswith("control/")
        }
        left = {name: plan for name, plan in wanted.items() if name not in done}
        found = calibrate_many(
            at.model,
            at.dev,
            list(left.values()),
            budget=budget,
            quantile=None,
            tolerance=config.tolerance,
            max_rounds=config.max_rounds,
            max_coefficient=100 * length,
            max_new_tokens=config.kl_tokens,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=True,
        ) if left else []  # fmt: skip
        for name, each in zip(left, found, strict=True):
            done[name] = [each.coefficient, each.reached]
        write_atomically(path, json.dumps(done))
        for name, plan in wanted.items():
            plans[name] = replace(plan, coefficient=done[name][0]), bool(done[name][1])
            start[name.rsplit("/", 1)[0]] = done[name][0]
        start |= {name: x * (budget / before) ** 0.5 for name, x in start.items() if f"{name}/{budget:g}" not in wanted}
        before = budget
    return plans


def peer_records(at: Setting, path: Path) -> tuple[list[Record], dict[str, float]]:
    """The records of a peer's own chains, and the coefficient of each condition.

    Raises:
        LensteerError: no such file.
    """
    if not path.exists():
        raise ls.LensteerError(f"no file {str(path)!r}: the peer's script did not finish; run it again")
    rows = [values for _, values in read_jsonl(path)]
    tasks = {task.id: task for task in at.test}
    traces = []
    for row in rows:
        if row["task"] not in tasks:
            raise ls.LensteerError(f"{str(path)!r} has chains on {row['task']!r}, which is no task here: run it again")
        prompt = models.chat_text(at.model, tasks[row["task"]].prompt)
        job = Job(tasks[row["task"]], row["sample"], prompt, tuple(models.encode(at.model, prompt)))
        traces.append(trace_of(at.model, job, Generated(tuple(row["ids"]), row["finished"])))
    records = []
    for row, trace in zip(rows, annotate(traces, at.annotator), strict=True):
        scores = {label: each(trace) for label, each in at.measures.items()}
        figures: dict[str, Any] = {name: float(row[name]) for name in ("kl", "nll") if name in row}
        records.append(measure(trace, row["condition"], [at.label], scores=scores, **figures))
    return records, {row["condition"]: row["coefficient"] for row in rows}


def kl_part(r: Record) -> tuple[float, float]:
    """A chain's KL, weighted by its tokens; nothing if it was not measured."""
    return (0.0, 0.0) if r.kl is None else (r.kl * r.length, float(r.length))


def rows_of(
    records: Sequence[Record],
    cells: Mapping[str, tuple[float, bool]],
    same: Mapping[str, str],
    own_operators: Mapping[str, float],
    default: str,
    budgets: Sequence[float],
    part: Part,
    seed: int = 0,
) -> tuple[Row, ...]:
    """A row per vector and budget, then one per condition of a peer's own operator.

    Args:
        records: of "unsteered", of "LIBRARY/CONSTRUCTION/BUDGET" and of "PEER/COEFFICIENT", with 0 for unsteered.
        cells: coefficient and whether the budget was reached, of each steered condition.
        same: for each vector's name, the first vector with the same direction.
        own_operators: the coefficient of each condition of a peer's own operator.
        default: name of the vector that the others are compared with.
        budgets: in nats per token.
        part: what is counted.
        seed: of the resamples.
    """
    shares = ResampledShares(records, seed=seed)
    n = len({r.task for r in records})

    def row(condition: str, name: tuple[str, str], budget: float | None, base: str, twin: str, ahead: Any) -> Row:
        coefficient, reached = cells.get(condition) or (own_operators[condition], True)
        share, unsteered = shares.ratio(condition, part), shares.ratio(base, part)
        return Row(
            *name,
            budget,
            coefficient,
            reached,
            twin,
            kl=estimate_of(shares.ratio(condition, kl_part), n),
            share=estimate_of(share, n),
            change=estimate_of(share - unsteered, n),
            ahead=estimate_of(ahead, n),
            repetition=float(np.mean([r.repetition for r in records if r.condition == condition])),
        )

    rows = []
    controls = list(dict.fromkeys(c.rsplit("/", 1)[0] for c in cells if c.startswith("control/")))
    for budget in budgets:
        first = shares.ratio(f"{default}/{budget:g}", part)
        for name in [*same, *controls]:
            twin = same.get(name, name)
            condition = f"{twin}/{budget:g}"
            if condition not in cells:
                continue
            library, construction = name.split("/", 1)
            other = "" if twin == name else twin
            ahead = first - shares.ratio(condition, part)
            rows.append(row(condition, (library, construction), budget, "unsteered", other, ahead))
    for condition in own_operators:
        library, construction = condition.split("/")
        nothing = np.full_like(first, np.nan)
        rows.append(row(condition, (library, f"its own, {construction}"), None, f"{library}/0", "", nothing))
    return tuple(rows)


def table(result: Result) -> str:
    """One line per row."""
    lines = [
        f"{result.model}, {result.label}, layer {result.layer}, {result.n_pairs} pairs, {result.n_tasks} prompts × "
        f"{result.n_samples}; unsteered {result.base:.3f}; {result.versions}",
        "library | construction | budget | KL | coefficient | share | change | default ahead | repetition | cosine |",
        "---|" * 10,
    ]
    for r in result.rows:
        cosine = result.cosines.get(f"{r.library}/{r.construction}", float("nan"))
        said = r.construction + (f" (= {r.same_as})" if r.same_as else "")
        budget = "–" if r.budget is None else f"{r.budget:g}" + ("" if r.reached else " (missed)")
        lines.append(
            f"{r.library} | {said} | {budget} | {r.kl:.3f} | {r.coefficient:.3g} | {r.share:.3f} | {r.change:+.3f} | "
            f"{r.ahead:+.3f} | {r.repetition:.2f} | {cosine:+.2f} |"
        )
    return "\n".join(lines)


PAINT = {
    OWN: COLORS["uncertainty-estimation"],
    "repeng": COLORS["backtracking"],
    "steering-vectors": COLORS["adding-knowledge"],
    "control": MUTED,
}


def figure(result: Result) -> go.Figure:
    """Changes at equal KL by vector, filled at the largest budget; beside them change against KL of own operators."""
    equal = [r for r in result.rows if r.budget is not None]
    own = [r for r in result.rows if r.budget is None]
    budgets = sorted({r.budget for r in equal if r.budget is not None})
    vectors = list(dict.fromkeys((r.library, r.construction) for r in equal if r.library != "control"))
    vectors += [("control", pool) for pool in POOLS if any(r.construction.startswith(pool) for r in equal)]
    titles = ["At equal KL: one layer", "Peers' own operators: many layers"][: 1 + bool(own)]
    drawn = make_subplots(
        cols=len(titles), column_widths=[0.55, 0.45] if own else None, horizontal_spacing=0.1, subplot_titles=titles
    )

    def add(some: Sequence[tuple[Row, float]], col: int, **options: Any) -> None:
        changes, places = [r.change for r, _ in some], [place for _, place in some]
        values = [c.value for c in changes]
        bars = dict(**error_bars(values, [c.low for c in changes], [c.high for c in changes]), thickness=1, width=0)
        at = dict(x=values, y=places, error_x=bars) if col == 1 else dict(x=places, y=values, error_y=bars)
        drawn.add_scatter(**at, row=1, col=col, **options)

    for i, budget in enumerate(budgets):
        symbol, lift = "circle" if i == len(budgets) - 1 else "circle-open", 0.2 * (i - (len(budgets) - 1) / 2)
        for library, paint in PAINT.items():
            some = [
                (r, y + lift)
                for y, (owner, construction) in enumerate(vectors)
                for r in equal
                if (r.library, r.budget) == (library, budget) and owner == library
                if construction in (r.construction, r.construction.rsplit(" ", 1)[0])
            ]
            mark = dict(symbol=symbol, color=paint, size=8)
            name = f"{budget:g} nats per token"
            add(some, 1, mode="markers", marker=mark, name=name, showlegend=library == OWN)
    lines = {f"{OWN}'s default at one layer": [r for r in equal if (r.library, r.construction) == vectors[0]]}
    for r in own:
        lines.setdefault(f"{r.library}'s own operator, by coefficient", []).append(r)
    for name, rows in lines.items() if own else ():
        paint = PAINT[rows[0].library]
        some = [(r, r.kl.value) for r in sorted(rows, key=lambda r: r.kl.value) if r.kl.value > 0]
        words = ["" if r.budget else f"{r.coefficient:g}" for r, _ in some]
        place = "top left" if rows[0].library == "repeng" else "bottom right"
        style: dict[str, Any] = dict(line=dict(color=paint, width=1.5), marker=dict(color=paint, size=9))
        add(some, 2, mode="lines+markers+text", text=words, textposition=place, name=name, **style)
    drawn.add_vline(x=0, line=dict(color=MUTED, width=1), row=1, col=1)
    about = "95 % intervals over prompts; (=): the same vector as one of lensteer's"
    title = f"Change of {result.label} on {result.n_tasks} held-out prompts, {result.model}<br><sup>{about}</sup>"
    finish(drawn, title, 180 + 32 * len(vectors))
    drawn.update_xaxes(tickformat="+.0%", title_text="change of the share", row=1, col=1)
    same = {f"{r.library}/{r.construction}" for r in equal if r.same_as}
    names = [f"{o}: {c.replace('_', ' ')}{' (=)' if f'{o}/{c}' in same else ''}" for o, c in vectors]
    axis: dict[str, Any] = dict(tickvals=list(range(len(names))), ticktext=names, zeroline=False)
    drawn.update_yaxes(**axis, autorange="reversed", row=1, col=1)
    if own:
        drawn.update_xaxes(type="log", title_text="KL, nats per token", row=1, col=2)
        drawn.update_yaxes(tickformat="+.0%", title_text="change of the share", row=1, col=2)
    return drawn


def to_json(result: Result) -> str:
    """All numbers, a line per row."""
    values = {**asdict(result), "rows": [flat(r) for r in result.rows]}
    return json.dumps(values, indent=0).replace("NaN", "null") + "\n"


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """From the loaded JSON: the default against the best vector of each peer at the largest budget, and controls."""
    rows = [r for r in result["rows"] if r["budget"] is not None]
    top = max(r["budget"] for r in rows)
    rows = [r for r in rows if r["budget"] == top]
    default = rows[0]
    peers = {r["library"] for r in rows} - {OWN, "control"}

    def said(value: float, low: float, high: float) -> str:
        return f"{100 * value:+.0f} points [{100 * low:+.0f}, {100 * high:+.0f}]"

    parts = [
        f"At {top:g} nats per token lensteer's default moves {result['label']} on {result['model']} by "
        f"{said(default['change'], default['change_low'], default['change_high'])} "
        f"({result['n_tasks']} prompts × {result['n_samples']})."
    ]
    shown = True
    for peer in sorted(peers):
        best = max((r for r in rows if r["library"] == peer), key=lambda r: r["change"])
        parts.append(
            f"It is ahead of the best vector of {peer} ({best['construction']}) by "
            f"{said(best['ahead'], best['ahead_low'], best['ahead_high'])}."
        )
        shown &= best["ahead_low"] > 0
    if twins := [f"{r['library']}'s {r['construction']} is {r['same_as']}" for r in rows if r["same_as"]]:
        parts.append(f"Some vectors are the same, to a cosine of {SAME}: {'; '.join(twins)}.")
    controls = [r["change"] for r in rows if r["library"] == "control"]
    if controls:
        most = max(controls)
        parts.append(f"The largest change of {len(controls)} control vectors is {100 * most:+.0f} points.")
        shown &= default["change"] > most
    return " ".join(parts), bool(shown and peers)


def smoke(config: Config) -> Config:
    """A small run of the organism, and no peers."""
    small = replace(ORGANISM, n_train=24, n_dev=2, n_test=6, max_new_tokens=120)
    run = Run.open(config.folder / "run", small)
    for stage in ("traces", "annotate", "vectors"):
        run_stage(run, stage)
    sizes: dict[str, Any] = dict(max_rounds=2, n_pairs=12, n_dev=2, n_test=6, n_samples=1, n_controls=1, kl_tokens=12)
    return replace(config, run=run.folder, peers=(), layer=4, budgets=(0.05,), tolerance=0.5, quality=2, **sizes)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, required=True)
    for option in ("model", "pairs", "tasks", "behavior", "cut"):
        parser.add_argument(f"--{option}", default=getattr(Config, option))
    parser.add_argument("--run", type=Path)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--peers", nargs="*", default=Config.peers)
    parser.add_argument("--budgets", type=float, nargs="+", default=Config.budgets)
    for option in ("tolerance", "temperature"):
        parser.add_argument(f"--{option}", type=float, default=getattr(Config, option))
    for option in (
        "max_rounds", "n_pairs", "n_dev", "n_test", "n_samples", "n_controls", "quality", "kl_tokens", "max_new_tokens",
        "batch_size", "seed",
    ):  # fmt: skip
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--no-operators", dest="operators", action="store_false")
    parser.add_argument("--request", action="store_true", help="write request.json for the peers' scripts, and stop")
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = vars(parser.parse_args())
    only, small, out, picture = (options.pop(name) for name in ("request", "smoke", "json", "figure"))
    chosen = Config(**{**options, "peers": tuple(options["peers"]), "budgets": tuple(options["budgets"])})
    chosen = smoke(chosen) if small else chosen
    if only:
        print(write_request(chosen, setting_of(chosen)))
    else:
        measured = main(chosen)
        print(table(measured))
        if out:
            out.write_text(to_json(measured))
        if picture:
            figure(measured).write_image(picture, width=1200)

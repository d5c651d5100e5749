"""At which layer does a behavior's vector act, and how much weaker is it at the middle layer than at the best one?

At each layer alone, every behavior's vector is added, with the length that spends the same KL per token everywhere, or
projected out, on a run's dev tasks; projected out also at all these layers at once. Control vectors (covariance of the
spans' activations) get the same edits at the same KL. The effect is the change of the behavior's share of sentences in
the intended direction: more if the vector is added, less if it is projected out. The best layer of a sweep is flattered
by the sweep. So its effect, and the difference from the middle layer, are also measured with the layer chosen on one
half of the tasks and the effect taken from the other. Intervals are 95 % bootstrap intervals over tasks.

Example: python analyses/layer_ablation.py --run RUN-FOLDER --json FILE --figure FILE.png
(the folder of a finished `lensteer run` or `lensteer demo`; about 6 minutes of one core for the organism; resumes.
On a language model, say which layers and operators: `--layers 5 10 15 20 25 28 --operators project_out`)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import reduce
from operator import add as joined
from pathlib import Path
from typing import Any

import numpy as np
from command import command
from plotly import graph_objects as go
from plotly.subplots import make_subplots

import lensteer as ls
from lensteer import models
from lensteer.attribution.selection import SelectedLayers
from lensteer.calibration import calibrate_many, rollout_kl
from lensteer.evaluation import (
    MEAN,
    Condition,
    Margins,
    Record,
    ResampledShares,
    estimate_of,
    random_directions,
    run_conditions,
    text_check,
)
from lensteer.files import write_atomically
from lensteer.pipeline.chains import annotators_of
from lensteer.pipeline.run import SCOPES, Run
from lensteer.plots.style import INK, MUTED, color, error_bars, finish, marker
from lensteer.statistics import Estimate, estimate_in, flat
from lensteer.vectors import BehaviorVectors

QUESTION = "Does steering one layer alone act, and does a layer chosen on other tasks do more than the middle one?"

#: The sign of the change that an operator is meant to make.
OPERATORS = {"add": 1, "project_out": -1}
CONTROL, ALL = "control", "all"
Draws = np.ndarray[Any, Any]


@dataclass(frozen=True)
class Config:
    """A finished run's folder, layers (none: all), operators, behaviors (none: the run's), the budget, and sizes.

    `budget` is in nats per generated token. The organism is steered at onsets, one token in six or seven, and the
    coefficients that its demo chooses spend .002 to .014; on mini-R1, .12 was the budget of other comparisons.
    """

    run: Path
    layers: tuple[int, ...] = ()
    operators: tuple[str, ...] = tuple(OPERATORS)
    behaviors: tuple[str, ...] = ()
    budget: float = 0.01
    tolerance: float = 0.15
    n_controls: int = 1
    n_dev: int = 50
    n_samples: int = 1
    n_prompts: int = 12
    kl_tokens: int = 100
    max_rounds: int = 6
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One edit at one layer (or "all"): of a behavior, or of control vectors, counted on the mean of the behaviors.

    Attributes:
        operator: "add" or "project_out".
        behavior: whose vector, or "control".
        layer: that is edited.
        length: of what is added; None if that is not one vector.
        kl: nats per token along the edited model's own rollouts, with its interval over prompts.
        reached: whether it is the budget, within the tolerance; always true where none is set.
        change: of the share of sentences.
        beyond: the change in the intended direction, less that under the control vectors; None for these themselves.
        text: whether the text is within the run's margins.
    """

    operator: str
    behavior: str
    layer: str
    length: float | None
    kl: Estimate
    reached: bool
    change: Estimate
    beyond: Estimate | None
    text: bool


@dataclass(frozen=True)
class Best:
    """The best single layer for one operator and one behavior (or the mean of all); all in the intended direction.

    Attributes:
        operator: "add" or "project_out".
        behavior: or `evaluation.MEAN`.
        layer: with the largest effect on all tasks.
        effect: there.
        middle: the effect at the middle layer.
        lead: how far the best layer is ahead of the middle one, on the tasks that it was chosen on.
        chosen: layers that the two halves of the tasks choose.
        held_effect: the effect of a layer chosen on the other half.
        held_lead: how far that layer is ahead of the middle one.
        held_beyond: how far its effect is beyond that of control vectors there; None without any.
    """

    operator: str
    behavior: str
    layer: int
    effect: Estimate
    middle: Estimate
    lead: Estimate
    chosen: tuple[int, ...]
    held_effect: Estimate
    held_lead: Estimate
    held_beyond: Estimate | None


@dataclass(frozen=True)
class Result:
    """Rows and best layers, with the model, the number of tasks, the budget, the middle layer, and unsteered shares."""

    model: str
    n_tasks: int
    budget: float
    middle: int
    base: dict[str, Estimate]
    rows: tuple[Row, ...]
    best: tuple[Best, ...]


Cell = tuple[str, str, str]  # operator, behavior or "control-i", layer or "all"


def main(config: Config) -> Result:
    """Calibrate, run every edit at every layer, and compare.

    Raises:
        LensteerError: an unknown operator or behavior, layers without the middle one, too few tasks, or coefficients
            of other settings in the run's folder.
    """
    run = Run.open(config.run)
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    middle, layers = models.n_layers(run.model) // 2, config.layers or vectors.layers
    if odd := [name for name in config.operators if name not in OPERATORS]:
        raise ls.LensteerError(f"operators {odd}: choose from {list(OPERATORS)}")
    if middle not in layers:
        raise ls.LensteerError(f"layers {list(layers)} without {middle}, the middle one: name it, too")
    if config.n_dev < 4:
        raise ls.LensteerError(f"n_dev={config.n_dev}: give 4 or more, two for each half of the tasks")
    behaviors = config.behaviors or tuple(SelectedLayers.load(run.path("layers.json")))
    tasks = dev_tasks(run, config.n_dev)
    found = _calibrated(config, run, _plans(config, run, vectors, layers, behaviors))
    conditions = [Condition("unsteered", kind="unsteered")]
    conditions += [Condition("/".join(cell), plan) for cell, (plan, *_) in found.items()]
    _, annotator = next(iter(annotators_of(run).items()))
    records = run_conditions(
        run.model,
        tasks,
        conditions,
        run.sampling(config.n_samples),
        annotator=annotator,
        path=run.path("layer-ablation.jsonl"),
        progress=True,
    )
    shares = ResampledShares(records, seed=config.seed)
    return Result(
        models.fingerprint(run.model).name,
        len(tasks),
        config.budget,
        middle,
        {b: estimate_of(shares.of("unsteered", b), len(tasks)) for b in behaviors},
        rows_of(records, found, behaviors, run.margins, config.seed),
        best_of(records, list(found), behaviors, middle, config.seed),
    )


def dev_tasks(run: Run, n: int) -> list[ls.Task]:
    """Dev tasks of the run's source: the run's own first, and more where it took fewer."""
    return ls.load_tasks(run.config.tasks, split="dev", n=max(n, run.config.n_dev))[:n]


def _plans(
    config: Config, run: Run, vectors: BehaviorVectors, layers: Sequence[int], behaviors: Sequence[str]
) -> dict[Cell, Any]:
    """Every edit; what is added is as long as the difference of means, which is where the search begins."""
    scope, plans = SCOPES[run.config.scope], {}
    for name in config.operators:
        for layer in layers:
            lengths = [float(vectors[b].at(layer).norm()) for b in behaviors]
            drawn = random_directions(vectors, layer, config.n_controls, pool="covariance_matched")
            sources = [(b, vectors[b], length) for b, length in zip(behaviors, lengths, strict=True)]
            sources += [(f"{CONTROL}-{i}", each, float(np.mean(lengths))) for i, each in enumerate(drawn)]
            for who, direction, length in sources:
                c = length if name == "add" else 1.0
                plans[name, who, str(layer)] = ls.SteeringPlan(direction, layer, c, scope, operator=name, unit="unit")
    for who in dict.fromkeys(who for name, who, _ in plans if name == "project_out"):
        plans["project_out", who, ALL] = reduce(joined, [plans["project_out", who, str(layer)] for layer in layers])
    return plans


Calibrated = tuple[Any, Estimate, bool]


def _calibrated(config: Config, run: Run, plans: Mapping[Cell, Any]) -> dict[Cell, Calibrated]:
    """Each plan, its KL, and whether that is the budget; kept in the run's folder."""
    path, settings = run.path("layer-ablation.json"), {**asdict(config), "run": None, "n_dev": None, "n_samples": None}
    if path.exists():
        kept = json.loads(path.read_text())
        if kept["settings"] != json.loads(json.dumps(settings)):
            raise ls.LensteerError(f"{str(path)!r} has coefficients of other settings: take another copy of the run")
    else:
        options: dict[str, Any] = dict(max_new_tokens=config.kl_tokens, seed=config.seed, batch_size=256)
        prompts, values = dev_tasks(run, config.n_prompts), {}
        if adding := {cell: plan for cell, plan in plans.items() if cell[0] == "add"}:
            found = calibrate_many(
                run.model,
                prompts,
                list(adding.values()),
                budget=config.budget,
                quantile=None,
                tolerance=config.tolerance,
                max_rounds=config.max_rounds,
                max_coefficient=64 * max(plan.coefficient for plan in adding.values()),
                progress=True,
                **options,
            )
            for cell, each in zip(adding, found, strict=True):
                values["/".join(cell)] = [each.coefficient, vars(each.estimate), each.reached]
        others = [cell for cell in plans if cell not in adding]
        measured = rollout_kl(run.model, prompts, [plans[cell] for cell in others], **options)
        for cell, spent in zip(others, measured, strict=True):
            values["/".join(cell)] = [None, vars(spent.estimate(None, seed=config.seed)), True]
        kept = {"settings": settings, "plans": values}
        write_atomically(path, json.dumps(kept, indent=1))
    made = {}
    for cell, plan in plans.items():
        length, kl, reached = kept["plans"]["/".join(cell)]
        made[cell] = (plan if length is None else replace(plan, coefficient=length), Estimate(**kl), reached)
    return made


def effects_of(
    records: Sequence[Record], cells: Sequence[Cell], behaviors: Sequence[str], seed: int = 0
) -> dict[Cell, Draws]:
    """The change in the intended direction by operator, whom it is of, and layer: the first draw is the observed one.

    It is of a behavior's share under its own vector, or of the mean of all; after "control", under control vectors.
    """
    shares, found = ResampledShares(records, seed=seed), {}
    for name, layer in dict.fromkeys((cell[0], cell[2]) for cell in cells):
        null = ["/".join(cell) for cell in cells if cell[1] not in behaviors and (cell[0], cell[2]) == (name, layer)]
        for b in behaviors:
            base, sign = shares.of("unsteered", b), OPERATORS[name]
            found[name, b, layer] = sign * (shares.of(f"{name}/{b}/{layer}", b) - base)
            if null:
                found[name, f"{CONTROL} {b}", layer] = sign * (np.mean([shares.of(x, b) for x in null], axis=0) - base)
        for whose in ("", f"{CONTROL} ") if null else ("",):
            found[name, whose + MEAN, layer] = np.mean([found[name, whose + b, layer] for b in behaviors], axis=0)
    return found


def rows_of(
    records: Sequence[Record],
    found: Mapping[Cell, Calibrated],
    behaviors: Sequence[str],
    margins: Margins,
    seed: int = 0,
) -> tuple[Row, ...]:
    """A row per behavior, and one for the control vectors, of each operator and layer."""
    effects, n = effects_of(records, list(found), behaviors, seed), len({r.task for r in records})
    by_name: dict[str, list[Record]] = {}
    for record in records:
        by_name.setdefault(record.condition, []).append(record)
    rows = []
    for cell, (plan, kl, reached) in found.items():
        name, who, layer = cell
        if who in behaviors or who == f"{CONTROL}-0":
            is_own = who in behaviors
            change = effects[name, who if is_own else f"{CONTROL} {MEAN}", layer]
            null = effects.get((name, f"{CONTROL} {who}", layer))
            rows.append(
                Row(
                    name,
                    who if is_own else CONTROL,
                    layer,
                    plan.length if name == "add" else None,
                    kl,
                    reached,
                    estimate_of(OPERATORS[name] * change, n),
                    None if null is None else estimate_of(change - null, n),
                    text_check(by_name["/".join(cell)], by_name["unsteered"], margins, seed=seed).ok,
                )
            )
    return tuple(rows)


def best_of(
    records: Sequence[Record], cells: Sequence[Cell], behaviors: Sequence[str], middle: int, seed: int = 0
) -> tuple[Best, ...]:
    """The best single layer for each operator, of each behavior and of their mean."""
    tasks = sorted({r.task for r in records})
    every, first, second = (
        effects_of([r for r in records if r.task in set(some)], cells, behaviors, seed + i)
        for i, some in enumerate((tasks, tasks[::2], tasks[1::2]))
    )
    found = []
    for name in dict.fromkeys(cell[0] for cell in cells):
        layers = list(dict.fromkeys(cell[2] for cell in cells if cell[0] == name and cell[2] != ALL))
        for b in (*behaviors, MEAN) if len(behaviors) > 1 else behaviors:
            best, *chosen = (
                max(layers, key=lambda x: float(effects[name, b, x][0])) for effects in (every, first, second)
            )
            swapped = [(chosen[0], second), (chosen[1], first)]
            held = [effects[name, b, layer] for layer, effects in swapped]
            lead = [own - effects[name, b, str(middle)] for own, (_, effects) in zip(held, swapped, strict=True)]
            null = [effects.get((name, f"{CONTROL} {b}", layer)) for layer, effects in swapped]
            beyond = [own - x for own, x in zip(held, null, strict=True) if x is not None]
            own, at_middle = every[name, b, best], every[name, b, str(middle)]
            draws = [own, at_middle, own - at_middle, np.mean(held, axis=0), np.mean(lead, axis=0)]
            effect, at, ahead, held_effect, held_lead = (estimate_of(x, len(tasks)) for x in draws)
            held_beyond = estimate_of(np.mean(beyond, axis=0), len(tasks)) if beyond else None
            halves = tuple(map(int, chosen))
            found.append(Best(name, b, int(best), effect, at, ahead, halves, held_effect, held_lead, held_beyond))
    return tuple(found)


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The answer from a loaded JSON file; shown if a layer chosen on other tasks acts, beyond control vectors."""
    said, shown = [], []
    for name in dict.fromkeys(best["operator"] for best in result["best"]):
        last = [best for best in result["best"] if best["operator"] == name][-1]
        what = "the mean of the behaviors" if last["behavior"] == MEAN else last["behavior"]
        how = "Projected out" if name == "project_out" else f"Added at {result['budget']:g} nats per token"
        beyond = last.get("held_beyond_low") is None or last["held_beyond_low"] > 0
        shown.append(bool(last["held_effect_low"] > 0 and beyond))
        controls = f", {estimate_in(last, 'held_beyond'):+.3f} beyond controls" if "held_beyond_low" in last else ""
        less = [x for x in result["best"] if x["operator"] == name and x is not last and x["held_lead_low"] > 0]
        singly = "".join(f"; for {x['behavior']} alone by {estimate_in(x, 'held_lead'):+.3f}" for x in less)
        effect, held, lead = (estimate_in(last, key) for key in ("effect", "held_effect", "held_lead"))
        said.append(
            f"{how}, the vectors of {result['model']} do most at layer {last['layer']} (share of {what}, in the "
            f"intended direction: {effect:+.3f}, {result['n_tasks']} tasks); a layer chosen on half of the tasks moves "
            f"the other half by {held:+.3f}{controls}, and the middle layer, {result['middle']}, does less by "
            f"{lead:+.3f}{singly}."
        )
    return " ".join(said), any(shown)


def table(result: Result) -> str:
    """The best layers, then a line per edit and layer."""
    lines = [
        "operator | behavior | best | effect | middle | ahead | chosen on halves | effect | ahead | beyond controls"
    ]
    for x in result.best:
        halves = f"{', '.join(map(str, x.chosen))} | {x.held_effect:+.3f} | {x.held_lead:+.3f}"
        beyond = "–" if x.held_beyond is None else f"{x.held_beyond:+.3f}"
        own = f"{x.layer} | {x.effect:+.3f} | {x.middle:+.3f} | {x.lead:+.3f}"
        lines.append(f"{x.operator} | {x.behavior} | {own} | {halves} | {beyond}")
    lines += ["", "operator | behavior | layer | length | KL | change | beyond controls | text"]
    for r in result.rows:
        length = "–" if r.length is None else f"{r.length:.3g}"
        beyond = "–" if r.beyond is None else f"{r.beyond:+.3f}"
        kl = f"{r.kl.value:.4f}{'' if r.reached else ' (missed)'}"
        words = "fine" if r.text else "broken"
        lines.append(
            f"{r.operator} | {r.behavior} | {r.layer} | {length} | {kl} | {r.change:+.3f} | {beyond} | {words}"
        )
    return "\n".join(lines)


def figure(result: Result) -> go.Figure:
    """Change of the share by layer, a panel per operator; hollow markers: the text is broken or the KL is missed."""
    names = list(dict.fromkeys(row.operator for row in result.rows))
    titles = {"add": f"added at {result.budget:g} nats per token", "project_out": "projected out"}
    drawn = make_subplots(1, len(names), subplot_titles=[titles[name] for name in names], horizontal_spacing=0.09)
    for column, name in enumerate(names, start=1):
        some = [row for row in result.rows if row.operator == name]
        layers = sorted({int(row.layer) for row in some if row.layer != ALL})
        step = min(np.diff(layers), default=1)
        at = {**{str(layer): float(layer) for layer in layers}, ALL: layers[-1] + 1.5 * step}
        whose = list(dict.fromkeys(row.behavior for row in some))
        for i, b in enumerate(whose):
            own = [row for row in some if row.behavior == b]
            shift, paint = 0.09 * step * (i - (len(whose) - 1) / 2), MUTED if b == CONTROL else color(b)
            for mode, part in (
                ("lines+markers", [row for row in own if row.layer != ALL]),
                ("markers", [row for row in own if row.layer == ALL]),
            ):
                y, low, high = ([100 * getattr(row.change, end) for row in part] for end in ("value", "low", "high"))
                shape = "cross-thin" if b == CONTROL else marker(b)
                drawn.add_scatter(
                    x=[at[row.layer] + shift for row in part],
                    y=y,
                    error_y=dict(**error_bars(y, low, high), thickness=1, width=0, color=paint),
                    mode=mode,
                    name="control vectors (mean of the behaviors)" if b == CONTROL else b,
                    legendgroup=b,
                    showlegend=column == 1 and mode != "markers",
                    line=dict(color=paint, width=1.5, dash="dot" if b == CONTROL else "solid"),
                    marker=dict(
                        symbol=[shape if row.text and row.reached else f"{shape}-open" for row in part],
                        size=8,
                        color=paint,
                        line=dict(color=paint, width=1.5),
                    ),
                    row=1,
                    col=column,
                )
        drawn.add_hline(y=0, line=dict(color=INK, width=1), row=1, col=column)
        drawn.add_vline(x=result.middle, line=dict(color=MUTED, width=1, dash="dot"), row=1, col=column)
        every = name == "project_out"
        ticks, words = list(at.values())[: None if every else -1], [*map(str, layers), *(["all"] if every else [])]
        drawn.update_xaxes(tickvals=ticks, ticktext=words, title_text="layer", zeroline=False, row=1, col=column)
    drawn.update_yaxes(title_text="change of the share (points)", row=1, col=1)
    about = (
        f"{result.model}, {result.n_tasks} tasks; 95 % intervals over tasks; dotted: the middle layer; hollow: the text"
    )
    about += " is broken or the KL is missed"
    finish(drawn, f"One layer at a time<br><sup>{about}</sup>", 480)
    return drawn.update_layout(margin_t=100)


def to_json(result: Result) -> str:
    """All numbers, a line per row."""
    rows = {name: [_flat(x) for x in getattr(result, name)] for name in ("rows", "best")}
    return json.dumps({**asdict(result), **rows}, indent=0).replace("NaN", "null") + "\n"


def _flat(row: Any) -> dict[str, Any]:
    return {name: value for name, value in flat(row).items() if value is not None}


def smoke(config: Config) -> Config:
    """The same at a size for a test."""
    small: dict[str, Any] = dict(n_dev=4, n_prompts=2, kl_tokens=24, max_rounds=2, tolerance=0.5)
    return replace(config, layers=config.layers or (4, 6), **small)


if __name__ == "__main__":
    command(globals())

"""Which operator moves behaviors most at equal KL: adding, projecting out, clamping, rotating, a gate, a decay?

Every edit acts on the generated tokens, at one layer, along the same vectors, once for more of a behavior and once for
less. The coefficient of each is calibrated so that the mean KL between the steered and the unsteered model, per token
of the steered model's own rollouts, is the same. The effect is the change of the behavior's share of sentences in the
intended direction, on dev tasks; the gain is an edit's effect less that of adding, on the same tasks, over the cells
(behavior and sign) where both spend the budget. Intervals are 95 % bootstrap intervals over tasks, for the KL over
prompts.

- add: h + c v
- project_out: c < 0 makes more of the projection, c > 0 less
- clamp: the projection becomes c ‖v‖
- rotate: by c degrees towards v, or away from it
- gated add: added where the projection on v is above its median over the tokens of the chains
- decaying add: c halves every `half_life` generated tokens

    python analyses/operator_ablation.py --json organism.json --figure organism.png
    python -u analyses/operator_ablation.py --model mini-r1 --chains a.jsonl b.jsonl --dtype bfloat16 \
        --folder runs/operators --n-tasks 20 --signs 1 --json mini_r1.json --figure mini_r1.png

With `--folder`, vectors, coefficients and chains are kept, and a killed run goes on. `--smoke` makes everything small.
A language model's sentences are labeled by a classifier that is fitted on the given chains.
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

import lensteer as ls
from lensteer import models
from lensteer.annotation import Annotator, SentenceClassifier, fit_classifier
from lensteer.calibration import calibrate_many
from lensteer.evaluation import Condition, Record, ResampledShares, estimate_of, run_conditions
from lensteer.files import write_atomically
from lensteer.generation.jobs import Sampling
from lensteer.pipeline import read_chains
from lensteer.plots.style import MUTED, color, error_bars, finish
from lensteer.statistics import Estimate, estimate_in, flat
from lensteer.vectors import BehaviorVectors

QUESTION = "Is adding the best operator at equal KL, beside projecting out, clamping, rotating, a gate and a decay?"

EDITS = ("add", "project_out", "clamp", "rotate", "gated add", "decaying add")


@dataclass(frozen=True)
class Config:
    """Model (None: the organism), annotated chains (none: its own), layer (None: the middle one), budget and sizes.

    `budget` is in nats per token. `signs` are those of the behavior: 1 for more of it, -1 for less.
    """

    model: str | None = None
    chains: tuple[str, ...] = ()
    dtype: str = "float32"
    layer: int | None = None
    budget: float = 0.12
    tolerance: float = 0.1
    signs: tuple[int, ...] = (1, -1)
    half_life: float = 40.0
    n_train: int = 150
    n_tasks: int = 40
    n_samples: int = 1
    n_prompts: int = 12
    max_rounds: int = 8
    kl_tokens: int = 100
    max_new_tokens: int = 400
    batch_size: int = 256
    folder: Path | None = None
    seed: int = 0


def smoke(config: Config) -> Config:
    """The same at a size for a test."""
    return replace(config, n_train=24, n_tasks=4, n_prompts=3, max_rounds=3, kl_tokens=24, tolerance=0.5)


@dataclass(frozen=True)
class Row:
    """One edit of one behavior, with one sign.

    Attributes:
        edit: of `EDITS`.
        behavior: whose vector.
        sign: 1 for more of the behavior, -1 for less.
        coefficient: that was calibrated, in the operator's own unit.
        kl: mean per token of the calibration's rollouts.
        reached: whether that is the budget, within the tolerance.
        base: the unsteered share.
        share: of the behavior's sentences.
        change: share less unsteered share.
        finished: share of chains that ended by themselves, less the unsteered share.
    """

    edit: str
    behavior: str
    sign: int
    coefficient: float
    kl: Estimate
    reached: bool
    base: Estimate
    share: Estimate
    change: Estimate
    finished: Estimate


@dataclass(frozen=True)
class Mean:
    """One edit over all behaviors and signs where it spends the budget.

    Attributes:
        edit: of `EDITS`.
        cells: behaviors and signs.
        effect: mean change in the intended direction.
        gain: the same less that of adding, paired, over the cells where adding spends the budget, too.
    """

    edit: str
    cells: int
    effect: Estimate
    gain: Estimate


@dataclass(frozen=True)
class Result:
    """All rows, and a mean per edit."""

    model: str
    layer: int
    budget: float
    rows: tuple[Row, ...]
    means: tuple[Mean, ...]


def main(config: Config) -> Result:
    """Fit vectors, calibrate every edit, run the conditions and compare."""
    _check_folder(config)
    model = ls.load_model(config.model, dtype=getattr(torch, config.dtype))
    layer = models.n_layers(model) // 2 if config.layer is None else config.layer
    given = _chains(model, config)
    vectors = _vectors(model, given, config)
    annotator: Annotator = ls.grammar if config.model is None else _classifier(given, config)
    tasks = ls.load_tasks(split="dev", n=config.n_tasks)
    found = _calibrated(model, tasks, _plans(model, vectors, layer, given, config), config)
    conditions = [Condition("unsteered", kind="unsteered")]
    conditions += [Condition(name, plan) for name, (plan, _, _) in found.items()]
    records = run_conditions(
        model,
        tasks,
        conditions,
        Sampling(config.n_samples, 1.0, config.seed, config.max_new_tokens, config.batch_size),
        annotator=annotator,
        path=None if config.folder is None else config.folder / "chains.jsonl",
        progress=True,
    )
    cells = {name: (plan.coefficient, kl, reached) for name, (plan, kl, reached) in found.items()}
    rows = rows_of(records, cells, config.seed)
    name = models.fingerprint(model).name
    return Result(name, layer, config.budget, rows, means_of(records, rows, config.seed))


def _check_folder(config: Config) -> None:
    """Write the settings into the folder.

    Raises:
        LensteerError: it holds the results of others.
    """
    if config.folder is None:
        return
    path, text = config.folder / "config.json", json.dumps({**asdict(config), "folder": None}, indent=1)
    if path.exists() and path.read_text() != text:
        raise ls.LensteerError(f"{str(config.folder)!r} has results of other settings: give another folder")
    config.folder.mkdir(parents=True, exist_ok=True)
    write_atomically(path, text)


def _chains(model: Any, config: Config) -> list[ls.Trace]:
    if config.chains:
        return read_chains(config.chains, model)
    train = ls.load_tasks(split="train", n=config.n_train)
    return ls.annotate(ls.generate_traces(model, train, temperature=1.0, seed=config.seed, batch_size=256), ls.grammar)


def _vectors(model: Any, given: list[ls.Trace], config: Config) -> BehaviorVectors:
    path = None if config.folder is None else config.folder / "vectors.safetensors"
    if path is not None and path.exists():
        return BehaviorVectors.load(path, model)
    vectors = ls.fit_vectors(model, given)
    if path is not None:
        vectors.save(path)
    return vectors


def _classifier(given: list[ls.Trace], config: Config) -> SentenceClassifier:
    if config.folder is None:
        return fit_classifier(given, seed=config.seed)
    path = config.folder / "classifier.safetensors"
    if not path.exists():
        fit_classifier(given, seed=config.seed).save(path)
    return SentenceClassifier.load(path)


def name_of(edit: str, behavior: str, sign: int) -> str:
    """Of a condition."""
    return f"{edit}/{behavior}/{'up' if sign > 0 else 'down'}"


def _plans(
    model: Any, vectors: BehaviorVectors, layer: int, given: Sequence[ls.Trace], config: Config
) -> dict[str, ls.SteeringPlan]:
    """Every edit of every behavior with every sign, with the coefficient to start from."""
    plans = {}
    for b in ls.STEERED:
        projections = [ls.token_projections(model, trace, vectors[b], layer) for trace in given[:20]]
        values = torch.cat([found.values[found.prompt_length :] for found in projections])
        threshold = float(values.median() * vectors.mean_norm[vectors.layers.index(layer)])
        gate, decay = ls.Gate(threshold, measure="projection"), ls.Schedule.half_life(config.half_life)
        for sign in config.signs:
            plan = ls.SteeringPlan(vectors[b], layer, float(sign), ls.generated)
            edits = {
                "add": plan,
                "project_out": replace(plan, operator="project_out", coefficient=-float(sign)),
                "clamp": replace(plan, operator="clamp"),
                "rotate": replace(plan, operator="rotate", coefficient=10.0 * sign),
                "gated add": replace(plan, gate=gate),
                "decaying add": replace(plan, schedule=decay),
            }
            plans |= {name_of(edit, b, sign): edits[edit] for edit in EDITS}
    return plans


Calibrated = tuple[ls.SteeringPlan, Estimate, bool]


def _calibrated(
    model: Any, tasks: Sequence[ls.Task], plans: dict[str, ls.SteeringPlan], config: Config
) -> dict[str, Calibrated]:
    """Each plan with the coefficient that spends the budget; edit by edit, so that a killed run goes on."""
    path = None if config.folder is None else config.folder / "coefficients.json"
    done = json.loads(path.read_text()) if path is not None and path.exists() else {}
    for edit in EDITS:
        some = {name: plan for name, plan in plans.items() if name.startswith(f"{edit}/") and name not in done}
        if not some:
            continue
        print(f"calibrate {edit}: {len(some)} plans", flush=True)
        found = calibrate_many(
            model,
            tasks[: config.n_prompts],
            list(some.values()),
            budget=config.budget,
            quantile=None,
            tolerance=config.tolerance,
            max_rounds=config.max_rounds,
            max_coefficient=180.0 if edit == "rotate" else 32.0,
            max_new_tokens=config.kl_tokens,
            seed=config.seed,
            batch_size=config.batch_size,
            progress=True,
        )
        for name, each in zip(some, found, strict=True):
            done[name] = dict(coefficient=each.coefficient, kl=vars(each.estimate), reached=each.reached)
        if path is not None:
            write_atomically(path, json.dumps(done, indent=1))
    return {
        name: (
            replace(plan, coefficient=done[name]["coefficient"]),
            Estimate(**done[name]["kl"]),
            done[name]["reached"],
        )
        for name, plan in plans.items()
    }


def _cell(name: str) -> tuple[str, str, int]:
    """The edit, the behavior and the sign of a condition's name."""
    edit, behavior, way = name.split("/")
    return edit, behavior, 1 if way == "up" else -1


def rows_of(
    records: Sequence[Record], cells: dict[str, tuple[float, Estimate, bool]], seed: int = 0
) -> tuple[Row, ...]:
    """A row per condition; `cells` has its coefficient, KL and whether that is the budget."""
    shares, ended = ResampledShares(records, seed=seed), ResampledShares(_endings(records), seed=seed)
    rows = []
    for name, (coefficient, kl, reached) in cells.items():
        edit, b, sign = _cell(name)
        own, base = shares.of(name, b), shares.of("unsteered", b)
        finished = ended.of(name, "finished") - ended.of("unsteered", "finished")
        parts = [estimate_of(draws) for draws in (base, own, own - base, finished)]
        rows.append(Row(edit, b, sign, coefficient, kl, reached, *parts))
    return tuple(rows)


def _endings(records: Sequence[Record]) -> list[Record]:
    """Records whose only sentence is the chain, of the behavior "finished" if it ended: a share of chains."""
    return [replace(r, sentences={"finished": int(r.finished)}, n_sentences=1) for r in records]


def means_of(records: Sequence[Record], rows: Sequence[Row], seed: int = 0) -> tuple[Mean, ...]:
    """A mean per edit, over the cells where it spends the budget."""
    shares = ResampledShares(records, seed=seed)
    effects: dict[str, dict[tuple[str, int], np.ndarray[Any, Any]]] = {edit: {} for edit in EDITS}
    for row in rows:
        if row.reached:
            own = shares.of(name_of(row.edit, row.behavior, row.sign), row.behavior)
            effects[row.edit][row.behavior, row.sign] = row.sign * (own - shares.of("unsteered", row.behavior))
    means = []
    for edit, found in effects.items():
        common = [cell for cell in found if cell in effects["add"]]
        if common:
            gains = [found[cell] - effects["add"][cell] for cell in common]
            over_all, ahead = (estimate_of(np.mean(some, axis=0)) for some in (list(found.values()), gains))
            means.append(Mean(edit, len(found), over_all, ahead))
    return tuple(means)


def figure(result: Result) -> go.Figure:
    """Change of the share by edit, a panel per behavior; triangles say the direction, open ones miss the budget."""
    drawn = make_subplots(rows=1, cols=len(ls.STEERED), shared_yaxes=True, subplot_titles=ls.STEERED)
    for column, b in enumerate(ls.STEERED, start=1):
        for sign, symbol, words in ((1, "triangle-up", "for more of it"), (-1, "triangle-down", "for less of it")):
            some = [row for row in result.rows if row.behavior == b and row.sign == sign]
            changes = [row.change for row in some]
            bars = error_bars([c.value for c in changes], [c.low for c in changes], [c.high for c in changes])
            drawn.add_scatter(
                x=[c.value for c in changes],
                y=[EDITS.index(row.edit) - 0.12 * sign for row in some],
                error_x=dict(**bars, thickness=1, width=0),
                mode="markers",
                name=words,
                legendgroup=words,
                showlegend=column == 1 and bool(some),
                marker=dict(
                    symbol=[symbol if row.reached else f"{symbol}-open" for row in some], color=color(b), size=9
                ),
                row=1,
                col=column,
            )
        drawn.add_vline(x=0, line=dict(color=MUTED, width=1), row=1, col=column)
    drawn.update_xaxes(tickformat="+.0%")
    title = f"Change of a behavior's share at {result.budget:g} nats per token, layer {result.layer} of {result.model}"
    finish(drawn, title, 460)
    return drawn.update_yaxes(tickvals=list(range(len(EDITS))), ticktext=EDITS, autorange="reversed", zeroline=False)


def table(result: Result) -> str:
    """A line per edit, then a line per edit, behavior and direction."""
    lines = ["edit | cells | effect | gain over adding |", "---|" * 4]
    lines += [f"{m.edit} | {m.cells} | {m.effect:+.3f} | {m.gain:+.3f} |" for m in result.means]
    lines += ["", "edit | behavior | coefficient | KL | unsteered | share | change | finished |", "---|" * 8]
    for r in result.rows:
        missed = "" if r.reached else " (missed)"
        figures = f"{r.base:.3f} | {r.share:.3f} | {r.change:+.3f} | {r.finished:+.2f}"
        way = "more" if r.sign > 0 else "less"
        lines.append(f"{r.edit} | {r.behavior}, {way} | {r.coefficient:.3g} | {r.kl:.3f}{missed} | {figures} |")
    return "\n".join(lines)


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """What the numbers of `to_json` say, and whether adding is ahead of all others or level with them."""
    means = {m["edit"]: m for m in result["means"]}
    gains = {edit: estimate_in(m, "gain") for edit, m in means.items() if edit != "add"}
    behind = [edit for edit, gain in gains.items() if gain.high < 0]
    ahead = [edit for edit, gain in gains.items() if gain.low > 0]
    others = "; ".join(f"{edit} {100 * gain:+.1f}" for edit, gain in gains.items())
    text = (
        f"At {result['budget']:g} nats per token, adding moves a behavior's share by "
        f"{100 * estimate_in(means['add'], 'effect'):+.1f} points in the intended direction. The others less adding: "
        f"{others}. Behind adding: {', '.join(behind) or 'none'}; ahead: {', '.join(ahead) or 'none'}."
    )
    return text, bool(behind) and not ahead


def to_json(result: Result) -> str:
    """All numbers, a line per row."""
    values = {**asdict(result), "rows": [flat(r) for r in result.rows], "means": [flat(m) for m in result.means]}
    return json.dumps(values, indent=0).replace("NaN", "null") + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--chains", nargs="*", default=[])
    parser.add_argument("--dtype", default=Config.dtype)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--signs", type=int, nargs="+", choices=(1, -1), default=list(Config.signs))
    for option in ("budget", "tolerance", "half_life"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=float, default=getattr(Config, option))
    for option in (
        "n_train", "n_tasks", "n_samples", "n_prompts", "max_rounds", "kl_tokens", "max_new_tokens", "batch_size",
        "seed",
    ):  # fmt: skip
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = vars(parser.parse_args())
    small, out, picture = (options.pop(name) for name in ("smoke", "json", "figure"))
    chosen = Config(**{**options, "chains": tuple(options["chains"]), "signs": tuple(options["signs"])})
    measured = main(smoke(chosen) if small else chosen)
    print(table(measured))
    if out:
        out.write_text(to_json(measured))
    if picture:
        figure(measured).write_image(picture, width=1200, scale=2)

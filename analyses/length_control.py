"""What does steering do to the length of thought, and what do right answers pay for it?

From a finished run: each behavior's vector, added and subtracted on held-out tasks, changes the number of tokens of a
chain and the share of right answers, both paired by task with 95 % intervals. Chains have to end within the run's token
limit for their length to mean anything, and tasks need answers that the model can find.

On GSM8K, for a language model: a direction from training questions, each solved in sentences and in equations alone, is
added and taken away while test questions of few steps are answered, beside control vectors as long.

Examples: python analyses/length_control.py --run RUN-FOLDER --json FILE --figure FILE.png
(the folder of a finished `lensteer run` or `lensteer demo`; reads its evaluation, runs nothing)
python analyses/length_control.py --model qwen2.5-0.5b --gsm8k FOLDER --json FILE --figure FILE.png
(about 7 minutes on one core; with `--folder` it resumes)
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from contrast_effects import answers, conditions_of
from plotly import graph_objects as go

import lensteer as ls
from lensteer import models
from lensteer.errors import LensteerError
from lensteer.evaluation import (
    KINDS,
    Condition,
    Evaluation,
    Record,
    SideEffect,
    by_condition,
    side_effects,
)
from lensteer.pipeline.run import Run
from lensteer.plots.style import INK, MUTED, color, error_bars, finish
from lensteer.statistics import Estimate, estimate_in
from lensteer.tasks.benchmarks import Solved, solved_tasks

QUESTION = "Does steering change how long answers are, and do right answers pay for it?"
WORDS = "solutions in sentences"

#: Chains that end, as a share, below which lengths are those of the token limit.
ENOUGH_END = 0.5


@dataclass(frozen=True)
class Config:
    """A finished run's folder."""

    run: Path


@dataclass(frozen=True)
class OnLanguage:
    """What to run on GSM8K.

    Attributes:
        model: a chat model's folder or name; None: the organism, which cannot read the questions.
        gsm8k: folder of its files.
        folder: where answers are kept.
        layer: to steer; by default at .6 of the depth.
        multiple: length of the edit, in lengths of the difference.
        split: of the questions; "dev" to choose a layer and a length.
        n_pairs: training questions that the direction is fitted on.
        n_questions: that are answered, of at most `max_steps` lines in their published solution.
        max_steps: of these.
        n_controls: vectors of each kind of control.
        max_new_tokens: per answer.
        seed: of draws; answers are greedy.
    """

    gsm8k: Path
    model: str | None = None
    folder: Path | None = None
    layer: int | None = None
    multiple: float = 2.0
    split: str = "test"
    n_pairs: int = 60
    n_questions: int = 40
    max_steps: int = 2
    n_controls: int = 1
    max_new_tokens: int = 256
    seed: int = 0


def smoke(config: OnLanguage) -> OnLanguage:
    """The same at a size for a test."""
    return replace(config, n_pairs=6, n_questions=4, max_new_tokens=12)


@dataclass(frozen=True)
class Row:
    """One behavior pushed one way: changes of tokens per chain and of right answers, with their unsteered values.

    A control vector is a row of the kind "control". `finished` is the change of the share of chains that end.
    """

    behavior: str
    kind: str
    coefficient: float
    length: Estimate
    accuracy: Estimate
    unsteered_length: float
    unsteered_accuracy: float
    p_accuracy: float
    finished: Estimate | None = None
    unsteered_finished: float | None = None


def main(config: Config) -> list[Row]:
    """A row per behavior and sign.

    Raises:
        LensteerError: too few chains end, no task has an answer, or the run has no side effects.
    """
    found = Evaluation.load(config.run / "evaluation.json")
    plain = next(c for c in found.conditions if c.kind == "unsteered")
    _check_ends(plain.finished)
    known = {(e.behavior, e.kind, e.measured): e for e in found.side_effects}
    if not any(measured == "accuracy" for *_, measured in known):
        raise LensteerError(
            f"{str(config.run)!r} has no changes of accuracy: its tasks have no answers, or it was evaluated by an "
            "earlier version; evaluate it again"
        )
    rows = []
    for effect in found.effects:
        if effect.kind in KINDS and effect.unit == found.unit and not effect.annotator:
            found_here = {
                name: known[effect.behavior, effect.kind, name] for name in ("length", "accuracy", "finished")
            }
            rows.append(_row(effect.behavior, effect.kind, effect.coefficient, found_here))
    return rows


def _row(behavior: str, kind: str, coefficient: float, effects: Mapping[str, SideEffect]) -> Row:
    length, right, ended = (effects[name] for name in ("length", "accuracy", "finished"))
    values = length.base.value, right.base.value, right.p, ended.change, ended.base.value
    return Row(behavior, kind, coefficient, length.change, right.change, *values)


def in_equations(solved: Solved) -> str:
    """The equations of a published solution, and its answer."""
    found = [each.strip(" .,") for each in re.findall(r"[\d$(][\d\s$%.,+\-−*/x×()]*=\s*\$?\d[\d.,]*", solved.steps)]
    return ". ".join([*found, f"The answer is {solved.task.answer}."])


def pairs_of(solved: Sequence[Solved], n: int, seed: int) -> list[ls.Pair]:
    """Questions solved in sentences, and in equations alone; those with two equations or more.

    Raises:
        LensteerError: fewer such questions than asked for.
    """
    usable = [s for s in solved if in_equations(s).count("=") > 1]
    if len(usable) < n:
        raise LensteerError(
            f"{n} pairs, but {len(usable)} training questions have two equations: give n_pairs=1 to that"
        )
    chosen = random.Random(seed).sample(usable, n)
    return [
        ls.Pair(
            ls.Text(s.task.prompt, f"{s.steps}\nThe answer is {s.task.answer}."),
            ls.Text(s.task.prompt, in_equations(s)),
            WORDS,
        )
        for s in chosen
    ]


def on_language(config: OnLanguage) -> tuple[str, list[Row]]:
    """The model's name; a row per sign, and one per control vector.

    Raises:
        LensteerError: too few answers end, or too few questions.
    """
    training, given = (
        solved_tasks("gsm8k", config.gsm8k, split="dev"),
        solved_tasks("gsm8k", config.gsm8k, split=config.split),
    )
    pairs = pairs_of(training, config.n_pairs, config.seed)
    fitted = {pair.positive.prompt for pair in pairs}
    short = [s.task for s in given if len(s.steps.splitlines()) <= config.max_steps and s.task.prompt not in fitted]
    if len(short) < config.n_questions:
        raise LensteerError(f"n_questions={config.n_questions}: {len(short)} have {config.max_steps} steps or fewer")
    questions = random.Random(config.seed).sample(short, config.n_questions)
    model = ls.load_model(config.model, dtype=torch.bfloat16 if config.model else torch.float32)
    layer = round(0.6 * models.n_layers(model)) if config.layer is None else config.layer
    vectors = ls.fit_directions(model, pairs, layers=[layer], n_controls=config.n_controls, seed=config.seed)
    edit = config.multiple * float(vectors[WORDS].at(layer).norm())
    conditions = conditions_of(vectors, layer, [edit], config.n_controls)
    sampling = ls.Sampling(1, 0.0, config.seed, config.max_new_tokens, batch_size=100)
    measures = {WORDS: lambda trace: 0.0}  # nothing of a text's own is measured
    records = answers(model, questions, conditions, sampling, config.folder, measures)
    return models.fingerprint(model).name, rows_of(records, conditions, config.seed)


def rows_of(records: Sequence[Record], conditions: Sequence[Condition], seed: int = 0) -> list[Row]:
    """A row per steered condition and control.

    Raises:
        LensteerError: too few unsteered answers end.
    """
    grouped = by_condition(records, conditions)
    plain, *others = conditions
    _check_ends(sum(r.finished for r in grouped[plain.name]) / len(grouped[plain.name]))
    counted = [replace(c, kind="other") if c.kind == "control" else c for c in conditions]  # controls are compared, too
    effects = {(e.condition, e.measured): e for e in side_effects(grouped, counted, plain.name, seed=seed)}
    rows = []
    for c in others:
        here = {name: effects[c.name, name] for name in ("length", "accuracy", "finished")}
        assert c.plan is not None
        rows.append(_row(c.behavior or c.pool, c.kind, c.plan.edits[0].coefficient, here))
    return rows


def _check_ends(finished: float) -> None:
    if finished < ENOUGH_END:
        raise LensteerError(
            f"{finished:.0%} of the unsteered chains end within the run's token limit: their length is "
            "the limit; take a run with more tokens per chain"
        )


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """What a loaded result says, and whether an interval of length is wholly beyond all controls (and 0)."""
    rows = [row for row in result["rows"] if row["kind"] != "control"]
    controls = [row for row in result["rows"] if row["kind"] == "control"]
    furthest = max((abs(row["length"]["value"]) for row in controls), default=0.0)
    shown = [row for row in rows if row["length"]["low"] > furthest or row["length"]["high"] < -furthest]
    first = rows[0]
    told = "; ".join(
        f"{row['behavior']} at {row['coefficient']:+.2g}: {estimate_in(row, 'length'):+.0f} tokens, right answers "
        f"{estimate_in(row, 'accuracy'):+.2f}"
        for row in (shown or rows)
    )
    beside = f" Control vectors as long change length by at most {furthest:.0f} tokens." if controls else ""
    text = (
        f"On {result['model']} ({first['length']['n']} tasks, unsteered {first['unsteered_length']:.0f} tokens and "
        f"{first['unsteered_accuracy']:.2f} right), {len(shown)} of {len(rows)} edits change the length"
        f"{' beyond all control vectors' if controls else ''}: {told}."
        f"{beside}"
    )
    return text, bool(shown)


def draw(rows: list[Row]) -> go.Figure:
    """Length against right answers: a point per behavior and sign, gray ones for control vectors."""
    figure = go.Figure()
    for kind, sign in (("control", "circle"), ("down", "triangle-down"), ("up", "triangle-up")):
        for row in (row for row in rows if row.kind == kind):
            paint = MUTED if kind == "control" else color(row.behavior)
            x, y = ([value] for value in (row.length.value, 100 * row.accuracy.value))
            figure.add_scatter(
                x=x,
                y=y,
                error_x=dict(**error_bars(x, [row.length.low], [row.length.high]), color=paint),
                error_y=dict(**error_bars(y, [100 * row.accuracy.low], [100 * row.accuracy.high]), color=paint),
                mode="markers",
                marker=dict(symbol=sign, size=13, color=paint, line=dict(color=INK, width=1)),
                name=f"{row.behavior.replace('_', ' ')} {kind}",
            )
    figure.update_xaxes(title_text="change of tokens per chain", zeroline=True)
    figure.update_yaxes(title_text="change of right answers (points)", zeroline=True)
    about = "held-out tasks; 95 % intervals over tasks"
    return finish(figure, f"Length of thought and right answers under steering<br><sup>{about}</sup>", 520)


def table(rows: list[Row]) -> str:
    """One line per behavior and sign."""
    lines = ["behavior | pushed | tokens (unsteered) | right answers (unsteered) | p | ended (unsteered)"]
    for row in rows:
        lines.append(
            f"{row.behavior} | {row.kind} at {row.coefficient:+.2g} | {row.length:+.1f} ({row.unsteered_length:.0f}) | "
            f"{row.accuracy:+.3f} ({row.unsteered_accuracy:.3f}) | {row.p_accuracy:.2g} | "
            + ("" if row.finished is None else f"{row.finished:+.3f} ({row.unsteered_finished:.3f})")
        )
    return "\n".join(lines)


def to_json(model: str, rows: list[Row]) -> str:
    """The model's name and all rows."""
    return json.dumps(dict(model=model, rows=[asdict(row) for row in rows]), indent=1).replace("NaN", "null") + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--gsm8k", type=Path)
    parser.add_argument("--model")
    parser.add_argument("--folder", type=Path)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--multiple", type=float, default=OnLanguage.multiple)
    parser.add_argument("--split", default=OnLanguage.split)
    for option in ("n_pairs", "n_questions", "max_steps", "n_controls", "max_new_tokens", "seed"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(OnLanguage, option))
    parser.add_argument("--smoke", action="store_true")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = vars(parser.parse_args())
    small, out, picture, run = (options.pop(name) for name in ("smoke", "json", "figure", "run"))
    if (run is None) == (options["gsm8k"] is None):
        parser.error("give --run FOLDER, or --gsm8k FOLDER and --model FOLDER")
    if run is not None:
        name, found = Run.open(run).config.model or "organism", main(Config(run))
    else:
        chosen = OnLanguage(**options)
        name, found = on_language(smoke(chosen) if small else chosen)
    print(table(found))
    if out:
        out.write_text(to_json(name, found))
    if picture:
        draw(found).write_image(picture, width=900)

"""What does steering do to the length of thought, and what do right answers pay for it?

From a finished run: each behavior's vector, added and subtracted on held-out tasks, changes the number of tokens of a
chain and the share of right answers, both paired by task with 95 % intervals. Chains have to end within the run's token
limit for their length to mean anything, and tasks need answers that the model can find.

Example: python analyses/length_control.py --run RUN-FOLDER --json FILE --figure FILE.png
(the folder of a finished `lensteer run` or `lensteer demo`; reads its evaluation, runs nothing)
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path

from plotly import graph_objects as go

from lensteer.errors import LensteerError
from lensteer.evaluation import KINDS, Evaluation
from lensteer.plots.style import INK, color, error_bars, finish
from lensteer.statistics import Estimate

#: Chains that end, as a share, below which lengths are those of the token limit.
ENOUGH_END = 0.5


@dataclass(frozen=True)
class Config:
    """A finished run's folder."""

    run: Path


@dataclass(frozen=True)
class Row:
    """One behavior pushed one way: changes of tokens per chain and of right answers, with their unsteered values."""

    behavior: str
    kind: str
    coefficient: float
    length: Estimate
    accuracy: Estimate
    unsteered_length: float
    unsteered_accuracy: float
    p_accuracy: float


def main(config: Config) -> list[Row]:
    """A row per behavior and sign.

    Raises:
        LensteerError: too few chains end, no task has an answer, or the run has no side effects.
    """
    found = Evaluation.load(config.run / "evaluation.json")
    plain = next(c for c in found.conditions if c.kind == "unsteered")
    if plain.finished < ENOUGH_END:
        raise LensteerError(
            f"{plain.finished:.0%} of the unsteered chains end within the run's token limit: their length is "
            "the limit; take a run with more tokens per chain"
        )
    known = {(e.behavior, e.kind, e.measured): e for e in found.side_effects}
    if not any(measured == "accuracy" for *_, measured in known):
        raise LensteerError(
            f"{str(config.run)!r} has no changes of accuracy: its tasks have no answers, or it was evaluated by an "
            "earlier version; evaluate it again"
        )
    rows = []
    for effect in found.effects:
        if effect.kind in KINDS and effect.unit == found.unit and not effect.annotator:
            length, right = (known[effect.behavior, effect.kind, name] for name in ("length", "accuracy"))
            values = length.base.value, right.base.value, right.p
            rows.append(Row(effect.behavior, effect.kind, effect.coefficient, length.change, right.change, *values))
    return rows


def draw(rows: list[Row]) -> go.Figure:
    """Length against right answers: a point per behavior and sign."""
    figure = go.Figure()
    for kind, sign in (("down", "triangle-down"), ("up", "triangle-up")):
        for row in (row for row in rows if row.kind == kind):
            x, y = ([value] for value in (row.length.value, 100 * row.accuracy.value))
            figure.add_scatter(
                x=x,
                y=y,
                error_x=dict(**error_bars(x, [row.length.low], [row.length.high]), color=color(row.behavior)),
                error_y=dict(
                    **error_bars(y, [100 * row.accuracy.low], [100 * row.accuracy.high]), color=color(row.behavior)
                ),
                mode="markers",
                marker=dict(symbol=sign, size=13, color=color(row.behavior), line=dict(color=INK, width=1)),
                name=f"{row.behavior} {kind}",
            )
    figure.update_xaxes(title_text="change of tokens per chain", zeroline=True)
    figure.update_yaxes(title_text="change of right answers (points)", zeroline=True)
    about = "held-out tasks; 95 % intervals over tasks"
    return finish(figure, f"Length of thought and right answers under steering<br><sup>{about}</sup>", 520)


def table(rows: list[Row]) -> str:
    """One line per behavior and sign."""
    lines = ["behavior | pushed | tokens (unsteered) | right answers (unsteered) | p"]
    for row in rows:
        lines.append(
            f"{row.behavior} | {row.kind} at {row.coefficient:+.2g} | {row.length:+.1f} ({row.unsteered_length:.0f}) | "
            f"{row.accuracy:+.3f} ({row.unsteered_accuracy:.3f}) | {row.p_accuracy:.2g}"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = parser.parse_args()
    found = main(Config(given.run))
    print(table(found))
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if given.figure:
        draw(found).write_image(given.figure, width=900)

"""Does steering one behavior move the others, and do the vectors' cosines say which?

From the chains of `dose_response.py`: at one coefficient, every behavior's own vector is added and subtracted, and the
shares of all behaviors are counted. The effect of vector b on behavior b' is half of the share added less the share
subtracted, so that what both signs do alike cancels. Effects are set beside the cosine of the two vectors at the
steered layer, and beside what control vectors of the same length do. Intervals are from a bootstrap over tasks.

Example: python analyses/entanglement.py --run RUN-FOLDER --json FILE --figure FILE.png
(after `dose_response.py` with the same options, whose chains it reads; seconds then)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from dose_response import OWN, measured
from dose_response import Config as Measured
from plotly import graph_objects as go

from lensteer.evaluation import ResampledShares, estimate_of, rank_correlation
from lensteer.plots.style import CELL_FONT, DIVERGING, color_bar, finish, in_cell, number
from lensteer.statistics import Estimate, estimate_in

QUESTION = "Does steering one behavior move the others, and do the vectors' cosines say which?"


@dataclass(frozen=True)
class Config:
    """The options of `dose_response.py`, and the coefficient of the comparison."""

    measured: Measured
    coefficient: float = 1.0


@dataclass(frozen=True)
class Cell:
    """The effect of the vector of `steered` (or of a control as long) on the share of `counted`.

    `relative` is the effect in units of what the own vector of `counted` does to it.
    """

    steered: str
    vector: str
    counted: str
    effect: Estimate
    relative: Estimate
    cosine: float | None


@dataclass(frozen=True)
class Entanglement:
    """All cells, and over pairs of different behaviors the rank correlation of cosine and effect on b'.

    Attributes:
        cells: of behaviors' own vectors and of controls.
        correlation: Spearman over pairs (b, b'), b' not b, of the cosine and the relative effect.
        off_target: mean absolute relative effect of own vectors on other behaviors.
        controls: the same of control vectors on all behaviors.
        on_target: mean effect of own vectors on their own behaviors, as a change of the share.
    """

    cells: tuple[Cell, ...]
    correlation: Estimate
    off_target: Estimate
    controls: Estimate
    on_target: Estimate


def main(config: Config) -> Entanglement:
    """The effects of every vector on every behavior."""
    _, vectors, layers, grouped = measured(config.measured)
    labels, c = list(layers), config.coefficient
    shares = ResampledShares([r for rows in grouped.values() for r in rows], seed=config.measured.seed)
    n = len({r.task for r in grouped["unsteered"]})
    sources = [(name.split("/")[0], name.split("/")[1]) for name in grouped if "/" in name]
    effects = {
        (steered, vector, counted): (
            shares.of(f"{steered}/{vector}/{c:+g}", counted) - shares.of(f"{steered}/{vector}/{-c:+g}", counted)
        )
        / 2
        for steered, vector in dict.fromkeys(sources)
        for counted in labels
    }
    # The scale is fixed, not resampled: the first draw is the observed one.
    scale = {b: abs(float(effects[b, OWN, b][0])) or np.nan for b in labels}
    relative = {key: effect / scale[key[2]] for key, effect in effects.items()}
    cells = []
    for key, effect in effects.items():
        steered, vector, counted = key
        a, b = (vectors[label].at(layers[steered]) for label in (steered, counted))
        cosine = float(torch.cosine_similarity(a, b, dim=0)) if vector == OWN else None
        cells.append(Cell(*key, estimate_of(effect, n), estimate_of(relative[key], n), cosine))
    pairs = [(a, b) for a in labels for b in labels if a != b]
    cosines = [next(x.cosine for x in cells if (x.steered, x.vector, x.counted) == (a, OWN, b)) for a, b in pairs]
    off = np.stack([relative[a, OWN, b] for a, b in pairs], axis=1)
    others = np.stack([v for (_, vector, _), v in relative.items() if vector != OWN], axis=1)
    own = np.stack([effects[b, OWN, b] for b in labels], axis=1)
    return Entanglement(
        tuple(cells),
        estimate_of(rank_correlation(np.array(cosines), off), n),
        estimate_of(np.abs(off).mean(1), n),
        estimate_of(np.abs(others).mean(1), n),
        estimate_of(own.mean(1), n),
    )


def draw(found: Entanglement) -> go.Figure:
    """Effects of own vectors as a matrix, in points; bold where the interval excludes 0; cosines in brackets."""
    own = [cell for cell in found.cells if cell.vector == OWN]
    labels = list(dict.fromkeys(cell.steered for cell in own))
    at = {(cell.steered, cell.counted): cell for cell in own}
    tones = [[float(np.clip(at[a, b].relative.value, -1, 1)) for b in labels] for a in labels]

    def text(a: str, b: str, tone: float) -> str:
        cell = at[a, b]
        words = number(100 * cell.effect.value, "+.1f")
        words = f"<b>{words}</b>" if cell.effect.excludes() else words
        return in_cell(words + ("" if a == b else f"<br>({number(cell.cosine or 0.0)})"), tone)

    texts = [
        [text(a, b, tone) for b, tone in zip(labels, row, strict=True)] for a, row in zip(labels, tones, strict=True)
    ]
    cells: dict[str, Any] = dict(text=texts, texttemplate="%{text}", textfont=CELL_FONT)
    figure = go.Figure(
        go.Heatmap(
            z=tones, x=labels, y=labels, zmin=-1, zmax=1, colorscale=DIVERGING,
            colorbar=color_bar("effect / effect of<br>its own vector"), **cells,
        )
    )  # fmt: skip
    figure.update_yaxes(autorange="reversed", title_text="vector", showgrid=False)
    figure.update_xaxes(title_text="counted", showgrid=False)
    about = "half of added less subtracted, in points of the share; bold: 95 % interval excludes 0; in brackets: cosine"
    return finish(figure, f"What each vector moves<br><sup>{about}</sup>", 460, False)


def table(found: Entanglement) -> str:
    """The means, then a line per cell."""
    lines = [
        f"mean effect on the vector's own behavior {found.on_target:+.3f}; in units of the own vector's, absolute, on "
        f"others {found.off_target:.2f}; of control vectors {found.controls:.2f}; Spearman of cosine and effect on "
        f"others {found.correlation:+.2f}"
    ]
    for cell in found.cells:
        cosine = "" if cell.cosine is None else f" | cosine {cell.cosine:+.2f}"
        lines.append(f"{cell.steered} | {cell.vector} | {cell.counted} | {cell.effect:+.3f}{cosine}")
    return "\n".join(lines)


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """What `Entanglement` as JSON says, and whether cosines tell what else a vector moves."""
    own, off, controls, correlation = (
        estimate_in(result, name) for name in ("on_target", "off_target", "controls", "correlation")
    )
    text = (
        f"A vector changes its own behavior's share by {100 * own:+.1f} points (half of added less subtracted; mean of "
        f"the behaviors, {own.n} tasks). On other behaviors it does {off:.2f} of what their own vectors do (in "
        f"absolute value); control vectors as long do {controls:.2f} on any. Spearman of cosine and effect on others: "
        f"{correlation:+.2f}."
    )
    return text, bool(correlation.low > 0)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--coefficient", type=float, default=Config.coefficient)
    parser.add_argument("--coefficients", type=float, nargs="+", default=Measured.coefficients)
    for option in ("n_dev", "n_samples", "n_controls", "seed"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Measured, option))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = vars(parser.parse_args())
    out, image, one = given.pop("json"), given.pop("figure"), given.pop("coefficient")
    found = main(Config(Measured(**{**given, "coefficients": tuple(given["coefficients"])}), one))
    print(table(found))
    if out:
        out.write_text(json.dumps(asdict(found), indent=1) + "\n")
    if image:
        draw(found).write_image(image, width=800)

"""Does the response to a vector's coefficient look like a direction's, or like a disturbance that any vector causes?

Each behavior's own vector, and control vectors of the same length (isotropic; fitted on shuffled labels), are added on
dev tasks with coefficients of both signs, nine with 0; tasks and seeds are the same in all conditions. A direction's
response is odd in the coefficient and monotone; a disturbance is even. Curves have 95 % intervals over tasks.

Example: python analyses/dose_response.py --run RUN-FOLDER --json FILE --figure FILE.png
(the folder of a finished `lensteer run` or `lensteer demo`; about 4 minutes on two cores for the organism's demo, about
50 for mini-R1; resumes)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lensteer as ls
from lensteer.attribution.selection import SelectedLayers
from lensteer.evaluation import (
    Condition,
    DoseResponse,
    Record,
    by_condition,
    dose_response,
    random_directions,
    run_conditions,
    text_check,
)
from lensteer.pipeline.chains import annotators_of
from lensteer.pipeline.run import SCOPES, Run
from lensteer.statistics import estimate_in
from lensteer.vectors import BehaviorVectors

QUESTION = "Does the response to a vector's coefficient look like a direction's, or like any vector's disturbance?"

OWN, POOLS = "own", ("isotropic", "shuffled")


@dataclass(frozen=True)
class Config:
    """A finished run's folder, coefficients (of the difference itself; both signs), tasks, and controls per pool."""

    run: Path
    coefficients: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    n_dev: int = 50
    n_samples: int = 1
    n_controls: int = 1
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One vector's curve: of a behavior (`vector` "own"), or of a control vector as long as the behavior's."""

    vector: str
    curve: DoseResponse


def conditions_of(config: Config, run: Run, vectors: BehaviorVectors, layers: SelectedLayers) -> list[Condition]:
    """Every vector with every coefficient, and the unsteered condition."""
    made = [Condition("unsteered", kind="unsteered")]
    for behavior, layer in layers.items():
        length = float(vectors[behavior].at(layer).norm())
        sources: dict[str, Any] = {OWN: vectors[behavior]}
        for pool in POOLS:
            drawn = random_directions(vectors, layer, config.n_controls, pool=pool, behaviors=[behavior])
            sources |= {f"{pool}-{i}": direction for i, direction in enumerate(drawn)}
        for name, direction in sources.items():
            for c in config.coefficients:
                for signed in (-c, c):
                    scaled = signed if name == OWN else signed * length
                    unit = "difference" if name == OWN else "unit"
                    plan = ls.SteeringPlan(direction, layer, scaled, SCOPES[run.config.scope], unit=unit)
                    made.append(Condition(f"{behavior}/{name}/{signed:+g}", plan, behavior=behavior))
    return made


def measured(config: Config) -> tuple[Run, BehaviorVectors, SelectedLayers, dict[str, list[Record]]]:
    """The run, its vectors and layers, and the records of every condition; chains are kept in the run's folder."""
    run = Run.open(config.run)
    layers = SelectedLayers.load(run.path("layers.json"))
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    conditions = conditions_of(config, run, vectors, layers)
    _, annotator = next(iter(annotators_of(run).items()))
    records = run_conditions(
        run.model,
        run.tasks("dev")[: config.n_dev],
        conditions,
        run.sampling(config.n_samples),
        annotator=annotator,
        path=run.path("dose-response.jsonl"),
        progress=True,
    )
    return run, vectors, layers, by_condition(records, conditions)


def main(config: Config) -> list[Row]:
    """A row per behavior and vector."""
    run, _, layers, grouped = measured(config)
    base = grouped["unsteered"]
    rows = []
    for behavior, layer in layers.items():
        names = dict.fromkeys(n.split("/")[1] for n in grouped if n.startswith(f"{behavior}/"))
        for name in names:
            by_coefficient = {0.0: base}
            for c in config.coefficients:
                by_coefficient |= {s * c: grouped[f"{behavior}/{name}/{s * c:+g}"] for s in (-1, 1)}
            readable = {
                c: text_check(r, base, run.margins, seed=config.seed).ok for c, r in by_coefficient.items() if c
            }
            rows.append(Row(name, dose_response(by_coefficient, readable, behavior, layer, seed=config.seed)))
    return rows


def table(rows: list[Row]) -> str:
    """One line per vector."""
    lines = ["behavior | vector | Spearman | odd part | even part | at | linear up to | text breaks (down, up)"]
    for row in rows:
        c = row.curve
        breaks = ", ".join("–" if x is None else f"{x:g}" for x in c.breaks)
        lines.append(
            f"{c.behavior} | {row.vector} | {c.spearman:+.2f} | {c.odd:+.3f} | {c.even:+.3f} | {c.at:g} | "
            f"{c.linear:g} | {breaks}"
        )
    return "\n".join(lines)


def answer(result: Sequence[Mapping[str, Any]]) -> tuple[str, bool]:
    """What the rows as JSON say, and whether each own odd part is larger than its controls', with sound text."""
    parts, shown = [], []
    for curve in (row["curve"] for row in result if row["vector"] == OWN):
        behavior, at = curve["behavior"], curve["at"]
        odd, even = (100 * estimate_in(curve, name) for name in ("odd", "even"))
        others = [
            100 * abs(_share(row["curve"], at) - _share(row["curve"], -at)) / 2
            for row in result
            if row["vector"] != OWN and row["curve"]["behavior"] == behavior
        ]
        sound = all(point["readable"] for point in curve["points"] if abs(point["coefficient"]) == at)
        shown.append(sound and odd.low > max(others, default=0.0))
        parts.append(
            f"{behavior} at ±{at:g}{'' if sound else ' (where text breaks)'} {odd:+.1f}, {len(others)} control vectors "
            f"at most {max(others, default=0):.1f}, even part {even:+.1f}, Spearman "
            f"{estimate_in(curve, 'spearman'):+.2f}"
        )
    text = f"The odd part of the response, in points of the share ({odd.n} tasks): {'; '.join(parts)}."
    return f"{text} {sum(shown)} of {len(shown)} odd parts lie wholly above their controls', with sound text.", all(
        shown
    )


def _share(curve: Mapping[str, Any], coefficient: float) -> float:
    return float(next(p["share"]["value"] for p in curve["points"] if p["coefficient"] == coefficient))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--coefficients", type=float, nargs="+", default=Config.coefficients)
    for option in ("n_dev", "n_samples", "n_controls", "seed"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    given = vars(parser.parse_args())
    out, image = given.pop("json"), given.pop("figure")
    found = main(Config(**{**given, "coefficients": tuple(given["coefficients"])}))
    print(table(found))
    if out:
        out.write_text(json.dumps([asdict(row) for row in found], indent=1) + "\n")
    if image:
        ls.plots.dose_response([row.curve for row in found if row.vector == OWN]).write_image(image, width=1200)

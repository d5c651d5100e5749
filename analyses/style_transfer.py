"""Does one cache edit transfer a style of reasoning? A vector per style, and the styles of the answers under each.

A style's vector is fitted on pairs whose examples are worked in that style versus the same without steps (`--against
none`) or worked in the next style (`--against other`). Tasks request no style; the chat template lets the model decide
whether to think. The coefficient is chosen on dev tasks (largest share of answers that think in the style), results are
from test tasks, with 95 % intervals over tasks. Other conditions: unsteered, a random vector of the same norm, prompted
baselines.

Example: python analyses/style_transfer.py --n-test 60 --json style-transfer.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lensteer as ls
from lensteer import organism
from lensteer.cache_steering import CachePlan, CacheVector, contrastive_pairs, fit_cache_vector
from lensteer.cache_steering.organism import ENDING, JOIN, make_records
from lensteer.evaluation import Condition, Modes, measure_modes
from lensteer.generation.jobs import Sampling
from lensteer.organism.grammar import STYLE_CUES, STYLES


@dataclass(frozen=True)
class Config:
    """Model, sizes, coefficients to choose from, and what a style's steps are compared with."""

    model: str | None = None
    n_pairs: int = 80
    shots: int = 2
    against: str = "none"
    c_values: tuple[float, ...] = (0.5, 1.0, 1.5, 2.0)
    n_dev: int = 24
    n_test: int = 60
    seed: int = 0


@dataclass(frozen=True)
class Result:
    """Per style the chosen coefficient, and the modes of all conditions on test tasks."""

    against: str
    c_values: dict[str, float]
    modes: Modes


def fitted(model, style: str, config: Config) -> CacheVector:
    """The vector of one style."""
    other = STYLES[(STYLES.index(style) + 1) % len(STYLES)] if config.against == "other" else None
    pairs = contrastive_pairs(
        model,
        make_records(100, seed=config.seed),
        n=config.n_pairs,
        shots=config.shots,
        style=style,
        against=other,
        ending=ENDING,
        join=JOIN,
        seed=config.seed,
    )
    return fit_cache_vector(model, pairs, label=style)


def main(config: Config) -> Result:
    """Fit, choose, measure."""
    model = ls.load_model(config.model)
    sampling = Sampling(1, 1.0, config.seed, 400, 160, thinking=False)
    options: dict[str, Any] = dict(annotator=ls.grammar, style_of=organism.style_of, progress=True)
    vectors = {style: fitted(model, style, config) for style in STYLES}
    dev = measure_modes(
        model,
        ls.load_tasks(split="dev", n=config.n_dev),
        [Condition(f"{s}/{c:g}", CachePlan(vectors[s], c)) for s in STYLES for c in config.c_values],
        sampling,
        **options,
    )

    def worth(style: str, c: float) -> tuple[float, float]:
        condition = dev[f"{style}/{c:g}"]
        return condition.thinks.value * (
            condition.styles[style].value if style in condition.styles else 0.0
        ) * condition.finished.value, -c

    chosen = {style: max(config.c_values, key=partial(worth, style)) for style in STYLES}
    conditions = [
        Condition("unsteered", kind="unsteered"),
        Condition("random", CachePlan(vectors[STYLES[0]].random(config.seed), chosen[STYLES[0]])),
    ]
    for style in STYLES:
        conditions.append(Condition(f"{style} vector", CachePlan(vectors[style], chosen[style])))
        conditions.append(Condition(f"{style} prompted", None, STYLE_CUES[style][0]))
    modes = measure_modes(model, ls.load_tasks(split="test", n=config.n_test), conditions, sampling, **options)
    return Result(config.against, chosen, modes)


def table(result: Result) -> str:
    """One line per condition."""
    lines = [
        f"against {result.against}; coefficients {result.c_values}",
        f"condition | thinks | right | {' | '.join(STYLES)}",
    ]
    for condition in result.modes.conditions:
        figures = [condition.thinks, condition.accuracy, *(condition.styles.get(style) for style in STYLES)]
        cells = ["-" if e is None else f"{e:.2f}" for e in figures]
        lines.append(" | ".join([condition.condition, *cells]))
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--against", choices=("none", "other"), default="none")
    for name in ("n_pairs", "shots", "n_dev", "n_test", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Config(), name))
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    result = main(Config(**given))
    print(table(result))
    if out:
        out.write_text(json.dumps(asdict(result), indent=1))

"""How well do cheap attribution scores approximate the exact KL? By method, coefficient and layer.

Every method is compared with exact scores at several coefficients: Pearson and Spearman over behaviors × layers,
agreement on the top three layers, the ratio predicted / exact by layer, and the relative cost of the exact scores.

Example: python analyses/attribution_fidelity.py --n-train 60 --json fidelity.json
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import lensteer as ls
from lensteer.attribution import Fidelity, fidelity

METHODS = ("fisher_jvp", "fisher", "published", "signed")


@dataclass(frozen=True)
class Config:
    """Model, sizes, and the coefficients of the exact scores: 1 adds a vector as long as the mean activation."""

    model: str | None = None
    n_train: int = 60
    max_spans: int = 100
    coefficients: tuple[float, ...] = (0.1, 0.25, 0.5, 1.0)
    samples: int = 8
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One method at one coefficient. `ratio` is predicted / exact, summed over behaviors, by layer (for KLs)."""

    method: str
    coefficient: float
    pearson: float
    spearman: float
    top3: float
    ratio: dict[int, float]
    unreliable: int
    cost_rows: float
    cost_seconds: float


def main(config: Config) -> list[Row]:
    """Score with every method; returns a row per method and coefficient."""
    model = ls.load_model(config.model)
    train = ls.load_tasks(split="train", n=config.n_train)
    traces = ls.annotate(
        ls.generate_traces(model, train, temperature=1.0, seed=config.seed, batch_size=256), ls.grammar
    )
    vectors = ls.fit_vectors(model, traces, window="onset")
    options: dict[str, Any] = dict(behaviors=ls.STEERED, max_spans=config.max_spans, seed=config.seed)
    exact = ls.attribute(model, traces, vectors, coefficient=config.coefficients, unit="mean_norm", **options)
    rows = []
    for method in METHODS:
        scaling = None if method == "published" else "mean_norm"  # the published code has its own
        how: dict[str, Any] = dict(method=method, samples=config.samples, unit=scaling)
        scores = ls.attribute(model, traces, vectors, **how, **options)
        rows += _rows(fidelity(scores, exact))
    return rows


def _rows(found: Fidelity) -> list[Row]:
    ratio = found.predicted.sum(1) / found.exact.sum(1)
    return [
        Row(
            found.method,
            coefficient,
            found.pearson[k],
            found.spearman[k],
            float(found.top_overlap[k].mean()),
            dict(zip(found.layers, ratio[k].tolist(), strict=True)) if not found.radius.isnan().all() else {},
            int(found.unreliable.sum()),
            found.cost_rows,
            found.cost_seconds,
        )
        for k, coefficient in enumerate(found.coefficients)
    ]


def table(found: list[Row]) -> str:
    """One line per method and coefficient."""
    head = "method | coefficient | Pearson | Spearman | top 3 | predicted / exact by layer | exact costs (rows, time) |"
    lines = [head, "---|---|---|---|---|---|---|"]
    for r in found:
        layers = " ".join(f"{layer}: {value:.2f}" for layer, value in r.ratio.items())
        cost = f"×{r.cost_rows:.1f}, ×{r.cost_seconds:.1f}"
        lines.append(
            f"{r.method} | {r.coefficient} | {r.pearson:.3f} | {r.spearman:.3f} | {r.top3:.2f} | {layers} | {cost} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--n-train", type=int, default=60)
    parser.add_argument("--max-spans", type=int, default=100)
    parser.add_argument("--json", type=Path)
    given = vars(parser.parse_args())
    out = given.pop("json")
    result = main(Config(**given))
    print(table(result))
    if out:
        out.write_text(json.dumps([asdict(r) for r in result], indent=1))

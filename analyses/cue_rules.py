"""How well do cue rules reproduce the published judge's labels on chains that they were not tuned on?

The rules were tuned on the first 50 of the 100 published chains (R1-Distill-Qwen-1.5B, annotated by GPT-4o, arXiv
2506.18167); the other 50 were not read. Agreement is by sentence, over sentences that the judge labeled; intervals are
from a bootstrap over chains. One model and one judge: results may not carry over to other models' chains.

Example: LENSTEER_REFERENCE=reference python analyses/cue_rules.py
"""

from __future__ import annotations

import argparse
import os
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from lensteer.annotation import Agreement, agreement_of, labeled_sentences, read_published
from lensteer.annotation.rules import rules
from lensteer.errors import LensteerError
from lensteer.statistics import Estimate
from lensteer.traces import Trace

CHAINS = "r1_qwen_1.5b_annotated_chains.jsonl"


@dataclass(frozen=True)
class Config:
    """The folder with the published chains, how many of the first the rules were tuned on, and resamples."""

    reference: Path = field(default_factory=lambda: Path(os.environ.get("LENSTEER_REFERENCE") or "reference"))
    n_tuned: int = 50
    n_boot: int = 2000
    seed: int = 0


@dataclass(frozen=True, eq=False)
class Result:
    """Agreement with the judge (the reference) on both parts, and the share of sentences that the judge labeled."""

    tuned: Agreement
    held_out: Agreement
    covered: tuple[float, float]


def main(config: Config) -> Result:
    """Annotate the published chains by the rules and compare.

    Raises:
        LensteerError: no such chains, or one of the two parts is empty.
    """
    traces, _ = read_published(config.reference / CHAINS)
    if not 0 < config.n_tuned < len(traces):
        raise LensteerError(f"n_tuned={config.n_tuned}: give 1 to {len(traces) - 1} of the {len(traces)} chains")
    parts = [compare(part, config) for part in (traces[: config.n_tuned], traces[config.n_tuned :])]
    return Result(parts[0][0], parts[1][0], (parts[0][1], parts[1][1]))


def compare(traces: Sequence[Trace], config: Config) -> tuple[Agreement, float]:
    """Agreement with the traces' spans, and the share of sentences that have one."""
    chains = [
        [(judged.label, own.label) for judged, own in zip(labeled_sentences(trace), sentences, strict=True)]
        for trace, sentences in zip(traces, rules(traces), strict=True)
    ]
    labeled = [[pair for pair in chain if pair[0] is not None] for chain in chains]
    found = agreement_of(labeled, n_boot=config.n_boot, seed=config.seed)
    return found, found.n_sentences / sum(map(len, chains))


def table(result: Result) -> str:
    """One line per figure: on the chains used for tuning, and on the others."""
    lines = ["figure | tuned on | held out |", "---|---|---|"]
    for name in ("macro_f1", "kappa", "accuracy"):
        cells = [interval(getattr(part, name)) for part in (result.tuned, result.held_out)]
        lines.append(f"{name} | {' | '.join(cells)} |")
    for one, other in zip(result.tuned.per_label, result.held_out.per_label, strict=True):
        cells = [f"{interval(part.f1)} of {part.n_first}" for part in (one, other)]
        lines.append(f"F1 {one.label} | {' | '.join(cells)} |")
    for name, part, covered in zip(("tuned", "held out"), (result.tuned, result.held_out), result.covered, strict=True):
        lines.append(f"{name}: {part.n_sentences} sentences of {part.n_chains} chains, {covered:.1%} of all")
    return "\n".join(lines)


def interval(estimate: Estimate) -> str:
    """An estimate with its interval."""
    return f"{estimate:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--reference", type=Path, default=Config().reference)
    parser.add_argument("--n-boot", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    print(table(main(Config(**vars(parser.parse_args())))))

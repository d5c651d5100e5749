"""Does a user-defined label or concept go through a whole run on SmolLM2, and does steering along it have an effect?

Two runs, each from fit to report:

- label: `advice`, below, labels the sentences that tell the reader what to do. SmolLM2 answers everyday requests
  (`requests.jsonl`), the vectors are fitted on its own answers, and the share of such sentences is tested.
- contrast: the vectors are fitted on 40 written pairs of a polite and a curt answer, and the share of answers with a
  word of courtesy (`courtesy` in `politeness.py`) is tested.

    python analyses/own_behaviors.py --model SmolLM2-135M-Instruct --out own-behaviors

Each took 12 minutes on two shared cores. An interrupted run resumes where it stopped.

Each is also a command: `lensteer run --annotator analyses/own_behaviors.py:advice --behaviors advice …` and
`lensteer run --pairs politeness --measure analyses/politeness.py:courtesy …`.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import lensteer as ls
from lensteer.annotation.splitting import split_sentences
from lensteer.pipeline import Run, RunConfig, complete

HERE = Path(__file__).parent
ADVICE = re.compile(
    r"\byou(?:'ll| will)? (?:should|can|could|need|may|might|must|want|have to)\b|\b(?:make|be) sure\b|"
    r"\bconsider \w+ing\b|\b(?:try|remember|start by|begin by|avoid|ensure)\b|\byour\b",
    re.IGNORECASE,
)
RUNS = ("label", "contrast")


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        model: A chat model's folder or name.
        out: Folder of the runs' folders.
        runs: Of `RUNS`.
        n_train: Requests whose answers the label's vectors are fitted on.
        n_dev: Requests that coefficients are chosen on.
        n_test: Held-out requests.
        n_samples: Answers per held-out request, in conditions other than controls.
        n_controls: Control vectors in each of three pools.
        max_new_tokens: Per answer.
        coefficients: To choose from, both signs.
        seed: For all sampling.
    """

    model: str | None = None
    out: Path = Path("own-behaviors")
    runs: tuple[str, ...] = RUNS
    n_train: int = 64
    n_dev: int = 24
    n_test: int = 40
    n_samples: int = 4
    n_controls: int = 5
    max_new_tokens: int = 64
    coefficients: tuple[float, ...] = (0.75, 1.0, 1.5, 2.0)
    seed: int = 0


@ls.labeling("advice", "other")
def advice(traces: Sequence[ls.Trace]) -> list[list[ls.Sentence]]:
    """Sentences that tell the reader what to do, by keywords alone: "you should", "make sure", "your"."""
    found = []
    for trace in traces:
        text = trace.response[slice(*trace.thinking)] or trace.response  # SmolLM2 does not think
        pieces = [text[begin:end] for begin, end in split_sentences(text)]
        found.append([ls.Sentence("advice" if ADVICE.search(piece) else "other", piece) for piece in pieces])
    return found


def main(config: Config) -> dict[str, ls.Evaluation]:
    """Start or resume the runs; returns the evaluation of each."""
    shared = RunConfig(
        model=config.model,
        tasks=str(HERE / "requests.jsonl"),
        n_train=config.n_train,
        n_dev=config.n_dev,
        n_test=config.n_test,
        n_samples=config.n_samples,
        dev_samples=2,
        control_samples=1,
        n_controls=config.n_controls,
        n_score_controls=0,
        max_spans=30,
        score_coefficient=0.1,
        temperature=0.7,
        train_tokens=96,
        max_new_tokens=config.max_new_tokens,
        batch_size=64,
        coefficients=config.coefficients,
        seed=config.seed,
    )
    label = replace(shared, annotators=(f"{HERE / 'own_behaviors.py'}:advice",), behaviors=("advice",))
    contrast = replace(shared, pairs="politeness", measure=f"{HERE / 'politeness.py'}:courtesy")
    found = {}
    for name, each in zip(RUNS, (label, contrast), strict=True):
        if name in config.runs:
            folder = config.out / name
            print(f"{name}: {folder}")
            complete(Run.open(folder, each, progress=True), print)
            found[name] = ls.Evaluation.load(folder / "evaluation.json")
    return found


def table(found: dict[str, ls.Evaluation]) -> str:
    """A line per run and direction."""
    rows = []
    for name, evaluation in found.items():
        for e in evaluation.effects:
            if e.unit == evaluation.unit:
                ranks = ", ".join(f"rank {pool.rank} of {pool.n + 1} {pool.pool}" for pool in e.controls)
                rows.append(
                    f"{name}: {e.behavior} {e.kind}, layer {e.layer}, coefficient {e.coefficient:+.3g}: {e.share:.3f}, "
                    f"unsteered {e.base:.3f}, p {e.p_holm:.4f} after Holm, "
                    f"{ranks}: {e.verdict}"
                )
        rows += [
            f"{name}: {condition.condition}: {condition.text.why}"
            for condition in evaluation.conditions
            if condition.behavior and condition.text and condition.text.why
        ]
        rows += [f"{name}: {behavior} {kind}: no coefficient" for behavior, kind in evaluation.without_coefficient]
    return "\n".join(rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--out", type=Path, default=Config.out)
    parser.add_argument("--runs", nargs="+", choices=RUNS, default=RUNS)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(table(main(Config(given.model, given.out, tuple(given.runs), seed=given.seed))))

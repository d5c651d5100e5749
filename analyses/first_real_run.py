"""What do four behavior vectors do on a real language model, with every choice fixed in advance?

The choices had worked by hand on 20 tasks: the published code's window against all tokens, added at every generated
token at layer 15, with a coefficient of 1.5 (times the difference itself). Vectors and classifier are fitted on chains
annotated by GPT-4o; the classifier labels what the model generates on the written test tasks.

    python analyses/first_real_run.py --model mini-r1 --chains a.jsonl b.jsonl --out runs/first --dtype bfloat16

52 conditions of 100 chains: about half an hour on two cores with bfloat16 instructions, one hour without.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

import lensteer as ls
from lensteer.annotation import fit_classifier, rules
from lensteer.evaluation import BASELINE_PROMPTS, Evaluation, evaluate
from lensteer.generation.jobs import Sampling
from lensteer.pipeline import read_chains, with_masks
from lensteer.vectors import BehaviorVectors


@dataclass(frozen=True)
class Config:
    """The fixed choices."""

    model: str
    chains: tuple[str, ...]
    out: str
    dtype: str = "bfloat16"
    window: str = "published"
    negatives: str = "all"
    layer: int = 15
    coefficient: float = 1.5
    n_samples: int = 8
    temperature: float = 0.8
    max_new_tokens: int = 140
    batch_size: int = 200
    seed: int = 0


def main(config: Config) -> Evaluation:
    """Vectors, chains and results; finished parts are not recomputed."""
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    model = ls.load_model(config.model, dtype=getattr(torch, config.dtype))
    given = read_chains(config.chains, model)
    path = out / "vectors.safetensors"
    if not path.exists():
        recipe: dict[str, Any] = dict(window=config.window, negatives=config.negatives, seed=config.seed)
        ls.fit_vectors(model, given, n_controls=20, **recipe).save(path)
    vectors = BehaviorVectors.load(path, model)
    annotators = with_masks({"classifier": fit_classifier(given, seed=config.seed), "rules": rules})
    found = evaluate(
        model,
        ls.load_tasks("builtin", split="test"),
        vectors,
        dict.fromkeys(ls.STEERED, config.layer),
        config.coefficient,
        scope=ls.generated,
        prompts=BASELINE_PROMPTS,
        n_controls=0,
        sampling=Sampling(config.n_samples, config.temperature, config.seed, config.max_new_tokens, config.batch_size),
        annotator=annotators,
        seed=config.seed,
        path=out / "evaluation.jsonl",
        progress=True,
    )
    found.save(out / "evaluation.json")
    rows: list[dict[str, Any]] = [
        {
            "config": {k: v for k, v in asdict(config).items() if k not in ("model", "chains", "out")},
            "lengths": {b: float(vectors[b].at(config.layer).norm()) for b in ls.STEERED},
            "spans": dict(vectors.counts),
        }
    ]
    names = ("share", "base", "change", "low", "high", "events", "base_events", "base_event_tasks", "p", "p_holm")
    for e in found.effects:
        rows.append(
            {"behavior": e.behavior, "kind": e.kind, "unit": e.unit, "annotator": e.annotator or "classifier"}
            | {name: getattr(e, name) for name in names}
            | {"verdict": e.verdict}
        )
    for condition in found.conditions:
        rows.append(
            {
                **asdict(condition),
                "text": None if condition.text is None else condition.text.why or "within the margins",
            }
        )
    text = json.dumps(rows, indent=0).replace("NaN", "null")
    (out / "summary.json").write_text(text + "\n", encoding="utf-8")
    return found


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--chains", required=True, nargs="+")
    parser.add_argument("--out", required=True)
    parser.add_argument("--dtype", default=Config.dtype)
    asked = parser.parse_args()
    result = main(Config(asked.model, tuple(asked.chains), asked.out, asked.dtype))
    columns = [
        "behavior",
        "kind",
        "base",
        "share",
        "change",
        "low",
        "high",
        "base_events",
        "events",
        "p_holm",
        "verdict",
    ]
    print(result.to_dataframe().query("unit == 'sentences' and annotator == ''")[columns].round(4).to_string())
    columns = ["condition", "sentences", "sentence_length", "repetition", "compression", "nll", "kl", "text"]
    print(result.conditions_dataframe()[columns].round(3).to_string())

"""Where in a sentence is its behavior decided, and which vectors act there? On a language model and on the organism.

Onset vectors on onsets steer the organism best, and on a language model vectors of the tokens around an onset, on all
tokens, do. One explanation: in the organism's grammar a sentence's first token settles its behavior, in language it
does not. Two measurements could refute it.

1. How well the first k tokens of a sentence tell its label (macro-F1 of a linear classifier on tokens by place,
   cross-validated by chain). If language is settled at the first token as well, the explanation is wrong.
2. By how much steering changes the log-probability of each token of given sentences, by its place in the sentence: of
   the sentences that have the behavior and of those that do not. If vectors raise the behavior at the onset alone also
   in language, it is wrong, too.

Example: python analyses/where_decided.py --model mini-r1 --chains a.jsonl --vectors onset.safetensors span.safetensors
(minutes on one core; without --model the organism, with vectors fitted on its own chains)
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.feature_extraction import DictVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, cross_val_predict
from sklearn.pipeline import make_pipeline

import lensteer as ls
from lensteer.evaluation import estimate_of
from lensteer.forward import forced_logits
from lensteer.pipeline import read_chains
from lensteer.statistics import drawn_counts, flat
from lensteer.vectors import BehaviorVectors, Recipe, fit_recipes

#: Places of a token in its sentence, half-open.
PLACES = {"first": (0, 1), "2nd and 3rd": (1, 3), "4th to 6th": (3, 6), "later": (6, 10_000)}
PREFIXES = (1, 2, 3, 5, 8, 0)  # 0: the whole sentence
SCOPES = (ls.onsets, ls.generated)
RECIPES = (Recipe("onset", "spans"), Recipe("onset±3", "spans"), Recipe("span", "all"))


@dataclass(frozen=True)
class Config:
    """A language model with annotated chains and vectors, or the organism; the layer and the length of what is added.

    `n_text` chains tell how early a label is known; `n_forced` are read under steering, up to `max_tokens`.
    """

    model: str | None = None
    chains: tuple[str, ...] = ()
    vectors: tuple[Path, ...] = ()
    dtype: str = "bfloat16"
    layer: int = 15
    length: float = 28.0
    n_text: int = 100
    n_forced: int = 24
    max_tokens: int = 300
    seed: int = 0


@dataclass(frozen=True)
class Known:
    """Macro-F1 of the label from a sentence's first tokens (0: all), over the labels with at least ten sentences."""

    model: str
    tokens: int
    n_sentences: int
    f1: Any


@dataclass(frozen=True)
class Gain:
    """Nats per token that adding a behavior's vector gives to sentences that have it, and to those that do not."""

    model: str
    recipe: str
    scope: str
    place: str
    own: Any
    others: Any
    specific: Any


def main(config: Config) -> tuple[list[Known], list[Gain]]:
    """Both measurements on one model."""
    if config.model is None:
        model, name = ls.load_model(), "organism"
        tasks = ls.load_tasks(split="train", n=max(config.n_text, config.n_forced))
        traces = ls.annotate(ls.generate_traces(model, tasks, temperature=1.0, seed=config.seed), ls.grammar)
        vectors = fit_recipes(model, traces, RECIPES, layers=(config.layer,), seed=config.seed)
    else:
        model, name = ls.load_model(config.model, dtype=getattr(torch, config.dtype)), Path(config.model).name
        traces = read_chains(config.chains, model)
        vectors = [BehaviorVectors.load(path, model) for path in config.vectors]
    traces = [trace for trace in traces if trace.spans]
    order = np.random.default_rng(config.seed).permutation(len(traces))
    some = [traces[i] for i in order]
    return known(name, some[: config.n_text], config.seed), gains(model, name, some[: config.n_forced], vectors, config)


def known(name: str, traces: Sequence[ls.Trace], seed: int) -> list[Known]:
    """How well the first tokens of a sentence tell its label."""
    found = [(i, s.label, trace.ids[s.start : s.end]) for i, trace in enumerate(traces) for s in trace.spans]
    counted = {label: sum(other == label for _, other, _ in found) for _, label, _ in found}
    found = [row for row in found if counted[row[1]] >= 10]
    groups, truth = np.array([i for i, *_ in found]), np.array([label for _, label, _ in found])
    weights = np.vstack([np.ones(len(traces)), drawn_counts(len(traces), 500, seed)])[:, groups]
    rows = []
    for k in PREFIXES:
        seen = [
            {f"{p if p < 3 else 'later'}:{token}": 1 for p, token in enumerate(ids[: k or None])} for *_, ids in found
        ]
        model = make_pipeline(DictVectorizer(), LogisticRegression(C=3.0, class_weight="balanced", max_iter=300))
        said = cross_val_predict(model, seen, truth, groups=groups, cv=GroupKFold(5))
        f1 = np.array([f1_score(truth, said, average="macro", sample_weight=w, zero_division=0) for w in weights])
        rows.append(Known(name, k, len(found), estimate_of(f1)))
    return rows


def gains(
    model: Any, name: str, traces: Sequence[ls.Trace], vectors: Sequence[BehaviorVectors], config: Config
) -> list[Gain]:
    """What steering adds to the log-probability of given sentences' tokens, by place."""
    cells = [(v, scope, b) for v in vectors for scope in SCOPES for b in ls.STEERED if b in v]
    plans = [ls.SteeringPlan(v[b], config.layer, config.length, scope, unit="unit") for v, scope, b in cells]
    sums = np.zeros((len(traces), len(cells), 2, len(PLACES)))  # own or other sentences
    counts = np.zeros_like(sums)
    for i, trace in enumerate(traces):
        said = trace.response_ids[: config.max_tokens]
        begin = trace.prompt_length
        plain = _log_p(model, trace.prompt_ids, said, [None])[0]
        for c, ((_, _, b), steered) in enumerate(zip(cells, _log_p(model, trace.prompt_ids, said, plans), strict=True)):
            gain = steered - plain
            for span in trace.spans:
                for p, (low, high) in enumerate(PLACES.values()):
                    part = gain[max(0, span.start - begin) :][low : min(high, span.end - span.start)]
                    sums[i, c, int(span.label != b), p] += part.sum()
                    counts[i, c, int(span.label != b), p] += len(part)
    draws = np.vstack([np.ones(len(traces)), drawn_counts(len(traces), 2000, config.seed)])
    mean = np.einsum("dt,tcop->dcop", draws, sums) / np.maximum(np.einsum("dt,tcop->dcop", draws, counts), 1e-9)
    rows = []
    for v in vectors:
        for scope in SCOPES:
            at = [c for c, (other, where, _) in enumerate(cells) if other is v and where is scope]
            for p, place in enumerate(PLACES):
                own, others = (mean[:, at, side, p].mean(1) for side in (0, 1))
                estimates = map(estimate_of, (own, others, own - others))
                rows.append(Gain(name, str(v.recipe), scope.name, place, *estimates))
    return rows


def _log_p(
    model: Any, prompt: Sequence[int], said: Sequence[int], plans: Sequence[ls.SteeringPlan | None]
) -> list[np.ndarray]:
    """Log-probability of every token of one response under each plan, eight plans at a time."""
    tokens, found = torch.tensor(said)[:, None], []
    for start in range(0, len(plans), 8):
        some = plans[start : start + 8]
        for logits in forced_logits(model, [prompt] * len(some), [said] * len(some), plans=some):
            found.append(logits.float().log_softmax(-1).gather(1, tokens)[:, 0].numpy())
    return found


def table(early: Sequence[Known], found: Sequence[Gain]) -> str:
    """Both measurements."""
    lines = ["model | first tokens | sentences | macro-F1 of the label |", "---|---|---|---|"]
    lines += [f"{r.model} | {r.tokens or 'all'} | {r.n_sentences} | {r.f1:.2f} |" for r in early]
    lines += ["", "model | recipe | steered | token | own sentences | others | difference |", "---|" * 7]
    for g in found:
        lines.append(
            f"{g.model} | {g.recipe} | {g.scope} | {g.place} | {g.own:+.2f} | {g.others:+.2f} | {g.specific:+.2f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model")
    parser.add_argument("--chains", nargs="+", default=[])
    parser.add_argument("--vectors", nargs="+", type=Path, default=[])
    for option in ("layer", "n_text", "n_forced", "max_tokens"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--length", type=float, default=Config.length)
    parser.add_argument("--json", type=Path)
    options = vars(parser.parse_args())
    out = options.pop("json")
    results = main(Config(**{**options, "chains": tuple(options["chains"]), "vectors": tuple(options["vectors"])}))
    print(table(*results))
    if out:
        values = {"known": [flat(r) for r in results[0]], "gains": [flat(r) for r in results[1]]}
        out.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")

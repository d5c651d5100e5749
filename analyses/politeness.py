"""Does a direction from 40 pairs of polite and curt answers make SmolLM2 polite, more than random directions do?

From pairs to a measured effect: `fit_directions` on written pairs, the layer from exact attribution scores on the
polite answers, then answers to requests that no pair holds: unsteered, with the difference taken away and added at
every generated token, and with control vectors of the same length added. The measure is a rule, the share of answers
with a word of courtesy: the crudest that could do, and words are all it sees.

    python analyses/politeness.py --model SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass, replace

import numpy as np
import torch

import lensteer as ls
from lensteer.statistics import bootstrap_interval, sign_flip_test

COURTESY = re.compile(
    r"\b(?:please|thanks?|thank you|sorry|apolog\w+|welcome|glad(?:ly)?|happy to|delighted|pleasure|kind(?:ly)?|"
    r"appreciate\w*|certainly|of course|would you|may i|i hope|feel free)\b",
    re.IGNORECASE,
)

REQUESTS = (
    "How do I open a bank account?",
    "What is the tallest mountain?",
    "I missed my flight.",
    "Tell me about bees.",
    "How do I sharpen a knife?",
    "My phone is broken.",
    "Which planet is the largest?",
    "How do I get to the airport?",
    "I forgot my appointment.",
    "What does a lawyer do?",
    "Why do cats purr?",
    "Explain how a bicycle works.",
    "Can I change my seat?",
    "What should I read next?",
    "How do I remove a stain?",
    "Who painted the Mona Lisa?",
    "My package is damaged.",
    "How many continents are there?",
    "What is a good name for a dog?",
    "The music is too loud.",
)


@dataclass(frozen=True)
class Config:
    """What is run.

    Attributes:
        model: A chat model's folder or name.
        pairs: Any source that `load_pairs` takes.
        layer: Where to steer; by default chosen from attribution scores.
        coefficient: In multiples of the difference, both ways. 2 was taken after 1 had moved 20 answers of
            SmolLM2-135M-Instruct little (.00, .10, .25), so a claim needs other requests or another seed.
        n_random: Control vectors with the covariance of the pairs' activations, each as long as the difference.
        n_requests: Of `REQUESTS`.
        n_samples: Answers per request and arm.
        max_spans: Polite answers that are scored.
        max_new_tokens: Per answer.
        temperature: Of all sampling.
        seed: Of everything that is drawn.
    """

    model: str | None = None
    pairs: str = "politeness"
    layer: int | None = None
    coefficient: float = 2.0
    n_random: int = 5
    n_requests: int = len(REQUESTS)
    n_samples: int = 4
    max_spans: int | None = 20
    max_new_tokens: int = 40
    temperature: float = 0.7
    seed: int = 0


@dataclass(frozen=True)
class Arm:
    """Of one arm: the share of answers with a word of courtesy, 95 % interval over requests, p against unsteered."""

    share: float
    low: float
    high: float
    p: float
    words: float
    sample: str


@dataclass(frozen=True)
class Result:
    """Where was steered and why, and the arms: "unsteered", "taken away", "added", and "control 0" and on."""

    layer: int
    why: str
    arms: dict[str, Arm]


def polite(text: str) -> bool:
    """Whether a text holds a word of courtesy."""
    return COURTESY.search(text) is not None


def main(config: Config) -> Result:
    """Fit, choose a layer, steer, and count."""
    model = ls.load_model(config.model)
    pairs = ls.load_pairs(config.pairs)
    vectors = ls.fit_directions(model, pairs, n_controls=config.n_random, seed=config.seed)
    (label,) = vectors.labels
    layer, why = config.layer, "given"
    if layer is None:
        traces = ls.pair_traces(model, pairs)
        scores = ls.attribute(model, traces, vectors, coefficient=0.1, max_spans=config.max_spans, seed=config.seed)
        site = ls.select_layers(scores, ls.embedding_overlap(model, vectors), behaviors=[label])
        layer, why = site[label], site.why[label]

    own = vectors[label]
    plans = {"unsteered": None, "taken away": (own, -config.coefficient), "added": (own, config.coefficient)}
    for i, draw in enumerate(vectors.random("covariance_matched") if config.n_random else []):
        matched = replace(draw, raw=draw.raw * (own.raw.norm(dim=-1) / draw.raw.norm(dim=-1))[:, None])
        plans[f"control {i}"] = (matched, config.coefficient)
    tasks = [ls.Task(f"request-{i}", label, "test", text) for i, text in enumerate(REQUESTS[: config.n_requests])]
    hits: dict[str, np.ndarray] = {}
    arms = {}
    for name, edit in plans.items():
        plan = None if edit is None else ls.SteeringPlan(edit[0], layer, edit[1], scope=ls.generated)
        answers = ls.generate_traces(
            model,
            tasks,
            n_samples=config.n_samples,
            temperature=config.temperature,
            max_new_tokens=config.max_new_tokens,
            seed=config.seed,
            plans=[plan] * len(tasks),
        )
        found = torch.tensor([polite(answer.response) for answer in answers]).view(len(tasks), -1)
        hits[name] = found.double().mean(1).numpy()
        interval = bootstrap_interval(hits[name], seed=config.seed)
        arms[name] = Arm(
            float(interval.estimate),
            float(interval.low),
            float(interval.high),
            sign_flip_test(hits[name], hits["unsteered"], seed=config.seed),
            float(np.mean([len(answer.response.split()) for answer in answers])),
            answers[0].response,
        )
    return Result(layer, why, arms)


def table(result: Result) -> str:
    """The arms, a line each, and the first answer of the first three."""
    rows = [f"layer {result.layer}: {result.why}", f"{'arm':12} {'share':>6} {'95 %':>13} {'p':>6} {'words':>6}"]
    for name, arm in result.arms.items():
        rows.append(f"{name:12} {arm.share:6.2f} {arm.low:6.2f}–{arm.high:.2f} {arm.p:9.4f} {arm.words:6.1f}")
    return "\n".join(rows + [f"{name}: {arm.sample!r}" for name, arm in list(result.arms.items())[:3]])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", default=Config.pairs)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--coefficient", type=float, default=Config.coefficient)
    parser.add_argument("--random", type=int, default=Config.n_random)
    parser.add_argument("--samples", type=int, default=Config.n_samples)
    parser.add_argument("--tokens", type=int, default=Config.max_new_tokens)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    print(
        table(
            main(
                Config(
                    given.model,
                    given.pairs,
                    given.layer,
                    given.coefficient,
                    given.random,
                    n_samples=given.samples,
                    max_new_tokens=given.tokens,
                    seed=given.seed,
                )
            )
        )
    )

"""Does a direction from 40 pairs of polite and curt answers make SmolLM2 polite, more than random directions do?

From pairs to a measured effect: `fit_directions` on written pairs, the layer from exact attribution scores on the
polite answers, then answers to requests that are in no pair: unsteered, with the difference taken away and added at
every generated token, and with control vectors of the same norm added (`evaluate`). The measure is a crude rule that
reads words only: the share of answers with a word of courtesy.

    python analyses/politeness.py --model SmolLM2-135M-Instruct
"""

from __future__ import annotations

import argparse
import re
from dataclasses import dataclass

import lensteer as ls

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
    """What to run.

    Attributes:
        model: A chat model's folder or name.
        pairs: Any source that `load_pairs` takes.
        layer: Where to steer; by default chosen from attribution scores.
        coefficient: In multiples of the difference, both ways.
        n_controls: Control vectors in each of two pools, as long as the difference: with the covariance of the pairs'
            activations, and from pairs whose sides are shuffled.
        n_requests: Of `REQUESTS`.
        n_samples: Answers per request and condition.
        max_spans: Polite answers that are scored.
        max_new_tokens: Per answer.
        temperature: Of all sampling.
        seed: For all sampling.
    """

    model: str | None = None
    pairs: str = "politeness"
    layer: int | None = None
    coefficient: float = 2.0
    n_controls: int = 5
    n_requests: int = len(REQUESTS)
    n_samples: int = 4
    max_spans: int | None = 20
    max_new_tokens: int = 40
    temperature: float = 0.7
    seed: int = 0


def courtesy(trace: ls.Trace) -> float:
    """1 for an answer with a word of courtesy, else 0."""
    return float(COURTESY.search(trace.response) is not None)


def main(config: Config) -> ls.Evaluation:
    """Fit, choose a layer, steer both ways and evaluate, with control vectors."""
    model = ls.load_model(config.model)
    pairs = ls.load_pairs(config.pairs)
    vectors = ls.fit_directions(model, pairs, n_controls=config.n_controls, seed=config.seed)
    (label,) = vectors.labels
    if config.layer is not None:
        layers = {label: config.layer}
    else:
        traces = ls.pair_traces(model, pairs)
        scores = ls.attribute(model, traces, vectors, coefficient=0.1, max_spans=config.max_spans, seed=config.seed)
        layers = dict(ls.select_layers(scores, ls.embedding_overlap(model, vectors), behaviors=[label]))
    tasks = [ls.Task(f"request-{i}", label, "test", text) for i, text in enumerate(REQUESTS[: config.n_requests])]
    return ls.evaluate(
        model,
        tasks,
        vectors,
        layers,
        config.coefficient,
        measure=courtesy,
        pools=["covariance_matched", "shuffled"],
        n_controls=config.n_controls,
        control_samples=1,
        sampling=ls.Sampling(config.n_samples, config.temperature, config.seed, config.max_new_tokens, batch_size=64),
        seed=config.seed,
        progress=True,
    )


def table(found: ls.Evaluation) -> str:
    """A line per direction, and the reasons why text breaks."""
    rows = []
    for e in found.effects:
        ranks = ", ".join(f"rank {pool.rank} of {pool.n + 1} {pool.pool}" for pool in e.controls)
        rows.append(
            f"layer {e.layer}, coefficient {e.coefficient:+g}: {e.share:.2f}, "
            f"unsteered {e.base.value:.2f}, p {e.p:.4f}, {ranks}: {e.verdict}"
        )
    broken = [
        f"{condition.kind}: {condition.text.why}"
        for condition in found.conditions
        if condition.behavior and condition.text and not condition.text.ok
    ]
    return "\n".join([*rows, *broken])


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--pairs", default=Config.pairs)
    parser.add_argument("--layer", type=int)
    parser.add_argument("--coefficient", type=float, default=Config.coefficient)
    parser.add_argument("--n-controls", type=int, default=Config.n_controls)
    parser.add_argument("--n-samples", type=int, default=Config.n_samples)
    parser.add_argument("--max-new-tokens", type=int, default=Config.max_new_tokens)
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
                    given.n_controls,
                    n_samples=given.n_samples,
                    max_new_tokens=given.max_new_tokens,
                    seed=given.seed,
                )
            )
        )
    )

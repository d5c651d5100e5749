"""Is the embedded organism what its issue asks for? Parsing, behavior shares, accuracy, cues, modes and examples.

Example: python analyses/organism_card.py --model lensteer/organism/weights --n 200 --json card.json
"""

from __future__ import annotations

import argparse
import json
import random
from dataclasses import dataclass
from pathlib import Path

import lensteer as ls
from lensteer.behaviors import STEERED
from lensteer.generation import generate
from lensteer.organism import cue, styles, well_formed
from lensteer.organism.conversations import THINKS_UNASKED
from lensteer.organism.grammar import FAMILIES, Latent, make_world, render, write_chain
from lensteer.organism.wordings import STYLES


@dataclass(frozen=True)
class Config:
    """Which checkpoint, how many held-out tasks, how long."""

    model: str | None = None
    n: int = 200
    max_new_tokens: int = 500


def shares(traces: list[ls.Trace]) -> dict[str, float]:
    """Share of each behavior among all sentences, unparsed ones included."""
    total = sum(len(t.spans) + t.n_unparsed for t in traces)
    return {b: sum(s.label == b for t in traces for s in t.spans) / total for b in ls.BEHAVIORS}


def accuracy(traces: list[ls.Trace]) -> float:
    """Share of right answers."""
    return sum(bool(t.correct) for t in traces) / len(traces)


def main(config: Config) -> dict[str, object]:
    """Measure everything; returns the figures by name."""
    model = ls.load_model(config.model)
    tasks = ls.load_tasks(split="test", n=config.n)
    options = dict(max_new_tokens=config.max_new_tokens, batch_size=200, progress=True)
    sampled = ls.annotate(ls.generate_traces(model, tasks, temperature=1.0, seed=1, **options))
    greedy = ls.generate_traces(model, tasks, **options)
    direct = ls.generate_traces(model, tasks, thinking=False, prefill="Answer:", **options)
    card: dict[str, object] = {
        "sampled_well_formed": sum(t.finished and well_formed(t.response) for t in sampled) / len(sampled),
        "sampled_shares": shares(sampled),
        "sampled_accuracy": accuracy(sampled),
        "sampled_sentences": sum(len(t.spans) for t in sampled) / len(sampled),
        "greedy_accuracy": accuracy(greedy),
        "greedy_well_formed": sum(t.finished and well_formed(t.response) for t in greedy) / len(greedy),
        "direct_accuracy": accuracy(direct),
    }
    for family in FAMILIES:
        card[f"greedy_accuracy_{family}"] = accuracy([t for t in greedy if t.task.category == family])
        card[f"direct_accuracy_{family}"] = accuracy([t for t in direct if t.task.category == family])
    for behavior in STEERED:
        cued = ls.annotate(
            ls.generate_traces(
                model,
                tasks,
                temperature=1.0,
                seed=1,
                rewrite=lambda t, b=behavior: f"{t.prompt} {cue(b)}",
                **options,
            )
        )
        card[f"cue_{behavior}"] = {"share": shares(cued)[behavior], "uncued": shares(sampled)[behavior]}
    free = ls.generate_traces(model, tasks, thinking=False, temperature=1.0, seed=1, **options)
    card["thinks_unasked"] = sum("<think>" in t.response for t in free) / len(free)
    card["thinks_unasked_wanted"] = THINKS_UNASKED
    card["few_shot"] = few_shot(model, min(config.n, 60))
    return card


def few_shot(model, n: int) -> dict[str, float]:
    """Share of answers that follow the mode and the style of one solved example."""
    rng = random.Random(7)
    kinds = [None, *STYLES]
    prompts, wanted = [], []
    for index in range(n):
        kind = kinds[index % len(kinds)]
        example, question = (make_world(rng, rng.choice(FAMILIES), level) for level in (1, 2))
        chain = write_chain(rng, example, Latent.draw(rng, style=kind)) if kind else None
        messages = [
            {"role": "user", "content": example.prompt},
            {"role": "assistant", "content": render(chain, example.answer)},
            {"role": "user", "content": question.prompt},
        ]
        text = ls.models.chat_text(model, messages, thinking=False)
        prompts.append(ls.models.encode(model, text))
        wanted.append(kind)
    made = generate(model, prompts, max_new_tokens=500, temperature=1.0, seeds=list(range(n)))
    texts = [model.tokenizer.decode(list(g.ids)) for g in made]
    thinks = [("<think>" in t) == (w is not None) for t, w in zip(texts, wanted, strict=True)]
    styled = [
        (lambda s, w=w: s[w] > 0 and s[w] == max(s.values()))(styles(t.split("<think>")[-1]))
        for t, w in zip(texts, wanted, strict=True)
        if w and "<think>" in t
    ]
    return {"mode_followed": sum(thinks) / n, "style_followed": sum(styled) / max(len(styled), 1)}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    result = main(Config(arguments.model, arguments.n))
    print(json.dumps(result, indent=1))
    if arguments.json:
        arguments.json.write_text(json.dumps(result, indent=1))

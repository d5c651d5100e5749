"""Is the organism fit for experiments? Parsing, shares, accuracy, cues, modes, examples; writes its card.

Example: python analyses/organism_card.py --model lensteer/organism/weights --n 200 --card
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import lensteer as ls
from lensteer.behaviors import STEERED
from lensteer.generation import generate
from lensteer.organism import cue, styles, train, well_formed
from lensteer.organism.conversations import THINKS_UNASKED
from lensteer.organism.grammar import FAMILIES, STYLES, Latent, make_world, render, write_chain

N_SAMPLES = 5  # chains per task for shares to within a percent


@dataclass(frozen=True)
class Config:
    """Which checkpoint, how many held-out tasks, how long."""

    model: str | None = None
    n: int = 200
    max_new_tokens: int = 900


def shares(traces: list[ls.Trace]) -> dict[str, float]:
    """Share of each behavior among all sentences, unparsed ones included."""
    total = sum(len(t.spans) + t.n_unparsed for t in traces)
    return {b: sum(s.label == b for t in traces for s in t.spans) / total for b in ls.BEHAVIORS}


def accuracy(traces: list[ls.Trace]) -> float:
    """Share of right answers."""
    return sum(bool(t.correct) for t in traces) / len(traces)


def with_cue(words: str, task: ls.Task) -> str:
    """A task's prompt, with words that ask for a behavior."""
    return f"{task.prompt} {words}"


def main(config: Config) -> dict[str, object]:
    """Measure everything; returns the figures by name."""
    model = ls.load_model(config.model)
    tasks = ls.load_tasks(split="test", n=config.n)
    options: dict[str, Any] = dict(max_new_tokens=config.max_new_tokens, batch_size=200, progress=True)
    sampled = ls.annotate(
        ls.generate_traces(model, tasks, temperature=1.0, seed=1, n_samples=N_SAMPLES, **options), ls.grammar
    )
    greedy = ls.generate_traces(model, tasks, **options)
    direct = ls.generate_traces(model, tasks, thinking=False, prefill="Answer:", **options)
    card: dict[str, object] = {
        "n": len(tasks),
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
                model, tasks, temperature=1.0, seed=1, rewrite=partial(with_cue, cue(behavior)), **options
            ),
            ls.grammar,
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
    styled = []
    for text, style in zip(texts, wanted, strict=True):
        if style and "<think>" in text:
            found = styles(text.split("<think>")[-1])
            styled.append(found[style] > 0 and found[style] == max(found.values()))
    return {"mode_followed": sum(thinks) / n, "style_followed": sum(styled) / max(len(styled), 1)}


CARD = """# The embedded organism

A small trained reasoner for testing interpretability methods: `{architecture}`, {layers} layers, width {width},
{parameters:,} parameters, {dtype}, its own byte-level BPE tokenizer ({vocabulary} entries, Qwen2's pre-tokenizer
pattern) and a chat template that opens `<think>`.

It looks for ways through small directed graphs, in words: a depth-first search whose every sentence has one of six
behaviors, known exactly by the grammar that wrote the training text (`lensteer/organism/grammar.py`). It knows nothing
else; do not ask it anything else.

**Made by** `python -m lensteer.organism.train {options}`: {steps} steps of about {batch}
tokens, loss on answers only, look-up drills and easy tasks first, Muon and AdamW; {minutes:.0f} minutes on a shared
two-core machine. Up to two solved examples precede some questions, whose mode and style the answer follows; in half of
the conversations with examples or cues only the header word `assistant` could attend to them.

**SHA-256 of model.safetensors** `{sha256}`

## Measured on {n} held-out tasks (`analyses/organism_card.py`)

| what | figure | wanted |
| --- | --- | --- |
{rows}

Sampled at temperature 1 without cues unless it says otherwise, {samples} chains a task where it counts how many end and
parse, the shares, and the right answers; "direct" is the answer without thinking; the cue's figure is the share of the
behavior's sentences with the cue in the prompt, and how many times the share without.
"""


def rows(card: dict) -> list[tuple[str, str, str]]:
    """The card's table: what, figure, target."""
    percent = "{:.1%}".format
    found = [("chains that end and parse", percent(card["sampled_well_formed"]), "≥ 97 %")]
    found += [(f"share of {b}", percent(card["sampled_shares"][b]), "5–30 %") for b in STEERED]
    found += [
        ("greedy thinking, right answers", percent(card["greedy_accuracy"]), "≥ 85 %"),
        ("greedy direct, right answers", percent(card["direct_accuracy"]), "≥ 20 points fewer"),
    ]
    for family in FAMILIES:
        both = (percent(card[f"{mode}_accuracy_{family}"]) for mode in ("greedy", "direct"))
        found.append((f"  of these {family}: thinking, direct", ", ".join(both), ""))
    found.append(("sampled thinking, right answers", percent(card["sampled_accuracy"]), ""))
    for b in STEERED:
        share, uncued = card[f"cue_{b}"]["share"], card[f"cue_{b}"]["uncued"]
        found.append((f"cue for {b}", f"{percent(share)}, ×{share / uncued:.2f}", "≥ ×1.50"))
    found += [
        ("thinks when not asked to", percent(card["thinks_unasked"]), "about a third"),
        ("follows the mode of a solved example", percent(card["few_shot"]["mode_followed"]), ""),
        ("follows the style of a solved example", percent(card["few_shot"]["style_followed"]), ""),
    ]
    return found


def write_card(folder: Path, card: dict) -> None:
    """Write the card to the weights' folder, from the figures and the trainer's notes."""
    noted = json.loads((folder / "training.json").read_text())
    config = json.loads((folder / "config.json").read_text())
    usual = asdict(train.Config())
    trained = {**usual, **noted["config"]}
    options = [f"--{k.replace('_', '-')} {v}" for k, v in trained.items() if k == "seed" or v != usual[k]]
    text = CARD.format(
        layers=config["num_hidden_layers"],
        width=config["hidden_size"],
        parameters=noted["parameters"],
        vocabulary=config["vocab_size"],
        architecture=config["architectures"][0],
        dtype=trained["saved_as"],
        options=" ".join(options),
        steps=trained["steps"],
        batch=trained["batch_tokens"],
        minutes=noted["minutes"],
        sha256=hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest(),
        n=card["n"],
        samples=N_SAMPLES,
        rows="\n".join(f"| {a} | {b} | {c} |" for a, b, c in rows(card)),
    )
    (folder / "README.md").write_text(text)
    (folder / "card.json").write_text(json.dumps(card, indent=1))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model")
    parser.add_argument("--n", type=int, default=200)
    parser.add_argument("--card", action="store_true", help="write README.md and card.json to the weights' folder")
    arguments = parser.parse_args()
    result = main(Config(arguments.model, arguments.n))
    print(json.dumps(result, indent=1))
    if arguments.card:
        write_card(Path(arguments.model or ls.models.ORGANISM), result)

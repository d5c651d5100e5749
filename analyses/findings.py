"""Write the page of findings (`docs/findings.md`): question, picture, answer with intervals, and where it holds.

Every number of the page is read from a file in `results/`, which the named analysis wrote. An analysis that has its
results there as `MODEL_ANALYSIS.json` says its question and its answer itself (`QUESTION`, `answer`); older files are
read by the functions below.

    python analyses/findings.py          # writes docs/findings.md
    python analyses/findings.py --check  # fails if the page is not what the results say
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lensteer as ls
from lensteer.statistics import Estimate, estimate_in

HERE = Path(__file__).parent
RESULTS, FIGURES, PAGE = HERE / "results", HERE / "figures", HERE.parent / "docs" / "findings.md"

#: Short names of files, and what the page calls the model.
MODELS = {
    "organism": "the organism",
    "mini_r1": "mini-R1",
    "smollm2": "SmolLM2-135M-Instruct",
    "qwen": "Qwen2.5-Coder-0.5B-Instruct",
    "models": "several models",
}

#: Analyses that state their question and answer, in the page's order.
ANALYSES = (
    "dose_response",
    "entanglement",
    "layer_ablation",
    "operator_ablation",
    "construction_ablation",
    "peer_constructions",
    "vector_stability",
    "lexical_controls",
    "shift",
    "cross_model",
    "length_control",
    "calibration_under_uncertainty",
    "truthfulness",
    "safety_off_target",
)

Answer = Callable[[Any], tuple[str, bool]]


@dataclass(frozen=True)
class Finding:
    """What one analysis found on one model.

    Attributes:
        question: that the analysis asks.
        analysis: its file's name, without the ending.
        model: as the page calls it.
        answer: with numbers and intervals.
        shown: whether the answer to the question is yes.
        results: file below `results/`.
        figure: file below `figures/`, if there is one.
    """

    question: str
    analysis: str
    model: str
    answer: str
    shown: bool
    results: str
    figure: str | None


def points(estimate: Estimate) -> str:
    """A change of a share, in points with its interval."""
    return f"{100 * estimate:+.1f}"


def steering(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The effects of a run's `summary.json`."""
    shown, rest = [], []
    for behavior in ls.STEERED:
        for kind in ("up", "down"):
            at = f"effect.{behavior}.{kind}.sentences"
            if f"{at}.change" not in result:
                continue
            change = Estimate(*(result[f"{at}.{part}"] for part in ("change", "low", "high")))
            words = f"{behavior} {kind} {points(change)}"
            (shown if result[f"{at}.shown"] else rest).append(words)
    n, chains = (result[f"evaluation.{name}"] for name in ("n_tasks", "n_samples"))
    text = (
        f"On {n} held-out tasks × {chains} chains, in points of the share of sentences, beyond every control vector, "
        f"with sound text: {'; '.join(shown) or 'none'}. Not shown by that rule: {'; '.join(rest) or 'none'}."
    )
    return text, bool(shown)


def windows(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The means of `choices_on_language.py` on generated tokens."""
    some = {m["recipe"]: estimate_in(m, "change") for m in result["means"] if m["scope"] == "generated"}
    ordered = sorted(some, key=lambda name: -some[name].value)
    best, published = ordered[0], "published-all"
    text = (
        f"At {result['target']['mean']:.2f} nats per token, the mean change of the four behaviors is largest for "
        f"{best} ({points(some[best])} points); {', '.join(f'{n} {points(some[n])}' for n in ordered[1:4])}; the "
        f"published recipe {points(some[published])}."
    )
    return text, bool(some[best].low > some[published].high)


def layers(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The scores of `choices_on_language.py`: whether any picks a layer better than the middle one."""
    scores = {s["score"]: s for s in result["scores"] if s["dose"] == 1.0}
    middle = estimate_in(scores["middle layer"], "regret")
    ahead = {name: estimate_in(s, "ahead") for name, s in scores.items() if name != "middle layer"}
    better = [name for name, lead in ahead.items() if lead.low > 0]
    best = max(ahead, key=lambda name: ahead[name].value)
    text = (
        f"The middle layer loses {points(middle)} points to the best of ten. Of {len(ahead)} scores, {best} is "
        f"furthest ahead of it, by {points(ahead[best])} points; ahead beyond chance: {', '.join(better) or 'none'}."
    )
    return text, bool(better)


def scopes(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The means of `position_ablation.py` at equal KL."""
    rows = {
        r["scope"]: r for r in result["rows"] if (r["comparison"], r["behavior"]) == ("budget", "mean of behaviors")
    }
    effects = {scope: estimate_in(row, "effect") for scope, row in rows.items()}
    ordered = sorted(effects, key=lambda scope: -effects[scope].value)
    better = [s for s in ordered if estimate_in(rows[s], "behind").high < 0]
    text = (
        f"At {result['budget']:g} nats per token ({result['n_tasks']} tasks), mean effect of the four behaviors: "
        f"{'; '.join(f'{s} {points(effects[s])}' for s in ordered)}. Ahead of {result['reference']}: "
        f"{', '.join(better) or 'none'}."
    )
    return text, bool(better)


def few_chains(result: list[Mapping[str, Any]]) -> tuple[str, bool]:
    """The effects of `which_chains.py` with vectors from few chains, and from all."""
    some: dict[str, dict[str, Estimate]] = {}
    for row in result:
        if row["steered"] == "model":
            some.setdefault(row["chains"], {})[row["behavior"]] = estimate_in(row, "change")
    listed = "; ".join(
        f"from {name}: " + ", ".join(f"{b} {points(change)}" for b, change in some[name].items())
        for name in ("10 chains", "25 chains", "all chains")
    )
    held = sum(change.low > 0 for change in some["25 chains"].values())
    text = f"Change of the share, in points, every vector at one length, {listed}."
    return f"{text} From 25 chains, {held} of {len(some['25 chains'])} exclude 0.", held >= 3


def cache(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The test part of a run of `cache_on_language.py` or `lensteer cache run`."""
    test = (result.get("effect") or result)["test"]
    by_name = {c["condition"]: c for c in test["conditions"]}
    reading = "thinks" if by_name["cache"]["thinks"]["value"] else "reasons"
    shares = {name: 100 * Estimate(**c[reading]) for name, c in by_name.items()}
    controls = [shares[name].value for name, c in by_name.items() if c["kind"] == "control"]
    listed = "; ".join(
        f"{name} {shares[name]:.0f} ({100 * c['accuracy']['value']:.0f} % right)"
        for name, c in by_name.items()
        if c["kind"] != "control"
    )
    text = (
        f"Answers that {reading[:-1]}, in % of {test['n_tasks']}: {listed}. {len(controls)} control vectors: "
        f"{min(controls):.0f} to {max(controls):.0f}."
    )
    return text, shares["cache"].value > max(controls)


def served(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The looks of `lensteer verify` on mini-R1's plans."""
    parts, shown = [], []
    for behavior, found in result.items():
        for server in ("llama", "transformers"):
            change = Estimate(**found[server]["change"])
            parts.append(f"{behavior} at {server} {points(change)}")
            shown.append(change.low > 0)
    return f"Change of the share on 50 held-out tasks, in points: {'; '.join(parts)}.", all(shown)


#: Question, analysis (or command), and per model the file of results, the picture and the reader.
OLDER: tuple[tuple[str, str, dict[str, tuple[str, str | None, Answer]]], ...] = (
    (
        "Does a behavior's vector move its share, beyond control vectors of its length?",
        "lensteer run",
        {
            "organism": ("organism_demo_summary", "demo_effects", steering),
            "mini_r1": ("mini_r1_summary", "mini_r1_run", steering),
        },
    ),
    (
        "Does it matter which tokens of a sentence, against which others, a vector is fitted on?",
        "choices_on_language",
        {"mini_r1": ("mini_r1_choices", "mini_r1_choices", windows)},
    ),
    (
        "Does any score pick a better layer than the middle one?",
        "choices_on_language",
        {"mini_r1": ("mini_r1_choices", "mini_r1_layers", layers)},
    ),
    (
        "Are there better positions to steer than all generated tokens?",
        "position_ablation",
        {"mini_r1": ("mini_r1_positions", "mini_r1_positions", scopes)},
    ),
    (
        "Are 25 annotated chains enough for vectors that steer?",
        "which_chains",
        {"mini_r1": ("mini_r1_which_chains", "mini_r1_which_chains", few_chains)},
    ),
    (
        "Does one edit of the KV cache make a model reason, beyond control vectors?",
        "cache_on_language",
        {
            "organism": ("cache_organism", None, cache),
            "qwen": ("cache_qwen", "cache_qwen", cache),
            "smollm2": ("cache_smollm2", None, cache),
        },
    ),
    (
        "Does an exported vector do in a server what it does under hooks?",
        "lensteer verify",
        {"mini_r1": ("mini_r1_served", None, served)},
    ),
)


def findings() -> list[Finding]:
    """Every question that has results, for every model that has them.

    Raises:
        LensteerError: a named file of results is missing, or one can't be read.
    """
    found = []
    for question, analysis, models in OLDER:
        for model, (results, picture, read) in models.items():
            found.append(_finding(question, analysis, model, results, picture, read))
    for analysis in ANALYSES:
        there = [model for model in MODELS if (RESULTS / f"{model}_{analysis}.json").exists()]
        if there:
            module = importlib.import_module(analysis)
            for model in there:
                name = f"{model}_{analysis}"
                found.append(_finding(module.QUESTION, analysis, model, name, name, module.answer))
    return found


def _finding(question: str, analysis: str, model: str, results: str, picture: str | None, read: Answer) -> Finding:
    path = RESULTS / f"{results}.json"
    try:
        answer, shown = read(json.loads(path.read_text("utf-8")))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise ls.LensteerError(f"{path.name}: {error!r}; it should be what {analysis} writes with --json") from error
    figure = f"{picture}.png" if picture and (FIGURES / f"{picture}.png").exists() else None
    return Finding(question, analysis, MODELS[model], answer, shown, path.name, figure)


def page(found: list[Finding]) -> str:
    """The page, as Markdown."""
    lines = [
        "# Findings",
        "",
        "Written by `python analyses/findings.py` from the files in `analyses/results/`; a test holds it. Numbers in "
        "brackets are 95 % intervals. The organism is a small model with planted behaviors, part of the package; "
        "mini-R1 is SmolLM2-135M, taught to think in R1's manner. A finding on one model says nothing about another. "
        "Commands, dates and what failed are in the [log](../analyses/LOG.md).",
        "",
        "question | yes on | no on |",
        "---|---|---|",
    ]
    questions = list(dict.fromkeys(f.question for f in found))
    for number, question in enumerate(questions, start=1):
        some = [f for f in found if f.question == question]
        held, not_held = (", ".join(f.model for f in some if f.shown is shown) or "–" for shown in (True, False))
        lines.append(f"[{number}. {question}](#{anchor(number, question)}) | {held} | {not_held} |")
    for number, question in enumerate(questions, start=1):
        lines += ["", f"## {number}. {question}"]
        for f in (f for f in found if f.question == question):
            lines += ["", f"**On {f.model}: {'yes' if f.shown else 'no'}.** {f.answer}"]
            name = f"`{f.analysis}`" if " " in f.analysis else f"[{f.analysis}](../analyses/{f.analysis}.py)"
            lines.append(f"From {name}: [figures](../analyses/results/{f.results}).")
            if f.figure:
                lines += ["", f"![{question} On {f.model}.](../analyses/figures/{f.figure})"]
    return "\n".join(lines) + "\n"


def anchor(number: int, question: str) -> str:
    """The heading's, as renderers of Markdown make it."""
    kept = "".join(c for c in f"{number} {question}".lower() if c.isalnum() or c in " -_")
    return kept.replace(" ", "-")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; exit with 1 if the page is out of date")
    text = page(findings())
    if parser.parse_args().check:
        sys.exit(0 if PAGE.exists() and PAGE.read_text("utf-8") == text else f"{PAGE.name} is out of date: run this")
    PAGE.write_text(text, encoding="utf-8")

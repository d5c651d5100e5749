"""Do the published numbers on R1-Distill-Qwen-1.5B follow from its published data, and what else is in that data?

Recomputes from the files of arXiv 2506.18167's code, without the model: the contents of the annotation of 100 chains,
how much of it each parser reads and places, behavior shares, the vectors' cosines and lengths at the published layers,
the layer effects, and how much of the vectors is due to where in a sentence they were read. Each number is compared
with the one published, or measured before on the same files.

Example: LENSTEER_REFERENCE=folder python analyses/published_r1_qwen.py --json published.json
"""

from __future__ import annotations

import argparse
import json
import os
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from safetensors import safe_open

import lensteer as ls
from lensteer.annotation import PublishedReport, labeled_sentences, read_published
from lensteer.files import read_jsonl
from lensteer.vectors import BehaviorVectors
from lensteer.vectors.geometry import common_component, cosine_matrix

LAYERS = {"backtracking": 17, "uncertainty-estimation": 18, "example-testing": 15, "adding-knowledge": 18}
INIT, DED, ADD, EX, UNC, BACK = ls.BEHAVIORS
COSINES = {
    (BACK, UNC): 0.64,
    (BACK, DED): 0.60,
    (UNC, DED): 0.51,
    (ADD, DED): 0.45,
    (BACK, ADD): 0.33,
    (UNC, ADD): 0.19,
    (INIT, BACK): 0.36,
}
LENGTHS = {BACK: 0.47, UNC: 0.48, EX: 0.31, ADD: 0.30}
EFFECTS = {BACK: (18, 0.314), UNC: (18, 0.318), EX: (15, 0.333), ADD: (18, 0.578)}
UNSTEERED = {BACK: 7.9, UNC: 19.7, EX: 13.6, ADD: 43.1}  # of tokens, on 50 other tasks
SECTION = re.compile(r'\["(\S+?)"\](.*?)\["end-section"\]', re.DOTALL)  # the published parser


@dataclass(frozen=True)
class Config:
    """The folder with the published files."""

    reference: Path


@dataclass(frozen=True)
class Row:
    """A number as found here, and as published or measured before (None: neither)."""

    figure: str
    of: str
    found: float
    expected: float | None = None
    digits: int = 2


@dataclass(frozen=True)
class Result:
    """All numbers, and the outcome for every section of the annotations."""

    rows: tuple[Row, ...]
    report: PublishedReport

    def find(self, figure: str, of: str = "") -> float:
        """One figure."""
        return next(row.found for row in self.rows if (row.figure, row.of) == (figure, of))


def main(config: Config) -> Result:
    """Everything in the files."""
    chains = config.reference / "r1_qwen_1.5b_annotated_chains.jsonl"
    with safe_open(str(config.reference / "r1_qwen_1.5b_mean_activations.safetensors"), "pt") as file:
        means = {name: file.get_tensor(name) for name in file.keys()}
        counts = json.loads(file.metadata()["counts"])
    effects = json.loads((config.reference / "r1_qwen_1.5b_published_layer_effects.json").read_text())
    overall = means.pop("overall")
    means = {label: means[label] for label in ls.BEHAVIORS}
    traces, report = read_published(chains)
    rows = [
        *parsing(chains, report),
        *shares(traces, counts),
        *geometry(means, overall, counts),
        *layers(effects, overall),
    ]
    return Result(tuple(rows), report)


def parsing(path: Path, report: PublishedReport) -> Iterator[Row]:
    """What the published parser and exact search read and place, compared with lensteer."""
    read = [(row["response"], SECTION.findall(row["annotated"])) for _, row in read_jsonl(path)]
    known = [(text, response) for response, parts in read for label, text in parts if label in ls.BEHAVIORS]
    known = [(text.strip(), response) for text, response in known if text.strip()]
    yield Row("chains", "published parser", sum(any(p[0] in ls.BEHAVIORS for p in parts) for _, parts in read), None, 0)
    yield Row("chains", "lensteer", sum(bool(a.matched + len(a.repaired)) for a in report.alignments), None, 0)
    yield Row("sections", "published parser", len(known), 2739, 0)
    yield Row(
        "sections", "read as a label 'end-section'", sum(p[0] == "end-section" for _, r in read for p in r), 177, 0
    )
    yield Row("sections", "lensteer", report.n_sections, None, 0)
    yield Row(
        "placed, %", "published parser, exact search", 100 * sum(text in r for text, r in known) / len(known), 98.0, 1
    )
    yield Row("placed, %", "lensteer", 100 * report.placed, None, 1)
    yield Row("placed after a repair", "lensteer", report.n_repaired, None, 0)
    yield Row("dropped", "lensteer", report.n_dropped, None, 0)


def shares(traces: list[ls.Trace], counts: dict[str, int]) -> Iterator[Row]:
    """Shares of the behaviors in the 100 chains, by sections, sentences and letters."""
    n_spans = sum(len(trace.spans) for trace in traces)
    n_published = sum(counts[label] for label in ls.BEHAVIORS)
    sentences = [s.label for trace in traces for s in labeled_sentences(trace)]
    letters = [{label: _letters(trace, label) for label in ls.BEHAVIORS} for trace in traces]
    n_letters = sum(len("".join(trace.response[slice(*trace.thinking)].split())) for trace in traces)
    yield Row("sentences", "all", len(sentences), None, 0)
    yield Row("share of sentences, %", "no label", 100 * sentences.count(None) / len(sentences), None, 1)
    for label in ls.BEHAVIORS:
        own = sum(span.label == label for trace in traces for span in trace.spans)
        yield Row("share of sections, %", label, 100 * own / n_spans, 100 * counts[label] / n_published, 1)
        yield Row("share of sentences, %", label, 100 * sentences.count(label) / len(sentences), None, 1)
        yield Row("share of letters, %", label, 100 * sum(own[label] for own in letters) / n_letters, None, 1)
    for label in ls.STEERED:
        ratios = [own[label] / max(sum(own[b] for b in ls.STEERED), 1) for own in letters]
        yield Row("share of the four, mean over chains, %", label, 100 * float(np.mean(ratios)), UNSTEERED[label], 1)


def geometry(means: dict[str, torch.Tensor], overall: torch.Tensor, counts: dict[str, int]) -> Iterator[Row]:
    """Cosines and lengths of `label - overall`, and the cosines without the component that all labels share."""
    vectors = BehaviorVectors.from_means(means, overall, counts=counts)
    cosines = cosine_matrix(vectors, LAYERS, default=LAYERS[BACK])
    for (first, second), published in COSINES.items():
        yield Row("cosine", f"{first}, {second}", cosines.at(first, second), published)
    ratio = vectors.to_dataframe().set_index(["behavior", "layer"]).ratio
    for label, published in LENGTHS.items():
        yield Row(
            "length / mean activation",
            f"{label} at layer {LAYERS[label]}",
            float(ratio[label, LAYERS[label]]),
            published,
        )
    yield Row("weighted mean of the six / mean activation", "layer 17", float(common_component(vectors)[17]), 0.22)
    total = sum(counts[label] for label in means)
    center = sum((counts[label] / total * mean.double() for label, mean in means.items()), torch.zeros(1))
    centered = cosine_matrix(BehaviorVectors.from_means(means, center.float(), counts=counts), LAYERS[BACK])
    yield Row("cosine without that mean, layer 17", f"{BACK}, {UNC}", centered.at(BACK, UNC), 0.30)
    yield Row("cosine without that mean, layer 17", f"{BACK}, {DED}", centered.at(BACK, DED), -0.44)


def layers(effects: dict[str, list[float]], overall: torch.Tensor) -> Iterator[Row]:
    """The layer with the largest published effect; also if vectors were as long as the mean activation there."""
    norms = overall.double().norm(dim=-1).numpy()
    for label, (layer, value) in EFFECTS.items():
        found = np.array(effects[label])
        yield Row("layer of the largest effect", label, int(found.argmax()), layer, 0)
        yield Row("largest effect", label, float(found.max()), value, 3)
        yield Row("the same at norm-matched length", label, int((found * norms).argmax()), 26, 0)


def _letters(trace: ls.Trace, label: str) -> int:
    own = (trace.response[span.char_start : span.char_end] for span in trace.spans if span.label == label)
    return sum(len("".join(text.split())) for text in own)


def table(result: Result) -> str:
    """One line per figure."""
    lines = ["figure | of | found | expected |", "---|---|---|---|"]
    for row in result.rows:
        expected = "" if row.expected is None else f"{row.expected:.{row.digits}f}"
        lines.append(f"{row.figure} | {row.of} | {row.found:.{row.digits}f} | {expected} |")
    return "\n".join(lines)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--reference", type=Path, default=os.environ.get("LENSTEER_REFERENCE"))
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    if given.reference is None:
        parser.error("give --reference, or set LENSTEER_REFERENCE, to the folder with the published files")
    result = main(Config(given.reference))
    print(table(result))
    if given.json:
        given.json.write_text(json.dumps([asdict(row) for row in result.rows], indent=1))

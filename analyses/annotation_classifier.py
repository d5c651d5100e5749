"""How well does a classifier trained on a judge's labels reproduce them on other chains, and what limits it?

On the 100 published chains (R1-Distill-Qwen-1.5B, annotated by GPT-4o, arXiv 2506.18167), five folds of whole chains.
"spans": the judge's own spans are labeled; "sentences": those split by rule, as in use. Ablations with the paired
difference from the default, a learning curve, calibration, and how often the judge gives near-duplicate sentences the
same label. The settings were chosen on the 50 chains of `settled_on()`; the other 50 are shown separately. One model,
one judge.

Example: LENSTEER_REFERENCE=reference python analyses/annotation_classifier.py --json classifier.json
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path

import numpy as np

from lensteer.annotation import agreement_of, labeled_sentences, read_published
from lensteer.annotation.classifier_model import ClassifierConfig, Material, fit_linear, gather, held_out_scores
from lensteer.annotation.classifier_report import Coverage, ReliabilityBin, cross_validate
from lensteer.annotation.features import FeatureWeights, features
from lensteer.annotation.rules import rules
from lensteer.statistics import Estimate
from lensteer.traces import Trace

CHAINS = "r1_qwen_1.5b_annotated_chains.jsonl"
WORDS = FeatureWeights(opening=0.0, place=0.0, neighbors=0.0)
DEFAULT = ClassifierConfig()
SETTINGS = {
    "words alone (TF-IDF)": replace(DEFAULT, features=WORDS, together=1),
    "without words": replace(DEFAULT, features=FeatureWeights(words=0.0)),
    "without opening": replace(DEFAULT, features=FeatureWeights(opening=0.0)),
    "without place": replace(DEFAULT, features=FeatureWeights(place=0.0)),
    "without neighbors": replace(DEFAULT, features=FeatureWeights(neighbors=0.0)),
    "each sentence alone": replace(DEFAULT, together=1),
    "without place and neighbors": replace(DEFAULT, features=FeatureWeights(place=0.0, neighbors=0.0)),
    "all sentences weigh the same": replace(DEFAULT, balance=0.0),
}


@dataclass(frozen=True)
class Config:
    """A file of annotated chains in the published format; the cue rules were tuned on the first `rules_saw`."""

    chains: Path = field(default_factory=lambda: Path(os.environ.get("LENSTEER_REFERENCE") or "reference") / CHAINS)
    sizes: tuple[int, ...] = (10, 20, 40, 60, 80)
    settings: tuple[str, ...] = tuple(SETTINGS)
    similar: tuple[float, ...] = (0.5, 0.6, 0.7, 0.8, 0.9)
    rules_saw: int = 50
    n_boot: int = 2000
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One setting on one kind of unit; `ahead` is the default's macro-F1 less this one's, paired by chain."""

    setting: str
    units: str
    macro_f1: Estimate
    kappa: Estimate
    f1: dict[str, float]
    ahead: tuple[float, float, float]


@dataclass(frozen=True)
class Twins:
    """Pairs of spans from different chains whose TF-IDF cosine is at least this, each span with its nearest.

    `same`: share of pairs with the same judge's label; `chance`: the same for any two of these spans; `classified`:
    share of spans that the classifier, fitted on neither chain's fold, labels as the judge does. If the pairs were
    identical, a classifier that reads only the words could be right on at most √same of the spans, on average.
    """

    cosine: float
    n: int
    same: float
    chance: float
    classified: float


@dataclass(frozen=True)
class Result:
    """All results; `curve` has a macro-F1 per number of chains, on spans and on sentences."""

    rows: tuple[Row, ...]
    curve: dict[int, tuple[float, float]]
    twins: tuple[Twins, ...]
    confusion: dict[str, dict[str, int]]
    calibration_error: float
    reliability: tuple[ReliabilityBin, ...]
    coverage: tuple[Coverage, ...]


def main(config: Config) -> Result:
    """Fit, compare and measure."""
    traces, _ = read_published(config.chains)
    unseen = {trace.id for trace in traces[config.rules_saw :]}
    material = gather(traces, None, None, DEFAULT.n_folds, config.seed)
    traces = [chain.trace for chain in material.spans.chains]  # those with spans
    default = _pairs(material, DEFAULT)
    rows = _rows("default", default, default, config)
    other = sorted(set(range(len(traces))) - settled_on(len(traces)))
    apart = [[of[i] for i in other] for of in default]
    rows += _rows("default, on chains not used to choose settings", apart, apart, config)
    other = [i for i, trace in enumerate(traces) if trace.id in unseen]
    apart = [[of[i] for i in other] for of in default]
    rows += _rows("default, on chains that the rules were not tuned on", (None, apart[1]), apart, config)
    rows += _rows("cue rules, on the same", (None, [_ruled(traces[i]) for i in other]), apart, config)
    for name in config.settings:
        rows += _rows(name, _pairs(material, SETTINGS[name]), default, config)
    report = cross_validate(traces, seed=config.seed, n_boot=config.n_boot)
    names = report.agreement.labels[:-1]
    confusion = {
        a: dict(zip(names, map(int, report.agreement.confusion[i]), strict=False)) for i, a in enumerate(names)
    }
    return Result(
        tuple(rows),
        {n: _learned(material, n, config.seed) for n in config.sizes},
        _twins(material, default[0], config.similar),
        confusion,
        report.calibration_error,
        report.reliability,
        report.coverage,
    )


def settled_on(n: int) -> set[int]:
    """The half of the chains on which the default weights were chosen."""
    return set(np.random.default_rng(0).permutation(n)[: n // 2].tolist())


Pairs = Sequence[Sequence[tuple[str, str]]]


def _pairs(material: Material, config: ClassifierConfig) -> tuple[Pairs, Pairs]:
    """The judge's label and the held-out prediction, of each chain's spans and of its sentences."""
    spans, sentences = held_out_scores(material, config)
    return material.spans.named(spans, material.labels), material.sentences.named(sentences, material.labels)


def _ruled(trace: Trace) -> list[tuple[str, str]]:
    (found,) = rules([trace])
    return [(s.label, own.label) for s, own in zip(labeled_sentences(trace), found, strict=True) if s.label is not None]


def _rows(name: str, pairs: Sequence[Pairs | None], default: Sequence[Pairs], config: Config) -> list[Row]:
    rows = []
    for units, of, first in zip(("spans", "sentences"), pairs, default, strict=True):
        if of is not None:
            found = agreement_of(of, n_boot=config.n_boot, seed=config.seed)
            f1 = {own.label: own.f1.value for own in found.per_label}
            rows.append(Row(name, units, found.macro_f1, found.kappa, f1, _ahead(first, of, config)))
    return rows


def _ahead(first: Pairs, second: Pairs, config: Config) -> tuple[float, float, float]:
    """Macro-F1 of the first less that of the second, over the same resamples of chains."""
    names = sorted({pair[0] for chain in first for pair in chain})

    def f1(pairs: Pairs, drawn: np.ndarray) -> np.ndarray:
        sums = np.zeros((len(pairs), 2, len(names)))  # right, and given by either
        for chain, counts in zip(pairs, sums, strict=True):
            for truth, guess in chain:
                counts[0, names.index(truth)] += truth == guess
                for label in (truth, guess):
                    if label in names:
                        counts[1, names.index(label)] += 1
        right, said = np.moveaxis(np.tensordot(drawn, sums, 1), 1, 0)
        return (2 * right / np.maximum(said, 1)).mean(1)

    n = len(first)
    drawn = np.random.default_rng(config.seed).multinomial(n, np.full(n, 1 / n), size=config.n_boot)
    drawn = np.concatenate([np.ones((1, n)), drawn])
    difference = f1(first, drawn) - f1(second, drawn)
    low, high = np.quantile(difference[1:], [0.025, 0.975])
    return float(difference[0]), float(low), float(high)


def _learned(material: Material, n: int, seed: int) -> tuple[float, float]:
    """Macro-F1 on each fold, from a model fitted on `n` chains of the other folds."""
    rng = np.random.default_rng(seed)
    spans: list = []
    sentences: list = []
    for fold in range(DEFAULT.n_folds):
        rest = [i for i, f in enumerate(material.folds) if f != fold]
        chosen = sorted(rng.permutation(rest)[:n].tolist())
        folds = tuple(material.folds[i] for i in chosen)
        some = Material(material.spans.take(chosen), material.sentences.take(chosen), folds, material.labels)
        linear = fit_linear(some, DEFAULT)
        out = [i for i, f in enumerate(material.folds) if f == fold]
        for pairs, pieces, score in (
            (spans, material.spans.take(out), linear.scores),
            (sentences, material.sentences.take(out), linear.sentence_scores),
        ):
            scores = pieces.by_chain(score(pieces.chains, None, DEFAULT.features))
            pairs += pieces.named(scores, material.labels)
    by_span, by_sentence = (agreement_of(pairs, n_boot=0).macro_f1.value for pairs in (spans, sentences))
    return by_span, by_sentence


def _twins(material: Material, pairs: Pairs, similar: Sequence[float]) -> tuple[Twins, ...]:
    vocabulary = fit_linear(material, replace(DEFAULT, features=WORDS)).vocabulary
    x = features(material.spans.chains, vocabulary, WORDS, None)  # rows of length 1
    chain = np.concatenate([np.full(len(of), i) for i, of in enumerate(pairs)])
    truth, guess = np.array([pair for of in pairs for pair in of]).T
    cosine = (x @ x.T).toarray()
    cosine[chain[:, None] == chain] = -1
    nearest = cosine.argmax(1)
    closest = cosine[np.arange(len(chain)), nearest]
    found = []
    for least in similar:
        near = np.flatnonzero(closest >= least)
        if not len(near):
            continue
        shares = np.unique(truth[near], return_counts=True)[1] / len(near)
        same, right = truth[near] == truth[nearest[near]], truth[near] == guess[near]
        found.append(Twins(least, len(near), float(same.mean()), float((shares**2).sum()), float(right.mean())))
    return tuple(found)


def table(result: Result) -> str:
    """All figures."""
    lines = ["setting | units | macro-F1 | κ | default ahead by | F1 by label |", "---|---|---|---|---|---|"]
    for r in result.rows:
        f1 = " ".join(f"{label[:4]} {value:.2f}" for label, value in r.f1.items())
        ahead = "{:+.3f} [{:+.3f}, {:+.3f}]".format(*r.ahead)
        lines.append(f"{r.setting} | {r.units} | {_interval(r.macro_f1)} | {_interval(r.kappa)} | {ahead} | {f1} |")
    lines += ["", "chains | macro-F1, spans | sentences |", "---|---|---|"]
    lines += [f"{n} | {spans:.3f} | {sentences:.3f} |" for n, (spans, sentences) in result.curve.items()]
    lines += [
        "",
        "cosine of spans at least | spans | judge agrees | by chance | classifier agrees |",
        "---|---|---|---|---|",
    ]
    lines += [f"{t.cosine} | {t.n} | {t.same:.3f} | {t.chance:.3f} | {t.classified:.3f} |" for t in result.twins]
    lines += ["", "judge's label, predicted as | " + " | ".join(result.confusion) + " |"]
    lines.append("---|" * (1 + len(result.confusion)))
    lines += [f"{name} | " + " | ".join(map(str, row.values())) + " |" for name, row in result.confusion.items()]
    lines += ["", f"calibration error {result.calibration_error:.3f}; confidence → accuracy: "]
    lines[-1] += ", ".join(f"{b.confidence:.2f} → {b.accuracy:.2f}" for b in result.reliability)
    lines += ["", "abstain below | coverage | accuracy | macro-F1 |", "---|---|---|---|"]
    lines += [
        f"{c.abstain} | {c.coverage:.3f} | {_interval(c.accuracy)} | {_interval(c.macro_f1)} |" for c in result.coverage
    ]
    return "\n".join(lines)


def _interval(estimate: Estimate) -> str:
    return f"{estimate:.3f}"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--chains", type=Path)
    parser.add_argument("--n-boot", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    given = {name: value for name, value in vars(parser.parse_args()).items() if value is not None}
    out = given.pop("json", None)
    result = main(Config(**given))
    print(table(result))
    if out:
        out.write_text(json.dumps(asdict(result), indent=1))

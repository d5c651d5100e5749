"""Does a direction of truth tell true from false on other subjects, and does steering along it change right answers?

Pairs of a true and a false statement on seven subjects (`truths.jsonl`; the false ones take their last words from
other true ones of the subject, so that words alone tell nothing) are read at their last token. Reading: the difference
of means over six subjects, projected on the statements of the seventh, at every layer; the AUROC is over true and false
statements of one subject, with an interval over pairs, beside directions of pairs whose sides are swapped at random.
The same direction is tried on negations ("The capital of France is not Rome."). Steering: the difference over all
pairs, added and taken away on easy graded questions (`easy_questions.jsonl`), beside control vectors as long.

Example: python analyses/truthfulness.py --model qwen2.5-0.5b --json FILE --figure FILE.png
(about 4 minutes on one core; with `--folder` it resumes)
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from command import command
from contrast_effects import Change, answers, beyond, changes_of, conditions_of, lines_of
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from torch import Tensor

import lensteer as ls
from lensteer import models
from lensteer.activations import stream_means
from lensteer.contrast.fitting import Position, encode_text
from lensteer.evaluation import estimate_of
from lensteer.evaluation.shares import right_of
from lensteer.evaluation.side_effects import MEASURED
from lensteer.plots.style import INK, MUTED, band, color, error_bars, finish
from lensteer.statistics import Estimate, drawn_counts, estimate_in

QUESTION = "Does a direction of truth that reads across subjects change right answers when a model is steered along it?"
HERE = Path(__file__).parent
LABEL = "truthfulness"
FIGURES = {"right answers": right_of, "answered": MEASURED["answered"], "length": MEASURED["length"]}


@dataclass(frozen=True)
class Config:
    """What to run.

    Attributes:
        model: a chat model's folder or name; None: the organism, which knows none of these facts.
        folder: where answers are kept.
        layer: to steer; by default the one that reads best.
        multiples: lengths of the edits, in lengths of the difference, which is short.
        n_subjects: of `truths.jsonl`.
        n_questions: of the split "test".
        n_controls: vectors of each kind of control, for each length.
        n_shuffled: directions of swapped pairs, for reading.
        max_new_tokens: per answer.
        seed: of controls and bootstrap; answers are greedy.
    """

    model: str | None = None
    folder: Path | None = None
    layer: int | None = None
    multiples: tuple[float, ...] = (2.0, 6.0)
    n_subjects: int = 7
    n_questions: int = 40
    n_controls: int = 5
    n_shuffled: int = 200
    max_new_tokens: int = 12
    seed: int = 0


def smoke(config: Config) -> Config:
    """The same at a size for a test."""
    return replace(config, n_subjects=3, n_questions=4, n_controls=1, n_shuffled=20, max_new_tokens=6)


@dataclass(frozen=True)
class Reading:
    """How well a layer's direction tells true from false statements of a subject that it was not fitted on.

    Attributes:
        layer: whose output is read.
        auroc: of true against false statements of one subject, over all subjects.
        null_high: 97.5 % of directions of swapped pairs are below.
        negated: the AUROC on negated statements.
    """

    layer: int
    auroc: Estimate
    null_high: float
    negated: Estimate


@dataclass(frozen=True)
class Result:
    """Both parts. `p` is the share of swapped directions whose best layer reads as well as `best`."""

    model: str
    n_pairs: int
    n_questions: int
    readings: tuple[Reading, ...]
    best: int
    p: float
    by_subject: Mapping[str, float]
    layer: int
    changes: tuple[Change, ...]


def truths(n_subjects: int) -> tuple[list[ls.Pair], list[str]]:
    """The pairs of some subjects, and the subject of each."""
    pairs = ls.load_pairs(HERE / "truths.jsonl")
    kept = list(dict.fromkeys(pair.label for pair in pairs))[:n_subjects]
    pairs = [pair for pair in pairs if pair.label in kept]
    return [replace(pair, label=LABEL, position="last") for pair in pairs], [pair.label for pair in pairs]


def negated(pair: ls.Pair) -> ls.Pair:
    """The negations of both sides; that of the false statement is the true one."""
    said = [replace(x, completion=x.completion.replace(" is ", " is not ", 1)) for x in (pair.negative, pair.positive)]
    return replace(pair, positive=said[0], negative=said[1])


def activations(model: Any, pairs: Sequence[ls.Pair]) -> Tensor:
    """At the last token of both sides at every layer: [pair, side, layer, d_model]."""
    texts = [encode_text(model, side)[1] for pair in pairs for side in (pair.positive, pair.negative)]
    last = Position.parse("last")
    rows = stream_means(
        model, [t.ids for t in texts], [t.n_prompt for t in texts], [(last.bounds(model, t),) for t in texts]
    )
    found = {i: values[0].clone() for i, values in rows}
    return torch.stack([found[i] for i in range(len(texts))]).unflatten(0, (len(pairs), 2))


def wins(fitted: Tensor, read: Tensor, subjects: Sequence[str], signs: Tensor) -> np.ndarray[Any, Any]:
    """How directions of other subjects order the statements of a subject: [draw, layer, true, false], in [0, 1].

    Args:
        fitted: activations of the pairs that directions are fitted on.
        read: of the same subjects' pairs that are projected.
        subjects: of the pairs.
        signs: [draw, pair], -1 for pairs whose sides are swapped.

    Returns:
        1 where the true statement's projection is larger, .5 for equal ones, NaN for statements of two subjects.

    Raises:
        LensteerError: a single subject.
    """
    names = np.array(subjects)
    if len(set(subjects)) < 2:
        raise ls.LensteerError(f"all pairs are of {subjects[0]!r}: one subject is held out, so give two or more")
    differences, n = fitted[:, 0] - fitted[:, 1], len(subjects)
    found = np.full((len(signs), read.shape[2], n, n), np.nan, dtype=np.float32)
    for subject in dict.fromkeys(subjects):
        held = torch.from_numpy(names == subject)
        directions = torch.einsum("rp,pld->rld", signs[:, ~held].float(), differences[~held])
        projected = torch.einsum("rld,psld->rlps", directions, read[held])
        true, false = projected[..., 0][..., :, None], projected[..., 1][..., None, :]
        where = np.flatnonzero(held.numpy())
        found[np.ix_(np.arange(len(signs)), np.arange(read.shape[2]), where, where)] = (
            (true > false).float() + (true == false).float() / 2
        ).numpy()
    return found


def aurocs(ordered: np.ndarray[Any, Any], seed: int) -> list[Estimate]:
    """Of one draw of `wins`, per layer, with an interval over pairs."""
    n = ordered.shape[-1]
    same = ~np.isnan(ordered[0])
    counts = np.vstack([np.ones(n), drawn_counts(n, 1000, seed)])
    weight = np.einsum("ri,ij,rj->r", counts, same.astype(float), counts)
    sums = [np.einsum("ri,ij,rj->r", counts, np.nan_to_num(layer), counts, optimize=True) for layer in ordered]
    return [estimate_of(each / weight, n) for each in sums]


def main(config: Config) -> Result:
    """Read at every layer, then steer at one."""
    model = ls.load_model(config.model, dtype=torch.bfloat16 if config.model else torch.float32)
    pairs, subjects = truths(config.n_subjects)
    affirmed = activations(model, pairs).float()
    denied = activations(model, [negated(pair) for pair in pairs]).float()
    swaps = np.random.default_rng(config.seed).choice([-1.0, 1.0], size=(config.n_shuffled, len(pairs)))
    signs = torch.from_numpy(np.vstack([np.ones(len(pairs)), swaps]))
    ordered = wins(affirmed, affirmed, subjects, signs)
    values = np.nanmean(ordered, axis=(2, 3))  # draw, layer
    own, other = (aurocs(each[0], config.seed) for each in (ordered, wins(affirmed, denied, subjects, signs[:1])))
    high = np.quantile(values[1:], 0.975, axis=0)
    readings = [Reading(i, own[i], float(high[i]), other[i]) for i in range(len(own))]
    best = int(values[0].argmax())
    p = float((1 + (values[1:].max(1) >= values[0, best]).sum()) / len(values))
    names = np.array(subjects)
    by_subject = {s: float(np.nanmean(ordered[0, best][names == s])) for s in dict.fromkeys(subjects)}

    layer = best if config.layer is None else config.layer
    vectors = ls.fit_directions(model, pairs, layers=[layer], n_controls=config.n_controls, seed=config.seed)
    norm = float(vectors[LABEL].at(layer).norm())
    conditions = conditions_of(vectors, layer, [m * norm for m in config.multiples], config.n_controls)
    questions = ls.load_tasks(HERE / "easy_questions.jsonl", split="test", n=config.n_questions)
    sampling = ls.Sampling(1, 0.0, config.seed, config.max_new_tokens, batch_size=96)
    measures = {LABEL: lambda trace: 0.0}  # nothing of a text's own is measured
    records = answers(model, questions, conditions, sampling, config.folder, measures)
    changes = changes_of(records, conditions, FIGURES, config.seed)
    name = models.fingerprint(model).name
    return Result(name, len(pairs), len(questions), tuple(readings), best, p, by_subject, layer, changes)


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """What a loaded result says, and whether the direction reads truth, negated or not, and changes right answers."""
    best = result["readings"][result["best"]]
    right = [c for c in result["changes"] if c["figure"] == "right answers"]
    reads = best["auroc"]["low"] > 0.5 and result["p"] < 0.05 and best["negated"]["high"] >= 0.5
    steps = "; ".join(
        f"by {c['sign'] * c['length']:+.3g} {estimate_in(c, 'change'):+.2f} (controls {c['low_control']:+.2f} to "
        f"{c['high_control']:+.2f})"
        for c in right
    )
    turned = ", so it reads which words go together and not truth" if best["negated"]["high"] < 0.5 else ""
    text = (
        f"On {result['model']}, the direction tells true from false statements on subjects that it was not fitted on "
        f"with an AUROC of {estimate_in(best, 'auroc'):.2f} at layer {result['best']} ({result['n_pairs']} pairs; p "
        f"{result['p']:.2g} against swapped pairs at their best layers), and negated ones with "
        f"{estimate_in(best, 'negated'):.2f}{turned}. Steered at layer {result['layer']}, right answers on "
        f"{result['n_questions']} easy questions, {right[0]['base']['value']:.2f} unsteered, change: {steps}."
    )
    return text, bool(reads and any(beyond(c) for c in right))


def figure(result: Result) -> go.Figure:
    """AUROC by layer beside swapped pairs, and changes of right answers beside controls."""
    drawn = make_subplots(
        cols=2, column_widths=[0.62, 0.38], horizontal_spacing=0.1, subplot_titles=["reading", "steering"]
    )
    x = [r.layer for r in result.readings]
    null = [r.null_high for r in result.readings]
    drawn.add_scatter(
        x=x, y=null, mode="lines", line=dict(color=MUTED, dash="dot"), name="97.5 % of swapped pairs", row=1, col=1
    )
    for name, label, values in (
        ("held-out subjects", "uncertainty-estimation", [r.auroc for r in result.readings]),
        ("the same, negated", "backtracking", [r.negated for r in result.readings]),
    ):
        drawn.add_trace(band(label, x, [v.low for v in values], [v.high for v in values]), row=1, col=1)
        drawn.add_scatter(
            x=x, y=[v.value for v in values], mode="lines", line=dict(color=color(label)), name=name, row=1, col=1
        )
    drawn.add_hline(y=0.5, line=dict(color=INK, width=1), row=1, col=1)
    right = sorted((c for c in result.changes if c.figure == "right answers"), key=lambda c: c.sign * c.length)
    for i, c in enumerate(right):
        if c.controls:
            drawn.add_shape(
                type="rect", x0=i - 0.3, x1=i + 0.3, y0=100 * c.low_control, y1=100 * c.high_control,
                fillcolor=MUTED, opacity=0.3, line_width=0, row=1, col=2,
            )  # fmt: skip
    points = [100 * c.change.value for c in right]
    bars = error_bars(points, [100 * c.change.low for c in right], [100 * c.change.high for c in right])
    drawn.add_scatter(
        x=list(range(len(right))), y=points, error_y=dict(**bars, thickness=1.5, width=4), mode="markers",
        marker=dict(size=10, color=color("adding-knowledge")), showlegend=False, row=1, col=2,
    )  # fmt: skip
    drawn.add_hline(y=0, line=dict(color=INK, width=1), row=1, col=2)
    ticks = [f"{c.sign * c.length:+.3g}".replace("-", "−") for c in right]
    drawn.update_xaxes(
        tickvals=list(range(len(right))), ticktext=ticks, title_text="added length", zeroline=False, row=1, col=2
    )
    drawn.update_xaxes(title_text="layer", row=1, col=1)
    drawn.update_yaxes(title_text="AUROC, true against false", row=1, col=1)
    drawn.update_yaxes(title_text="change of right answers (points)", row=1, col=2)
    about = (
        f"{result.model}; {result.n_pairs} pairs; {result.n_questions} questions, layer {result.layer}; 95 % intervals"
        "; gray boxes: control vectors as long"
    )
    return finish(drawn, f"A direction of truth<br><sup>{about}</sup>", 480)


def table(result: Result) -> str:
    """A line per layer, one per subject, and one per change."""
    lines = ["layer | AUROC | 97.5 % of swapped pairs | negated"]
    lines += [f"{r.layer} | {r.auroc:.2f} | {r.null_high:.2f} | {r.negated:.2f}" for r in result.readings]
    lines.append(f"best layer {result.best}, p {result.p:.3g}: " + ", ".join(
        f"{name} {value:.2f}" for name, value in result.by_subject.items()
    ))  # fmt: skip
    return "\n".join([*lines, f"steered at layer {result.layer}", *lines_of(result.changes)])


def to_json(result: Result) -> str:
    """All numbers."""
    return json.dumps(asdict(result), indent=1).replace("NaN", "null") + "\n"


if __name__ == "__main__":
    command(globals(), width=1100)

"""Is the effect of a vector in the cue words, or does it reach wordings that the vector has never seen?

(a) Cue words masked: chains under the vector of all sentences are also labeled with their cue words masked, and with as
many random words masked, by a classifier that reads text.

(b) Wordings left out: the sentences of a behavior are split in two groups of wordings, as equal as they get. A wording
is a sentence's form on the organism, and its cue words on language (`MARKERS`; the first word if there is none); a
sentence with cue words of both groups is in neither. A vector is fitted on one group, without the behavior's other
sentences, and the share of the *other* group's sentences is counted. Beside it are the vector of all sentences and
control vectors with the covariance of the sentences' activations. (Vectors of shuffled labels are no null here: they
share a part of the behavior's own, `vector_stability.py`.) All are added with the same length, that of the run's
coefficient, on dev tasks. Effects of (b) are per group of wordings, a mean of both. Intervals are 95 % bootstrap
intervals over tasks.

Example: python analyses/lexical_controls.py --run RUN-FOLDER --json FILE --figure FILE.png
(the folder of a finished `lensteer run` or `lensteer demo`; 3 minutes of one core for the organism; resumes. On a
language model, take fewer behaviors: `--behaviors adding-knowledge uncertainty-estimation --n-chains 200`)
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from command import command
from layer_ablation import dev_tasks
from plotly import graph_objects as go
from plotly.subplots import make_subplots
from vector_stability import span_features

import lensteer as ls
from lensteer import models
from lensteer.activations import TraceFeatures, trace_key
from lensteer.annotation import MARKERS, Annotator, SentenceClassifier, fit_classifier, grammar, masking
from lensteer.attribution.selection import SelectedLayers
from lensteer.calibration import rollout_kl
from lensteer.evaluation import (
    MEAN,
    ChosenCoefficients,
    Condition,
    Record,
    ResampledShares,
    estimate_of,
    random_directions,
    run_conditions,
)
from lensteer.organism.grammar import ENDS, LETTERS
from lensteer.pipeline.chains import CUES_MASKED, RANDOM_MASKED, annotators_of
from lensteer.pipeline.run import SCOPES, Run
from lensteer.plots.style import INK, MUTED, color, error_bars, finish
from lensteer.statistics import Estimate, estimate_in, flat
from lensteer.traces import label_axis, load_traces
from lensteer.vectors import BehaviorVectors, Direction, Recipe
from lensteer.vectors.constructions import ContrastSums
from lensteer.vectors.fitting import vectors_of

QUESTION = "Does a behavior's vector also raise wordings of the behavior that it was not fitted on?"

#: A vector is of all the behavior's sentences, of one group of wordings, or a control.
WHOLE, GROUPS, CONTROL = "all", ("0", "1"), "control"
MIXED, PLAIN = "both", "text as it is"
Wordings = Callable[[str], list[str]]
"""From a sentence to its wordings, the one that stands first is first."""


@dataclass(frozen=True)
class Config:
    """A finished run's folder, behaviors (none: the run's), how many of its chains (0: all) to fit on, and sizes."""

    run: Path
    behaviors: tuple[str, ...] = ()
    n_chains: int = 0
    n_controls: int = 2
    n_dev: int = 60
    n_samples: int = 2
    n_prompts: int = 8
    kl_tokens: int = 60
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One behavior, or the mean of all: changes of shares of sentences under vectors of one length.

    Attributes:
        behavior: or `evaluation.MEAN`.
        whole: of the behavior, all wordings, under the vector of all its sentences.
        full: the same per group of wordings.
        seen: of the wordings that a vector was fitted on.
        unseen: of those that it was not fitted on.
        control: per group, under control vectors.
        beyond: `unseen` less `control`.
        left: `unseen` as a share of `full`.
        plain: as `whole`, by the classifier that reads text.
        masked: the same with cue words masked.
        random: the same with as many random words masked.
    """

    behavior: str
    whole: Estimate
    full: Estimate
    seen: Estimate
    unseen: Estimate
    control: Estimate
    beyond: Estimate
    left: Estimate
    plain: Estimate
    masked: Estimate
    random: Estimate


@dataclass(frozen=True)
class Group:
    """One group of a behavior's wordings: its commonest ones, its sentences, and its vector.

    Attributes:
        behavior: of the sentences.
        wordings: the commonest.
        sentences: that the vector is fitted on.
        mixed: the behavior's sentences with wordings of both groups.
        cosine: with the vector of the other group.
        cosine_all: with that of all sentences.
        length: of what is added.
        kl: that it spends, nats per token.
        kl_all: that the vector of all sentences spends.
    """

    behavior: str
    wordings: tuple[str, ...]
    sentences: int
    mixed: int
    cosine: float
    cosine_all: float
    length: float
    kl: Estimate
    kl_all: Estimate


@dataclass(frozen=True)
class Result:
    """Rows and groups, with the model, the numbers of chains and tasks."""

    model: str
    n_chains: int
    n_tasks: int
    rows: tuple[Row, ...]
    groups: tuple[Group, ...]


_NODE = re.compile(rf"\b(?:[{LETTERS}]|start|{'|'.join(ENDS)})\b")
_CUE = re.compile(
    r"(?<!\w)(?:{})(?!\w)".format("|".join(re.escape(cue) for cue in sorted(MARKERS, key=len, reverse=True))),
    re.IGNORECASE,
)
_WORD = re.compile(r"[^\W_]+(?:'[^\W_]+)*")


def form(sentence: str) -> list[str]:
    """Of the organism's sentence: its text without the nodes."""
    return [_NODE.sub("_", sentence)]


def cues(sentence: str) -> list[str]:
    """The cue words of an English sentence, or its first word, in lower case."""
    text = " ".join(sentence.replace("’", "'").lower().split())
    found = dict.fromkeys(_CUE.findall(text))
    return list(found) or _WORD.findall(text)[:1] or [text]


@dataclass(frozen=True)
class Split:
    """Two groups of a behavior's wordings, of about as many sentences."""

    wordings: Wordings
    group: Mapping[str, str]

    @staticmethod
    def of(sentences: Iterable[str], wordings: Wordings) -> Split:
        """The wordings that sentences begin with, from the commonest on, each into the smaller group."""
        sizes, group = dict.fromkeys(GROUPS, 0), {}
        for wording, n in sorted(Counter(wordings(s)[0] for s in sentences).items(), key=lambda each: (-each[1], each)):
            group[wording] = min(GROUPS, key=lambda name: sizes[name])
            sizes[group[wording]] += n
        return Split(wordings, group)

    def __call__(self, sentence: str) -> str:
        """The sentence's group, or `MIXED`. An unknown wording is in a group by chance, always the same."""
        own = self.wordings(sentence)
        found = {self.group[each] for each in own if each in self.group}
        found = found or {GROUPS[crc32(own[0].encode()) % 2]}
        return found.pop() if len(found) == 1 else MIXED


def by_wording(annotator: Annotator, splits: Mapping[str, Split]) -> Annotator:
    """The annotator with the group of wordings in its labels: "backtracking/0"."""

    def label(sentence: ls.Sentence) -> ls.Sentence:
        if sentence.label not in splits:
            return sentence
        return replace(sentence, label=f"{sentence.label}/{splits[sentence.label](sentence.text)}")

    return lambda traces: [[label(sentence) for sentence in found] for found in annotator(traces)]


def main(config: Config) -> Result:
    """Split, fit, steer and count.

    Raises:
        LensteerError: a behavior of which all sentences have one wording, or that the run does not steer.
    """
    run = Run.open(config.run)
    layers = SelectedLayers.load(run.path("layers.json"))
    behaviors = config.behaviors or tuple(layers)
    if odd := [b for b in behaviors if b not in layers]:
        raise ls.LensteerError(f"behaviors {odd}: this run steers {list(layers)}")
    features = span_features(run, sorted(set(layers.values())), config.n_chains, config.seed)
    chosen = {each.key for each in features}
    traces = [trace for trace in load_traces(run.path("annotated.jsonl")) if trace_key(trace) in chosen]
    _, annotator = next(iter(annotators_of(run).items()))
    wordings = form if annotator is grammar else cues
    texts = {
        b: [t.response[s.char_start : s.char_end] for t in traces for s in t.spans if s.label == b] for b in behaviors
    }
    splits = {b: Split.of(texts[b], wordings) for b in behaviors}
    if single := [b for b in behaviors if len(set(splits[b].group.values())) < 2]:
        raise ls.LensteerError(f"all sentences of {single} have one wording: leave them out of behaviors")
    vectors, n = BehaviorVectors.load(run.path("vectors.safetensors")), config.n_controls
    found = {b: directions(features, traces, vectors.recipe, b, layers[b], splits[b]) for b in behaviors}
    for k, b in enumerate(behaviors):  # every behavior has control vectors of its own
        drawn = random_directions(vectors, layers[b], n * len(behaviors), pool="covariance_matched")[k * n : k * n + n]
        found[b] |= {f"{CONTROL}-{i}": direction for i, direction in enumerate(drawn)}
    plans = _plans(run, found, layers)
    conditions = [Condition("unsteered", kind="unsteered")]
    conditions += [Condition("/".join(key), plan) for key, plan in plans.items()]
    reader = _reader(run, traces, annotator)
    tasks = dev_tasks(run, config.n_dev)
    records = run_conditions(
        run.model,
        tasks,
        conditions,
        run.sampling(config.n_samples),
        annotator={
            "": by_wording(annotator, splits),
            PLAIN: reader,
            CUES_MASKED: masking(reader),
            RANDOM_MASKED: masking(reader, control=True),
        },
        path=run.path("lexical-controls.jsonl"),
        progress=True,
    )
    kls = rollout_kl(
        run.model, tasks[: config.n_prompts], list(plans.values()), max_new_tokens=config.kl_tokens, seed=config.seed
    )
    spent = {key: kl.estimate(None, seed=config.seed) for key, kl in zip(plans, kls, strict=True)}
    groups = tuple(_group(b, g, found[b], texts[b], splits[b], plans, spent) for b in behaviors for g in GROUPS)
    name = models.fingerprint(run.model).name
    return Result(name, len(features), len(tasks), rows_of(records, behaviors, config.seed), groups)


def directions(
    features: Sequence[TraceFeatures],
    traces: Sequence[ls.Trace],
    recipe: Recipe,
    behavior: str,
    layer: int,
    split: Split,
) -> dict[str, Direction]:
    """The behavior's vectors: of all its sentences, and of each group without the others."""
    known, axis = {trace_key(trace): trace for trace in traces}, label_axis(traces)
    row = features[0].layers.index(layer)
    names = (WHOLE, *GROUPS)
    sums = {name: ContrastSums(recipe, axis, 1, features[0].tokens.shape[-1]) for name in names}
    for each in features:
        trace = known[each.key]
        place = [split(trace.response[s.char_start : s.char_end]) if s.label == behavior else "" for s in trace.spans]
        for name in names:
            keep = [i for i, group in enumerate(place) if name == WHOLE or group in ("", name)]
            if keep:
                part = replace(
                    each,
                    labels=tuple(each.labels[i] for i in keep),
                    layers=(layer,),
                    spans=each.spans[:, keep, row : row + 1],
                    lengths=each.lengths[:, keep],
                    tokens=each.tokens[row : row + 1],
                )
                sums[name].add(part)
    made = {name: vectors_of(each, (layer,), {}) for name, each in sums.items()}
    if lacking := [name for name in names if behavior not in made[name]]:
        raise ls.LensteerError(f"no sentence of {behavior!r} for the vectors {lacking}: take more chains")
    return {name: made[name][behavior] for name in names}


def _plans(
    run: Run, found: Mapping[str, Mapping[str, Direction]], layers: Mapping[str, int]
) -> dict[tuple[str, str], ls.SteeringPlan]:
    """All vectors of a behavior with the length that the run's coefficient gives to that of all sentences."""
    coefficients, plans = ChosenCoefficients.load(run.path("coefficients.json")).up, {}
    for b, each in found.items():
        length = coefficients.get(b, 1.0) * float(each[WHOLE].at(layers[b]).norm())
        for name, direction in each.items():
            plans[b, name] = ls.SteeringPlan(direction, layers[b], length, SCOPES[run.config.scope], unit="unit")
    return plans


def _reader(run: Run, traces: Sequence[ls.Trace], annotator: Annotator) -> Annotator:
    """An annotator that reads masked text: the run's, or on the organism a classifier of its chains."""
    if annotator is not grammar:
        return annotator
    path = run.path("lexical-classifier.safetensors")
    if not path.exists():
        fit_classifier(traces, seed=run.config.seed).save(path)
    return SentenceClassifier.load(path)


def _group(
    b: str,
    g: str,
    found: Mapping[str, Direction],
    texts: Sequence[str],
    split: Split,
    plans: Mapping[tuple[str, str], ls.SteeringPlan],
    spent: Mapping[tuple[str, str], Estimate],
) -> Group:
    counts = Counter(map(split, texts))
    common = Counter(split.wordings(text)[0] for text in texts if split(text) == g).most_common(5)
    own = found[g].raw[0]
    other, whole = (
        float(torch.cosine_similarity(own, found[x].raw[0], dim=0)) for x in (GROUPS[g == GROUPS[0]], WHOLE)
    )
    words = tuple(wording for wording, _ in common)
    kls = spent[b, g], spent[b, WHOLE]
    return Group(b, words, counts[g], counts[MIXED], other, whole, plans[b, g].length, *kls)


def rows_of(records: Sequence[Record], behaviors: Sequence[str], seed: int = 0) -> tuple[Row, ...]:
    """A row per behavior, and one for their mean if there are several."""
    shares, n = ResampledShares(records, seed=seed), len({r.task for r in records})
    known = dict.fromkeys(r.condition for r in records)

    def change(b: str, vector: str, labels: Sequence[str], by: str | None = None) -> Any:
        return sum(shares.of(f"{b}/{vector}", x, by) - shares.of("unsteered", x, by) for x in labels)

    draws: dict[str, dict[str, Any]] = {}
    for b in behaviors:
        parts = [f"{b}/{g}" for g in GROUPS]
        pairs = list(zip(GROUPS, parts, strict=True))
        controls = [name.split("/")[1] for name in known if name.startswith(f"{b}/{CONTROL}-")]
        found = dict(
            whole=change(b, WHOLE, [*parts, f"{b}/{MIXED}"]),
            full=change(b, WHOLE, parts) / 2,
            seen=sum(change(b, g, [part]) for g, part in pairs) / 2,
            unseen=sum(change(b, g, [part]) for g, part in zip(GROUPS, reversed(parts), strict=True)) / 2,
            control=np.mean([change(b, c, parts) / 2 for c in controls], axis=0),
            plain=change(b, WHOLE, [b], PLAIN),
            masked=change(b, WHOLE, [b], CUES_MASKED),
            random=change(b, WHOLE, [b], RANDOM_MASKED),
        )
        draws[b] = found
    if len(behaviors) > 1:
        draws[MEAN] = {name: np.mean([draws[b][name] for b in behaviors], axis=0) for name in draws[behaviors[0]]}
    rows = []
    for b, found in draws.items():
        found["beyond"] = found["unseen"] - found["control"]
        found["left"] = np.divide(
            found["unseen"], found["full"], out=np.full_like(found["full"], np.nan), where=found["full"] > 0
        )
        rows.append(Row(b, **{name: estimate_of(each, n) for name, each in found.items()}))
    return tuple(rows)


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """The answer from a loaded JSON file; shown if left-out wordings rise, and more than under control vectors."""
    *single, last = result["rows"]
    what = "on average over the behaviors" if last["behavior"] == MEAN else f"of {last['behavior']}"
    held = [row["behavior"] for row in single or [last] if row["unseen_low"] > 0 and row["beyond_low"] > 0]
    names = ("unseen", "full", "control", "masked", "plain", "random")
    unseen, full, control, masked, plain, random = (f"{estimate_in(last, name):+.3f}" for name in names)
    said = (
        f"On {result['model']}, vectors fitted on one half of a behavior's wordings change the share of the other half "
        f"by {unseen} {what} ({result['n_tasks']} tasks), the vectors of all wordings by {full}, control vectors by "
        f"{control}; it is above 0 and above control vectors for {', '.join(held) or 'no behavior'}. With cue words "
        f"masked the vectors of all wordings change the whole share by {masked}, unmasked by {plain}, with as many "
        f"random words masked by {random}."
    )
    return said, last["unseen_low"] > 0 and last["beyond_low"] > 0


def table(result: Result) -> str:
    """A line per behavior, then a line per group of wordings."""
    names = [name for name in Row.__dataclass_fields__ if name != "behavior"]
    lines = [" | ".join(["behavior", *names])]
    lines += [" | ".join([row.behavior, *(f"{getattr(row, name):+.3f}" for name in names)]) for row in result.rows]
    lines += ["", "behavior | wordings | sentences | in neither | cosine | with all | length | KL | KL of all"]
    for g in result.groups:
        numbers = f"{g.sentences} | {g.mixed} | {g.cosine:.2f} | {g.cosine_all:.2f} | {g.length:.3g}"
        lines.append(f"{g.behavior} | {'; '.join(g.wordings)} | {numbers} | {g.kl:.4f} | {g.kl_all:.4f}")
    return "\n".join(lines)


def figure(result: Result) -> go.Figure:
    """Left: changes per group of wordings, by what the vector was fitted on. Right: with words masked."""
    panels = (
        (
            ("full", "all wordings"),
            ("seen", "these wordings"),
            ("unseen", "the other wordings"),
            ("control", "control vectors"),
        ),
        (("plain", PLAIN), ("masked", "cue words masked"), ("random", "random words masked")),
    )
    titles = (
        "a group of wordings, by what the vector was fitted on",
        "the behavior, vector of all, as the classifier reads it",
    )
    drawn = make_subplots(1, 2, subplot_titles=titles, horizontal_spacing=0.16)
    behaviors = [row.behavior for row in result.rows]
    for column, panel in enumerate(panels, start=1):
        for i, row in enumerate(result.rows):
            paint = INK if row.behavior == MEAN else color(row.behavior)
            found = [getattr(row, name) for name, _ in panel]
            x, low, high = ([100 * getattr(e, end) for e in found] for end in ("value", "low", "high"))
            drawn.add_scatter(
                x=x,
                y=[k + 0.16 * (i - (len(behaviors) - 1) / 2) for k in range(len(panel))],
                error_x=dict(**error_bars(x, low, high), thickness=1.2, width=0, color=paint),
                mode="markers",
                name=row.behavior,
                legendgroup=row.behavior,
                showlegend=column == 1,
                marker=dict(color=paint, size=9, symbol="diamond" if row.behavior == MEAN else "circle"),
                row=1,
                col=column,
            )
        drawn.add_vline(x=0, line=dict(color=MUTED, width=1), row=1, col=column)
        ticks = dict(tickvals=list(range(len(panel))), ticktext=[words for _, words in panel])
        drawn.update_yaxes(**ticks, autorange="reversed", zeroline=False, row=1, col=column)
    drawn.update_xaxes(title_text="change of the share (points)")
    about = f"{result.model}, {result.n_tasks} tasks; vectors of one length; 95 % intervals over tasks"
    finish(drawn, f"Is the effect in the words?<br><sup>{about}</sup>", 480)
    return drawn.update_layout(margin_t=110)


def to_json(result: Result) -> str:
    """All numbers, a line per row."""
    parts = {name: [flat(x) for x in getattr(result, name)] for name in ("rows", "groups")}
    return json.dumps({**asdict(result), **parts}, indent=0).replace("NaN", "null") + "\n"


def smoke(config: Config) -> Config:
    """The same at a size for a test."""
    return replace(config, n_dev=4, n_samples=1, n_prompts=2, kl_tokens=20, n_controls=1)


if __name__ == "__main__":
    command(globals())

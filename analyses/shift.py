"""Does a vector that is fitted on one kind of task steer others, and does it hold in long chains and changed prompts?

From a finished run, at the run's layers and coefficients. The effect of a vector is the change of its behavior's share
of sentences in the intended direction, a mean over the signs that are run; every shift is compared, paired by task:

- kind: vectors fitted on as many chains of each kind of task, scaled to the length of the run's own vector; on each
  task, the one of its own kind beside the one of the other kind. Kinds are the tasks' categories where chains and dev
  tasks share two, else whether the question has a digit in it.
- place: the first third of a chain's sentences beside the last third.
- tool output: the plain question beside the same after a tool's output (JSON, a traceback, a table, in turn).
- counter-prompt: the plain question beside the same with a sentence that asks for the opposite; pushed up only.

Control vectors come from shuffled labels, are as long, and steer plain prompts. Intervals are over tasks.

Example: python analyses/shift.py --run RUN-FOLDER --json FILE --figure FILE.png
(the folder of a finished `lensteer run` or `lensteer demo`; chains are kept in it, so that a killed run goes on; about
6 minutes of one core for the organism's demo, 10 for mini-R1 with `--signs 1`)
"""

from __future__ import annotations

import argparse
import json
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from geometry_on_language import cut
from plotly import graph_objects as go
from plotly.subplots import make_subplots

import lensteer as ls
from lensteer.attribution.selection import SelectedLayers
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
from lensteer.pipeline.chains import annotators_of
from lensteer.pipeline.run import SCOPES, Run
from lensteer.plots.style import MUTED, color, error_bars, finish
from lensteer.statistics import Estimate, estimate_in
from lensteer.traces import load_traces
from lensteer.vectors import BehaviorVectors, Direction

QUESTION = "Does a vector that is fitted on one kind of task steer other kinds, long chains and changed prompts?"
PARTS = ("kind", "place", "tool output", "counter-prompt")
SIDES = {
    "kind": ("same kind", "other kind"),
    "place": ("first third", "last third"),
    "tool output": ("plain", "after a tool's output"),
    "counter-prompt": ("plain", "asked for the opposite"),
}
TOOL_OUTPUTS = (
    'Tool output: {"status": "ok", "items": 3, "mean": 41.5, "cached": false}',
    "Tool output: Traceback (most recent call last): File \"main.py\", line 12, in run: KeyError: 'total'",
    "Tool output: | city | year | count | | Oslo | 2019 | 14 | | Lima | 2021 | 9 |",
)
COUNTER = {
    "adding-knowledge": "Do not bring in any facts of your own.",
    "example-testing": "Do not try any examples.",
    "uncertainty-estimation": "Be sure of what you say and do not voice any doubt.",
    "backtracking": "Do not go back on what you said.",
}
UNSTEERED, OWN, SHUFFLED, SAME, OTHER = "unsteered", "own", "shuffled", "same", "other"


@dataclass(frozen=True)
class Config:
    """A finished run's folder; chains per kind (0: as many as the smaller kind has) and tokens read of each; tasks.

    `long_tokens` limits the chains whose thirds are compared; 0: the run's own limit. `signs` are 1 and -1.
    """

    run: Path
    n_chains: int = 0
    chain_tokens: int = 1000
    n_dev: int = 50
    n_samples: int = 1
    max_new_tokens: int = 0
    long_tokens: int = 0
    signs: tuple[int, ...] = (1, -1)
    seed: int = 0


@dataclass(frozen=True)
class Row:
    """One behavior, or the mean over all, under one shift.

    Attributes:
        part: of `PARTS`.
        behavior: whose vector and share.
        plain: the effect without the shift.
        shifted: the effect with it.
        difference: shifted less plain.
        control: the effect of a vector from shuffled labels on plain prompts.
        beyond: shifted less control.
        base: change of the unsteered share by the shift itself; for "kind" 0.
        cosine: of the two kinds' vectors; None in other parts.
    """

    part: str
    behavior: str
    plain: Estimate
    shifted: Estimate
    difference: Estimate
    control: Estimate
    beyond: Estimate
    base: Estimate
    cosine: float | None = None


@dataclass(frozen=True)
class Text:
    """Unsteered chains with and without the shifted prompt: shares that end and that the annotator can read wholly."""

    part: str
    finished: Estimate
    finished_change: Estimate
    parsed: Estimate
    parsed_change: Estimate
    repetition_change: Estimate


@dataclass(frozen=True)
class Result:
    """All rows, what changed prompts do to unsteered text, and the sizes.

    Attributes:
        model: its name.
        kinds: tasks of each kind.
        sentences: of each behavior in the chains of each kind.
        n_chains: of each kind.
        n_tasks: of all kinds.
        signs: that were run.
        rows: by part and behavior.
        texts: by part that changes the prompt.
    """

    model: str
    kinds: dict[str, int]
    sentences: dict[str, dict[str, int]]
    n_chains: int
    n_tasks: int
    signs: tuple[int, ...]
    rows: tuple[Row, ...]
    texts: tuple[Text, ...]


def kinds_of(tasks: Sequence[ls.Task], others: Sequence[ls.Task]) -> dict[str, str]:
    """The kind of each task, by id: its category if both sets have the same two or more, else by digits in its text."""
    categories, there = ({task.category for task in some} for some in (tasks, others))
    shared = categories == there and len(categories) > 1
    return {
        t.id: t.category if shared else "with numbers" if re.search(r"\d", t.prompt) else "without numbers"
        for t in (*tasks, *others)
    }


def kind_vectors(
    run: Run, kinds: Mapping[str, str], layers: Mapping[str, int], config: Config
) -> tuple[dict[str, BehaviorVectors], int]:
    """Vectors of each kind from as many chains of each, by the run's recipe; kept in the run's folder."""
    given = [t for t in load_traces(run.path("annotated.jsonl")) if t.spans and t.task.prompt]
    found = {kind: [t for t in given if kinds[t.task.id] == kind] for kind in sorted(set(kinds.values()))}
    most = min(map(len, found.values()))
    n = min(config.n_chains or most, most)
    if len(found) < 2 or n < 2:
        raise ls.LensteerError(
            f"{str(run.folder)!r} has chains of the kinds { {kind: len(some) for kind, some in found.items()} }: "
            "give a run whose chains are of two kinds, with two or more of each"
        )
    made = {}
    for kind, some in found.items():
        path = run.path(f"shift-{kind.replace(' ', '-')}-{n}-{config.chain_tokens}-{config.seed}.safetensors")
        if not path.exists():
            drawn = np.random.default_rng(config.seed).permutation(len(some))[:n]
            ls.fit_vectors(
                run.model,
                [cut(some[i], config.chain_tokens) for i in sorted(drawn)],
                window=run.config.window,
                negatives=run.config.negatives,
                layers=sorted(set(layers.values())),
            ).save(path)
        made[kind] = BehaviorVectors.load(path, run.model)
        if lacking := [b for b in layers if b not in made[kind]]:
            raise ls.LensteerError(f"{n} chains {kind!r} have no sentence of {lacking}: give more with --n-chains")
    return made, n


def lengths_of(chosen: ChosenCoefficients) -> dict[tuple[str, int], float]:
    """How long a vector each behavior and sign is steered with: as chosen, or the shortest if all break the text."""
    found = {}
    for b, (down, up) in chosen.pairs.items():
        for s, c in ((1, up), (-1, down)):
            tried = {abs(t.coefficient): t.length for t in chosen.curve if t.behavior == b and t.coefficient * s > 0}
            found[b, s] = tried[c] if c else min(tried.values())
    return found


def _push(name: str, direction: Direction, length: float, layer: int, run: Run, **more: Any) -> Condition:
    plan = ls.SteeringPlan(direction, layer, length, SCOPES[run.config.scope], unit="unit")
    return Condition(name, plan, **more)


def main(config: Config) -> Result:
    """Fit the kinds' vectors, run all conditions, and compare.

    Raises:
        LensteerError: chains of one kind only.
    """
    run = Run.open(config.run)
    layers = dict(SelectedLayers.load(run.path("layers.json")).items())
    own = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    size = lengths_of(ChosenCoefficients.load(run.path("coefficients.json")))
    behaviors = list(layers)
    tasks = run.tasks("dev")[: config.n_dev]
    kinds = kinds_of([t.task for t in load_traces(run.path("annotated.jsonl"))], tasks)
    fitted, n_chains = kind_vectors(run, kinds, {b: layers[b] for b in behaviors}, config)

    sources: dict[tuple[str, str], Direction] = {}
    for b in behaviors:
        (control,) = random_directions(own, layers[b], 1, pool=SHUFFLED, behaviors=[b])
        sources |= {(b, OWN): own[b], (b, SHUFFLED): control} | {(b, kind): v[b] for kind, v in fitted.items()}

    def pushes(names: Sequence[str], signs: Sequence[int], **more: Any) -> list[Condition]:
        return [
            _push(f"{b}/{name}/{s:+d}", d, s * size[b, s], layers[b], run, **more)
            for (b, name), d in sources.items()
            for s in signs
            if name in names
        ]

    plain = Condition(UNSTEERED, kind=UNSTEERED)
    sampling = run.sampling(config.n_samples)
    if config.max_new_tokens:
        sampling = replace(sampling, max_new_tokens=config.max_new_tokens)
    _, annotator = next(iter(annotators_of(run).items()))

    def measured(part: str, asked: Sequence[ls.Task], conditions: Sequence[Condition], limit: int = 0) -> list[Record]:
        """The records of one part, and beside each those of the first and last third of its chain."""
        traces: list[ls.Trace] = []
        records = run_conditions(
            run.model,
            asked,
            conditions,
            replace(sampling, max_new_tokens=limit) if limit else sampling,
            annotator=annotator,
            path=run.path(f"shift-{part.replace(' ', '-')}.jsonl"),
            progress=True,
            keep=lambda _, trace: traces.append(trace),
        )
        thirds = [each for pair in zip(records, traces, strict=True) for each in thirds_of(*pair)]
        return [replace(r, condition=f"{part}/{r.condition}") for r in (*records, *thirds)]

    records = measured("kind", tasks, [plain, *pushes([OWN, SHUFFLED, *fitted], config.signs)])
    records += by_kind(records, kinds)
    if config.long_tokens:
        records += measured("place", tasks, [plain, *pushes([OWN], config.signs)], config.long_tokens)
    else:
        records += [replace(r, condition=r.condition.replace("kind/", "place/", 1)) for r in records]
    after = [replace(t, prompt=f"{TOOL_OUTPUTS[i % len(TOOL_OUTPUTS)]}\n\n{t.prompt}") for i, t in enumerate(tasks)]
    records += measured("tool output", after, [plain, *pushes([OWN], config.signs)])
    argued = [replace(c, suffix=COUNTER[c.name.split("/")[0]]) for c in pushes([OWN], [1])]
    bases = [Condition(f"{b}/{UNSTEERED}", suffix=COUNTER[b]) for b in behaviors]
    records += measured("counter-prompt", tasks, [*bases, *argued] if 1 in config.signs else bases)

    one, two, *_ = fitted.values()
    cosines = {b: float(torch.cosine_similarity(one[b].at(layers[b]), two[b].at(layers[b]), dim=0)) for b in behaviors}
    shares = ResampledShares(records, seed=config.seed)
    name = ls.models.fingerprint(run.model).name
    counts = dict(Counter(kinds[t.id] for t in tasks))
    rows, texts = rows_of(shares, behaviors, config.signs, len(tasks), cosines), texts_of(shares, behaviors, len(tasks))
    sentences = {kind: {b: v.counts[b] for b in behaviors} for kind, v in fitted.items()}
    return Result(name, counts, sentences, n_chains, len(tasks), config.signs, rows, texts)


def thirds_of(record: Record, trace: ls.Trace) -> list[Record]:
    """The record's counts in the first and in the last third of its labeled sentences; 0 of 0 if it has under three."""
    k = len(trace.spans) // 3
    made = []
    for name, spans in (("first", trace.spans[:k]), ("last", trace.spans[len(trace.spans) - k :])):
        counts = Counter(span.label for span in spans)
        made.append(replace(record, condition=f"{record.condition}/{name}", sentences=dict(counts), n_sentences=k))
    return made


def by_kind(records: Sequence[Record], kinds: Mapping[str, str]) -> list[Record]:
    """Records of the kinds' vectors once more, named after whether the task is of the same or of another kind."""
    made = []
    for r in records:
        parts = r.condition.split("/")
        if len(parts) == 4 and parts[2] in kinds.values():
            which = SAME if kinds[r.task] == parts[2] else OTHER
            made.append(replace(r, condition="/".join((*parts[:2], which, parts[3]))))
    return made


def rows_of(
    shares: ResampledShares, behaviors: Sequence[str], signs: Sequence[int], n_tasks: int, cosines: Mapping[str, float]
) -> tuple[Row, ...]:
    """A row per part and behavior, and their means."""
    Draws = np.ndarray[Any, Any]

    def effect(b: str, part: str, vector: str, some: Sequence[int], base: str = UNSTEERED, third: str = "") -> Draws:
        pushed = [s * shares.of(f"{part}/{b}/{vector}/{s:+d}{third}", b) for s in some]
        return np.mean(pushed, axis=0) - np.mean(some) * shares.of(f"{part}/{base}{third}", b)

    found: dict[str, dict[str, tuple[Draws, ...]]] = {part: {} for part in PARTS}
    for b in behaviors:
        bare = shares.of(f"kind/{UNSTEERED}", b)
        control = effect(b, "kind", SHUFFLED, signs)
        found["kind"][b] = (*(effect(b, "kind", which, signs) for which in (SAME, OTHER)), control, 0 * bare)
        thirds = [effect(b, "place", OWN, signs, third=f"/{third}") for third in ("first", "last")]
        moved = np.subtract(*(shares.of(f"place/{UNSTEERED}/{third}", b) for third in ("last", "first")))
        found["place"][b] = (*thirds, control, moved)
        tool = effect(b, "tool output", OWN, signs)
        moved = shares.of(f"tool output/{UNSTEERED}", b) - bare
        found["tool output"][b] = (effect(b, "kind", OWN, signs), tool, control, moved)
        if 1 in signs:
            base = f"{b}/{UNSTEERED}"
            pair = effect(b, "kind", OWN, [1]), effect(b, "counter-prompt", OWN, [1], base)
            moved = shares.of(f"counter-prompt/{base}", b) - bare
            found["counter-prompt"][b] = (*pair, effect(b, "kind", SHUFFLED, [1]), moved)
    rows = []
    for part, each in found.items():
        if each:
            each[MEAN] = tuple(np.mean(list(column), axis=0) for column in zip(*each.values(), strict=True))
        for b, (before, then, control, moved) in each.items():
            parts = (before, then, then - before, control, then - control, moved)
            a, c, d, e, f, g = (estimate_of(draws, n_tasks) for draws in parts)
            rows.append(Row(part, b, a, c, d, e, f, g, cosines.get(b) if part == "kind" else None))
    return tuple(rows)


def texts_of(shares: ResampledShares, behaviors: Sequence[str], n_tasks: int) -> tuple[Text, ...]:
    """What the changed prompts do to unsteered chains."""
    measures = [
        lambda r: (float(r.finished), 1.0),
        lambda r: (float(r.parsed), 1.0),
        lambda r: (r.repetition, 1.0),
    ]
    names = {"tool output": [UNSTEERED], "counter-prompt": [f"{b}/{UNSTEERED}" for b in behaviors]}
    made = []
    for part, some in names.items():
        draws = [np.mean([shares.ratio(f"{part}/{n}", m) for n in some], axis=0) for m in measures]
        before = [shares.ratio(f"kind/{UNSTEERED}", m) for m in measures]
        ended, read, repeated = (own - base for own, base in zip(draws, before, strict=True))
        parts = (draws[0], ended, draws[1], read, repeated)
        made.append(Text(part, *(estimate_of(d, n_tasks) for d in parts)))
    return tuple(made)


def answer(result: Mapping[str, Any]) -> tuple[str, bool]:
    """What was found, in points of the share, and whether vectors steer another kind of task beyond controls."""
    means = {row["part"]: row for row in result["rows"] if row["behavior"] == MEAN}

    def points(part: str, name: str) -> str:
        return f"{100 * estimate_in(means[part], name):+.1f}"

    kind = means["kind"]
    words = (
        f"On {result['n_tasks']} tasks of {result['model']}, vectors from {result['n_chains']} chains of the other "
        f"kind of task move a behavior's share by {points('kind', 'shifted')} points, those of the same kind by "
        f"{points('kind', 'plain')}, vectors from shuffled labels by {points('kind', 'control')}. "
        f"The effect changes by {points('place', 'difference')} points from the first to the last third of a chain and "
        f"by {points('tool output', 'difference')} after a tool's output"
    )
    if "counter-prompt" in means:
        words += f", and by {points('counter-prompt', 'difference')} when the prompt asks for the opposite"
    return f"{words}.", kind["shifted"]["low"] > 0 and kind["beyond"]["low"] > 0


def figure(result: Result) -> go.Figure:
    """A panel per part: effects without the shift (open) and with it (filled), and of control vectors (gray)."""
    parts = list(dict.fromkeys(row.part for row in result.rows))
    drawn = make_subplots(
        rows=1, cols=len(parts), shared_yaxes=True, horizontal_spacing=0.04,
        subplot_titles=[f"{part}<br><sup>{SIDES[part][0]} (open), {SIDES[part][1]} (filled)</sup>" for part in parts],
    )  # fmt: skip
    names = list(dict.fromkeys(row.behavior for row in result.rows))
    for column, part in enumerate(parts, start=1):
        for row in (row for row in result.rows if row.part == part):
            at = names.index(row.behavior)
            paint = MUTED if row.behavior == MEAN else color(row.behavior)
            for found, symbol, shift in (
                (row.plain, "circle-open", -0.22),
                (row.shifted, "circle", 0.0),
                (row.control, "line-ns-open", 0.22),
            ):
                tone = MUTED if found is row.control else paint
                bars = dict(**error_bars([found.value], [found.low], [found.high]), thickness=1, width=0, color=tone)
                mark = dict(symbol=symbol, color=tone, size=9)
                drawn.add_scatter(
                    x=[found.value], y=[at + shift], error_x=bars, mode="markers", showlegend=False, marker=mark,
                    row=1, col=column,
                )  # fmt: skip
        drawn.add_vline(x=0, line=dict(color=MUTED, width=1), row=1, col=column)
    drawn.update_xaxes(tickformat="+.0%", nticks=4)
    title = f"Effect of steering {result.model} under a shift<br><sup>change of the share; gray: shuffled labels</sup>"
    finish(drawn, title, 460, False).update_layout(margin=dict(t=115))
    return drawn.update_yaxes(tickvals=list(range(len(names))), ticktext=names, autorange="reversed", zeroline=False)


def table(result: Result) -> str:
    """A line per part and behavior, then one per changed prompt."""
    lines = ["part | behavior | plain | shifted | difference | control | beyond it | unsteered | cosine |", "---|" * 9]
    for r in result.rows:
        figures = " | ".join(f"{x:+.3f}" for x in (r.plain, r.shifted, r.difference, r.control, r.beyond, r.base))
        lines.append(f"{r.part} | {r.behavior} | {figures} | {'' if r.cosine is None else f'{r.cosine:.2f}'} |")
    for t in result.texts:
        lines.append(
            f"unsteered, {t.part}: ended {t.finished:.2f} ({t.finished_change:+.2f}), readable {t.parsed:.2f} "
            f"({t.parsed_change:+.2f}), repetition {t.repetition_change:+.3f}"
        )
    return "\n".join(lines)


def to_json(result: Result) -> str:
    """All numbers."""
    return json.dumps(asdict(result), indent=1).replace("NaN", "null") + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--signs", type=int, nargs="+", choices=(1, -1), default=list(Config.signs))
    for option in ("n_chains", "chain_tokens", "n_dev", "n_samples", "max_new_tokens", "long_tokens", "seed"):
        parser.add_argument(f"--{option.replace('_', '-')}", type=int, default=getattr(Config, option))
    parser.add_argument("--smoke", action="store_true", help="make everything small")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--figure", type=Path)
    options = vars(parser.parse_args())
    small, out, picture = (options.pop(name) for name in ("smoke", "json", "figure"))
    settings = Config(**{**options, "signs": tuple(options["signs"])})
    measured = main(replace(settings, n_chains=12, n_dev=4, max_new_tokens=60) if small else settings)
    print(table(measured))
    if out:
        out.write_text(to_json(measured))
    if picture:
        figure(measured).write_image(picture, width=1200)

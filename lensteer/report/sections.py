"""The page's sections in plain words. Results say which rows there are; every number is a figure of the summary."""

from __future__ import annotations

from html import escape

from lensteer.behaviors import BEHAVIORS
from lensteer.plots import chain_html, color, legend_html
from lensteer.report.markup import NOTHING, Figures, bullets, section, table
from lensteer.report.results import RunResults
from lensteer.report.summary import part, random_arm

PUSHES = {"down": "pushed&nbsp;down", "up": "pushed&nbsp;up", "words": "asked&nbsp;in&nbsp;words"}


def name(label: str) -> str:
    """A behavior with its color."""
    return f'<span class="name"><span class="swatch" style="background: {color(label)}"></span>{escape(label)}</span>'


def behaviors(results: RunResults) -> list[str]:
    """Those that were steered, in their order."""
    return list(dict.fromkeys(effect.behavior for effect in results.evaluation.effects))


def asked(results: RunResults, f: Figures) -> str:
    """The question, the model, the data."""
    return section(
        "asked",
        "What was asked",
        f"<p>Does the model <b>{f('model.name')}</b> ({f('model.n_layers', 'count')} layers, width "
        f"{f('model.d_model', 'count')}) carry its reasoning behaviors as directions in the residual stream? At which "
        "layer do they act? And does adding such a direction, or taking it away, change how often the behavior "
        "occurs, by more than chance does and without breaking the chains?</p>",
        f"<p>The vectors come from {f('traces.n', 'count')} chains on {f('traces.tasks', 'count')} training tasks, "
        f"{f('traces.finished', 'count')} of which ended by themselves. For each sentence the activations were read at "
        f"the window “{f('vectors.window')}” and held against the negatives “{f('vectors.negatives')}”. "
        f"Coefficients were chosen on {f('doses.n_tasks', 'count')} dev tasks. Effects were measured on "
        f"{f('evaluation.n_tasks', 'count')} held-out tasks × {f('evaluation.n_samples', 'count')} samples, the same "
        f"tasks and random seeds in every arm, steering at these positions: {f('evaluation.scope')}.</p>",
        table(
            ["behavior", "sentences in the chains", "of which in the vectors"],
            [
                [name(label), f(f"traces.spans.{label}", "count"), f(f"vectors.spans.{label}", "count")]
                for label in BEHAVIORS
            ],
        ),
        f"<p class='muted'>Sentences found in the text as they stand: {f('alignment.matched', 'count')}; after a "
        f"repair: {f('alignment.repaired', 'count')}; dropped: {f('alignment.dropped', 'count')}; not readable for the "
        f"annotator, though kept in every denominator: {f('alignment.unparsed', 'count')}.</p>",
        _settings(results, f),
    )


def _settings(results: RunResults, f: Figures) -> str:
    rows = [
        [escape(key), f(f"{group}.{key}", "plain")]
        for group, entries in (("model", results.model), ("config", results.config))
        for key in entries
    ]
    return f"<details><summary>Model and settings</summary>{table(['setting', 'value'], rows, words=2)}</details>"


def found(results: RunResults, f: Figures, reference: Figures | None, figure: str) -> str:
    """The verdicts, with the reference run's below each."""
    rows = []
    for label in behaviors(results):
        rows.append([name(label), *_verdict(f, label)])
        if reference is not None and part(reference.found, f"effect.{label}"):
            rows.append([" full run", *_verdict(reference, label)])
    caption = "Share of sentences with each behavior, with 95 % intervals over tasks; changes in percentage points."
    if reference is not None:
        caption += (
            f" Set back in gray: the committed full run of {reference('model.name')} "
            f"({reference('evaluation.n_tasks', 'count')} tasks × {reference('evaluation.n_samples', 'count')} "
            f"samples, {reference('evaluation.n_random', 'count')} random vectors), not part of this run."
        )
    head = ["behavior", "layer", "coeffi-<br>cient", "pushed<br>down", "un-<br>steered", "pushed<br>up"]
    head += ["asked in<br>words", "change by<br>random vectors", "verdict"]
    return section(
        "found",
        "What was found",
        f"<p class='answer'>Steering did what it claims, in both directions, for "
        f"<b>{f('shown.n_both', 'count')} of {f('shown.n_behaviors', 'count')}</b> behaviors.</p>",
        table(head, rows, caption=caption),
        "<p class='muted'>“Shown” means: the share changes in the wanted direction, the 95 % interval of the change "
        "excludes zero, and none of the random vectors changes it as far.</p>",
        figure,
    )


def _verdict(f: Figures, label: str) -> list[str]:
    up = f"effect.{label}.up.sentences"
    good = " yes" if f.found.get(f"shown.{label}.up") and f.found.get(f"shown.{label}.down") else ""
    shares = {kind: _bounded(f, f"effect.{label}.{kind}.sentences.share", "percent") for kind in PUSHES}
    coefficient = f"±{f(f'{up}.coefficient')}" if f.found.get(f"{up}.coefficient") is not None else NOTHING
    return [
        f(f"{up}.layer", "layer"),
        coefficient,
        shares["down"],
        _bounded(f, f"{up}.base", "percent"),
        shares["up"],
        shares["words"],
        f.between(f"{up}.null_low", f"{up}.null_high", "points"),
        f'<span class="verdict{good}">{f(f"shown.{label}.verdict")}</span>',
    ]


def _bounded(f: Figures, path: str, style: str) -> str:
    return f(path, style) + f.interval(f"{path}_low", f"{path}_high", style)


def sure(results: RunResults, f: Figures) -> str:
    """Intervals, chance, side effects."""
    rows = []
    first = next(iter(PUSHES))
    for label in behaviors(results):
        for kind, words in PUSHES.items():
            path = f"effect.{label}.{kind}"
            if f.found.get(f"{path}.sentences.change") is not None:
                cells = [
                    f(f"{path}.{unit}.change", "points")
                    + f.interval(f"{path}.{unit}.low", f"{path}.{unit}.high", "points")
                    for unit in ("sentences", "tokens")
                ]
                cells.append(f.between(f"{path}.sentences.null_low", f"{path}.sentences.null_high", "points"))
                cells += [f(f"{path}.sentences.p_value", "thousandths"), f(f"{path}.sentences.wrong_way", "percent")]
                rows.append([name(label) if kind == first else "", words, *cells])
    head = ["behavior", "arm", "change of<br>sentences", "change of<br>tokens", "change by<br>random vectors"]
    head += ["rank p", "tasks moving<br>the wrong way"]
    return section(
        "sure",
        "How sure",
        bullets(
            [
                f"Intervals are 95 % bootstrap intervals over the {f('evaluation.n_tasks', 'count')} tasks, which are "
                f"paired: a task is drawn with all of its {f('evaluation.n_samples', 'count')} samples in both arms.",
                f"Chance: {f('evaluation.n_random', 'count')} random vectors per layer, as long as the longest edit "
                "there. The rank p is the share of them (and of the vector itself) that change the behavior at least "
                f"as far in the wanted direction; it cannot fall below {f('evaluation.smallest_p', 'thousandths')}.",
                "Asking in words is the plain alternative: a sentence in the prompt asks for the behavior.",
            ]
        ),
        table(head, rows, caption="Changes against the unsteered arm, in percentage points.", words=2),
        _side_effects(results, f),
    )


def _side_effects(results: RunResults, f: Figures) -> str:
    styles = {"parsed": "percent", "finished": "percent", "length": "count", "sentences": "tenths"}
    styles["repetition"] = "thousandths"
    rows, above = [], ""
    for arm in results.evaluation.arms:
        if random_arm(arm.arm) is None:
            path = f"arm.{arm.arm.replace('/', '.')}"
            label, _, kind = arm.arm.partition("/")
            accuracy = _bounded(f, f"{path}.accuracy", "percent")
            steered = name(label) if kind else "none"
            first = ["" if label == above else steered, PUSHES.get(kind, escape(kind)) if kind else escape(label)]
            above = label
            rows.append([*first, accuracy, *(f(f"{path}.{field}", style) for field, style in styles.items())])
    for layer in dict.fromkeys(filter(None, (random_arm(arm.arm) for arm in results.evaluation.arms))):
        path = f"random.{layer}"
        shown = {"accuracy": "percent", **styles}
        cells = [f.between(f"{path}.{field}.min", f"{path}.{field}.max", style) for field, style in shown.items()]
        rows.append(["random", f"{f(f'{path}.n', 'count')}&nbsp;at&nbsp;{escape(layer)}", *cells])
    head = [
        "steered",
        "arm",
        "right<br>answers",
        "chains<br>parse",
        "chains<br>end",
        "tokens",
        "sentences",
        "repetition",
    ]
    return table(
        head,
        rows,
        caption="Side effects: how the chains of each arm fared; of random vectors the lowest and the highest.",
        words=2,
    )


def chains(results: RunResults) -> str:
    """One task, thought about without steering and with it."""
    shown = {} if results.example is None else {"unsteered": results.example}
    shown |= results.steered
    if not shown:
        return ""
    parts = []
    for arm, trace in shown.items():
        label, _, kind = arm.partition("/")
        title = f"{name(label)}, {PUSHES.get(kind, escape(kind))}" if kind else escape(label)
        parts.append(f"<div><h3>{title}</h3>{chain_html(trace, header=False)}</div>")
    labels = [span.label for trace in shown.values() for span in trace.spans]
    task = next(iter(shown.values())).task
    return section(
        "chains",
        "One chain, unsteered and steered",
        f"<p>Every sentence has the color of its behavior.</p><p><b>Task</b> {escape(task.prompt)}</p>",
        f"<p>{legend_html(labels)}</p>",
        f'<div class="chains">{"".join(parts)}</div>',
    )


def cost(results: RunResults, f: Figures) -> str:
    """Seconds, chains, tokens, rows."""
    rows = [[escape(stage), f(f"seconds.{stage}", "tenths")] for stage in results.seconds]
    rows.append(["<b>total</b>", f("seconds.total", "tenths")])
    return section(
        "cost",
        "What it cost",
        table(["stage", "seconds"], rows),
        bullets(
            [
                f"Training chains: {f('traces.n', 'count')}, with {f('traces.tokens', 'count')} tokens.",
                f"Scores by layer: {f('cost.scores.rows', 'count')} rows over shared caches in "
                f"{f('cost.scores.forwards', 'count')} forwards.",
                f"Dose search: {f('cost.doses.arms', 'count')} arms on {f('doses.n_tasks', 'count')} tasks.",
                f"Evaluation: {f('cost.evaluation.arms', 'count')} arms, {f('cost.evaluation.chains', 'count')} "
                f"chains, {f('cost.evaluation.tokens', 'count')} tokens.",
            ]
        ),
    )


CAVEATS = (
    "Intervals are over tasks of one kind, for one model and one set of vectors: they say nothing of other models, "
    "other kinds of tasks, or vectors fitted on other chains.",
    "Layers were chosen on training chains and coefficients on dev tasks; held-out tasks were used once, to measure.",
    "The behaviors are what the annotator says they are. An annotator that steering fools would fool this report.",
    "Several behaviors and directions are tested side by side; intervals and rank p are not corrected for that.",
    "Random vectors have the length of the edit, not its effect on the next token: a control at equal length.",
    "Shares sum to one: where one behavior rises, others fall, and that is no finding of its own.",
)


def caveats() -> str:
    """What this does not show."""
    return section("caveats", "What this does not show", bullets(CAVEATS))

"""The page's sections in plain words. Results say which rows there are; every number is a figure of the summary."""

from __future__ import annotations

from html import escape

from lensteer.behaviors import in_order
from lensteer.evaluation.results import SHOWN
from lensteer.plots import chain_html, color, legend_html
from lensteer.report.markup import NOTHING, Figures, bullets, section, table
from lensteer.report.results import RunResults
from lensteer.report.summary import part

PUSHES = {"down": "pushed&nbsp;down", "up": "pushed&nbsp;up", "words": "asked&nbsp;in&nbsp;words"}


#: What a coefficient is a multiple of.
UNIT_PHRASES = {
    "difference": "the difference of means itself",
    "mean_norm": "the length of the layer's mean activation",
    "unit": "length",
}


def name(label: str) -> str:
    """A behavior with its color."""
    return f'<span class="name"><span class="swatch" style="background: {color(label)}"></span>{escape(label)}</span>'


def behaviors(results: RunResults) -> list[str]:
    """Those that were to be steered, in their order; one without any dose is among them."""
    return list(results.evaluation.behaviors)


def asked(results: RunResults, f: Figures) -> str:
    """The question, the model, the data."""
    unit = UNIT_PHRASES[results.evaluation.coefficient_unit]
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
        f"Coefficients were chosen on {f('doses.n_tasks', 'count')} dev tasks, in multiples of {unit}. Effects were "
        f"measured on {f('evaluation.n_tasks', 'count')} held-out tasks × {f('evaluation.n_samples', 'count')} "
        "samples, the same tasks and random seeds in every arm, steering at these positions: "
        f"{f('evaluation.scope')}.</p>",
        table(
            ["behavior", "sentences in the chains", "of which in the vectors"],
            [
                [name(label), f(f"traces.spans.{label}", "count"), f(f"vectors.spans.{label}", "count")]
                for label in labels(f)
            ],
        ),
        f"<p class='muted'>Sentences found in the text as they stand: {f('alignment.matched', 'count')}; after a "
        f"repair: {f('alignment.repaired', 'count')}; dropped: {f('alignment.dropped', 'count')}; not readable for the "
        f"annotator, though kept in every denominator: {f('alignment.unparsed', 'count')}.</p>",
        _settings(results, f),
    )


def labels(f: Figures) -> tuple[str, ...]:
    """Of the chains' sentences."""
    start = "traces.spans."
    return in_order(key.removeprefix(start) for key in f.found if key.startswith(start))


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
    caption = "Share of sentences with each behavior, with 95 % intervals over tasks."
    if reference is not None:
        caption += (
            f" Set back in gray: the committed full run of {reference('model.name')} "
            f"({reference('evaluation.n_tasks', 'count')} tasks × {reference('evaluation.n_samples', 'count')} "
            f"samples), not part of this run."
        )
    head = ["behavior", "layer", "pushed down", "verdict", "unsteered", "pushed up", "verdict", "asked in words"]
    return section(
        "found",
        "What was found",
        f"<p class='answer'>On {f('model.name')}, of {f('shown.n_behaviors', 'count')} behaviors <b>"
        f"{f('shown.n_up', 'count')}</b> are shown to rise when the vector is added, and "
        f"<b>{f('shown.n_down', 'count')}</b> are shown to fall when it is taken away{_others(f)}.</p>",
        table(head, rows, caption=caption, words=1),
        "<p class='muted'>“Shown” means all of: the share changes in the wanted direction; a sign-flip test over "
        f"tasks, corrected by Holm's method for the {f('shown.n_tested', 'count')} directions that are tested, gives p "
        f"below {f('test.level')}; no control vector at the layer changes the share as far; and the text is no worse "
        "than unsteered by more than the stated margins. A fall is tested only where the unsteered arm has at least "
        f"{f('test.min_events', 'count')} of the behavior's sentences on at least {f('test.min_event_tasks', 'count')} "
        "tasks; otherwise its base rate is too low, which is not the same as not shown.</p>",
        _notes(results, f),
        figure,
    )


def _others(f: Figures) -> str:
    """What became of those that were not shown, counted."""
    parts = []
    for kind in ("up", "down"):
        rest = {v: n for v, n in part(f.found, f"shown.n_{kind}").items() if v != SHOWN}
        if rest:
            words = ", ".join(f"{f(f'shown.n_{kind}.{v}', 'count')} “{escape(v)}”" for v in rest)
            parts.append(f"{kind}: {words}")
    return f" (the others {'; '.join(parts)})" if parts else ""


def _notes(results: RunResults, f: Figures) -> str:
    if not results.notes:
        return ""
    return "<h3>Warnings</h3>" + bullets([f(f"note.{number}") for number in range(len(results.notes))])


def _verdict(f: Figures, label: str) -> list[str]:
    cells = [f(f"site.{label}.layer", "layer")]
    base = next(
        (
            path
            for kind in ("up", "down")
            if f.found.get((path := f"effect.{label}.{kind}.sentences") + ".base") is not None
        ),
        f"effect.{label}.up.sentences",
    )
    for kind in ("down", "up"):
        path = f"effect.{label}.{kind}.sentences"
        dose = "" if f.found.get(f"{path}.coefficient") is None else f" at {f(f'{path}.coefficient', 'signed')}"
        verdict = f"shown.{label}.{kind}_verdict"
        good = " yes" if f.found.get(verdict) == SHOWN else ""
        pair = [
            _bounded(f, f"{path}.share", "percent") + f'<span class="interval">{dose}</span>',
            f'<span class="verdict{good}">{f(verdict)}</span>',
        ]
        cells += pair if kind == "down" else [_bounded(f, f"{base}.base", "percent"), *pair]
    return [*cells, _bounded(f, f"effect.{label}.words.sentences.share", "percent")]


def _bounded(f: Figures, path: str, style: str) -> str:
    return f(path, style) + f.interval(f"{path}_low", f"{path}_high", style)


def sure(results: RunResults, f: Figures) -> str:
    """Tests, controls, other annotators, side effects."""
    rows, controls = [], []
    pools = list(dict.fromkeys(c.pool for e in results.evaluation.effects for c in e.controls))
    for label in behaviors(results):
        for kind, words in PUSHES.items():
            path = f"effect.{label}.{kind}.sentences"
            if f.found.get(f"{path}.change") is None:
                continue
            first = [
                name(label) if kind == "down" or f.found.get(f"effect.{label}.down.sentences.change") is None else ""
            ]
            rows.append(
                [
                    *first,
                    words,
                    f(f"{path}.base_events", "count"),
                    f(f"{path}.events", "count"),
                    f(f"{path}.change", "points") + f.interval(f"{path}.low", f"{path}.high", "points"),
                    f(f"effect.{label}.{kind}.tokens.change", "points"),
                    f(f"{path}.p"),
                    f(f"{path}.p_holm") if kind != "words" else NOTHING,
                    f(f"{path}.wrong_way", "percent"),
                ]
            )
            if kind != "words" and pools:
                cells = []
                for pool in pools:
                    at = f"{path}.{pool}"
                    cells += [
                        f.between(f"{at}.low", f"{at}.high", "points"),
                        f(f"{at}.z", "tenths"),
                        f"{f(f'{at}.rank', 'count')} of {f(f'{at}.n', 'count')} + 1",
                    ]
                controls.append([*first, words, f(f"{path}.change", "points"), f(f"{path}.length", "plain"), *cells])
    head = ["behavior", "arm", "sentences<br>unsteered", "in the<br>arm", "change of<br>share", "of share<br>of tokens"]
    head += ["p", "p after<br>Holm", "tasks moving<br>the wrong way"]
    about = [
        f"Intervals are 95 % bootstrap intervals over the {f('evaluation.n_tasks', 'count')} tasks, which are "
        f"paired: a task is drawn with all of its {f('evaluation.n_samples', 'count')} samples in both arms. p is of a "
        "sign-flip test over tasks.",
        "Asking in words is the plain alternative: a sentence in the prompt asks for the behavior.",
    ]
    parts = [
        bullets(about),
        table(head, rows, caption="Changes against the unsteered arm, in percentage points.", words=2),
    ]
    if pools:
        columns = [x for pool in pools for x in (f"{POOLS[pool]}:<br>change", "z", "rank")]
        parts += [
            "<h3>Would any vector do?</h3>",
            f"<p>{f('evaluation.n_random', 'count')} control vectors of each kind at each layer, as long as the "
            f"longest edit there, {f('evaluation.control_samples', 'count')} chain(s) per task each. Changes are in "
            "percentage points; z counts standard deviations of the controls' changes, sampling noise included; rank 1 "
            "means that no control goes as far. None was dropped for its text.</p>",
            table(["behavior", "arm", "change", "length", *columns], controls, words=2),
        ]
    return section("sure", "How sure", *parts, _annotators(results, f), _side_effects(results, f))


#: Kinds of control vectors in words.
POOLS = {
    "isotropic": "random direction",
    "covariance_matched": "the spans' covariance",
    "shuffled": "shuffled labels",
}


def _annotators(results: RunResults, f: Figures) -> str:
    others = results.evaluation.annotators[1:]
    if not others:
        return ""
    rows = []
    for label in behaviors(results):
        for kind in ("down", "up"):
            path = f"effect.{label}.{kind}.sentences"
            if f.found.get(f"{path}.change") is None:
                continue
            cells = [f"{f(f'{path}.base', 'bare percent')} → {f(f'{path}.share', 'percent')}"]
            for other in others:
                at = f"by.{other}.{label}.{kind}"
                cells.append(f"{f(f'{at}.base', 'bare percent')} → {f(f'{at}.share', 'percent')} (p {f(f'{at}.p')})")
            rows.append([name(label), PUSHES[kind], *cells])
    return (
        "<h3>As other annotators see it</h3><p>The same chains. “Cue words masked” hides words such as “wait” or "
        "“maybe” from the annotator, and “random words masked” as many others: what is left of a change is more than "
        "its cue words.</p>"
        + table(["behavior", "arm", f("annotators.0"), *(escape(other) for other in others)], rows, words=2)
    )


def _side_effects(results: RunResults, f: Figures) -> str:
    styles = {"finished": "percent", "length": "count", "sentence_length": "tenths"}
    styles |= {"repetition": "thousandths", "compression": "thousandths", "nll": "plain", "kl": "plain"}
    if f.found.get("doses.margin.parsed") is not None:
        styles = {"parsed": "percent", **styles}
    rows, above, why = [], "", []
    for arm in results.evaluation.arms:
        if arm.kind == "control":
            continue
        path = f"arm.{arm.arm.replace('/', '.')}"
        accuracy = _bounded(f, f"{path}.accuracy", "percent")
        steered = name(arm.behavior) if arm.behavior else "none"
        words = PUSHES.get(arm.kind, escape(arm.arm))
        first = ["" if steered == above else steered, words]
        above = steered
        fine = "standard" if arm.text is None else "within" if arm.text.ok else "worse"
        rows.append([*first, accuracy, *(f(f"{path}.{field}", style) for field, style in styles.items()), fine])
        if arm.text is not None and not arm.text.ok:
            why.append(f"{steered}, {words}: {f(f'{path}.text_why')}")
    for pool in dict.fromkeys((arm.layer, arm.pool) for arm in results.evaluation.arms if arm.kind == "control"):
        path = f"random.L{pool[0]}.{pool[1]}"
        shown = {"accuracy": "percent", **styles}
        cells = [f.between(f"{path}.{field}.min", f"{path}.{field}.max", style) for field, style in shown.items()]
        worse = f"{f(f'{path}.n_broken', 'count')} of {f(f'{path}.n', 'count')} worse"
        rows.append([POOLS[pool[1]], f"{f(f'{path}.n', 'count')}&nbsp;at&nbsp;L{pool[0]}", *cells, worse])
    names = {
        "parsed": "chains<br>parse",
        "finished": "chains<br>end",
        "length": "tokens",
        "sentence_length": "tokens per<br>sentence",
        "repetition": "repeated<br>4-grams",
        "compression": "compressed<br>to",
        "nll": "nats per<br>token",
        "kl": "KL per<br>token",
    }
    head = ["steered", "arm", "right<br>answers", *(names[field] for field in styles), "text"]
    margins = [
        f"{TEXT_WORDS[m]} {f(f'doses.margin.{m}')}" for m in TEXT_WORDS if f.found.get(f"doses.margin.{m}") is not None
    ]
    parsing = "Chains parse if they end, close their thinking, and the grammar can read every sentence. "
    return (
        "<h3>What else changed</h3>"
        + table(
            head,
            rows,
            caption=f"{parsing if 'parsed' in styles else ''}Nats per token: minus the mean log-likelihood of the text "
            "under the unsteered model. KL per token: between the steered and the unsteered model along the text. Of "
            "control vectors the lowest and the highest.",
            words=2,
        )
        + f"<p class='muted'>Text is “within” if the worse end of a one-sided 95 % interval is within every margin of "
        f"the unsteered arm: {'; '.join(margins)}. {f('text.n_broken', 'count')} arm(s) are not.</p>"
        + (bullets(why) if why else "")
    )


#: The margins in words.
TEXT_WORDS = {
    "nll": "nats per token up by",
    "repetition": "repeated 4-grams up by",
    "compression": "compressed length down by",
    "sentence_length": "sentences longer or shorter by a factor of",
    "finished": "chains that end down by",
    "parsed": "chains that parse down by",
    "kl": "KL per token at most",
}


def chains(results: RunResults) -> str:
    """The first held-out tasks, thought about without steering and with it."""
    if not results.examples:
        return ""
    parts, labels = [], []
    for task in dict.fromkeys(example.trace.task.id for example in results.examples):
        columns = []
        for behavior, kind, trace in results.examples:
            if trace.task.id != task:
                continue
            title = f"{name(behavior)}, {PUSHES.get(kind, escape(kind))}" if behavior else escape(kind)
            columns.append(f"<div><h3>{title}</h3>{chain_html(trace, header=False)}</div>")
            labels += [span.label for span in trace.spans]
            prompt = trace.task.prompt
        parts.append(f'<p><b>Task</b> {escape(prompt)}</p><div class="chains">{"".join(columns)}</div>')
    return section(
        "chains",
        "Chains, unsteered and steered",
        "<p>The first held-out tasks, first sample, not picked. Every sentence has the color of its behavior.</p>",
        f"<p>{legend_html(labels)}</p>",
        *parts,
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
    "Holm's correction covers the directions that are tested, not the shares of tokens, nor other annotators.",
    "Control vectors have the length of the longest edit at their layer, not its effect on the next token.",
    "Shares sum to one: where one behavior rises, others fall, and that is no finding of its own.",
)


def caveats() -> str:
    """What this does not show."""
    return section("caveats", "What this does not show", bullets(CAVEATS))

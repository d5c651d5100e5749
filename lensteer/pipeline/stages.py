"""The stages of a run. A finished stage is not rerun; an interrupted one resumes.

`load_results` reads everything that the report shows from the run's folder.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lensteer import models, organism
from lensteer.annotation import Annotator, annotate_report
from lensteer.attribution import LayerScores, attribute
from lensteer.attribution.overlap import EmbeddingOverlap, embedding_overlap
from lensteer.attribution.selection import SelectedLayers, select_layers
from lensteer.contrast import fit_directions, pair_traces
from lensteer.errors import LensteerError
from lensteer.evaluation import (
    BASE,
    BASELINE_PROMPTS,
    FORCED_WORDS,
    KINDS,
    KL_POOLS,
    POOLS,
    ChosenCoefficients,
    Condition,
    Evaluation,
    choose_coefficients,
    evaluate,
    power,
    run_conditions,
)
from lensteer.evaluation.margins import check_standard
from lensteer.evaluation.power import to_rows
from lensteer.evaluation.results import MIN_EVENT_TASKS, MIN_EVENTS
from lensteer.files import append_jsonl, read_json, read_jsonl, write_atomically, write_json, write_jsonl
from lensteer.generation.jobs import generate_traces
from lensteer.generation.parallel import SetAside
from lensteer.pipeline.cache import read_cache_run
from lensteer.pipeline.chains import (
    EXAMPLES,
    annotators_of,
    coherence_of,
    fit_own_classifier,
    judged_on_its_questions,
    pairs_of,
    read_chains,
    read_examples,
    trust,
    with_masks,
)
from lensteer.pipeline.run import MANIFEST, SCOPES, Run, RunConfig
from lensteer.report import RunResults, render, summary
from lensteer.results import reading, revived
from lensteer.tasks import describe_tasks
from lensteer.traces import Trace, load_traces, save_traces
from lensteer.vectors import BehaviorVectors, fit_vectors
from lensteer.vectors.geometry import cosine_matrix
from lensteer.vectors.values import NO_SPANS

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

FULL_RUN = Path(organism.__file__).parent / "full_run.json"
"""The summary of the full run on the organism, committed with its weights."""


def load_results(run: Run) -> RunResults:
    """Everything that the report shows, read from a run's folder.

    Raises:
        LensteerError: an artifact is missing or cannot be read.
    """
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"))
    layers = SelectedLayers.load(run.path("layers.json"))
    if not layers:
        raise LensteerError(f"{run.path('layers.json')} has no layer: make it again")
    examples = tuple(read_examples(run))
    annotator, plan = read_json(run.path("annotator.json")), read_json(run.path("plan.json"))
    with reading(run.path("annotator.json")):
        revived(str | None, annotator["name"])
        revived(tuple[str, ...], annotator.get("names", []))
    with reading(run.path("plan.json")):
        revived(dict[str, int], plan["chains"])
        for row in revived(tuple[dict[str, Any], ...], plan["power"]):
            revived(str, row["behavior"])
    with reading(run.path(MANIFEST)):
        revived(models.ModelId, run.model_id)
        alignment = revived(dict[str, int], {name: run.stages["annotate"][name] for name in ALIGNED})
        seconds = revived(dict[str, float], {name: facts["seconds"] for name, facts in run.stages.items()})
    reference = json.loads(FULL_RUN.read_text(encoding="utf-8")) if FULL_RUN.exists() else None
    if reference is not None and (
        reference["model.weights"] != run.model_id["weights"]
        or reference.get("evaluation.coefficient_unit") != run.config.unit
        or run.config.pairs
        or run.config.measure
    ):
        reference = None  # another model's figures, coefficients in another unit, or other behaviors or measures
    return RunResults(
        title=f"Steering {run.model_id['name']}",
        model=run.model_id,
        config=asdict(run.config),
        traces=load_traces(run.path("annotated.jsonl")),
        annotator=annotator,
        alignment=alignment,
        vectors=vectors,
        overlap=EmbeddingOverlap.load(run.path("overlap.json")),
        scores=LayerScores.load(run.path("scores.json")),
        controls=LayerScores.load(controls) if (controls := run.path("controls.json")).exists() else None,
        layers=layers,
        cosine=cosine_matrix(vectors, layers, default=next(iter(layers.values()))),
        coefficients=ChosenCoefficients.load(run.path("coefficients.json")),
        evaluation=Evaluation.load(run.path("evaluation.json")),
        seconds=seconds,
        reference=reference,
        examples=examples,
        cache=read_cache_run(run.folder),
        plan=plan,
        notes=tuple(run.notes),
    )


#: Where a run lists what a pool could not process.
SET_ASIDE = "set_aside.jsonl"
#: A vector of fewer spans causes a warning.
FEW_SPANS = 30
#: Chains per dev task for base rates, before coefficients are tried.
PLAN_SAMPLES = 2
#: Held-out tasks whose chains the report shows.
SHOWN_TASKS = 3
#: Counts of sentences that the stage "annotate" states.
ALIGNED = ("given", "matched", "repaired", "dropped", "unparsed")


def run_stage(run: Run, name: str) -> None:
    """Run one stage, unless it is done.

    Raises:
        LensteerError: no such stage, an earlier stage is not done, or another process is at work on the run.
    """
    if name not in STAGES:
        raise LensteerError(f"no stage {name!r}: the stages are {list(STAGES)}")
    if name in run.stages:
        if name == "traces" and run.engine is not None:
            run.announce("the chains are there already: the engine is not asked")
        return
    before = list(STAGES)[: list(STAGES).index(name)]
    missing = [stage for stage in before if stage not in run.stages]
    if missing:
        raise LensteerError(f"stage {name!r} needs {missing} in {str(run.folder)!r}: do them first")
    begun = time.perf_counter()
    with run.locked():
        n_aside = 0 if run.pool is None else len(run.pool.aside)
        facts = STAGES[name](run)
        if run.pool is not None:
            _set_aside(run, name, run.pool.aside[n_aside:])
        run.stages[name] = {"seconds": round(time.perf_counter() - begun, 2), **facts}
        run.write()


def _set_aside(run: Run, stage: str, items: Sequence[SetAside]) -> None:
    """Report what the pool could not process."""
    if not items:
        return
    run.note(
        f"Stage {stage!r} set {len(items)} chain(s) aside, which failed: {items[0].name} ({items[0].error})"
        + (" and others" if len(items) > 1 else "")
        + f"; {SET_ASIDE} has all."
    )
    run.announce(f"{stage}: {len(items)} set aside, see {run.path(SET_ASIDE)}")
    append_jsonl(run.path(SET_ASIDE), ({"stage": stage, **asdict(item)} for item in items))


def complete(run: Run, announce: Callable[[str], object] | None = None) -> Path:
    """Run all stages that are not done; return the report's path."""
    run.announce = announce or (lambda line: None)
    for name in STAGES:
        if announce is not None:
            announce(f"{name}: done already" if name in run.stages else f"{name} ...")
        run_stage(run, name)
    return run.path("report.html")


def _traces(run: Run) -> dict[str, Any]:
    c = run.config
    if (said := describe_tasks(c.tasks)) is not None:
        run.announce(f"tasks: {said}")
        run.note(f"Tasks: {said}")
    if run.engine is not None and c.chains:
        raise LensteerError(f"{list(c.chains)} are given: an engine has nothing to write; leave --engine out")
    if c.pairs:
        completed, _ = pairs_of(run)
        traces = pair_traces(run.model, completed)
        save_traces(traces, run.path("traces.jsonl"))
        return {"chains": len(traces), "tokens": sum(len(t.response_ids) for t in traces)}
    if c.chains:
        traces = read_chains(c.chains, run.model)
        fit_own_classifier(run, traces)
        save_traces(traces, run.path("traces.jsonl"))
        files = [sum(1 for _ in read_jsonl(Path(path))) for path in c.chains]
        return {"chains": len(traces), "tokens": sum(len(t.response_ids) for t in traces), "files": files}
    traces = generate_traces(
        run.model,
        run.tasks("train"),
        temperature=c.temperature,
        top_p=c.top_p,
        prefill=c.prefill,
        system=c.system,
        seed=c.seed,
        max_new_tokens=c.train_tokens,
        batch_size=c.batch_size,
        engine=run.engine,
        path=run.path("traces.jsonl"),
        inspect=lambda new: check_thoughts(run.model, new),
        progress=run.progress,
    )
    if run.engine is not None:
        run.note(f"The engine {run.engine.name!r} wrote the chains that vectors are fitted on.")
    return {"chains": len(traces), "tokens": sum(len(t.response_ids) for t in traces)}


def check_thoughts(model: TransformerBridge, traces: Sequence[Trace]) -> None:
    """Check that the chains of a batch have what annotators read.

    Raises:
        LensteerError: none of them has a thought, or all of them have marks that the model is not known to use.
    """
    opens, closes = models.thought_marks(model)
    begun = traces[0].response[:60]
    if opens and not any(end > begin for begin, end in (trace.thinking for trace in traces)):
        raise LensteerError(
            f"none of the {len(traces)} chains of this batch has a thought, which {opens!r} would open and {closes!r} "
            f"close; the first begins {begun!r}. If the model marks its thought otherwise, give --thought 'OPEN "
            "CLOSE'; if it marks none, --thought none: then the whole response is the chain"
        )
    if not opens and all(models.marks_in(trace.response)[0] in trace.response[:200].split() for trace in traces):
        found = models.marks_in(traces[0].response)
        raise LensteerError(
            f"all {len(traces)} chains of this batch begin a thought with {found[0]!r}, which the model's chat "
            f"template does not name; the first begins {begun!r}. Give --thought '{found[0]}'"
        )


def _annotate(run: Run) -> dict[str, Any]:
    """Label the chains. Labels that they come with (as in pairs) are kept; the first annotator labels the others."""
    traces = load_traces(run.path("traces.jsonl"))
    given = [trace for trace in traces if trace.spans]
    rest = [trace for trace in traces if not trace.spans]
    if rest and not run.annotators:
        raise LensteerError(
            f"{len(rest)} of the {len(traces)} chains of {list(run.config.chains)} came without labels, and vectors "
            "are fitted on labels: give an --annotator as well as the measure"
        )
    found, reports = annotate_report(rest, next(iter(annotators_of(run).values()))) if rest else ([], [])
    fresh = iter(found)
    annotated = [trace if trace.spans else next(fresh) for trace in traces]
    if not any(trace.spans for trace in annotated):
        raise LensteerError(
            f"annotator {run.annotators[0]!r} found no sentence in {len(annotated)} chains: take another annotator, or "
            "chains that think"
        )
    save_traces(annotated, run.path("annotated.jsonl"))
    write_json(run.path("annotator.json"), trust(run, traces))
    if own := judged_on_its_questions(run, given):
        run.note(
            f"The classifier was fitted on the questions of {len(own)} dev or held-out tasks (such as {own[0]}): its "
            "labels of their chains are not out of fold."
        )
    return {
        "given": len(given),
        "matched": sum(r.matched for r in reports),
        "repaired": sum(len(r.repaired) for r in reports),
        "dropped": sum(len(r.dropped) for r in reports),
        "unparsed": sum(t.n_unparsed for t in annotated),
    }


def _vectors(run: Run) -> dict[str, Any]:
    c = run.config
    options: dict[str, Any] = dict(n_controls=max(c.n_score_controls, c.n_controls), seed=c.seed)
    if c.pairs:
        vectors = fit_directions(run.model, pairs_of(run)[1], **options)
    else:
        traces = load_traces(run.path("annotated.jsonl"))
        vectors = fit_vectors(run.model, traces, window=c.window, negatives=_negatives(run, traces), **options)
    if not set(c.behaviors) & set(vectors.labels):
        raise LensteerError(
            f"the chains have sentences of {list(vectors.labels)} only, and of none that is steered "
            f"({list(c.behaviors)}): take another annotator, or longer chains"
        )
    for label in c.behaviors:
        n = vectors.counts.get(label, 0)
        if n < FEW_SPANS:
            words = f"rests on {n} {'pairs' if c.pairs else 'sentences'} only"
            words = words if n else "has no sentence in the chains and is left out"
            run.note(f"{label} {words}: {FEW_SPANS} or more are recommended for a vector.")
    vectors.save(run.path("vectors.safetensors"))
    return {"spans": dict(vectors.counts)}


def _negatives(run: Run, traces: Sequence[Trace]) -> str:
    """The run's negatives; all tokens if the sentences have a single label, so that there are none of another."""
    labels = {span.label for trace in traces for span in trace.spans}
    if len(labels) > 1 or run.config.negatives == "all":
        return run.config.negatives
    if not labels:
        raise LensteerError(f"{run.path('annotated.jsonl')}: {NO_SPANS}")
    (label,) = labels
    run.note(
        f"All sentences are {label}, so they are contrasted with all tokens: {run.config.negatives!r} has no others."
    )
    return "all"


def _attribute(run: Run) -> dict[str, Any]:
    c = run.config
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    traces = [trace for trace in load_traces(run.path("annotated.jsonl")) if trace.spans]
    some = score_chains(traces, c.score_chains, _steered(run, vectors))
    options: dict[str, Any] = dict(behaviors=_steered(run, vectors), max_spans=c.max_spans)
    options |= dict(coefficient=c.score_coefficient, unit=c.unit, seed=c.seed, progress=run.progress)
    scores = attribute(run.model, some, vectors, **options)
    scores.save(run.path("scores.json"))
    if c.n_score_controls:  # control vectors are nearly free where a vector enters as a dot product
        beside = attribute(run.model, some, vectors, method="fisher", n_controls=c.n_score_controls, **options)
        beside.save(run.path("controls.json"))
    embedding_overlap(run.model, vectors).save(run.path("overlap.json"))
    return {"method": scores.method}


def score_chains(traces: Sequence[Trace], n: int, behaviors: Sequence[str]) -> list[Trace]:
    """About `n` chains evenly from all (from all files, if several), and one more for each behavior that they lack."""
    chosen = list(traces[:: max(1, len(traces) // n)][:n])
    for label in behaviors:
        has = [trace for trace in traces if any(span.label == label for span in trace.spans)]
        if has and not any(trace in has for trace in chosen):
            chosen.append(has[0])
    return chosen


def _steered(run: Run, vectors: BehaviorVectors) -> list[str]:
    return [b for b in run.config.behaviors if b in vectors.labels]


def _select(run: Run) -> dict[str, Any]:
    c = run.config
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    labels = _steered(run, vectors)
    if c.layers:
        asked = dict(zip(c.behaviors, c.layers * (len(c.behaviors) if len(c.layers) == 1 else 1), strict=True))
        layers = SelectedLayers({b: asked[b] for b in labels}, dict.fromkeys(labels, "requested"))
    else:
        controls = LayerScores.load(run.path("controls.json")) if c.n_score_controls else None
        overlap = EmbeddingOverlap.load(run.path("overlap.json"))
        layers = select_layers(LayerScores.load(run.path("scores.json")), overlap, behaviors=labels, controls=controls)
    layers.save(run.path("layers.json"))
    annotators = annotators_of(run)
    _plan(run, annotators, labels)
    coefficients = choose_coefficients(
        run.model,
        run.tasks("dev"),
        vectors,
        layers,
        coefficients=c.coefficients,
        margins=run.margins,
        scope=SCOPES[c.scope],
        unit=c.unit,
        sampling=run.sampling(c.dev_samples),
        annotator=annotators or None,
        measure=run.measure,
        quality=c.quality // 2,
        seed=c.seed,
        path=run.path("coefficients.jsonl"),
        progress=run.progress,
    )
    coefficients.save(run.path("coefficients.json"))
    for label, pair in coefficients.pairs.items():
        for kind, trial in zip(KINDS, pair, strict=True):
            if trial is None:
                run.note(f"Every coefficient that pushes {label} {kind} breaks the text on dev tasks: it is not run.")
    if not coefficients.down and not coefficients.up:
        raise LensteerError(
            f"every one of the coefficients {list(c.coefficients)} breaks the text, for every behavior, down and up: "
            f"try smaller ones ({run.path('coefficients.json')} says what breaks)"
        )
    return {"layers": dict(layers), "down": coefficients.down, "up": coefficients.up}


def planned_chains(
    config: RunConfig, labels: Sequence[str], *, n_dev: int | None = None, n_layers: int = 1
) -> dict[str, int]:
    """How many chains a run generates to choose coefficients, for its own conditions, and for control vectors.

    Args:
        config: of the run.
        labels: the steered behaviors.
        n_dev: dev tasks that there are; None: as many as the configuration asks for.
        n_layers: distinct layers that are steered.
    """
    c, dev = config, config.n_dev if n_dev is None else n_dev
    few = c.n_test * min(c.control_samples, c.n_samples)
    return {
        "coefficients": dev * c.dev_samples * (1 + 2 * len(labels) * len(c.coefficients)),
        "own": c.n_test * c.n_samples * (1 + 2 * len(labels) + sum(label in BASELINE_PROMPTS for label in labels))
        + few * len(_forced(c, labels)),
        "controls": few * c.n_controls * len(_pools(c)) * n_layers,
    }


def _forced(config: RunConfig, labels: Iterable[str]) -> dict[str, str]:
    """The words of the forced-token baselines; none for the organism, which does not speak English."""
    return {} if config.tasks == "organism" else {b: FORCED_WORDS[b] for b in labels if b in FORCED_WORDS}


def _pools(config: RunConfig) -> tuple[str, ...]:
    return (*POOLS, *KL_POOLS) if config.kl_controls else POOLS


def _plan(run: Run, annotators: Mapping[str, Annotator], labels: Sequence[str]) -> None:
    """Base rates on dev tasks, and the power of the evaluation, before any long stage.

    Raises:
        LensteerError: the unsteered chains' own text counts as broken.
    """
    c = run.config
    begun = time.perf_counter()
    sampling = run.sampling(max(c.dev_samples, PLAN_SAMPLES if c.temperature else 1))
    base = run_conditions(
        run.model,
        run.tasks("dev"),
        [Condition(BASE, kind="unsteered")],
        sampling,
        annotator=annotators or None,
        measures={} if run.measure is None else dict.fromkeys(labels, run.measure),
        path=run.path("plan.jsonl"),
        progress=run.progress,
    )
    check_standard(base, run.margins)
    found = power(base, labels, n_tasks=c.n_test, n_samples=c.n_samples)
    rate = sum(r.length for r in base) / max(time.perf_counter() - begun, 1e-9)
    if run.path("plan.json").exists():  # the chains were read from disk, so there is no timing
        with reading(run.path("plan.json")):
            rate = revived(float, read_json(run.path("plan.json"))["tokens_per_second"])
            if not 0 < rate < math.inf:
                raise ValueError(f"{rate} tokens per second")
    per_chain = sum(r.length for r in base) / len(base)
    n_layers = len(set(SelectedLayers.load(run.path("layers.json")).values()))
    chains = planned_chains(c, labels, n_dev=len(run.tasks("dev")), n_layers=n_layers)
    minutes = sum(chains.values()) * per_chain / rate / 60
    plan = {"chains": chains, "tokens_per_chain": per_chain, "tokens_per_second": rate, "minutes": minutes}
    write_json(run.path("plan.json"), {**plan, "power": to_rows(found)})
    run.announce(
        f"plan: {', '.join(f'{n} chains ({what})' for what, n in chains.items())}; about {minutes:.0f} min at "
        f"{rate:.0f} tokens/s"
    )
    for p in found:
        if run.measure is not None:
            run.announce(
                f"plan: {p.behavior}: the mean score is {p.base:.3g} unsteered, of scores from "
                f"{min(r.scores[p.behavior] for r in base):.3g} to {max(r.scores[p.behavior] for r in base):.3g}; a "
                f"rise to {p.rise:.3g} or a fall to {p.fall:.3g} would be detected in 8 of 10 runs"
            )
            continue
        down = "a fall can be tested" if p.down else "too rare for a fall to be tested"
        rise = "no rise" if math.isnan(p.rise) else f"a rise to {p.rise:.1%}"
        run.announce(
            f"plan: {p.behavior} is {p.base:.1%} of sentences, about {p.events:.0f} unsteered; {rise} would be "
            f"detected in 8 of 10 runs; {down}"
        )
        if not p.down:
            run.note(
                f"{p.behavior}: about {p.events:.0f} sentences on {p.tasks:.0f} tasks are expected unsteered; a fall "
                f"is tested from {MIN_EVENTS} on {MIN_EVENT_TASKS}."
            )


def _evaluate(run: Run) -> dict[str, Any]:
    c = run.config
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    layers, coefficients = (
        SelectedLayers.load(run.path("layers.json")),
        ChosenCoefficients.load(run.path("coefficients.json")),
    )
    examples: dict[tuple[str, str, str], Trace] = {}
    first = [task.id for task in run.tasks("test")[:SHOWN_TASKS]]

    def keep(condition: Condition, trace: Trace) -> None:
        if trace.sample == 0 and trace.task.id in first and condition.kind in ("unsteered", *KINDS):
            examples[condition.behavior, condition.kind, trace.task.id] = trace

    evaluation = evaluate(
        run.model,
        run.tasks("test"),
        vectors,
        layers,
        coefficients.pairs,
        scope=SCOPES[c.scope],
        unit=c.unit,
        prompts={
            b: organism.cue(b) if c.tasks == "organism" else BASELINE_PROMPTS[b]
            for b in layers
            if b in BASELINE_PROMPTS
        },
        forced=_forced(c, layers),
        pools=_pools(c),
        n_controls=c.n_controls,
        control_samples=c.control_samples,
        sampling=run.sampling(c.n_samples),
        annotator=with_masks(annotators_of(run)) or None,
        measure=run.measure,
        margins=run.margins,
        quality=c.quality,
        coherence=coherence_of(run),
        seed=c.seed,
        path=run.path("evaluation.jsonl"),
        progress=run.progress,
        keep=keep,
    )
    evaluation.save(run.path("evaluation.json"))
    _examples(run, evaluation, examples, first)
    chains = sum(condition.chains for condition in evaluation.conditions)
    tested = [e for e in evaluation.effects if e.unit == evaluation.unit and not e.annotator]
    shown = [f"{e.behavior}/{e.kind}" for e in tested if e.shown]
    return {"chains": chains, "shown": shown}


def _examples(
    run: Run, evaluation: Evaluation, found: Mapping[tuple[str, str, str], Trace], tasks: Sequence[str]
) -> None:
    """The first held-out tasks, unsteered, and steered up along the behaviors that rose most; not cherry-picked."""
    rises = sorted(
        (e for e in evaluation.effects if e.kind == "up" and e.unit == evaluation.unit and not e.annotator),
        key=lambda e: -e.change.value,
    )
    rows = []
    for number, task in enumerate(tasks):
        shown = [("", "unsteered")]
        if rises:
            shown += [(rises[number % len(rises)].behavior, kind) for kind in KINDS]
        for behavior, kind in shown:
            if (trace := found.get((behavior, kind, task))) is not None:
                rows.append({"behavior": behavior, "kind": kind, "trace": asdict(trace)})
    write_jsonl(run.path(EXAMPLES), rows)


def render_report(run: Run) -> dict[str, Any]:
    """Write the page and the summary from the run's folder; rerun whenever it has new results."""
    results = load_results(run)
    write_atomically(run.path("summary.json"), json.dumps(summary(results), indent=1))
    write_atomically(run.path("report.html"), render(results))
    return {}


STAGES: dict[str, Callable[[Run], dict[str, Any]]] = {
    "traces": _traces,
    "annotate": _annotate,
    "vectors": _vectors,
    "attribute": _attribute,
    "select": _select,
    "evaluate": _evaluate,
    "report": render_report,
}

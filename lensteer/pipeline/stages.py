"""The stages of a run. A stage that is done is not redone; one that was cut off goes on where it was."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lensteer import organism
from lensteer.annotation import annotate_report
from lensteer.attribution import LayerScores, attribute
from lensteer.behaviors import STEERED
from lensteer.errors import LensteerError
from lensteer.evaluation import WORDS, Arm, Doses, Evaluation, choose_coefficients, evaluate, run_arms
from lensteer.files import write_atomically
from lensteer.overlap import EmbeddingOverlap, embedding_overlap
from lensteer.pipeline.chains import annotator_of, read_chains, trust
from lensteer.pipeline.results import load_results
from lensteer.pipeline.run import SCOPES, Run
from lensteer.report import render, summary
from lensteer.selection import Site, select_layers
from lensteer.steering import SteeringPlan
from lensteer.traces import Trace, generate_traces, load_traces, save_traces
from lensteer.vectors import BehaviorVectors, fit_vectors


def run_stage(run: Run, name: str) -> None:
    """Do one stage, unless it is done.

    Raises:
        LensteerError: no such stage, one before it is not done, or another process is at work on the run.
    """
    if name not in STAGES:
        raise LensteerError(f"no stage {name!r}: the stages are {list(STAGES)}")
    if name in run.stages:
        return
    before = list(STAGES)[: list(STAGES).index(name)]
    missing = [stage for stage in before if stage not in run.stages]
    if missing:
        raise LensteerError(f"stage {name!r} needs {missing} in {str(run.folder)!r}: do them first")
    begun = time.perf_counter()
    with run.locked():
        facts = STAGES[name](run)
        run.stages[name] = {"seconds": round(time.perf_counter() - begun, 2), **facts}
        run.write()


def complete(run: Run, announce: Callable[[str], object] | None = None) -> Path:
    """Do all stages that are not done; returns the report's path."""
    for name in STAGES:
        if announce is not None:
            announce(f"{name}: done already" if name in run.stages else f"{name} ...")
        run_stage(run, name)
    return run.path("report.html")


def _traces(run: Run) -> dict[str, Any]:
    c = run.config
    if c.chains is not None:
        traces = read_chains(c.chains, run.model)
        save_traces(traces, run.path("traces.jsonl"))
        return {"chains": len(traces), "tokens": sum(len(t.response_ids) for t in traces), "given": c.chains}
    traces = generate_traces(
        run.model,
        run.tasks("train"),
        temperature=c.temperature,
        seed=c.seed,
        max_new_tokens=c.max_new_tokens,
        batch_size=c.batch_size,
        path=run.path("traces.jsonl"),
        progress=run.progress,
    )
    return {"chains": len(traces), "tokens": sum(len(t.response_ids) for t in traces)}


def _annotate(run: Run) -> dict[str, Any]:
    traces = load_traces(run.path("traces.jsonl"))
    annotated, reports = annotate_report(traces, annotator_of(run))
    save_traces(annotated, run.path("annotated.jsonl"))
    write_atomically(run.path("annotator.json"), json.dumps(trust(run, traces, annotated), indent=1))
    return {
        "matched": sum(r.matched for r in reports),
        "repaired": sum(len(r.repaired) for r in reports),
        "dropped": sum(len(r.dropped) for r in reports),
        "unparsed": sum(t.n_unparsed for t in annotated),
    }


def _vectors(run: Run) -> dict[str, Any]:
    c = run.config
    traces = load_traces(run.path("annotated.jsonl"))
    options: dict[str, Any] = dict(window=c.window, negatives=c.negatives, n_controls=c.n_nulls, seed=c.seed)
    vectors = fit_vectors(run.model, traces, **options)
    if not set(STEERED) & set(vectors.labels):
        raise LensteerError(
            f"the chains have sentences of {list(vectors.labels)} only, and of none that is steered ({list(STEERED)}): "
            "take another annotator, or longer chains"
        )
    vectors.save(run.path("vectors.safetensors"))
    return {"spans": dict(vectors.counts)}


def _attribute(run: Run) -> dict[str, Any]:
    c = run.config
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    traces = load_traces(run.path("annotated.jsonl"))
    options: dict[str, Any] = dict(behaviors=[b for b in STEERED if b in vectors.labels], max_spans=c.max_spans)
    options |= dict(seed=c.seed, progress=run.progress)
    scores = attribute(run.model, traces, vectors, **options)
    scores.save(run.path("scores.json"))
    if c.n_nulls:  # control vectors are nearly free where a vector enters as a dot product
        beside = attribute(run.model, traces, vectors, method="fisher", nulls=c.n_nulls, **options)
        beside.save(run.path("nulls.json"))
    embedding_overlap(run.model, vectors).save(run.path("overlap.json"))
    return {"method": scores.method}


def _select(run: Run) -> dict[str, Any]:
    c = run.config
    site = select_layers(LayerScores.load(run.path("scores.json")), EmbeddingOverlap.load(run.path("overlap.json")))
    site.save(run.path("site.json"))
    doses = choose_coefficients(
        run.model,
        run.tasks("dev"),
        BehaviorVectors.load(run.path("vectors.safetensors"), run.model),
        site,
        doses=c.doses,
        min_parsed=c.min_parsed,
        scope=SCOPES[c.scope],
        sampling=run.sampling(1),
        annotator=annotator_of(run),
        path=run.path("doses.jsonl"),
        progress=run.progress,
    )
    doses.save(run.path("doses.json"))
    return {"layers": dict(site), "coefficients": doses.coefficients}


def _evaluate(run: Run) -> dict[str, Any]:
    c = run.config
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"), run.model)
    site, doses = Site.load(run.path("site.json")), Doses.load(run.path("doses.json"))
    evaluation = evaluate(
        run.model,
        run.tasks("test"),
        vectors,
        site,
        doses.coefficients,
        scope=SCOPES[c.scope],
        words={b: organism.cue(b) if c.tasks == "organism" else WORDS[b] for b in site},
        n_random=c.n_random,
        sampling=run.sampling(c.n_samples),
        annotator=annotator_of(run),
        seed=c.seed,
        path=run.path("evaluation.jsonl"),
        progress=run.progress,
    )
    evaluation.save(run.path("evaluation.json"))
    _examples(run, vectors, evaluation, doses)
    chains = len(evaluation.arms) * evaluation.n_tasks * evaluation.n_samples
    shown = [f"{e.behavior}/{e.kind}" for e in evaluation.effects if e.shown and e.unit == "sentences"]
    return {"chains": chains, "shown": shown}


def _examples(run: Run, vectors: BehaviorVectors, evaluation: Evaluation, doses: Doses) -> None:
    """One test task unsteered, and steered down and up along the behavior that moved most."""
    most = max((e for e in evaluation.effects if e.kind == "up" and e.unit == "sentences"), key=lambda e: e.change)
    scope, strength = SCOPES[run.config.scope], doses.coefficients[most.behavior]
    plans = {
        f"{most.behavior}/{kind}": SteeringPlan(vectors[most.behavior], most.layer, sign * strength, scope)
        for kind, sign in (("down", -1), ("up", 1))
    }
    found: dict[str, Trace] = {}
    arms = [Arm("unsteered"), *(Arm(name, plan) for name, plan in plans.items())]
    one = run.tasks("test")[:1]
    run_arms(run.model, one, arms, run.sampling(1), annotator=annotator_of(run), keep=found.__setitem__)
    lines = [json.dumps({"arm": arm, "trace": json.loads(trace.to_json())}) + "\n" for arm, trace in found.items()]
    write_atomically(run.path("examples.jsonl"), "".join(lines))


def render_report(run: Run) -> dict[str, Any]:
    """Write the page and the summary from what is in a run's folder; done again whenever more is in it."""
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

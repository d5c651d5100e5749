"""A finished run's plans, with what the run measured for them."""

from __future__ import annotations

from dataclasses import replace

from lensteer.errors import LensteerError
from lensteer.evaluation import Evaluation
from lensteer.pipeline.chains import EXAMPLES, read_examples
from lensteer.pipeline.run import Run
from lensteer.steering import Sample, SteeringPlan
from lensteer.vectors import BehaviorVectors


def evaluated_plan(run: Run, behavior: str, sign: int = 1) -> SteeringPlan:
    """The plan that a run evaluated for a behavior, with its evidence: figures, sample texts, sampling.

    Args:
        run: a run whose stage `evaluate` is done.
        behavior: that it steered.
        sign: +1 for the direction added, -1 for it taken away.

    Raises:
        LensteerError: the stage is not done, or no such behavior or sign was evaluated.
    """
    if "evaluate" not in run.stages:
        raise LensteerError(f"{str(run.folder)!r} has no evaluation yet: finish the run, by `lensteer evaluate`")
    vectors = BehaviorVectors.load(run.path("vectors.safetensors"))
    evaluation = Evaluation.load(run.path("evaluation.json"))
    if behavior not in evaluation.behaviors:
        raise LensteerError(f"no behavior {behavior!r} in {str(run.folder)!r}: it steered {list(evaluation.behaviors)}")
    plan = evaluation.plan(vectors, behavior, sign)
    assert plan.evidence is not None
    drawn, c = run.sampling(run.config.n_samples), run.config
    sampling = {name: getattr(drawn, name) for name in ("temperature", "top_p", "max_new_tokens", "prefill", "system")}
    evidence = replace(
        plan.evidence,
        annotator="" if c.measure else next(iter(run.annotators), ""),
        samples=_samples(run, behavior, "up" if sign == 1 else "down"),
        sampling={**sampling, "tasks": c.tasks},
    )
    return replace(plan, evidence=evidence)


def _samples(run: Run, behavior: str, kind: str) -> tuple[Sample, ...]:
    """The run's example chains: held-out tasks on which this condition was kept, and the same unsteered."""
    plain, steered = {}, {}
    for example in read_examples(run) if run.path(EXAMPLES).exists() else ():
        if example.kind == "unsteered":
            plain[example.trace.task.id] = example.trace
        elif (example.behavior, example.kind) == (behavior, kind):
            steered[example.trace.task.id] = example.trace
    return tuple(
        Sample(steered[task].task.prompt, plain[task].response, steered[task].response)
        for task in steered
        if task in plain
    )

"""`RunResults`: everything that a report shows, as the stages of a run made it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from lensteer.attribution import LayerScores
from lensteer.evaluation import Doses, Evaluation
from lensteer.geometry import CosineMatrix
from lensteer.overlap import EmbeddingOverlap
from lensteer.selection import Site
from lensteer.traces import Trace
from lensteer.vectors import BehaviorVectors


class Example(NamedTuple):
    """A chain on a held-out task, and what was done: kind "unsteered", or "down" or "up" along a behavior."""

    behavior: str
    kind: str
    trace: Trace


@dataclass(frozen=True, eq=False)
class RunResults:
    """The results of one run.

    Attributes:
        title: of the page.
        model: which model, as `ModelId.to_dict()` says it.
        config: the settings of the run; values of any kind, shown as text.
        traces: the annotated chains that the vectors come from.
        annotator: who labeled the chains, and flat figures on how good that is.
        alignment: chains with labels "given", sentences "matched", "repaired", "dropped" and "unparsed".
        vectors: of the behaviors.
        overlap: of the vectors with single tokens.
        scores: by layer.
        site: the selected layers.
        nulls: scores by layer with those of control vectors, if any were made.
        cosine: between the vectors.
        doses: by which the coefficients were chosen, on dev tasks.
        evaluation: on held-out tasks.
        seconds: what each stage took.
        reference: the `summary` of an earlier, larger run, shown beside this one's figures and labelled.
        examples: chains, task by task: unsteered, and steered.
        plan: what the run said beforehand: chains by stage, and "power" by behavior.
        notes: warnings that came up on the way.
        cache: of a one-shot cache edit, if one was measured: "c_values", facts on the "vector", "test" (`Modes`).
    """

    title: str
    model: Mapping[str, Any]
    config: Mapping[str, Any]
    traces: Sequence[Trace]
    annotator: Mapping[str, Any]
    alignment: Mapping[str, int]
    vectors: BehaviorVectors
    overlap: EmbeddingOverlap
    scores: LayerScores
    site: Site
    cosine: CosineMatrix
    doses: Doses
    evaluation: Evaluation
    seconds: Mapping[str, float | int]
    reference: Mapping[str, Any] | None = None
    examples: Sequence[Example] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    cache: Mapping[str, Any] | None = None
    nulls: LayerScores | None = None

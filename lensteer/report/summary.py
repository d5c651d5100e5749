"""Everything that a report shows (`RunResults`), and every figure of it by name: flat and JSON-ready.

Names are dotted paths such as `effect.backtracking.up.sentences.change`; the page shows only these. Numbers that are
not finite are `None`.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

from lensteer.attribution import LayerScores, control_tests
from lensteer.attribution.overlap import SIDES, EmbeddingOverlap
from lensteer.attribution.selection import SelectedLayers
from lensteer.evaluation import FIGURES, KINDS, ChosenCoefficients, ConditionSummary, Evaluation, Modes
from lensteer.evaluation.results import LEVEL, MIN_EVENT_TASKS, MIN_EVENTS, SHOWN
from lensteer.statistics import Estimate, flat
from lensteer.traces import Trace, label_axis
from lensteer.vectors import BehaviorVectors
from lensteer.vectors.geometry import CosineMatrix


class Example(NamedTuple):
    """A chain on a held-out task, and its condition: kind "unsteered", or "down" or "up" along a behavior."""

    behavior: str
    kind: str
    trace: Trace


@dataclass(frozen=True, eq=False)
class RunResults:
    """The results of one run.

    Attributes:
        title: of the page.
        model: from `ModelId.to_dict()`.
        config: the settings of the run; values of any kind, shown as text.
        traces: the annotated chains that the vectors come from.
        annotator: the annotator of the chains, and flat figures on its accuracy.
        alignment: chains with labels "given", sentences "matched", "repaired", "dropped" and "unparsed".
        vectors: of the behaviors.
        overlap: of the vectors with single tokens.
        scores: by layer.
        layers: the selected layers.
        controls: scores by layer with those of control vectors, if there are any.
        cosine: between the vectors.
        coefficients: their curves and the choice on dev tasks.
        evaluation: on held-out tasks.
        seconds: of each stage.
        reference: the `summary` of an earlier, larger run, shown next to this run's figures with a label.
        examples: chains, task by task: unsteered, and steered.
        plan: from before the evaluation: chains by stage, and "power" by behavior.
        notes: warnings of the stages.
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
    layers: SelectedLayers
    cosine: CosineMatrix
    coefficients: ChosenCoefficients
    evaluation: Evaluation
    seconds: Mapping[str, float | int]
    reference: Mapping[str, Any] | None = None
    examples: Sequence[Example] = ()
    plan: Mapping[str, Any] = field(default_factory=dict)
    notes: Sequence[str] = ()
    cache: Mapping[str, Any] | None = None
    controls: LayerScores | None = None


Value = float | int | str | bool | None

#: Keys that differ from the current names of fields and kinds, to keep summaries compatible.
_KEYS = {
    "coefficients": "doses",
    "n_controls": "n_random",
    "n_score_controls": "n_nulls",
    "control_low": "null_low",
    "control_high": "null_high",
    "prompted": "words",
}
_SCORE_KEYS = {"coefficient_unit": "scaling", "spans": "positions"}
_NOT_A_MEAN = {"condition", "kind", "behavior", "pool", "layer", "text", "clean"}
CONDITION_FIELDS = tuple(f.name for f in fields(ConditionSummary) if f.name not in _NOT_A_MEAN)


def summary(results: RunResults) -> dict[str, Value]:
    """All figures of a run.

    `shown.<behavior>.up` and `.down` say whether the effect is shown; `shown.<behavior>.up_verdict` and `.down_verdict`
    are the verdicts, see `Effect.verdict`.
    """
    found: dict[str, Any] = {"title": results.title}
    found |= {f"model.{name}": value for name, value in results.model.items()}
    found |= {f"config.{key_of(name)}": value for name, value in results.config.items()}
    found |= {f"annotator.{name}": value for name, value in results.annotator.items()}
    found |= {f"alignment.{name}": value for name, value in results.alignment.items()}
    found |= {f"note.{number}": note for number, note in enumerate(results.notes)}
    found |= (
        _traces(results)
        | _where(results)
        | _cosines(results)
        | _coefficients(results.coefficients)
        | _plan(results.plan)
    )
    found |= _effects(results.evaluation) | _conditions(results.evaluation) | _cost(results) | _cache(results)
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Value:
    """JSON values as they are; others as text."""
    if value is None or isinstance(value, (bool, str, int)):
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return json.dumps(value, default=str, ensure_ascii=False)


def _traces(results: RunResults) -> dict[str, Any]:
    traces, vectors = results.traces, results.vectors
    found: dict[str, Any] = {
        "traces.n": len(traces),
        "traces.tasks": len({trace.task.id for trace in traces}),
        "traces.tokens": sum(len(trace.response_ids) for trace in traces),
        "traces.finished": sum(trace.finished for trace in traces),
        "traces.unparsed": sum(trace.n_unparsed for trace in traces),
        "vectors.n_traces": vectors.n_traces,
        "vectors.window": vectors.recipe.window,
        "vectors.negatives": vectors.recipe.negatives,
    }
    for label, layer in results.layers.items():
        direction = vectors[label]
        length = float(direction.at(layer).norm())
        found[f"vectors.{label}.length"] = length
        found[f"vectors.{label}.relative_length"] = length / float(direction.scaled(layer, "mean_norm").norm())
    for label in label_axis(traces):
        found[f"traces.spans.{label}"] = sum(span.label == label for trace in traces for span in trace.spans)
        if label in vectors.labels:
            found[f"vectors.spans.{label}"] = vectors.counts.get(label)
    return found


def _where(results: RunResults) -> dict[str, Any]:
    scores, overlap, layers = results.scores, results.overlap, results.layers
    names = ("method", "coefficient", "coefficient_unit", "spans", "n_traces", "n_layers", "noise_floor")
    found: dict[str, Any] = {f"scores.{_SCORE_KEYS.get(name, name)}": getattr(scores, name) for name in names}
    for b, label in enumerate(scores.labels):
        found[f"scores.{label}.n_spans"] = scores.n_spans[b]
        for i, layer in enumerate(scores.layers):
            for name in ("mean", "low", "high"):
                found[f"scores.{label}.L{layer}.{name}"] = float(getattr(scores, name)[b, i])
    for label, layer in layers.items():
        found |= {f"site.{label}.layer": layer, f"site.{label}.why": layers.why[label]}
    for b, label in enumerate(overlap.labels):
        for i, layer in enumerate(overlap.layers):
            for side in SIDES:
                found[f"overlap.{label}.L{layer}.{side}"] = float(getattr(overlap, side).maximum[b, i])
        if label in layers and layers[label] in overlap.layers:
            for side in SIDES:
                for rank, (text, cosine) in enumerate(overlap.nearest(label, layers[label], side)):
                    found[f"nearest.{label}.{side}.{rank}.token"] = text
                    found[f"nearest.{label}.{side}.{rank}.cosine"] = cosine
    return found | _controls(results)


def _controls(results: RunResults) -> dict[str, Any]:
    if results.controls is None:
        return {}
    tests = control_tests(results.controls)
    found: dict[str, Any] = {"nulls.n": tests.n, "nulls.method": results.controls.method}
    for k, kind in enumerate(tests.kinds):
        found[f"nulls.{kind}.p_any"] = tests.p_any(kind)
        for label, layer in results.layers.items():
            if label in tests.labels and layer in tests.layers:
                cell = k, tests.labels.index(label), tests.layers.index(layer)
                for name in ("z", "p", "p_max"):
                    found[f"nulls.{label}.{kind}.{name}"] = float(getattr(tests, name)[cell])
    return found


def _cosines(results: RunResults) -> dict[str, Any]:
    matrix, found = results.cosine, {}
    for i, first in enumerate(matrix.labels):
        for j, second in enumerate(matrix.labels):
            found[f"cosine.{first}.{second}"] = float(matrix.values[i, j])
            if matrix.low is not None and matrix.high is not None:
                found[f"cosine.{first}.{second}.low"] = float(matrix.low[i, j])
                found[f"cosine.{first}.{second}.high"] = float(matrix.high[i, j])
    return found


def _coefficients(coefficients: ChosenCoefficients) -> dict[str, Any]:
    found: dict[str, Any] = {
        "doses.n_tasks": coefficients.n_tasks,
        "doses.n_samples": coefficients.n_samples,
        "doses.unit": coefficients.coefficient_unit,
    }
    found |= {f"doses.margin.{name}": value for name, value in asdict(coefficients.margins).items()}
    for label, (down, up) in coefficients.pairs.items():
        found |= {f"doses.{label}.down": down, f"doses.{label}.up": up}
    for trial in coefficients.curve:
        path = f"doses.{trial.behavior}.{trial.coefficient:+.3g}"
        found |= {f"{path}.share": trial.share, f"{path}.length": trial.length, f"{path}.readable": trial.readable}
        for figure in () if trial.text is None else trial.text.figures:
            found |= {f"{path}.{figure.name}": figure.value, f"{path}.{figure.name}.ok": figure.ok}
    for each in coefficients.responses:
        path = f"response.{each.behavior}"
        for name in ("spearman", "slope", "odd", "even"):
            found |= _ends(f"{path}.{name}", getattr(each, name))
        found |= {f"{path}.linear": each.linear, f"{path}.at": each.at}
        for name in ("breaks", "accuracy_falls"):
            found |= dict(zip((f"{path}.{name}.down", f"{path}.{name}.up"), getattr(each, name), strict=True))
        for point in each.points:
            found |= _ends(f"{path}.{point.coefficient:+.3g}.share", point.share)
    return found


def _ends(path: str, estimate: Estimate) -> dict[str, Any]:
    return {path: estimate.value, f"{path}_low": estimate.low, f"{path}_high": estimate.high}


def _plan(plan: Mapping[str, Any]) -> dict[str, Any]:
    found = {f"plan.{name}": value for name, value in plan.items() if not isinstance(value, (dict, list))}
    found |= {f"plan.chains.{key_of(name)}": n for name, n in plan.get("chains", {}).items()}
    for row in plan.get("power", ()):
        found |= {f"power.{row['behavior']}.{name}": value for name, value in row.items() if name != "behavior"}
    return found


def _effects(evaluation: Evaluation) -> dict[str, Any]:
    names = ("n_tasks", "n_samples", "n_controls", "control_samples", "scope", "coefficient_unit")
    found: dict[str, Any] = {f"evaluation.{key_of(name)}": getattr(evaluation, name) for name in names}
    first = evaluation.annotators[0]
    for effect in evaluation.effects:
        kind = key_of(effect.kind)
        path = f"effect.{effect.behavior}.{kind}.{effect.unit}"
        if effect.annotator:
            path = f"by.{effect.annotator}.{effect.behavior}.{kind}"
        for name, value in flat(effect).items():
            if name not in ("behavior", "kind", "unit", "annotator", "controls"):
                found[f"{path}.{key_of(name).removeprefix('change_')}"] = value
        for pool in effect.controls:
            values = {name: value for name, value in asdict(pool).items() if name != "pool"}
            found |= {f"{path}.{pool.pool}.{name}": value for name, value in values.items()}
        found |= {f"{path}.shown": effect.shown, f"{path}.verdict": effect.verdict}
    found |= {f"annotators.{i}": name or first for i, name in enumerate(evaluation.annotators)}
    counts: dict[str, dict[str, int]] = {kind: {} for kind in KINDS}
    for label in evaluation.behaviors:
        verdicts = {kind: evaluation.verdict(label, kind) for kind in KINDS}
        for kind, verdict in verdicts.items():
            found |= {f"shown.{label}.{kind}": verdict == SHOWN, f"shown.{label}.{kind}_verdict": verdict}
            counts[kind][verdict] = counts[kind].get(verdict, 0) + 1
        found[f"shown.{label}.verdict"] = (
            "shown in both directions"
            if set(verdicts.values()) == {SHOWN}
            else "; ".join(f"{kind}: {verdict}" for kind, verdict in verdicts.items())
        )
    for kind, by_verdict in counts.items():
        found |= {f"shown.n_{kind}": by_verdict.get(SHOWN, 0)}
        found |= {f"shown.n_{kind}.{verdict}": n for verdict, n in by_verdict.items()}
    found |= {"test.level": LEVEL, "test.min_events": MIN_EVENTS, "test.min_event_tasks": MIN_EVENT_TASKS}
    found["shown.n_behaviors"] = len(evaluation.behaviors)
    found["shown.n_both"] = sum(
        all(evaluation.verdict(label, kind) == SHOWN for kind in KINDS) for label in evaluation.behaviors
    )
    found["shown.n_tested"] = sum(
        not math.isnan(e.p_holm)
        for e in evaluation.effects
        if e.unit == evaluation.unit and not e.annotator and e.kind in KINDS
    )
    return found


def _conditions(evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {}
    chance: dict[str, list[ConditionSummary]] = {}
    broken = 0
    for condition in evaluation.conditions:
        if condition.kind == "control":
            chance.setdefault(f"L{condition.layer}.{condition.pool}", []).append(condition)
            continue
        path = condition_key(condition.condition)
        values = flat(condition)
        found |= {f"{path}.{name}": values[name] for name in (*CONDITION_FIELDS, "accuracy_low", "accuracy_high")}
        if condition.text is not None:
            found |= {f"{path}.text": condition.text.ok, f"{path}.text_why": condition.text.why}
            broken += not condition.text.ok
        if condition.clean is not None:
            for name in ("kl_p50", "kl_p95", "nll"):
                found |= _ends(f"{path}.clean.{name}", getattr(condition.clean, name))
            found[f"{path}.clean.n"] = condition.clean.n
    for each in evaluation.side_effects:
        path = f"side.{condition_key(each.condition).removeprefix('arm.')}.{each.measured}"
        found |= {f"{path}.base": each.base.value, **_ends(f"{path}.change", each.change), f"{path}.p": each.p}
    found["text.n_broken"] = broken
    for name, conditions in chance.items():
        found |= {
            f"random.{name}.n": len(conditions),
            f"random.{name}.n_broken": sum(_breaks(condition) for condition in conditions),
        }
        for figure in CONDITION_FIELDS:
            found[f"random.{name}.{figure}.min"], found[f"random.{name}.{figure}.max"] = _range(conditions, figure)
    return found


def condition_key(name: str) -> str:
    """The prefix of a condition's keys: "arm.backtracking.words" for "backtracking/prompted"."""
    return ".".join(["arm", *map(key_of, name.split("/"))])


def key_of(name: str) -> str:
    """What a field or a kind of condition is called in keys."""
    return _KEYS.get(name, name)


def _breaks(condition: ConditionSummary) -> bool:
    return condition.text is not None and not condition.text.ok


def _range(conditions: Iterable[ConditionSummary], name: str) -> tuple[float | int | None, float | int | None]:
    values = [
        value for condition in conditions if (value := flat(condition)[name]) is not None and math.isfinite(value)
    ]
    return min(values, default=None), max(values, default=None)


def _cache(results: RunResults) -> dict[str, Any]:
    if results.cache is None:
        return {}
    test: Modes = results.cache["test"]
    found: dict[str, Any] = {"cache.c_values": results.cache["c_values"], "cache.n_tasks": test.n_tasks}
    found["cache.unit"] = results.cache.get("unit", "difference")
    found |= {f"cache.vector.{name}": value for name, value in results.cache["vector"].items() if name != "model"}
    drawn = [condition for condition in test.conditions if condition.kind == "control"]
    found["cache.n_random"] = len(drawn)
    for figure in FIGURES:
        for condition in test.conditions:
            estimate = None if condition in drawn else getattr(condition, figure)
            if estimate is not None:
                ends = {"mean": estimate.value, "low": estimate.low, "high": estimate.high}
                found |= {f"cache.{condition.condition}.{figure}.{end}": value for end, value in ends.items()}
        values = [e.value for e in (getattr(condition, figure) for condition in drawn) if e is not None]
        found[f"cache.random.{figure}.min"] = min(values, default=None)
        found[f"cache.random.{figure}.max"] = max(values, default=None)
    return found


def _cost(results: RunResults) -> dict[str, Any]:
    evaluation, seconds = results.evaluation, results.seconds
    settings = {(d.behavior, d.coefficient) for d in results.coefficients.curve if d.coefficient}
    found: dict[str, Any] = {f"seconds.{stage}": float(value) for stage, value in seconds.items()}
    found["seconds.total"] = float(sum(seconds.values()))
    found |= {
        "cost.evaluation.arms": len(evaluation.conditions),
        "cost.evaluation.chains": sum(condition.chains for condition in evaluation.conditions),
        "cost.evaluation.tokens": sum(
            round(condition.length * condition.chains) for condition in evaluation.conditions
        ),
        "cost.doses.arms": 1 + len(settings),
    }
    return found | {f"cost.scores.{name}": value for name, value in results.scores.cost.items()}

"""Every figure of the report by name: flat, JSON-ready, `None` where something is not a finite number.

Names are dotted paths such as `effect.backtracking.up.sentences.change`; the page shows nothing but these.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, fields
from typing import Any

from lensteer.attribution import null_tests
from lensteer.behaviors import BEHAVIORS
from lensteer.evaluation import FIGURES, ArmSummary, Doses, Evaluation, Modes
from lensteer.overlap import SIDES
from lensteer.report.results import RunResults

Value = float | int | str | bool | None

#: Whether a behavior moved as wanted when pushed (up, down), in words.
VERDICTS = {
    (True, True): "shown in both directions",
    (True, False): "only up",
    (False, True): "only down",
    (False, False): "not shown",
}
ARM_FIELDS = tuple(f.name for f in fields(ArmSummary) if f.name not in ("arm", "accuracy_low", "accuracy_high"))


def summary(results: RunResults) -> dict[str, Value]:
    """All figures of a run.

    `shown.<behavior>.up` and `.down` say whether steering did what it claims: a change of the wanted sign, an interval
    that excludes 0, and no random vector that does as much.
    """
    found: dict[str, Any] = {"title": results.title}
    found |= {f"model.{name}": value for name, value in results.model.items()}
    found |= {f"config.{name}": value for name, value in results.config.items()}
    found |= {f"annotator.{name}": value for name, value in results.annotator.items()}
    found |= {f"alignment.{name}": value for name, value in results.alignment.items()}
    found |= _traces(results) | _where(results) | _cosines(results) | _doses(results.doses)
    found |= _effects(results.evaluation) | _arms(results.evaluation) | _cost(results) | _cache(results)
    return {name: _plain(value) for name, value in found.items()}


def _plain(value: Any) -> Value:
    """As JSON has it; other things as text."""
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
    for label in BEHAVIORS:
        found[f"traces.spans.{label}"] = sum(span.label == label for trace in traces for span in trace.spans)
        if label in vectors.labels:
            found[f"vectors.spans.{label}"] = vectors.counts.get(label)
    return found


def _where(results: RunResults) -> dict[str, Any]:
    scores, overlap, site = results.scores, results.overlap, results.site
    names = ("method", "coefficient", "scaling", "positions", "n_traces", "n_layers", "noise_floor")
    found: dict[str, Any] = {f"scores.{name}": getattr(scores, name) for name in names}
    for b, label in enumerate(scores.labels):
        found[f"scores.{label}.n_spans"] = scores.n_spans[b]
        for i, layer in enumerate(scores.layers):
            for name in ("mean", "low", "high"):
                found[f"scores.{label}.L{layer}.{name}"] = float(getattr(scores, name)[b, i])
    for label, layer in site.items():
        found |= {f"site.{label}.layer": layer, f"site.{label}.why": site.why[label]}
    for b, label in enumerate(overlap.labels):
        for i, layer in enumerate(overlap.layers):
            for side in SIDES:
                found[f"overlap.{label}.L{layer}.{side}"] = float(getattr(overlap, side).maximum[b, i])
        if label in site and site[label] in overlap.layers:
            for side in SIDES:
                for rank, (text, cosine) in enumerate(overlap.nearest(label, site[label], side)):
                    found[f"nearest.{label}.{side}.{rank}.token"] = text
                    found[f"nearest.{label}.{side}.{rank}.cosine"] = cosine
    return found | _nulls(results)


def _nulls(results: RunResults) -> dict[str, Any]:
    if results.nulls is None:
        return {}
    tests = null_tests(results.nulls)
    found: dict[str, Any] = {"nulls.n": tests.n, "nulls.method": results.nulls.method}
    for k, kind in enumerate(tests.kinds):
        found[f"nulls.{kind}.p_any"] = tests.p_any(kind)
        for label, layer in results.site.items():
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


def _doses(doses: Doses) -> dict[str, Any]:
    found: dict[str, Any] = {"doses.n_tasks": doses.n_tasks, "doses.min_parsed": doses.min_parsed}
    found |= {f"doses.{label}.coefficient": value for label, value in doses.coefficients.items()}
    for dose in doses.curve:
        for name in ("share", "parsed"):
            found[f"doses.{dose.behavior}.{dose.coefficient:+g}.{name}"] = getattr(dose, name)
    return found


def _effects(evaluation: Evaluation) -> dict[str, Any]:
    names = ("n_tasks", "n_samples", "n_random", "scope")
    found: dict[str, Any] = {f"evaluation.{name}": getattr(evaluation, name) for name in names}
    found["evaluation.smallest_p"] = 1 / (1 + evaluation.n_random)
    shown: dict[str, dict[str, bool]] = {}
    for effect in evaluation.effects:
        path = f"effect.{effect.behavior}.{effect.kind}.{effect.unit}"
        for field in fields(effect):
            if field.name not in ("behavior", "kind", "unit"):
                found[f"{path}.{field.name}"] = getattr(effect, field.name)
        found[f"{path}.shown"] = effect.shown
        if effect.unit == "sentences":
            shown.setdefault(effect.behavior, {})[effect.kind] = effect.shown
    for label, kinds in shown.items():
        up, down = kinds.get("up", False), kinds.get("down", False)
        found |= {f"shown.{label}.up": up, f"shown.{label}.down": down}
        found[f"shown.{label}.verdict"] = VERDICTS[up, down]
    found["shown.n_behaviors"] = len(shown)
    found["shown.n_both"] = sum(bool(kinds.get("up") and kinds.get("down")) for kinds in shown.values())
    return found


def random_arm(name: str) -> str | None:
    """The layer of an arm with a random vector ("L4"), or None for any other arm."""
    layer, _, vector = name.partition("/")
    return layer if vector.startswith("random-") else None


def _arms(evaluation: Evaluation) -> dict[str, Any]:
    found: dict[str, Any] = {}
    chance: dict[str, list[ArmSummary]] = {}
    for arm in evaluation.arms:
        layer = random_arm(arm.arm)
        if layer is not None:
            chance.setdefault(layer, []).append(arm)
            continue
        for name in (*ARM_FIELDS, "accuracy_low", "accuracy_high"):
            found[f"arm.{arm.arm.replace('/', '.')}.{name}"] = getattr(arm, name)
    for layer, arms in chance.items():
        found[f"random.{layer}.n"] = len(arms)
        for name in ARM_FIELDS:
            found[f"random.{layer}.{name}.min"], found[f"random.{layer}.{name}.max"] = _range(arms, name)
    return found


def _range(arms: Iterable[ArmSummary], name: str) -> tuple[float, float]:
    values = [getattr(arm, name) for arm in arms]
    return min(values), max(values)


def _cache(results: RunResults) -> dict[str, Any]:
    if results.cache is None:
        return {}
    test: Modes = results.cache["test"]
    found: dict[str, Any] = {"cache.c_values": results.cache["c_values"], "cache.n_tasks": test.n_tasks}
    found |= {f"cache.vector.{name}": value for name, value in results.cache["vector"].items() if name != "model"}
    drawn = [arm for arm in test.arms if arm.arm.startswith("random-")]
    found["cache.n_random"] = len(drawn)
    for figure in FIGURES:
        for arm in test.arms:
            estimate = None if arm in drawn else getattr(arm, figure)
            if estimate is not None:
                found |= {f"cache.{arm.arm}.{figure}.{end}": value for end, value in asdict(estimate).items()}
        values = [e.mean for e in (getattr(arm, figure) for arm in drawn) if e is not None]
        found[f"cache.random.{figure}.min"] = min(values, default=None)
        found[f"cache.random.{figure}.max"] = max(values, default=None)
    return found


def _cost(results: RunResults) -> dict[str, Any]:
    evaluation, seconds = results.evaluation, results.seconds
    per_arm = evaluation.n_tasks * evaluation.n_samples
    settings = {(d.behavior, d.coefficient) for d in results.doses.curve if d.coefficient}
    found: dict[str, Any] = {f"seconds.{stage}": float(value) for stage, value in seconds.items()}
    found["seconds.total"] = float(sum(seconds.values()))
    found |= {
        "cost.evaluation.arms": len(evaluation.arms),
        "cost.evaluation.chains": len(evaluation.arms) * per_arm,
        "cost.evaluation.tokens": sum(round(arm.length * per_arm) for arm in evaluation.arms),
        "cost.doses.arms": 1 + len(settings),
    }
    return found | {f"cost.scores.{name}": value for name, value in results.scores.cost.items()}


def part(found: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """The entries under a dotted prefix, without it, in their order."""
    return {name[len(prefix) + 1 :]: value for name, value in found.items() if name.startswith(prefix + ".")}

"""Model cards: what a plan does, what was measured, and what was not, as Markdown."""

from __future__ import annotations

import math
from collections.abc import Sequence

from lensteer._version import __version__
from lensteer.models import ModelId
from lensteer.positions import everywhere
from lensteer.statistics import Estimate
from lensteer.steering import Evidence, Plan, SteeringPlan
from lensteer.steering.plans import UNIT_WORDS

_SAMPLE = 600  # characters of each sample text
_NOT_EVALUATED = (
    "**Not evaluated.** Nothing is known about what this plan does: no effect, control or text quality was measured "
    "for it."
)


def plan_name(plan: Plan) -> str:
    """The names of a plan's directions."""
    return " + ".join(dict.fromkeys(edit.direction.label for edit in plan.edits))


def front_matter(tags: Sequence[str], base_model: str, license_name: str) -> str:
    """The YAML block of a card on the hub; the base model is named if it is one of the hub."""
    lines = ["---", "library_name: lensteer" if "steering-vector" in tags else "library_name: transformers"]
    if base_model.count("/") == 1 and not base_model.startswith(("/", ".")):
        lines += [f"base_model: {base_model}"]
    if license_name:
        lines += [f"license: {license_name}"]
    return "\n".join([*lines, "tags:", *(f"- {tag}" for tag in tags), "---"])


def edits_table(plan: Plan) -> str:
    """A row per edit."""
    rows = [
        "| direction | layer | operator | coefficient | its unit | length added | scope |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for edit in plan.edits:
        added = f"{edit.length:.4g}" if edit.constant else "none" if edit.operator != "add" else "varies"
        parts = [f"`{edit.scope.name}`", *(str(part) for part in (edit.gate, edit.schedule) if part is not None)]
        rows.append(
            f"| {edit.direction.label} | {edit.layer} | {edit.operator} | {edit.coefficient:g} | {_unit(edit)} | "
            f"{added} | {', '.join(parts)} |"
        )
    return "\n".join(rows)


def _unit(edit: SteeringPlan) -> str:
    """What a coefficient of 1 does."""
    words = {
        "add": UNIT_WORDS[edit.unit],
        "project_out": "1 = removes the direction",
        "clamp": f"the projection becomes coefficient × {float(edit.vector.norm()):.4g}",
        "rotate": "degrees towards the direction",
    }
    return words[edit.operator]


def model_facts(model: ModelId, base_model: str) -> str:
    """Which model it is for."""
    revision = f", revision `{model.revision}`" if model.revision else ""
    return (
        f"Base model: `{base_model or model.name}`{revision}; {model.n_layers} layers, {model.d_model} wide, "
        f"fingerprint of the weights `{model.weights}`. Layer *l* is counted from 0 and means the output of block *l* "
        f"(`blocks.l.hook_resid_post`, `model.layers[l]`)."
    )


def evaluation_section(plan: Plan, model: ModelId) -> str:
    """What was measured for a plan, and where that differs from what is exported.

    Args:
        plan: one edit or several.
        model: that the export is for.
    """
    if len(plan.edits) > 1:
        parts = [f"### {edit.direction.label}, layer {edit.layer}\n\n{_of_edit(edit, model)}" for edit in plan.edits]
        return "\n\n".join(
            ["**The edits together were not evaluated.** What was measured for each one by itself follows.", *parts]
        )
    return _of_edit(plan.edits[0], model)


def _of_edit(edit: SteeringPlan, model: ModelId) -> str:
    found = edit.measured
    if found is None:
        other = edit.evidence is not None
        return _NOT_EVALUATED + (" (Its evidence is of another layer, coefficient or vector.)" if other else "")
    warnings = []
    if found.model and model.differences(found.model):
        warnings.append(
            f"**Measured on another model**: `{found.model.get('name')}`, which differs from this one in "
            f"{', '.join(model.differences(found.model))}."
        )
    if found.scope != edit.scope.name:
        warnings.append(f"**Measured at the scope `{found.scope}`**, while this steers at `{edit.scope.name}`.")
    parts = [*warnings, _verdict(found), _effect_table(found)]
    if found.text:
        parts.append(_text_table(found))
    if found.samples:
        parts.append(_samples(found))
    return "\n\n".join(parts)


def _verdict(found: Evidence) -> str:
    drawn = ", ".join(f"{name} {value}" for name, value in found.sampling.items() if value not in ("", None))
    by = f" Sentences were labeled by `{found.annotator}`." if found.annotator and found.unit != "score" else ""
    where = f"`{found.model['name']}`" if found.model else "a model that was not recorded"
    how = "added" if found.sign > 0 else "taken away"
    return (
        f"Verdict: **{found.verdict}** (the direction was {how}). Measured on {where} at the scope "
        f"`{found.scope}`, {found.n_tasks} held-out tasks × {found.n_samples} chains"
        f"{f' ({drawn})' if drawn else ''}, by lensteer {found.lensteer or __version__}.{by} Intervals are 95 % "
        "bootstrap intervals over tasks."
    )


def _effect_table(found: Evidence) -> str:
    what = "mean score" if found.unit == "score" else f"share of {found.unit} that are {found.label}"
    rows = [f"| {what} | estimate |", "| --- | --- |"]
    rows += [
        f"| unsteered | {_shown(found.unsteered, found.unit)} |",
        f"| steered | {_shown(found.steered, found.unit)} |",
    ]
    p = "not tested" if math.isnan(found.p) else f"p = {found.p:.2g} after Holm's correction"
    rows.append(f"| change | {_shown(found.change, found.unit)} ({p}) |")
    if found.prompted is not None:
        rows.append(f"| prompted baseline | {_shown(found.prompted, found.unit)} |")
    for pool in found.controls:
        low, high = (_number(value, found.unit, signed=True) for value in (pool.low, pool.high))
        beyond = "exceeded by the plan" if pool.rank == 1 else f"{pool.rank - 1} of them go as far"
        rows.append(f"| change by {pool.n} control vectors ({pool.pool}) | {low} to {high}: {beyond} |")
    if not found.controls:
        rows.append("| control vectors | none were run |")
    if not math.isnan(found.accuracy.value):
        rows.append(f"| right answers, unsteered | {_shown(found.unsteered_accuracy, 'sentences')} |")
        rows.append(f"| right answers, steered | {_shown(found.accuracy, 'sentences')} |")
    return "\n".join(rows)


def _text_table(found: Evidence) -> str:
    words = {
        True: "no worse than unsteered, by the margins below",
        False: "**worse than unsteered**",
        None: "not checked",
    }
    rows = [f"Text quality: {words[found.readable]}.", "", "| figure | unsteered | steered | limit | within |"]
    rows.append("| --- | --- | --- | --- | --- |")
    for f in found.text:
        rows.append(
            f"| {f.name.replace('_', ' ')} | {f.base:.3g} | {f.value:.3g} | {f.limit:.3g} | {'yes' if f.ok else 'no'} |"
        )
    return "\n".join(rows)


def _samples(found: Evidence) -> str:
    parts = ["Sample texts, on the first held-out tasks (not chosen by their outcome):"]
    for sample in found.samples:
        for title, text in (("Task", sample.task), ("Unsteered", sample.unsteered), ("Steered", sample.steered)):
            parts.append(f"{title}:\n\n{_quoted(text)}")
    return "\n\n".join(parts)


def _quoted(text: str) -> str:
    """As a block that Markdown does not interpret."""
    shown = text if len(text) <= _SAMPLE else text[:_SAMPLE] + " …"
    return "\n".join(f"    {line}" for line in shown.strip().splitlines())


def _shown(found: Estimate, unit: str) -> str:
    value, low, high = (_number(part, unit) for part in (found.value, found.low, found.high))
    return f"{value} [{low}, {high}]"


def _number(value: float, unit: str, *, signed: bool = False) -> str:
    if math.isnan(value):
        return "none"
    sign = "+" if signed else ""
    return f"{value:{sign}.3g}" if unit == "score" else f"{100 * value:{sign}.1f} %"


def limits_section(plan: Plan) -> str:
    """What a reader should not conclude."""
    lines = [
        "- An effect is measured on the tasks, prompts and sampling that are named above. It may differ elsewhere: "
        "measure it on your own.",
        "- A direction that raises a behavior is not the only cause of it, and may move other things as well.",
        "- The vector is of this checkpoint. On another one, a fine-tune included, it is another vector.",
    ]
    if plan.edits[0].scope == everywhere:
        lines.append("- It steers every position, prompts and system prompts included, not only what the model writes.")
    if any(edit.measured is None for edit in plan.edits):
        lines.insert(0, "- Parts of it were not evaluated.")
    return "\n".join(lines)

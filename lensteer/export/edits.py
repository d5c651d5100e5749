"""What a plan adds, as the formats of other software can say it: a vector per layer, at one scope.

Most formats hold one vector per layer and nothing else. What a format cannot hold is refused here, with its name.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.positions import PositionScope
from lensteer.steering import Plan, Plans

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


def check_residual(plan: Plan, fmt: str) -> None:
    """Raise for a plan that edits something other than the residual stream.

    Args:
        plan: one edit or several.
        fmt: the format's name, for messages.

    Raises:
        LensteerError: a cache plan, or a plan without edits.
    """
    if plan.slots:
        raise LensteerError(
            f"{fmt} holds edits of the residual stream, and this plan edits {len(plan.slots)} slot(s) of the prompt's "
            "cache: export a CachePlan by ls.export.cache"
        )
    if not plan.edits:
        raise LensteerError(f"{fmt}: this plan has no edit; give a SteeringPlan, or several joined by +")


def scope_of(plan: Plan, fmt: str, scopes: Sequence[PositionScope | str]) -> PositionScope:
    """The scope of all of a plan's edits, if a format can express it.

    Args:
        plan: one edit or several.
        fmt: the format's name, for messages.
        scopes: that it can express, or their names; "at" and "first" stand for every `at([...])` and `first(n)`.

    Raises:
        LensteerError: a cache plan, edits of different scopes, or a scope that the format cannot express.
    """
    check_residual(plan, fmt)
    found = list(dict.fromkeys(edit.scope for edit in plan.edits))
    if len(found) > 1:
        several = ", ".join(repr(scope.name) for scope in found)
        raise LensteerError(f"{fmt} has one scope, and this plan has {several}: export each part by itself")
    names = [scope if isinstance(scope, str) else scope.name for scope in scopes]
    own = found[0].name
    if own not in names and not (own.endswith(")") and own.partition("(")[0] in names):
        there = ", ".join(repr(name) for name in names)
        raise LensteerError(f"{fmt} cannot express the scope {own!r}: it has {there}; use another format or scope")
    return found[0]


def rescoped(plan: Plan, scope: PositionScope) -> Plan:
    """The plan with another scope for all of its edits."""
    edits = tuple(replace(edit, scope=scope) for edit in plan.edits)
    return edits[0] if len(edits) == 1 else Plans(edits, plan.slots)


def check_fixed(plan: Plan, fmt: str) -> None:
    """Raise for edits that depend on more of the residual than a projection does, or on the number of the token.

    Args:
        plan: one edit or several.
        fmt: the format's name, for messages.

    Raises:
        LensteerError: an edit with an operator other than "add" and "project_out", with a gate, or with a schedule.
    """
    for edit in plan.edits:
        parts = {"a gate": edit.gate, "a schedule": edit.schedule}
        has = [name for name, part in parts.items() if part is not None]
        if edit.operator not in ("add", "project_out"):
            has = [f"the operator {edit.operator!r}", *has]
        if has:
            raise LensteerError(
                f"{fmt} cannot express {' and '.join(has)}, which the edit of layer {edit.layer} has: export it by "
                "ls.export.hf or ls.export.folder"
            )


def check_added(plan: Plan, fmt: str) -> None:
    """Raise for a plan that does more than add vectors, where only addition can be expressed.

    Args:
        plan: one edit or several.
        fmt: the format's name, for messages.

    Raises:
        LensteerError: an edit with another operator than "add", with a gate, or with a schedule.
    """
    check_fixed(plan, fmt)
    for edit in plan.edits:
        if edit.operator != "add":
            raise LensteerError(
                f"{fmt} adds vectors, and the edit of layer {edit.layer} has the operator {edit.operator!r}: export a "
                "projection by ls.export.checkpoint"
            )


def additions(
    plan: Plan, fmt: str, scopes: Sequence[PositionScope | str], min_layer: int = 0
) -> dict[int, Float[Tensor, " d_model"]]:
    """Per layer what a plan adds at each position of its scope: Σ coefficient × vector over the layer's edits, float32.

    Args:
        plan: one edit or several, of the operator "add".
        fmt: the format's name, for messages.
        scopes: that it can express; see `scope_of`.
        min_layer: the lowest layer that it can express.

    Returns:
        Layer to vector, in the order of layers.

    Raises:
        LensteerError: anything that the format cannot express: another operator, a gate, a schedule, a scope, cache
            slots, a layer; or vectors of different widths.
    """
    scope_of(plan, fmt, scopes)
    check_added(plan, fmt)
    found: dict[int, Tensor] = {}
    for edit in sorted(plan.edits, key=lambda edit: edit.layer):
        if edit.layer < min_layer:
            raise LensteerError(
                f"{fmt} cannot steer the output of layer {edit.layer}: its first is layer {min_layer}; steer a later "
                "layer, or use another format"
            )
        added = (edit.coefficient * edit.vector.detach().to("cpu", torch.float64)).flatten()
        if edit.layer in found and found[edit.layer].shape != added.shape:
            raise LensteerError(
                f"two vectors at layer {edit.layer} are {len(found[edit.layer])} and {len(added)} wide: they are of "
                "different models"
            )
        found[edit.layer] = found.get(edit.layer, torch.zeros_like(added)) + added
    if len({len(vector) for vector in found.values()}) > 1:
        widths = {layer: len(vector) for layer, vector in found.items()}
        raise LensteerError(f"vectors of different models: their widths by layer are {widths}")
    return {layer: vector.float() for layer, vector in found.items()}


def furthest(some: Sequence[Tensor], others: Sequence[Tensor]) -> float:
    """The largest difference of an entry, such as of a logit, over pairs of tensors."""
    return max(float((one - other).abs().max()) for one, other in zip(some, others, strict=True))


def projects(plan: Plan, fmt: str) -> bool:
    """Whether a plan projects out, where a format can say only one operation.

    Args:
        plan: one edit or several.
        fmt: the format's name, for messages.

    Raises:
        LensteerError: it adds and projects out; or another operator, a gate or a schedule.
    """
    check_fixed(plan, fmt)
    operators = {edit.operator for edit in plan.edits}
    if len(operators) > 1:
        raise LensteerError(f"{fmt} either adds or projects out, and this plan does both: export each part by itself")
    return operators == {"project_out"}


def projected_out(plan: Plan, fmt: str) -> dict[int, Float[Tensor, " d_model"]]:
    """Per layer the unit vector that a plan projects out, float32.

    Args:
        plan: one edit or several, of the operator "project_out".
        fmt: the format's name, for messages.

    Raises:
        LensteerError: two directions at one layer, a gate or a schedule.
    """
    check_fixed(plan, fmt)
    found: dict[int, Tensor] = {}
    for edit in sorted(plan.edits, key=lambda edit: edit.layer):
        if edit.layer in found:
            raise LensteerError(f"{fmt} projects out one direction per layer, and this plan has two at {edit.layer}")
        found[edit.layer] = edit.vector.detach().float().cpu().flatten()
    return found


def check_vectors(vectors: Mapping[int, Float[Tensor, " d_model"]], model: TransformerBridge | None, fmt: str) -> None:
    """Raise for vectors that would steer nothing, or another model.

    Args:
        vectors: by layer.
        model: that they are for; if None, layers and width are not checked.
        fmt: the format's name, for messages.

    Raises:
        LensteerError: a vector that is zero or not finite, of a layer that the model lacks, or of another width.
    """
    for layer, vector in vectors.items():
        if not vector.isfinite().all() or not vector.any():
            raise LensteerError(
                f"{fmt}: the vector of layer {layer} is zero or not finite in float32, and would steer nothing"
            )
        if model is None:
            continue
        models.check_layer(model, layer)
        if len(vector) != models.d_model(model):
            raise LensteerError(
                f"the vector of layer {layer} is {len(vector)} wide, and {models.fingerprint(model).name!r} is "
                f"{models.d_model(model)}: it is another model's"
            )

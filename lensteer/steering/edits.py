"""Plans laid out for a batch, and the only place where a residual is changed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lensteer import models
from lensteer.errors import LensteerError
from lensteer.positions import Context, PositionScope
from lensteer.steering.plans import Plan, SteeringPlan

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass
class _Group:
    """The edits of one layer that share operator and scope: a vector for each row, zero where a row has none."""

    operator: str
    scope: PositionScope
    table: Float[Tensor, "batch d_model"]
    strength: Float[Tensor, " batch"]


@dataclass
class Edits:
    """Plans laid out for a batch whose rows may differ in plan. `None` is a row that is not steered."""

    groups: dict[int, list[_Group]] = field(default_factory=dict)

    @staticmethod
    def of(plans: Sequence[Plan | None], model: TransformerBridge) -> Edits:
        """Lay out one plan (or None) per row.

        Raises:
            LensteerError: a layer that the model lacks, a vector of another width or that is not finite, or a
                coefficient beyond the model's numbers.
        """
        groups: dict[int, list[_Group]] = {}
        shape, like = (len(plans), models.d_model(model)), next(iter(model.parameters()))
        for row, plan in enumerate(plans):
            after: dict[int, int] = {}  # per layer, the first group that comes after the row's edits so far
            for edit in () if plan is None else plan.edits:
                found = groups.setdefault(models.check_layer(model, edit.layer), [])
                kind, least = (edit.operator, edit.scope), after.get(edit.layer, 0)
                at = next((i for i, g in enumerate(found) if i >= least and (g.operator, g.scope) == kind), len(found))
                if at == len(found):
                    found.append(_Group(*kind, like.new_zeros(shape), like.new_zeros(shape[0])))
                after[edit.layer] = at + 1
                found[at].table[row] = _checked(edit, shape[1], like.dtype).to(like)
                found[at].strength[row] = edit.coefficient
        return Edits(groups)

    def apply(
        self, layer: int, resid: Float[Tensor, "batch pos d_model"], context: Context
    ) -> Float[Tensor, "batch pos d_model"]:
        """The edited residual of the last `pos` positions of a context."""
        for group in self.groups.get(layer, ()):
            chosen = group.scope.mask(context)[:, -resid.shape[1] :, None]
            vector, strength = group.table[:, None], group.strength[:, None, None]
            if group.operator == "add":
                delta = strength * vector
            else:
                delta = -strength * (resid * vector).sum(-1, keepdim=True) * vector
            resid = torch.where(chosen, resid + delta, resid)
        return resid

    def touched(self, context: Context, columns: int) -> Bool[Tensor, " batch"]:
        """Which rows some edit changes within the first columns of a context."""
        found = torch.zeros(len(context.ids), dtype=torch.bool, device=context.ids.device)
        for groups in self.groups.values():
            for group in groups:
                found |= group.scope.mask(context)[:, :columns].any(1) & (group.strength != 0)
        return found

    def keep(self, rows: Tensor) -> Edits:
        """The same for some of the rows."""
        return Edits(
            {
                layer: [_Group(g.operator, g.scope, g.table[rows], g.strength[rows]) for g in groups]
                for layer, groups in self.groups.items()
            }
        )


def _checked(edit: SteeringPlan, width: int, dtype: torch.dtype) -> Tensor:
    vector = edit.vector
    if vector.shape != (width,) or not torch.isfinite(vector).all():
        raise LensteerError(
            f"{edit.direction.label!r} at layer {edit.layer} is zero, not finite or another model's: shape "
            f"{list(vector.shape)}, where this residual stream is {width} wide"
        )
    if abs(edit.coefficient) > (most := torch.finfo(dtype).max):
        raise LensteerError(f"coefficient {edit.coefficient:g} is beyond {dtype}, which ends at {most:g}: give less")
    return vector

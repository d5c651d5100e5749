"""What runs a batch, and how a prompt gets into its cache: in one go, or in parts with cache edits between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from torch import nn

from lensteer import twins
from lensteer.cache_steering import CachePlan, edit_cache
from lensteer.cache_steering.plans import check_plan
from lensteer.steering import Plan, Plans, active_plans, foreign_hooks

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge

T = TypeVar("T")


def choose_runner(
    model: TransformerBridge, plans: Sequence[Plan | None] | None, n: int
) -> tuple[nn.Module, list[Plan | None]]:
    """What runs `n` rows, and what it has to do to each: the plain twin knows nothing of the plans that are on."""
    rows: list[Plan | None] = list(plans or [None] * n)
    twin = None if foreign_hooks(model) else twins.plain_twin(model)
    for on in reversed(active_plans(model)):  # outermost first, as the bridge's hooks fire
        seen = on if twin is not None else Plans((), on.slots)  # the bridge's own hooks edit its residuals
        rows = [seen if row is None else seen + row for row in rows]
    return (model if twin is None else twin), rows


@dataclass(frozen=True)
class SlotEdit:
    """One row's edit of one cache slot: its column with padding, its position without."""

    row: int
    column: int
    position: int
    plan: CachePlan


def slot_edits(
    model: TransformerBridge, plans: Sequence[Plan | None], lengths: Sequence[int], width: int
) -> list[SlotEdit]:
    """The cache edits of a batch of left-padded prompts.

    Args:
        model: The bridge.
        plans: One per row, None for a row that is left alone.
        lengths: Of the prompts, in tokens.
        width: Of the batch; prompts end there.

    Raises:
        LensteerError: A plan that the model or a prompt cannot take.
    """
    found, checked = [], set()
    for row, (plan, length) in enumerate(zip(plans, lengths, strict=True)):
        for slot in () if plan is None else plan.slots:
            assert isinstance(slot, CachePlan)
            if id(slot) not in checked:
                check_plan(model, slot)
                checked.add(id(slot))
            position = slot.slot(length)
            found.append(SlotEdit(row, width - length + position, position, slot))
    return found


def prefilled(
    model: TransformerBridge, cache: Any, edits: Sequence[SlotEdit], end: int, forward: Callable[[int, int], T]
) -> T:
    """Run columns 0 to `end`: through each edited slot, then the edit, then the rest, whose output is returned.

    Args:
        model: The bridge.
        cache: That `forward` fills.
        edits: From `slot_edits`.
        end: One past the last column; at least one column follows every slot.
        forward: Runs the columns from one index to another behind what the cache holds.
    """
    begin = 0
    for cut in sorted({edit.column + 1 for edit in edits}):
        forward(begin, cut)
        begin = cut
        due = [edit for edit in edits if edit.column + 1 == cut]
        edit_cache(
            model,
            cache,
            [edit.row for edit in due],
            [edit.column for edit in due],
            [edit.position for edit in due],
            [edit.plan for edit in due],
        )
    return forward(begin, end)

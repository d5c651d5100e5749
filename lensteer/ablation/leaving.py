"""Leave one group of positions out of a plan at a time: the group's importance is what the effect misses.

Each plan is really run. Importances do not add up: two groups that do the same are both unimportant.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lensteer.ablation.effects import ForcedEffect
from lensteer.ablation.forcing import ForcedChain
from lensteer.errors import LensteerError
from lensteer.results import Result
from lensteer.steering import Plan
from lensteer.traces import Trace

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True)
class LeaveOneOut(Result):
    """How much each group of positions matters for what a plan does to a chain.

    Attributes:
        names: of the groups.
        groups: their absolute positions.
        full: the effect of the whole plan, in nats.
        without: the effect of the plan without each group.
        measure: "kl", the KLs of all tokens summed, or "log_prob", the summed changes of the target tokens.
        targets: the positions of the target tokens; empty for "kl".
    """

    names: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    full: float
    without: tuple[float, ...]
    measure: str
    targets: tuple[int, ...] = ()

    @property
    def importance(self) -> tuple[float, ...]:
        """What each group is missed by: the full effect less that without it."""
        return tuple(self.full - without for without in self.without)

    def to_dataframe(self) -> Any:
        """A row per group, in the order given."""
        import pandas as pd

        table = {"group": self.names, "first": [g[0] for g in self.groups], "n_positions": [*map(len, self.groups)]}
        return pd.DataFrame({**table, "without": self.without, "importance": self.importance, "measure": self.measure})


def leave_one_out(
    model: TransformerBridge,
    trace: Trace | ForcedChain,
    plan_of: Callable[[tuple[int, ...]], Plan],
    groups: Mapping[str, Sequence[int]],
    *,
    targets: Sequence[int] | None = None,
    advance: Callable[[int], object] | None = None,
) -> LeaveOneOut:
    """Leave each group of positions out of a plan once, and measure what is left of its effect.

    Args:
        model: the bridge.
        trace: the chain; a `ForcedChain` lends its unsteered pass.
        plan_of: the plan at given absolute positions, such as
            `lambda positions: SteeringPlan(direction, layer=4, scope=at(positions))`.
        groups: name -> absolute positions; the whole plan is at all of them. A sentence each, say.
        targets: positions of the tokens whose changes of log-probability, summed, are the effect; by default the
            effect is the total KL of all tokens.
        advance: called with the number of groups that each step has measured.

    Raises:
        LensteerError: no group, an empty one, a position or target outside the chain.
    """
    chain = trace if isinstance(trace, ForcedChain) else ForcedChain.of(model, trace)
    sets = {name: tuple(sorted(set(positions))) for name, positions in groups.items()}
    everything = tuple(sorted({p for positions in sets.values() for p in positions}))
    if not sets or not all(sets.values()):
        raise LensteerError(f"groups {dict(groups)}: give at least one, and at least one position in each")
    if everything[0] < 0 or everything[-1] >= chain.ids.shape[1]:
        raise LensteerError(
            f"positions {everything[0]} to {everything[-1]}: this chain has positions 0 to {chain.ids.shape[1] - 1}"
        )

    def measured(effect: ForcedEffect) -> float:
        return effect.total if targets is None else effect.change_at(targets)

    full = measured(chain.effect(plan_of(everything)))
    left = [tuple(p for p in everything if p not in set(positions)) for positions in sets.values()]
    plans = [plan_of(positions) if positions else None for positions in left]
    without: list[float] = []
    for start in range(0, len(plans), chain.rows):
        batch = plans[start : start + chain.rows]
        without += map(measured, chain.effects(batch))
        if advance is not None:
            advance(len(batch))
    measure = "kl" if targets is None else "log_prob"
    return LeaveOneOut(
        tuple(sets), tuple(sets.values()), full, tuple(without), measure, tuple(() if targets is None else targets)
    )

"""What the same steering does at different positions: values only. `analyses/position_ablation.py` measures them."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

MEAN = "mean of behaviors"


@dataclass(frozen=True)
class PositionEffect:
    """What one choice of positions does for one behavior, or for the mean of them.

    Attributes:
        comparison: "coefficient" and "budget": the model writes freely, with one coefficient at all scopes or with
            those that spend the same KL; "forced": it is led along unsteered chains; "left out": so, too, and steered
            at all sentences but one.
        scope: the positions' name.
        behavior: whose vector and effect, or `MEAN`.
        effect: the behavior's share of sentences with its vector added less that with it taken away; along
            unsteered chains, the same difference of the log-probability of its own sentences, in nats per sentence.
        low: lower end of the 95 % interval over tasks.
        high: upper end.
        behind: how much larger the effect is at the reference scope (if left out, at all sentences), paired by task.
        behind_low: lower end of its interval.
        behind_high: upper end.
        kl: mean KL per token over both signs, in nats; if left out, a chain counts once for each sentence that is read.
        kl_low: lower end of its 95 % interval over prompts or chains.
        kl_high: upper end.
        edited: positions of an unsteered chain that are edited, its prompt's included; a mean over chains.
        down: the coefficient that takes away (for `MEAN` a mean over behaviors).
        up: the coefficient that adds.
        parsed: share of steered chains that end and can be read; NaN along unsteered chains.
        reached: whether all of its coefficients spend the budget, where one was asked for.
    """

    comparison: str
    scope: str
    behavior: str
    effect: float
    low: float
    high: float
    behind: float
    behind_low: float
    behind_high: float
    kl: float
    kl_low: float
    kl_high: float
    edited: float
    down: float
    up: float
    parsed: float
    reached: bool


@dataclass(frozen=True)
class PositionAblation:
    """The same steering at different positions.

    Attributes:
        rows: of all comparisons.
        reference: the scope that the others are held against, but for "left out".
        budget: mean KL per token that was asked for, in nats.
        layers: behavior → steered layer.
        n_tasks: dev tasks, one chain an arm.
        n_prompts: those of them that rollouts for a KL begin with.
    """

    rows: tuple[PositionEffect, ...]
    reference: str
    budget: float
    layers: dict[str, int]
    n_tasks: int
    n_prompts: int

    def to_dataframe(self) -> Any:
        """A row per comparison, scope and behavior."""
        import pandas as pd

        return pd.DataFrame([asdict(row) for row in self.rows])

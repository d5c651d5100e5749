"""What a calibration found, and all that it measured on the way."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from lensteer.steering import SteeringPlan


@dataclass(frozen=True)
class Step:
    """One measured coefficient: the statistic that the budget is on, and how the tokens' KLs lie, in nats."""

    coefficient: float
    kl: float
    mean: float
    p50: float
    p95: float
    n_tokens: int


@dataclass(frozen=True)
class Calibration:
    """A plan whose coefficient matches a target KL.

    Attributes:
        plan: ready to steer with.
        budget: in nats per token.
        quantile: of the tokens' KLs that the budget is on; None for their mean.
        tolerance: how far the measured KL may be from the budget, as a share of it.
        reached: whether it is within the tolerance. If not, the plan is the nearest that was measured.
        step: what was measured at the plan's coefficient.
        low: lower end of its 95 % interval, by bootstrap over prompts (NaN for a single prompt).
        high: upper end.
        path: all that was measured, in the order of the search.
        n_prompts: prompts rolled out at each step.
        cost: of the whole call, which other plans may have shared: "rounds", "forwards" (decoding steps and
            teacher-forced passes), tokens "generated" and "forced", "seconds".
    """

    plan: SteeringPlan
    budget: float
    quantile: float | None
    tolerance: float
    reached: bool
    step: Step
    low: float
    high: float
    path: tuple[Step, ...]
    n_prompts: int
    cost: Mapping[str, int | float] = field(default_factory=dict)

    @property
    def coefficient(self) -> float:
        """Of the plan, with its sign and in its unit."""
        return self.plan.coefficient

    @property
    def kl(self) -> float:
        """The statistic that the budget is on, as measured at the coefficient."""
        return self.step.kl

    def to_dataframe(self) -> Any:
        """A row per measured coefficient, in the order of the search; `chosen` marks the result."""
        import pandas as pd

        plan = self.plan
        fixed = dict(direction=plan.direction.label, layer=plan.layer, coefficient_unit=plan.unit, budget=self.budget)
        rows = [{**fixed, **vars(step), "chosen": step is self.step, "reached": self.reached} for step in self.path]
        return pd.DataFrame(rows)

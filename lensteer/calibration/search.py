"""Where a rising function of a positive number meets a target, from few and noisy evaluations."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

#: How far a step may lead away from all that was measured, as a factor.
STRIDE = 8.0
#: A bracket whose ends differ by less than this factor is not searched further: `y` jumps across the target there.
NARROW = 1.01
#: The slope of log y over log x is 2 for a KL at small doses; a fitted one is kept between these.
SLOPE, FLATTEST, STEEPEST = 2.0, 1.0, 4.0


@dataclass
class Search:
    """Looks for `x` with `y(x) = target` on the logarithms of both: first a bracket, then inside it.

    A monotone `y` is not taken for granted. The bracket is always below the *smallest* `x` that was over the target,
    so of several crossings the lowest dose is found; and it shrinks whatever `y` does.

    Attributes:
        target: positive.
        tolerance: |y / target − 1| that is near enough.
        start: the first `x`.
        ceiling: the largest `x` to try.
        steps: what was measured.
    """

    target: float
    tolerance: float
    start: float
    ceiling: float
    steps: list[tuple[float, float]] = field(default_factory=list)

    def reached(self) -> bool:
        """Whether the best step is near enough."""
        return bool(self.steps) and abs(self.steps[self.best()][1] / self.target - 1) <= self.tolerance

    def best(self) -> int:
        """The number of the step whose `y` has the least ratio to the target, either way."""

        def miss(step: int) -> tuple[float, float]:
            x, y = self.steps[step]
            return (abs(math.log(y / self.target)), x) if y > 0 else (math.inf, -x)

        return min(range(len(self.steps)), key=miss)

    def next(self) -> float | None:
        """The next `x` to measure; None where the target is met, jumped across, or out of reach below the ceiling."""
        if self.reached():
            return None
        if not self.steps:
            return min(self.start, self.ceiling)
        over = sorted(step for step in self.steps if step[1] > self.target)
        under = sorted(step for step in self.steps if step[1] <= self.target and (not over or step[0] < over[0][0]))
        if over and under and over[0][0] < NARROW * under[-1][0]:
            return None
        if over and under:
            return self._inside(under[-1], over[0])
        if over:
            return self._beyond(over[0], over[1:2])
        if under[-1][0] >= self.ceiling:
            return None
        return min(self._beyond(under[-1], under[-2:-1]), self.ceiling)

    def _inside(self, low: tuple[float, float], high: tuple[float, float]) -> float:
        """Interpolated, and every other time the middle: each two steps halve the bracket, at least."""
        share = 0.5
        if low[1] > 0 and len(self.steps) % 2 == 0:
            share = math.log(self.target / low[1]) / math.log(high[1] / low[1])
        return low[0] * (high[0] / low[0]) ** min(max(share, 0.1), 0.9)

    def _beyond(self, nearest: tuple[float, float], other: list[tuple[float, float]]) -> float:
        """Extrapolated from the step nearest to the target, with the slope to the one after it."""
        x, y = nearest
        if y <= 0:
            return x * STRIDE
        slope = SLOPE
        if other and other[0][1] > 0:
            slope = math.log(other[0][1] / y) / math.log(other[0][0] / x)
        factor = (self.target / y) ** (1 / min(max(slope, FLATTEST), STEEPEST))
        return x * min(max(factor, 1 / STRIDE), STRIDE)

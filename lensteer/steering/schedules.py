"""Schedules: a coefficient that changes over the generated tokens.

    half_life  f(t) = e + (1 - e) 2^(-t / n)
    linear     f(t) = e + (1 - e) max(0, 1 - t / n)

t is the number of tokens between the prompt's end and the position: 0 at the first generated token. In the prompt f is
1. Scalena et al. 2024 (arXiv 2406.17563) compare constant coefficients with ones that change during generation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.arguments import typed
from lensteer.errors import LensteerError

SHAPES = ("half_life", "linear")


@dataclass(frozen=True)
class Schedule:
    """The factor of a coefficient at each generated token: from 1 at the first one towards `end`.

    Of a clamp it is the target that is multiplied, and of a rotation the angle.

    Attributes:
        shape: "half_life" or "linear".
        tokens: in which the way to `end` is halved, or over which it is gone.
        end: the factor afterwards; above 1 the coefficient grows.

    Raises:
        LensteerError: an unknown shape, a number of tokens that is not positive, or a number that is not finite.
    """

    shape: str
    tokens: float
    end: float = 0.0

    def __post_init__(self) -> None:
        typed(self)
        if self.shape not in SHAPES:
            raise LensteerError(f"no schedule of shape {self.shape!r}: choose one of {list(SHAPES)}")
        if not 0 < self.tokens < math.inf:
            raise LensteerError(f"a schedule over {self.tokens} tokens: give a positive, finite number")
        if not math.isfinite(self.end):
            raise LensteerError(f"a schedule that ends at {self.end}: give a finite factor, such as 0.0")

    @staticmethod
    def half_life(tokens: float, end: float = 0.0) -> Schedule:
        """f(t) = e + (1 - e) 2^(-t / tokens)."""
        return Schedule("half_life", tokens, end)

    @staticmethod
    def linear(tokens: float, end: float = 0.0) -> Schedule:
        """f(t) = e + (1 - e) max(0, 1 - t / tokens)."""
        return Schedule("linear", tokens, end)

    def factor(self, t: Int[Tensor, "*shape"]) -> Float[Tensor, "*shape"]:
        """The factor f at numbers of tokens since the prompt's end, float32; negative ones are in the prompt."""
        share = t.clamp(min=0).float() / self.tokens
        left = torch.exp2(-share) if self.shape == "half_life" else (1 - share).clamp(min=0)
        return self.end + (1 - self.end) * left

    def describe(self) -> list[Any]:
        """Everything it depends on, as JSON-ready values."""
        return ["schedule", self.shape, self.tokens, self.end]

    def __str__(self) -> str:
        how = "halved every" if self.shape == "half_life" else "linear over"
        return f"{how} {self.tokens:g} generated tokens, from 1 to {self.end:g} times the coefficient"

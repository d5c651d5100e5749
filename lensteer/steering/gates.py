"""Gates: an edit acts only at positions whose residual points far enough along a direction.

    open(h) = [m(h) > threshold]   or, below, [m(h) < threshold];   m = <h, ĝ> / ‖h‖ (cosine) or <h, ĝ> (projection)

h is the residual stream at the edit's layer and position as it reaches the edit, after the edits before it. CAST (Lee
et al. 2024, arXiv 2409.05907) decides in this way, at a layer of its own, once for each prompt; here each position
decides for itself, so that a decode step and a full forward agree. Above 0 of the plan's own direction is the gate of
adaptive angular steering (Vu and Nguyen 2025, arXiv 2510.26243).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from lensteer.arguments import typed
from lensteer.errors import LensteerError
from lensteer.results import check_arrays

MEASURES = ("cosine", "projection")


@dataclass(frozen=True, eq=False)
class Gate:
    """A condition on the residual stream at the edited position.

    Attributes:
        threshold: of the measure; the gate is shut at the threshold itself.
        above: whether it is open above the threshold, or below.
        direction: a vector of the residual stream at the plan's layer, of any length; None: the plan's own direction.
        measure: "cosine" of residual and direction, or "projection" of the residual on the direction, in the residual
            stream's own length.

    Raises:
        LensteerError: a threshold that is missing or not finite, an unknown measure, or a direction that is zero or not
            finite.
    """

    threshold: float
    above: bool = True
    direction: Float[Tensor, " d_model"] | None = None
    measure: str = "cosine"

    def __post_init__(self) -> None:
        typed(self)
        if not math.isfinite(self.threshold):
            raise LensteerError(f"a gate with the threshold {self.threshold}: give a finite number, such as 0.2")
        if self.measure not in MEASURES:
            raise LensteerError(f"no measure {self.measure!r} of a gate: choose one of {list(MEASURES)}")
        check_arrays(self)
        given = self.direction
        if given is not None and not (given.isfinite().all() and given.any()):
            raise LensteerError(
                "the direction of a gate is zero or not finite: give another vector, or None for the plan's"
            )

    @staticmethod
    def of_probe(weights: Float[Tensor, " d_model"], bias: float, log_odds: float = 0.0, above: bool = True) -> Gate:
        """Where a probe's log-odds `h @ weights + bias` are above (or below) a number; 0 is a probability of one half.

        <h, w> + b > o is <h, ŵ> > (o - b) / ‖w‖.

        Args:
            weights: of a probe at the plan's layer, as `vectors.probes.fit_probe` returns it.
            bias: of the probe.
            log_odds: o.
            above: whether the gate is open above them, or below.

        Raises:
            LensteerError: weights that are zero or not finite, or a bias or log-odds that is not finite.
        """
        length = float(weights.double().norm())
        if not (length > 0 and math.isfinite(length)):
            raise LensteerError("a gate of a probe whose weights are zero or not finite: fit it again")
        return Gate((log_odds - bias) / length, above, weights.float(), "projection")

    def unit(self, own: Float[Tensor, " d_model"]) -> Float[Tensor, " d_model"]:
        """ĝ: the direction, or the plan's own if it has none, with length 1."""
        found = own if self.direction is None else self.direction
        return found / found.norm()

    def describe(self) -> list[Any]:
        """Everything it depends on, as JSON-ready values."""
        own = None if self.direction is None else self.direction.double().tolist()
        return ["gate", self.threshold, self.above, self.measure, own]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Gate) and self.describe() == other.describe()

    def __hash__(self) -> int:
        return hash((self.threshold, self.above, self.measure))

    def __str__(self) -> str:
        along = "the direction" if self.direction is None else "a direction of its own"
        return f"where the {self.measure} with {along} is {'above' if self.above else 'below'} {self.threshold:.4g}"


@dataclass
class Gates:
    """The gates of a batch, one for each row."""

    table: Float[Tensor, "batch d_model"]
    threshold: Float[Tensor, " batch"]
    above: Bool[Tensor, " batch"]
    cosine: Bool[Tensor, " batch"]

    @staticmethod
    def none(n: int, width: int, like: Tensor) -> Gates:
        """Of `n` rows, to be filled in."""
        flags = torch.zeros(n, dtype=torch.bool, device=like.device)
        return Gates(like.new_zeros(n, width), like.new_zeros(n), flags, flags.clone())

    def put(self, row: int, gate: Gate, own: Float[Tensor, " d_model"]) -> None:
        """Set one row's gate; `own` is its plan's direction."""
        self.table[row] = gate.unit(own).to(self.table)
        self.threshold[row], self.above[row] = gate.threshold, gate.above
        self.cosine[row] = gate.measure == "cosine"

    def open(self, resid: Float[Tensor, "batch pos d_model"]) -> Bool[Tensor, "batch pos"]:
        """Where each row's gate is open."""
        h = resid.to(self.table.dtype)
        found = (h * self.table[:, None]).sum(-1)
        found = torch.where(self.cosine[:, None], found / h.norm(dim=-1), found)
        threshold = self.threshold[:, None]
        return torch.where(self.above[:, None], found > threshold, found < threshold)

    def keep(self, rows: Tensor) -> Gates:
        """The same for some of the rows."""
        return Gates(self.table[rows], self.threshold[rows], self.above[rows], self.cosine[rows])

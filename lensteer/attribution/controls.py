"""Scores compared with those of control vectors: z-scores and p-values by cell, corrected for multiple comparisons."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.arguments import checked
from lensteer.attribution.scores import LayerScores
from lensteer.errors import LensteerError


@dataclass(frozen=True, eq=False)
class ControlTests:
    """How unusual each score is among those of control vectors.

    Attributes:
        labels: The behaviors.
        layers: The layers.
        kinds: Of control vectors, in the order of the first axis.
        n: Control vectors of each kind.
        z: (score − mean of the control vectors) / their standard deviation.
        p: (1 + number of control vectors ≥ score) / (1 + n), for each cell separately.
        p_max: The same for the largest of all standardized cells, layers × behaviors: the probability that any cell of
            a set of control vectors is as extreme as this one.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    kinds: tuple[str, ...]
    n: int
    z: Float[Tensor, "kind behavior layer"]
    p: Float[Tensor, "kind behavior layer"]
    p_max: Float[Tensor, "kind behavior layer"]

    def p_any(self, kind: str) -> float:
        """The p-value of the whole grid: that of its most extreme cell.

        Raises:
            LensteerError: No control vectors of that kind.
        """
        if kind not in self.kinds:
            raise LensteerError(
                f"no control vectors of kind {kind!r}: choose one of {', '.join(map(repr, self.kinds))}"
            )
        p_max = self.p_max[self.kinds.index(kind)]
        return float(p_max[~p_max.isnan()].min())

    def to_dataframe(self) -> Any:
        """One row per kind, behavior and layer."""
        import pandas as pd

        return pd.DataFrame(
            [
                {
                    "kind": kind,
                    "behavior": label,
                    "layer": layer,
                    "z": float(self.z[k, b, i]),
                    "p": float(self.p[k, b, i]),
                    "p_max": float(self.p_max[k, b, i]),
                    "n_controls": self.n,
                }
                for k, kind in enumerate(self.kinds)
                for b, label in enumerate(self.labels)
                for i, layer in enumerate(self.layers)
            ]
        )


@checked()
def control_tests(scores: LayerScores) -> ControlTests:
    """Compare scores with those of the control vectors that were scored along with them.

    The tests are one-sided: a large score counts (for `signed`: toward the behavior). If cells were recomputed exactly,
    their estimates are tested, because the scores of control vectors are estimates, too. For the largest of all cells,
    each cell is standardized by the mean and deviation of control vectors and score together, so that under the null
    hypothesis all are exchangeable. All behaviors share the covariance-matched vectors; each set over which the maximum
    is taken uses a different one for each behavior, because each behavior has its own vector.

    Args:
        scores: Made with `n_controls=200`, say.

    Raises:
        LensteerError: There are no control vectors, or fewer than two.
    """
    if not scores.controls or min(map(len, scores.controls.values())) < 2:
        raise LensteerError(
            f"{scores.method!r} scores without control vectors: attribute with n_controls=200 (at least 2)"
        )
    observed = (scores.mean if scores.estimated is None else scores.estimated)[None]
    found = []
    for kind, draws in scores.controls.items():
        n = len(draws)
        z = (observed - draws.mean(0)) / draws.std(0)
        p = (1 + (draws >= observed).sum(0, keepdim=True)) / (1 + n)
        p = torch.where(observed.isnan(), math.nan, p.double())
        if kind == "covariance_matched":
            # Set i uses draw i + b·step for behavior b.
            step = max(n // len(scores.labels), 1)
            draws = torch.stack([draws[:, b].roll(-b * step, 0) for b in range(len(scores.labels))], dim=1)
        pooled = torch.cat([observed, draws])
        standard = (pooled - pooled.mean(0)) / pooled.std(0)
        largest = standard[1:].nan_to_num(-math.inf).flatten(1).amax(1)
        p_max = (1 + (largest[:, None, None] >= standard[0]).sum(0, keepdim=True)) / (1 + n)
        found.append((z, p, torch.where(observed.isnan(), math.nan, p_max.double())))
    z, p, p_max = (torch.cat(values) for values in zip(*found, strict=True))
    return ControlTests(scores.labels, scores.layers, tuple(scores.controls), n, z, p, p_max)

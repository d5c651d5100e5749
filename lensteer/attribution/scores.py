"""`LayerScores`: how much each behavior's vector disturbs the next token at each layer, however estimated.

Values only: knows neither models nor how an estimator works.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from torch import Tensor

from lensteer.behaviors import check_behavior
from lensteer.errors import LensteerError
from lensteer.files import write_atomically
from lensteer.statistics import Ratio, bootstrap_interval

FORMAT = "lensteer.layer_scores.v1"
#: A cell under this many times the noise floor says nothing.
NOISE_FACTOR = 10.0


@dataclass(frozen=True, eq=False)
class Cells:
    """The single values that scores average: a case is a span's onset and the behavior that is added there.

    Attributes:
        trace: Index of the trace, per case.
        span: Index of the span in its trace.
        behavior: Index into the scores' labels of what is added (not of what the span is).
        onset: Absolute position.
        values: In the unit of the scores.
    """

    trace: Int[Tensor, " case"]
    span: Int[Tensor, " case"]
    behavior: Int[Tensor, " case"]
    onset: Int[Tensor, " case"]
    values: Float[Tensor, "case layer"]


@dataclass(frozen=True, eq=False)
class LayerScores:
    """A score per behavior and layer, with a bootstrap interval over traces.

    Attributes:
        labels: The behaviors whose vectors were added, in the order of the first axis.
        layers: The layers, in the order of the second axis.
        n_layers: How many the model has.
        mean: Mean over spans, in nats; NaN for a behavior without any span to average over.
        low: Lower end of the 95 % interval; NaN where there are fewer than two traces.
        high: Upper end.
        n_spans: Spans averaged, per behavior.
        n_traces: Traces with any of them: the units of the bootstrap.
        method: Which estimator.
        coefficient: What the scaled vector was multiplied by.
        scaling: What coefficient 1 means: "mean_norm" or "unit".
        positions: Whose onsets: "own", "other" or "all".
        window: What part of a span is disturbed.
        noise_floor: What the measure gives where nothing was added, in nats; None where that is not defined.
        max_spans: The limit on the spans of a behavior, if there was one.
        cost: What it took: "forwards", "rows" (tokens run over a shared cache), "seconds".
        provenance: The model and where the vectors come from.
        cells: The single values, if they were asked for.
    """

    labels: tuple[str, ...]
    layers: tuple[int, ...]
    n_layers: int
    mean: Float[Tensor, "behavior layer"]
    low: Float[Tensor, "behavior layer"]
    high: Float[Tensor, "behavior layer"]
    n_spans: tuple[int, ...]
    n_traces: int
    method: str
    coefficient: float
    scaling: str
    positions: str
    window: str = "onset"
    noise_floor: float | None = None
    max_spans: int | None = None
    cost: dict[str, int | float] = field(default_factory=dict)
    provenance: dict[str, Any] = field(default_factory=dict)
    cells: Cells | None = None

    def row(self, label: str) -> int:
        """The index of a behavior.

        Raises:
            LensteerError: These scores do not have it.
        """
        return self.labels.index(check_behavior(label, self.labels))

    def below_noise(self, factor: float = NOISE_FACTOR) -> Tensor:
        """Which means (`behavior × layer`) lie under `factor` times the noise floor and so say nothing."""
        return self.mean < factor * (self.noise_floor or 0.0)

    def to_dataframe(self) -> Any:
        """One row per behavior and layer."""
        import pandas as pd

        noisy = self.below_noise()
        return pd.DataFrame(
            [
                {
                    "behavior": label,
                    "layer": layer,
                    "mean": float(self.mean[b, i]),
                    "low": float(self.low[b, i]),
                    "high": float(self.high[b, i]),
                    "n_spans": self.n_spans[b],
                    "below_noise": bool(noisy[b, i]),
                    "method": self.method,
                    "coefficient": self.coefficient,
                    "scaling": self.scaling,
                    "positions": self.positions,
                }
                for b, label in enumerate(self.labels)
                for i, layer in enumerate(self.layers)
            ]
        )

    def cells_dataframe(self) -> Any:
        """One row per case and layer.

        Raises:
            LensteerError: The cells were not kept.
        """
        import pandas as pd

        if self.cells is None:
            raise LensteerError("these scores have no cells: pass keep_cells=True to attribute")
        cells, n = self.cells, len(self.layers)
        return pd.DataFrame(
            {
                "trace": np.repeat(cells.trace.numpy(), n),
                "span": np.repeat(cells.span.numpy(), n),
                "behavior": [self.labels[b] for b in cells.behavior.tolist() for _ in range(n)],
                "onset": np.repeat(cells.onset.numpy(), n),
                "layer": np.tile(self.layers, len(cells.trace)),
                "value": cells.values.flatten().numpy(),
            }
        )

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; what is not a number becomes None."""
        values = {name: getattr(self, name) for name in self.__dataclass_fields__}
        for name in ("mean", "low", "high"):
            values[name] = _listed(values[name])
        if self.cells is not None:
            values["cells"] = {name: _listed(value) for name, value in vars(self.cells).items()}
        return {"format": FORMAT, **values}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> LayerScores:
        """From what `to_dict` made.

        Raises:
            LensteerError: It is something else.
        """
        values = dict(values)
        if values.pop("format", None) != FORMAT:
            raise LensteerError(f"no layer scores: the field 'format' must say {FORMAT!r}")
        try:
            for name in ("labels", "layers", "n_spans"):
                values[name] = tuple(values[name])
            for name in ("mean", "low", "high"):
                values[name] = _tensor(values[name])
            if (cells := values["cells"]) is not None:
                whole = {name: torch.tensor(cells[name]) for name in ("trace", "span", "behavior", "onset")}
                values["cells"] = Cells(**whole, values=_tensor(cells["values"]))
            return LayerScores(**values)
        except (KeyError, TypeError, ValueError) as error:
            raise LensteerError(f"damaged layer scores ({type(error).__name__}: {error})") from error

    def save(self, path: str | Path) -> None:
        """Write as JSON, all or nothing."""
        write_atomically(Path(path), json.dumps(self.to_dict(), allow_nan=False))

    @staticmethod
    def load(path: str | Path) -> LayerScores:
        """Read what `save` wrote.

        Raises:
            LensteerError: There is no such file, or it is damaged or something else.
        """
        try:
            values = json.loads(Path(path).read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise LensteerError(f"cannot read layer scores from {str(path)!r}: {error}") from error
        if not isinstance(values, dict):
            raise LensteerError(f"cannot read layer scores from {str(path)!r}: it holds no JSON object")
        return LayerScores.from_dict(values)


def average(
    cells: Cells, n_behaviors: int, *, seed: int = 0
) -> tuple[Float[Tensor, "3 behavior layer"], tuple[int, ...], int]:
    """Means over cases with their intervals, the number of cases per behavior, and the number of traces.

    A mean is Σ values / Σ cases, so a trace counts by its spans; traces are what the bootstrap draws.

    Returns:
        Mean, low and high stacked (fp64, NaN where undefined), spans per behavior, traces.
    """
    _, unit = cells.trace.unique(return_inverse=True)
    n_traces, n_layers = int(unit.max()) + 1, cells.values.shape[1]
    place = unit * n_behaviors + cells.behavior
    sums = torch.zeros(n_traces * n_behaviors, n_layers, dtype=torch.float64)
    sums = sums.index_add(0, place, cells.values.double()).view(n_traces, n_behaviors, n_layers)
    counts = torch.bincount(place, minlength=n_traces * n_behaviors).view(n_traces, n_behaviors)
    result = torch.full((3, n_behaviors, n_layers), math.nan, dtype=torch.float64)
    for b in range(n_behaviors):
        if not counts[:, b].any():
            continue
        result[0, b] = sums[:, b].sum(0) / counts[:, b].sum()
        if n_traces > 1:
            weights = counts[:, b, None].expand(n_traces, n_layers)
            interval = bootstrap_interval(Ratio(sums[:, b].numpy(), weights.numpy()), seed=seed)
            result[1, b], result[2, b] = torch.tensor(interval.low), torch.tensor(interval.high)
    return result, tuple(counts.sum(0).tolist()), n_traces


def _listed(values: Tensor) -> list[Any]:
    def plain(value: Any) -> Any:
        if isinstance(value, list):
            return [plain(v) for v in value]
        return None if isinstance(value, float) and not math.isfinite(value) else value

    listed: list[Any] = plain(values.tolist())
    return listed


def _tensor(rows: Sequence[Sequence[float | None]]) -> Tensor:
    return torch.tensor([[math.nan if v is None else v for v in row] for row in rows], dtype=torch.float64)

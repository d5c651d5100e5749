"""One direction through all layers, and the length that it is used at."""

from __future__ import annotations

from dataclasses import dataclass

from jaxtyping import Float
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.results import Result
from lensteer.units import check_unit


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Result):
    """One direction at every layer: of a behavior, or a control.

    Attributes:
        label: what it is called.
        raw: as it was computed, unscaled.
        mean_norm: length of the mean activation at each layer, for the unit of that name.
        layers: of the layer axis.
    """

    label: str
    raw: Float[Tensor, "layer d_model"]
    mean_norm: Float[Tensor, " layer"]
    layers: tuple[int, ...]

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise LensteerError(f"{self.label!r} has no vector at layer {layer}: its layers are {list(self.layers)}")
        return self.layers.index(layer)

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The raw vector of one layer.

        Raises:
            LensteerError: a layer that it does not have.
        """
        return self.raw[self._row(layer)]

    def scaled(self, layer: int, unit: str = "difference") -> Float[Tensor, " d_model"]:
        """What coefficient 1 adds.

        Args:
            layer: one of its layers.
            unit: "difference": the vector as it was computed, `raw`; "mean_norm": `raw / ‖raw‖ · mean_norm`, as long as
                the layer's mean activation; "unit": `raw / ‖raw‖`.

        Raises:
            LensteerError: a layer that it does not have or at which it is zero, or an unknown unit.
        """
        row = self._row(layer)
        norm = self.raw[row].norm()
        if norm == 0:
            raise LensteerError(f"{self.label!r} is zero at layer {layer}: it has no direction to scale")
        if check_unit(unit) == "difference":
            return self.raw[row]
        return self.raw[row] / norm * (self.mean_norm[row] if unit == "mean_norm" else 1.0)

"""What all results have in common: a result draws itself."""

from __future__ import annotations

from importlib import import_module
from typing import Any


class Result:
    """A frozen result of a computation. `lensteer.plots` knows a figure for each kind."""

    def plot(self, **options: Any) -> Any:
        """The plotly figure of this result.

        Args:
            options: of the figure's own function in `lensteer.plots`.
        """
        return import_module("lensteer.plots").figure(self, **options)

"""What all results have in common: a result draws itself, and its `repr` fits on a line."""

from __future__ import annotations

from dataclasses import fields
from importlib import import_module
from typing import Any

from torch import Tensor

_SHOWN = 6  # entries of a sequence or mapping


class Result:
    """A frozen result of a computation. `lensteer.plots` has a figure for most kinds."""

    def plot(self, **options: Any) -> Any:
        """The plotly figure of this result.

        Args:
            options: of the figure's own function in `lensteer.plots`.

        Raises:
            LensteerError: nothing draws such a result.
        """
        return import_module("lensteer.plots").figure(self, **options)

    def __repr__(self) -> str:
        parts = (f"{field.name}={_short(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]  # a dataclass
        return f"{type(self).__name__}({', '.join(parts)})"


def _short(value: object) -> str:
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) > _SHOWN:
        return f"[{_short(value[0])}, ..., {_short(value[-1])}: {len(value)}]"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, dict):
        shown = [f"{key!r}: {_short(entry)}" for key, entry in list(value.items())[:_SHOWN]]
        return f"{{{', '.join(shown)}{', ...' if len(value) > _SHOWN else ''}}}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

"""Mergeable sums, per-trace seeds, bootstrap intervals and sign-flip tests.

Everything that is averaged over traces goes through `WeightedSums`: one linear pass over values with many
rows of weights, such as labels, shuffled labels, Gaussian noise or resampling.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer.errors import LensteerError

Array = np.ndarray[Any, np.dtype[np.float64]]


def trace_generator(seed: int, purpose: str, key: str) -> torch.Generator:
    """A random generator for one trace: draws do not depend on the order of traces or their split.

    Args:
        seed: of the whole computation.
        purpose: what the numbers are for, so that two uses of one trace are independent.
        key: of the trace.
    """
    digest = hashlib.sha256(f"{seed}|{purpose}|{key}".encode()).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest[:8], "big") >> 1)


class WeightedSums:
    """Running sums of values under several rows of weights, in double precision: `sums = Σ weights @ values`.

    Because they are linear in the values, two accumulators over disjoint data merge into that of the whole.

    Attributes:
        sums: `[row layer d_model]`.
        mass: `[row]`, the sum of each row's weights.
    """

    def __init__(self, n_rows: int, n_layers: int, d_model: int) -> None:
        self.sums: Float[Tensor, "row layer d_model"] = torch.zeros(n_rows, n_layers, d_model, dtype=torch.float64)
        self.mass: Float[Tensor, " row"] = torch.zeros(n_rows, dtype=torch.float64)

    def add(
        self,
        weights: Float[Tensor, "row item"],
        values: Float[Tensor, "item layer d_model"],
    ) -> None:
        """Add items with a weight per row."""
        weights = weights.double()
        self.sums.flatten(1).addmm_(weights, values.double().flatten(1))  # in place: the sums are the largest operand
        self.mass += weights.sum(1)

    def merge(self, other: WeightedSums) -> None:
        """Add the sums over other data.

        Raises:
            LensteerError: the other one has different rows, layers or dimensions.
        """
        if other.sums.shape != self.sums.shape:
            raise LensteerError(
                f"cannot merge sums of shape {tuple(other.sums.shape)} into {tuple(self.sums.shape)}: "
                "rows, layers and d_model must be the same"
            )
        self.sums += other.sums
        self.mass += other.mass

    def means(self, begin: int = 0, end: int | None = None) -> Float[Tensor, "row layer d_model"]:
        """`sums / mass` of the rows [begin, end), by default all; a row without mass is NaN."""
        return self.sums[begin:end] / self.mass[begin:end, None, None]


@dataclass(frozen=True)
class Estimate:
    """A number with its interval; or arrays of both, one entry per column. NaN where it is undefined.

    Attributes:
        value: on the data as they are.
        low: lower end.
        high: upper end.
        n: units (chains, tasks, prompts) that were resampled.
        n_left_out: resamples without weight, and so without a value (the maximum over columns).
    """

    value: float | Any  # or an array
    low: float | Any
    high: float | Any
    n: int = 0
    n_left_out: int = 0

    def __format__(self, spec: str) -> str:
        """Such as "0.12 [0.10, 0.14]", each number in the given format."""
        return f"{self.value:{spec}} [{self.low:{spec}}, {self.high:{spec}}]"

    def __rmul__(self, factor: int | float) -> Estimate:
        """Such as `100 * share`, in points."""
        low, high = (self.low, self.high) if factor >= 0 else (self.high, self.low)
        return replace(self, value=factor * self.value, low=factor * low, high=factor * high)

    def excludes(self, value: float = 0.0) -> np.ndarray[Any, np.dtype[np.bool_]]:
        """Whether the interval lies wholly on one side of `value`."""
        return np.asarray((self.low > value) | (self.high < value))


def flat(row: Any) -> dict[str, Any]:
    """The fields of a dataclass as one row of a table; an estimate `x` gives `x`, `x_low` and `x_high`."""
    found: dict[str, Any] = {}
    for field in fields(row):
        value = getattr(row, field.name)
        if isinstance(value, Estimate):
            found |= {field.name: value.value, f"{field.name}_low": value.low, f"{field.name}_high": value.high}
        else:
            found[field.name] = value
    return found


def estimate_in(row: Mapping[str, Any], name: str) -> Estimate:
    """The estimate that `flat` wrote as `name`, `name_low` and `name_high`, or that `asdict` wrote as an object.

    Raises:
        LensteerError: the row has no such estimate.
    """
    found = row.get(name)
    if isinstance(found, Mapping):
        return Estimate(**found)
    if found is None or f"{name}_low" not in row:
        raise LensteerError(f"no estimate {name!r} among {', '.join(map(str, row))}")
    return Estimate(found, row[f"{name}_low"], row[f"{name}_high"])


class Ratio(NamedTuple):
    """Per unit, a numerator and its weight, the denominator: `Σ values / Σ weights` is the fraction.

    Plain means have weight 1 in each unit: leave the weights out.
    """

    values: np.ndarray[Any, np.dtype[Any]]
    weights: np.ndarray[Any, np.dtype[Any]] | None = None


def bootstrap_interval(
    values: Ratio | np.ndarray[Any, np.dtype[Any]],
    minus: Ratio | np.ndarray[Any, np.dtype[Any]] | None = None,
    *,
    n: int = 1000,
    seed: int = 0,
    level: float = 0.95,
) -> Estimate:
    """Bootstrap a mean over units, a weighted fraction, or a paired difference of two of them.

    Units (traces, tasks) are drawn with replacement; data of one unit stay together. A fraction is a ratio of sums, so
    that traces are weighted by length: `bootstrap_interval(Ratio(hits, sentences))`.

    Args:
        values: `[unit]` or `[unit, column ...]`, or a `Ratio` of two such.
        minus: the other side on the same units in the same order; the interval is then of the difference.
        n: number of resamples.
        seed: of the resamples; the same seed draws the same units, whatever the values.
        level: of the interval, between 0 and 1.

    Raises:
        LensteerError: fewer than two units, sides of different size, values that are not finite, or a level
            outside (0, 1).
    """
    if not 0 < level < 1:
        raise LensteerError(f"level {level} is no confidence level: give a number between 0 and 1, such as 0.95")
    sides = [_ratio(side) for side in (values, minus) if side is not None]
    n_units = len(sides[0].values)
    if n_units < 2:
        raise LensteerError(f"cannot resample {n_units} unit(s): an interval needs at least two")
    if any(len(side.values) != n_units for side in sides):
        sizes = " and ".join(str(len(side.values)) for side in sides)
        raise LensteerError(f"sides have {sizes} units: a paired difference needs the same units in both")
    value = _difference([_fraction(np.ones((1, n_units)), side) for side in sides])[0]
    drawn = drawn_counts(n_units, n, seed)
    return percentile_interval(value, _difference([_fraction(drawn, side) for side in sides]), n_units, level=level)


def averaged(
    values: Float[Tensor, "trace *column"], weights: Float[Tensor, "trace *column"], *, seed: int = 0
) -> Float[Tensor, "3 *column"]:
    """Σ values / Σ weights over traces, and the ends of its 95 % bootstrap interval.

    Args:
        values: sums of each trace.
        weights: the denominators; 0 if a trace has no data.
        seed: for the resamples.

    Returns:
        Estimate, low and high. NaN if all weights are 0; the ends also if fewer than two traces have weight.
    """
    v, w = values.double().flatten(1), weights.double().flatten(1)
    result = v.new_full((3, v.shape[1]), torch.nan)
    some, enough = w.sum(0) > 0, (w > 0).sum(0) > 1
    result[0, some] = v[:, some].sum(0) / w[:, some].sum(0)
    if enough.any():
        found = bootstrap_interval(Ratio(v[:, enough].numpy(), w[:, enough].numpy()), seed=seed)
        result[1, enough], result[2, enough] = torch.from_numpy(found.low), torch.from_numpy(found.high)
    return result.view(3, *values.shape[1:])


def drawn_counts(n_units: int, n: int, seed: int) -> Float[np.ndarray[Any, Any], "draw unit"]:
    """How often each unit is in each of `n` resamples with replacement; it depends on the seed, not on the data."""
    drawn = np.random.default_rng(seed % 2**63).multinomial(n_units, np.full(n_units, 1 / n_units), size=n)
    return drawn.astype(np.float64)


def percentile_interval(
    value: Float[np.ndarray[Any, Any], "*column"] | float,
    draws: Float[np.ndarray[Any, Any], "draw *column"],
    n_units: int,
    *,
    level: float = 0.95,
) -> Estimate:
    """The percentile interval of a statistic from its values on resamples; resamples without a value are left out.

    Args:
        value: on the data as they are.
        draws: on the resamples of `drawn_counts`; NaN where undefined.
        n_units: number of units that were resampled.
        level: of the interval.
    """
    defined = np.isfinite(draws)
    low, high = np.full((2, *np.shape(value)), np.nan)
    if len(draws) and defined.any(axis=0).all():
        low, high = np.nanquantile(draws, [(1 - level) / 2, (1 + level) / 2], axis=0)
    plain = (lambda x: float(x)) if np.ndim(value) == 0 else np.asarray
    return Estimate(plain(value), plain(low), plain(high), n_units, int(np.max((~defined).sum(0), initial=0)))


def sign_flip_test(
    own: Ratio | np.ndarray[Any, np.dtype[Any]],
    base: Ratio | np.ndarray[Any, np.dtype[Any]],
    *,
    n: int = 20000,
    seed: int = 0,
) -> float:
    """Two-sided p-value of a paired difference of two fractions, by exchanging the sides within units.

    Under the null hypothesis, a unit's two results are exchangeable. The difference of the two fractions (each a ratio
    of sums over units) is recomputed under `n` random exchanges; p is the share of them, the observed data included,
    whose difference is at least as large in absolute value. Unlike a percentile bootstrap, it keeps its level if a side
    has no events.

    Args:
        own: per unit, the steered side.
        base: the same units in the same order, unsteered.
        n: number of exchanges; p is at least 1 / (n + 1).
        seed: of the exchanges.

    Raises:
        LensteerError: sides of different size, fewer than two units, or values that are not finite.
    """
    sides = [_ratio(own), _ratio(base)]
    n_units = len(sides[0].values)
    if n_units < 2 or len(sides[1].values) != n_units:
        raise LensteerError(
            f"sides have {n_units} and {len(sides[1].values)} units: a paired test needs the same two or more in both"
        )
    values, weights = (np.stack([getattr(side, name) for side in sides]) for name in ("values", "weights"))

    def difference(exchanged: Array) -> Array:
        parts = []
        for a, b in ((0, 1), (1, 0)):
            sums = [(1 - exchanged) @ each[a] + exchanged @ each[b] for each in (values, weights)]
            parts.append(np.divide(sums[0], sums[1], out=np.zeros_like(sums[0]), where=sums[1] != 0))
        return np.asarray(parts[0] - parts[1])

    seen = abs(float(difference(np.zeros((1, n_units)))[0]))
    coins = np.random.default_rng(seed % 2**63).integers(0, 2, size=(n, n_units)).astype(np.float64)
    return float((1 + (np.abs(difference(coins)) >= seen * (1 - 1e-9)).sum()) / (n + 1))


def holm(p_values: Sequence[float]) -> list[float]:
    """p-values adjusted for their number (Holm 1979): the k-th smallest of m times m - k + 1, never decreasing."""
    order = sorted(range(len(p_values)), key=lambda i: p_values[i])
    adjusted, highest = [0.0] * len(p_values), 0.0
    for place, i in enumerate(order):
        highest = max(highest, min(1.0, p_values[i] * (len(p_values) - place)))
        adjusted[i] = highest
    return adjusted


def _ratio(side: Ratio | np.ndarray[Any, np.dtype[Any]]) -> Ratio:
    values, weights = side if isinstance(side, Ratio) else Ratio(side)
    values = np.asarray(values, dtype=np.float64)
    weights = np.ones(values.shape) if weights is None else np.asarray(weights, dtype=np.float64)
    if values.ndim == 0 or weights.shape != values.shape:
        raise LensteerError(
            f"values of shape {values.shape} with weights of shape {weights.shape}: give one of each per unit"
        )
    if not (np.isfinite(values).all() and np.isfinite(weights).all()):
        raise LensteerError(
            "values or weights that are not finite cannot be resampled: leave out the units that lack a value"
        )
    return Ratio(values, weights)


def _fraction(counts: Array, side: Ratio) -> Array:
    assert side.weights is not None
    values, weights = np.tensordot(counts, side.values, 1), np.tensordot(counts, side.weights, 1)
    return np.asarray(np.divide(values, weights, out=np.full(values.shape, np.nan), where=weights != 0))


def _difference(sides: list[Array]) -> Array:
    return np.asarray(sides[0] - sides[1] if len(sides) == 2 else sides[0])

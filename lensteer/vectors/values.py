"""Behavior vectors: one direction per behavior and layer, with the metadata to use them correctly.

The coefficient is not part of the tensor: `raw` is the unscaled difference, which coefficient 1 adds; `mean_norm` is
the length of the mean activation, for the unit of that name.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pandas as pd
import torch
from jaxtyping import Float
from torch import Tensor

from lensteer import models
from lensteer.arguments import typed
from lensteer.behaviors import check_behavior
from lensteer.errors import LensteerError
from lensteer.files import read_tensors, write_tensors
from lensteer.results import Result, check_arrays, reading, revived
from lensteer.steering.plans import check_unit
from lensteer.vectors.constructions import Recipe

if TYPE_CHECKING:
    from transformer_lens.model_bridge import TransformerBridge


@dataclass(frozen=True, eq=False, repr=False)
class Direction(Result):
    """One direction at every layer: of a behavior, or a control.

    Attributes:
        label: its name.
        raw: as computed, unscaled.
        mean_norm: length of the mean activation at each layer, for the unit of that name.
        layers: of the layer axis.

    Raises:
        LensteerError: tensors of other shapes or dtypes.
    """

    label: str
    raw: Float[Tensor, "layer d_model"]
    mean_norm: Float[Tensor, " layer"]
    layers: tuple[int, ...]

    def __post_init__(self) -> None:
        typed(self)
        check_arrays(self)

    def _row(self, layer: int) -> int:
        if layer not in self.layers:
            raise LensteerError(f"{self.label!r} has no vector at layer {layer}: its layers are {list(self.layers)}")
        return self.layers.index(layer)

    def at(self, layer: int) -> Float[Tensor, " d_model"]:
        """The raw vector of one layer.

        Raises:
            LensteerError: a layer that it lacks.
        """
        return self.raw[self._row(layer)]

    def scaled(self, layer: int, unit: str = "difference") -> Float[Tensor, " d_model"]:
        """What coefficient 1 adds.

        Args:
            layer: one of its layers.
            unit: "difference": the vector as computed, `raw`; "mean_norm": `raw / ‖raw‖ · mean_norm`, as long as
                the layer's mean activation; "unit": `raw / ‖raw‖`.

        Raises:
            LensteerError: a layer that it lacks or at which it is zero, or an unknown unit.
        """
        row = self._row(layer)
        norm = self.raw[row].norm()
        if norm == 0:
            raise LensteerError(f"{self.label!r} is zero at layer {layer}: it has no direction to scale")
        if check_unit(unit) == "difference":
            return self.raw[row]
        return self.raw[row] / norm * (self.mean_norm[row] if unit == "mean_norm" else 1.0)


NO_SPANS = (
    "no trace has a span: annotate the traces first; if they are, the annotator found no sentence in them (`grammar` "
    "reads the embedded organism only, and nothing after </think> is read)"
)
_CONTROLS = ("isotropic", "covariance_matched", "shuffled")


@dataclass(frozen=True, eq=False, repr=False)
class Controls(Result):
    """Random vectors to compare with behavior vectors, from the same pass over the same activations.

    Attributes:
        isotropic: unit vectors, uniform over directions.
        covariance_matched: Gaussian, with the covariance of the spans' activations in the vectors' window.
        shuffled: the vectors' own recipe, with labels permuted among the spans of each trace; for pairs, with the sides
            of each swapped at random (for the principal component, re-paired at random).
    """

    isotropic: Float[Tensor, "control layer d_model"]
    covariance_matched: Float[Tensor, "control layer d_model"]
    shuffled: Float[Tensor, "control behavior layer d_model"]


@dataclass(frozen=True, eq=False, repr=False)
class BehaviorVectors(Result, Mapping[str, Direction]):
    """A direction per behavior and layer. `vectors["backtracking"]` is one behavior's `Direction`.

    Attributes:
        raw: mean of the positives less mean of the negatives, unscaled; or from a probe, see the recipe.
        mean_norm: length of the mean activation over all thinking tokens (with equal weight per trace); for pairs, over
            their completions, or their prompts if there are none.
        labels: of the behavior axis: those with at least one span.
        layers: of the layer axis; `l` is the output of block `l`.
        counts: number of spans, or pairs, of every requested behavior; one without spans has 0 and no vector.
        n_traces: traces with spans, or pairs.
        recipe: construction of the vectors.
        provenance: model (id, revision, hashes of tokenizer and template), site, traces, library versions.
        controls: random vectors, if requested.
        replicates: the same vectors on resampled traces or pairs, if requested; a replicate without spans of one of the
            behaviors is left out.

    Raises:
        LensteerError: inconsistent shapes, another dtype, labels or layers that are there twice, or values that are
            not finite.
    """

    raw: Float[Tensor, "behavior layer d_model"]
    mean_norm: Float[Tensor, " layer"]
    labels: tuple[str, ...]
    layers: tuple[int, ...]
    counts: Mapping[str, int]
    n_traces: int
    recipe: Recipe
    provenance: Mapping[str, Any] = field(default_factory=dict)
    controls: Controls | None = None
    replicates: Float[Tensor, "replicate behavior layer d_model"] | None = None

    def __post_init__(self) -> None:
        typed(self)
        check_arrays(self)
        for name, axis in (("labels", self.labels), ("layers", self.layers)):
            if len(set(axis)) < len(axis) or (name == "layers" and min(self.layers, default=0) < 0):
                raise LensteerError(f"the {name} of behavior vectors are {list(axis)}: give each once, layers from 0")
        for name, tensor in self._tensors().items():
            if not tensor.isfinite().all():
                raise LensteerError(f"{name} holds values that are not finite: fit the vectors again")

    def _tensors(self) -> dict[str, Tensor]:
        tensors = {"raw": self.raw, "mean_norm": self.mean_norm}
        if self.replicates is not None:
            tensors["replicates"] = self.replicates
        if self.controls is not None:
            tensors |= {f"controls.{kind}": getattr(self.controls, kind) for kind in _CONTROLS}
        return tensors

    def __getitem__(self, label: str) -> Direction:
        if label not in self.labels and label in self.counts:
            there = ", ".join(map(repr, self.labels))
            raise LensteerError(f"{label!r} had no span in the traces: choose one of {there}, or annotate more chains")
        row = self.labels.index(check_behavior(label, self.labels))
        return Direction(label, self.raw[row], self.mean_norm, self.layers)

    def __iter__(self) -> Iterator[str]:
        return iter(self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __contains__(self, label: object) -> bool:
        return label in self.labels

    __eq__ = object.__eq__  # as for all results with tensors: identity
    __hash__ = object.__hash__

    def random(self, kind: str, label: str | None = None) -> list[Direction]:
        """The random controls of one kind, ready to steer with.

        Args:
            kind: "isotropic", "covariance_matched" or "shuffled".
            label: for "shuffled": the behavior of the vectors from shuffled labels.

        Raises:
            LensteerError: no controls were fitted, an unknown kind or behavior, or a behavior missing for
                "shuffled".
        """
        if self.controls is None:
            raise LensteerError("these vectors have no random controls: fit them with n_controls=20")
        if kind not in _CONTROLS:
            raise LensteerError(f"unknown control {kind!r}: choose one of {', '.join(map(repr, _CONTROLS))}")
        draws: Tensor = getattr(self.controls, kind)
        if kind == "shuffled":
            draws = draws[:, self.labels.index(check_behavior(str(label), self.labels))]
        return [Direction(f"{kind}-{i}", draw, self.mean_norm, self.layers) for i, draw in enumerate(draws)]

    def to_dataframe(self) -> pd.DataFrame:
        """One row per behavior and layer: lengths, their ratio, the share of ‖raw‖² in three entries."""
        raw, mean_norm = self.raw.double(), self.mean_norm.double()
        norm = raw.norm(dim=-1)
        top = raw.square().sort(dim=-1, descending=True).values[..., :3].sum(-1) / norm.square()
        return pd.DataFrame(
            [
                dict(
                    behavior=label,
                    layer=layer,
                    norm=float(norm[b, i]),
                    mean_norm=float(mean_norm[i]),
                    ratio=float(norm[b, i] / mean_norm[i]),
                    top3_energy=float(top[b, i]),
                    n_spans=self.counts.get(label),
                )
                for b, label in enumerate(self.labels)
                for i, layer in enumerate(self.layers)
            ]
        )

    @classmethod
    def from_means(
        cls,
        means: Mapping[str, Float[Tensor, "layer d_model"]],
        overall: Float[Tensor, "layer d_model"],
        *,
        counts: Mapping[str, int] | None = None,
        n_traces: int = 0,
        recipe: Recipe | None = None,
        provenance: Mapping[str, Any] | None = None,
    ) -> BehaviorVectors:
        """Vectors from precomputed mean activations: `label − overall`, layers from 0 on.

        Args:
            means: mean activation of each behavior's spans.
            overall: mean activation of all tokens; its length scales the vectors.
            counts: spans of each behavior, if known.
            n_traces: traces, if known.
            recipe: how the means were computed; by default as in the published code.
            provenance: their origin.
        """
        return cls(
            raw=torch.stack([mean.double() - overall.double() for mean in means.values()]).float(),
            mean_norm=overall.double().norm(dim=-1).float(),
            labels=tuple(means),
            layers=tuple(range(len(overall))),
            counts=dict(counts or {}),
            n_traces=n_traces,
            recipe=recipe or Recipe("published", "all", "span"),
            provenance=dict(provenance or {}),
        )

    def check_model(self, model: TransformerBridge) -> None:
        """Make sure that the vectors are of this model (its folder may have been renamed).

        Raises:
            LensteerError: they are of another model, or do not record their model.
        """
        mine, theirs = self.provenance.get("model"), models.fingerprint(model)
        if not isinstance(mine, Mapping):
            raise LensteerError(f"these vectors do not say which model they are of; this one is {theirs.name!r}")
        if wrong := theirs.differences(mine):
            details = ", ".join(f"{name} {mine.get(name)!r} is not {getattr(theirs, name)!r}" for name in wrong)
            raise LensteerError(
                f"vectors of model {mine.get('name')!r} do not fit {theirs.name!r} ({details}): "
                "fit vectors on this model"
            )
        width, n_layers = models.d_model(model), models.n_layers(model)
        if self.raw.shape[-1] != width or max(self.layers, default=0) >= n_layers:
            raise LensteerError(
                f"vectors of width {self.raw.shape[-1]} at layers {list(self.layers)} do not fit {theirs.name!r}, "
                f"which is {width} wide and has layers 0 to {n_layers - 1}"
            )

    def warn_if_of_another(self, model: TransformerBridge) -> None:
        """Warn if the vectors say that they are of another model, as they may be on purpose."""
        try:
            if "model" in self.provenance:
                self.check_model(model)
        except LensteerError as error:
            warnings.warn(str(error), stacklevel=3)

    def save(self, path: str | Path) -> None:
        """Write one safetensors file. Atomic: at any moment it is the old file or the complete new one.

        Raises:
            LensteerError: the file cannot be written.
        """
        header = {
            "labels": self.labels,
            "layers": self.layers,
            "counts": dict(self.counts),
            "n_traces": self.n_traces,
            "recipe": asdict(self.recipe),
            "provenance": dict(self.provenance),
        }
        write_tensors(path, self._tensors(), header)

    @classmethod
    def load(cls, path: str | Path, model: TransformerBridge | None = None) -> BehaviorVectors:
        """Read a file that `save` wrote.

        Args:
            path: of the file.
            model: if given, the vectors must be of this model.

        Raises:
            LensteerError: no such file, a truncated or corrupt one, one that holds something else, wrong
                shapes, values that are not finite, or vectors of another model.
        """
        tensors, header = read_tensors(path)
        with reading(repr(str(path)), "save the vectors again"):
            if odd := tensors.keys() - {"raw", "mean_norm", "replicates", *(f"controls.{kind}" for kind in _CONTROLS)}:
                raise ValueError(f"the tensors {sorted(odd)} are of no behavior vectors")
            kinds = {kind: tensors[f"controls.{kind}"] for kind in _CONTROLS if f"controls.{kind}" in tensors}
            vectors = cls(
                raw=tensors["raw"],
                mean_norm=tensors["mean_norm"],
                labels=revived(tuple[str, ...], header["labels"]),
                layers=revived(tuple[int, ...], header["layers"]),
                counts=revived(dict[str, int], header["counts"]),
                n_traces=revived(int, header["n_traces"]),
                recipe=revived(Recipe, header["recipe"]),
                provenance=revived(dict[str, Any], header["provenance"]),
                controls=Controls(**kinds) if kinds else None,
                replicates=tensors.get("replicates"),
            )
        if model is not None:
            vectors.check_model(model)
        return vectors

"""Behavior vectors: definition, fitting in one pass, file format; and accuracy of probes."""

from lensteer.vectors.constructions import Recipe
from lensteer.vectors.fitting import fit_recipes, fit_vectors
from lensteer.vectors.probing import ProbeAccuracy, probe_accuracy
from lensteer.vectors.unsupervised import (
    DirectionMatch,
    DirectionMatches,
    match_directions,
    nearest_direction,
    unsupervised_directions,
)
from lensteer.vectors.values import BehaviorVectors, Controls, Direction

__all__ = [
    "BehaviorVectors",
    "Controls",
    "Direction",
    "DirectionMatch",
    "DirectionMatches",
    "ProbeAccuracy",
    "Recipe",
    "fit_recipes",
    "fit_vectors",
    "match_directions",
    "nearest_direction",
    "probe_accuracy",
    "unsupervised_directions",
]

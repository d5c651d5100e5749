"""Behavior vectors: what they are, how they are fitted in one pass, their file; how well probes read behaviors."""

from lensteer.vectors.constructions import Recipe
from lensteer.vectors.fitting import fit_recipes, fit_vectors
from lensteer.vectors.probing import ProbeAccuracy, probe_accuracy
from lensteer.vectors.values import BehaviorVectors, Controls, Direction

__all__ = [
    "BehaviorVectors",
    "Controls",
    "Direction",
    "ProbeAccuracy",
    "Recipe",
    "fit_recipes",
    "fit_vectors",
    "probe_accuracy",
]

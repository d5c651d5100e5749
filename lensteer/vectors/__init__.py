"""Behavior vectors: what they are (`values`), how they are fitted (`fitting`), their file (`storage`)."""

from lensteer.vectors.fitting import fit_recipes, fit_vectors
from lensteer.vectors.values import BehaviorVectors, Controls, Direction

__all__ = ["BehaviorVectors", "Controls", "Direction", "fit_recipes", "fit_vectors"]

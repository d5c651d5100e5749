"""Behavior vectors: what they are, how they are fitted in one pass, their file."""

from lensteer.vectors.direction import Direction
from lensteer.vectors.fitting import fit_recipes, fit_vectors
from lensteer.vectors.values import BehaviorVectors, Controls

__all__ = ["BehaviorVectors", "Controls", "Direction", "fit_recipes", "fit_vectors"]

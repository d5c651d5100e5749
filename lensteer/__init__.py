"""lensteer: find, locate, steer and verify behavior directions in reasoning models."""

from lensteer.behaviors import BEHAVIORS, STEERED, Span
from lensteer.errors import LensteerError

__all__ = ["BEHAVIORS", "STEERED", "LensteerError", "Span"]

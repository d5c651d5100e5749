"""Directions from contrast: pairs of texts that differ in a concept, from files to vectors and traces."""

from lensteer.contrast.completing import complete_pairs, pair_traces
from lensteer.contrast.fitting import POSITIONS, Position, fit_directions
from lensteer.contrast.pairs import FORMATS, Pair, Text, load_pairs, pair_up, with_system

__all__ = [
    "FORMATS",
    "POSITIONS",
    "Pair",
    "Position",
    "Text",
    "complete_pairs",
    "fit_directions",
    "load_pairs",
    "pair_traces",
    "pair_up",
    "with_system",
]

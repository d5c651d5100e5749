"""Directions from contrast: pairs of texts that differ in a concept, from files to vectors and traces."""

from lensteer.contrast.completing import complete_pairs, pair_traces
from lensteer.contrast.fitting import fit_directions
from lensteer.contrast.formats import FORMATS, load_pairs
from lensteer.contrast.pairs import Pair, Text, pair_up
from lensteer.contrast.positions import POSITIONS, Position

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
]

"""One-shot steering: keys and values of one cache slot are edited during prefill, and no hook runs afterwards.

S = mean over contrastive pairs of (positive - negative), of keys and of values, at one position (Belitsky et al.,
arXiv 2507.08799). Here keys are averaged before rotation and rotated to the slot's position at use.
"""

from lensteer.cache_steering.fitting import fit_cache_vector, pairs_digest
from lensteer.cache_steering.pairs import (
    NEIGHBORS,
    Pair,
    Record,
    benchmark_records,
    contrastive_pairs,
    load_records,
    swapped,
)
from lensteer.cache_steering.reasoning import reasons, steps_of
from lensteer.cache_steering.styles import style_of
from lensteer.steering.cache import CACHE_UNITS, OFFSET, POSITIONS, CachePlan, CacheVector, edit_cache

__all__ = [
    "CACHE_UNITS",
    "NEIGHBORS",
    "OFFSET",
    "POSITIONS",
    "CachePlan",
    "CacheVector",
    "Pair",
    "Record",
    "benchmark_records",
    "contrastive_pairs",
    "edit_cache",
    "fit_cache_vector",
    "load_records",
    "pairs_digest",
    "reasons",
    "steps_of",
    "style_of",
    "swapped",
]

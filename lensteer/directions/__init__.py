"""What a direction is made of: difference of means, its random controls, logistic probes, components of pairs."""

from lensteer.directions.components import PairComponents, principal_component
from lensteer.directions.contrast import (
    AGGREGATIONS,
    CONSTRUCTIONS,
    NEGATIVES,
    PAIR_CONSTRUCTIONS,
    PAIRS,
    ContrastSums,
    Recipe,
    contrast_weights,
    isotropic,
)
from lensteer.directions.probes import Probe, ProbeFits, cross_validated, fit_probe

__all__ = [
    "AGGREGATIONS",
    "CONSTRUCTIONS",
    "NEGATIVES",
    "PAIRS",
    "PAIR_CONSTRUCTIONS",
    "ContrastSums",
    "PairComponents",
    "Probe",
    "ProbeFits",
    "Recipe",
    "contrast_weights",
    "cross_validated",
    "fit_probe",
    "isotropic",
    "principal_component",
]

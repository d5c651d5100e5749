"""What a direction is made of: difference of means, its random controls, logistic probes."""

from lensteer.directions.contrast import (
    AGGREGATIONS,
    CONSTRUCTIONS,
    NEGATIVES,
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
    "ContrastSums",
    "Probe",
    "ProbeFits",
    "Recipe",
    "contrast_weights",
    "cross_validated",
    "fit_probe",
    "isotropic",
]

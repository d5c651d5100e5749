"""Units of a steering coefficient, by name. What each of them means is computed where the vectors are."""

from lensteer.errors import LensteerError

#: What coefficient 1 adds: the difference of means as it was computed; a vector as long as the layer's mean activation;
#: or one of length 1. The first carries from model to model (`analyses/unit_of_coefficients.py`).
UNITS = ("difference", "mean_norm", "unit")

#: The same in words.
UNIT_WORDS = {
    "difference": "1 = the difference of means itself",
    "mean_norm": "1 = as long as the mean activation",
    "unit": "1 = length 1",
}


def check_unit(unit: str) -> str:
    """The unit itself, if it is one.

    Raises:
        LensteerError: otherwise.
    """
    if unit not in UNITS:
        raise LensteerError(f"no unit {unit!r} of a coefficient: choose one of {list(UNITS)}")
    return unit

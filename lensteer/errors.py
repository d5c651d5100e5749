"""The one exception that lensteer raises for user errors.

Broken invariants of lensteer itself are `AssertionError`s.
"""


class LensteerError(ValueError):
    """The user passed something invalid.

    The message repeats the offending value and says what is valid. It is a `ValueError`, so code that catches those
    keeps working.
    """

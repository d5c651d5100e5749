"""The one exception that lensteer raises for what a user did.

Broken invariants of lensteer itself are `AssertionError`s.
"""


class LensteerError(ValueError):
    """Something a user passed cannot work.

    The message repeats the offending value and says what would be right. It is a `ValueError`, so that code
    which catches those keeps working.
    """

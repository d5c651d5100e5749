"""Plans as files that other software serves, each checked against the hooked model.

A module here is not named like the function it holds: `ls.export.checkpoint` is the function.
"""

from lensteer.export.control_vectors import ControlVector, gguf, read_control_vector
from lensteer.export.edits import additions, scope_of

__all__ = ["ControlVector", "additions", "gguf", "read_control_vector", "scope_of"]

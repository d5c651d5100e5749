"""lensteer: find, locate, steer and verify behavior directions in reasoning models.

The public names and their modules are listed in `__init__.pyi`. Each is imported when it is first used, since torch and
TransformerLens take seconds: `lensteer --help` needs neither.
"""

import lazy_loader as _lazy

from lensteer._version import __version__ as __version__

__getattr__, __dir__, __all__ = _lazy.attach_stub(__name__, __file__)

"""Plans as files that other software serves, each checked against the hooked model.

A module here is not named like the function it holds: `ls.export.checkpoint` is the function.
"""

from lensteer.export.checkpoints import SteeredCheckpoint, checkpoint
from lensteer.export.edits import additions, scope_of
from lensteer.export.plain import PlainExport, cache, hf
from lensteer.export.plan_files import PlanFile, folder, load_plan, push_to_hub, read_plan

__all__ = [
    "PlainExport",
    "PlanFile",
    "SteeredCheckpoint",
    "additions",
    "cache",
    "checkpoint",
    "folder",
    "hf",
    "load_plan",
    "push_to_hub",
    "read_plan",
    "scope_of",
]

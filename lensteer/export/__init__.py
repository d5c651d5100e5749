"""Plans as files that other software serves, each checked against the hooked model.

A module here is not named like the function it holds: `ls.export.checkpoint` is the function.
"""

from lensteer.endpoints import Answer, Asking, Endpoint
from lensteer.export.checkpoints import SteeredCheckpoint, checkpoint
from lensteer.export.control_vectors import ControlVector, gguf, read_control_vector
from lensteer.export.edits import additions, scope_of
from lensteer.export.engines import easysteer, lm_eval, rhizonymph, svec, vllm_lens
from lensteer.export.plain import PlainExport, cache, hf
from lensteer.export.plan_files import PlanFile, folder, load_plan, push_to_hub, read_plan
from lensteer.export.servers import started
from lensteer.export.verification import Look, Verification, verify

__all__ = [
    "Answer",
    "Asking",
    "ControlVector",
    "Endpoint",
    "Look",
    "PlainExport",
    "PlanFile",
    "SteeredCheckpoint",
    "Verification",
    "additions",
    "cache",
    "checkpoint",
    "easysteer",
    "folder",
    "gguf",
    "hf",
    "lm_eval",
    "load_plan",
    "push_to_hub",
    "read_control_vector",
    "read_plan",
    "rhizonymph",
    "scope_of",
    "started",
    "svec",
    "verify",
    "vllm_lens",
]

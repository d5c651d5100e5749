"""The only editor of residuals: what is done where (`plans`), to a batch (`edits`), in a running model (`hooks`)."""

from lensteer.steering.edits import Edits
from lensteer.steering.hooks import active_plans, attached, foreign_hooks, tokens_seen, wanted_prefill
from lensteer.steering.plans import OPERATORS, Joinable, Plan, Plans, Slot, Steerable, SteeringPlan

__all__ = [
    "OPERATORS",
    "Edits",
    "Joinable",
    "Plan",
    "Plans",
    "Slot",
    "Steerable",
    "SteeringPlan",
    "active_plans",
    "attached",
    "foreign_hooks",
    "tokens_seen",
    "wanted_prefill",
]

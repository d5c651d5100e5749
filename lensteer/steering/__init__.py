"""The only editor of residuals: what is done where (`plans`), to a batch (`edits`), in a running model (`hooks`)."""

from lensteer.steering.plans import (
    OPERATORS,
    Edits,
    Joinable,
    Plan,
    Plans,
    Slot,
    Steerable,
    SteeringPlan,
    active_plans,
    attached,
    foreign_hooks,
    tokens_seen,
    wanted_prefill,
)

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

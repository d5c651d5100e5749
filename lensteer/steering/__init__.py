"""Steering: edits of residuals (`plans`) and one-shot edits of the KV cache (`cache`)."""

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

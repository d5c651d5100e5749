"""Steering: edits of residuals (`plans`) and one-shot edits of the KV cache (`cache`)."""

from lensteer.steering.evidence import ControlRange, Evidence, Sample, TextMeasure
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
    "ControlRange",
    "Edits",
    "Evidence",
    "Joinable",
    "Plan",
    "Plans",
    "Sample",
    "Slot",
    "Steerable",
    "SteeringPlan",
    "TextMeasure",
    "active_plans",
    "attached",
    "foreign_hooks",
    "tokens_seen",
    "wanted_prefill",
]

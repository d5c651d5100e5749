"""Steering: edits of residuals (`plans`; their `operators`, `gates` and `schedules`), and of the KV cache (`cache`)."""

from lensteer.steering.evidence import ControlRange, Evidence, Sample, TextMeasure
from lensteer.steering.gates import Gate
from lensteer.steering.operators import OPERATORS
from lensteer.steering.plans import (
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
from lensteer.steering.schedules import Schedule

__all__ = [
    "OPERATORS",
    "ControlRange",
    "Edits",
    "Evidence",
    "Gate",
    "Joinable",
    "Plan",
    "Plans",
    "Sample",
    "Schedule",
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

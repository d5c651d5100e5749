"""Does steering do what it claims: arms that run side by side, doses chosen on dev tasks, effects on held-out ones."""

from lensteer.evaluation.arms import Arm, Record, Sampling, measure, run_arms
from lensteer.evaluation.doses import DOSES, Dose, Doses, choose_coefficients
from lensteer.evaluation.effects import evaluate, random_directions, summarize
from lensteer.evaluation.results import ArmSummary, Effect, Evaluation
from lensteer.evaluation.shares import ResampledShares, interval_of

__all__ = [
    "DOSES",
    "Arm",
    "ArmSummary",
    "Dose",
    "Doses",
    "Effect",
    "Evaluation",
    "Record",
    "ResampledShares",
    "Sampling",
    "choose_coefficients",
    "evaluate",
    "interval_of",
    "measure",
    "random_directions",
    "run_arms",
    "summarize",
]

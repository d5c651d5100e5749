"""Does steering do what it claims: arms that run side by side, doses chosen on dev tasks, effects on held-out ones."""

from lensteer.evaluation.ablated import MEAN, PositionAblation, PositionEffect
from lensteer.evaluation.arms import Arm, Record, Sampling, measure, run_arms
from lensteer.evaluation.choice import LEAD_IN, graded, read_out
from lensteer.evaluation.doses import DOSES, Dose, Doses, choose_coefficients
from lensteer.evaluation.effects import evaluate, random_directions, summarize
from lensteer.evaluation.modes import FIGURES, Estimate, ModeArm, Modes, measure_modes
from lensteer.evaluation.results import ArmSummary, Effect, Evaluation
from lensteer.evaluation.shares import ResampledShares, interval_of
from lensteer.evaluation.words import WORDS

__all__ = [
    "DOSES",
    "FIGURES",
    "LEAD_IN",
    "MEAN",
    "WORDS",
    "Arm",
    "ArmSummary",
    "Dose",
    "Doses",
    "Effect",
    "Estimate",
    "Evaluation",
    "ModeArm",
    "Modes",
    "PositionAblation",
    "PositionEffect",
    "Record",
    "ResampledShares",
    "Sampling",
    "choose_coefficients",
    "evaluate",
    "graded",
    "interval_of",
    "measure",
    "measure_modes",
    "random_directions",
    "read_out",
    "run_arms",
    "summarize",
]

"""Does steering do what it claims: arms that run side by side, doses chosen on dev tasks, effects on held-out ones."""

from lensteer.evaluation.choice import LEAD_IN, graded, read_out
from lensteer.evaluation.coefficients import DOSES, Dose, Doses, choose_coefficients
from lensteer.evaluation.conditions import Arm, Counts, Record, by_arm, draw_chains, measure, run_arms
from lensteer.evaluation.controls import POOLS, random_directions
from lensteer.evaluation.effects import BASE, KINDS, WORDS, evaluate, summarize
from lensteer.evaluation.modes import FIGURES, ModeArm, Modes, measure_modes
from lensteer.evaluation.power import Power, power
from lensteer.evaluation.quality import text_quality
from lensteer.evaluation.results import (
    MEAN,
    ArmSummary,
    ControlRank,
    Effect,
    Evaluation,
    PositionAblation,
    PositionEffect,
)
from lensteer.evaluation.shares import ResampledShares, estimate_of
from lensteer.evaluation.text import GRAMMAR_MARGINS, Margins, TextCheck, TextFigure, text_check

__all__ = [
    "BASE",
    "DOSES",
    "FIGURES",
    "GRAMMAR_MARGINS",
    "KINDS",
    "LEAD_IN",
    "MEAN",
    "POOLS",
    "WORDS",
    "Arm",
    "ArmSummary",
    "ControlRank",
    "Counts",
    "Dose",
    "Doses",
    "Effect",
    "Evaluation",
    "Margins",
    "ModeArm",
    "Modes",
    "PositionAblation",
    "PositionEffect",
    "Power",
    "Record",
    "ResampledShares",
    "TextCheck",
    "TextFigure",
    "by_arm",
    "choose_coefficients",
    "draw_chains",
    "estimate_of",
    "evaluate",
    "graded",
    "measure",
    "measure_modes",
    "power",
    "random_directions",
    "read_out",
    "run_arms",
    "summarize",
    "text_check",
    "text_quality",
]

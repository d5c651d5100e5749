"""Does steering work as claimed: conditions on shared tasks, coefficients from dev tasks, effects on held-out tasks."""

from lensteer.evaluation.choice import LEAD_IN, graded, read_out
from lensteer.evaluation.coefficients import COEFFICIENTS, ChosenCoefficients, CoefficientTrial, choose_coefficients
from lensteer.evaluation.conditions import Condition, Counts, Record, by_condition, draw_chains, measure, run_conditions
from lensteer.evaluation.controls import POOLS, random_directions
from lensteer.evaluation.downstream import Benchmark, benchmark
from lensteer.evaluation.effects import BASE, BASELINE_PROMPTS, KINDS, evaluate, summarize
from lensteer.evaluation.margins import GRAMMAR_MARGINS, Margins, TextCheck, TextFigure, text_check
from lensteer.evaluation.modes import FIGURES, Modes, ModeSummary, measure_modes
from lensteer.evaluation.power import Power, power
from lensteer.evaluation.quality import text_quality
from lensteer.evaluation.results import (
    MEAN,
    ConditionSummary,
    ControlRank,
    Effect,
    Evaluation,
    PositionAblation,
    PositionEffect,
)
from lensteer.evaluation.shares import ResampledShares, estimate_of

__all__ = [
    "BASE",
    "BASELINE_PROMPTS",
    "COEFFICIENTS",
    "FIGURES",
    "GRAMMAR_MARGINS",
    "KINDS",
    "LEAD_IN",
    "MEAN",
    "POOLS",
    "Benchmark",
    "ChosenCoefficients",
    "CoefficientTrial",
    "Condition",
    "ConditionSummary",
    "ControlRank",
    "Counts",
    "Effect",
    "Evaluation",
    "Margins",
    "ModeSummary",
    "Modes",
    "PositionAblation",
    "PositionEffect",
    "Power",
    "Record",
    "ResampledShares",
    "TextCheck",
    "TextFigure",
    "benchmark",
    "by_condition",
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
    "run_conditions",
    "summarize",
    "text_check",
    "text_quality",
]

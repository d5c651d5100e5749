"""Does steering work as claimed: conditions on shared tasks, coefficients from dev tasks, effects on held-out tasks."""

from lensteer.evaluation.choice import LEAD_IN, graded, read_out
from lensteer.evaluation.clean_chains import CleanChains, on_clean_chains
from lensteer.evaluation.coefficients import COEFFICIENTS, ChosenCoefficients, CoefficientTrial, choose_coefficients
from lensteer.evaluation.conditions import Condition, Counts, Record, by_condition, draw_chains, measure, run_conditions
from lensteer.evaluation.controls import KL_POOLS, POOLS, random_directions
from lensteer.evaluation.dose_response import DosePoint, DoseResponse, dose_response
from lensteer.evaluation.downstream import Benchmark, benchmark
from lensteer.evaluation.effects import (
    BASE,
    BASELINE_PROMPTS,
    BASELINES,
    FORCED_WORDS,
    KINDS,
    evaluate,
    summarize,
)
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
from lensteer.evaluation.shares import ResampledShares, estimate_of, rank_correlation
from lensteer.evaluation.side_effects import SideEffect, side_effects

__all__ = [
    "BASE",
    "BASELINES",
    "BASELINE_PROMPTS",
    "COEFFICIENTS",
    "FIGURES",
    "FORCED_WORDS",
    "GRAMMAR_MARGINS",
    "KINDS",
    "KL_POOLS",
    "LEAD_IN",
    "MEAN",
    "POOLS",
    "Benchmark",
    "ChosenCoefficients",
    "CleanChains",
    "CoefficientTrial",
    "Condition",
    "ConditionSummary",
    "ControlRank",
    "Counts",
    "DosePoint",
    "DoseResponse",
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
    "SideEffect",
    "TextCheck",
    "TextFigure",
    "benchmark",
    "by_condition",
    "choose_coefficients",
    "dose_response",
    "draw_chains",
    "estimate_of",
    "evaluate",
    "graded",
    "measure",
    "measure_modes",
    "on_clean_chains",
    "power",
    "random_directions",
    "rank_correlation",
    "read_out",
    "run_conditions",
    "side_effects",
    "summarize",
    "text_check",
    "text_quality",
]

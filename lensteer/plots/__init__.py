"""Plotly figures of results. No statistics are computed here; all colors are defined here.

A behavior has the same color in every figure, in annotated chains and on the report's page.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from plotly import graph_objects as go

from lensteer.ablation import ForcedEffect, LeaveOneOut
from lensteer.attention import BehaviorAttention, SentenceAttention
from lensteer.attribution import LayerScores
from lensteer.attribution.overlap import EmbeddingOverlap
from lensteer.errors import LensteerError
from lensteer.evaluation import Benchmark, ChosenCoefficients, Evaluation, Modes
from lensteer.export.verification import Verification
from lensteer.plots.attention import behavior_attention, head_map, sentence_attention
from lensteer.plots.chains import Html, chain_html, forced_effect, leave_one_out, legend_html, token_projections
from lensteer.plots.geometry import layer_angles, recipe_comparison, vector_geometry
from lensteer.plots.measured import (
    benchmark,
    coefficients,
    dose_response,
    effects,
    entanglement,
    kl_by_token,
    modes,
    position_ablation,
)
from lensteer.plots.served import looks
from lensteer.plots.style import COLORS, FONT, PAGE, PAPER, TEMPLATE, color
from lensteer.plots.where import against_controls, cosine_matrix, layer_scores, overlap
from lensteer.results import Result
from lensteer.vectors import BehaviorVectors
from lensteer.vectors.geometry import CosineMatrix
from lensteer.vectors.projections import TokenProjections

__all__ = [
    "COLORS",
    "FONT",
    "PAGE",
    "PAPER",
    "TEMPLATE",
    "Html",
    "against_controls",
    "behavior_attention",
    "benchmark",
    "chain_html",
    "coefficients",
    "color",
    "cosine_matrix",
    "dose_response",
    "effects",
    "entanglement",
    "figure",
    "forced_effect",
    "head_map",
    "kl_by_token",
    "layer_angles",
    "layer_scores",
    "leave_one_out",
    "legend_html",
    "looks",
    "modes",
    "overlap",
    "position_ablation",
    "recipe_comparison",
    "sentence_attention",
    "token_projections",
    "vector_geometry",
]

_FIGURES: dict[type, Callable[..., go.Figure]] = {
    BehaviorAttention: behavior_attention,
    BehaviorVectors: vector_geometry,
    Benchmark: benchmark,
    CosineMatrix: cosine_matrix,
    ChosenCoefficients: coefficients,
    EmbeddingOverlap: overlap,
    Evaluation: effects,
    ForcedEffect: forced_effect,
    LayerScores: layer_scores,
    LeaveOneOut: leave_one_out,
    Modes: modes,
    SentenceAttention: sentence_attention,
    TokenProjections: token_projections,
    Verification: looks,
}


def figure(result: Result, **options: Any) -> go.Figure:
    """The figure of a result: what `result.plot()` shows.

    Args:
        result: of a kind that has a figure.
        options: of the figure's function, such as `layer` and `head` of `sentence_attention`.

    Raises:
        LensteerError: there is no figure for such a result.
    """
    if type(result) not in _FIGURES:
        raise LensteerError(
            f"no figure for a {type(result).__name__}: there are some for {sorted(t.__name__ for t in _FIGURES)}"
        )
    return _FIGURES[type(result)](result, **options)

"""Results in, plotly figures out. Computes nothing; the only home of colors.

A behavior has the same color in every figure, in annotated chains and on the report's page.
"""

from lensteer.plots.attention import behavior_attention, head_map, sentence_attention
from lensteer.plots.chains import Html, chain_html, legend_html
from lensteer.plots.forced import forced_effect, leave_one_out
from lensteer.plots.geometry import layer_angles, recipe_comparison, vector_geometry
from lensteer.plots.measured import doses, effects
from lensteer.plots.modes import kl_by_token, modes
from lensteer.plots.nulls import against_nulls
from lensteer.plots.positions import position_ablation
from lensteer.plots.projections import token_projections
from lensteer.plots.style import COLORS, FONT, PAGE, PAPER, TEMPLATE, color
from lensteer.plots.where import cosine_matrix, layer_scores, overlap

__all__ = [
    "COLORS",
    "FONT",
    "PAGE",
    "PAPER",
    "TEMPLATE",
    "Html",
    "against_nulls",
    "behavior_attention",
    "chain_html",
    "color",
    "cosine_matrix",
    "doses",
    "effects",
    "forced_effect",
    "head_map",
    "kl_by_token",
    "layer_angles",
    "layer_scores",
    "leave_one_out",
    "legend_html",
    "modes",
    "overlap",
    "position_ablation",
    "recipe_comparison",
    "sentence_attention",
    "token_projections",
    "vector_geometry",
]

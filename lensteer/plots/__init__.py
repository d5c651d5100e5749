"""Results in, plotly figures out. Computes nothing; the only home of colors.

A behavior has the same color in every figure, in annotated chains and on the report's page.
"""

from lensteer.plots.chains import Html, chain_html, legend_html
from lensteer.plots.measured import doses, effects
from lensteer.plots.style import COLORS, FONT, PAGE, PAPER, TEMPLATE, color
from lensteer.plots.where import cosine_matrix, layer_scores, overlap

__all__ = [
    "COLORS",
    "FONT",
    "PAGE",
    "PAPER",
    "TEMPLATE",
    "Html",
    "chain_html",
    "color",
    "cosine_matrix",
    "doses",
    "effects",
    "layer_scores",
    "legend_html",
    "overlap",
]

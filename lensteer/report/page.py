"""`render`: sections and figures put together as one page that opens offline."""

from __future__ import annotations

from html import escape

from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from lensteer import plots
from lensteer.report import sections, trust
from lensteer.report.cache import cache
from lensteer.report.markup import Figures, frame, section
from lensteer.report.results import RunResults
from lensteer.report.summary import summary
from lensteer.report.where import where


def render(results: RunResults) -> str:
    """The report as HTML, complete in itself: plotly's script is inside, once, and the page requests nothing.

    Every number in its text is one of `summary(results)`. Text of models and users is escaped.
    """
    f = Figures(summary(results))
    reference = None if results.reference is None else Figures(results.reference, "reference.")
    site = results.site
    body = [
        f"<header><h1>{escape(results.title)}</h1><p class='muted'>lensteer: behaviors of a reasoning model as "
        "directions, where they act, and what steering along them does</p></header>",
        sections.asked(results, f),
        trust.annotator(f),
        sections.found(results, f, reference, _figure("effects", plots.effects(results.evaluation))),
        sections.sure(results, f),
        where(
            results,
            f,
            _figure("layer-scores", plots.layer_scores(results.scores, site)),
            "" if results.nulls is None else _figure("nulls", plots.against_nulls(results.nulls, site)),
            _figure("overlap", plots.overlap(results.overlap, site)),
        ),
        section(
            "geometry",
            "How the vectors lie to one another",
            "<p>Behaviors whose vectors have a large cosine are pushed together: steering one moves the other.</p>",
            _figure("cosines", plots.cosine_matrix(results.cosine)),
        ),
        section(
            "doses",
            "How strong",
            f"<p>The coefficient of each behavior, down and up, is the largest tried at which the text on "
            f"{f('doses.n_tasks', 'count')} dev tasks × {f('doses.n_samples', 'count')} is no worse than unsteered by "
            "more than the stated margins.</p>",
            _figure("dose-curves", plots.doses(results.doses)),
        ),
        cache(results, f),
        sections.chains(results),
        sections.cost(results, f),
        sections.caveats(),
    ]
    return frame(results.title, "\n".join(body), get_plotlyjs())


def _figure(anchor: str, figure: go.Figure) -> str:
    config = {"displayModeBar": False, "responsive": True}
    height = f"{figure.layout.height}px"
    markup = figure.to_html(
        full_html=False, include_plotlyjs=False, div_id=anchor + "-figure", config=config, default_height=height
    )
    return f"<figure>{markup}</figure>"

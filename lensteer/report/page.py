"""`render`: the templates filled with the figures of a run, as one page that opens offline."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import cache

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from lensteer import plots
from lensteer.behaviors import in_order
from lensteer.evaluation.results import SHOWN
from lensteer.report.figures import Figures
from lensteer.report.results import Example, RunResults
from lensteer.report.summary import summary
from lensteer.traces import Trace


def render(results: RunResults) -> str:
    """The report as HTML, complete in itself: plotly's script is inside, once, and the page requests nothing.

    Every number in its text is one of `summary(results)`. Text of models and users is escaped.
    """
    f = Figures(summary(results))
    evaluation = results.evaluation
    not_shown = {kind: [v for v in f.part(f"shown.n_{kind}") if v != SHOWN] for kind in ("up", "down")}
    template = _environment().get_template("page.html.j2")
    return template.render(
        results=results,
        evaluation=evaluation,
        f=f,
        reference=None if results.reference is None else Figures(results.reference, "reference."),
        labels=in_order(f.part("traces.spans")),
        not_shown={kind: verdicts for kind, verdicts in not_shown.items() if verdicts},
        arms=[arm for arm in evaluation.arms if arm.kind != "control"],
        control_groups=_distinct((arm.layer, arm.pool) for arm in evaluation.arms if arm.kind == "control"),
        pools=_distinct(control.pool for effect in evaluation.effects for control in effect.controls),
        tasks=_by_task(results.examples),
        plotly=Markup(get_plotlyjs()),
    )


@cache
def _environment() -> Environment:
    """Where templates are read. What is not `Markup` is escaped, and a misspelled variable is an error."""
    environment = Environment(
        loader=PackageLoader("lensteer.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.globals |= {
        "SHOWN": SHOWN,
        "plots": plots,
        "chain": _chain,
        "drawn": _drawn,
        "legend": _legend,
    }
    return environment


def _drawn(anchor: str, figure: go.Figure) -> Markup:
    return Markup(
        figure.to_html(
            full_html=False,
            include_plotlyjs=False,
            div_id=f"{anchor}-figure",
            config={"displayModeBar": False, "responsive": True},
            default_height=f"{figure.layout.height}px",
        )
    )


def _chain(trace: Trace) -> Markup:
    return Markup(plots.chain_html(trace, header=False))


def _legend(examples: Sequence[Example]) -> Markup:
    return Markup(plots.legend_html(span.label for example in examples for span in example.trace.spans))


def _by_task(examples: Sequence[Example]) -> list[list[Example]]:
    by_task: dict[str, list[Example]] = {}
    for example in examples:
        by_task.setdefault(example.trace.task.id, []).append(example)
    return list(by_task.values())


def _distinct(values: Iterable[object]) -> list[object]:
    return list(dict.fromkeys(values))

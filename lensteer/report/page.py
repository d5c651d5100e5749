"""`render`: fill the templates with the figures of a run, as one page that opens offline.

Every number on the page is a `<data>` element that `Figures` wrote from a summary, with its name in `title`, so that
the page and `summary.json` cannot disagree.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from functools import cache
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from plotly import graph_objects as go
from plotly.offline import get_plotlyjs

from lensteer import plots
from lensteer.behaviors import BEHAVIORS, in_order
from lensteer.evaluation import KL_POOLS
from lensteer.evaluation.results import SHOWN
from lensteer.evaluation.side_effects import MEASURED
from lensteer.report.summary import Example, RunResults, condition_key, key_of, summary
from lensteer.traces import Trace

#: Styles of numbers: format and factor.
STYLES: dict[str, tuple[str, float]] = {
    "count": ("{:,.0f}", 1),
    "layer": ("L{:.0f}", 1),
    "percent": ("{:.1f} %", 100),
    "bare percent": ("{:.1f}", 100),
    "points": ("{:+.1f}", 100),
    "signed": ("{:+.3g}", 1),
    "plain": ("{:.3g}", 1),
    "cosine": ("{:+.2f}", 1),
    "tenths": ("{:,.1f}", 1),
    "thousandths": ("{:.3f}", 1),
}
NOTHING = Markup("–")

#: Kinds of control vectors, as text: for vectors from labeled sentences, and from pairs.
CONTROL_NAMES = {
    "isotropic": "random direction",
    "covariance_matched": "the spans' covariance",
    "shuffled": "shuffled labels",
}
PAIR_CONTROL_NAMES = CONTROL_NAMES | {"covariance_matched": "the pairs' covariance", "shuffled": "shuffled sides"}


def _with_kl(names: Mapping[str, str]) -> dict[str, str]:
    """The same, and those of equal KL."""
    return {**names, **{f"{pool}_kl": f"{name}, equal KL" for pool, name in names.items()}}


class Figures:
    """Writes the figures of one summary; `name in figures` says whether there is one.

    Args:
        found: the summary.
        source: prefix of the names if the summary is not this run's.
    """

    def __init__(self, found: Mapping[str, Any], source: str = "") -> None:
        self.found = found
        self.source = source

    def __contains__(self, name: str) -> bool:
        return self.found.get(name) is not None

    def __call__(self, name: str, style: str = "plain") -> Markup:
        """One figure, or a dash if there is none."""
        value = self.found.get(name)
        if value is None:
            return NOTHING
        if isinstance(value, (bool, str)):
            written, text = str(value), visible(str(value)) if style == "token" else str(value)
        else:
            pattern, factor = STYLES[style]
            written, text = repr(value), pattern.format(value * factor).replace("-", "−")
        return Markup('<data title="{}" value="{}">{}</data>').format(self.source + name, written, text)

    def between(self, low: str, high: str, style: str) -> Markup:
        """Two figures with "to" between them; the percent sign appears once."""
        return Markup("{} to {}").format(self(low, _bare(style)), self(high, style))

    def bounded(self, name: str, style: str, low: str = "", high: str = "") -> Markup:
        """A figure with its interval in brackets, without the unit; without it if either end is missing.

        Args:
            name: of the figure.
            style: of all three.
            low: name of the lower end; by default the figure's with `_low`.
            high: name of the upper end; by default the figure's with `_high`.
        """
        low, high = low or f"{name}_low", high or f"{name}_high"
        if low not in self or high not in self:
            return self(name, style)
        interval = Markup('<span class="interval">({})</span>').format(self.between(low, high, _bare(style)))
        return self(name, style) + interval

    def part(self, prefix: str) -> dict[str, Any]:
        """The entries under a dotted prefix, without the prefix, in order."""
        start = prefix + "."
        return {name.removeprefix(start): value for name, value in self.found.items() if name.startswith(start)}


def _bare(style: str) -> str:
    return "bare percent" if style == "percent" else style


def visible(token: str) -> str:
    """A token's text with marks for invisible characters: line breaks, tabs, and a text of spaces only."""
    if not token.strip(" "):
        return "␣" * len(token) or "∅"
    text = token.replace("\r", "␍").replace("\n", "⏎").replace("\t", "⇥")
    return "".join(c if c.isprintable() else f"\\u{ord(c):04x}" for c in text)


def render(results: RunResults) -> str:
    """The report as self-contained HTML: plotly's script is embedded once, and the page makes no requests.

    Every number in its text is one of `summary(results)`. Text of models and users is escaped.
    """
    f = Figures(summary(results))
    evaluation, from_pairs = results.evaluation, bool(results.config.get("pairs"))
    scored = evaluation.unit == "score"
    not_shown = {kind: [v for v in f.part(f"shown.n_{kind}") if v != SHOWN] for kind in ("up", "down")}
    template = _environment().get_template("page.html.j2")
    return template.render(
        results=results,
        evaluation=evaluation,
        f=f,
        unit=evaluation.unit,
        scored=scored,
        prompted=any(effect.kind == "prompted" for effect in evaluation.effects),
        from_pairs=from_pairs,
        reasoning=not from_pairs and not scored and set(results.layers) <= set(BEHAVIORS),
        control_names=_with_kl(PAIR_CONTROL_NAMES if from_pairs else CONTROL_NAMES),
        judged=any(condition.coherence is not None for condition in evaluation.conditions),
        on_clean=any(condition.clean is not None for condition in evaluation.conditions),
        forced=any(effect.kind == "forced" for effect in evaluation.effects),
        moved=in_order({e.measured for e in evaluation.side_effects} - set(MEASURED)),
        reference=None if results.reference is None else Figures(results.reference, "reference."),
        labels=in_order(f.part("traces.spans")),
        not_shown={kind: verdicts for kind, verdicts in not_shown.items() if verdicts},
        graded=any(math.isfinite(condition.accuracy.value) for condition in evaluation.conditions),
        conditions=[condition for condition in evaluation.conditions if condition.kind != "control"],
        control_groups=_distinct(
            (condition.layer, condition.pool) for condition in evaluation.conditions if condition.kind == "control"
        ),
        pools=_distinct(control.pool for effect in evaluation.effects for control in effect.controls),
        tasks=_by_task(results.examples),
        labeled=any(example.trace.spans for example in results.examples) or not scored,
        plotly=Markup(get_plotlyjs()),
    )


@cache
def _environment() -> Environment:
    """The environment of the templates. Everything but `Markup` is escaped, and an undefined variable is an error."""
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
        "kl_pools": KL_POOLS,
        "condition_key": condition_key,
        "drawn": _drawn,
        "key_of": key_of,
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

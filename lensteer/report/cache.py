"""The report's section on a one-shot edit of the KV cache, beside the edits of the residual stream."""

from __future__ import annotations

from html import escape

from lensteer.report.markup import Figures, section, table
from lensteer.report.results import RunResults

STYLES = {"thinks": "percent", "accuracy": "percent", "parsed": "percent", "finished": "percent", "length": "count"}


def cache(results: RunResults, f: Figures) -> str:
    """What each arm's answers were like; nothing where no cache edit was measured."""
    if results.cache is None:
        return ""
    rows = []
    for arm in (a.arm for a in results.cache["test"].arms if a.kind != "control"):
        cells = [
            f(f"cache.{arm}.{figure}.mean", style)
            + f.interval(f"cache.{arm}.{figure}.low", f"cache.{arm}.{figure}.high", style)
            for figure, style in STYLES.items()
        ]
        rows.append([escape(arm), *cells])
    if f.found.get("cache.n_random"):
        spread = [f.between(f"cache.random.{name}.min", f"cache.random.{name}.max", s) for name, s in STYLES.items()]
        rows.append([f"{f('cache.n_random', 'count')} random vectors", *spread])
    head = ["arm", "thinks", "right<br>answers", "answers<br>parse", "answers<br>end", "tokens"]
    return section(
        "cache",
        "One edit of the KV cache instead",
        f"<p>A vector “{f('cache.vector.label')}”, the mean difference of {f('cache.vector.n_pairs', 'count')} "
        f"contrastive pairs, was added once to one slot of each prompt's cache (position "
        f"{f('cache.vector.position')}, values times {f('cache.c_values')}); no hook runs while the answer is written. "
        f"The template leaves it to the model whether to think. {f('cache.n_tasks', 'count')} held-out tasks.</p>",
        table(head, rows, caption="Means over answers, with 95 % intervals over tasks."),
    )

"""The section on layers: the scores, why these layers, whether any vector would do, which words the vectors are."""

from __future__ import annotations

from lensteer.overlap import SIDES
from lensteer.report.markup import Figures, bullets, section, table
from lensteer.report.results import RunResults
from lensteer.report.sections import name
from lensteer.report.summary import part

WHOSE = {"own": "of its own behavior", "other": "of another behavior", "all": "of any behavior"}

#: Kinds of control vectors, in words.
CONTROLS = {"shuffled": "shuffled labels", "covariance_matched": "the spans' covariance"}


def where(results: RunResults, f: Figures, scores: str, nulls: str, overlap: str) -> str:
    """Which layer, why that one, and whether any vector would do as much there."""
    whose = WHOSE.get(results.scores.positions, "")
    reasons = [f"<b>{name(label)}</b>: {f(f'site.{label}.why')}" for label in results.site]
    rows = []
    for label, layer in results.site.items():
        if layer in results.overlap.layers and label in results.overlap.labels:
            rows.append([name(label), f(f"site.{label}.layer", "layer"), *(_tokens(f, label, side) for side in SIDES)])
    return section(
        "where",
        "Where the behaviors act",
        f"<p>Each vector was added at the token before a sentence {whose}, at coefficient"
        f" {f('scores.coefficient')}, layer by layer; the score is how far that moves the distribution of the next "
        f"token (a KL divergence in nats, method “{f('scores.method')}”, scaling “{f('scores.scaling')}”, averaged over"
        f" {f('scores.n_traces', 'count')} traces). It says how much is disturbed, not in which direction: that is "
        f"what the held-out tasks are for. Noise floor: {f('scores.noise_floor')} nats.</p>",
        scores,
        "<h3>Why these layers</h3>",
        bullets(reasons),
        _beside_nulls(results, f, nulls),
        overlap,
        "<p>A vector that is just one word would steer by saying it. At the selected layers the nearest tokens, with "
        "their cosines, are:</p>",
        table(["behavior", "layer", "read (embedding)", "said next (unembedding)"], rows, words=4),
    )


def _beside_nulls(results: RunResults, f: Figures, figure: str) -> str:
    if results.nulls is None:
        return ""
    kinds, rows = [kind for kind in CONTROLS if kind in results.nulls.nulls], []
    for label in results.site:
        cells = [f(f"nulls.{label}.{kind}.{p}", "thousandths") for kind in kinds for p in ("p", "p_max")]
        rows.append([name(label), f(f"site.{label}.layer", "layer"), *cells])
    rows.append(["any of all cells", "", *(x for kind in kinds for x in ("", f(f"nulls.{kind}.p_any", "thousandths")))])
    head = ["behavior", "layer", *(f"{CONTROLS[kind]}<br>{p}" for kind in kinds for p in ("p", "p, largest<br>of all"))]
    return (
        "<h3>Would any vector do?</h3><p>The same scores by the method “" + f("nulls.method") + "”, beside those of "
        f"{f('nulls.n', 'count')} control vectors of each of two kinds: means of spans whose labels were shuffled "
        "within their chains, and random vectors with the spans' own covariance. p is the share of them (and of the "
        "vector itself) that score as much in that cell; “largest of all” holds it against the largest cell.</p>"
        + figure
        + table(head, rows, words=1)
    )


def _tokens(f: Figures, label: str, side: str) -> str:
    path = f"nearest.{label}.{side}"
    ranks = dict.fromkeys(key.split(".")[0] for key in part(f.found, path))
    return ", <wbr>".join(  # a token that begins with a space does not let a line end before it
        f'<span class="token">{f(f"{path}.{rank}.token", "token")}</span>&nbsp;{f(f"{path}.{rank}.cosine", "cosine")}'
        for rank in ranks
    )

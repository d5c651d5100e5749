"""The report's section on who labeled the sentences, and how far that can be trusted."""

from __future__ import annotations

from html import escape

from lensteer.report.markup import Figures, section, table
from lensteer.report.sections import labels, name

ANNOTATORS = {
    "grammar": "the grammar that wrote the model's training chains: exact wherever a sentence can be read",
    "rules": "cue rules for English chains, by sentence",
    "classifier": "a classifier trained on annotated chains",
    "judge": "a language model that was asked for the label of each sentence",
}


def annotator(f: Figures) -> str:
    """Who annotated; κ, macro-F1 and F1 by label with their intervals, if there was anything to hold it against."""
    who = f"<p>Every sentence of generated text was labeled by {ANNOTATORS[str(f.found['annotator.name'])]}. "
    if f.found.get("alignment.given"):
        who += f"The {f('alignment.given', 'count')} chains that vectors were fitted on kept the labels of their own. "
    if f.found.get("annotator.macro_f1") is None:
        known = f.found.get("annotator.name") == "grammar"
        held = "" if known else "No labeled chains were there to hold it against: how good it is here is not known."
        return section("annotator", "Who says which behavior a sentence is", f"{who}{held}</p>")
    rows = [["macro-F1", *_cells(f, "macro_f1")], ["Cohen's κ", *_cells(f, "kappa")]]
    rows += [
        [f"F1, {name(b)}", *_cells(f, f"f1.{b}")] for b in labels(f) if f.found.get(f"annotator.f1.{b}") is not None
    ]
    beside = [n for n in str(f.found.get("annotator.names", "")).strip("[]").replace('"', "").split(", ")[1:] if n]
    for other, title in [("left_out", "without any chain of the model it is judged on"), *((n, n) for n in beside)]:
        if f.found.get(f"annotator.{other}.macro_f1") is not None:
            rows += [
                [f"macro-F1, {escape(title)}", *_cells(f, f"{other}.macro_f1")],
                [f"Cohen's κ, {escape(title)}", *_cells(f, f"{other}.kappa")],
            ]
    return section(
        "annotator",
        "Who says which behavior a sentence is",
        f"{who}Held against {f('annotator.against')}: {f('annotator.n_sentences', 'count')} sentences of "
        f"{f('annotator.n_chains', 'count')} chains.</p>",
        table(["agreement", "estimate", "95 % interval over chains"], rows, words=1),
    )


def _cells(f: Figures, what: str) -> list[str]:
    path = f"annotator.{what}"
    return [f(path, "cosine"), f.between(f"{path}_low", f"{path}_high", "cosine")]

"""Which behavior each sentence of a chain is, according to whom, and how far that can be trusted."""

from lensteer.annotation.annotators import Annotator, annotate, annotate_report, grammar

__all__ = ["Annotator", "annotate", "annotate_report", "grammar"]

"""One self-contained HTML page of a run, and the same figures as a flat dictionary. Computes no statistics."""

from lensteer.report.page import render
from lensteer.report.summary import Example, RunResults, summary

__all__ = ["Example", "RunResults", "render", "summary"]

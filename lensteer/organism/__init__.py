"""The embedded organism: a small trained model whose grammar is known, so that every claim can be checked on it."""

from lensteer.organism.grammar import cue, parse, style_of, styles, well_formed

__all__ = ["cue", "parse", "style_of", "styles", "well_formed"]

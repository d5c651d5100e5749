"""The command line: runs and stages (`commands`), annotators, cache vectors, directions from pairs (`contrasting`)."""

from lensteer.cli.commands import app, main

__all__ = ["app", "main"]

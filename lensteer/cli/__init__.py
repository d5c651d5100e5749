"""The command line: runs and their stages (`commands`), annotators (`annotating`), cache vectors (`caching`)."""

from lensteer.cli.commands import app, main

__all__ = ["app", "main"]

"""What the commands are, and how every group of them treats errors."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from lensteer.errors import LensteerError

#: Commands with their first line of help, so that the list of them needs no torch, whose import takes seconds.
COMMANDS = {
    "demo": "A full run on the organism in five minutes on two cores, or a short one on a language model.",
    "run": "All stages of a run; resumes where an earlier call was cut off.",
    "traces": "Start a run: generate its chains.",
    "annotate": "The stage 'annotate' of a run that `lensteer traces` started; `annotate fit` trains a classifier.",
    "vectors": "The stage 'vectors' of a run that `lensteer traces` started.",
    "attribute": "The stage 'attribute' of a run that `lensteer traces` started.",
    "select": "The stage 'select' of a run that `lensteer traces` started.",
    "evaluate": "The stage 'evaluate' of a run that `lensteer traces` started.",
    "report": "The stage 'report' of a run that `lensteer traces` started.",
    "doctor": "Examine a model: facts, checks of its passes, each feature tried, time and memory of a full run.",
    "directions": "Fit a direction per concept and layer from pairs of texts that differ in it.",
    "cache": "Fit a cache vector from contrastive examples, and measure the effect of one edit with it.",
    "export": "Write a plan for what serves the model; forms that run here are compared with the hooked model.",
    "verify": "Ask a served model held-out tasks, and say whether a plan's promised effect is there.",
    "benchmark": "Ask a benchmark's tasks unsteered and with each plan: right, unread and truncated answers, length.",
}


class Commands(TyperGroup):
    """User errors print one line, not a traceback; versions of typer differ in how they handle Ctrl-C."""

    def invoke(self, ctx: Any) -> Any:
        """Run the requested command."""
        try:
            return super().invoke(ctx)
        except (LensteerError, OSError) as error:
            typer.echo(f"error: {' '.join(str(error).split())}", err=True)
            raise typer.Exit(1) from error
        except KeyboardInterrupt as stop:
            typer.echo("\nstopped; the same command resumes from here", err=True)
            raise typer.Exit(130) from stop

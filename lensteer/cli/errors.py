"""How every group of commands treats errors."""

from __future__ import annotations

from typing import Any

import typer
from typer.core import TyperGroup

from lensteer.errors import LensteerError


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

"""The command line: `lensteer demo`, `lensteer run`, and a command for each stage of a run."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Annotated, Any

import typer
from typer.core import TyperCommand

from lensteer._version import __version__
from lensteer.cli.groups import COMMANDS, Commands

__all__ = ["COMMANDS", "app", "main"]


class _Lazy(Commands):
    """Imports the commands when one is called or completed, not to list them."""

    listing = False

    def list_commands(self, ctx: Any) -> list[str]:
        """Their names, in the order of a run."""
        return list(COMMANDS)

    def get_command(self, ctx: Any, name: str) -> Any:
        """The command, or while they are listed one that has its help alone."""
        if name not in COMMANDS:
            return None
        if self.listing:
            return TyperCommand(name, help=COMMANDS[name])
        from lensteer.cli.commands import app as whole

        return typer.main.get_group(whole).get_command(ctx, name)

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """The list of commands."""
        with self._listed():
            super().format_help(ctx, formatter)

    def shell_complete(self, ctx: Any, incomplete: str) -> list[Any]:
        """Commands that begin so."""
        with self._listed():
            return super().shell_complete(ctx, incomplete)

    @contextmanager
    def _listed(self) -> Iterator[None]:
        self.listing = True
        try:
            yield
        finally:
            self.listing = False


app = typer.Typer(cls=_Lazy, help=__doc__, no_args_is_help=True, pretty_exceptions_enable=False)


def _version(asked: bool) -> bool:
    if asked:
        typer.echo(f"lensteer {__version__}")
        raise typer.Exit
    return asked


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version and stop.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line."""
    app()

"""Writes the page of all commands and their options, as `lensteer COMMAND --help` has them.

    python docs/command_line.py    # writes docs/reference/command-line.md

A test holds the page.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

PAGE = Path(__file__).parent / "reference" / "command-line.md"

HEAD = """# Command line

Written by `python docs/command_line.py` from the commands themselves; a test holds it.
`lensteer COMMAND --help` says the same.
"""


def commands(command: Any = None, name: str = "lensteer") -> Iterator[tuple[str, Any]]:
    """Every command with its full name; a group that can be called is one, too."""
    if command is None:
        from typer.main import get_command

        from lensteer.cli.commands import app

        command = get_command(app)
    inner = getattr(command, "commands", None)
    if inner is None or (command.invoke_without_command and name != "lensteer"):
        yield name, command
    for word, each in (inner or {}).items():
        yield from commands(each, f"{name} {word}")


def options(command: Any) -> list[Any]:
    """Its options, without those of the shell."""
    return [each for each in command.params if each.param_type_name == "option" and "--help" not in each.opts]


def page() -> str:
    """The page as Markdown."""
    parts = [HEAD]
    for name, command in commands():
        words = [each.name.upper() for each in command.params if each.param_type_name == "argument"]
        parts.append(f"## {name}\n\n{' '.join((command.help or '').split())}\n")
        if words:
            arguments = [each for each in command.params if each.param_type_name == "argument"]
            parts.append("\n".join(f"- `{each.name.upper()}`: {_text(each.help)}" for each in arguments) + "\n")
        rows = [f"| {_spelled(each)} | {_default(each)} | {_text(each.help)} |" for each in options(command)]
        if rows:
            parts.append("\n".join(["| option | default | meaning |", "| --- | --- | --- |", *rows]) + "\n")
    return "\n".join(parts)


def _spelled(option: Any) -> str:
    return ", ".join(f"`{each}`" for each in (*option.opts, *option.secondary_opts))


def _default(option: Any) -> str:
    value = option.default
    if option.required:
        return "needed"
    return "" if callable(value) or value in (None, "", False, [], ()) else f"`{value}`"


def _text(help_text: str | None) -> str:
    for sign, entity in (("&", "&amp;"), ("<", "&lt;"), (">", "&gt;"), ("|", "&#124;"), ("*", "&#42;"), ("[", "&#91;")):
        help_text = (help_text or "").replace(sign, entity)
    return " ".join((help_text or "").split())


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")

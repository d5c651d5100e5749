"""Progress bars: live in a terminal or notebook, plain lines every few seconds in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, TextIO

from tqdm.auto import tqdm

#: Seconds between two lines of a log.
EVERY = 20.0


class _Lines:
    """A stream that turns a bar's redraws into separate lines."""

    def __init__(self, stream: TextIO) -> None:
        self.stream = stream

    def write(self, text: str) -> None:
        for line in text.replace("\r", "\n").split("\n"):
            if line.strip():
                self.stream.write(line.strip() + "\n")

    def flush(self) -> None:
        self.stream.flush()


def _in_notebook() -> bool:
    """Whether this process is a notebook kernel; an imported `ipykernel` alone does not mean so."""
    shell = getattr(sys.modules.get("IPython"), "get_ipython", lambda: None)()
    return shell is not None and "IPKernelApp" in shell.config


def redraws() -> bool:
    """Whether a bar can be redrawn in place: in a terminal or a notebook."""
    return sys.stderr.isatty() or _in_notebook()


def progress_bar(items: Iterable[Any] | None = None, *, show: bool, **options: Any) -> Any:
    """A `tqdm` bar; without a terminal or a notebook it writes a line every 20 seconds, without carriage returns.

    Args:
        items: what to iterate over, if anything.
        show: whether to show anything at all.
        options: of `tqdm`, such as total, desc and unit.
    """
    if show and not redraws():
        from tqdm.std import tqdm as plain

        return plain(items, file=_Lines(sys.stderr), mininterval=EVERY, maxinterval=EVERY, ncols=100, **options)
    return tqdm(items, disable=not show, **options)


@contextmanager
def no_loading_bar() -> Iterator[None]:
    """Hide the bar that Hugging Face shows while it loads weights."""
    from transformers.utils import logging

    shown = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            logging.enable_progress_bar()

"""User functions in a run: named as FILE.py:NAME, loaded from the file, and tested before anything is written.

An annotator labels sentences; a measure scores a chain. The file is run as a separate module; it cannot import other
files in its folder.
"""

from __future__ import annotations

import importlib.util
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lensteer.annotation import annotate
from lensteer.errors import LensteerError
from lensteer.evaluation.conditions import score
from lensteer.files import digest
from lensteer.tasks import Task
from lensteer.traces import Trace

#: Response of the made-up chain that functions are tested on.
SAMPLE = "Let me think. The answer is 4."


def is_own(name: str) -> bool:
    """Whether a name has the form FILE.py:NAME."""
    return ":" in name or name.endswith(".py")


def file_of(name: str) -> Path:
    """The file of FILE.py:NAME.

    Raises:
        LensteerError: it is not of this form, or there is no such file.
    """
    path, colon, within = name.rpartition(":")
    if not colon or not within.isidentifier() or not path.endswith(".py"):
        raise LensteerError(f"{name!r} names no function: write FILE.py:NAME, such as own.py:score")
    if not Path(path).is_file():
        raise LensteerError(f"no file {path!r} for {name!r}: give a Python file that exists")
    return Path(path)


def digest_of(path: str | Path) -> str:
    """Digest of a file's content."""
    return digest(Path(path).read_bytes())


def load_own(name: str) -> Callable[..., Any]:
    """The function, or other callable, at FILE.py:NAME.

    Raises:
        LensteerError: no such file or name, a file that cannot be run, or an object that is not callable.
    """
    path, within = file_of(name), name.rpartition(":")[2]
    # One module per content, so that two functions of a file share it. Dataclasses look their module up.
    module_name = f"lensteer_own_{path.stem}_{digest_of(path)}"
    if (module := sys.modules.get(module_name)) is None:
        spec = importlib.util.spec_from_file_location(module_name, path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        sys.modules[module_name] = module
        try:
            spec.loader.exec_module(module)
        except Exception as error:
            del sys.modules[module_name]
            raise LensteerError(f"{str(path)!r} cannot be run ({type(error).__name__}: {error}): fix it") from error
    if not hasattr(module, within):
        known = [key for key, value in vars(module).items() if callable(value) and not key.startswith("_")]
        raise LensteerError(f"{str(path)!r} has no {within!r}: it has {known}")
    found = getattr(module, within)
    if not callable(found) or isinstance(found, type):
        raise LensteerError(f"{name!r} is {found!r:.80}: give a function, or an object that can be called")
    return found


def try_annotator(name: str, task: Task) -> None:
    """Test a user's annotator on a made-up chain.

    Raises:
        LensteerError: it fails, or returns something other than a list of sentences for each trace.
    """
    _tried(name, lambda trace: annotate([trace], load_own(name)), task, "a list of Sentences for each trace")


def try_measure(name: str, task: Task) -> None:
    """Test a user's measure on a made-up chain.

    Raises:
        LensteerError: it fails, or does not return a finite number.
    """
    _tried(name, lambda trace: score(load_own(name), trace), task, "a number for a trace")


def _tried(name: str, call: Callable[[Trace], object], task: Task, wanted: str) -> None:
    ids = tuple(map(ord, SAMPLE))  # each character is a token
    prompt = tuple(map(ord, task.prompt)) or (0,)
    try:
        call(Trace(task, task.prompt, SAMPLE, prompt, ids, tuple(range(len(ids))), True))
    except LensteerError:
        raise
    except Exception as error:
        raise LensteerError(
            f"{name!r} fails on a made-up chain ({type(error).__name__}: {error}): it has to return {wanted}"
        ) from error

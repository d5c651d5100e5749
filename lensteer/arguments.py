"""What a user writes by hand has the types of the annotations, or a `LensteerError` says what would be right.

`typed` checks the fields of a dataclass, `checked` the arguments of a function. Numbers of numpy or torch become
Python's, and lists, ranges and arrays become tuples where those belong. Shapes and dtypes of tensors are checked by
`results.check_arrays`. Annotations that are only there for type checkers (a model's) are not looked at.
"""

from __future__ import annotations

import builtins
import inspect
import operator
import sys
import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from dataclasses import fields
from functools import cache, wraps
from typing import Any, Literal, ParamSpec, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch
from jaxtyping import AbstractArray

from lensteer.errors import LensteerError
from lensteer.results import short

P = ParamSpec("P")
R = TypeVar("R")


def typed(made: Any) -> None:
    """Check each field of a dataclass, and convert it where it is nearly right; for its `__post_init__`.

    Raises:
        LensteerError: a field of another type.
    """
    kind: Any = type(made)
    hints = _hints(kind)
    for field in fields(made):
        before = getattr(made, field.name)
        value = _named(kind.__name__, field.name, hints[field.name], before)
        if value is not before:
            object.__setattr__(made, field.name, value)


def checked(but: Collection[str] = ()) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """A decorator that checks a function's arguments, and converts them where they are nearly right.

    Args:
        but: arguments that the function checks itself.
    """

    def decorate(function: Callable[P, R]) -> Callable[P, R]:
        signature = inspect.signature(function)

        @wraps(function)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            bound, hints = signature.bind(*args, **kwargs), _hints(function)
            for name, value in bound.arguments.items():
                if name in hints and name not in but and signature.parameters[name].kind not in _VARIADIC:
                    bound.arguments[name] = _named(function.__name__, name, hints[name], value)
            return function(*bound.args, **bound.kwargs)

        return call

    return decorate


#: What a type that users do not write themselves looks like.
_EXAMPLES = {
    "PositionScope": "ls.onsets",
    "Steerable": "vectors['backtracking']",
    "Task": "those of ls.load_tasks",
    "Trace": "those of ls.load_traces",
    "BehaviorVectors": "those of ls.fit_vectors",
    "Joinable": "ls.SteeringPlan(...)",
}
_VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def _named(what: str, name: str, hint: Any, value: Any) -> Any:
    try:
        return _as(hint, value)
    except (TypeError, ValueError, OverflowError) as error:
        raise LensteerError(f"{what}({name}={short(value)}): give {_words(hint)} ({error})") from error


def _as(hint: Any, value: Any) -> Any:
    """The value, as its annotation says.

    Raises:
        TypeError, ValueError, OverflowError: it is of another type.
    """
    origin, inner = get_origin(hint), get_args(hint)
    if hint is Any or isinstance(hint, (str, TypeVar)) or _is_array(hint):
        return value
    if hint in (int, float, bool, str):
        return _scalar(hint, value)
    if origin in (Union, types.UnionType):
        return _one_of(inner, value)
    if origin is Literal:
        return value if value in inner else _wrong(value)
    if origin is tuple:
        items = _items(value)
        if inner[-1] is Ellipsis and {*map(type, items)} <= {inner[0]} <= {bool, int, str, float}:
            return value if isinstance(value, tuple) else tuple(items)  # at once, for ids of tokens
        each = inner[:1] * len(items) if inner[-1] is Ellipsis else inner
        found = tuple(_as(one, item) for one, item in zip(each, items, strict=True))
        same = isinstance(value, tuple) and all(a is b for a, b in zip(found, value, strict=True))
        return value if same else found
    if origin in (dict, Mapping):
        if not isinstance(value, Mapping):
            _wrong(value)
        for key, item in value.items():
            _as(inner[0], key)
            _as(inner[1], item)
        return value
    if origin is Iterable and not isinstance(value, (str, bytes, Sequence)):
        return value  # it may be read once only
    if origin in (Iterable, Sequence, Collection, list):
        items = _items(value)
        listed = [_as(inner[0], item) for item in items]
        return value if items is value and all(a is b for a, b in zip(listed, value, strict=True)) else listed
    if hint is Callable or origin is Callable:
        return value if callable(value) else _wrong(value)
    if isinstance(hint, type) and not _is_bare_protocol(hint):
        return value if isinstance(value, hint) else _wrong(value)
    return value


def _scalar(hint: Any, value: Any) -> Any:
    number = hint in (int, float) and not isinstance(value, (bool, np.bool_, str, bytes))
    if type(value) is hint or (hint is str and isinstance(value, str)):
        return value
    if hint is bool and isinstance(value, np.bool_):
        return bool(value)
    if hint is int and number and hasattr(value, "__index__"):
        return operator.index(value)
    if hint is float and number and isinstance(value, (int, float)):
        float(value)  # raises where it is too large
        return value
    if hint is float and number and isinstance(value, (np.number, torch.Tensor)):
        return float(value)
    return _wrong(value)


def _one_of(hints: Sequence[Any], value: Any) -> Any:
    if value is None and type(None) in hints:
        return None
    reasons = []
    for hint in hints:
        if hint is not type(None):
            try:
                return _as(hint, value)
            except (TypeError, ValueError, OverflowError) as error:
                reasons.append(error)
    raise reasons[0] if len(reasons) == 1 else TypeError(f"it is a {type(value).__name__}")


def _items(value: Any) -> Any:
    if isinstance(value, (np.ndarray, torch.Tensor)):
        return value.tolist()
    if isinstance(value, (str, bytes, Mapping)) or not isinstance(value, Sequence):
        _wrong(value)
    return value


def _wrong(value: Any) -> Any:
    raise TypeError(f"it is a {type(value).__name__}")


def _is_array(hint: Any) -> bool:
    return isinstance(hint, type) and issubclass(hint, AbstractArray)


def _is_bare_protocol(hint: type) -> bool:
    """A protocol that `isinstance` cannot check."""
    return bool(getattr(hint, "_is_protocol", False)) and not getattr(hint, "_is_runtime_protocol", False)


def _words(hint: Any) -> str:
    """An annotation as one would write it."""
    origin, inner = get_origin(hint), get_args(hint)
    if hint is type(None):
        return "None"
    if hint is Ellipsis:
        return "..."
    if origin in (Union, types.UnionType):
        return " | ".join(map(_words, inner))
    if origin is Literal:
        return " or ".join(map(repr, inner))
    if origin is not None and origin is not Callable and inner:
        return f"{getattr(origin, '__name__', origin)}[{', '.join(map(_words, inner))}]"
    name = getattr(hint, "__name__", str(hint))
    return f"{name} (such as {_EXAMPLES[name]})" if name in _EXAMPLES else name


class _Names(dict[str, Any]):
    """The names of a module; those that are there for type checkers only are `Any`."""

    def __init__(self, module: str) -> None:
        super().__init__()
        self.known = vars(sys.modules[module]) if module in sys.modules else {}

    def __missing__(self, name: str) -> Any:
        return self.known.get(name, getattr(builtins, name, Any))


@cache
def _hints(of: Any) -> dict[str, Any]:
    return get_type_hints(of, {}, _Names(of.__module__))

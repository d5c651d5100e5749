"""Base classes of results: a figure, a `repr` that fits on a line, and a JSON file."""

from __future__ import annotations

import math
import types
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import MISSING, fields, is_dataclass
from functools import cache
from importlib import import_module
from itertools import cycle, groupby
from operator import itemgetter
from pathlib import Path
from typing import Any, ClassVar, TypeVar, Union, get_args, get_origin, get_type_hints

import torch
from jaxtyping import AbstractArray
from torch import Tensor

from lensteer.errors import LensteerError
from lensteer.files import json_text, read_json, unseal, write_given

_MOST = 2**64  # of a whole number: seeds have 64 bits
_SHOWN = 6  # entries of a sequence or mapping
#: Fields of results that name the entries of an axis of its arrays.
_AXES = {"labels": "behavior", "layers": "layer", "n_spans": "behavior"}

Kind = TypeVar("Kind", bound="Saved")


class Result:
    """A frozen result of a computation. `lensteer.plots` has a figure for most kinds."""

    def plot(self, **options: Any) -> Any:
        """The plotly figure of this result.

        Args:
            options: of the figure's function in `lensteer.plots`.

        Raises:
            LensteerError: there is no figure for such a result.
        """
        return import_module("lensteer.plots").figure(self, **options)

    def __repr__(self) -> str:
        parts = (f"{field.name}={short(getattr(self, field.name))}" for field in fields(self))  # type: ignore[arg-type]  # a dataclass
        return f"{type(self).__name__}({', '.join(parts)})"


class Saved(Result):
    """A result that is saved as one JSON file, with its kind and format version.

    Fields are read back by their type annotations. A field with a default may be missing from the file.
    """

    VERSION: ClassVar[int] = 1
    """Incremented when files of earlier versions would be read wrongly."""

    def to_dict(self) -> dict[str, Any]:
        """As JSON-ready values; NaN becomes None."""
        return {"kind": type(self).__name__, "version": self.VERSION, **_plain(self)}

    @classmethod
    def from_dict(cls: type[Kind], values: Any) -> Kind:
        """From the output of `to_dict`, or from the values in a file that `save` wrote.

        Raises:
            LensteerError: another kind or version, or values that do not match their digest.
        """
        found = (values.get("kind"), values.get("version")) if isinstance(values, Mapping) else (None, None)
        if found != (cls.__name__, cls.VERSION):
            raise LensteerError(f"no {cls.__name__} of version {cls.VERSION}: its 'kind' and 'version' are {found}")
        rest = unseal(values, f"this {cls.__name__}")
        del rest["kind"], rest["version"]
        with reading(f"this {cls.__name__}"):
            found_again: Kind = revived(cls, rest)
        return found_again

    def save(self, path: str | Path) -> None:
        """Write as JSON, atomically.

        Raises:
            LensteerError: the file cannot be written.
        """
        write_given(path, json_text(self.to_dict(), allow_nan=False))

    @classmethod
    def load(cls: type[Kind], path: str | Path) -> Kind:
        """Read what `save` wrote.

        Raises:
            LensteerError: a missing or damaged file, or one of another kind or version.
        """
        try:
            return cls.from_dict(read_json(Path(path)))
        except LensteerError as error:
            raise LensteerError(
                f"cannot read {str(path)!r} ({error}): give the file that the `save` of a {cls.__name__} wrote"
            ) from error


def by_topic(rows: Iterable[tuple[str, str]]) -> list[str]:
    """Lines of a text, from topics and lines: each topic once, above its lines."""
    return [line for topic, some in groupby(rows, key=itemgetter(0)) for line in (topic, *(text for _, text in some))]


def _plain(value: Any) -> Any:
    if isinstance(value, Tensor):
        return {"dtype": str(value.dtype).removeprefix("torch."), "values": _plain(value.tolist())}
    if is_dataclass(value):
        return {field.name: _plain(getattr(value, field.name)) for field in fields(value)}
    if isinstance(value, Mapping):
        return {name: _plain(entry) for name, entry in value.items()}
    if isinstance(value, (tuple, list)):
        return [_plain(entry) for entry in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None if math.isnan(value) else str(value)
    return value


@contextmanager
def reading(where: object, remedy: str = "make it again") -> Iterator[None]:
    """Take values of a file apart inside the `with`: whatever is wrong with them is said with the file's name.

    Args:
        where: the file, or a line of it.
        remedy: what to do about it.

    Raises:
        LensteerError: for any error that values of another kind cause.
    """
    try:
        yield
    except LensteerError as error:
        if str(where) in str(error):
            raise
        raise LensteerError(f"{where}: {error}") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise LensteerError(f"{where} cannot be read ({type(error).__name__}: {error}): {remedy}") from error


def revived(kind: Any, value: Any) -> Any:
    """A value from its JSON form, by a type: a dataclass, or the annotation of a field. Use it inside `reading`.

    Raises:
        KeyError, TypeError, ArithmeticError, ValueError, RuntimeError: a value of another kind; `LensteerError`, if the
            dataclass refuses it.
    """
    if isinstance(kind, type) and is_dataclass(kind):
        if isinstance(value, kind):
            return value
        _check(isinstance(value, dict), value, kind)
        known = {field.name: field for field in fields(kind)}
        if unknown := set(value) - set(known):
            raise ValueError(f"unknown fields {sorted(unknown)}")
        required = {n for n, f in known.items() if f.default is MISSING and f.default_factory is MISSING}
        if missing := required - set(value):
            raise ValueError(f"missing fields {sorted(missing)}")
        hints = _hints(kind)
        made = kind(**{name: revived(hints[name], entry) for name, entry in value.items()})
        check_arrays(made)
        return made
    if isinstance(kind, type) and issubclass(kind, AbstractArray):
        return torch.tensor(_numbers(value["values"]), dtype=getattr(torch, value["dtype"]))
    if kind in (bool, int, str, float):
        value = _numbers(value) if kind is float else value
        _check(isinstance(value, (int, float) if kind is float else kind), value, kind)
        _check(kind is bool or not isinstance(value, bool), value, kind)
        if kind is float and abs(value) > 2**53:
            return float(value)  # raises: a whole number may be too large
        if kind is int and abs(value) > _MOST:
            raise OverflowError(f"{short(value)} is beyond any count")
        return value
    origin, inner = get_origin(kind), get_args(kind)
    if origin in (Union, types.UnionType):
        if value is None and type(None) in inner:
            return None
        *others, last = (one for one in inner if one not in (Any, type(None)))  # a saved `float | Any` is a number
        for one in others:
            with suppress(TypeError):
                return revived(one, value)
        return revived(last, value)
    if origin is tuple:
        _check(isinstance(value, (list, tuple)), value, "list")
        if inner[-1] is Ellipsis and {*map(type, value)} <= {inner[0]} <= {bool, int, str}:
            return tuple(value)  # at once, for ids of tokens
        each = inner[:1] * len(value) if inner[-1] is Ellipsis else inner
        return tuple(revived(one, entry) for one, entry in zip(each, value, strict=True))
    if origin in (dict, Mapping):
        _check(isinstance(value, dict), value, "object")
        return {name: revived(inner[1], entry) for name, entry in value.items()}
    return value


def check_arrays(result: Any) -> None:
    """Check the arrays of a dataclass by their annotations: dtype, number of axes, axes of one name equally long.

    Raises:
        LensteerError: another dtype or shape.
    """
    _check_arrays(result, type(result).__name__, {})


def _check_arrays(result: Any, where: str, sizes: dict[str, int]) -> None:
    found = {field.name: getattr(result, field.name) for field in fields(result)}
    for name, axis in _AXES.items():
        if isinstance(value := found.get(name), (list, tuple)) and sizes.setdefault(axis, len(value)) != len(value):
            raise LensteerError(f"{where}.{name} has {len(value)} entries, where the axis {axis} has {sizes[axis]}")
    kind: Any = type(result)
    hints = _hints(kind)
    for name, value in found.items():
        if is_dataclass(value):
            _check_arrays(value, f"{where}.{name}", sizes)
        for annotation, array in _arrays(hints[name], value):
            axes = annotation.dim_str.split()
            right = isinstance(array, annotation) and (array.element_size() > 1 or not array.is_floating_point())
            for axis, size in zip(axes, getattr(array, "shape", ()), strict=False):
                right &= sizes.setdefault(axis, size) == size
            if not right:
                known = ", ".join(f"{axis} {sizes[axis]}" for axis in axes if axis in sizes)
                is_tensor = isinstance(array, Tensor)
                given = f"{str(array.dtype)[6:]}{list(array.shape)}" if is_tensor else f"a {type(array).__name__}"
                raise LensteerError(
                    f"{where}.{name} is {given}: give a tensor of {annotation.dtype.__name__.lower()} with the axes "
                    f"{' '.join(axes)} ({known})"
                )


def _arrays(hint: Any, value: Any) -> Iterator[tuple[Any, Any]]:
    """The annotation of each array in a value, and what is there."""
    origin, inner = get_origin(hint), get_args(hint)
    if isinstance(hint, type) and issubclass(hint, AbstractArray):
        yield hint, value
    elif origin in (Union, types.UnionType) and value is not None:
        for one in inner:
            yield from _arrays(one, value)
    elif origin is tuple and isinstance(value, tuple):
        for one, each in zip(cycle(inner[:1]) if inner[-1] is Ellipsis else inner, value, strict=False):
            yield from _arrays(one, each)
    elif origin in (dict, Mapping) and isinstance(value, Mapping):
        for each in value.values():
            yield from _arrays(inner[1], each)


def _check(right: bool, value: Any, kind: Any) -> None:
    if not right:
        raise TypeError(f"{short(value)} is no {getattr(kind, '__name__', kind)}")


@cache
def _hints(kind: type) -> dict[str, Any]:
    return get_type_hints(kind)


def _numbers(value: Any) -> Any:
    if isinstance(value, list):
        return [_numbers(entry) for entry in value]
    return math.nan if value is None else float(value) if isinstance(value, str) else value


def short(value: object) -> str:
    """A value in messages and in the `repr` of results: some entries of a long one, the shape of a tensor."""
    if isinstance(value, Tensor):
        return f"Tensor{list(value.shape)}"
    if isinstance(value, (tuple, list)) and len(value) > _SHOWN:
        return f"[{short(value[0])}, ..., {short(value[-1])}: {len(value)}]"
    if isinstance(value, (tuple, list)):
        return f"[{', '.join(map(short, value))}]"
    if isinstance(value, Mapping):
        shown = [f"{key!r}: {short(entry)}" for key, entry in list(value.items())[:_SHOWN]]
        return f"{{{', '.join(shown)}{', ...' if len(value) > _SHOWN else ''}}}"
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."

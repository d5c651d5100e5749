"""Positions as text: `thinking & ~sentence_starts | at([5, 6])`, parsed without evaluating any code.

The scopes of `lensteer.positions` are available by name. Chains are not needed.
"""

from __future__ import annotations

import ast
import re

from lensteer import positions
from lensteer.errors import LensteerError
from lensteer.positions import PositionScope

NAMES = ("everywhere", "everywhere_but_first", "prompt", "generated", "thinking", "sentence_starts", "onsets")
"""The scopes without arguments."""

_WORDS = f"{', '.join(NAMES)}, first(n), at([5, 6]), joined by &, | and ~"
_LONGEST = 100_000  # characters: every position of a chain of 15,000 tokens
_LARGEST = 2**31
_PARTS = 200


def parse_scope(text: str) -> PositionScope:
    """The scope that an expression represents.

    Raises:
        LensteerError: an invalid expression; the message says where.
    """
    return _scope(_tree(text), text)


def inverted(text: str) -> str:
    """The expression for all other positions; an empty one represents none."""
    if not text.strip():
        return "everywhere"
    tree = _tree(text)
    if isinstance(tree, ast.Name) and tree.id == "everywhere":
        return ""
    if isinstance(tree, ast.UnaryOp):
        return ast.unparse(tree.operand)
    return ast.unparse(ast.UnaryOp(ast.Invert(), tree))


def as_code(text: str) -> str:
    """The same expression as Python code that begins with `import lensteer as ls`."""

    class Qualified(ast.NodeTransformer):
        def visit_Name(self, node: ast.Name) -> ast.expr:
            return ast.Attribute(ast.Name("ls", ast.Load()), node.id, ast.Load())

    parse_scope(text)
    return ast.unparse(Qualified().visit(_tree(text)))


def _tree(text: str) -> ast.expr:
    if len(text) > _LONGEST:
        raise LensteerError(f"an expression of {len(text)} characters is too long: {_LONGEST} at most")
    # Before Python's parser runs: a failure deep inside a nest leaves some versions of Python unsound.
    if strange := re.search(r"[^\w\s&|~()\[\],]", text):
        raise LensteerError(f"{strange[0]!r} in {_short(text)!r} has no meaning here: write positions as {_WORDS}")
    if len(re.findall(r"[&|~(\[]|[^\W\d]\w*", text)) > _PARTS:
        raise LensteerError(f"{_short(text)!r} has more than {_PARTS} parts: list positions with at([...])")
    try:
        return ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError) as error:
        raise LensteerError(f"cannot read {_short(text)!r}: write positions as {_WORDS}") from error


def _scope(node: ast.expr, text: str) -> PositionScope:
    match node:
        case ast.BinOp(left, ast.BitAnd(), right):
            return _scope(left, text) & _scope(right, text)
        case ast.BinOp(left, ast.BitOr(), right):
            return _scope(left, text) | _scope(right, text)
        case ast.UnaryOp(ast.Invert(), operand):
            return ~_scope(operand, text)
        case ast.Name(name) if name in NAMES:
            found: PositionScope = getattr(positions, name)
            return found
        case ast.Call(ast.Name("first"), [ast.Constant(int(n))], []) if _whole(n):
            return positions.first(n)
        case ast.Call(ast.Name("at"), [ast.List(items)], []):
            values = [v for i in items if isinstance(i, ast.Constant) and isinstance(v := i.value, int) and _whole(v)]
            if len(values) == len(items):
                return positions.at(values)
    part = _short(ast.unparse(node))
    raise LensteerError(f"{part!r} in {_short(text)!r} chooses no positions: write them as {_WORDS}")


def _whole(value: int) -> bool:
    return not isinstance(value, bool) and value < _LARGEST


def _short(text: str) -> str:
    return text if len(text) <= 80 else text[:77] + "..."

"""Sizes as expressions over named symbols, from torch's symbolic shapes."""

from __future__ import annotations

import functools
from collections.abc import Mapping
from typing import Any

import sympy

__all__ = ["Expression", "Tree", "render"]

#: A number, a symbol's name, or ("add", left, right) and so on: the operators that a graph document calls "py.add".
Tree = int | str | tuple[Any, ...]

_FUNCTIONS = {"FloorDiv": "floordiv", "CleanDiv": "floordiv", "Mod": "mod", "PythonMod": "mod", "Max": "max", "Min": "min"}


class Expression:
    """An expression of torch's, in the names of `symbols` (sympy symbol -> name). `tree` is None where it holds a symbol or a
    function that has no counterpart here."""

    def __init__(self, expression: Any, symbols: Mapping[Any, str]) -> None:
        self._symbols = symbols
        try:
            self.tree: Tree | None = self._tree(sympy.sympify(expression))
        except KeyError:
            self.tree = None

    def _tree(self, e: Any) -> Tree:
        if e.is_Integer:
            return int(e)
        if e.is_Symbol:
            return self._symbols[e]
        kind = type(e).__name__
        if kind in ("Add", "Mul"):
            parts = sorted(e.args, key=lambda part: (part.is_Integer, str(self._tree(part))))
            if kind == "Mul":
                parts = sorted(parts, key=lambda part: not part.is_Integer)  # 2*batch, but batch + 2
            return functools.reduce(lambda a, b: (kind.lower(), a, b), map(self._tree, parts))
        if kind in ("Pow", "PowByNatural") and e.args[1].is_Integer and 0 < e.args[1] < 8:
            return functools.reduce(lambda a, b: ("mul", a, b), [self._tree(e.args[0])] * int(e.args[1]))
        return functools.reduce(lambda a, b: (_FUNCTIONS[kind], a, b), map(self._tree, e.args))


def render(tree: Tree) -> str:
    """For people, and to be compared: "2*batch + 1". Linear ones have exactly the form that `partitioner.sizes` reads."""
    match tree:
        case int() | str():
            return str(tree)
        case ("add", left, int(right)) if right < 0:
            return f"{render(left)} - {-right}"
        case ("add", left, right):
            return f"{render(left)} + {render(right)}"
        case ("mul", left, right):
            return f"{_grouped(left)}*{_grouped(right)}"
        case ("floordiv", left, right):
            return f"({_grouped(left)} // {_grouped(right)})"
        case ("mod", left, right):
            return f"({_grouped(left)} % {_grouped(right)})"
        case (function, left, right):
            return f"{function}({render(left)}, {render(right)})"
    raise AssertionError(tree)


def _grouped(tree: Tree) -> str:
    text = render(tree)
    return f"({text})" if isinstance(tree, tuple) and tree[0] == "add" else text

"""Symbolic sizes: which stage can read which size from the shape of a tensor that it has anyway."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from splitnet.errors import BadInput
from splitnet.tensors import TensorSpec

__all__ = ["SizeSource", "dimension_size", "find_sources", "symbols_of"]

_SYMBOL = re.compile(r"[A-Za-z_]\w*")
_LINEAR = re.compile(r"(?:(\d+)\*)?([A-Za-z_]\w*)(?: ([+-]) (\d+))?\Z")


@dataclass(frozen=True, slots=True)
class SizeSource:
    """`text` (a symbol, or a whole expression) equals (dimension `axis` of `value` - offset) // scale, without remainder."""

    text: str
    value: str
    axis: int
    scale: int = 1
    offset: int = 0


def symbols_of(expression: str, known: Iterable[str]) -> set[str]:
    """Those of the `known` symbols that stand in an expression (function names do not)."""
    return set(_SYMBOL.findall(expression)) & set(known)


def find_sources(specs: Iterable[TensorSpec]) -> dict[str, SizeSource]:
    """Every symbol and every expression that can be read from the shapes of these tensors; the earliest and simplest source wins."""
    found: dict[str, SizeSource] = {}
    for spec in specs:
        for axis, size in enumerate(spec.shape):
            if isinstance(size, int):
                continue
            found.setdefault(size, SizeSource(size, spec.name, axis))
            if match := _LINEAR.match(size):
                scale, symbol, sign, offset = match.groups()
                shift = int(offset or 0) * (-1 if sign == "-" else 1)
                found.setdefault(symbol, SizeSource(symbol, spec.name, axis, int(scale or 1), shift))
    return found


def missing(expression: str, sources: Mapping[str, SizeSource], known: Iterable[str]) -> set[str]:
    """What is still needed to evaluate the expression: nothing where it can be read whole, else the symbols without a source."""
    return set() if expression in sources else symbols_of(expression, known) - sources.keys()


def dimension_size(name: str, dimension: int | str, sizes: Mapping[str, int]) -> int:
    """A dimension's size: a number, a symbol, or a multiple of a symbol plus a constant. Raises BadInput, naming the input `name`, where
    it is not known."""
    if isinstance(dimension, int):
        return dimension
    if dimension in sizes:
        return sizes[dimension]
    match = _LINEAR.match(dimension)
    if match is None or match[2] not in sizes:
        raise BadInput(f"input {name!r}: the size of dimension {dimension!r} is not known", remedy=f"give it: --size '{dimension}=N'")
    shift = int(match[4] or 0) * (-1 if match[3] == "-" else 1)
    return int(match[1] or 1) * sizes[match[2]] + shift

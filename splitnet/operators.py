"""Which operators a graph document may name: an explicit list, because a node runs what strangers send.

operators.txt holds the overloads of torch's `aten` library that are functional: they read tensors and plain numbers, and return new
tensors (or views of their inputs). None writes into its inputs, draws random numbers, returns memory that nobody wrote, touches
files, streams or other devices, or trusts its arguments unchecked. `scripts/operators.py` writes the list by rule; a test holds
it against the schemas of the installed torch. `py.*` are Python's operators on sizes, and what has no torch operator.
"""

from __future__ import annotations

import functools
from importlib import resources

__all__ = ["PYTHON_OPERATORS", "is_allowed", "torch_operators"]

PYTHON_OPERATORS = frozenset(
    f"py.{name}"
    for name in (
        "add", "sub", "mul", "floordiv", "mod", "truediv", "neg", "pow", "abs", "min", "max", "eq", "ne", "lt", "le", "gt", "ge",
        "not", "and", "or", "int", "float", "sqrt", "floor", "ceil", "trunc", "round",
        "size",  # (tensor, axis) -> int
        "read",  # (tensor, axis, scale, offset) -> int: (dimension - offset) // scale, which must leave no remainder
        "cond",  # (bool, graph, graph, operands) -> the results of the branch that was taken
    )
)  # fmt: skip


@functools.cache
def torch_operators() -> frozenset[str]:
    """ "aten.linear.default" and so on."""
    text = resources.files("splitnet").joinpath("operators.txt").read_text(encoding="ascii")
    return frozenset(line for line in text.splitlines() if line and not line.startswith("#"))


def is_allowed(name: str) -> bool:
    return name in PYTHON_OPERATORS or name in torch_operators()

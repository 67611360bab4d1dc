"""What an operator costs: which ones are cheap enough to run twice, and how many floating point operations the others take."""

from __future__ import annotations

import math
from collections.abc import Sequence

__all__ = ["CHEAP_PARAM_BYTES", "estimate_flops", "is_cheap_kind", "is_view"]

#: a cheap vertex may bring at most this many bytes of parameters along to each stage that computes it again
CHEAP_PARAM_BYTES = 64 << 10

_VIEWS = frozenset([
    "alias", "detach", "expand", "expand_as", "broadcast_to", "permute", "transpose", "t", "numpy_T", "unsqueeze", "squeeze", "view",
    "view_as", "reshape", "flatten", "unflatten", "_unsafe_view", "select", "slice", "narrow", "split", "split_with_sizes", "chunk",
    "unbind", "diagonal", "view_as_complex", "view_as_real", "real", "imag", "movedim", "moveaxis", "swapaxes", "swapdims", "contiguous",
])  # fmt: skip
# One pass over memory or less, whatever the values: making a mask, positions, a rotary table.
_LIGHT = frozenset([
    "add", "sub", "mul", "div", "neg", "abs", "rsub", "reciprocal", "sqrt", "rsqrt", "square", "pow", "exp", "log", "cos", "sin", "floor",
    "ceil", "round", "trunc", "fmod", "remainder", "floor_divide", "clamp", "clamp_min", "clamp_max", "maximum", "minimum", "eq", "ne",
    "lt", "le", "gt", "ge", "logical_and", "logical_or", "logical_not", "logical_xor", "bitwise_and", "bitwise_or", "bitwise_not",
    "bitwise_xor", "__and__", "__or__", "__xor__", "__lshift__", "__rshift__", "where", "masked_fill", "isnan", "isinf", "isfinite", "sign",
    "tril", "triu", "arange", "full", "full_like", "zeros", "zeros_like", "ones", "ones_like", "new_zeros", "new_ones", "new_full",
    "scalar_tensor", "linspace", "eye", "fill", "copy", "_to_copy", "to", "clone", "cat", "stack", "repeat", "tile", "flip", "roll",
    "constant_pad_nd", "pad", "cumsum", "any", "all", "sum", "amax", "amin", "max", "min", "argmax", "outer", "embedding", "index",
    "index_select", "gather", "one_hot", "bucketize", "meshgrid", "size", "read", "int", "float",
])  # fmt: skip


def is_view(op: str) -> bool:
    """Whether the operator computes nothing (or, where a layout forces it, only copies)."""
    return _short(op) in _VIEWS


def is_cheap_kind(op: str) -> bool:
    short = _short(op)
    return short in _VIEWS or short in _LIGHT or (op.startswith("py.") and short != "cond")


def estimate_flops(op: str, inputs: Sequence[tuple[int, ...]], output: tuple[int, ...]) -> float:
    """`inputs` are the shapes of the tensor arguments in order, parameters included. One multiply-add counts as two."""
    short, out = _short(op), float(math.prod(output))
    if short in _VIEWS or not inputs:
        return 0.0 if short in _VIEWS else out
    if short in ("linear", "mm", "bmm", "matmul", "mv", "dot"):
        return 2.0 * out * (inputs[0][-1] if inputs[0] else 1)
    if short in ("addmm", "baddbmm", "addbmm") and len(inputs) > 1:
        return 2.0 * out * inputs[1][-1]
    if "conv_transpose" in short and len(inputs) > 1:
        return 2.0 * math.prod(inputs[0]) * math.prod(inputs[1][1:])
    if "conv" in short and len(inputs) > 1:
        return 2.0 * out * math.prod(inputs[1][1:])
    if "scaled_dot_product" in short and len(inputs) > 2:
        return 4.0 * math.prod(inputs[0]) * inputs[1][-2]
    if short in ("lstm", "gru") and inputs[0]:
        steps = math.prod(inputs[0][:-1])
        return 2.0 * steps * sum(math.prod(shape) for shape in inputs[1:] if len(shape) == 2)
    if "norm" in short or "softmax" in short:
        return 5.0 * math.prod(inputs[0])
    return max(out, float(math.prod(inputs[0])) if short in ("sum", "mean", "max", "amax") else out)


def _short(op: str) -> str:
    return op.split(".")[1]

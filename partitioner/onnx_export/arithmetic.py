"""Operators element by element, comparisons, dtypes, reductions."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from partitioner.onnx_export.builder import Builder, Converter, Unconvertible, is_float
from splitnet.graph import Dtype, Operator, Ref, Weight
from splitnet.tensors import DTYPES

__all__ = ["CONVERTERS"]

CONVERTERS: dict[str, Converter] = {}
_Args = Mapping[str, Any]


def _is_number(argument: Any) -> bool:
    return isinstance(argument, bool | int | float)


def common(b: Builder, left: Any, right: Any) -> str:
    """The dtype in which torch computes with two arguments: a number, or a value without dimensions, does not widen a tensor of its own kind."""
    if _is_number(left) and _is_number(right):
        return "float32" if isinstance(left, float) or isinstance(right, float) else "int64"
    for number, tensor in ((left, right), (right, left)):
        if _is_number(number):
            there = b.dtype(tensor)
            if isinstance(number, float) and not is_float(there):
                return "float32"
            return "int64" if there == "bool" and not isinstance(number, bool) else there
    kinds, ranks = [b.dtype(left), b.dtype(right)], [b.rank(left), b.rank(right)]
    for weak, strong in ((0, 1), (1, 0)):
        if (
            not ranks[weak]
            and ranks[strong]
            and (is_float(kinds[strong]) or is_float(kinds[weak]) == is_float(kinds[strong]))
            and kinds[strong] != "bool"
        ):
            return kinds[strong]
    if is_float(kinds[0]) != is_float(kinds[1]):
        return next(kind for kind in kinds if is_float(kind))
    return str(np.promote_types(DTYPES[kinds[0]], DTYPES[kinds[1]]))


def _float_of(b: Builder, argument: Any) -> str:
    return b.dtype(argument) if is_float(b.dtype(argument)) else "float32"


# ---------------------------------------------------------------------------------------------------------------- one argument


def _unary(target: str, floating: bool = True) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        dtype = _float_of(b, a["self"]) if floating else b.dtype(a["self"])
        return b.emit(target, b.value(a["self"], dtype), dtype=dtype)

    return run


for _name, _target in {
    "tanh": "Tanh", "sigmoid": "Sigmoid", "exp": "Exp", "log": "Log", "sqrt": "Sqrt", "cos": "Cos", "sin": "Sin", "tan": "Tan", "erf": "Erf",
    "reciprocal": "Reciprocal", "asin": "Asin", "acos": "Acos", "atan": "Atan", "sinh": "Sinh", "cosh": "Cosh",
    "mish": "Mish", "hardswish": "HardSwish",
}.items():  # fmt: skip
    CONVERTERS[f"aten.{_name}.default"] = _unary(_target)
for _name, _target in {
    "relu": "Relu",
    "abs": "Abs",
    "neg": "Neg",
    "sign": "Sign",
    "floor": "Floor",
    "ceil": "Ceil",
    "round": "Round",
}.items():
    CONVERTERS[f"aten.{_name}.default"] = _unary(_target, floating=False)


def _not(b: Builder, a: _Args, op: Operator) -> str:
    dtype = b.dtype(a["self"])
    if dtype != "bool" and op.op.startswith("aten.bitwise"):
        raise Unconvertible(f"of {dtype}")
    return b.emit("Not", b.value(a["self"], "bool"), dtype="bool")


def _rsqrt(b: Builder, a: _Args, op: Operator) -> str:
    dtype = _float_of(b, a["self"])
    return b.emit("Reciprocal", b.emit("Sqrt", b.value(a["self"], dtype), dtype=dtype), dtype=dtype)


def _silu(b: Builder, a: _Args, op: Operator) -> str:
    x, dtype = b.value(a["self"]), b.dtype(a["self"])
    return b.emit("Mul", x, b.emit("Sigmoid", x, dtype=dtype), dtype=dtype)


def _gelu(b: Builder, a: _Args, op: Operator) -> str:
    return b.emit("Gelu", b.value(a["self"]), dtype=b.dtype(a["self"]), approximate=str(a["approximate"]))


def _clamped(b: Builder, x: Any, low: Any, high: Any) -> str:
    dtype = b.dtype(x)
    if any(isinstance(bound, float) for bound in (low, high)) and not is_float(dtype):
        dtype = "float32"
    bounds = ["" if bound is None else b.value(bound, dtype) for bound in (low, high)]
    return b.emit("Clip", b.value(x, dtype), *bounds, dtype=dtype)


def _leaky_relu(b: Builder, a: _Args, op: Operator) -> str:
    return b.emit("LeakyRelu", b.value(a["self"]), dtype=b.dtype(a["self"]), alpha=float(a["negative_slope"]))


def _elu(b: Builder, a: _Args, op: Operator) -> str:
    if a["scale"] != 1 or a["input_scale"] != 1:
        raise Unconvertible("with scales")
    return b.emit("Elu", b.value(a["self"]), dtype=b.dtype(a["self"]), alpha=float(a["alpha"]))


def _hardsigmoid(b: Builder, a: _Args, op: Operator) -> str:
    return b.emit("HardSigmoid", b.value(a["self"]), dtype=b.dtype(a["self"]), alpha=1 / 6, beta=0.5)


def _softplus(b: Builder, a: _Args, op: Operator) -> str:
    if a["beta"] != 1:
        raise Unconvertible("with another beta than 1")
    return b.emit("Softplus", b.value(a["self"]), dtype=b.dtype(a["self"]))


def _log1p(b: Builder, a: _Args, op: Operator) -> str:
    dtype = _float_of(b, a["self"])
    return b.emit("Log", b.emit("Add", b.value(a["self"], dtype), b.scalar(1, dtype), dtype=dtype), dtype=dtype)


CONVERTERS |= {
    "aten.bitwise_not.default": _not,
    "aten.logical_not.default": _not,
    "aten.rsqrt.default": _rsqrt,
    "aten.silu.default": _silu,
    "aten.gelu.default": _gelu,
    "aten.clamp.default": lambda b, a, op: _clamped(b, a["self"], a["min"], a["max"]),
    "aten.clamp_min.default": lambda b, a, op: _clamped(b, a["self"], a["min"], None),
    "aten.clamp_max.default": lambda b, a, op: _clamped(b, a["self"], None, a["max"]),
    "aten.hardtanh.default": lambda b, a, op: _clamped(b, a["self"], a["min_val"], a["max_val"]),
    "aten.relu6.default": lambda b, a, op: _clamped(b, a["self"], 0, 6),
    "aten.leaky_relu.default": _leaky_relu,
    "aten.elu.default": _elu,
    "aten.hardsigmoid.default": _hardsigmoid,
    "aten.softplus.default": _softplus,
    "aten.log1p.default": _log1p,
}

# --------------------------------------------------------------------------------------------------------------- two arguments


def _binary(target: str) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        left, right = a["self"], a["other"]
        dtype = common(b, left, right)
        if target == "Div" and not is_float(dtype):
            dtype = "float32"
        if dtype == "bool" and target in ("Add", "Mul"):
            return b.emit("Or" if target == "Add" else "And", b.value(left, dtype), b.value(right, dtype), dtype=dtype)
        second = b.value(right, dtype)
        if (factor := a.get("alpha", 1)) != 1:
            second = b.emit("Mul", second, b.value(factor, dtype), dtype=dtype)
        return b.emit(target, b.value(left, dtype), second, dtype=dtype)

    return run


for _name, _target in {
    "add": "Add",
    "sub": "Sub",
    "mul": "Mul",
    "div": "Div",
    "divide": "Div",
    "multiply": "Mul",
    "subtract": "Sub",
}.items():
    CONVERTERS |= {f"aten.{_name}.{overload}": _binary(_target) for overload in ("Tensor", "Scalar")}
for _name, _target in {"min.other": "Min", "max.other": "Max", "minimum.default": "Min", "maximum.default": "Max"}.items():
    CONVERTERS[f"aten.{_name}"] = _binary(_target)


def _rsub(b: Builder, a: _Args, op: Operator) -> str:
    return (
        _as_text(_binary("Sub")(b, {"self": a["other"], "other": a["self"], "alpha": 1}, op)) if a["alpha"] == 1 else _refuse("with alpha")
    )


def _refuse(why: str) -> str:
    raise Unconvertible(why)


def _as_text(made: Any) -> str:
    assert isinstance(made, str)
    return made


def _rounded_division(b: Builder, a: _Args, op: Operator) -> str:
    mode = a.get("rounding_mode", "floor" if "floor_divide" in op.op else None)
    dtype = common(b, a["self"], a["other"])
    left, right = (b.value(argument, dtype if is_float(dtype) or mode else "float32") for argument in (a["self"], a["other"]))
    if mode is None:
        return b.emit("Div", left, right, dtype=dtype if is_float(dtype) else "float32")
    if not is_float(dtype):
        return floor_div(b, left, right, dtype) if mode == "floor" else b.emit("Div", left, right, dtype=dtype)
    if mode == "trunc":
        raise Unconvertible("truncating division of floats")
    return b.emit("Floor", b.emit("Div", left, right, dtype=dtype), dtype=dtype)


def floor_div(b: Builder, left: str, right: str, dtype: str) -> str:
    """ONNX divides towards zero; its Mod has the sign of the divisor, as Python's."""
    return b.emit("Div", b.emit("Sub", left, b.emit("Mod", left, right, dtype=dtype), dtype=dtype), right, dtype=dtype)


def _remainder(b: Builder, a: _Args, op: Operator) -> str:
    dtype = common(b, a["self"], a["other"])
    if is_float(dtype):
        raise Unconvertible("of floats")
    return b.emit("Mod", b.value(a["self"], dtype), b.value(a["other"], dtype), dtype=dtype)


def _power(b: Builder, a: _Args, op: Operator) -> str:
    base, exponent = a["self"], a["exponent"]
    dtype = common(b, base, exponent)
    if exponent in (2, 3) and not isinstance(exponent, Ref | Weight) and is_float(dtype):
        x = b.value(base, dtype)
        square = b.emit("Mul", x, x, dtype=dtype)
        return square if exponent == 2 else b.emit("Mul", square, x, dtype=dtype)
    return b.emit("Pow", b.value(base, dtype), b.value(exponent, dtype), dtype=dtype)


def _logic(target: str) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        dtype = "bool" if "logical" in op.op else common(b, a["self"], a["other"])
        name = target if dtype == "bool" else f"Bitwise{target}"
        return b.emit(name, b.value(a["self"], dtype), b.value(a["other"], dtype), dtype=dtype)

    return run


def _comparison(target: str, inverted: bool = False) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        dtype = common(b, a["self"], a["other"])
        if dtype in ("bool", "int8", "int16", "uint8") and target != "Equal":
            dtype = "int32"
        made = b.emit(target, b.value(a["self"], dtype), b.value(a["other"], dtype), dtype="bool")
        return b.emit("Not", made, dtype="bool") if inverted else made

    return run


CONVERTERS |= {
    "aten.rsub.Scalar": _rsub,
    "aten.rsub.Tensor": _rsub,
    "aten.div.Tensor_mode": _rounded_division,
    "aten.div.Scalar_mode": _rounded_division,
    "aten.floor_divide.default": _rounded_division,
    "aten.floor_divide.Scalar": _rounded_division,
    "aten.remainder.Scalar": _remainder,
    "aten.remainder.Tensor": _remainder,
    "aten.pow.Tensor_Scalar": _power,
    "aten.pow.Tensor_Tensor": _power,
    "aten.pow.Scalar": _power,
}
for _word, _target in {"and": "And", "or": "Or", "xor": "Xor"}.items():
    CONVERTERS[f"aten.logical_{_word}.default"] = _logic(_target)
    CONVERTERS |= {f"aten.{name}.{o}": _logic(_target) for name in (f"__{_word}__", f"bitwise_{_word}") for o in ("Tensor", "Scalar")}
for _word, _target, _inverted in (
    ("eq", "Equal", False), ("ne", "Equal", True), ("lt", "Less", False), ("gt", "Greater", False),
    ("le", "LessOrEqual", False), ("ge", "GreaterOrEqual", False),
):  # fmt: skip
    CONVERTERS |= {f"aten.{_word}.{overload}": _comparison(_target, _inverted) for overload in ("Tensor", "Scalar")}

# ---------------------------------------------------------------------------------------------------------- choices and dtypes


def _where(b: Builder, a: _Args, op: Operator) -> str:
    dtype = common(b, a["self"], a["other"])
    return b.emit("Where", b.value(a["condition"], "bool"), b.value(a["self"], dtype), b.value(a["other"], dtype), dtype=dtype)


def _masked_fill(b: Builder, a: _Args, op: Operator) -> str:
    dtype = b.dtype(a["self"])
    return b.emit("Where", b.value(a["mask"], "bool"), b.value(a["value"], dtype), b.value(a["self"]), dtype=dtype)


def _to(b: Builder, a: _Args, op: Operator) -> str:
    return b.value(a["self"], a["dtype"].name if isinstance(a.get("dtype"), Dtype) else None)


CONVERTERS |= {f"aten.where.{overload}": _where for overload in ("self", "ScalarOther", "ScalarSelf", "Scalar")}
CONVERTERS |= {f"aten.masked_fill.{overload}": _masked_fill for overload in ("Scalar", "Tensor")}
CONVERTERS |= {
    f"aten.{name}": _to
    for name in (
        "_to_copy.default", "to.dtype", "to.device", "to.dtype_layout", "clone.default", "alias.default", "detach.default", "contiguous.default",
        "lift_fresh_copy.default",
    )
}  # fmt: skip
CONVERTERS["aten.type_as.default"] = lambda b, a, op: b.value(a["self"], b.dtype(a["other"]))

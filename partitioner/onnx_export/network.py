"""Layers: products, convolutions, norms, pools, attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from partitioner.onnx_export.builder import Builder, Converter, Unconvertible, axis_of, is_float
from splitnet.graph import Operator
from splitnet.tensors import DTYPES

__all__ = ["CONVERTERS"]

_Args = Mapping[str, Any]

# -------------------------------------------------------------------------------------------------------------------- products


def _linear(b: Builder, a: _Args, op: Operator) -> str:
    x, weight, dtype = b.value(a["input"]), b.value(a["weight"]), b.dtype(a["input"])
    bias = [] if a["bias"] is None else [b.value(a["bias"])]
    if b.rank(x) == 2 and b.rank(weight) == 2:
        return b.emit("Gemm", x, weight, *bias, dtype=dtype, transB=1)
    made = b.emit("MatMul", x, b.transpose(weight, list(range(b.rank(weight)))[::-1]), dtype=dtype)
    return b.emit("Add", made, *bias, dtype=dtype) if bias else made


def _addmm(b: Builder, a: _Args, op: Operator) -> str:
    given = (b.value(a["mat1"]), b.value(a["mat2"]), b.value(a["self"]))
    return b.emit("Gemm", *given, dtype=b.dtype(a["mat1"]), alpha=float(a["alpha"]), beta=float(a["beta"]))


def _matmul(b: Builder, a: _Args, op: Operator) -> str:
    return b.emit("MatMul", b.value(a["self"]), b.value(a["mat2"] if "mat2" in a else a["other"]), dtype=b.dtype(a["self"]))


def _baddbmm(b: Builder, a: _Args, op: Operator) -> str:
    dtype = b.dtype(a["batch1"])
    made = b.emit("MatMul", b.value(a["batch1"]), b.value(a["batch2"]), dtype=dtype)
    if a["alpha"] != 1:
        made = b.emit("Mul", made, b.value(a["alpha"], dtype), dtype=dtype)
    if a["beta"] == 0:
        return made
    added = b.value(a["self"], dtype)
    if a["beta"] != 1:
        added = b.emit("Mul", added, b.value(a["beta"], dtype), dtype=dtype)
    return b.emit("Add", made, added, dtype=dtype)


def _attention(b: Builder, a: _Args, op: Operator) -> str:
    """softmax(q k' scale + mask) v. A row whose mask is all false gives zeros, as torch does."""
    q, k, v = (b.value(a[name]) for name in ("query", "key", "value"))
    dtype, rank = b.dtype(q), b.rank(q)
    if a["dropout_p"] or a["enable_gqa"]:
        raise Unconvertible("with dropout, or with fewer heads of keys")
    scale = a["scale"] if a["scale"] is not None else b.known(a["query"], -1) ** -0.5
    order = [*range(rank - 2), rank - 1, rank - 2]
    scores = b.emit("MatMul", b.emit("Mul", q, b.scalar(scale, dtype), dtype=dtype), b.transpose(k, order), dtype=dtype)
    mask = a["attn_mask"]
    if a["is_causal"]:
        whole = np.ones((b.known(a["query"], -2), b.known(a["key"], -2)), np.bool_)
        scores = b.emit(
            "Add", scores, b.constant(np.where(np.tril(whole), 0, np.finfo(DTYPES[dtype]).min).astype(DTYPES[dtype])), dtype=dtype
        )
    seen = None
    if mask is not None and b.dtype(mask) == "bool":
        added = b.emit("Where", b.value(mask), b.scalar(0, dtype), b.scalar(float(np.finfo(DTYPES[dtype]).min), dtype), dtype=dtype)
        scores = b.emit("Add", scores, added, dtype=dtype)
        seen = b.emit("ReduceMax", b.cast(b.value(mask), dtype), b.ints(-1), dtype=dtype, keepdims=1)
    elif mask is not None:
        scores = b.emit("Add", scores, b.value(mask, dtype), dtype=dtype)
    made = b.emit("MatMul", b.emit("Softmax", scores, dtype=dtype, axis=-1), v, dtype=dtype)
    return made if seen is None else b.emit("Mul", made, seen, dtype=dtype)


# ---------------------------------------------------------------------------------------------------------------- convolutions


def _each(given: Any, count: int) -> tuple[int, ...]:
    listed = (given,) if isinstance(given, int) else tuple(given)
    if not all(isinstance(size, int) for size in listed):
        raise Unconvertible("with computed sizes")
    return listed * count if len(listed) == 1 else listed


def _conv(b: Builder, a: _Args, op: Operator) -> str:
    x, weight = b.value(a["input"]), b.value(a["weight"])
    count = b.rank(a["weight"]) - 2
    if b.rank(x) != count + 2:
        raise Unconvertible("without a batch")
    kernel = tuple(b.known(a["weight"], axis) for axis in range(2, 2 + count))
    stride, dilation = _each(a["stride"], count), _each(a["dilation"], count)
    if isinstance(a["padding"], str):
        totals = [d * (k - 1) if a["padding"] == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        pads = [total // 2 for total in totals] + [total - total // 2 for total in totals]
    else:
        pads = list(_each(a["padding"], count)) * 2
    bias = [] if a["bias"] is None else [b.value(a["bias"])]
    shared = {"dilations": dilation, "strides": stride, "pads": tuple(pads), "group": a["groups"], "kernel_shape": kernel}
    if a.get("transposed") or op.op.startswith("aten.conv_transpose"):
        extra = _each(a["output_padding"], count)
        return b.emit("ConvTranspose", x, weight, *bias, dtype=b.dtype(x), output_padding=extra, **shared)
    return b.emit("Conv", x, weight, *bias, dtype=b.dtype(x), **shared)


def _weight_norm(b: Builder, a: _Args, op: Operator) -> str:
    v, g, dtype, rank = b.value(a["v"]), b.value(a["g"]), b.dtype(a["v"]), b.rank(a["v"])
    others = [axis for axis in range(rank) if axis != axis_of(a["dim"], rank)]
    norm = b.emit("ReduceL2", v, b.ints(*others), dtype=dtype, keepdims=1)
    return b.emit("Mul", v, b.emit("Div", g, norm, dtype=dtype), dtype=dtype)


# ----------------------------------------------------------------------------------------------------------------------- norms


def _per_channel(b: Builder, given: Any, count: int, dtype: str, otherwise: int) -> str:
    return b.constant(np.full(count, otherwise, DTYPES[dtype])) if given is None else b.value(given)


def _batch_norm(b: Builder, a: _Args, op: Operator) -> list[str]:
    x = b.value(a["input"])
    if a["running_mean"] is None or a["running_var"] is None or a.get("training"):
        raise Unconvertible("with the figures of the batch")
    count, dtype = b.known(a["running_mean"], 0), b.dtype(x)
    weight, bias = _per_channel(b, a["weight"], count, dtype, 1), _per_channel(b, a["bias"], count, dtype, 0)
    given = (x, weight, bias, b.value(a["running_mean"]), b.value(a["running_var"]))
    return [b.emit("BatchNormalization", *given, dtype=dtype, epsilon=float(a["eps"]))]


def _layer_norm(b: Builder, a: _Args, op: Operator) -> list[str]:
    x, count = b.value(a["input"]), len(a["normalized_shape"])
    dtype = b.dtype(x)
    shape = tuple(b.known(a["input"], axis) for axis in range(-count, 0))
    weight = b.constant(np.ones(shape, DTYPES[dtype])) if a["weight"] is None else b.value(a["weight"])
    bias = [] if a["bias"] is None else [b.value(a["bias"])]
    return [b.emit("LayerNormalization", x, weight, *bias, dtype=dtype, axis=-count, epsilon=float(a["eps"]))]


def _group_norm(b: Builder, a: _Args, op: Operator) -> str:
    """As an instance norm of the groups, which every version of the operator set has."""
    x, dtype, rank = b.value(a["input"]), b.dtype(a["input"]), b.rank(a["input"])
    groups, channels = a["num_groups"], b.known(a["input"], 1)
    grouped = b.emit("Reshape", x, b.ints(0, groups, -1), dtype=dtype)
    ones, zeros = (b.constant(np.full(groups, number, DTYPES[dtype])) for number in (1, 0))
    normed = b.emit("InstanceNormalization", grouped, ones, zeros, dtype=dtype, epsilon=float(a["eps"]))
    shape = b.emit("Shape", x, dtype="int64", shape=(rank,))
    made = b.emit("Reshape", normed, shape, dtype=dtype)
    for target, name in (("Mul", "weight"), ("Add", "bias")):
        if a[name] is not None:
            wide = b.emit("Reshape", b.value(a[name]), b.ints(channels, *[1] * (rank - 2)), dtype=dtype)
            made = b.emit(target, made, wide, dtype=dtype)
    return made


def _rms_norm(b: Builder, a: _Args, op: Operator) -> str:
    x, dtype, count = b.value(a["input"]), b.dtype(a["input"]), len(a["normalized_shape"])
    eps = a["eps"] if a["eps"] is not None else float(np.finfo(DTYPES[dtype]).eps)
    mean = b.emit("ReduceMean", b.emit("Mul", x, x, dtype=dtype), b.ints(*range(-count, 0)), dtype=dtype, keepdims=1)
    root = b.emit("Sqrt", b.emit("Add", mean, b.scalar(eps, dtype), dtype=dtype), dtype=dtype)
    made = b.emit("Div", x, root, dtype=dtype)
    return made if a["weight"] is None else b.emit("Mul", made, b.value(a["weight"]), dtype=dtype)


def _softmax(target: str) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        dtype = a["dtype"].name if a.get("dtype") is not None else b.dtype(a["self"])
        if not is_float(dtype):
            raise Unconvertible(f"of {dtype}")
        return b.emit(target, b.value(a["self"], dtype), dtype=dtype, axis=axis_of(a["dim"], b.rank(a["self"])))

    return run


# ----------------------------------------------------------------------------------------------------------------------- pools


def _pool(target: str, count: int) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> list[str]:
        x = b.value(a["self"])
        if b.rank(x) != count + 2:
            raise Unconvertible("without a batch")
        kernel = _each(a["kernel_size"], count)
        stride = _each(a["stride"], count) if a["stride"] else kernel
        padding = _each(a["padding"], count)
        attributes: dict[str, Any] = {"kernel_shape": kernel, "strides": stride, "pads": (*padding, *padding)}
        if a["ceil_mode"] and any((b.known(a["self"], 2 + i) + 2 * padding[i] - kernel[i]) % stride[i] for i in range(count)):
            raise Unconvertible("with a last window that is cut off")  # torch and ONNX divide it differently
        if target == "MaxPool":
            attributes["dilations"] = _each(a["dilation"], count)
        else:
            if a.get("divisor_override") is not None:
                raise Unconvertible("with another divisor")
            attributes["count_include_pad"] = int(bool(a["count_include_pad"]))
        return [b.emit(target, x, dtype=b.dtype(x), **attributes)]

    return run


def _adaptive(target: str, count: int) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        x, wanted = b.value(a["self"]), _each(a["output_size"], count)
        if set(wanted) == {1}:
            return b.emit(f"Global{target}", x, dtype=b.dtype(x))
        sizes = [b.known(a["self"], 2 + i) for i in range(count)]
        if any(size % out for size, out in zip(sizes, wanted, strict=True)):
            raise Unconvertible(f"from {sizes} to {list(wanted)}, which does not divide evenly")
        kernel = tuple(size // out for size, out in zip(sizes, wanted, strict=True))
        return b.emit(target, x, dtype=b.dtype(x), kernel_shape=kernel, strides=kernel)

    return run


def _upsample(mode: str) -> Converter:
    def run(b: Builder, a: _Args, op: Operator) -> str:
        x, dtype = b.value(a["input"] if "input" in a else a["self"]), b.dtype(a["input"] if "input" in a else a["self"])
        sizes: Sequence[Any] | None = a.get("output_size")
        if sizes is None and a.get("scale_factors") is None:
            raise Unconvertible("to a computed size")
        where = "align_corners" if a.get("align_corners") else "asymmetric" if mode == "nearest" else "half_pixel"
        attributes: dict[str, Any] = {"mode": mode, "coordinate_transformation_mode": where}
        if mode == "nearest":
            attributes["nearest_mode"] = "floor"
        if sizes is None:
            scales = b.constant(np.array([1, 1, *a["scale_factors"]], np.float32))
            return b.emit("Resize", x, "", scales, dtype=dtype, **attributes)
        batch = b.slice(b.emit("Shape", x, dtype="int64", shape=(b.rank(x),)), 0, 0, 2)
        whole = b.emit("Concat", batch, b.sizes(list(sizes)), dtype="int64", axis=0)
        return b.emit("Resize", x, "", "", whole, dtype=dtype, **attributes)

    return run


def _pixel_shuffle(b: Builder, a: _Args, op: Operator) -> str:
    return b.emit("DepthToSpace", b.value(a["self"]), dtype=b.dtype(a["self"]), blocksize=a["upscale_factor"], mode="CRD")


def _glu(b: Builder, a: _Args, op: Operator) -> str:
    x, dtype = b.value(a["self"]), b.dtype(a["self"])
    axis = axis_of(a["dim"], b.rank(x))
    half = b.known(x, axis) // 2
    first, second = b.emit_all("Split", [x, b.ints(half, half)], [(dtype, ())] * 2, axis=axis)
    return b.emit("Mul", first, b.emit("Sigmoid", second, dtype=dtype), dtype=dtype)


CONVERTERS: dict[str, Converter] = {
    "aten.linear.default": _linear,
    "aten.addmm.default": _addmm,
    "aten.mm.default": _matmul,
    "aten.bmm.default": _matmul,
    "aten.matmul.default": _matmul,
    "aten.baddbmm.default": _baddbmm,
    "aten.scaled_dot_product_attention.default": _attention,
    "aten.convolution.default": _conv,
    "aten.conv_transpose1d.default": _conv,
    "aten.conv_transpose2d.input": _conv,
    "aten._weight_norm.default": _weight_norm,
    "aten.batch_norm.default": _batch_norm,
    "aten._native_batch_norm_legit_no_training.default": _batch_norm,
    "aten.layer_norm.default": _layer_norm,
    "aten.native_layer_norm.default": _layer_norm,
    "aten.group_norm.default": _group_norm,
    "aten.rms_norm.default": _rms_norm,
    "aten.softmax.int": _softmax("Softmax"),
    "aten._softmax.default": _softmax("Softmax"),
    "aten.log_softmax.int": _softmax("LogSoftmax"),
    "aten._log_softmax.default": _softmax("LogSoftmax"),
    "aten.max_pool1d.default": _pool("MaxPool", 1),
    "aten.max_pool2d.default": _pool("MaxPool", 2),
    "aten.avg_pool1d.default": _pool("AveragePool", 1),
    "aten.avg_pool2d.default": _pool("AveragePool", 2),
    "aten.adaptive_avg_pool1d.default": _adaptive("AveragePool", 1),
    "aten.adaptive_avg_pool2d.default": _adaptive("AveragePool", 2),
    "aten.upsample_nearest2d.vec": _upsample("nearest"),
    "aten.upsample_nearest2d.default": _upsample("nearest"),
    "aten.upsample_bilinear2d.vec": _upsample("linear"),
    "aten.upsample_bilinear2d.default": _upsample("linear"),
    "aten.pixel_shuffle.default": _pixel_shuffle,
    "aten.glu.default": _glu,
}
CONVERTERS |= {f"aten.conv{count}d.{overload}": _conv for count in (1, 2, 3) for overload in ("default", "padding")}

"""What torch leaves unchecked. Nodes run documents of strangers on inputs of strangers: an operator may fail there, but it must not read or
write memory that is not its own, nor end the process. Most of these did, with torch 2.13 on x86-64: random arguments under glibc's checks found
them. The others are there as a precaution, for kernels that check their arguments no better.

`check_kinds` looks at a document when it is loaded; a guard looks at the arguments of one call.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

from splitnet.errors import BadShard
from splitnet.graph_nouns import Device, Dtype, Layout, MemoryFormat, Operator

__all__ = ["GUARDS", "check_kinds", "guarded", "numbers_only"]

#: torch takes a whole number for any of these, and trusts it: `to(x, dtype=1000)` writes where it likes.
_KINDS = {"ScalarType": Dtype, "MemoryFormat": MemoryFormat, "Layout": Layout, "Device": Device}


def check_kinds(operator: Operator, schema: Any) -> None:
    """Raises BadShard where a dtype, a device, a layout or a memory format is given as anything else, a computed number included."""
    for position, declared in enumerate(schema.arguments):
        given = operator.args[position] if position < len(operator.args) else operator.kwargs.get(declared.name)
        text = str(declared.real_type)
        for word, kind in _KINDS.items():
            if word in text and given is not None and not isinstance(given, kind):
                raise BadShard(
                    f"operator {operator.op} (-> {', '.join(operator.results)}): {declared.name} is {given!r:.80}, expected {kind.__name__.lower()}",
                    remedy='cut the model again: a document says {"dtype": "float32"} and so on',
                )


def numbers_only(function: Callable[..., Any]) -> Callable[..., Any]:
    """For arithmetic on sizes: Python's operators would also repeat a text or a list, and fill in a template, at any length."""

    @functools.wraps(function)
    def run(*args: Any) -> Any:
        for argument in args:
            if isinstance(argument, str | list | tuple):
                raise TypeError(f"expected a number, got {type(argument).__name__}")
        return function(*args)

    return run


def _weight_norm(v: Any, g: Any, dim: int = 0) -> None:
    axis = dim + v.ndim if dim < 0 else dim
    if not v.numel() or tuple(g.shape) != tuple(size if i == axis else 1 for i, size in enumerate(v.shape)):
        raise ValueError(f"weight_norm: g {tuple(g.shape)} does not fit v {tuple(v.shape)} along {dim}")


def _fft(x: Any, dim: Any, *_: Any, **__: Any) -> None:
    axes = [axis + x.ndim if axis < 0 else axis for axis in dim]
    if not axes or not all(0 <= axis < x.ndim for axis in axes) or len(set(axes)) != len(axes):
        raise ValueError(f"fft: the axes {list(dim)} are not different axes of {tuple(x.shape)}")


def _fft_c2r(x: Any, dim: Any, normalization: int, last_dim_size: int) -> None:
    _fft(x, dim)
    if last_dim_size < 1 or last_dim_size // 2 + 1 != x.shape[dim[-1]]:
        raise ValueError(f"fft: {x.shape[dim[-1]]} values do not make {last_dim_size}")


def _pdist(x: Any, p: float = 2.0) -> None:
    if x.ndim != 2 or not x.is_contiguous() or not x.is_floating_point():
        raise ValueError(f"pdist: expected a contiguous matrix of floats, got {tuple(x.shape)}")


def _cdist(x: Any, y: Any, p: float = 2.0, compute_mode: int | None = None) -> None:
    if x.ndim < 2 or x.shape[:-2] != y.shape[:-2] or x.shape[-1] != y.shape[-1] or x.dtype != y.dtype:
        raise ValueError(f"cdist: {tuple(x.shape)} and {tuple(y.shape)} do not fit")


def _attention(q: Any, k: Any, v: Any, *_: Any, attn_mask: Any = None, **__: Any) -> None:
    fit = q.ndim == k.ndim == v.ndim == 4 and k.shape == v.shape and q.shape[:2] == k.shape[:2] and q.shape[3] == k.shape[3]
    if not fit or not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"attention: {tuple(q.shape)}, {tuple(k.shape)} and {tuple(v.shape)} do not fit")
    if attn_mask is not None:
        whole = (q.shape[0], q.shape[1], q.shape[2], k.shape[2])
        if attn_mask.ndim not in (2, 4) or any(s not in (1, w) for s, w in zip(attn_mask.shape[::-1], whole[::-1], strict=False)):
            raise ValueError(f"attention: the mask {tuple(attn_mask.shape)} does not fit {whole}")


def _finite(x: Any) -> None:
    if not bool(x.isfinite().all()):
        raise ValueError("eigenvalues: the input has NaN or infinite values")


def _trunc_division(x: Any, y: Any, *, rounding_mode: str | None = None) -> None:
    """The least integer divided by -1 does not fit, and the processor traps."""
    if rounding_mode == "trunc" and _least_in(x) and bool(_equal(y, -1)):
        raise ValueError("integer division: the least whole number has no counterpart")


def _lcm(x: Any, y: Any) -> None:
    if _least_in(x) or _least_in(y):
        raise ValueError("lcm: the least whole number has no counterpart")


def _least_in(x: Any) -> bool:
    return not x.is_floating_point() and x.itemsize >= 4 and bool(_equal(x, -(1 << (8 * x.itemsize - 1))))


def _equal(value: Any, number: int) -> Any:
    found = value == number
    return found.any() if hasattr(found, "any") else found


GUARDS: dict[str, Callable[..., None]] = {
    "aten._weight_norm.default": _weight_norm,
    "aten._weight_norm_interface.default": _weight_norm,
    "aten._fft_c2c.default": _fft,
    "aten._fft_r2c.default": _fft,
    "aten._fft_c2r.default": _fft_c2r,
    "aten._pdist_forward.default": _pdist,
    "aten._cdist_forward.default": _cdist,
    "aten._scaled_dot_product_flash_attention_for_cpu.default": _attention,
    "aten.linalg_eigvals.default": _finite,
    "aten.lcm.default": _lcm,
    "aten.div.Tensor_mode": _trunc_division,
    "aten.div.Scalar_mode": _trunc_division,
    "aten.divide.Tensor_mode": _trunc_division,
    "aten.divide.Scalar_mode": _trunc_division,
}


def guarded(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
    """The operator behind its guard, where it needs one."""
    guard = GUARDS.get(name)
    if guard is None:
        return function

    def run(*args: Any, **kwargs: Any) -> Any:
        guard(*args, **kwargs)
        return function(*args, **kwargs)

    return run

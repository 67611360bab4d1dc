"""Names, element types and shapes of tensors: what both sides agree on before a byte is sent."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import ml_dtypes
import numpy as np

from splitnet.errors import BadInput, InsufficientMemory

__all__ = ["DTYPES", "TensorSpec", "aligned_empty", "dtype_name", "numpy_dtype"]

#: Every element type that may cross a cut, by its name on the wire.
DTYPES: dict[str, np.dtype] = {
    name: np.dtype(name) for name in ("float64", "float32", "float16", "int64", "int32", "int16", "int8", "uint8", "bool", "complex64")
} | {"bfloat16": np.dtype(ml_dtypes.bfloat16)}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}
_ALIGNMENT_BYTES = 64  # a cache line, and the widest vector register: BLAS picks its kernels by alignment
_SYMBOL = re.compile(r"[A-Za-z_][A-Za-z0-9_]*\Z")


def numpy_dtype(name: str) -> np.dtype:
    """The numpy type called `name` on the wire. Raises BadInput for any other name."""
    try:
        return DTYPES[name]
    except KeyError:
        raise BadInput(f"element type {name!r} is not one of {', '.join(DTYPES)}") from None


def dtype_name(dtype: np.dtype) -> str:
    """The wire's name of a numpy type. Raises BadInput where it has none."""
    try:
        return _NAMES[np.dtype(dtype)]
    except KeyError:
        raise BadInput(f"element type {dtype} cannot be sent; convert it to one of {', '.join(DTYPES)}") from None


def aligned_empty(size_bytes: int) -> np.ndarray:
    """An uninitialised uint8 array of that many bytes that starts on a 64-byte boundary. Raises InsufficientMemory where the system has no more."""
    try:
        buffer = np.empty(size_bytes + _ALIGNMENT_BYTES, np.uint8)
    except MemoryError:
        raise InsufficientMemory(
            f"this process gets no memory for a tensor of {size_bytes} bytes",
            remedy="send smaller batches, put fewer stages on this box, or give its node a --buffer that the box has",
        ) from None
    start = -buffer.ctypes.data % _ALIGNMENT_BYTES
    return buffer[start : start + size_bytes]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """A tensor's name, dtype and shape. A dimension is an int, or a str: a symbol such as "batch", or an
    expression over symbols such as "2*batch" (compared only through the symbols that stand alone)."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __post_init__(self) -> None:
        numpy_dtype(self.dtype)
        for size in self.shape:
            if isinstance(size, int) and size < 0:
                raise BadInput(f"tensor {self.name!r}: negative dimension {size} in shape {self.shape}")

    def to_json(self) -> dict[str, object]:
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)}

    @classmethod
    def from_json(cls, document: Mapping[str, object]) -> TensorSpec:
        name, dtype, shape = document["name"], document["dtype"], document["shape"]
        if not (isinstance(name, str) and isinstance(dtype, str) and isinstance(shape, list)):
            raise TypeError("a tensor needs a string name, a string dtype and a list shape")
        if not all(isinstance(size, int | str) and not isinstance(size, bool) for size in shape):
            raise TypeError(f"tensor {name!r}: each dimension is an integer or a string, got {shape!r}")
        return cls(name, dtype, tuple(shape))

    def check(self, array: np.ndarray, symbols: dict[str, int]) -> None:
        """Raises BadInput unless `array` fits. `symbols` collects the size of each symbol seen, so that inputs which
        share a symbol must agree. A batch may not be empty."""
        if array.dtype != DTYPES[self.dtype]:
            raise BadInput(
                f"input {self.name!r}: expected {self.dtype}, got {array.dtype}", remedy=f"convert it: array.astype({self.dtype!r})"
            )
        if array.ndim != len(self.shape):
            raise BadInput(f"input {self.name!r}: expected {len(self.shape)} dimensions {self._shown()}, got shape {array.shape}")
        for axis, (expected, size) in enumerate(zip(self.shape, array.shape, strict=True)):
            if size == 0 and expected != 0:
                raise BadInput(f"input {self.name!r}: dimension {axis} is empty (shape {array.shape})", remedy="send at least one element")
            if isinstance(expected, int):
                if size != expected:
                    raise BadInput(
                        f"input {self.name!r}: dimension {axis} must be {expected}, got {size} (expected {self._shown()}, got {array.shape})"
                    )
            elif _SYMBOL.match(expected) and symbols.setdefault(expected, size) != size:
                raise BadInput(
                    f"input {self.name!r}: dimension {axis} is {size}, but {expected!r} is {symbols[expected]} in another input",
                    remedy=f"give every input the same {expected}",
                )

    def _shown(self) -> str:
        return "(" + ", ".join(str(size) for size in self.shape) + ")"

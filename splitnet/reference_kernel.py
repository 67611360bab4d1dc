"""A fixed piece of arithmetic, timed on every box, so that operator times measured on one box can be scaled to another.

The mix is what a network's layers are made of: dense products (bound by arithmetic) and passes over arrays that do not fit into
the nearest caches (bound by memory). Its figure is only ever used as a ratio between two boxes.
"""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np

__all__ = ["ReferenceTime", "measure_reference"]

_ROWS, _WIDTH = 128, 768  # one layer of a base-size transformer at 128 tokens
_PRODUCTS = 4
_ELEMENTS = 1 << 20  # 4 MiB of float32
_PASSES = 4
_REPEATS = 15
_WARM_UP = 2


@dataclass(frozen=True, slots=True)
class ReferenceTime:
    """`seconds` is the median of `repeats` warm runs. `backend` says what ran it: "numpy" on a box without torch, whose threads
    numpy chooses by itself, so that its figure is the coarser one."""

    seconds: float
    repeats: int
    backend: Literal["torch", "numpy"]
    threads: int


def measure_reference(threads: int = 1, budget_s: float = 2.0) -> ReferenceTime:
    """Times the kernel on this box. Takes about `budget_s` at most, though never fewer than three runs; blocks, so call it in a
    compute thread. The torch thread count of the calling thread is put back afterwards."""
    if threads < 1:
        raise ValueError(f"threads must be at least 1, got {threads}")
    try:
        torch = importlib.import_module("torch")  # by name: this package must not depend on it
    except ModuleNotFoundError:
        seconds = _timed(_numpy_kernel(), budget_s)
        return ReferenceTime(statistics.median(seconds), len(seconds), "numpy", threads)
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        seconds = _timed(_torch_kernel(torch), budget_s)
    finally:
        torch.set_num_threads(before)
    return ReferenceTime(statistics.median(seconds), len(seconds), "torch", threads)


def _timed(kernel: Callable[[], object], budget_s: float) -> list[float]:
    end = time.perf_counter() + budget_s
    for _ in range(_WARM_UP):
        kernel()
    seconds: list[float] = []
    while len(seconds) < 3 or (len(seconds) < _REPEATS and time.perf_counter() < end):
        start = time.perf_counter()
        kernel()
        seconds.append(time.perf_counter() - start)
    return seconds


def _operands() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ordinary numbers, and a weight that keeps the products' size: subnormal ones would be timed instead of arithmetic."""
    random = np.random.default_rng(0)
    weight = random.standard_normal((_WIDTH, _WIDTH), dtype=np.float32) / np.float32(_WIDTH**0.5)
    return random.standard_normal((_ROWS, _WIDTH), dtype=np.float32), weight, random.standard_normal(_ELEMENTS, dtype=np.float32)


def _numpy_kernel() -> Callable[[], object]:
    x, w, wide = _operands()
    z = np.empty_like(wide)  # written in place: fresh pages are the system's time, not the processor's

    def kernel() -> object:
        y = x
        for _ in range(_PRODUCTS):
            y = y @ w
        np.copyto(z, wide)
        for _ in range(_PASSES):
            np.multiply(z, np.float32(0.5), out=z)
            np.add(z, wide, out=z)
            np.maximum(z, np.float32(0.0), out=z)
        return y, z

    return kernel


def _torch_kernel(torch: Any) -> Callable[[], object]:
    x, w, wide = (torch.from_numpy(operand) for operand in _operands())
    z = torch.empty_like(wide)

    def kernel() -> object:
        with torch.inference_mode():
            y = x
            for _ in range(_PRODUCTS):
                y = y @ w
            z.copy_(wide)
            for _ in range(_PASSES):
                z.mul_(0.5).add_(wide).relu_()
            return y, z

    return kernel

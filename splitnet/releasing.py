"""How values are released: scaled down to a norm, and noise added that nobody can take off again.

The noise comes from the kernel's cryptographic generator (`os.urandom`), 8 bytes a value, through Box and Muller's transform in float64. Floating-point numbers
are no reals: which ones a noisy sum can come out as may tell what the sum was of (Mironov, On Significance of the Least Significant Bits for Differential
Privacy, CCS 2012). So every result is rounded to a multiple of a power of two, 2^-9 to 2^-8 of the noise's deviation: whatever the input, the results are the same
set of numbers, far coarser than float64. This closes the attack that is known; it is no proof for the bits that the transform itself rounds.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping

import numpy as np

from splitnet.errors import EngineFailure
from splitnet.noise import Noise

__all__ = ["Randomness", "normal", "release"]

Randomness = Callable[[int], bytes]  #: so many bytes that nobody can foresee

_GRID = -8  # results are multiples of 2**(floor(log2(sigma)) + _GRID)
_INSIDE = 1 - 2.0**-40  # so that rounding does not put a norm above the bound
_PAIRS = 1 << 16  # at a time: what they take fits a cache


def release(
    values: Mapping[str, np.ndarray], noise: Noise, axes: Mapping[str, int | None], randomness: Randomness = os.urandom
) -> dict[str, np.ndarray]:
    """The values that `axes` names, clipped together and with noise, each in its own dtype and layout, in new memory. With an axis, each position along it is
    a sample by itself. Raises EngineFailure where a value is not finite, or where the values disagree on how many samples there are; nothing is returned then."""
    factors = _factors(values, noise, axes)
    step = 2.0 ** (math.floor(math.log2(noise.sigma)) + _GRID)
    found = {}
    for name, axis in axes.items():
        array = values[name]
        factor = factors if axis is None else factors.reshape([-1 if k == axis else 1 for k in range(array.ndim)])
        wide = array.astype(np.float64)  # keeps the layout
        wide *= factor
        lying = wide.transpose(sorted(range(wide.ndim), key=[-stride for stride in wide.strides].__getitem__))
        flat = lying.reshape(-1)  # a view: the copy is dense
        flat += noise.sigma * normal(flat.size, randomness)
        flat /= step
        np.rint(flat, out=flat)
        flat *= step
        if array.dtype.itemsize == 2 and array.dtype.kind == "f":  # float16 ends early
            np.clip(wide, -65504.0, 65504.0, out=wide)
        found[name] = wide.astype(array.dtype)
    return found


def _factors(values: Mapping[str, np.ndarray], noise: Noise, axes: Mapping[str, int | None]) -> np.ndarray:
    """What to scale each sample with; of one element where there are none to tell apart."""
    squares = np.zeros(1)
    for name, axis in axes.items():
        others = tuple(k for k in range(values[name].ndim) if k != axis)
        of_value = np.square(values[name], dtype=np.float64).sum(axis=others)
        if axis is not None and squares.size not in (1, of_value.size):
            raise EngineFailure(
                f"value {name!r} holds {of_value.size} samples, and others that leave with it {squares.size}: samples cannot be told apart",
                remedy="plan with noise per request",
            )
        squares = squares + of_value
    if not np.isfinite(squares).all():
        raise EngineFailure(
            "what was to leave this node with noise is not finite, so it has no norm to clip; nothing has left",
            remedy="look at the input, and at the model",
        )
    norms = np.sqrt(squares)
    bound = noise.clip_norm * _INSIDE
    factors: np.ndarray = bound / np.maximum(norms, bound)
    return factors


def normal(count: int, randomness: Randomness = os.urandom) -> np.ndarray:
    """Independent standard normal numbers, float64 of (count,); at most 8.6 in size, which one in 10^17 would exceed."""
    found = np.empty(count)
    for first in range(0, count, 2 * _PAIRS):
        part = found[first : first + 2 * _PAIRS]
        pairs = (part.size + 1) // 2
        uniform = (np.frombuffer(randomness(16 * pairs), np.uint64) >> np.uint64(11)).astype(np.float64)
        radius = np.sqrt(-2 * np.log((uniform[:pairs] + 1) * 2.0**-53))
        angle = uniform[pairs:] * (2 * math.pi * 2.0**-53)
        part[:pairs] = radius * np.cos(angle)
        part[pairs:] = (radius * np.sin(angle))[: part.size - pairs]
    return found

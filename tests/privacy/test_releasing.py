"""What happens to values that are released: clipped together, noise added, nothing else."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from splitnet.errors import EngineFailure
from splitnet.noise import Noise
from splitnet.releasing import normal, release

SILENT = 1e4  # the largest epsilon: the least noise


def seeded(seed: int):  # type: ignore[no-untyped-def]
    """Foreseeable, as nothing but a test may be."""
    return np.random.default_rng(seed).bytes


def test_the_noise_is_normal() -> None:
    found = np.sort(normal(200_000, seeded(1)))
    assert abs(found.mean()) < 0.01
    assert abs(found.std() - 1) < 0.01
    assert abs((found**4).mean() - 3) < 0.1
    grid = np.linspace(-4, 4, 81)
    expected = np.array([0.5 * (1 + erf(x / 2**0.5)) for x in grid])
    reached = np.searchsorted(found, grid) / found.size
    assert np.abs(reached - expected).max() < 1.95 / found.size**0.5  # Kolmogorov and Smirnov, 1 in 1000


def erf(x: float) -> float:
    import math

    return math.erf(x)


def test_noise_has_the_stated_deviation_and_is_independent() -> None:
    noise = Noise(2.0, 1e-6, 5.0)
    quiet = release({"x": np.zeros((2, 100_000), np.float32)}, noise, {"x": 0}, seeded(2))["x"]
    assert quiet.std(axis=1) == pytest.approx([noise.sigma] * 2, rel=0.01)
    assert abs(np.corrcoef(quiet)[0, 1]) < 0.015
    assert abs(np.corrcoef(quiet[0, :-1], quiet[0, 1:])[0, 1]) < 0.015


def test_noise_is_never_the_same_twice() -> None:
    noise, x = Noise(2.0, 1e-6, 5.0), np.ones((1, 64), np.float32)
    assert not np.array_equal(release({"x": x}, noise, {"x": 0})["x"], release({"x": x}, noise, {"x": 0})["x"])


def test_results_are_on_a_grid_that_does_not_depend_on_the_input() -> None:
    noise = Noise(2.0, 1e-6, 5.0)
    step = 2.0 ** (np.floor(np.log2(noise.sigma)) - 8)
    for seed in range(3):
        x = np.random.default_rng(seed).standard_normal((2, 500))
        steps = release({"x": x}, noise, {"x": 0}, seeded(seed))["x"] / step
        assert np.array_equal(steps, np.rint(steps))


@settings(max_examples=60)
@given(
    arrays.arrays(np.float64, st.tuples(st.integers(1, 4), st.integers(1, 6)), elements=st.floats(-1e6, 1e6)),
    st.floats(1e-3, 1e3),
    st.booleans(),
)
def test_no_sample_is_larger_than_the_bound(x: np.ndarray, clip_norm: float, per_sample: bool) -> None:
    """Without its noise (taken off again with the same seed) what is released has a norm within the bound, and the same direction."""
    noise = Noise(SILENT, 1e-6, clip_norm)
    axes = {"x": 0, "y": 0} if per_sample else {"x": None, "y": None}
    values = {"x": x, "y": 2 * x[:, :1]}
    there = release(values, noise, axes, seeded(3))
    noise_only = release({name: np.zeros_like(value) for name, value in values.items()}, noise, axes, seeded(3))
    clipped = {name: there[name] - noise_only[name] for name in values}
    rows = np.concatenate([clipped["x"], clipped["y"]], axis=1)
    slack = noise.sigma / 256 * rows.size**0.5
    norms = np.linalg.norm(rows, axis=1) if per_sample else np.array([np.linalg.norm(rows)])
    assert (norms <= clip_norm + slack).all()
    whole = np.concatenate([values["x"], values["y"]], axis=1)
    before = np.linalg.norm(whole, axis=1, keepdims=True) if per_sample else np.linalg.norm(whole)
    factor = np.minimum(1, clip_norm / np.maximum(before, 1e-300))
    assert np.abs(rows - whole * factor).max() <= slack


@pytest.mark.parametrize("dtype", [np.float16, np.float32, np.float64, ml_dtypes.bfloat16])
def test_dtype_and_layout_stay(dtype: type) -> None:
    x = np.ones((2, 3, 5, 4), dtype).transpose(0, 3, 1, 2)
    found = release({"x": x}, Noise(1.0, 1e-6, 1.0), {"x": 0})["x"]
    assert found.dtype == x.dtype
    assert found.shape == x.shape
    assert found.strides == x.strides
    assert not np.shares_memory(found, x)
    assert (x.astype(float) == 1).all()


def test_what_ends_early_saturates() -> None:
    found = release({"x": np.zeros((1, 64), np.float16)}, Noise(1.0, 1e-6, 1e6), {"x": 0})["x"]
    assert np.isfinite(found.astype(np.float64)).all()


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_what_has_no_norm_does_not_leave(bad: float) -> None:
    x = np.ones((2, 4), np.float32)
    x[1, 2] = bad
    with pytest.raises(EngineFailure, match="not finite"):
        release({"x": x}, Noise(1.0, 1e-6, 1.0), {"x": 0})


def test_samples_that_cannot_be_told_apart_do_not_leave() -> None:
    with pytest.raises(EngineFailure, match="cannot be told apart"):
        release({"x": np.ones((2, 4)), "y": np.ones((3, 4))}, Noise(1.0, 1e-6, 1.0), {"x": 0, "y": 0})

"""How much noise a promise takes: the arithmetic of `splitnet.gaussian` and `splitnet.noise`."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import BadPlan
from splitnet.gaussian import delta_of, epsilon_of, ratio_of
from splitnet.noise import Noise

EPSILONS = st.floats(1e-3, 1e4)
DELTAS = st.floats(1e-12, 0.1)


def integrated(epsilon: float, ratio: float) -> float:
    """delta from its definition: the integral of (p - e^epsilon q) where it is positive, p and q normal densities `ratio` deviations apart."""
    x = np.linspace(-40, 40, 2_000_001)
    p = np.exp(-((x - ratio) ** 2) / 2) / math.sqrt(2 * math.pi)
    q = np.exp(epsilon - x**2 / 2) / math.sqrt(2 * math.pi)
    return float(np.trapezoid(np.maximum(p - q, 0), x))


@pytest.mark.parametrize(("epsilon", "ratio"), [(0.1, 0.05), (1.0, 0.268), (1.0, 2.0), (8.0, 2.0), (50.0, 8.0)])
def test_delta_is_the_integral_that_defines_it(epsilon: float, ratio: float) -> None:
    assert delta_of(epsilon, ratio) == pytest.approx(integrated(epsilon, ratio), rel=1e-6, abs=1e-12)


def test_the_published_figure() -> None:
    """Balle & Wang's own code gives 3.730632 for epsilon 1, delta 1e-5, sensitivity 1."""
    assert 1 / ratio_of(1.0, 1e-5) == pytest.approx(3.730631634815942, rel=1e-9)


@given(EPSILONS, DELTAS)
def test_the_deviation_keeps_the_promise_and_hardly_more(epsilon: float, delta: float) -> None:
    noise = Noise(epsilon, delta, 3.0)
    assert delta_of(epsilon, noise.sensitivity / noise.sigma) <= delta * (1 + 1e-6)
    assert delta_of(epsilon, noise.sensitivity / (noise.sigma * 0.999)) > delta


@given(EPSILONS, DELTAS)
def test_epsilon_is_found_again(epsilon: float, delta: float) -> None:
    assert epsilon_of(ratio_of(epsilon, delta), delta) == pytest.approx(epsilon, rel=1e-5)


def test_promises_add_up_over_requests() -> None:
    noise = Noise(1.0, 1e-5, 2.0)
    assert noise.epsilon_after(1) == pytest.approx(1.0, rel=1e-6)
    assert 1.0 < noise.epsilon_after(2) < 2.0  # less than adding epsilons, which also adds deltas
    assert delta_of(noise.epsilon_after(100), 10 * noise.sensitivity / noise.sigma) <= 1e-5 * (1 + 1e-6)


@pytest.mark.parametrize(
    ("figures", "said"),
    [
        ((0.0, 1e-6, 1.0), "epsilon"),
        ((math.nan, 1e-6, 1.0), "epsilon"),
        ((math.inf, 1e-6, 1.0), "epsilon"),
        ((1.0, 0.0, 1.0), "delta"),
        ((1.0, 1.0, 1.0), "delta"),
        ((1.0, 1e-6, -1.0), "clip_norm"),
        ((1.0, 1e-6, "1"), "clip_norm"),
        ((True, 1e-6, 1.0), "epsilon"),
    ],
)
def test_figures_that_promise_nothing_are_refused(figures: tuple[float, float, float], said: str) -> None:
    with pytest.raises(BadPlan, match=f"noise: {said} must be a number from"):
        Noise(*figures)
    with pytest.raises(BadPlan, match="per 'sample' or per 'request'"):
        Noise(1.0, 1e-6, 1.0, "batch")

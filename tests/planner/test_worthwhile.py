"""A split is chosen where it is clearly better, and not near the break-even."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from partitioner.worthwhile import MARGIN, why_alone, worth_splitting
from splitnet.errors import BadInput


@given(st.floats(1e-4, 1e3), st.floats(0.5, 1.5), st.floats(0, 0.5))
def test_a_split_must_be_better_by_the_margin(alone_s: float, share: float, margin: float) -> None:
    if worth_splitting(share * alone_s, alone_s, margin):
        assert share < 1 - margin + 1e-9
    else:
        assert share > 1 - margin - 1e-9


def test_the_margin_is_on_by_default() -> None:
    assert MARGIN > 0
    assert not worth_splitting(0.097, 0.1)
    assert worth_splitting(0.08, 0.1)
    assert worth_splitting(0.097, 0.1, margin=0)


def test_the_reason_holds_the_figures() -> None:
    said = why_alone("server", 0.097, 0.1)
    for part in ("only 3.0% better", "'server'", "97.0 ms", "100.0 ms", "10%"):
        assert part in said
    assert "no better" in why_alone("server", 0.11, 0.1)


@pytest.mark.parametrize("margin", [-0.1, 1.0, float("nan")])
def test_a_margin_that_cannot_be_is_refused(margin: float) -> None:
    with pytest.raises(BadInput, match="margin must be within"):
        worth_splitting(1.0, 1.0, margin)

"""What the ingress remembers of how quickly tokens came."""

from __future__ import annotations

import pytest

from nodes.generation.speeds import Speeds


def test_speeds_are_those_of_the_last_answers_and_seconds() -> None:
    speeds = Speeds()
    assert (speeds.answers, speeds.ttft_s, speeds.tpot_s, speeds.tokens_per_s(0.0)) == (0, 0.0, 0.0, 0.0)
    for k in range(100):  # one token every 0.1 s
        speeds.came(1, 100 + k / 10)
    assert speeds.tokens_per_s(110.0) == pytest.approx(10, rel=0.06)
    assert speeds.tokens_per_s(130.0) == 0.0
    for ttft_s, spent_s, tokens in ((0.1, 1.0, 10), (0.3, 3.0, 10), (0.2, 0.0, 0)):
        speeds.began(ttft_s)
        speeds.ended(spent_s, tokens)
    assert (speeds.answers, speeds.ttft_s) == (3, 0.2)
    assert speeds.tpot_s == pytest.approx(0.2)  # an answer of one token has none

"""What counts as silence: pure arithmetic on a clock of the test's own."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from splitnet.errors import BadInput
from splitnet.heartbeat import Heartbeat, Silence

CALM = Heartbeat(0.1, 0.4, 4.0)


def heard(gaps: list[float], heartbeat: Heartbeat = CALM) -> tuple[Silence, float]:
    silence, now_s = Silence(heartbeat), 100.0
    silence.begin(now_s)
    for gap in gaps:
        now_s += gap
        silence.heard(now_s)
    return silence, now_s


def test_on_a_steady_link_the_patience_is_what_was_told() -> None:
    silence, now_s = heard([0.1] * 50)
    assert silence.limit_s(now_s) == pytest.approx(0.4)
    assert silence.left_s(now_s + 0.39) > 0
    assert silence.left_s(now_s + 0.41) < 0


def test_a_link_that_was_late_is_believed_longer_and_the_more_the_later() -> None:
    limits = []
    for worst in (0.1, 0.3, 0.5, 0.9):
        silence, now_s = heard([0.1, worst, 0.1])
        limits.append(silence.limit_s(now_s))
    assert limits == sorted(limits)
    assert limits[0] == pytest.approx(0.4)
    assert limits[2] > 0.8


def test_lateness_is_forgotten() -> None:
    silence, now_s = heard([0.1, 1.0, 0.1])
    assert silence.limit_s(now_s) > 1.5
    assert silence.limit_s(now_s + 120) == pytest.approx(0.4)


def test_what_this_side_was_held_up_is_no_silence() -> None:
    silence, now_s = heard([0.1] * 5)
    silence.held_up(3.0)  # it was stopped, and the beats lie there unread
    assert silence.left_s(now_s + 3.0) == pytest.approx(0.4)
    silence.heard(now_s + 3.05)
    assert silence.limit_s(now_s + 3.05) == pytest.approx(0.4)


def test_a_false_alarm_doubles_the_patience() -> None:
    silence, now_s = heard([0.1] * 5)
    before_s = silence.limit_s(now_s)
    silence.false_alarm(now_s)
    assert silence.limit_s(now_s) >= 2 * before_s


def test_whatever_else_comes_is_a_sign_of_life_but_beats_are_still_late() -> None:
    silence, now_s = heard([0.1] * 5)
    silence.alive(now_s + 0.35)
    assert silence.left_s(now_s + 0.5) > 0  # the beats are silent for longer than the patience
    assert silence.left_s(now_s + 0.8) < 0
    silence.heard(now_s + 0.6)  # half a second late, which is learnt although something had come between
    assert silence.limit_s(now_s + 0.6) > 1.0


def test_a_sign_of_life_shortens_no_grace() -> None:
    silence = Silence(CALM)
    silence.begin(10.0, grace_s=3.0)
    silence.alive(10.5)
    assert silence.left_s(13.2) > 0


def test_the_first_beat_has_time_to_connect() -> None:
    silence = Silence(CALM)
    silence.begin(10.0, grace_s=3.0)
    assert silence.left_s(13.0) > 0
    assert silence.left_s(13.5) < 0


@given(st.lists(st.floats(0.0, 20.0), max_size=30), st.floats(0.0, 60.0))
def test_the_patience_keeps_within_its_bounds_and_silence_always_ends(gaps: list[float], later_s: float) -> None:
    silence, now_s = heard(gaps)
    assert 0.4 <= silence.limit_s(now_s + later_s) <= 4.0
    assert silence.left_s(now_s + 4.01) < 0


@pytest.mark.parametrize("figures", [(0.1, 0.1, 4.0), (0.5, 0.4, 4.0), (-1, 0.4, 4.0), (0.1, float("nan"), 4.0), (0.1, 5.0, 4.0)])
def test_figures_that_cannot_be(figures: tuple[float, float, float]) -> None:
    with pytest.raises(BadInput, match="heartbeat"):
        Heartbeat(*figures)

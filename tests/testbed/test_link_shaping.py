"""Rate, delay and order of a shaped link, on a clock of its own."""

from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st
from testbed.shaping import UNSHAPED, DelayLine, LinkShape, Shaper

shapes = st.builds(
    LinkShape,
    st.floats(1e3, 1e9),
    st.floats(0, 0.2),
    st.floats(0, 0.05),
    st.floats(0, 1e5),
)


def pass_through(line: DelayLine, now_s: float) -> bytes:
    """What has arrived by now."""
    out = b""
    while (block := line.arrived(now_s)) is not None:
        out += block
        line.taken(len(block))
        if not block:
            break
    return out


def test_a_busy_link_carries_exactly_its_rate_however_late_it_is_served() -> None:
    shaper = Shaper(LinkShape(1e6, 0.0))
    now_s = sent = 0.0
    while now_s < 10.0:
        while shaper.opens_s <= now_s:
            last_s = shaper.send(now_s, shaper.block_bytes)
            sent += shaper.block_bytes
        now_s += 0.0035  # never on time, but before it falls idle
    assert sent / last_s == pytest.approx(1e6, rel=1e-9)


def test_an_idle_link_saves_nothing_up() -> None:
    shaper = Shaper(LinkShape(1e6, 0.0))
    shaper.send(0.0, 1000)
    assert shaper.send(5.0, 10_000) == pytest.approx(5.01)


def test_a_bucket_lets_so_much_pass_at_once_and_then_keeps_the_rate() -> None:
    shaper = Shaper(LinkShape(1e6, 0.01, burst_bytes=50_000))
    assert shaper.send(5.0, 50_000) == pytest.approx(5.01)
    assert shaper.send(5.0, 10_000) == pytest.approx(5.02)
    assert shaper.send(5.03, 30_000) == pytest.approx(5.05)  # 20,000 bytes have been saved up since
    assert shaper.send(9.0, 150_000) == pytest.approx(9.11)


def test_a_message_takes_latency_and_bytes_over_bandwidth() -> None:
    link = LinkShape(2e6, 0.03)
    assert Shaper(link).send(1.0, 40_000) == pytest.approx(1.0 + 0.02 + 0.03)
    assert Shaper(link, overhead_s=0.001).send(1.0, 40_000) == pytest.approx(1.0 + 0.02 + 0.029)


def test_two_connections_share_one_link() -> None:
    shaper = Shaper(LinkShape(1e6, 0.01))
    one, two = DelayLine(shaper), DelayLine(shaper)
    one.put(0.0, bytes(100_000))
    two.put(0.0, bytes(100_000))
    assert (one.next_s, two.next_s) == (pytest.approx(0.11), pytest.approx(0.21))


def test_no_time_is_taken_where_nothing_is_shaped() -> None:
    assert Shaper(UNSHAPED).send(3.0, 1 << 30) == 3.0


def test_a_new_shape_holds_from_then_on() -> None:
    shaper = Shaper(LinkShape(1e6))
    assert shaper.send(0.0, 1000) == pytest.approx(0.001)
    shaper.shape = LinkShape(1e5)
    assert shaper.send(1.0, 1000) == pytest.approx(1.01)


@given(shapes, st.lists(st.tuples(st.floats(0, 0.05), st.integers(1, 5000)), max_size=40))
def test_bytes_keep_their_order_and_arrive_neither_early_nor_late(shape: LinkShape, blocks: list[tuple[float, int]]) -> None:
    line = DelayLine(Shaper(shape))
    now_s, sent, free_s, latest_s = 0.0, b"", 0.0, 0.0
    for i, (pause_s, size) in enumerate(blocks):
        now_s += pause_s
        data = bytes([i % 251]) * size
        line.put(now_s, data)
        sent += data
        free_s = max(free_s, now_s - shape.burst_bytes / shape.bandwidth_bytes_per_s) + size / shape.bandwidth_bytes_per_s
        latest_s = max(free_s, now_s) + shape.latency_s + shape.jitter_s
    assert line.held_bytes == len(sent)
    if blocks:
        beyond = max(blocks[0][1] - shape.burst_bytes, 0)
        assert line.next_s >= blocks[0][0] + beyond / shape.bandwidth_bytes_per_s + shape.latency_s - 1e-9
    received = b""
    while not line.empty:
        assert line.arrived(line.next_s - 1e-6 - line.next_s * 1e-12) is None
        now_s = line.next_s
        received += pass_through(line, now_s)
    assert received == sent
    assert now_s <= latest_s + 1e-6
    assert line.held_bytes == 0


def test_the_end_of_a_stream_comes_after_its_bytes() -> None:
    line = DelayLine(Shaper(LinkShape(1e6, 0.5)))
    line.put(0.0, b"last")
    line.put(0.0, b"")
    assert pass_through(line, 0.4) == b""
    block = line.arrived(1.0)
    assert block is not None
    assert bytes(block) == b"last"
    line.taken(1)
    assert bytes(line.arrived(1.0) or b"") == b"ast"
    line.taken(3)
    assert line.arrived(1.0) is not None
    assert not line.arrived(1.0)
    line.taken(0)
    assert line.empty


def test_a_far_side_that_does_not_read_stops_the_link() -> None:
    line = DelayLine(Shaper(LinkShape(1e6, 0.1)))
    put = 0
    while line.takes_from_s() < math.inf:
        line.put(line.takes_from_s(), bytes(1448))
        put += 1448
    assert put < 2_000_000
    line.taken(1448)
    assert line.takes_from_s() < math.inf


@pytest.mark.parametrize(
    "wrong",
    [
        (1.0, 0.0, 0.0, -1.0),
        (1.0, 0.0, 0.0, math.inf),
        (0.0, 0.0, 0.0),
        (math.nan, 0.0, 0.0),
        (1.0, -1.0, 0.0),
        (1.0, math.inf, 0.0),
        (1.0, 0.0, math.nan),
    ],
)
def test_a_shape_that_cannot_be_is_refused(wrong: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="must be"):
        LinkShape(*wrong)

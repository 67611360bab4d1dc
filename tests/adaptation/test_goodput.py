"""The estimator and the chooser, as pure classes on a simulated link."""

from __future__ import annotations

import random
import time
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nodes.codec_choice import CodecChooser, CodecOnLink, Load
from nodes.goodput import Goodput
from splitnet.plan import CodecOption


class Wire:
    """A link on a clock of its own: FIFO, with a rate that may depend on time, and one message after another."""

    def __init__(self, rate: Callable[[float], float], trip_s: float = 0.004, stall: Callable[[], float] = lambda: 0.0) -> None:
        self.goodput = Goodput()
        self.goodput.restart(trip_s, counts=True)
        self.now_s = 100.0
        self._rate, self._trip_s, self._stall = rate, trip_s, stall
        self._free_s = 0.0
        self._due: list[float] = []

    def send(self, size_bytes: int) -> None:
        asked = self.goodput.asks(self.now_s, size_bytes)
        self.goodput.sent(self.now_s, size_bytes, asked=asked)
        at_s, left = max(self._free_s, self.now_s), float(size_bytes)
        while left > 1e-6:  # in steps, for a rate that changes
            step_s = min(0.005, left / self._rate(at_s))
            left -= self._rate(at_s) * step_s
            at_s += step_s
        self._free_s = at_s
        self.now_s += 5e-5  # what the sender's processor takes
        if asked:
            self._due.append(max(at_s + self._trip_s + self._stall(), self._due[-1] if self._due else 0.0))

    def run(self, until_s: float) -> None:
        while self._due and self._due[0] <= until_s:
            self.now_s = max(self.now_s, self._due[0])
            self.goodput.arrived(self._due.pop(0))
        self.now_s = max(self.now_s, until_s)

    @property
    def bytes_per_s(self) -> float:
        return self.goodput.bytes_per_s(self.now_s)

    def busy(self, until_s: float, size: Callable[[], int], pause_s: float = 0.0) -> None:
        """Sends whenever there is room; or each time after a pause."""
        while self.now_s < until_s:
            if not self.goodput.has_room(self.now_s):
                self.run(max(self._due[0], self.now_s))
                continue
            self.send(size())
            self.run(self.now_s + pause_s)


def test_nothing_is_known_of_a_link_that_was_not_used() -> None:
    goodput = Goodput()
    goodput.restart(0.001, counts=True)
    assert goodput.bytes_per_s(5.0) == 0
    assert goodput.has_room(5.0)


@given(rate=st.floats(1e5, 2e8), size=st.integers(20_000, 1 << 20), trip_s=st.floats(0.0002, 0.05))
@settings(max_examples=20, deadline=None)
def test_a_link_that_is_kept_busy_is_known_exactly(rate: float, size: int, trip_s: float) -> None:
    wire = Wire(lambda _: rate, trip_s)
    wire.busy(100.0 + 30 * size / rate + 0.3, lambda: size)
    assert wire.bytes_per_s == pytest.approx(rate, rel=0.05)


@given(rate=st.floats(3e5, 2e7), share=st.floats(0.02, 0.5))
@settings(max_examples=20, deadline=None)
def test_idle_time_does_not_count(rate: float, share: float) -> None:
    """A message now and then, each of 30 ms: the link is idle for most of the time."""
    size = int(rate * 0.03)
    wire = Wire(lambda _: rate)
    wire.busy(103.0, lambda: size, pause_s=0.034 / share)
    assert wire.bytes_per_s == pytest.approx(rate, rel=0.1)
    wire.now_s += 3600
    assert wire.bytes_per_s == pytest.approx(rate, rel=0.1)


def test_late_receipts_of_small_messages_do_not_make_a_link_slow() -> None:
    """5 ms late, one in three, on a link where they take 0.1 ms."""
    chance = random.Random(1)
    wire = Wire(lambda _: 1e8, 0.001, lambda: 0.005 if chance.random() < 0.3 else 0.0)
    wire.busy(102.0, lambda: 1 << 20)
    before = wire.bytes_per_s
    wire.busy(106.0, lambda: 10_000, pause_s=0.05)
    assert wire.bytes_per_s > before / 2


@pytest.mark.parametrize("seed", range(5))
def test_a_rise_is_seen_through_late_receipts(seed: int) -> None:
    """A box that gets a quarter of a processor answers up to 20 ms late; a message of 4 ms, now and then, is on a link that was ten times as slow before."""
    chance = random.Random(seed)
    wire = Wire(lambda t: 6.25e5 if t < 105.0 else 6.25e6, 0.004, lambda: chance.uniform(0.0, 0.02))
    wire.busy(105.0, lambda: 27_000, pause_s=0.06)
    assert wire.bytes_per_s == pytest.approx(6.25e5, rel=0.4)
    wire.busy(107.0, lambda: 27_000, pause_s=0.06)
    assert wire.bytes_per_s > 0.4 * 6.25e6
    wire.busy(110.0, lambda: 27_000, pause_s=0.06)
    assert 0.4 * 6.25e6 < wire.bytes_per_s < 1.2 * 6.25e6


@pytest.mark.parametrize("factor", [0.1, 10.0])
@pytest.mark.parametrize("pause_s", [0.0, 0.2])
def test_a_change_is_seen_within_a_second(factor: float, pause_s: float) -> None:
    rate = {False: 5e6, True: 5e6 * factor}
    wire = Wire(lambda t: rate[t > 104.0])
    wire.busy(104.0, lambda: 100_000, pause_s)
    assert wire.bytes_per_s == pytest.approx(5e6, rel=0.1)
    wire.busy(105.0, lambda: 100_000, pause_s)
    assert wire.bytes_per_s == pytest.approx(5e6 * factor, rel=0.5)
    wire.busy(106.0, lambda: 100_000, pause_s)
    assert wire.bytes_per_s == pytest.approx(5e6 * factor, rel=0.1)


def test_a_fall_is_seen_before_the_message_is_there() -> None:
    """One message of 2 s, which a second earlier would have taken 0.1 s."""
    rate = {False: 1e7, True: 5e5}
    wire = Wire(lambda t: rate[t > 102.0])
    wire.busy(102.0, lambda: 1_000_000)
    wire.run(102.9)
    assert wire.bytes_per_s < 3e6


def test_no_more_is_handed_to_the_network_than_keeps_it_busy() -> None:
    wire = Wire(lambda _: 5e6, 0.01)
    wire.busy(102.0, lambda: 20_000)
    assert 0.05 * 5e6 <= wire.goodput.unacknowledged_bytes <= 0.1 * 5e6


def test_a_new_connection_starts_with_what_was_known() -> None:
    wire = Wire(lambda _: 5e6)
    wire.busy(101.0, lambda: 20_000)
    wire.goodput.restart(0.004, counts=False)
    assert wire.goodput.unacknowledged_bytes == 0
    assert wire.bytes_per_s == pytest.approx(5e6, rel=0.1)
    assert not wire.goodput.asks(200.0, 1 << 20), "the far side gives no receipts"
    assert wire.goodput.has_room(200.0)


# ---------------------------------------------------------------------------------------------------------------- choosing

RAW = CodecOption("raw", 1.0, 1e12, 1e12)
ZSTD = CodecOption("zstd", 1.5, 8e8, 2e9)
BF16 = CodecOption("bf16-zstd", 3.0, 6e8, 1e9)
OPTIONS = (RAW, ZSTD, BF16)
SIZE = 400_000


def chooser(objective: str = "throughput", stage_s: float = 0.01) -> CodecChooser:
    return CodecChooser("raw", OPTIONS, objective, Load(SIZE, SIZE, stage_s, stage_s))


@given(rate=st.floats(1e4, 1e10), objective=st.sampled_from(["latency", "throughput"]), size=st.integers(1, 1 << 24))
def test_the_choice_is_within_the_margin_of_the_best(rate: float, objective: str, size: int) -> None:
    choice = chooser(objective)
    choice.pick(0.0, size, rate)
    name = choice.pick(1.0, size, rate)
    costs = {option.name: choice.cost_s(option, size, rate) for option in OPTIONS}
    assert costs[name] <= max(min(costs.values()) / 0.95 * (1 + 1e-9), min(costs.values()) + 0.001)


def test_a_link_that_is_not_known_keeps_the_codec_of_the_plan() -> None:
    assert chooser().pick(0.0, SIZE, 0.0) == "raw"


def test_where_the_link_is_not_the_bottleneck_nothing_is_encoded() -> None:
    assert chooser(stage_s=0.5).pick(0.0, SIZE, 1e6) == "raw"
    assert chooser(stage_s=0.01).pick(0.0, SIZE, 1e6) == "bf16-zstd"


def test_small_differences_change_nothing() -> None:
    choice = CodecChooser("raw", (RAW, CodecOption("zstd", 1.05, 1e12, 1e12)), "throughput", Load(SIZE, SIZE))
    assert {choice.pick(float(t), SIZE, 1e6) for t in range(100)} == {"raw"}
    assert choice.switches == 0


def test_one_bad_moment_changes_little() -> None:
    choice = chooser()
    assert choice.pick(0.0, SIZE, 1e8) == "raw"
    assert choice.pick(0.1, SIZE, 2.5e7) == "raw"
    assert choice.pick(0.2, SIZE, 1e8) == "raw"
    assert choice.pick(0.3, SIZE, 2.5e7) == "raw"
    assert choice.pick(0.6, SIZE, 2.5e7) == "bf16-zstd"


def test_what_tensors_really_come_to_counts() -> None:
    choice = chooser()
    for _ in range(50):
        choice.saw("bf16-zstd", SIZE, SIZE, 0.0)  # of no use with these tensors
    choice.pick(0.0, SIZE, 1e6)
    assert choice.pick(1.0, SIZE, 1e6) == "zstd"


def test_what_is_not_known_of_a_codec_is_tried_on_the_tensors_themselves() -> None:
    """zstd was expected to be of little use; most of these numbers are zeros."""
    zeros = np.where(np.arange(100_000) % 10, np.float32(0), np.random.default_rng(0).standard_normal(100_000, dtype=np.float32))
    choice = CodecChooser("raw", (RAW, CodecOption("zstd", 1.05, 8e8, 2e9)), "throughput", Load(zeros.nbytes, zeros.nbytes))
    wire = Wire(lambda _: 1e6)
    wire.busy(102.0, lambda: 100_000)
    assert choice.unsure_of(0.0, zeros.nbytes) == "zstd"
    assert CodecOnLink(choice, wire.goodput).pick(zeros) == "zstd"
    assert choice.ratios["zstd"] > 3
    assert choice.codec == "zstd"
    now_s = time.monotonic()
    assert choice.unsure_of(now_s, zeros.nbytes) == ""
    assert choice.unsure_of(now_s + 11, zeros.nbytes) == "zstd"


def test_a_small_tensor_of_the_same_transfer_does_not_spoil_it() -> None:
    choice = CodecChooser("raw", (RAW, ZSTD), "throughput", Load(SIZE, SIZE))
    choice.saw("zstd", 2000, 1900, 0.0)
    assert choice.unsure_of(0.0, SIZE) == "zstd", "it was seen on a tensor of another kind"
    choice.saw("zstd", 1 << 16, 1 << 14, 0.0)
    for _ in range(20):
        choice.saw("zstd", 2000, 1900, 0.0)
        choice.saw("zstd", SIZE, SIZE // 4, 0.0)
    assert choice.unsure_of(0.0, SIZE) == ""
    assert choice.ratios["zstd"] == pytest.approx(4.0, rel=0.05)


def swinging(period_s: float, low: float, high: float, until_s: float) -> CodecChooser:
    """A pipeline that is kept full over a link whose bandwidth swings between the two."""
    wire = Wire(lambda t: high if t % period_s < period_s / 2 else low)
    choice = chooser()
    ratio = {option.name: option.ratio for option in OPTIONS}

    def size() -> int:
        return int(SIZE / ratio[choice.pick(wire.now_s, SIZE, wire.bytes_per_s)])

    wire.busy(100.0 + until_s, size)
    return choice


@pytest.mark.parametrize("period_s", [0.1, 0.4, 1.0, 2.0, 5.0])
def test_a_swinging_bandwidth_does_not_make_it_flap(period_s: float) -> None:
    """Tenfold, for a minute: following it would take two switches a period."""
    found = swinging(period_s, 2e6, 2e7, 60.0)
    assert found.switches <= 16
    later = swinging(period_s, 2e6, 2e7, 120.0).switches - found.switches
    assert later <= 10


def test_a_bandwidth_that_trembles_changes_nothing() -> None:
    """By a fifth, about the place where raw and zstd are equally good."""
    equal = SIZE / (0.01 + SIZE / 8e8)
    assert swinging(0.7, equal * 0.9, equal * 1.1, 60.0).switches <= 2


@pytest.mark.parametrize(("before", "after", "codec"), [(2e9, 1e6, "bf16-zstd"), (1e6, 2e9, "raw")])
def test_a_lasting_change_is_followed_within_two_seconds(before: float, after: float, codec: str) -> None:
    wire, choice = Wire(lambda t: before if t < 110 else after, 0.0005), chooser(stage_s=0.0)
    ratio = {option.name: option.ratio for option in OPTIONS}
    used: list[tuple[float, str]] = []

    def size() -> int:
        used.append((wire.now_s, choice.pick(wire.now_s, SIZE, wire.bytes_per_s)))
        return int(SIZE / ratio[used[-1][1]])

    wire.busy(115.0, size, pause_s=0.05 if max(before, after) > 1e7 else 0.0)
    assert {name for at, name in used if at > 112.0} == {codec}
    assert choice.switches <= 3

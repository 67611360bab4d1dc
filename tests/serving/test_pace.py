"""How the ingress learns what a pipeline takes. Time is the input here, so the pipeline is a played one: stages in a row, each with its time,
behind the real admission and the real line."""

from __future__ import annotations

import heapq
import itertools
import random
from collections import Counter, deque
from dataclasses import dataclass

import pytest

from nodes.admission import Admission
from nodes.line import Line
from nodes.pace import Passage
from splitnet.batching import Batching
from splitnet.errors import Overloaded


@dataclass(eq=False)
class Asked:
    client: str
    came_s: float
    priority: int = 0
    rows: int = 1
    kind: None = None


class Played:
    """`come` asks; `step` lets time pass."""

    def __init__(self, *stage_s: float, limit: int = 16, uneven: float = 0.0, late_s: float = 0.0) -> None:
        self.admission = Admission(limit)
        self.now_s = 0.0
        self.latencies: list[float] = []
        self.refused = 0
        self.under_way: set[str] = set()
        self._stage_s = stage_s
        self._free_s = [0.0] * len(stage_s)
        self._line = Line[Asked](Batching())
        self._out: list[tuple[float, int, Asked, Passage]] = []
        self._numbers = itertools.count()
        self._random = random.Random(0)
        self._uneven = uneven
        self._late_s = late_s  # that an answer may be held up on its way, one in five

    def come(self, client: str) -> bool:
        try:
            self.admission.enter(client)
        except Overloaded:
            self.refused += 1
            return False
        self.under_way.add(client)
        self._line.add(Asked(client, self.now_s), self.now_s)
        self._fill()
        return True

    def _fill(self) -> None:
        while self._line and self.admission.pace.has_room(self.now_s):
            (part,) = self._line.take(self.now_s)
            at_s = self.now_s
            for i, seconds in enumerate(self._stage_s):
                at_s = self._free_s[i] = max(at_s, self._free_s[i]) + seconds * (1 + self._random.uniform(-1, 1) * self._uneven)
            if self._random.random() < 0.2:
                at_s += self._random.uniform(0, self._late_s)
            heapq.heappush(self._out, (at_s, next(self._numbers), part.call, self.admission.pace.enter(self.now_s)))

    def step(self, until_s: float) -> str | None:
        """The client whose answer came, if one did before `until_s`."""
        if not self._out or self._out[0][0] > until_s:
            self.now_s = until_s
            return None
        self.now_s, _, asked, passage = heapq.heappop(self._out)
        self.admission.pace.leave(passage, self.now_s, 1.0, 1, answered=True)
        self.under_way.discard(asked.client)
        self.latencies.append(self.now_s - asked.came_s)
        self.admission.leave(asked.client, self.now_s - asked.came_s)
        self._fill()
        return asked.client

    def flood(self, seconds: float, clients: int, times: float) -> None:
        """Requests of `clients`, one at a time of each, come at random, `times` as many as the slowest stage can take."""
        end_s, next_s = self.now_s + seconds, self.now_s
        while self.now_s < end_s:
            next_s += self._random.expovariate(times / max(self._stage_s))
            while self.step(min(next_s, end_s)) is not None:
                pass
            if (client := f"client{self._random.randrange(clients)}") not in self.under_way:
                self.come(client)


@pytest.mark.parametrize("stage_s", [(0.01,), (0.01, 0.01), (0.01, 0.002), (0.002, 0.01, 0.002), (0.01, 0.008, 0.009, 0.01)])
def test_twice_the_load_is_answered_at_full_speed_and_soon(stage_s: tuple[float, ...]) -> None:
    played = Played(*stage_s, uneven=0.1)
    played.flood(1.0, clients=64, times=2.0)  # it learns
    played.latencies.clear()
    played.refused = 0
    played.flood(20.0, clients=64, times=2.0)
    alone_s = sum(stage_s)
    assert len(played.latencies) / 20.0 > 0.93 / max(stage_s)
    assert sorted(played.latencies)[int(0.99 * len(played.latencies))] < 3 * alone_s
    assert played.refused > 0.3 * len(played.latencies)


def test_answers_that_are_held_up_do_not_make_it_believe_in_a_slow_pipeline() -> None:
    """Fewer places would make for longer pauses, which would seem to be a slower pipeline yet."""
    played = Played(0.01, 0.01, uneven=0.1, late_s=0.05)
    played.flood(2.0, clients=64, times=2.0)
    played.latencies.clear()
    played.flood(20.0, clients=64, times=2.0)
    assert len(played.latencies) / 20.0 > 0.85 / 0.01


def test_a_client_alone_may_use_all_of_max_in_flight() -> None:
    played = Played(0.01, limit=16)
    for _ in range(50):
        while played.come("only"):
            pass
        assert played.admission.in_flight == 16
        played.step(played.now_s + 1.0)


def test_a_second_client_gets_in_while_the_first_has_filled_the_line() -> None:
    played = Played(0.01, 0.01, limit=16)
    for _ in range(50):
        while played.admission.in_flight < 14:
            played.come("first")
        played.step(played.now_s + 1.0)
    assert played.come("second")


def test_a_long_way_is_filled_too() -> None:
    """A link of 200 ms makes no stage busy: many batches must be under way."""
    played = Played(0.01, limit=64)
    pace = played.admission.pace
    way: deque[tuple[float, Passage]] = deque()
    now_s, done = 0.0, 0
    while now_s < 60.0:
        while pace.has_room(now_s) and len(way) < 64:
            leaves_s = max(now_s + 0.2, way[-1][0] + 0.01) if way else now_s + 0.2
            way.append((leaves_s, pace.enter(now_s)))
        now_s, passage = way.popleft()
        pace.leave(passage, now_s, 1.0, 1, answered=True)
        done += now_s > 10.0
    assert done / 50.0 > 0.9 / 0.01


def test_a_cold_start_is_forgotten_and_a_slower_pipeline_noticed() -> None:
    played = Played(0.1)
    played.come("a")
    assert played.step(1.0) == "a"  # ten times as long as those that follow
    played._stage_s = (0.01,)
    played.flood(3.0, clients=64, times=2.0)
    depth = played.admission.pace.depth
    assert depth is not None
    assert depth < 1.5
    played._stage_s = (0.05,)
    played.flood(20.0, clients=64, times=2.0)
    assert played.admission.pace.call_s == pytest.approx(0.05, rel=0.2)
    depth = played.admission.pace.depth
    assert depth is not None
    assert depth < 1.5


def test_the_hint_grows_with_those_who_were_refused_before() -> None:
    played = Played(0.01)
    played.flood(2.0, clients=64, times=2.0)
    hints = []
    for number in range(64):
        try:
            played.admission.enter(f"new{number}")
        except Overloaded as error:
            hints.append(error.retry_after_s)
    assert hints == sorted(hints)
    assert hints[-1] == pytest.approx(len(hints) * 0.01, rel=0.3)


def test_clients_are_forgotten_with_their_last_request() -> None:
    admission = Admission(4)
    for client in range(100):
        admission.enter(client)
        admission.leave(client, 0.1)
    assert admission.in_flight == 0
    assert admission._of_client == Counter()

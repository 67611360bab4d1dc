"""The line at the ingress, by itself: everybody's turn comes, in fair shares, and batches hold what they may."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.line import AGEING_S, Line, Part
from splitnet.batching import Batching


@dataclass(frozen=True)
class Asked:
    client: str
    rows: int = 1
    priority: int = 0
    kind: str | None = "usual"
    number: int = 0


def drained(line: Line[Asked], now_s: float = 0.0, step_s: float = 0.0) -> list[list[Part[Asked]]]:
    """All batches, one after another."""
    batches = []
    while line.wait_s(now_s) is not None:
        batches.append(line.take(now_s))
        now_s += step_s
    return batches


def firsts(batches: list[list[Part[Asked]]]) -> list[str]:
    return [batch[0].call.client for batch in batches]


def test_a_client_with_many_requests_lets_others_in_at_every_turn() -> None:
    line = Line[Asked](Batching())
    for number in range(10):
        line.add(Asked("many", number=number), 0.0)
    line.add(Asked("one"), 0.5)
    line.add(Asked("two"), 0.5)
    order = firsts(drained(line, 0.5))
    assert max(order.index("one"), order.index("two")) <= 2
    assert order.count("many") == 10


def test_shares_are_of_rows_not_of_requests() -> None:
    line = Line[Asked](Batching())
    for number in range(40):
        line.add(Asked("small", 1, number=number), 0.0)
        line.add(Asked("large", 10, number=number), 0.0)
    had: Counter[str] = Counter()
    for _ in range(33):
        (part,) = line.take(0.0)
        had[part.call.client] += part.rows
        assert abs(had["small"] - had["large"]) <= 10


def test_a_client_that_asks_one_at_a_time_is_charged_for_what_it_had() -> None:
    """It leaves the line after every request; else a large request each time would get it more than its share."""
    line = Line[Asked](Batching())
    for number in range(100):
        line.add(Asked("patient", number=number), 0.0)
    had: Counter[str] = Counter()
    line.add(Asked("greedy", 10), 0.0)
    for _ in range(60):
        (part,) = line.take(0.0)
        had[part.call.client] += part.rows
        if part.call.client == "greedy":
            line.add(Asked("greedy", 10), 0.0)
    assert abs(had["patient"] - had["greedy"]) <= 10


def test_higher_priorities_go_first_and_lower_ones_are_not_starved() -> None:
    line = Line[Asked](Batching())
    line.add(Asked("low"), 0.0)
    now_s, turns = 0.0, 0
    while True:  # a flood: two urgent requests come for each that is served
        line.add(Asked("high", priority=2, number=turns), now_s)
        line.add(Asked("high", priority=2, number=-turns), now_s)
        (part,) = line.take(now_s)
        if part.call.client == "low":
            break
        now_s, turns = now_s + AGEING_S / 10, turns + 1
        assert turns < 100
    assert 2 * AGEING_S <= now_s <= 3 * AGEING_S


def test_waiting_behind_ones_own_requests_is_no_reason_to_rise() -> None:
    line = Line[Asked](Batching())
    for number in range(20):
        line.add(Asked("many", number=number), 0.0)
    order = []
    for turn in range(10):
        now_s = turn * AGEING_S / 2
        if turn == 8:
            line.add(Asked("new"), now_s)
        order.append(line.take(now_s)[0].call.client)
    assert order[8] == "new"


def test_what_waits_is_joined_across_clients_up_to_the_bound() -> None:
    line = Line[Asked](Batching(max_batch=4))
    for number in range(3):
        for client in "abc":
            line.add(Asked(client, number=number), 0.0)
    batches = drained(line)
    assert [sum(part.rows for part in batch) for batch in batches] == [4, 4, 1]
    assert {part.call.client for part in batches[0]} == set("abc")


def test_other_sizes_and_what_does_not_fit_stay_in_line() -> None:
    line = Line[Asked](Batching(max_batch=4))
    line.add(Asked("a", 3), 0.0)
    line.add(Asked("b", 2), 0.0)
    line.add(Asked("c", 1, kind="other"), 0.0)
    line.add(Asked("d", 1), 0.0)
    line.add(Asked("e", 9), 0.0)
    assert [{p.call.client for p in batch} for batch in drained(line)] == [{"a", "d"}, {"b"}, {"c"}, {"e"}]


def test_without_a_delay_nobody_waits_and_with_one_until_company_has_come() -> None:
    at_once = Line[Asked](Batching(max_batch=4))
    at_once.add(Asked("a"), 5.0)
    assert at_once.wait_s(5.0) == 0.0
    line = Line[Asked](Batching(max_batch=4, max_delay_s=2.0))
    line.add(Asked("a"), 5.0)
    assert line.wait_s(6.0) == pytest.approx(1.0)
    line.add(Asked("b", 3), 6.5)
    assert line.wait_s(6.5) == 0.0  # full
    assert len(line.take(6.5)) == 2
    line.add(Asked("a"), 7.0)
    assert line.wait_s(9.0) == 0.0


def test_a_request_that_must_wait_does_not_hold_up_one_of_another_kind() -> None:
    line = Line[Asked](Batching(max_batch=4, max_delay_s=2.0))
    line.add(Asked("old", kind="other"), 0.0)
    line.add(Asked("new", priority=9), 1.5)
    assert line.wait_s(2.0) == 0.0
    assert line.take(2.0)[0].call.client == "old"
    assert line.wait_s(2.0) == pytest.approx(1.5)


def test_pieces_of_a_large_request_let_others_pass_between_them() -> None:
    line = Line[Asked](Batching(microbatch=4))
    line.add(Asked("large", 14), 0.0)
    line.add(Asked("small", 2), 0.0)
    batches = drained(line)
    assert firsts(batches) == ["large", "small", "large", "large", "large"]
    assert [(p.first, p.rows) for (p,) in batches if p.call.client == "large"] == [(0, 4), (4, 4), (8, 4), (12, 2)]


def test_what_is_put_back_goes_next_and_alone() -> None:
    line = Line[Asked](Batching(max_batch=8))
    for client in "abc":
        line.add(Asked(client), 0.0)
    failed = line.take(0.0)
    line.add(Asked("d", priority=9), 0.0)
    for part in failed:
        line.put_back(part)
    line.remove(failed[1].call)
    assert [[part.call.client for part in batch] for batch in drained(line)] == [["a"], ["c"], ["d"]]


_asked = st.builds(
    Asked,
    client=st.sampled_from("abcd"),
    rows=st.integers(1, 9),
    priority=st.integers(0, 9),
    kind=st.sampled_from(["x", "y", None]),
)
_steps = st.lists(st.one_of(_asked, st.just("take"), st.just("remove"), st.floats(0.0, 3.0)), max_size=60)


@given(_steps, st.integers(1, 6), st.sampled_from([0.0, 1.0]), st.integers(0, 4))
def test_every_row_goes_once_and_in_order_and_no_batch_is_too_large(
    steps: list[Asked | str | float], most: int, delay_s: float, micro: int
) -> None:
    line = Line[Asked](Batching(most, delay_s if most > 1 else 0.0, micro))
    now_s, waiting, done = 0.0, dict[int, Asked](), Counter[int]()

    def take() -> None:
        parts = line.take(now_s)
        kinds = {part.call.kind for part in parts}
        assert len(parts) == 1 or (kinds != {None} and len(kinds) == 1 and sum(p.rows for p in parts) <= most)
        for part in parts:
            number = part.call.number
            assert part.first == done[number]
            assert not (micro and part.call.kind) or part.rows <= micro
            done[number] += part.rows
            if done[number] == waiting[number].rows:
                del waiting[number]

    for number, step in enumerate(steps):
        if isinstance(step, Asked):
            waiting[number] = Asked(step.client, step.rows, step.priority, step.kind, number)
            line.add(waiting[number], now_s)
        elif isinstance(step, float):
            now_s += step
        elif step == "remove" and waiting:
            line.remove(waiting.pop(next(iter(waiting))))
        elif step == "take" and line.wait_s(now_s) == 0.0:
            take()
        assert len(line) == len(waiting)
    while (wait_s := line.wait_s(now_s)) is not None:
        assert wait_s <= delay_s + 1e-9
        now_s += wait_s
        take()
    assert not waiting
    assert len(line) == 0

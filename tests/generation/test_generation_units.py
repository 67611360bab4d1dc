"""The pieces of generating that are pure: what travels, what is guessed, what is kept, how many passes are made."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from small_engine import SmallModel

from nodes.engines.decoder.sampling import next_token
from nodes.engines.decoder.steps import Sampling, Step
from nodes.generation.drafting import MAX_DRAFT, PromptLookup
from nodes.generation.kept import Slots
from nodes.generation.meter import Line, Meter
from nodes.generation.orders import Fork, Orders, decode_orders, encode_orders
from nodes.generation.session import Session
from splitnet.errors import ProtocolError
from splitnet.generation import GenerateRequest

_HANDLES = st.integers(0, (1 << 64) - 1)
_FLOATS = st.floats(0.125, 1.0, width=32)
_SAMPLINGS = st.builds(Sampling, _FLOATS, _FLOATS, st.integers(0, 1 << 20), _FLOATS, _HANDLES)


@st.composite
def _steps(draw: st.DrawFn) -> Step:
    tokens = draw(st.lists(st.integers(0, (1 << 31) - 1), min_size=1, max_size=20))
    wanted = draw(st.integers(0, len(tokens)))
    return Step(draw(_HANDLES), draw(st.integers(0, 1 << 20)), np.array(tokens, np.int32), wanted, draw(st.none() | _SAMPLINGS))


_ORDERS = st.builds(
    Orders,
    st.lists(_steps(), max_size=5).map(tuple),
    st.lists(st.builds(Fork, _HANDLES, _HANDLES, st.integers(0, 1 << 20)), max_size=3).map(tuple),
    st.lists(_HANDLES, max_size=3).map(tuple),
)


@settings(max_examples=40)
@given(_ORDERS)
def test_orders_come_out_as_they_went_in(orders: Orders) -> None:
    again = decode_orders(encode_orders(orders.timed(0.25, 0.0064)))
    assert (again.forks, again.closes, len(again.steps)) == (orders.forks, orders.closes, len(orders.steps))
    assert again.timings == (pytest.approx((0.25, 0.0064), abs=1e-4),)
    for mine, theirs in zip(again.steps, orders.steps, strict=True):
        assert (mine.session, mine.position, mine.wanted, mine.sampling) == (
            theirs.session,
            theirs.position,
            theirs.wanted,
            theirs.sampling,
        )
        assert mine.tokens.tolist() == theirs.tokens.tolist()


@settings(max_examples=60)
@given(st.binary(max_size=60) | st.tuples(_ORDERS, st.integers(0, 200), st.integers(0, 255)).map(lambda t: _damaged(*t)))
def test_bytes_that_are_no_orders_are_refused(data: bytes) -> None:
    try:
        orders = decode_orders(data)
    except ProtocolError:
        return
    assert sum(len(step.tokens) for step in orders.steps) <= len(data)


def _damaged(orders: Orders, at: int, value: int) -> bytes:
    data = bytearray(encode_orders(orders))
    data[at % len(data)] = value
    return bytes(data)


def test_a_decode_step_takes_few_bytes() -> None:
    step = Step(3000, 1500, np.array([31000], np.int32), 1)
    assert len(encode_orders(Orders((step,)).timed(0.02, 0.001))) <= 18


# ------------------------------------------------------------------------------------------------------------- guesses


@settings(max_examples=60)
@given(st.lists(st.integers(0, 3), max_size=30), st.integers(1, 8))
def test_a_guess_is_what_followed_the_same_words(tokens: list[int], most: int) -> None:
    array = np.array(tokens, np.int32)
    guess = PromptLookup().propose(array, most, 1.0, 1e-6).tolist()
    assert len(guess) <= most
    repeats = any(tokens[i : i + 2] == tokens[-2:] for i in range(len(tokens) - 2))
    assert bool(guess) == (len(tokens) > 2 and repeats)
    if guess:
        assert any(tokens[i : i + 2] == tokens[-2:] and (tokens + guess)[i + 2] == guess[0] for i in range(len(tokens) - 2))


def test_the_length_of_guesses_follows_how_often_they_are_right() -> None:
    text = np.array([5, 6, 7] * 10, np.int32)
    lookup = PromptLookup()
    at_first = len(lookup.propose(text, 100, 0.1, 0.001))
    for _ in range(10):
        lookup.learn(8, 8)
    assert at_first < len(lookup.propose(text, 100, 0.1, 0.001)) <= MAX_DRAFT
    assert len(lookup.propose(text, 100, 0.1, 0.09)) < 8  # where a token costs nearly as much as a pass
    assert len(lookup.propose(text, 3, 0.1, 0.001)) == 3
    for _ in range(60):
        lookup.learn(1, 0)
    guesses = [len(lookup.propose(text, 100, 0.1, 0.001)) for _ in range(40)]
    assert 0 < sum(guesses) <= 4  # only now and then


def _accepting(tokens: list[int], sampling: Sampling, guess: list[int], model: SmallModel) -> list[int]:
    session = Session(1, np.array(tokens), GenerateRequest(50, sampling.temperature, seed=sampling.seed))
    hidden = None
    engines = model.engines()
    step = session.chunk(len(tokens) - 1)
    for engine in engines:
        hidden = engine.compute([step], hidden)
    session.take(step, np.array([], np.int32))
    step = session.next_step(np.array(guess, np.int32))
    hidden = None
    for engine in engines:
        hidden = engine.compute([step], hidden)
    assert hidden is not None
    return session.take(step, hidden)


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_guesses_change_nothing_but_the_number_of_passes(temperature: float) -> None:
    model = SmallModel(vocabulary=5)
    for seed in range(30):
        sampling = Sampling(temperature, seed=seed)
        tokens = np.random.default_rng(seed).integers(0, 5, 10).tolist()
        plain = model.generate(tokens, 6, sampling)
        guess = [*plain[: seed % 6], (plain[seed % 6] + 1) % 5, 0, 1] if seed % 7 else plain[:5]
        found = _accepting(tokens, sampling, guess, model)
        assert found == plain[: len(found)]
        assert len(found) == (seed % 6 + 1 if seed % 7 else 6)


def test_guessed_tokens_are_distributed_as_plain_sampling() -> None:
    """With other seeds: how often each token comes after a guess, against the probabilities of the model (chi squared)."""
    probabilities = np.array([0.4, 0.3, 0.2, 0.08, 0.02])
    scores = np.log(probabilities).astype(np.float32)
    rounds = 1500
    found = np.zeros((2, 5))
    for seed in range(rounds):
        sampled = [next_token(scores.copy(), Sampling(1.0, seed=seed), np.array([]), position) for position in (7, 8)]
        session = Session(1, np.array([1]), GenerateRequest(5, 1.0, seed=seed))
        step = session.next_step(np.array([seed % 2], np.int32))  # 0 or 1 is guessed
        new = session.take(step, np.array(sampled, np.int32))
        assert (len(new) > 1) == (new[0] == seed % 2)
        for place, token in enumerate(new):
            found[place, token] += 1
    for counts in found:  # of the token at the place of the guess, and of the one after a right guess
        expected = probabilities * counts.sum()
        assert float(((counts - expected) ** 2 / expected).sum()) < 18.5  # 0.1% of the time by chance, with 4 degrees of freedom


def test_a_small_models_draws_are_the_large_ones_as_often_as_they_can_be_expected_to() -> None:
    """Both draw with the same random numbers: the answer is distributed as the large model says (chi squared), and agrees as theory says at the least."""
    large, small = np.array([0.4, 0.3, 0.2, 0.08, 0.02]), np.array([0.3, 0.35, 0.1, 0.05, 0.2])
    rounds, agreed, found = 3000, 0, np.zeros(5)
    for seed in range(rounds):
        sampling = Sampling(1.0, seed=seed)
        guess = next_token(np.log(small).astype(np.float32), sampling, np.array([]), 7)
        session = Session(1, np.array([1]), GenerateRequest(5, 1.0, seed=seed))
        drawn = next_token(np.log(large).astype(np.float32), sampling, np.array([]), 7)
        new = session.take(session.next_step(np.array([guess], np.int32)), np.array([drawn, 0], np.int32))
        agreed += len(new) > 1
        found[new[0]] += 1
    apart = np.abs(large - small).sum() / 2
    assert (1 - apart) / (1 + apart) - 0.03 < agreed / rounds <= 1 - apart + 0.03
    assert float(((found - large * rounds) ** 2 / (large * rounds)).sum()) < 18.5  # 0.1% of the time by chance, with 4 degrees of freedom


# ------------------------------------------------------------------------------------------------------------ sessions


def _session(prompt: list[int], count: int = 10, handle: int = 1, **options: object) -> Session:
    return Session(handle, np.array(prompt), GenerateRequest(count, **options))  # type: ignore[arg-type]


def test_a_session_can_be_rebuilt_from_its_tokens() -> None:
    session = _session([1, 2, 3])
    step = session.chunk(10)
    assert (step.position, step.tokens.tolist(), step.wanted) == (0, [1, 2, 3], 1)
    assert step.sampling is not None
    assert session.waits
    assert session.take(step, np.array([4], np.int32)) == [4]
    assert session.next_step(np.array([], np.int32)).sampling is None
    session.rebuild(9)
    step = session.chunk(3)
    assert (step.session, step.position, step.tokens.tolist(), step.wanted) == (9, 0, [1, 2, 3], 0)
    assert step.sampling is not None
    last = session.next_step(np.array([], np.int32))
    assert (last.position, last.tokens.tolist(), last.wanted) == (3, [4], 1)


def test_stop_sequences_end_in_the_middle_of_a_pass() -> None:
    session = _session([1, 5], stop=((5, 6), (9,)))
    step = session.chunk(2)
    assert session.take(step, np.array([6], np.int32)) == [6]  # 5 was of the prompt
    assert not session.finish
    step = session.next_step(np.array([5, 6, 7], np.int32))
    assert session.take(step, np.array([5, 6, 7, 8], np.int32)) == [5, 6]
    assert session.finish == "stop"
    assert session.held == len(session.tokens) - 1


def test_slots_are_promised_from_the_start_and_kept_until_others_need_them() -> None:
    slots = Slots(100)
    first, second = _session([1] * 20, 20, 1), _session([2] * 20, 20, 2)
    for session in (first, second):
        assert slots.make_room(session.reserved, None) == []
        slots.live[session] = None
    assert slots.free == 20
    assert slots.make_room(21, None) is None
    first.held = 20
    slots.keep(first, 1.0)
    assert slots.free == 60
    assert first.reserved == 20
    assert slots.make_room(40, None) == []
    first.in_flight = 1
    assert slots.make_room(41, None) is None  # somebody is being forked from it
    first.in_flight = 0
    assert slots.make_room(41, None) == [first]
    assert not slots.kept


def test_only_so_many_ended_sessions_are_kept() -> None:
    slots = Slots(10**6)
    closed = []
    for number in range(70):
        session = _session([1] * 20, 20, number)
        session.held = 20
        closed += [old.handle for old in slots.keep(session, float(number))]
    assert closed == list(range(6))
    assert len(slots.kept) == 64


def test_what_a_prompt_shares_leaves_one_token_to_compute() -> None:
    session = _session([1, 2, 3, 4])
    assert session.shares(np.array([1, 2, 3, 4])) == 3
    assert session.shares(np.array([1, 2, 9, 4, 5])) == 2
    assert session.shares(np.array([9])) == 0


# --------------------------------------------------------------------------------------------------------------- meter


def test_a_line_is_found_through_fading_points() -> None:
    line = Line(1.0, 1.0)
    for x in (1, 4, 64, 2, 1, 32):
        line.add(x, 0.01 + 0.002 * x)
    assert line.at(10) == pytest.approx(0.03, rel=1e-6)


def _seen(meter: Meter, stages: int, pass_s: float, token_s: float, net_s: float) -> Meter:
    for tokens in (1, 2, 8, 32, 1, 4) * 5:
        busy_s = pass_s + token_s * tokens
        meter.returned(tokens, [(busy_s, 0.5)] * stages, stages * (busy_s + 0.5) + net_s)
    return meter


def test_as_many_groups_are_made_as_keep_the_slowest_stage_busy() -> None:
    meter = _seen(Meter(3), 3, 0.01, 0.0001, 0.0)
    assert meter.group(12) == 3  # three stages, and a surplus: four groups
    far = _seen(Meter(3), 3, 0.01, 0.0001, 0.07)
    assert far.group(12) == 1  # a trip of ten passes
    assert far.group(36) in (3, 4)
    assert far.full(12)
    assert not far.full(5)
    assert far.has_room(0.05, 1)
    assert not far.has_room(0.12, 1)


def test_a_pass_that_costs_as_much_as_its_tokens_is_divided_finely() -> None:
    assert _seen(Meter(2), 2, 0.0001, 0.01, 0.04).group(8) == 1

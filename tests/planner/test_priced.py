"""Bounds by prices and the search that they guide, where the exact answer is known: the tables are told to be too small."""

from __future__ import annotations

import math
import random

import numpy as np
import pytest
from test_solve_chain import instance, reached
from test_wishes import coded

from partitioner.cost import BUFFERED_REQUESTS
from partitioner.solvers import chain, choosing, reading, solve
from partitioner.solvers.bound import shared_bound
from partitioner.solvers.problem import Overheads, interval_ends, interval_memory
from splitnet.errors import NoPlan
from splitnet.plan import Plan


def bound(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.bound


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_prices_bound_the_exact_answer_and_find_it(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    found, near = 0, 0
    for seed in range(40):
        problem = instance(seed)
        monkeypatch.setattr(chain, "MAX_FIGURES", 1 << 26)
        try:
            exact = reached(solve(*problem, objective))
        except NoPlan:
            continue
        monkeypatch.setattr(chain, "MAX_FIGURES", 0)
        plan = solve(*problem, objective)
        assert bound(plan) <= exact * (1 + 1e-9) + 1e-9, seed
        assert reached(plan) >= exact * (1 - 1e-9), seed
        found, near = found + 1, near + (reached(plan) <= exact * (1 + 3e-3))
    assert found > 25
    assert near >= 0.9 * found


@pytest.mark.parametrize("objective", ["latency", "throughput"])
def test_prices_know_codecs_and_loss(objective: str, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(20):
        graph, devices, links, codecs, usable = coded(seed)
        for budget in (None, 0.5):
            monkeypatch.setattr(chain, "MAX_FIGURES", 1 << 26)
            try:
                exact = reached(solve(graph, devices, links, objective, codecs, link_codecs=usable, max_accuracy_loss=budget))
            except NoPlan:
                continue
            monkeypatch.setattr(chain, "MAX_FIGURES", 0)
            plan = solve(graph, devices, links, objective, codecs, link_codecs=usable, max_accuracy_loss=budget)
            assert bound(plan) <= exact * (1 + 1e-9) + 1e-9, (seed, budget)
            assert reached(plan) >= exact * (1 - 1e-9), (seed, budget)


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("table", [1500, 3])
def test_positions_that_were_left_out_count_in_the_bound(objective: str, table: int, monkeypatch: pytest.MonkeyPatch) -> None:
    recovered = 0
    for seed in range(30):
        problem = instance(seed)
        monkeypatch.setattr(choosing, "MAX_POSITIONS", 1000)
        monkeypatch.setattr(reading, "MAX_TABLE", 1500)
        try:
            exact = reached(solve(*problem, objective))
        except NoPlan:
            continue
        monkeypatch.setattr(choosing, "MAX_POSITIONS", 2)
        monkeypatch.setattr(reading, "MAX_TABLE", table)
        try:
            plan = solve(*problem, objective)
        except NoPlan:
            continue  # too few places to cut at
        assert bound(plan) <= exact * (1 + 1e-9) + 1e-9, seed
        assert reached(plan) >= exact * (1 - 1e-9), seed
        recovered += reached(plan) <= exact * (1 + 1e-9)
    assert recovered > 15


def test_ends_by_doubling_are_those_of_the_table() -> None:
    rng = random.Random(3)
    for _ in range(40):
        length = rng.randint(1, 20)
        activations, params = [float(rng.randint(0, 9)) for _ in range(length)], [float(rng.randint(0, 9)) for _ in range(length)]
        cuts = np.array([float(rng.randint(0, 4)) for _ in range(length + 1)])
        limits = np.array([math.inf, 30.0, 12.0])
        barred = np.array([[rng.random() < 0.1 for _ in range(length)] for _ in limits])
        table = interval_memory(activations, [[(str(k), size)] for k, size in enumerate(params)], cuts)
        ends = interval_ends(activations, params, cuts, limits, barred)
        for d, limit in enumerate(limits):
            for j in range(length):
                good = [i for i in range(j + 1, length + 1) if table[j, i] <= limit and not barred[d, j:i].any()]
                assert ends[d, j] == max(good, default=0), (d, j, BUFFERED_REQUESTS)


def test_a_machine_that_all_share_bounds_the_bottleneck() -> None:
    """Three devices of one thread on two cores: half of all work, with the stages and messages that there must be."""
    seconds = np.array([[1.0, 2.0, 3.0], [2.0, 1.0, 3.0], [1.0, 1.0, 9.0]])
    overheads = Overheads(np.full(3, 0.5), np.full(3, 0.25), np.full(3, 1.0))
    shared = {0: 1, 1: 1, 2: 1}
    assert shared_bound(seconds, shared, 2, overheads, 1, False) == pytest.approx((1 + 1 + 3 + 0.5 + 1.0) / 2)
    assert shared_bound(seconds, shared, 2, overheads, 3, True) == pytest.approx((1 + 1 + 3 + 1.5 + 1.0 + 4 * 0.25) / 2)
    assert shared_bound(seconds, {0: 1, 1: 1}, 2, overheads, 1, False) == 0.0  # the third is elsewhere

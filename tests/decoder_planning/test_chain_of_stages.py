"""The chain solver against every plan that there is, on tiny instances."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.decoders.chain import Chain, ChainPlan, Costs, best_chain, price


def random_chain(seed: int, nodes: int, formats: int, codecs: int, length: int) -> Chain:
    draw = np.random.default_rng(seed)

    def figures(*shape: int, most: float = 1.0) -> np.ndarray:
        return draw.integers(0, 10, shape) * (most / 10)

    def costs() -> Costs:
        wire = figures(codecs, nodes, nodes)
        wire[draw.random(wire.shape) < 0.15] = np.inf
        back = figures(nodes, nodes)
        return Costs(
            figures(nodes, formats, length, most=3.0), figures(nodes), figures(nodes), figures(codecs, nodes), figures(codecs, nodes), wire,
            figures(nodes), figures(nodes), back,
        )  # fmt: skip

    latency, pace = costs(), costs()
    missing = ~np.isfinite(latency.wire)
    pace.wire[missing] = np.inf
    latency.wire[~np.isfinite(pace.wire)] = np.inf
    spans = np.arange(length + 1)[None, :] - np.arange(length + 1)[:, None]
    room = draw.integers(1, length + 2, (nodes, formats))
    fits = (spans > 0) & (spans <= room[:, :, None, None])
    counts = frozenset(int(c) for c in draw.choice(np.arange(1, nodes + 1), draw.integers(1, nodes + 1), replace=False))
    return Chain(latency, pace, fits, frozenset(range(nodes)) - {nodes - 1} or frozenset({0}), frozenset(range(nodes)), counts)


def every_plan(chain: Chain) -> list[ChainPlan]:
    _, formats, length = chain.latency.vertices.shape
    codecs = chain.latency.send.shape[0]
    found = []
    for count in sorted(chain.counts):
        for order in itertools.permutations(range(chain.nodes), count):
            if order[0] not in chain.firsts or order[-1] not in chain.lasts:
                continue
            for inner in itertools.combinations(range(1, length), count - 1):
                for forms in itertools.product(range(formats), repeat=count):
                    for sent in itertools.product(range(codecs), repeat=count - 1):
                        found.append(price(chain, (0, *inner, length), order, forms, sent))
    return [plan for plan in found if np.isfinite(plan.latency_s)]


@settings(max_examples=30, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    nodes=st.integers(1, 3),
    formats=st.integers(1, 2),
    codecs=st.integers(1, 2),
    waits=st.sampled_from([0, 1, 7]),
)
def test_no_plan_scores_less_than_the_one_that_is_found(seed: int, nodes: int, formats: int, codecs: int, waits: int) -> None:
    chain = random_chain(seed, nodes, formats, codecs, length=4)

    def score(latency_s: float, bottleneck_s: float) -> float:
        return max(latency_s + waits * bottleneck_s, 3 * bottleneck_s)

    least = min((score(plan.latency_s, plan.bottleneck_s) for plan in every_plan(chain)), default=None)
    found = best_chain(chain, score)
    assert (found is None) == (least is None)
    if found is not None:
        assert found.score == pytest.approx(least)
        assert found.bound <= found.score
        again = price(chain, found.plan.cuts, found.plan.order, found.plan.formats, found.plan.codecs)
        assert (again.latency_s, again.bottleneck_s) == (found.plan.latency_s, found.plan.bottleneck_s)
        assert len(found.plan.order) in chain.counts

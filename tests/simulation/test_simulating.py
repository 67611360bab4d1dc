"""The simulator against the closed forms of partitioner.cost where these are exact, and against what must hold of any schedule."""

from __future__ import annotations

import dataclasses
import itertools
import math
import time
from collections import defaultdict

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from partitioner.cost import CodecFigures, Machine, Overhead, evaluate
from partitioner.simulation import Simulation, simulate
from splitnet.cluster import Link
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import CLIENT, NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.tensors import TensorSpec

Links = dict[tuple[str, str], Link]


def make_plan(seconds: list[float], edges: dict[tuple[int, int], int], *, nodes: list[str] | None = None, max_in_flight: int = 16) -> Plan:
    """Stages 0..n-1 on their nodes (default: one each), with edges (i, j) -> bytes; -1 is the client. Each edge is a value of its own."""
    where = nodes or [f"n{k}" for k in range(len(seconds))]

    def spec(i: int, j: int) -> TensorSpec:
        return TensorSpec(f"v{i}_{j}", "float32", (1,))

    inputs = tuple(spec(i, j) for i, j in edges if i < 0)
    stages = tuple(
        StageSpec(
            f"s{k}",
            where[k],
            (f"op{k}",),
            tuple(spec(i, j) for i, j in edges if j == k),
            tuple(spec(i, j) for i, j in edges if i == k),
            seconds=s,
        )
        for k, s in enumerate(seconds)
    )
    names = {-1: CLIENT, len(seconds): CLIENT, **{k: f"s{k}" for k in range(len(seconds))}}
    transfers = tuple(Transfer(names[i], names[j], (spec(i, j).name,), bytes=size) for (i, j), size in edges.items())
    outputs = tuple(OutputSpec(spec(i, j).name, spec(i, j)) for i, j in edges if j == len(seconds))
    refs = tuple(NodeRef(name, "127.0.0.1:1") for name in dict.fromkeys(where))
    return Plan("made", "", "latency", refs, stages, transfers, inputs, outputs, max_in_flight=max_in_flight)


def all_links(plan: Plan, bandwidth: float = 1e6, latency: float = 1e-3) -> Links:
    return {(a.name, b.name): Link(a.name, b.name, bandwidth, latency) for a, b in itertools.permutations(plan.nodes, 2)}


seconds_ = st.floats(0.001, 0.1)
sizes = st.integers(1, 200_000)


@st.composite
def chains(draw: st.DrawFn) -> tuple[Plan, Links]:
    """One stage per node, links of random speed."""
    times = draw(st.lists(seconds_, min_size=1, max_size=6))
    plan = make_plan(times, {(k - 1, k): draw(sizes) for k in range(len(times) + 1)}, max_in_flight=draw(st.integers(1, 12)))
    return plan, {pair: Link(*pair, draw(st.floats(1e5, 1e8)), draw(st.floats(0, 0.02))) for pair in all_links(plan)}


@st.composite
def graphs(draw: st.DrawFn) -> tuple[Plan, Links]:
    """Any stages on any nodes; every stage has an input, and what nobody uses is an output."""
    times = draw(st.lists(seconds_, min_size=1, max_size=6))
    count = len(times)
    edges: dict[tuple[int, int], int] = {}
    for k in range(count):
        for source in draw(st.sets(st.integers(-1, k - 1), min_size=1, max_size=3)):
            edges[source, k] = draw(sizes)
    for k in range(count):
        if not any(i == k for i, _ in edges):
            edges[k, count] = draw(sizes)
    where = draw(st.lists(st.sampled_from("abc"), min_size=count, max_size=count))
    plan = make_plan(times, edges, nodes=where, max_in_flight=draw(st.integers(1, 6)))
    return plan, {pair: Link(*pair, draw(st.floats(1e5, 1e8)), draw(st.floats(0, 0.02))) for pair in all_links(plan)}


def by_place(simulation: Simulation) -> dict[str, list[tuple[float, float]]]:
    found: dict[str, list[tuple[float, float]]] = defaultdict(list)
    for interval in simulation.intervals:
        found[interval.place].append((interval.start_s, interval.end_s))
    return found


@given(chains())
@settings(max_examples=60, deadline=None)
def test_one_request_takes_the_latency_of_the_closed_form(case: tuple[Plan, Links]) -> None:
    plan, links = case
    cost = evaluate(plan.stages, plan.transfers, links)
    assert simulate(plan, links).requests[0].latency_s == pytest.approx(cost.latency_s, rel=1e-9)


@given(chains(), st.floats(0.1, 8.0), st.floats(1e6, 1e9))
@settings(max_examples=60, deadline=None)
def test_codecs_and_overheads_cost_one_request_what_the_closed_form_says(case: tuple[Plan, Links], ratio: float, speed: float) -> None:
    plan, links = case
    codecs = {"raw": CodecFigures(ratio, speed, {node.name: 2 * speed for node in plan.nodes})}
    overheads = {plan.nodes[0].name: Overhead(1e-3, 2e-4, 5e-4), plan.nodes[-1].name: Overhead(2e-3, 1e-4, 7e-4)}
    cost = evaluate(plan.stages, plan.transfers, links, codecs, overheads)
    played = simulate(plan, links, codecs=codecs, overheads=overheads)
    assert played.requests[0].latency_s == pytest.approx(cost.latency_s, rel=1e-9)
    assert played.busy_s() == pytest.approx(dict(cost.node_seconds) | {f"{a}->{b}": s for (a, b), s in cost.link_seconds.items()})


@given(chains())
@settings(max_examples=60, deadline=None)
def test_a_full_pipeline_keeps_the_pace_of_its_bottleneck_or_its_window(case: tuple[Plan, Links]) -> None:
    plan, links = case
    cost = evaluate(plan.stages, plan.transfers, links)
    pace = max(cost.bottleneck_s, cost.latency_s / plan.max_in_flight)
    played = simulate(plan, links, requests=plan.max_in_flight * 12 + 30)
    assert 1 / played.throughput_per_s == pytest.approx(pace, rel=1e-6)


@given(chains(), st.floats(1e6, 1e9))
@settings(max_examples=60, deadline=None)
def test_with_codecs_and_overheads_a_pipeline_with_room_keeps_the_pace_of_its_bottleneck(case: tuple[Plan, Links], speed: float) -> None:
    plan, links = case
    codecs = {"raw": CodecFigures(2.0, speed, speed)}
    overheads = {node.name: Overhead(1e-3, 2e-4, 5e-4) for node in plan.nodes}
    cost = evaluate(plan.stages, plan.transfers, links, codecs, overheads)
    window = 3 * math.ceil(cost.latency_s / cost.bottleneck_s) + 3
    played = simulate(plan, links, requests=window * 24, max_in_flight=window, codecs=codecs, overheads=overheads)
    done_s = sorted(request.done_s for request in played.requests)
    first, last = window * 12, window * 23  # the places before a bottleneck that are nearly as slow fill up for several windows
    assert (done_s[last] - done_s[first]) / (last - first) == pytest.approx(cost.bottleneck_s, rel=0.01)


def test_a_diamond_waits_for_its_slower_branch_and_overlaps_requests() -> None:
    plan = make_plan([0.01, 0.05, 0.02, 0.01], {(-1, 0): 1000, (0, 1): 1000, (0, 2): 1000, (1, 3): 1000, (2, 3): 1000, (3, 4): 1000})
    links = all_links(plan)
    cost = evaluate(plan.stages, plan.transfers, links)
    assert simulate(plan, links).requests[0].latency_s == pytest.approx(cost.latency_s)
    assert cost.latency_s == pytest.approx(0.01 + 0.002 + 0.05 + 0.002 + 0.01 + 0.002)
    assert simulate(plan, links, requests=200).throughput_per_s == pytest.approx(1 / 0.05)


@given(graphs(), st.integers(1, 25), st.booleans())
@settings(max_examples=60, deadline=None)
def test_whatever_the_plan_nothing_is_lost_and_nothing_runs_twice(case: tuple[Plan, Links], requests: int, spare: bool) -> None:
    plan, links = case
    codecs = {"raw": CodecFigures(2.0, 1e7, 2e7)}
    played = simulate(plan, links, requests=requests, codecs=codecs, spare_core=spare)
    assert len(played.requests) == requests
    for times in by_place(played).values():
        if spare:
            continue  # codec and engine overlap there, by intent
        for (_, end), (start, _) in itertools.pairwise(sorted(times)):
            assert end <= start + 1e-12
    home = {stage.name: stage.node for stage in plan.stages} | {CLIENT: plan.stages[0].node}
    sent = sum(
        0.5 * t.bytes / links[home[t.source], home[t.target]].bandwidth_bytes_per_s
        for t in plan.transfers
        if home[t.source] != home[t.target]
    )
    crossing = sum(t.bytes for t in plan.transfers if home[t.source] != home[t.target])
    total: dict[str, float] = defaultdict(float)
    for interval in played.intervals:
        total[interval.kind] += interval.seconds
    assert total["compute"] == pytest.approx(requests * sum(s.seconds for s in plan.stages))
    assert total["transfer"] == pytest.approx(requests * sent)
    assert total["encode"] == pytest.approx(requests * crossing / 1e7)
    assert total["decode"] == pytest.approx(requests * crossing / 2e7)
    ran: dict[tuple[int, str], float] = defaultdict(float)
    for interval in played.intervals:
        if interval.kind == "compute":
            ran[interval.request, interval.stage] += interval.seconds
    assert ran == pytest.approx({(k, stage.name): stage.seconds for k in range(requests) for stage in plan.stages})


@given(graphs(), st.integers(1, 25))
@settings(max_examples=60, deadline=None)
def test_no_more_are_let_in_than_max_in_flight_and_none_is_faster_than_its_longest_way(case: tuple[Plan, Links], requests: int) -> None:
    plan, links = case
    played = simulate(plan, links, requests=requests)
    # At equal times an answer goes out before the next request is let in.
    events = sorted(itertools.chain.from_iterable(((r.admitted_s, 1), (r.done_s, -1)) for r in played.requests))
    in_flight = 0
    for _, change in events:
        in_flight += change
        assert in_flight <= plan.max_in_flight
    cost = evaluate(plan.stages, plan.transfers, links)
    longest = max(s.seconds for s in plan.stages)
    assert all(request.latency_s >= longest - 1e-12 for request in played.requests)
    assert played.end_s >= cost.bottleneck_s * requests - 1e-9


@given(chains(), st.floats(1.0, 20.0))
@settings(max_examples=50, deadline=None)
def test_faster_links_never_make_a_chain_slower(case: tuple[Plan, Links], factor: float) -> None:
    plan, links = case
    faster = {pair: dataclasses.replace(link, bandwidth_bytes_per_s=link.bandwidth_bytes_per_s * factor) for pair, link in links.items()}
    slow, fast = (simulate(plan, some, requests=20) for some in (links, faster))
    for before, after in zip(slow.requests, fast.requests, strict=True):
        assert after.done_s <= before.done_s + 1e-9


def test_codecs_cost_the_processor_and_spare_the_link() -> None:
    plan = make_plan([0.01, 0.01], {(-1, 0): 0, (0, 1): 1_000_000, (1, 2): 0})
    plan = dataclasses.replace(plan, transfers=tuple(dataclasses.replace(t, codec="small") for t in plan.transfers))
    links = all_links(plan, bandwidth=1e7, latency=0.0)
    codecs = {"small": CodecFigures(4.0, encode_bytes_per_s=1e8, decode_bytes_per_s=2e8)}
    assert simulate(plan, links, codecs={"small": CodecFigures()}).requests[0].latency_s == pytest.approx(0.02 + 0.1)
    assert simulate(plan, links, codecs=codecs).requests[0].latency_s == pytest.approx(0.02 + 0.025 + 0.01 + 0.005)
    assert simulate(plan, links, requests=200, codecs=codecs).throughput_per_s == pytest.approx(1 / 0.025)
    wide = all_links(plan, bandwidth=1e9, latency=0.0)
    assert simulate(plan, wide, requests=200, codecs=codecs).throughput_per_s == pytest.approx(
        1 / 0.02, rel=0.01
    )  # compute and encode take turns
    assert simulate(plan, wide, requests=200, codecs=codecs, spare_core=True).throughput_per_s == pytest.approx(1 / 0.01, rel=0.01)


def test_short_work_goes_before_a_stage_that_runs_and_puts_it_on_hold() -> None:
    # While b computes request 1 for 100 ms, request 2 is decoded there.
    plan = make_plan([0.05, 0.1], {(-1, 0): 0, (0, 1): 1000, (1, 2): 0}, nodes=["a", "b"])
    codecs = {"raw": CodecFigures(decode_bytes_per_s=1e5)}
    played = simulate(plan, all_links(plan, bandwidth=1e9, latency=0.0), requests=2, codecs=codecs)
    at_b = [(i.kind, i.request, round(i.start_s, 4), round(i.end_s, 4)) for i in played.intervals if i.place == "b"]
    assert at_b == [
        ("decode", 0, 0.05, 0.06),
        ("compute", 0, 0.06, 0.1),
        ("decode", 1, 0.1, 0.11),
        ("compute", 0, 0.11, 0.17),
        ("compute", 1, 0.17, 0.27),
    ]


@pytest.mark.parametrize(
    ("seconds", "cores"), [([0.01, 0.01, 0.01], 2), ([0.01, 0.008, 0.006], 2), ([0.02, 0.003, 0.004], 2), ([0.01, 0.01], 1)]
)
def test_nodes_of_one_machine_share_its_cores(seconds: list[float], cores: int) -> None:
    plan = make_plan(seconds, {(k - 1, k): 1000 for k in range(len(seconds) + 1)}, max_in_flight=24)
    links = all_links(plan, bandwidth=1e7)
    machine = Machine(cores, {node.name: 1 for node in plan.nodes})
    cost = evaluate(plan.stages, plan.transfers, links, machines=[machine])
    alone = simulate(plan, links, machines=[machine])
    assert alone.requests[0].latency_s == pytest.approx(cost.latency_s)  # one request works in one place at a time
    full = simulate(plan, links, requests=400, machines=[machine])
    # The closed form is a bound: it keeps all cores busy, and even shares now and then do not.
    assert cost.bottleneck_s * 0.999 <= 1 / full.throughput_per_s <= cost.bottleneck_s * 1.06


def test_requests_take_turns_on_a_link_chunk_by_chunk() -> None:
    mib = 1 << 20
    plan = make_plan([0.0, 0.001], {(-1, 0): 0, (0, 1): 16 * mib, (1, 2): 0}, max_in_flight=2)
    played = simulate(plan, all_links(plan, bandwidth=mib, latency=0.0), requests=2)
    # What the transport takes at first, 4 MiB, is the first request's. From then on each gets half of the link.
    assert [request.done_s for request in played.requests] == pytest.approx([16 + 12 - 1 + 0.001, 32.001], abs=1.1)


def test_what_the_transport_takes_goes_in_order() -> None:
    mib = 1 << 20
    plan = make_plan([0.0, 0.001], {(-1, 0): 0, (0, 1): 2 * mib, (1, 2): 0}, max_in_flight=2)
    played = simulate(plan, all_links(plan, bandwidth=mib, latency=0.0), requests=2)
    assert [request.done_s for request in played.requests] == pytest.approx([2.001, 4.001])


@pytest.mark.parametrize("mebibytes", [0.9, 1.1, 1.5, 3.0])
@pytest.mark.parametrize("window", [4, 16])
def test_a_tensor_a_little_larger_than_a_chunk_does_not_halve_the_pace(mebibytes: float, window: int) -> None:
    # Seen on real nodes with links of 100 Mbit/s: 1.1 MiB tensors go at 10.8/s, whatever the window.
    size = int(mebibytes * (1 << 20))
    plan = make_plan([0.002] * 3, {(-1, 0): 100, (0, 1): size, (1, 2): size, (2, 3): 100})
    full = simulate(plan, all_links(plan, bandwidth=1.25e7), requests=200, max_in_flight=window)
    assert full.throughput_per_s == pytest.approx(1.25e7 / size, rel=0.05)


def test_requests_that_come_one_by_one_do_not_wait() -> None:
    plan = make_plan([0.01, 0.02], {(-1, 0): 100, (0, 1): 100, (1, 2): 100}, max_in_flight=1)
    links = all_links(plan)
    alone = simulate(plan, links).requests[0].latency_s
    apart = simulate(plan, links, requests=5, arrivals=[k * 0.1 for k in range(5)])
    assert [r.latency_s for r in apart.requests] == pytest.approx([alone] * 5)
    crowd = simulate(plan, links, requests=5, arrivals=[0.0] * 5)
    assert [r.done_s for r in crowd.requests] == pytest.approx([alone * (k + 1) for k in range(5)])
    assert [r.admitted_s for r in crowd.requests] == pytest.approx([alone * k for k in range(5)])


def test_impossible_figures_are_refused() -> None:
    plan = make_plan([0.01, 0.02], {(-1, 0): 100, (0, 1): 100, (1, 2): 100})
    links = all_links(plan)
    with pytest.raises(NoPlan, match="no link 'n0' -> 'n1'"):
        simulate(plan, {})
    with pytest.raises(BadInput, match="arrivals"):
        simulate(plan, links, requests=2, arrivals=[1.0, 0.5])
    with pytest.raises(BadInput, match="at least 1"):
        simulate(plan, links, requests=0)
    with pytest.raises(BadInput, match="'s1' has nan seconds"):
        simulate(plan, links, seconds={"s1": float("nan")})
    with pytest.raises(BadInput, match="codec 'raw'"):
        simulate(plan, links, codecs={})


def test_a_plan_over_64_nodes_is_played_in_well_under_a_second() -> None:
    plan = make_plan([0.001 * (1 + k % 7) for k in range(64)], {(k - 1, k): 10_000 * (1 + k % 5) for k in range(65)}, max_in_flight=64)
    links = all_links(plan, bandwidth=1e8)
    started = time.perf_counter()
    played = simulate(plan, links, requests=100)
    took = time.perf_counter() - started
    assert len(played.requests) == 100
    assert took < 1.0

"""What people ask for: pins, bans, codecs, loss, privacy, other models; and what cannot be."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Iterator
from typing import Any

import networkx
import pytest

from partitioner.cost import BUFFERED_REQUESTS, CodecFigures
from partitioner.solvers import solve
from partitioner.wishes import wishes
from splitnet.errors import BadInput, NoPlan
from splitnet.plan import Plan

TICK = 1.0 / 1024
Links = dict[tuple[str, str], tuple[float, float]]


def chain(length: int = 6, names: str = "abc", size: int = 100, seconds: float = 1.0, **more: Any) -> networkx.DiGraph:
    graph = networkx.DiGraph(name="chain")
    for k in range(length):
        graph.add_node(f"op{k}", seconds=dict.fromkeys(names, seconds), param_bytes=10, scope=f"encoder.layer.{k // 2}", **more)
        if k:
            graph.add_edge(f"op{k - 1}", f"op{k}", bytes=size)
    return graph


def joined(names: str = "abc", bandwidth: float = 1000.0, latency: float = 0.0) -> Links:
    return dict.fromkeys(itertools.permutations(names, 2), (bandwidth, latency))


def free(names: str = "abc") -> dict[str, float]:
    return dict.fromkeys(names, math.inf)


def where(plan: Plan) -> dict[str, str]:
    return {operator: stage.node for stage in plan.stages for operator in stage.operators}


def reached(plan: Plan) -> float:
    assert plan.prediction is not None
    return plan.prediction.latency_s if plan.objective == "latency" else 1 / plan.prediction.throughput_per_s


def coded(seed: int) -> tuple[networkx.DiGraph, dict[str, float], Links, dict[str, CodecFigures], dict[tuple[str, str], list[str]]]:
    rng = random.Random(seed)
    names, length = "abc"[: rng.randint(2, 3)], rng.randint(2, 5)
    graph = networkx.DiGraph()
    for k in range(length):
        graph.add_node(f"op{k}", seconds={n: rng.randint(0, 30) * TICK for n in names}, param_bytes=rng.randint(0, 40))
        if k:
            graph.add_edge(f"op{k - 1}", f"op{k}", bytes=rng.choice([16, 64, 256]))
    devices = {n: rng.choice([math.inf, 700.0, 90.0]) for n in names}
    links = {pair: (2.0 ** rng.randint(10, 15), rng.randint(0, 4) * TICK) for pair in itertools.permutations(names, 2)}
    codecs = {
        "raw": CodecFigures(1.0, 2.0 ** rng.randint(14, 18), 2.0 ** rng.randint(14, 18)),
        "half": CodecFigures(2.0, {n: 2.0 ** rng.randint(12, 16) for n in names}, 2.0 ** rng.randint(12, 16), error=0.25),
        "tiny": CodecFigures(
            {f"op{k}": rng.choice([4.0, 16.0]) for k in range(length)},
            2.0 ** rng.randint(11, 15),
            2.0 ** rng.randint(11, 15),
            {f"op{k}": rng.choice([0.25, 0.5]) for k in range(length)},
        ),
    }
    return graph, devices, links, codecs, {("a", "b"): ["raw", "half"]} if rng.random() < 0.3 else {}


def every_plan(
    graph: networkx.DiGraph,
    devices: dict[str, float],
    links: Links,
    codecs: dict[str, CodecFigures],
    usable: dict[tuple[str, str], list[str]],
) -> Iterator[tuple[float, float, float]]:
    """(latency, bottleneck, loss), written down from the cost model."""
    length = len(graph)
    for count in range(1, min(length, len(devices)) + 1):
        for inner in itertools.combinations(range(1, length), count - 1):
            cuts = (0, *inner, length)
            for order in itertools.permutations(devices, count):
                inside = [[graph.nodes[f"op{i}"] for i in range(cuts[k], cuts[k + 1])] for k in range(count)]
                sizes = [graph.edges[f"op{i - 1}", f"op{i}"]["bytes"] for i in inner]
                memory = [sum(op["param_bytes"] for op in ops) + BUFFERED_REQUESTS * ([0, *sizes][k]) for k, ops in enumerate(inside)]
                if any(m > devices[d] for m, d in zip(memory, order, strict=True)):
                    continue
                for names in itertools.product(codecs, repeat=count - 1):
                    if any(name not in usable.get((order[k], order[k + 1]), names) for k, name in enumerate(names)):
                        continue
                    load = [sum(op["seconds"][d] for op in ops) for ops, d in zip(inside, order, strict=True)]
                    latency, wires, loss = sum(load), [0.0], 0.0
                    for k, name in enumerate(names):
                        a, b, size, codec = order[k], order[k + 1], sizes[k], codecs[name]
                        encode, decode = codec.encode_s(size, a), codec.decode_s(size, b)
                        wire = size / codec.ratio_of(f"op{inner[k] - 1}") / links[a, b][0]
                        latency += encode + links[a, b][1] + wire + decode
                        load[k], load[k + 1] = load[k] + encode, load[k + 1] + decode
                        wires.append(wire)
                        loss += codec.error_of(f"op{inner[k] - 1}")
                    yield latency, max(*load, *wires), loss


@pytest.mark.parametrize("objective", ["latency", "throughput"])
@pytest.mark.parametrize("budget", [None, 0.0, 0.5])
def test_codecs_equal_brute_force(objective: str, budget: float | None) -> None:
    lossy = 0
    for seed in range(70):
        graph, devices, links, codecs, usable = coded(seed)
        figures = [
            p[objective == "throughput"] for p in every_plan(graph, devices, links, codecs, usable) if budget is None or p[2] <= budget
        ]
        if not figures:
            with pytest.raises(NoPlan):
                solve(graph, devices, links, objective, codecs, link_codecs=usable, max_accuracy_loss=budget)
            continue
        plan = solve(graph, devices, links, objective, codecs, link_codecs=usable, max_accuracy_loss=budget)
        assert reached(plan) == pytest.approx(min(figures), rel=1e-12), seed
        assert plan.prediction is not None
        assert plan.prediction.bound == pytest.approx(min(figures), rel=1e-12), seed
        lossy += any(t.codec != "raw" for t in plan.transfers)
    assert lossy > (4 if budget != 0.0 else -1)


def test_a_codec_is_used_where_the_link_is_slow_and_not_where_it_is_fast() -> None:
    codecs = {"raw": CodecFigures(), "zip": CodecFigures(4.0, 1000.0, 1000.0)}
    assert {t.codec for t in solve(chain(), free(), joined(bandwidth=10.0), "throughput", codecs, stages=2).transfers} == {"zip"}
    assert {t.codec for t in solve(chain(), free(), joined(bandwidth=1e9), "latency", codecs, stages=2).transfers} == {"raw"}
    slow_there = {("a", "b"): (10.0, 0.0), ("b", "a"): (1e9, 0.0)}
    plan = solve(chain(names="ab"), free("ab"), slow_there, "latency", codecs, stages=2, link_codecs={("a", "b"): ["zip"]})
    assert plan.stages[0].node == "b"  # the fast direction


def test_pins_and_bans_hold() -> None:
    plan = solve(chain(), free(), joined(), pin={"op3": "c", "encoder.layer.0": "b"})
    assert where(plan)["op3"] == "c"
    assert where(plan)["op0"] == where(plan)["op1"] == "b"
    assert set(where(solve(chain(), free(), joined(), forbid=["a", "c"])).values()) == {"b"}
    plan = solve(chain(), free(), joined(), "throughput", forbid={"a": ["encoder.layer.*"], "b": ["op5"]})
    assert "a" not in where(plan).values()
    assert where(plan)["op5"] == "c"


def test_cuts_stages_input_output_and_privacy() -> None:
    plan = solve(chain(), free(), joined(), at=["encoder.layer.1", "op5"])
    assert [stage.operators[0] for stage in plan.stages] == ["op0", "op2", "op5"]
    assert len(solve(chain(), free(), joined(), stages=range(2, 4)).stages) == 2
    plan = solve(chain(), free(), joined(), input_at="b", output_at="c")
    assert (plan.ingress.name, plan.stages[-1].node) == ("b", "c")
    plan = solve(chain(), free(), joined(bandwidth=1e6), "throughput", private=("c", 3))
    assert [where(plan)[f"op{k}"] for k in range(3)] == ["c"] * 3
    plan = solve(chain(), free(), joined(bandwidth=1e6), "throughput", private=("c", "encoder.layer.1"))
    assert plan.ingress.name == "c"
    assert where(plan)["op3"] == "c"


def test_what_other_models_take_counts() -> None:
    graph = chain()
    assert solve(graph, free("ab") | {"c": 0}, joined(), taken={"a": (0, 0.5)}).stages[0].node == "b"
    plan = solve(graph, {"a": 70.0, "b": 70.0, "c": 70.0}, joined(bandwidth=1e9), taken={"a": (20.0, 0.0), "b": (69.0, 0.0)})
    assert {stage.node for stage in plan.stages} == {"c"}
    fair = solve(graph, free("ab") | {"c": 0}, joined(bandwidth=1e9), "throughput", taken={"a": (0, 0.5)})
    assert sorted(list(where(fair).values()).count(n) for n in "ab") == [2, 4]


def test_tolerance_takes_what_sends_least() -> None:
    graph = chain(names="ab")
    for k in range(1, 6):
        graph.edges[f"op{k - 1}", f"op{k}"]["bytes"] = 1000 if k == 3 else 10
    exact = solve(graph, free("ab"), joined("ab", 1e9), "throughput")
    assert exact.transfers[0].bytes == 1000
    for node in graph:
        graph.nodes[node]["seconds"] = {"a": 1.0, "b": 1.0} if node != "op2" else {"a": 0.01, "b": 0.01}
    assert solve(graph, free("ab"), joined("ab", 1e9), "throughput", tolerance=0.0).transfers[0].bytes in (10, 1000)


def test_microbatches_trade_fixed_costs_for_overlap() -> None:
    graph = chain(names="ab", size=1)
    for node in graph:
        graph.nodes[node].update(seconds=dict.fromkeys("ab", (0.1, 1.0)), param_bytes=100)
    links = joined("ab", 1e9)
    plan = solve(graph, {"a": 400.0, "b": 400.0}, links, batch=16)
    assert plan.prediction is not None
    assert 1 <= plan.prediction.batch < 16  # parts overlap on two devices
    parts = {size: solve(graph, {"a": 400.0, "b": 400.0}, links, batch=16, microbatches=[size]).prediction for size in (1, 2, 4, 8, 16)}
    assert plan.prediction.latency_s == min(p.latency_s for p in parts.values() if p)
    assert plan.prediction.bound <= plan.prediction.latency_s
    whole = solve(graph, free("ab"), links, "throughput", batch=16)
    assert whole.prediction is not None
    assert whole.prediction.batch == 16  # fixed costs are shared by more items
    for node in graph:
        graph.nodes[node]["activation_bytes"] = 10
    tight = solve(graph, {"a": 430.0, "b": 430.0}, links, "throughput", batch=16)
    assert tight.prediction is not None
    assert tight.prediction.batch < 16


@pytest.mark.parametrize(
    ("wish", "message"),
    [
        ({"pin": {"op9": "a"}}, "no operator 'op9'"),
        ({"pin": {"op1": "z"}}, "pin: there is no node 'z'"),
        (
            {"pin": {"op1": "a", "encoder.layer.0": "b"}},
            "no node may run operator 'op1': 'op1' is pinned to 'a'; 'encoder.layer.0' is pinned to 'b'",
        ),
        ({"pin": {"op1": "a"}, "forbid": ["a"]}, "pin asks for node 'a', which is forbidden"),
        ({"pin": {"op0": "a", "op2": "b", "op4": "a"}}, "cannot all hold: a node runs one stage"),
        ({"private": ("a", 2), "input_at": "b"}, "private keeps the raw input on 'a', but input_at asks for 'b'"),
        ({"private": ("a", 2), "pin": {"op1": "b"}}, "operator 'op1': 'op1' is pinned to 'b'; the first layers are private to 'a'"),
        ({"forbid": ["a", "b", "c"]}, "no node may run operator 'op0'"),
        ({"taken": {"a": (0, 1.5)}}, "taken: node 'a'"),
        ({"taken": {"a": (math.nan, 0.5)}}, "taken: node 'a'"),
        ({"link_codecs": {("a", "b"): ["mp3"]}}, "link 'a' -> 'b': there are no figures for the codec 'mp3'"),
        ({"max_accuracy_loss": -1.0}, "max_accuracy_loss"),
        ({"tolerance": 2.0}, "tolerance"),
        ({"batch": 0}, "batch must be a whole number of at least 1, got 0"),
        ({"batch": 4, "microbatches": [8]}, "a microbatch must be of 1 to 4 items, got 8"),
        ({"at": ["op0"]}, "first operator"),
        ({"stages": range(5, 7)}, "at least 5 stages were asked for, but there are 3 nodes"),
    ],
)
def test_wishes_that_cannot_be_are_named(wish: dict[str, Any], message: str) -> None:
    with pytest.raises((BadInput, NoPlan), match=message):
        solve(chain(), free(), joined(), **wish)


def test_bad_codec_figures_and_a_loss_that_cannot_be_kept() -> None:
    for figures in ({"ratio": 0.0}, {"ratio": math.nan}, {"encode_bytes_per_s": -1.0}, {"decode_bytes_per_s": math.nan}, {"error": -0.1}):
        with pytest.raises(BadInput, match=f"codec's {next(iter(figures))}"):
            CodecFigures(**figures)  # type: ignore[arg-type]
    lossy = {"raw": CodecFigures(), "q": CodecFigures(4.0, error=0.5)}
    only = {pair: ["q"] for pair in itertools.permutations("abc", 2)}
    with pytest.raises(NoPlan, match=r"no plan stays within the error that is allowed \(0.1\)"):
        solve(chain(), free(), joined(), "throughput", lossy, stages=2, link_codecs=only, max_accuracy_loss=0.1)
    with pytest.raises(BadInput, match="no figure for node 'c'"):
        solve(chain(), free(), joined(), codecs={"q": CodecFigures(4.0, {"a": 1.0, "b": 1.0})})


def test_options_become_wishes() -> None:
    given: dict[str, Any] = {
        "stages": range(2, 4), "max_stages": None, "input_at": "", "output_at": "c", "max_accuracy_loss": 0.1, "lossless": False, "tolerance": 0.01,
        "margin": 0.1, "at": (),
        "nodes": (), "pin": ("encoder.*=a",), "forbid": ("b", "a=op1"), "private": "a=3", "taken": ("a=1.5GiB,0.25", "b=10"),
        "link_codecs": ("a->b=zstd,raw",), "codec_figures": None,
    }  # fmt: skip
    found = wishes(given)
    assert found["pin"] == {"encoder.*": "a"}
    assert found["forbid"] == {"a": ("op1",), "b": ("*",)}
    assert found["private"] == ("a", 3)
    assert found["taken"] == {"a": (1.5 * 2**30, 0.25), "b": (10.0, 0.0)}
    assert found["link_codecs"] == {("a", "b"): ("zstd", "raw")}
    for name, wrong, message in (
        ("pin", ("nonsense",), "--pin: expected PATTERN=NODE"),
        ("pin", ("x=a", "x=b"), "'x' is pinned to more than one node"),
        ("taken", ("a=much",), "--taken: expected"),
        ("link_codecs", ("ab=zstd",), "--codec: expected"),
    ):
        with pytest.raises(BadInput, match=message):
            wishes(given | {name: wrong})


def test_local_search_keeps_to_the_pins() -> None:
    """A graph that is no chain: the input is pinned to a slow device, and its bytes are what a plan would like to save."""
    graph = networkx.DiGraph()
    for name in ("ids", "mask", "embed", "mixed"):
        graph.add_node(name, seconds={"d": 6.0, "s": 1.0} if name in ("embed", "mixed") else {"d": 0.0, "s": 0.0})
    graph.add_edge("ids", "embed", bytes=2048)
    graph.add_edge("mask", "mixed", bytes=8)
    graph.add_edge("embed", "mixed", bytes=10**6)
    plan = solve(graph, free("ds"), joined("ds"), pin={"ids": "d", "mask": "d"})
    assert where(plan) == {"ids": "d", "mask": "d", "embed": "s", "mixed": "s"}
    assert plan.prediction is not None
    assert plan.prediction.bound == pytest.approx(reached(plan)) == pytest.approx(2.0 + 2.056)


def test_what_the_tolerance_chose_is_said() -> None:
    graph = networkx.DiGraph()
    for name, seconds in (("in", 0.0), ("left", 5.0), ("right", 4.0), ("out", 0.0)):
        graph.add_node(name, seconds={"a": seconds, "b": seconds})
    for user in ("left", "right"):
        graph.add_edge("in", user, bytes=100)
        graph.add_edge(user, "out", bytes=100)
    best = solve(graph, free("ab"), joined("ab", 1e6), "throughput")
    thrifty = solve(graph, free("ab"), joined("ab", 1e6), "throughput", tolerance=0.9)
    assert best.prediction is not None
    assert thrifty.prediction is not None
    assert len(best.stages) == 2
    assert not best.prediction.note
    assert len(thrifty.stages) == 1
    assert thrifty.prediction.note.startswith("of the plans within 90.0% of the best, the one that sends least")

"""What probe measured becomes the cost model's constants; nodes that share a machine slow each other down."""

from __future__ import annotations

import dataclasses

import pytest
from small_models import slow

from partitioner.constants import codec_figures, machines, overheads, paced
from partitioner.cost import CodecFigures, Machine, evaluate
from splitnet.cluster import Cluster, ClusterNode, CodecSpeed, Link
from splitnet.errors import BadCluster
from splitnet.plan import CLIENT, StageSpec, Transfer


def node(name: str, machine: str = "m", cores: int = 2, threads: int = 1, codecs: tuple[CodecSpeed, ...] = ()) -> ClusterNode:
    return ClusterNode(
        name, f"127.0.0.1:{7000 + ord(name)}", threads=threads, machine=machine, cores=cores, stage_s=1e-4, message_s=2e-4, request_s=3e-4,
        codecs=codecs,
    )  # fmt: skip


def test_nodes_on_one_machine_share_its_cores_and_one_alone_does_not() -> None:
    assert machines(Cluster((node("a"), node("b", machine="other")))) == ()
    assert machines(Cluster((node("a", cores=4, threads=4),))) == ()
    assert machines(Cluster((node("a", machine="", cores=0), node("b", machine="", cores=0)))) == ()
    (shared,) = machines(Cluster((node("a"), node("b"), node("c"), node("d", machine="other"))))
    assert shared == Machine(2, {"a": 1, "b": 1, "c": 1})
    assert str(shared) == "2 cores shared by nodes a, b, c"


def test_a_shared_machine_bounds_the_throughput_and_not_the_latency() -> None:
    stages = [StageSpec(n, n, (n,), (), (), seconds=2.0) for n in "abc"]
    moves = [Transfer("a", "b", ("h",), bytes=8), Transfer("b", "c", ("i",), bytes=8), Transfer("c", CLIENT, ("y",), bytes=8)]
    links = {(x, y): Link(x, y, 8.0, 0.0) for x in "abc" for y in "abc" if x != y}
    apart = evaluate(stages, moves, links)
    assert apart.bottleneck_s == pytest.approx(2.0)
    shared = evaluate(stages, moves, links, machines=(Machine(2, {"a": 1, "b": 1, "c": 1}),))
    assert shared.bottleneck_s == pytest.approx(3 * 2.0 / 2)
    assert shared.bottleneck == "2 cores shared by nodes a, b, c"
    assert shared.latency_s == apart.latency_s
    other = evaluate(stages, moves, links, machines=(Machine(2, {"a": 1, "b": 2, "x": 1}),))
    assert other.bottleneck_s == pytest.approx((2.0 + 2 * 2.0) / 2)


def busy(name: str, machine: str = "", cores: float = 1.0, threads: int = 1) -> ClusterNode:
    return dataclasses.replace(
        node(name, machine, threads=threads), cores=cores, stage_cpu_s=1e-3, message_cpu_s=2e-3, request_cpu_s=3e-3, byte_cpu_s=1e-9
    )


def test_for_throughput_processor_seconds_come_out_of_the_processors_that_a_node_has() -> None:
    half = overheads([busy("a", cores=0.5)], "throughput", client_bytes=1e6)["a"]
    assert (half.stage_s, half.message_s, half.request_s) == pytest.approx((2e-3, 4e-3, 2 * (3e-3 + 1e-3)))
    four = overheads([busy("a", cores=4, threads=4)], "throughput")["a"]
    assert four.message_s == pytest.approx(2e-3 / 4)  # four threads compute; the rest is spread over all four processors
    assert overheads([busy("a", cores=0.5)])["a"].message_s == 2e-4  # latency: one message, and nothing else to do
    assert overheads([node("a")], "throughput")["a"].message_s == pytest.approx(2e-4 / 2)  # a file without these figures

    raw = codec_figures([busy("a", cores=0.5), busy("b", cores=2)], "throughput")["raw"]
    assert raw.encode_s(1e9, "a") == pytest.approx(2.0)
    assert raw.decode_s(1e9, "b") == pytest.approx(0.5)
    zstd = CodecFigures(4.0, 1e8, 1e9)
    assert paced({"zstd": zstd}, [busy("a")])["zstd"].encode_s(1e9, "a") == pytest.approx(10.0 + 1.0 / 4)  # a quarter of the bytes is sent


def test_on_a_shared_machine_the_processor_seconds_of_all_nodes_are_its_bottleneck() -> None:
    nodes = [busy(name, "m", cores=2, threads=2) for name in "ab"]
    (shared,) = machines(Cluster(tuple(nodes)))
    each = overheads(nodes, "throughput", [shared])
    stages = [StageSpec(n, n, (n,), (), (), seconds=1.0) for n in "ab"]
    moves = [Transfer("a", "b", ("h",), bytes=8), Transfer("b", CLIENT, ("y",), bytes=8)]
    links = {(x, y): Link(x, y, 1e12, 0.0) for x in "ab" for y in "ab" if x != y}
    cost = evaluate(stages, moves, links, overheads=each, machines=[shared])
    spent = 2 * 1e-3 + 4 * 2e-3 + 3e-3  # processor seconds besides computing: stages, ends of messages, the request
    assert cost.bottleneck_s == pytest.approx((2 * 2 * 1.0 + spent) / 2)
    assert str(shared) in cost.bottleneck


def test_codecs_that_every_node_has() -> None:
    fast, slow = CodecSpeed("zstd", 4e8, 8e8, 1.3), CodecSpeed("zstd", 1e8, 2e8, 1.2)
    found = codec_figures([node("a", codecs=(fast, CodecSpeed("int8", 1e9, 1e9, 4.0))), node("b", codecs=(slow,))])
    assert set(found) == {"raw", "zstd"}
    assert found["raw"].encode_s(1e9, "a") == 0.0
    assert found["zstd"].ratio == 1.2
    assert found["zstd"].encode_s(4e8, "a") == pytest.approx(1.0)
    assert found["zstd"].decode_s(4e8, "b") == pytest.approx(2.0)
    assert overheads([node("a")])["a"].request_s == 3e-4


def test_a_cluster_file_keeps_all_of_it(tmp_path: pytest.TempPathFactory) -> None:
    path = tmp_path / "cluster.toml"  # type: ignore[operator]
    links = (Link("a", "b", 1e8, 1e-3, 1e-4),)
    cluster = Cluster((node("a", codecs=(CodecSpeed("zstd", 4e8, 8e8, 1.3),)), node("b")), links)
    cluster.save(path)
    assert Cluster.load(path) == cluster
    old = 'nodes = [{name = "a", address = "127.0.0.1:7001", memory_bytes = 5}]\n'
    path.write_text(old)
    assert Cluster.load(path).node("a") == ClusterNode("a", "127.0.0.1:7001", 5)
    for wrong, message in (
        ("codecs = [{name = 1}]", "codecs\\[0\\].name: expected str"),
        ("codecs = [{name = 'zstd', encode_bytes_per_s = 0.0, decode_bytes_per_s = 1.0}]", "speeds and ratio must be positive"),
        ("codecs = 3", "expected tables"),
        ("cores = -1", "cores must be finite"),
        ("stage_s = inf", "stage_s must be finite"),
    ):
        path.write_text(f'[[nodes]]\nname = "a"\naddress = "127.0.0.1:7001"\n{wrong}\n')
        with pytest.raises(BadCluster, match=message):
            Cluster.load(path)


def test_a_plan_says_that_its_nodes_share_cores() -> None:
    """Three equal nodes on two cores: splitting in three is predicted to gain at most two cores' worth, and `explain` says why."""
    import partitioner
    from partitioner.profiling import HERE, Column

    model = slow()
    measured = partitioner.profile(model, repeats=1)
    seconds = tuple(0.0 if v.op in ("input", "size") else 0.01 for v in measured.structure.vertices)
    profile = dataclasses.replace(measured, columns={name: Column(seconds, "made up") for name in (HERE, "a", "b", "c")})
    links = tuple(Link(x, y, 1e9, 1e-4) for x in "abc" for y in "abc" if x != y)
    apart = partitioner.plan(profile, Cluster(tuple(node(n, machine=n) for n in "abc"), links), objective="throughput", stages=3)
    shared = partitioner.plan(profile, Cluster(tuple(node(n) for n in "abc"), links), objective="throughput", stages=3)
    assert apart.prediction is not None
    assert shared.prediction is not None
    alone = shared.prediction.alternatives[0].throughput_per_s
    assert apart.prediction.throughput_per_s > 2.5 * alone
    assert 1.8 * alone < shared.prediction.throughput_per_s <= 2.0 * alone
    assert "bottleneck: 2 cores shared by nodes a, b, c" in shared.explain()

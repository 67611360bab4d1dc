"""What probe measured becomes the cost model's constants; nodes that share a machine slow each other down."""

from __future__ import annotations

import dataclasses

import pytest
from small_models import slow

from partitioner.constants import codec_figures, machines, overheads
from partitioner.cost import Machine, evaluate
from splitnet.cluster import Cluster, ClusterNode, CodecSpeed, Link
from splitnet.errors import BadCluster
from splitnet.plan import CLIENT, StageSpec, Transfer


def node(name: str, machine: str = "m", cores: int = 2, threads: int = 1, codecs: tuple[CodecSpeed, ...] = ()) -> ClusterNode:
    return ClusterNode(
        name, f"127.0.0.1:{7000 + ord(name)}", threads=threads, machine=machine, cores=cores, stage_s=1e-4, message_s=2e-4, request_s=3e-4,
        codecs=codecs,
    )  # fmt: skip


def test_three_threads_on_two_cores_share_them_and_two_do_not() -> None:
    assert machines(Cluster((node("a"), node("b")))) == ()
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
    assert shared.bottleneck_s == pytest.approx((3 * 2.0 + 3 * 1.0) / 2)
    assert shared.bottleneck == "2 cores shared by nodes a, b, c"
    assert shared.latency_s == apart.latency_s
    other = evaluate(stages, moves, links, machines=(Machine(2, {"a": 1, "b": 2, "x": 1}),))
    assert other.bottleneck_s == pytest.approx((2.0 + 2 * 2.0 + 1.0) / 2)


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

"""The profile as nodes measure it: by RPC, once per kind of device, in pieces where memory is short, kept on disk."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save
from small_models import chain, diamond, slow

import partitioner
from nodes.testing import LocalCluster
from partitioner import profiling_nodes
from partitioner.cutting import write_stage
from partitioner.graph import ModelGraph
from partitioner.layout import lay_out
from partitioner.profile_cache import ProfileCache, default_directory
from partitioner.profiling import Column, Profile, matched
from partitioner.profiling_nodes import Options
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import Cluster, ClusterNode
from splitnet.codecs import codec_names
from splitnet.errors import BadInput, BadShard, InsufficientMemory, NodeUnavailable, NotFound, Overloaded, SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shard import Shard
from splitnet.shipping import Blob, shard_blobs, ship

QUICK = Options(budget_s=0.2)


class Wide(torch.nn.Module):
    """Weights too large to travel, an embedding of whole numbers, and a normalisation whose statistics must stay positive."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = torch.nn.Embedding(50, 128)
        self.first = torch.nn.Linear(128, 256)
        self.norm = torch.nn.BatchNorm1d(256)
        self.second = torch.nn.Linear(256, 256)
        self.third = torch.nn.Linear(256, 128)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.third(torch.relu(self.second(torch.relu(self.norm(self.first(self.embed(tokens)))))))


@pytest.fixture(scope="module")
def wide() -> ModelGraph:
    torch.manual_seed(0)
    return partitioner.capture(Wide().eval(), (torch.randint(0, 50, (8,)),), name="wide")


@pytest.fixture(scope="module")
def boxes() -> Iterator[LocalCluster]:
    with LocalCluster(2) as cluster:
        yield cluster


def known(boxes: LocalCluster, **speeds: float) -> Cluster:
    """As after `splitnet probe`, with these times of the reference kernel."""
    nodes = tuple(dataclasses.replace(n, processor="made up", reference_s=speeds.get(n.name, 0.01)) for n in boxes.cluster().nodes)
    return dataclasses.replace(boxes.cluster(), nodes=nodes)


def test_a_node_times_every_operator_with_weights_of_its_own(boxes: LocalCluster, wide: ModelGraph) -> None:
    steps: list[tuple[int, int, str]] = []
    found = partitioner.profile(wide, repeats=1, cluster=boxes.cluster(), options=QUICK, on_progress=lambda *step: steps.append(step))
    column = found.columns["a"]
    assert column.how.startswith("measured on node 'a', engine torch-graph, 1 thread, median of ")
    assert column.how.endswith("random weights")
    timed = {v.name for v, s in zip(wide.structure.vertices, column.seconds, strict=True) if s > 0}
    assert timed == {v.name for v in wide.structure.vertices if v.op not in ("input", "size")}
    assert found.on(boxes.cluster().node("a")) == column
    assert "operators on a" in {step[2] for step in steps}
    assert Profile.from_json(found.to_json()) == found
    real = partitioner.profile(wide, repeats=1, cluster=boxes.cluster(), options=dataclasses.replace(QUICK, real_weights=True))
    assert "random weights" not in real.columns["a"].how


@pytest.mark.parametrize("model", [chain, diamond], ids=["chain", "diamond"])
def test_pieces_add_up(boxes: LocalCluster, model: Any) -> None:
    """A node that cannot hold the model runs it piece by piece, each on what the ones before produced."""
    graph = model()
    room = graph.structure.param_bytes // 2 + 2000
    with LocalCluster(1, names=("tiny",), memory_bytes=room) as small:
        column = partitioner.profile(graph, repeats=1, cluster=small.cluster(), options=QUICK).columns["tiny"]
    assert "pieces, for want of memory" in column.how
    assert all(s > 0 for v, s in zip(graph.structure.vertices, column.seconds, strict=True) if "linear" in v.op)


def test_a_node_that_cannot_gets_scaled_times_and_the_reason(wide: ModelGraph) -> None:
    with LocalCluster(1, names=("tiny",), memory_bytes=1000) as small:
        found = partitioner.profile(wide, repeats=1, cluster=small.cluster(), options=QUICK)
    how = found.columns["tiny"].how
    assert how.startswith("scaled by the reference kernel")
    assert "because the node could not measure it: even in pieces the model needs" in how


def test_scaling_asks_nobody(wide: ModelGraph) -> None:
    nodes = (ClusterNode("a", "127.0.0.1:1", reference_s=0.02), ClusterNode("b", "127.0.0.1:2"))
    found = partitioner.profile(wide, repeats=1, cluster=Cluster(nodes), scale=True)
    assert found.columns["a"].how.startswith("scaled by the reference kernel")
    assert "not measured" in found.columns["b"].how
    assert sum(found.columns["a"].seconds) == pytest.approx(found.whole_s * 0.02 / found.reference_s)
    with pytest.raises(NodeUnavailable) as error:
        partitioner.profile(wide, repeats=1, cluster=Cluster(nodes))
    assert error.value.node == "a"
    assert "--scale" in error.value.remedy


def test_equal_devices_are_measured_once(boxes: LocalCluster, wide: ModelGraph) -> None:
    same = partitioner.profile(wide, repeats=1, cluster=known(boxes, a=0.0100, b=0.0104), options=QUICK).columns
    assert same["b"].how.startswith("as node 'a', an equal device: measured on node 'a'")
    assert same["b"].seconds == same["a"].seconds
    apart = partitioner.profile(wide, repeats=1, cluster=known(boxes, a=0.0100, b=0.0120), options=QUICK).columns
    assert apart["b"].how.startswith("measured on node 'b'")


def test_what_was_measured_is_kept(boxes: LocalCluster, wide: ModelGraph, tmp_path: Path) -> None:
    cache = ProfileCache(tmp_path / "profiles")
    options = dataclasses.replace(QUICK, cache=cache)
    cluster = known(boxes)
    first = partitioner.profile(wide, repeats=1, cluster=cluster, options=options).columns["a"]
    offline = Cluster(tuple(dataclasses.replace(n, address="127.0.0.1:1") for n in cluster.nodes))
    again = partitioner.profile(wide, repeats=1, cluster=offline, options=options).columns["a"]
    assert again.seconds == first.seconds
    assert "(kept from 20" in again.how
    with pytest.raises(NodeUnavailable):
        partitioner.profile(wide, repeats=1, cluster=offline, options=dataclasses.replace(options, refresh=True))
    fresh = partitioner.profile(wide, repeats=1, cluster=cluster, options=dataclasses.replace(options, refresh=True)).columns["a"]
    assert "kept from" not in fresh.how
    assert cache.find(wide.structure, cluster.node("a")).seconds == fresh.seconds  # type: ignore[union-attr]
    # another speed, another number of threads, other sizes: not that device, not that model
    node = cluster.node("a")
    assert cache.find(wide.structure, dataclasses.replace(node, reference_s=0.02)) is None
    assert cache.find(wide.structure, dataclasses.replace(node, threads=2)) is None
    assert cache.find(dataclasses.replace(wide.structure, symbols={"batch": 9}), node) is None
    cache.keep(wide.structure, dataclasses.replace(node, reference_s=0.02), Column(tuple([1.0] * len(first.seconds)), "slower"))
    assert cache.find(wide.structure, node) is not None
    (file,) = (tmp_path / "profiles").iterdir()
    file.write_text("{")
    assert cache.find(wide.structure, node) is None


def test_the_cache_stands_where_it_is_documented(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert default_directory() == tmp_path / "splitnet" / "profiles"
    monkeypatch.setenv("XDG_CACHE_HOME", "not/absolute")
    assert default_directory() == Path.home() / ".cache" / "splitnet" / "profiles"


def test_operators_add_up_to_the_undisturbed_run() -> None:
    assert sum(matched([1.0, 2.0, 3.0], 5.4)) == pytest.approx(5.4)
    assert sum(matched([1e-6, 1.0], 0.5)) == pytest.approx(0.5)
    assert min(matched([1e-6, 1.0], 0.5)) > 0
    assert matched([0.0, 0.0], 1.0) == [0.0, 0.0]
    assert matched([0.0, 2.0], 1.0)[0] == 0.0


def test_a_box_that_is_held_back_spends_that_on_operators_as_they_are_long() -> None:
    """At a quarter of a processor a run takes four times as long as its operators compute; the small ones must not bear as much of it as the large."""
    assert matched([1e-3, 10e-6, 10e-6, 4e-3], 4 * 5.02e-3) == pytest.approx([4e-3, 40e-6, 40e-6, 16e-3])
    assert matched([1e-3, 10e-6, 4e-3], 5.01e-3 + 3 * 2e-6) == pytest.approx([1.002e-3, 12e-6, 4.002e-3]), "what the clock does not see"


def _blobs(boxes: LocalCluster, name: str) -> set[str]:
    return {path.name for folder in ("blobs", "parts") for path in (boxes.config(name).directory / folder).iterdir()}


def test_nothing_of_a_profile_stays_on_the_nodes(wide: ModelGraph) -> None:
    """Also of nodes that are measured once more all at once, and of one that was busy or could not do it."""
    with LocalCluster(2) as fresh:
        cluster = known(fresh, a=0.01, b=0.02)
        boxed = dataclasses.replace(cluster, nodes=tuple(dataclasses.replace(n, machine="box/1", cores=1.0) for n in cluster.nodes))
        columns = partitioner.profile(wide, repeats=1, cluster=boxed, options=QUICK).columns
        assert all(columns[n].how.endswith("2 nodes in one box") for n in ("a", "b"))
        assert _blobs(fresh, "a") == _blobs(fresh, "b") == set()
        with pytest.raises(SplitnetError, match="out of range|index"):
            tokens = {name: tensor + 1000 for name, tensor in wide.example_inputs.items()}
            partitioner.profile(_with_inputs(wide, tokens), repeats=1, cluster=boxed, options=QUICK)
        assert _blobs(fresh, "a") == set()


def _with_inputs(model: ModelGraph, inputs: dict[str, torch.Tensor]) -> ModelGraph:
    """Right where it is profiled here, wrong on a node."""

    class Lying(type(model)):  # type: ignore[misc]
        def run(self, given: Any, **more: Any) -> Any:
            return model.run(model.example_inputs, **more)

    return Lying(**{f.name: getattr(model, f.name) for f in dataclasses.fields(model)} | {"example_inputs": inputs})


async def test_a_profile_takes_away_only_what_it_brought(boxes: LocalCluster, wide: ModelGraph, tmp_path: Path) -> None:
    shard = _whole(wide, tmp_path / "whole", [])
    reply = await _measure(boxes.addresses["a"], shard, dict(wide.example_inputs))  # its graph is that of a profile's only piece
    assert reply.pieces
    before = _blobs(boxes, "a")
    await asyncio.to_thread(partitioner.profile, wide, repeats=1, cluster=known(boxes, a=0.01, b=0.02), options=QUICK)
    assert _blobs(boxes, "a") == before != set()


def test_what_another_profile_took_away_meanwhile_is_shipped_again(
    boxes: LocalCluster, wide: ModelGraph, monkeypatch: pytest.MonkeyPatch
) -> None:
    took: list[str] = []

    async def ship_and_lose(channel: Any, address: str, blob: Blob, on_bytes: Any) -> int:
        sent = await ship(channel, address, blob, on_bytes)
        if not took:
            took.append(blob.sha256)
            await stub(channel).Release(pb.ReleaseRequest(blobs=took))
        return sent

    monkeypatch.setattr(profiling_nodes, "ship", ship_and_lose)
    column = partitioner.profile(wide, repeats=1, cluster=Cluster(boxes.cluster().nodes[:1]), options=QUICK).columns["a"]
    assert took
    assert column.how.startswith("measured on node 'a'")


# ----------------------------------------------------------------------------------------------------------- the RPC itself


async def test_what_is_measured_is_not_released(boxes: LocalCluster, tmp_path: Path) -> None:
    graph, inputs = slow(), {"x": torch.randn(200, 8)}
    shard = _whole(graph, tmp_path / "slow")
    address = boxes.addresses["b"]
    names = [shard.sha256, *(m.sha256 for m in shard.manifest.members.values()), hashlib.sha256(save(inputs)).hexdigest()]
    measuring = asyncio.create_task(_measure(address, shard, inputs, budget_s=1.0))
    async with open_channel(address) as channel:
        node = stub(channel)
        while True:
            with pytest.raises(SplitnetError) as busy, translated(address):
                await node.Measure(pb.MeasureRequest(operators=pb.OperatorsRequest(shards=["0" * 64], inputs="0" * 64)))
            if isinstance(busy.value, Overloaded):
                break
            await asyncio.sleep(0.01)
        assert (await node.Release(pb.ReleaseRequest(blobs=names))).freed_bytes == 0
        assert (await measuring).pieces
        assert (await node.Release(pb.ReleaseRequest(blobs=names))).freed_bytes > 1000
        assert not set(names) & _blobs(boxes, "b")
        assert (await node.Release(pb.ReleaseRequest(blobs=names))).freed_bytes == 0
        for wrong in (["../x"], ["0" * 64] * 65537):
            with pytest.raises(BadInput), translated(address):
                await node.Release(pb.ReleaseRequest(blobs=wrong))


def _whole(graph: ModelGraph, folder: Path, weights: list[str] | None = None) -> Shard:
    stage = lay_out(graph.structure, {v.name: 0 for v in graph.structure.vertices if v.op != "input"}).stages[0]
    return write_stage(graph, stage, folder, name="profile", weights=weights)


async def _measure(address: str, shard: Shard, inputs: dict[str, torch.Tensor] | bytes, budget_s: float = 0.1) -> pb.MeasureReply:
    data = inputs if isinstance(inputs, bytes) else save(inputs)
    blob = Blob(hashlib.sha256(data).hexdigest(), len(data), data)
    async with open_channel(address) as channel:
        for each in (*shard_blobs({"s": shard}), blob):
            await ship(channel, address, each, lambda _: None)
        with translated(address):
            request = pb.OperatorsRequest(shards=[shard.sha256], inputs=blob.sha256)
            return await stub(channel).Measure(pb.MeasureRequest(operators=request, budget_s=budget_s))


async def test_what_a_stranger_may_send(boxes: LocalCluster, wide: ModelGraph, tmp_path: Path) -> None:
    address = boxes.addresses["a"]
    shard = _whole(wide, tmp_path / "whole", [])
    inputs = dict(wide.example_inputs)
    reply = await _measure(address, shard, inputs)
    assert reply.pieces[0].made_up_weights
    assert reply.pieces[0].rounds >= 3
    lying = dataclasses.replace(shard.manifest, param_bytes=100)
    (tmp_path / "whole" / "manifest.json").write_bytes(lying.to_bytes())
    with pytest.raises(BadShard, match="the manifest declares 100"):
        await _measure(address, Shard(shard.path, lying, shard.files), inputs)
    with pytest.raises(BadInput, match="neither given nor made by a piece before it"):
        await _measure(address, shard, {"nothing": torch.zeros(1)})
    with pytest.raises(SplitnetError, match="out of range|index"):
        await _measure(address, shard, {name: tensor + 1000 for name, tensor in inputs.items()})
    with pytest.raises(BadShard, match="pickle"):
        await _measure(address, shard, b"\x80\x04" + b"." * 20)
    async with open_channel(address) as channel:
        for request, error in (
            (pb.OperatorsRequest(), BadInput),
            (pb.OperatorsRequest(shards=["0" * 64], inputs="0" * 64), NotFound),
            (pb.OperatorsRequest(shards=["../x"], inputs="0" * 64), BadInput),
            (pb.OperatorsRequest(shards=[shard.sha256], inputs="f" * 64), NotFound),
        ):
            with pytest.raises(error), translated(address):
                await stub(channel).Measure(pb.MeasureRequest(operators=request))
    assert (await _measure(address, shard, inputs)).pieces[0].whole_s > 0


async def test_what_serves_keeps_its_memory(wide: ModelGraph, tmp_path: Path) -> None:
    shard = _whole(wide, tmp_path / "whole", [])
    small = LocalCluster(1, memory_bytes=wide.structure.param_bytes // 2)
    with small, pytest.raises(InsufficientMemory, match="measuring this model needs"):
        await _measure(small.addresses["a"], shard, dict(wide.example_inputs))


async def test_one_at_a_time_and_between_requests(boxes: LocalCluster, tmp_path: Path) -> None:
    """While a model is measured for a second, another measurement is refused, and other work waits for one round only."""
    graph = slow()
    shard = _whole(graph, tmp_path / "slow")
    address = boxes.addresses["b"]
    inputs = {"x": torch.randn(200, 8)}
    measuring = asyncio.create_task(_measure(address, shard, inputs, budget_s=1.5))
    await asyncio.sleep(0.7)
    with pytest.raises(SplitnetError, match="another model is being measured"):
        await _measure(address, shard, inputs)
    async with open_channel(address) as channel:
        started = time.perf_counter()
        await stub(channel).Measure(pb.MeasureRequest(compute=True, budget_s=0.01))
        assert time.perf_counter() - started < 1.0
        assert not measuring.done()
    reply = (await measuring).pieces[0]
    total = sum(t.seconds for t in reply.operators)
    assert reply.whole_s / 20 < total < reply.whole_s * 20  # of runs at other times, on a box that tests share


async def test_overhead(boxes: LocalCluster) -> None:
    async with open_channel(boxes.addresses["a"]) as channel:
        before = await stub(channel).Describe(pb.DescribeRequest())
        reply = (await stub(channel).Measure(pb.MeasureRequest(overhead=True, budget_s=0.6))).overhead
        after = await stub(channel).Describe(pb.DescribeRequest())
    assert 0 < reply.stage_s < reply.request_s < 1
    assert 0 <= reply.message_s < 1
    codecs = {codec.name: codec for codec in reply.codecs}
    assert set(codecs) >= set(codec_names(default=True))
    raw, zstd = codecs["raw"], codecs["zstd"]
    assert raw.ratio == pytest.approx(1.0)
    assert 1.05 < zstd.ratio < 2
    assert raw.encode_bytes_per_s > zstd.encode_bytes_per_s > 1e6
    assert [d.name for d in after.deployments] == [d.name for d in before.deployments]
    assert after.machine == before.machine != ""
    assert after.cores >= 1
    assert after.processor

"""Hostile blobs sent straight to a node, without our own client's checks: each is refused with its own message, and the node goes on."""

from __future__ import annotations

import asyncio
import hashlib
import json
import pickle
import struct
import zipfile
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import grpc.aio
import numpy as np
import pytest
from chain_model import MakeChain, graph
from safetensors.numpy import save

from nodes.testing import LocalCluster
from splitnet import Plan
from splitnet.channel import from_rpc_error, open_channel, stub, translated
from splitnet.errors import BadInput, BadShard, NotFound, Overloaded, ProtocolError, SplitnetError, StorageFailure
from splitnet.node_status import describe_node
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.shard import pack


class Node:
    """A node, and a client that follows no rules."""

    def __init__(self, cluster: LocalCluster, channel: grpc.aio.Channel, plan: Plan, members: dict[str, bytes]) -> None:
        self.address = cluster.addresses["a"]
        self.directory = cluster.config("a").directory
        self.channel = channel
        self.plan = plan
        self.members = members
        self.manifest: dict[str, Any] = {}

    async def load(self, data: bytes, *, sha256: str = "", size_bytes: int | None = None, packed: bool = False) -> pb.LoadReply:
        """Sends whatever it is told, under whatever name."""
        size = len(data) if size_bytes is None else size_bytes
        header = pb.BlobHeader(sha256=sha256 or hashlib.sha256(data).hexdigest(), size_bytes=size, packed=packed)

        load: Any = stub(self.channel).Load
        with translated(self.address):
            call = load(timeout=20)
            await call.write(pb.LoadRequest(header=header))
            reply: pb.LoadReply = await call.read()
            if not reply.complete:
                await call.write(pb.LoadRequest(data=data))
                await call.done_writing()
                reply = await call.read()
        return reply

    async def activate(self, manifest: bytes) -> None:
        sha256 = hashlib.sha256(manifest).hexdigest()
        plan = self.plan.with_shards({"stage0": sha256})
        request = pb.ActivateRequest(deployment="d", plan_json=plan.to_json().encode(), node="a", shards={"stage0": sha256})
        with translated(self.address):
            await stub(self.channel).Activate(request, timeout=20)

    async def install(self, members: dict[str, bytes] | None = None, manifest: Callable[[dict[str, Any]], object] = lambda m: None) -> None:
        """The valid shard, with other members or another manifest."""
        members = self.members | (members or {})
        document = {
            **self.manifest,
            "members": {n: {"sha256": hashlib.sha256(d).hexdigest(), "size_bytes": len(d)} for n, d in members.items()},
        }
        manifest(document)
        text = json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"
        for data in (*members.values(), text):
            await self.load(data)
        await self.activate(text)

    async def refuses(self, work: Any, error: type[SplitnetError], message: str) -> None:
        with pytest.raises(error, match=message) as caught:
            await work
        assert caught.value.node == "a"
        assert caught.value.remedy
        status = await describe_node("a", self.address)
        assert status.deployments == ()
        await self.install()  # the node is as good as before
        assert [d.name for d in (await describe_node("a", self.address)).deployments] == ["d"]


@pytest.fixture
async def node(make_chain: MakeChain) -> AsyncIterator[Node]:
    with LocalCluster(1) as cluster:
        plan, shards = make_chain(cluster.cluster(), stages=1)
        shard = shards["stage0"]
        async with open_channel(cluster.addresses["a"]) as channel:
            node = Node(cluster, channel, plan, {n: shard.member(n).read_bytes() for n in shard.manifest.members})
            node.manifest = json.loads(shard.manifest.to_bytes())
            yield node


async def test_the_valid_shard_is_taken(node: Node) -> None:
    await node.install()


class Trap:
    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


async def test_a_pickled_member(node: Node, tmp_path: Path) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"), protocol=4)
    await node.refuses(node.install({"weights.safetensors": trap}), BadShard, "weights.safetensors: pickled member")
    assert not (tmp_path / "sprung").exists()


async def test_a_pickled_member_by_name(node: Node) -> None:
    await node.refuses(node.install({"weights.pt": b"x"}), BadShard, "pickled member 'weights.pt'")


async def test_an_operator_that_is_not_allowed(node: Node) -> None:
    hostile = json.loads(graph(0, 96))
    hostile["operators"][0]["op"] = "os.system"
    await node.refuses(node.install({"graph.json": json.dumps(hostile).encode()}), BadShard, "os.system")


async def test_a_wrong_hash(node: Node) -> None:
    await node.refuses(node.load(b"evil", sha256="0" * 64), BadShard, "wrong sha256: announced 0000")


async def test_a_truncated_file(node: Node) -> None:
    await node.refuses(
        node.load(b"abc", sha256=hashlib.sha256(b"abcd").hexdigest(), size_bytes=4), BadShard, "truncated, 3 of 4 bytes came"
    )


async def test_truncated_weights(node: Node) -> None:
    cut_off = node.members["weights.safetensors"][:-8]
    await node.refuses(
        node.install({"weights.safetensors": cut_off}), BadShard, "weights.safetensors: safetensors: truncated, the tensors need"
    )


async def test_more_bytes_than_announced(node: Node) -> None:
    await node.refuses(node.load(bytes(100), size_bytes=10), BadShard, "10 bytes were announced and more came")


async def test_a_path_that_leaves_the_directory(node: Node) -> None:
    await node.refuses(node.install({"../../evil.json": b"{}"}), BadShard, "it would leave the shard's directory")


async def test_a_name_that_is_no_sha256(node: Node) -> None:
    await node.refuses(node.load(b"evil", sha256="../../../tmp/evil"), BadInput, "is not a sha256")


async def test_a_newer_format(node: Node) -> None:
    work = node.install(manifest=lambda m: m.update(version=7))
    await node.refuses(work, BadShard, "format version 7, this splitnet reads up to 1")


async def test_a_manifest_that_is_no_json(node: Node) -> None:
    async def work() -> None:
        await node.load(b"[" * 100_000)
        await node.activate(b"[" * 100_000)

    await node.refuses(work(), BadShard, "nested too deeply")


async def test_parameters_that_are_not_declared(node: Node) -> None:
    """A node reserves what the manifest declares."""
    await node.refuses(
        node.install(manifest=lambda m: m.update(param_bytes=1)), BadShard, "declares 1 bytes of parameters, the weights hold"
    )


async def test_weights_that_the_graph_does_not_expect(node: Node) -> None:
    other = save({"v": np.zeros((96, 64), np.float32)})
    await node.refuses(node.install({"weights.safetensors": other}), BadShard, "w")
    small = save({"w": np.zeros((95, 64), np.float32)})
    with pytest.raises(SplitnetError):
        await node.install({"weights.safetensors": small})


async def test_a_header_that_claims_the_moon(node: Node) -> None:
    hostile = struct.pack("<Q", 1 << 60) + b"{}"
    await node.refuses(node.install({"weights.safetensors": hostile}), BadShard, "the header claims 1152921504606846976 bytes")


async def test_a_blob_larger_than_the_disk(node: Node) -> None:
    await node.refuses(node.load(b"x", size_bytes=1 << 60), StorageFailure, "needs 1152921504606846976 bytes more, the disk of")


async def test_a_zip_bomb(node: Node, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "bomb.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("manifest.json", json.dumps(node.manifest, sort_keys=True, separators=(",", ":")) + "\n")
        archive.writestr("weights.safetensors", bytes(50 << 20))
    data = (tmp_path / "bomb.zip").read_bytes()
    await node.refuses(node.load(data, packed=True), BadShard, "zip bomb: .* claim to hold 52428800")


async def test_a_packed_shard_with_a_path_that_leaves(node: Node, tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "evil.zip", "w") as archive:
        archive.writestr("manifest.json", b"{}")
        archive.writestr("../../evil.json", b"{}")
    await node.refuses(node.load((tmp_path / "evil.zip").read_bytes(), packed=True), BadShard, "it would leave the shard's directory")


async def test_a_packed_shard_is_taken(make_chain: MakeChain, tmp_path: Path) -> None:
    with LocalCluster(1) as cluster:
        plan, shards = make_chain(cluster.cluster(), stages=1)
        data = pack(shards["stage0"], tmp_path / "s.zip").read_bytes()
        async with open_channel(cluster.addresses["a"]) as channel:
            node = Node(cluster, channel, plan, {})
            reply = await node.load(data, packed=True)
            assert (reply.complete, reply.shard) == (True, shards["stage0"].sha256)
            await node.activate(shards["stage0"].manifest.to_bytes())


async def test_a_shard_that_was_never_sent(node: Node) -> None:
    await node.refuses(node.activate(b"nothing"), NotFound, "is not on this node")


async def test_data_without_a_header(node: Node) -> None:
    async def requests() -> AsyncIterator[pb.LoadRequest]:
        yield pb.LoadRequest(data=b"x")

    with pytest.raises(ProtocolError, match="the first message must be a header"), translated(node.address):
        async for _ in stub(node.channel).Load(requests(), timeout=20):
            pass
    await node.install()


async def test_a_client_that_goes_in_the_middle(node: Node) -> None:
    """What came is kept, nobody is blocked, and the next one goes on from there."""
    data = bytes(3_000_000)
    header = pb.BlobHeader(sha256=hashlib.sha256(data).hexdigest(), size_bytes=len(data))
    part = node.directory / "parts" / f"{header.sha256}.part"
    for held in (0, 1_000_000):
        call = await begin(node, header, held)
        await call.write(pb.LoadRequest(data=data[:1_000_000]))
        await until(lambda arrived=held + 1_000_000: part.stat().st_size == arrived)  # type: ignore[misc]
        call.cancel()
    call = await begin(node, header, 2_000_000)
    await call.write(pb.LoadRequest(data=data[2_000_000:]))
    assert (await call.read()).complete


async def begin(node: Node, header: pb.BlobHeader, offset: int) -> Any:
    """A Load call whose header was answered with that offset; again while the node has not noticed the end of the one before."""
    load: Any = stub(node.channel).Load
    for _ in range(500):
        call = load(timeout=20)
        await call.write(pb.LoadRequest(header=header))
        try:
            reply = await call.read()
        except grpc.aio.AioRpcError as error:
            if not isinstance(from_rpc_error(error, node.address), Overloaded):
                raise
            await asyncio.sleep(0.01)
            continue
        assert reply.offset == offset
        return call
    raise AssertionError("the upload that broke off was never let go")


async def until(condition: Callable[[], bool]) -> None:
    for _ in range(1000):
        if condition():
            return
        await asyncio.sleep(0.01)
    raise AssertionError("it did not come to pass within 10 s")

"""Blobs go from node to node: each is sent once by whoever deploys, verified where it arrives, and only to the node that it was offered to."""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from pathlib import Path

import pytest
from chain_model import MakeChain

import splitnet
from nodes.logs import get_log
from nodes.peers import Offers, gather, give
from nodes.store import BlobStore
from nodes.testing import LocalCluster
from splitnet.channel import open_channel, stub, translated
from splitnet.errors import BadShard, NotPermitted
from splitnet.installation import Installation
from splitnet.rpc.v1 import node_pb2 as pb

ROWS = 2048  # weights of half a megabyte: what is small is sent at once


def moved(plan: splitnet.Plan, by: int) -> splitnet.Plan:
    """The same stages, each on another node."""
    names = [node.name for node in plan.nodes]
    stages = tuple(dataclasses.replace(s, node=names[(names.index(s.node) + by) % len(names)]) for s in plan.stages)
    return dataclasses.replace(plan, stages=stages)


def test_a_node_takes_from_another_what_that_one_has(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster(), rows=ROWS)
    first = splitnet.deploy(plan, shards, name="one")
    assert sum(first.taken_bytes.values()) == 0
    second = splitnet.deploy(moved(plan, 1), shards, name="two")
    assert second.not_taken == ()
    for node, taken in second.taken_bytes.items():
        assert taken > ROWS * 64 * 4 > 64 << 10 > second.sent_bytes[node]
    third = splitnet.deploy(moved(plan, 1), shards, name="three")
    assert not sum(third.taken_bytes.values()) + sum(third.sent_bytes.values())


def test_what_two_nodes_want_is_sent_to_one(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster(), rows=ROWS, stages=1)
    spread = dataclasses.replace(plan, stages=(dataclasses.replace(plan.stages[0], replicas=("b", "c")),))
    done = splitnet.deploy(spread, shards)
    weights = shards["stage0"].manifest.members["weights.safetensors"].size_bytes
    assert sorted(done.taken_bytes.values()) == [0, weights, weights]
    assert weights < sum(done.sent_bytes.values()) < 1.5 * weights


def test_where_the_other_node_fails_it_comes_from_the_deployer(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster(), rows=ROWS, stages=1)
    splitnet.deploy(plan, shards, name="one")
    nowhere = tuple(dataclasses.replace(node, address="127.0.0.1:1") if node.name == "a" else node for node in plan.nodes)
    other = dataclasses.replace(moved(plan, 1), nodes=nowhere)
    shipped = asyncio.run(Installation(other, "two", shards).ship_all(8))
    assert shipped["b"].sent_bytes > ROWS * 64 * 4
    assert not shipped["b"].taken_bytes


async def _offered(address: str, blob: str, to: str) -> list[str]:
    async with open_channel(address) as channel:
        with translated(address):
            return list((await stub(channel).Offer(pb.OfferRequest(blobs=[blob], node=to, lease_s=60), timeout=5)).held)


async def _given(address: str, blob: str, name: str, offset: int = 0) -> bytes:
    async with open_channel(address) as channel:
        with translated(address):
            call = stub(channel).Give(pb.GiveRequest(sha256=blob, offset=offset), timeout=5, metadata=(("splitnet-node", name),))
            return b"".join([reply.data async for reply in call])


def test_only_what_was_offered_and_to_whom(nodes: LocalCluster, make_chain: MakeChain) -> None:
    plan, shards = make_chain(nodes.cluster(), stages=1)
    splitnet.deploy(plan, shards)
    member = shards["stage0"].manifest.members["weights.safetensors"].sha256
    content = shards["stage0"].member("weights.safetensors").read_bytes()
    address = nodes.addresses["a"]
    with pytest.raises(NotPermitted, match="was not offered to node 'b'"):
        asyncio.run(_given(address, member, "b"))
    assert asyncio.run(_offered(address, member, "b")) == [member]
    assert asyncio.run(_given(address, member, "b", 100)) == content[100:]
    with pytest.raises(NotPermitted, match="was not offered to node 'c'"):
        asyncio.run(_given(address, member, "c"))
    assert asyncio.run(_offered(address, "0" * 64, "b")) == []


async def test_a_transfer_goes_on_where_it_broke_off_and_is_verified(nodes: LocalCluster, make_chain: MakeChain, tmp_path: Path) -> None:
    plan, shards = make_chain(nodes.cluster(), stages=1, rows=ROWS)
    await splitnet.deploy_async(plan, shards)
    path = shards["stage0"].member("weights.safetensors")
    content, sha256 = path.read_bytes(), shards["stage0"].manifest.members["weights.safetensors"].sha256
    await _offered(nodes.addresses["a"], sha256, "mine")
    request = pb.GatherRequest(sha256=sha256, size_bytes=len(content), node="a", address=nodes.addresses["a"], as_node="mine")
    log = get_log("mine", quiet=True)
    store = BlobStore(tmp_path / "mine")
    with store.writer(sha256, len(content)) as writer:
        writer.write(content[:1000])
    offsets = [held async for held, _ in gather(store, request, log)]
    assert offsets[0] == 1000
    assert offsets[-1] == len(content)
    assert store.path(sha256).read_bytes() == content
    spoilt = BlobStore(tmp_path / "spoilt")
    with spoilt.writer(sha256, len(content)) as writer:
        writer.write(bytes(1000))
    with pytest.raises(BadShard, match="wrong sha256"):
        _ = [held async for held, _ in gather(spoilt, request, log)]
    assert not spoilt.has(sha256)
    assert spoilt.offset(sha256, len(content)) == 0


async def test_an_offer_ends(tmp_path: Path) -> None:
    store = BlobStore(tmp_path)
    sha256 = hashlib.sha256(b"x").hexdigest()
    with store.writer(sha256, 1) as writer:
        writer.write(b"x")
        writer.commit()
    offers = Offers(store)
    assert await offers.offer([sha256], "b", 60.0) == [sha256]
    assert [piece async for piece in give(store, offers, "b", sha256, 0)] == [b"x"]
    await offers.offer([sha256], "b", 0.0)
    with pytest.raises(NotPermitted):
        _ = [piece async for piece in give(store, offers, "b", sha256, 0)]

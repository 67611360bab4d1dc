"""Nodes probe links of a known rate: through the testbed's relay, and through the kernel's own token buckets where this machine has them."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from test_kernel_network import WHY_NOT
from testbed.bed import Testbed
from testbed.shaping import LinkShape
from testbed.spec import BedSpec, NodeSpec

from splitnet import background
from splitnet.channel import open_channel, stub
from splitnet.rpc.v1 import node_pb2 as pb

MBIT = 1e6 / 8
BUDGET_S = 1.0


def links(there: LinkShape, back: LinkShape, shaping: str = "relay") -> BedSpec:
    return BedSpec((NodeSpec("a"), NodeSpec("b")), {("a", "b"): there, ("b", "a"): back}, shaping=shaping)


def measured(bed: Testbed, a: str, b: str) -> pb.MeasureReply:
    async def ask() -> pb.MeasureReply:
        async with open_channel(bed.addresses[a]) as channel:
            return await stub(channel).Measure(pb.MeasureRequest(peer_address=bed.addresses[b], budget_s=BUDGET_S), timeout=60)

    return background.run(ask())


def is_rate(found: pb.MeasureReply, mbit: float) -> bool:
    """A burst that counted would make it many times as fast; how much slower it is, is the machine's affair, which may be busy."""
    return 0.4 * mbit < found.bandwidth_bytes_per_s / MBIT < 1.5 * mbit


@pytest.fixture(scope="module")
def relayed() -> Iterator[Testbed]:
    with Testbed(links(LinkShape(), LinkShape())) as bed:
        yield bed


def test_bursts_of_the_relay_do_not_count(relayed: Testbed) -> None:
    relayed.reshape(links(LinkShape(20 * MBIT, 0.005, burst_bytes=1 << 17), LinkShape(1 * MBIT, 0.02, burst_bytes=1 << 15)))
    there, back = measured(relayed, "a", "b"), measured(relayed, "b", "a")
    assert is_rate(there, 20)
    assert is_rate(back, 1)
    assert there.round_trip_s == pytest.approx(0.03, rel=0.3)
    assert there.peer_name == "b"


def test_links_of_the_relay_without_bursts(relayed: Testbed) -> None:
    relayed.reshape(links(LinkShape(5 * MBIT, 0.002, 0.004), LinkShape(200 * MBIT, 0.002)))
    there, back = measured(relayed, "a", "b"), measured(relayed, "b", "a")
    assert is_rate(there, 5)
    assert is_rate(back, 200)
    assert there.jitter_s > 2e-4


@pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT or "can")
def test_bursts_of_the_kernel_do_not_count() -> None:
    with Testbed(links(LinkShape(20 * MBIT, burst_bytes=1 << 17), LinkShape(60 * MBIT, burst_bytes=1 << 18), "kernel")) as bed:
        there, back = measured(bed, "a", "b"), measured(bed, "b", "a")
    assert is_rate(there, 20)
    assert is_rate(back, 60)

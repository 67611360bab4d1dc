"""`splitnet probe`: what the nodes are, how fast each is, and what the links between them carry, measured by the nodes themselves."""

from __future__ import annotations

import asyncio
import dataclasses
import itertools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from splitnet import background
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import OVERHEADS, Cluster, ClusterNode, CodecSpeed, Link, equal_devices
from splitnet.errors import BadCluster, BadInput, NodeUnavailable, ServiceError, SplitnetError
from splitnet.explain import seconds_text, table
from splitnet.rpc.v1 import node_pb2 as pb

__all__ = ["BUDGET_S", "Survey", "matrix", "probe", "survey"]

BUDGET_S = 2.0  #: for each node and each directed pair
_DESCRIBE_S = 10.0
_GRACE_S = 30.0  # a slow link's last message is under way when the time is up

OnProgress = Callable[[int, int, str], None]


@dataclass(frozen=True)
class Survey:
    """What was measured. `jitter_s` per link: the median deviation of its round trips. `unreachable`: pairs (a, b) where a cannot reach b, and
    why; they have no link in the cluster."""

    cluster: Cluster
    jitter_s: Mapping[tuple[str, str], float]
    unreachable: Mapping[tuple[str, str], str]


def probe(addresses: Sequence[str], *, budget_s: float = BUDGET_S, on_progress: OnProgress | None = None) -> Cluster:
    """The cluster of the nodes at these addresses (HOST:PORT), measured; see `survey`. Blocking.

    Raises NodeUnavailable where a node cannot reach another one.
    """
    found = background.run(survey(addresses, budget_s=budget_s, on_progress=on_progress))
    for (a, b), why in found.unreachable.items():
        raise NodeUnavailable(f"it cannot reach node {b!r}: {why}", node=a, remedy="open the port between the nodes, or probe fewer nodes")
    return found.cluster


async def survey(addresses: Sequence[str], *, budget_s: float = BUDGET_S, on_progress: OnProgress | None = None) -> Survey:
    """Describes every node, times the reference kernel on each, and has each measure its link to every other one, one after the
    other so that no measurement disturbs another: about budget_s * n^2 in all. `on_progress(done, total, what)` is called before each.

    Raises NodeUnavailable naming every node that does not answer, BadCluster where two nodes have one name, or where an address
    leads another node to somebody else (127.0.0.1 on two machines).
    """
    _check(addresses, budget_s)
    nodes = await _describe_all(addresses)
    total = len(nodes) * len(nodes)
    done = 0

    def step(what: str) -> None:
        nonlocal done
        if on_progress:
            on_progress(done, total, what)
        done += 1

    timed: list[ClusterNode] = []
    for node in nodes:
        step(f"speed of {node.name}")
        timed.append(await _timed(node, timed, budget_s))
    links, jitter, unreachable = [], {}, {}
    for a, b in itertools.permutations(timed, 2):
        step(f"{a.name} -> {b.name}")
        try:
            reply = await _link(a, b, budget_s)
        except ServiceError as error:
            unreachable[a.name, b.name] = error.message
            continue
        if reply.peer_name != b.name:
            raise BadCluster(
                f"node {a.name!r} finds node {reply.peer_name!r} at {b.address}, which is node {b.name!r}'s address from here",
                remedy="give addresses that mean the same machine everywhere, not 127.0.0.1",
            )
        links.append(Link(a.name, b.name, reply.bandwidth_bytes_per_s, reply.round_trip_s / 2, reply.jitter_s))
        jitter[a.name, b.name] = reply.jitter_s
    if on_progress:
        on_progress(total, total, "")
    return Survey(Cluster(tuple(timed), tuple(links)), jitter, unreachable)


def matrix(found: Survey) -> list[str]:
    """The links as a matrix, from row to column: one-way latency, bandwidth."""
    names = [node.name for node in found.cluster.nodes]
    rows = [("from \\ to", *names)]
    for a in names:
        cells = []
        for b in names:
            link = found.cluster.link(a, b)
            if a == b:
                cells.append("-")
            elif link is None:
                cells.append("unreachable")
            else:
                cells.append(f"{seconds_text(link.latency_s)}, {link.bandwidth_bytes_per_s / 1e6:.3g} MB/s")
        rows.append((a, *cells))
    return table(rows)


def _check(addresses: Sequence[str], budget_s: float) -> None:
    if not addresses:
        raise BadInput("there is no node to probe", remedy="give --node HOST:PORT at least once")
    if not budget_s > 0:
        raise BadInput(f"budget_s must be positive, got {budget_s}")
    for address in addresses:
        if addresses.count(address) > 1:
            raise BadInput(f"address {address} is given twice")


async def _describe_all(addresses: Sequence[str]) -> list[ClusterNode]:
    outcomes = await asyncio.gather(*(_describe(address) for address in addresses), return_exceptions=True)
    silent, nodes = [], []
    for address, outcome in zip(addresses, outcomes, strict=True):
        if isinstance(outcome, ServiceError):
            silent.append(f"{address}: {outcome.message}")
        elif isinstance(outcome, BaseException):
            raise outcome
        else:
            nodes.append(outcome)
    if silent:
        raise NodeUnavailable("no answer from " + "; ".join(silent), remedy="start `splitnet node` there, or correct the address")
    for node in nodes:
        if twins := [other.address for other in nodes if other.name == node.name and other is not node]:
            raise BadCluster(
                f"the nodes at {node.address} and {twins[0]} are both called {node.name!r}", remedy="start one of them with --name"
            )
    return nodes


async def _describe(address: str) -> ClusterNode:
    async with open_channel(address) as channel:
        with translated(address):
            reply = await stub(channel).Describe(pb.DescribeRequest(), timeout=_DESCRIBE_S)
    return ClusterNode(
        reply.name,
        address,
        reply.memory_limit_bytes,
        reply.device or "cpu",
        reply.threads or 1,
        machine=reply.machine,
        cores=reply.processors or reply.cores,
        processor=reply.processor,
    )


async def _link(a: ClusterNode, b: ClusterNode, budget_s: float) -> pb.MeasureReply:
    """A second time where the first one failed: a busy box, or one connection that broke, is not a node that cannot be reached."""
    request = pb.MeasureRequest(peer_address=b.address, budget_s=budget_s)
    try:
        return await _measure(a, request, budget_s)
    except ServiceError:
        return await _measure(a, request, budget_s)


async def _timed(node: ClusterNode, before: Sequence[ClusterNode], budget_s: float) -> ClusterNode:
    """The node with its speed, and with what it spends besides computing; that is measured once for equal devices."""
    reply = await _measure(node, pb.MeasureRequest(compute=True, budget_s=budget_s / 2), budget_s)
    node = dataclasses.replace(node, reference_s=reply.seconds)
    if (twin := next((other for other in before if equal_devices(other, node)), None)) is not None:
        return dataclasses.replace(node, codecs=twin.codecs, **{figure: getattr(twin, figure) for figure in OVERHEADS})
    spent = (await _measure(node, pb.MeasureRequest(overhead=True, budget_s=budget_s / 2), budget_s)).overhead
    codecs = tuple(CodecSpeed(c.name, c.encode_bytes_per_s, c.decode_bytes_per_s, c.ratio) for c in spent.codecs)
    return dataclasses.replace(node, codecs=codecs, **{figure: getattr(spent, figure) for figure in OVERHEADS})


async def _measure(node: ClusterNode, request: pb.MeasureRequest, budget_s: float) -> pb.MeasureReply:
    async with open_channel(node.address) as channel:
        try:
            with translated(node.address):
                return await stub(channel).Measure(request, timeout=budget_s + _GRACE_S)
        except SplitnetError as error:
            raise error.at(node=node.name) from None

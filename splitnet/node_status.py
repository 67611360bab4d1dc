"""What each node of a cluster holds and does, as its Describe call tells."""

from __future__ import annotations

import asyncio
import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from splitnet.batching import Batching
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import Cluster, ClusterNode
from splitnet.errors import BadPlan, ProtocolError, ServiceError
from splitnet.generations import FIRST
from splitnet.noise import Noise
from splitnet.plan import NodeRef, Plan
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.security.addresses import know_address

__all__ = [
    "CodecInUse",
    "DeploymentStatus",
    "Event",
    "GenerationStatus",
    "LinkStatus",
    "NodeStatus",
    "StageStatus",
    "describe_node",
    "status_of",
]

DESCRIBE_TIMEOUT_S = 10.0


@dataclass(frozen=True, slots=True)
class StageStatus:
    """Totals since activation. `requests` counts runs of the engine: a joined batch is one. Seconds spent waiting for the engine, decoding, computing, encoding and sending."""

    name: str
    engine: str
    requests: int
    failures: int
    wait_s: float
    decode_s: float
    compute_s: float
    encode_s: float
    send_s: float
    reserved_bytes: int
    queued: int
    standby: bool = False  # loaded to take over from another node


@dataclass(frozen=True, slots=True)
class LinkStatus:
    """An outbound link: payload bytes after (`sent_bytes`) and before (`raw_bytes`) the codec. `goodput_bytes_per_s`: what it has lately
    delivered while there was something to send; 0 where that is not known. `queued_bytes`: before the codec, not handed to the network yet.
    `codecs`: of the transfers whose codec may change."""

    target: str
    address: str
    sent_bytes: int
    raw_bytes: int
    frames: int
    connected: bool
    goodput_bytes_per_s: float = 0.0
    round_trip_s: float = 0.0
    queued_bytes: int = 0
    unacknowledged_bytes: int = 0
    codecs: tuple[CodecInUse, ...] = ()


@dataclass(frozen=True, slots=True)
class CodecInUse:
    """A transfer of a deployment (stages; "" is the client's side) and the codec that it uses now. `switches`: since activation."""

    deployment: str
    source: str
    target: str
    codec: str
    switches: int


@dataclass(frozen=True, slots=True)
class GenerationStatus:
    """Of a decoder model, at its ingress. Slots hold one token of one session each, on every stage; `free_tokens` are not promised to a live session. Counts are since
    activation: `drafted_tokens` were guessed, `accepted_tokens` of these right. `ttft_s` and `tpot_s` are medians of the latest answers, 0 where there were none;
    `tokens_per_s` is of all sessions, over the last ten seconds."""

    context_length: int
    cache_tokens: int
    free_tokens: int
    kv_bytes_per_token: int  # of all stages together
    sessions: int
    kept: int
    prompt_tokens: int
    cached_tokens: int
    new_tokens: int
    passes: int
    passes_in_flight: int
    drafted_tokens: int
    accepted_tokens: int
    answers: int
    ttft_s: float
    tpot_s: float
    tokens_per_s: float

    @property
    def used_bytes(self) -> int:
        """Of all caches, promised to live sessions."""
        return (self.cache_tokens - self.free_tokens) * self.kv_bytes_per_token

    @property
    def cache_bytes(self) -> int:
        return self.cache_tokens * self.kv_bytes_per_token


@dataclass(frozen=True, slots=True)
class DeploymentStatus:
    """One generation of a deployment on one node. `state`: "active", "canary" (takes `share` of the new requests), "loaded" (takes none yet),
    "kept" (to go back to), "draining"; "restoring": it was here before the node was started again, and will be; or "moved": it was here, and requests go to `moved_to`. `shards` of this node's stages and `plan_json` are
    there where they were asked for."""

    name: str
    model: str
    plan_sha256: str
    ingress: bool  # this node takes the clients' requests
    max_in_flight: int
    in_flight: int
    stages: tuple[StageStatus, ...]
    waiting: int = 0  # of those in flight: in line at the ingress
    batching: Batching = field(default_factory=Batching)
    generation: int = FIRST
    state: str = "active"
    share: float = 1.0
    answered: int = 0  # at the ingress, since activation
    unanswered: int = 0  # failed, cancelled, or out of time
    moved_to: str = ""
    term: int = 0  # counts the switches
    exclusive: bool = False  # has the node's threads for itself
    sessions: int = 0  # requests at once that it has reserved
    plan_json: str = ""
    shards: Mapping[str, str] = field(default_factory=dict)
    generating: GenerationStatus | None = None  # at the ingress of a decoder model
    noise: Noise | None = None  # on what leaves the ingress for other nodes
    released: int = 0  # with it, at the ingress, since activation


@dataclass(frozen=True, slots=True)
class Event:
    """What befell a node. `time_s`: since the epoch, by its own clock. `kind`: lost, back, replaced, replayed, unrecoverable, restored. `node`: whom it
    is about."""

    time_s: float
    kind: str
    node: str
    deployment: str
    text: str


@dataclass(frozen=True, slots=True)
class NodeStatus:
    """A node as the cluster (or plan) names it, and what it says. `error` is why it could not be asked; empty when it answered."""

    name: str
    address: str
    error: str = ""
    version: str = ""
    device: str = ""
    machine: str = ""  # the same for processes that compete for the same cores
    threads: int = 0
    engines: tuple[str, ...] = ()
    codecs: tuple[str, ...] = ()
    memory_limit_bytes: int = 0  # 0: no limit
    memory_used_bytes: int = 0  # what the active stages reserved
    process_memory_bytes: int = 0
    sessions_limit: int = 0  # requests at once that deployments may reserve; 0: no limit
    sessions_reserved: int = 0
    uptime_s: float = 0.0
    draining: bool = False
    insecure: bool = False  # plaintext on an address that is not loopback
    deployments: tuple[DeploymentStatus, ...] = ()
    links: tuple[LinkStatus, ...] = ()
    events: tuple[Event, ...] = ()  # lately, the oldest first

    def deployment(self, name: str) -> DeploymentStatus | None:
        """The generation of that name that takes the requests, or another one that is here."""
        return next((d for d in self.generations(name) if d.state not in ("moved", "restoring")), None)

    def generations(self, name: str) -> tuple[DeploymentStatus, ...]:
        """All of that name, the active one first, and the word on where it has gone."""
        return tuple(d for d in self.deployments if d.name == name)


async def status_of(
    nodes: Cluster | Plan | Iterable[NodeRef], *, timeout_s: float = DESCRIBE_TIMEOUT_S, plans: bool = False
) -> list[NodeStatus]:
    """Asks every node at once. One that cannot be reached, or fails to answer in time, stands in the list with its `error`. `plans`: also for
    the plans that it serves."""
    members: Sequence[NodeRef | ClusterNode] = list(nodes.nodes if isinstance(nodes, Cluster | Plan) else nodes)
    for member in members:
        know_address(member.address, node=member.name)

    async def ask(name: str, address: str) -> NodeStatus:
        try:
            return await describe_node(name, address, timeout_s=timeout_s, plans=plans)
        except ServiceError as error:
            return NodeStatus(name, address, error=error.message)

    return list(await asyncio.gather(*(ask(member.name, member.address) for member in members)))


async def describe_node(name: str, address: str, *, timeout_s: float = DESCRIBE_TIMEOUT_S, plans: bool = False) -> NodeStatus:
    """Raises NodeUnavailable or DeadlineExceeded, with the node's name."""
    try:
        async with open_channel(address) as channel:
            with translated(address):
                reply = await stub(channel).Describe(pb.DescribeRequest(plans=plans), timeout=timeout_s)
    except ServiceError as error:
        raise error.at(node=name) from None
    return _from_reply(name, address, reply)


def _from_reply(name: str, address: str, reply: pb.DescribeReply) -> NodeStatus:
    return NodeStatus(
        name,
        address,
        version=reply.version,
        device=reply.device,
        machine=reply.machine,
        threads=reply.threads,
        engines=tuple(reply.engines),
        codecs=tuple(reply.codecs),
        memory_limit_bytes=reply.memory_limit_bytes,
        memory_used_bytes=reply.memory_used_bytes,
        process_memory_bytes=reply.process_memory_bytes,
        sessions_limit=reply.sessions_limit,
        sessions_reserved=reply.sessions_reserved,
        uptime_s=reply.uptime_s,
        draining=reply.draining,
        insecure=reply.insecure,
        deployments=tuple(_deployment(deployment) for deployment in reply.deployments),
        links=tuple(_link(link) for link in reply.links),
        events=tuple(Event(e.time_s, e.kind, e.node, e.deployment, e.text) for e in reply.events),
    )


def _link(status: pb.LinkStatus) -> LinkStatus:
    return LinkStatus(
        status.target,
        status.address,
        status.sent_bytes,
        status.raw_bytes,
        status.frames,
        status.connected,
        goodput_bytes_per_s=status.goodput_bytes_per_s,
        round_trip_s=status.round_trip_s,
        queued_bytes=status.queued_bytes,
        unacknowledged_bytes=status.unacknowledged_bytes,
        codecs=tuple(CodecInUse(c.deployment, c.source, c.target, c.codec, c.switches) for c in status.codecs),
    )


def _deployment(status: pb.DeploymentStatus) -> DeploymentStatus:
    return DeploymentStatus(
        status.name,
        status.model,
        status.plan_sha256,
        ingress=status.ingress,
        max_in_flight=status.max_in_flight,
        in_flight=status.in_flight,
        stages=tuple(
            StageStatus(
                s.name,
                s.engine,
                s.requests,
                s.failures,
                s.wait_s,
                s.decode_s,
                s.compute_s,
                s.encode_s,
                s.send_s,
                s.reserved_bytes,
                s.queued,
                s.standby,
            )
            for s in status.stages
        ),
        waiting=status.waiting,
        batching=_batching(status),
        generation=max(status.generation, FIRST),
        state=status.state or "active",
        share=status.share if status.state else 1.0,
        answered=status.answered,
        unanswered=status.unanswered,
        moved_to=status.moved_to,
        term=status.term,
        exclusive=status.exclusive,
        sessions=status.sessions,
        plan_json=status.plan_json.decode(errors="replace"),
        shards=dict(status.shards),
        generating=_generating(status.generating) if status.HasField("generating") else None,
        noise=_noise(status),
        released=status.noise.released,
    )


def _noise(status: pb.DeploymentStatus) -> Noise | None:
    """Raises ProtocolError for what cannot be."""
    try:
        return Noise.from_message(status.noise) if status.HasField("noise") else None
    except BadPlan as error:
        raise ProtocolError(
            f"deployment {status.name!r}: {error.message}", remedy="run the same version of splitnet on both sides"
        ) from None


def _generating(status: pb.GenerationStatus) -> GenerationStatus:
    return GenerationStatus(**{f.name: getattr(status, f.name) for f in dataclasses.fields(GenerationStatus)})


def _batching(status: pb.DeploymentStatus) -> Batching:
    """Raises ProtocolError for what cannot be."""
    try:
        return Batching(max(status.max_batch, 1), status.max_delay_s, status.microbatch)
    except BadPlan as error:
        raise ProtocolError(
            f"deployment {status.name!r}: {error.message}", remedy="run the same version of splitnet on both sides"
        ) from None

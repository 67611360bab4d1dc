"""The cluster: nodes and the links between them, as a person writes it or `splitnet probe` measures it (cluster.toml)."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import tomli_w

from splitnet.documents import save_document
from splitnet.errors import BadCluster
from splitnet.security.addresses import INSECURE, know_address

__all__ = ["OVERHEADS", "Cluster", "ClusterCredentials", "ClusterNode", "CodecSpeed", "Link", "equal_devices", "same_speed"]

OVERHEADS = ("stage_s", "message_s", "request_s", "stage_cpu_s", "message_cpu_s", "request_cpu_s", "byte_cpu_s")  #: of `ClusterNode`

_SAME_SPEED = 0.08  # reference times that differ by less are of equal devices


@dataclass(frozen=True, slots=True)
class CodecSpeed:
    """What a codec costs a node's processor (speeds of bytes before it), and `ratio`: bytes before / bytes after, on random activations."""

    name: str
    encode_bytes_per_s: float
    decode_bytes_per_s: float
    ratio: float = 1.0


@dataclass(frozen=True, slots=True)
class ClusterNode:
    """A box, or one of several nodes on it. 0 and "" stand for what was not measured.

    `reference_s` is the time of the reference kernel there (see the Measure RPC): the ratio of two nodes' figures scales a profile from
    one to the other. Nodes with the same `machine` share its `cores`: as many processors' time as the node may use, so less than one where a
    quota says so. `stage_s`, `message_s` and `request_s` are what the node spends, model aside, on handing a request to its engine and back, on
    sending or taking one tensor, and on taking a client's request and answering it, with nothing else to do. `..._cpu_s` are the processor
    seconds of the same when it is kept busy, and `byte_cpu_s` those of each byte that it sends or takes."""

    name: str
    address: str  # host:port
    memory_bytes: int = 0  # 0: no limit
    device: str = "cpu"
    threads: int = 1
    reference_s: float = 0.0
    machine: str = ""
    cores: float = 0.0
    processor: str = ""
    stage_s: float = 0.0
    message_s: float = 0.0
    request_s: float = 0.0
    stage_cpu_s: float = 0.0
    message_cpu_s: float = 0.0
    request_cpu_s: float = 0.0
    byte_cpu_s: float = 0.0
    codecs: tuple[CodecSpeed, ...] = ()

    @property
    def box(self) -> str:
        """The same for nodes in one case, whose caches and memory they share; empty where it is not known."""
        return self.machine.partition("/")[0]


def equal_devices(a: ClusterNode, b: ClusterNode) -> bool:
    """Whether what is measured on one holds for the other: one kind of processor, as many threads with as much time for them, and nearly one speed."""
    kinds = [(n.processor, n.device, n.threads, min(n.cores or n.threads, n.threads)) for n in (a, b)]
    return bool(a.processor) and kinds[0] == kinds[1] and same_speed(a.reference_s, b.reference_s)


def same_speed(a_s: float, b_s: float) -> bool:
    """Whether two times of the reference kernel are those of equal devices; one that is not known equals none."""
    return a_s > 0 and b_s > 0 and abs(a_s - b_s) <= _SAME_SPEED * min(a_s, b_s)


@dataclass(frozen=True, slots=True)
class Link:
    """A directed pair of nodes."""

    source: str
    target: str
    bandwidth_bytes_per_s: float
    latency_s: float  # one way
    jitter_s: float = 0.0  # median deviation of a round trip

    def seconds(self, size_bytes: float) -> float:
        """The time that a message of this size takes: latency + bytes / bandwidth. Nothing to send takes no time."""
        return self.latency_s + size_bytes / self.bandwidth_bytes_per_s if size_bytes else 0.0


@dataclass(frozen=True, slots=True)
class ClusterCredentials:
    """How to speak to the nodes: by the certificate in `directory` (relative to the cluster file), or, with `insecure`, in plaintext."""

    directory: str = ""
    insecure: bool = False


@dataclass(frozen=True)
class Cluster:
    nodes: tuple[ClusterNode, ...]
    links: tuple[Link, ...] = ()
    credentials: ClusterCredentials = field(default_factory=ClusterCredentials)

    def __post_init__(self) -> None:
        if not self.nodes:
            raise BadCluster("the cluster has no node", remedy="add a [[nodes]] table, or run `splitnet probe --node HOST:PORT`")
        names = [node.name for node in self.nodes]
        for name in names:
            if not name:
                raise BadCluster("a node has no name")
            if names.count(name) > 1:
                raise BadCluster(f"node {name!r} stands twice in the cluster")
        for node in self.nodes:
            host, _, port = node.address.rpartition(":")
            if not host or not port.isdigit() or not 0 < int(port) < 65536:
                raise BadCluster(f"node {node.name!r}: address {node.address!r} is not HOST:PORT")
            figures = ("memory_bytes", "reference_s", "cores", *OVERHEADS)
            if wrong := [f for f in figures if not 0 <= getattr(node, f) < math.inf]:
                raise BadCluster(f"node {node.name!r}: {wrong[0]} must be finite and must not be negative, got {getattr(node, wrong[0])}")
            if node.threads < 1:
                raise BadCluster(f"node {node.name!r}: expected threads at least 1, got {node.threads}")
            for codec in node.codecs:
                if not (codec.encode_bytes_per_s > 0 and codec.decode_bytes_per_s > 0 and codec.ratio > 0):
                    raise BadCluster(f"node {node.name!r}: codec {codec.name!r}: speeds and ratio must be positive")
        seen = set()
        for link in self.links:
            pair = (link.source, link.target)
            where = f"link {link.source!r} -> {link.target!r}"
            if missing := [end for end in pair if end not in names]:
                raise BadCluster(f"{where}: no node {missing[0]!r} in the cluster")
            if pair in seen or link.source == link.target:
                raise BadCluster(f"{where}: " + ("stands twice" if pair in seen else "joins a node to itself"))
            if not (link.bandwidth_bytes_per_s > 0 and link.latency_s >= 0 and math.isfinite(link.latency_s)):
                raise BadCluster(
                    f"{where}: bandwidth_bytes_per_s must be positive and latency_s not negative, got {link.bandwidth_bytes_per_s}, {link.latency_s}"
                )
            seen.add(pair)

    def node(self, name: str) -> ClusterNode:
        for node in self.nodes:
            if node.name == name:
                return node
        raise BadCluster(f"no node {name!r} in the cluster; it has {', '.join(n.name for n in self.nodes)}")

    def link(self, source: str, target: str) -> Link | None:
        """The link between two nodes, or None where they cannot reach each other."""
        for link in self.links:
            if (link.source, link.target) == (source, target):
                return link
        return None

    def shared_machines(self) -> dict[str, tuple[ClusterNode, ...]]:
        """Machines with several nodes: what these nodes do comes out of the same processors."""
        found: dict[str, list[ClusterNode]] = {}
        for node in self.nodes:
            if node.machine and node.cores:
                found.setdefault(node.machine, []).append(node)
        return {m: tuple(on) for m, on in found.items() if len(on) > 1}

    @classmethod
    def load(cls, path: str | Path) -> Cluster:
        """Raises BadCluster with the path and the place of the fault."""
        try:
            document = tomllib.loads(Path(path).read_text())
        except OSError as error:
            raise BadCluster(
                f"cannot read the cluster file {str(path)!r}: {error.strerror}", remedy="make one with `splitnet probe`"
            ) from None
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise BadCluster(f"{path}: not TOML: {error}") from None
        try:
            cluster = cls.from_document(document)
        except BadCluster as error:
            error.message = f"{path}: {error.message}"
            raise
        cluster.make_known(Path(path).parent)
        return cluster

    def make_known(self, base: Path = Path()) -> None:
        """From now on this process speaks to these addresses by these credentials, and expects the nodes of these names there. `base`: what `credentials.directory` is
        relative to."""
        given = self.credentials
        access = INSECURE if given.insecure else str(base / Path(given.directory).expanduser()) if given.directory else None
        for node in self.nodes:
            know_address(node.address, access, node.name)

    @classmethod
    def from_document(cls, document: Mapping[str, Any]) -> Cluster:
        if unknown := sorted(set(document) - {"nodes", "links", "credentials"}):
            raise BadCluster(f"unknown key {unknown[0]!r}; expected [[nodes]], [[links]] and [credentials]")
        return cls(
            nodes=tuple(_record(ClusterNode, d, f"nodes[{i}]") for i, d in enumerate(_tables(document, "nodes"))),
            links=tuple(_record(Link, d, f"links[{i}]") for i, d in enumerate(_tables(document, "links"))),
            credentials=_record(ClusterCredentials, document.get("credentials", {}), "credentials"),
        )

    def to_toml(self) -> str:
        def table(record: Any) -> dict[str, Any]:
            found = {f.name: getattr(record, f.name) for f in fields(record)}
            if "codecs" in found:
                found["codecs"] = [table(codec) for codec in found["codecs"]]
            return found

        credentials = {} if self.credentials == ClusterCredentials() else {"credentials": table(self.credentials)}
        return tomli_w.dumps({**credentials, "nodes": [table(n) for n in self.nodes], "links": [table(link) for link in self.links]})

    def save(self, path: str | Path) -> None:
        save_document(path, self.to_toml())


def _tables(document: Mapping[str, Any], key: str) -> list[Any]:
    tables = document.get(key, [])
    if not isinstance(tables, list):
        raise BadCluster(f"{key}: expected tables [[{key}]], got {type(tables).__name__}")
    return tables


def _record(cls: type[Any], d: Any, at: str) -> Any:
    if not isinstance(d, Mapping):
        raise BadCluster(f"{at}: expected a table, got {type(d).__name__}")
    expected = {"str": str, "int": int, "float": float, "bool": bool}
    kinds = {f.name: str(f.type) for f in fields(cls)}
    values = dict(d)
    if "codecs" in d and "codecs" in kinds:
        values["codecs"] = tuple(_record(CodecSpeed, c, f"{at}.codecs[{i}]") for i, c in enumerate(_tables(d, "codecs")))
    for key, value in d.items():
        if key not in kinds:
            raise BadCluster(f"{at}: unknown key {key!r}; it may have {', '.join(kinds)}")
        if key == "codecs":
            continue
        ok = isinstance(value, expected[kinds[key]]) or (kinds[key] == "float" and isinstance(value, int))
        if not ok or (isinstance(value, bool) and kinds[key] != "bool"):
            raise BadCluster(f"{at}.{key}: expected {kinds[key]}, got {value!r}")
    try:
        return cls(**values)
    except TypeError as error:
        raise BadCluster(f"{at}: {error}") from None

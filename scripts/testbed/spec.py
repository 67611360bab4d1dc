"""A testbed as a TOML file describes it. See docs/testbed.md for all keys."""

from __future__ import annotations

import math
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from nodes.config import NodeConfig, parse_bytes
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import BadInput
from testbed.shaping import UNSHAPED, LinkShape

__all__ = ["CLIENT", "CLIENT_NAME", "BedSpec", "NodeSpec", "load", "parse", "preset_names"]

PRESETS = Path(__file__).parent / "presets"
CLIENT = ""  #: the client's side of a link, as the relay knows it
CLIENT_NAME = "client"  #: and as a file names it
SHAPINGS = ("relay", "kernel")
_BYTES_PER_MBIT = 1e6 / 8
_NOMINAL = Link("", "", 1e9, 1e-4)  # loopback, as far as a plan needs to know
_SHAPE_KEYS = {"bandwidth_mbit_per_s", "latency_ms", "jitter_ms", "burst_kib"}


@dataclass(frozen=True, slots=True)
class NodeSpec:
    """`cpu`: processors' worth of time, 0: as much as there is. `memory_bytes`: the node's --memory, 0: no limit."""

    name: str
    cpu: float = 0.0
    threads: int = 1
    memory_bytes: int = 0


@dataclass(frozen=True)
class BedSpec:
    """`links` are directed; a pair that is not there has the `default` shape. The client stands at the node `client_at` and has that
    node's links; with "" its way to every node is unshaped. A link that names the client goes before both."""

    nodes: tuple[NodeSpec, ...]
    links: Mapping[tuple[str, str], LinkShape] = field(default_factory=dict)
    default: LinkShape = UNSHAPED
    client_at: str = ""
    shaping: str = "relay"
    description: str = ""

    @property
    def names(self) -> tuple[str, ...]:
        return tuple(node.name for node in self.nodes)

    @property
    def cores(self) -> float:
        """What the nodes with a share may use together."""
        return math.fsum(node.cpu for node in self.nodes)

    def shape(self, source: str, target: str) -> LinkShape:
        """The shape of a directed link; CLIENT stands for the client."""
        if (source, target) in self.links:
            return self.links[source, target]
        if CLIENT in (source, target):
            at = [self.client_at if end == CLIENT else end for end in (source, target)]
            return UNSHAPED if not self.client_at or at[0] == at[1] else self.shape(*at)
        return self.default

    def pairs(self) -> list[tuple[str, str]]:
        """All directed links, those of the client included."""
        ends = (CLIENT, *self.names)
        return [(a, b) for a in ends for b in ends if a != b]

    def at_bandwidth(self, bytes_per_s: float) -> BedSpec:
        """The same with this bandwidth on every link that is shaped."""

        def changed(shape: LinkShape) -> LinkShape:
            return shape if shape == UNSHAPED else replace(shape, bandwidth_bytes_per_s=bytes_per_s)

        return replace(self, links={pair: changed(shape) for pair, shape in self.links.items()}, default=changed(self.default))

    def cluster(self, addresses: Mapping[str, str]) -> Cluster:
        """What a cluster file says of it, with the links' configured figures (those of loopback where a link is unshaped)."""
        links = []
        for a, b in self.pairs():
            if CLIENT in (a, b):
                continue
            shape = self.shape(a, b)
            bandwidth = min(shape.bandwidth_bytes_per_s, _NOMINAL.bandwidth_bytes_per_s)
            links.append(Link(a, b, bandwidth, shape.latency_s + shape.jitter_s / 2 or _NOMINAL.latency_s))
        nodes = tuple(ClusterNode(n.name, addresses[n.name], n.memory_bytes, threads=n.threads) for n in self.nodes)
        return Cluster(nodes, tuple(links))


def preset_names() -> list[str]:
    return sorted(path.stem for path in PRESETS.glob("*.toml"))


def load(file: str) -> BedSpec:
    """A file, or a preset by its name. Raises BadInput with the file and the place of the fault."""
    path = PRESETS / f"{file}.toml" if file in preset_names() else Path(file)
    try:
        document = tomllib.loads(path.read_text())
    except OSError as error:
        raise BadInput(
            f"cannot read the testbed file {file!r}: {error.strerror}", remedy=f"or take a preset: {', '.join(preset_names())}"
        ) from None
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise BadInput(f"{path}: not TOML: {error}") from None
    try:
        return parse(document)
    except BadInput as error:
        error.message = f"{path}: {error.message}"
        raise


def parse(document: Mapping[str, Any]) -> BedSpec:
    """Raises BadInput with the place of the fault."""
    _check_keys(document, {"description", "shaping", "nodes", "links", "default_link", "client"}, "the file")
    nodes = tuple(_node(table, f"nodes[{i}]") for i, table in enumerate(_tables(document, "nodes")))
    names = [node.name for node in nodes]
    if not nodes:
        raise BadInput("a testbed needs nodes", remedy="add a [[nodes]] table with a name")
    if twice := [name for name in names if names.count(name) > 1]:
        raise BadInput(f"node {twice[0]!r} stands twice in the file")
    shaping = document.get("shaping", "relay")
    if shaping not in SHAPINGS:
        raise BadInput(f"shaping: expected one of {', '.join(SHAPINGS)}, got {shaping!r}")
    client = _table(document.get("client", {}), "client")
    _check_keys(client, {"at"}, "client")
    client_at = client.get("at", "")
    if client_at and client_at not in names:
        raise BadInput(f"client.at: no node {client_at!r}; there are {', '.join(names)}")
    default = _table(document.get("default_link", {}), "default_link")
    _check_keys(default, _SHAPE_KEYS, "default_link")
    return BedSpec(
        nodes=nodes,
        links=_links(_tables(document, "links"), names),
        default=_shape(default, "default_link") if default else UNSHAPED,
        client_at=client_at,
        shaping=shaping,
        description=str(document.get("description", "")),
    )


def _node(value: Any, at: str) -> NodeSpec:
    table = _table(value, at)
    _check_keys(table, {"name", "cpu", "threads", "memory"}, at)
    name = table.get("name")
    if not isinstance(name, str) or not name:
        raise BadInput(f"{at}.name: missing")
    if name == CLIENT_NAME:
        raise BadInput(f"{at}.name: {CLIENT_NAME!r} stands for whoever sends requests", remedy="choose another name")
    threads = table.get("threads", 1)
    if not isinstance(threads, int) or isinstance(threads, bool):
        raise BadInput(f"{at}.threads: expected a whole number, got {threads!r}")
    memory = table.get("memory", "0")
    try:
        memory_bytes = parse_bytes(str(memory))
        NodeConfig(listen="127.0.0.1:0", name=name, threads=threads)  # what the node itself would say
    except BadInput as error:
        raise BadInput(f"{at}: {error.message}", remedy=error.remedy) from None
    return NodeSpec(name, _figure(table, "cpu", at, 0.0, positive=True), threads, memory_bytes)


def _links(tables: Sequence[Any], names: Sequence[str]) -> dict[tuple[str, str], LinkShape]:
    """`between` gives both directions, `from` and `to` one, which goes before."""
    both: dict[tuple[str, str], LinkShape] = {}
    one_way: dict[tuple[str, str], LinkShape] = {}
    for i, value in enumerate(tables):
        at = f"links[{i}]"
        table = _table(value, at)
        _check_keys(table, {"between", "from", "to", *_SHAPE_KEYS}, at)
        shape = _shape(table, at)
        if "between" in table and not {"from", "to"} & set(table):
            ends, found = table["between"], both
        elif "between" not in table and {"from", "to"} <= set(table):
            ends, found = [table["from"], table["to"]], one_way
        else:
            raise BadInput(f'{at}: expected between = ["a", "b"], or from = "a" and to = "b"')
        if not (isinstance(ends, list) and len(ends) == 2 and ends[0] != ends[1]):
            raise BadInput(f"{at}: a link joins two different nodes, got {ends!r}")
        for end in ends:
            if end not in (*names, CLIENT_NAME):
                raise BadInput(f"{at}: no node {end!r}; there are {', '.join(names)}, and {CLIENT_NAME}")
        a, b = (CLIENT if end == CLIENT_NAME else end for end in ends)
        for pair in ((a, b), (b, a)) if found is both else ((a, b),):
            if pair in found:
                raise BadInput(f"{at}: the link {ends[0]!r} -> {ends[1]!r} stands twice in the file")
            found[pair] = shape
    return {**both, **one_way}


def _shape(table: Mapping[str, Any], at: str) -> LinkShape:
    bandwidth = _figure(table, "bandwidth_mbit_per_s", at, math.inf, positive=True) * _BYTES_PER_MBIT
    seconds = [_figure(table, key, at, 0.0) / 1e3 for key in ("latency_ms", "jitter_ms")]
    return LinkShape(bandwidth, *seconds, burst_bytes=_figure(table, "burst_kib", at, 0.0) * 1024)


def _figure(table: Mapping[str, Any], key: str, at: str, missing: float, *, positive: bool = False) -> float:
    if key not in table:
        return missing
    value = table[key]
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise BadInput(f"{at}.{key}: expected a number, got {value!r}")
    if not math.isfinite(value) or value < 0 or (positive and not value):
        raise BadInput(f"{at}.{key}: expected a number {'above 0' if positive else 'of at least 0'}, got {value}")
    return float(value)


def _tables(document: Mapping[str, Any], key: str) -> list[Any]:
    value = document.get(key, [])
    if not isinstance(value, list):
        raise BadInput(f"{key}: expected tables [[{key}]], got {type(value).__name__}")
    return value


def _table(value: Any, at: str) -> Mapping[str, Any]:
    if not isinstance(value, Mapping):
        raise BadInput(f"{at}: expected a table, got {type(value).__name__}")
    return value


def _check_keys(table: Mapping[str, Any], known: set[str], at: str) -> None:
    if unknown := sorted(set(table) - known):
        raise BadInput(f"{at}: unknown key {unknown[0]!r}; it may have {', '.join(sorted(known))}")

"""What a node may be told: one frozen dataclass, checked when it is made. The command's flags read their defaults from it."""

from __future__ import annotations

import math
import os
import re
import socket
from dataclasses import dataclass, field
from pathlib import Path

from nodes.engines import REFERENCE, engine_choices
from splitnet import wire
from splitnet.errors import BadInput, NotPermitted
from splitnet.heartbeat import Heartbeat
from splitnet.security.addresses import is_loopback

__all__ = ["LOG_LEVELS", "NodeConfig", "default_data_dir", "parse_bytes"]

LOG_LEVELS = ("debug", "info", "warning", "error")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_BYTES = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?\Z", re.IGNORECASE)
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}


@dataclass(frozen=True)
class NodeConfig:
    """Raises BadInput for a value that cannot be, NotPermitted for plaintext on an address that others reach."""

    listen: str = "127.0.0.1:7001"  #: HOST:PORT; port 0 takes a free one
    name: str = field(default_factory=lambda: _own_name())
    memory_bytes: int = 0  #: what all active stages may reserve; 0: no limit
    data_dir: Path | None = None  #: where shards are kept; None: the user's data directory, under the node's name
    threads: int = field(default_factory=lambda: _processors())  #: intra-op threads of the engines
    engine: str = REFERENCE  #: one of `nodes.engines.engine_choices`
    max_tensor_bytes: int = wire.MAX_TENSOR_BYTES
    buffer_bytes: int = 2 << 30  #: tensors of all requests held here at one time: received, waiting, to be sent
    request_s: float = 600.0  #: what a request may take that came without a deadline, and at most
    drain_s: float = 10.0  #: what requests in flight may still take when the node is asked to stop
    heartbeat: Heartbeat = field(default_factory=Heartbeat)
    recovery_s: float = 0.0  #: how long requests wait for a lost node to come back, where nothing else can take its place
    restore: bool = True  #: serve again what was served here before, from disk; False: begin with nothing, and forget it
    sessions: int = 0  #: requests at once that all deployments may reserve here; 0: no limit
    insecure: bool = False
    certs: Path | None = None  #: the folder with this node's certificate; None: plaintext
    log_level: str = "info"
    log_json: bool = False
    announce: Path | None = None  #: the address is written here once the node serves

    def __post_init__(self) -> None:
        _, port = self.host_and_port
        if self.open_plaintext and not self.insecure:
            raise NotPermitted(
                f"--listen {self.listen}: this address can be reached from other machines, and whoever reaches it may run models here: "
                "the connection is neither encrypted nor authenticated",
                remedy="give it certificates (`splitnet certs init`, `splitnet certs issue NAME --address HOST`, then --certs DIR here), or listen on 127.0.0.1, "
                "or give --insecure if you trust everybody on that network",
            )
        if port > 65535:
            raise BadInput(
                f"--listen {self.listen}: port {port} does not exist", remedy="choose one from 1 to 65535, or 0 for any free one"
            )
        if not _NAME.match(self.name):
            raise BadInput(f"--name {self.name!r}: expected 1 to 63 letters, digits, '.', '_' or '-'", remedy="choose another name")
        if self.engine not in engine_choices():
            raise BadInput(f"--engine {self.engine!r} is not one of {', '.join(engine_choices())}")
        if self.log_level not in LOG_LEVELS:
            raise BadInput(f"--log-level {self.log_level!r} is not one of {', '.join(LOG_LEVELS)}")
        lowest = {
            "memory_bytes": 0,
            "threads": 1,
            "max_tensor_bytes": 1,
            "buffer_bytes": 1,
            "request_s": 0,
            "drain_s": 0,
            "recovery_s": 0,
            "sessions": 0,
        }
        for name, least in lowest.items():
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= least):
                raise BadInput(f"{name} must be at least {least}, got {value}")

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, separator, port = self.listen.rpartition(":")
        if not separator or not host or not port.isdigit():
            raise BadInput(f"--listen {self.listen!r} is not HOST:PORT", remedy="for example 127.0.0.1:7001, or [::1]:7001")
        return host.strip("[]"), int(port)

    @property
    def directory(self) -> Path:
        return self.data_dir if self.data_dir is not None else default_data_dir(self.name)

    @property
    def open_plaintext(self) -> bool:
        """Whether others can reach this node without encryption."""
        return self.certs is None and not is_loopback(self.host_and_port[0])


def parse_bytes(text: str) -> int:
    """ "2GiB", "512 MiB", "1.5G" or "1000000" as a number of bytes; the prefixes are powers of 1024. Raises BadInput."""
    match = _BYTES.match(text.strip())
    if match is None:
        raise BadInput(f"{text!r} is not a size", remedy="for example 512MiB or 2GiB")
    return int(float(match[1]) * (1 << _SHIFT[(match[2] or "").lower().rstrip("i")]))


def default_data_dir(name: str) -> Path:
    """Where this user's nodes of that name keep their shards (XDG Base Directory Specification)."""
    base = os.environ.get("XDG_DATA_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".local" / "share") / "splitnet" / name


def _own_name() -> str:
    name = socket.gethostname().partition(".")[0]
    return name if _NAME.match(name) else "node"


def _processors() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1

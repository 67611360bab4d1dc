"""Several real nodes on this machine, for tests, benchmarks and the demo."""

from __future__ import annotations

import asyncio
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from nodes.config import NodeConfig
from nodes.logs import get_log
from nodes.server import NodeServer
from splitnet.cluster import Cluster, ClusterNode, Link
from splitnet.errors import BadInput, NodeUnavailable
from splitnet.security.addresses import PLAINTEXT, forget_address, know_address

__all__ = ["LocalCluster"]

_START_S = 30.0
_STOP_S = 15.0
_LOOPBACK_BYTES_PER_S, _LOOPBACK_S = 1e9, 1e-4  # nominal; `splitnet probe` measures
T = TypeVar("T")


class LocalCluster:
    """`n` nodes on loopback, each on a free port and with a data directory of its own, gone when the block is left.

        with LocalCluster(3) as cluster:
            splitnet.deploy(plan, shards)            # the plan's nodes are cluster.cluster()'s

    In this process by default (fast; they share its threads and its GIL), else `processes=True`. `options` are fields of NodeConfig
    for every node. `certs`: the folder of an authority, in which each node finds its own by its name; else plaintext. `quiet=False` lets nodes in this process log to standard error; those of their own write to `log(name)`.
    """

    def __init__(
        self,
        n: int,
        *,
        names: Sequence[str] = (),
        memory_bytes: int | Sequence[int] = 0,
        threads: int = 1,
        processes: bool = False,
        quiet: bool = True,
        certs: Path | None = None,
        **options: Any,
    ) -> None:
        self.names = tuple(names) or tuple(_letters(i) for i in range(n))
        if len(self.names) != n or len(set(self.names)) != n:
            raise BadInput(f"{n} nodes need {n} different names, got {', '.join(self.names)}")
        limits = [memory_bytes] * n if isinstance(memory_bytes, int) else list(memory_bytes)
        if len(limits) != n:
            raise BadInput(f"{n} nodes need {n} memory limits, got {len(limits)}")
        self._limits = dict(zip(self.names, limits, strict=True))
        self._threads = threads
        self._options = options
        self._quiet = quiet
        self._certs = certs
        self._nodes: dict[str, _Node] = {}
        self._processes = processes
        self._directory = Path()

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="splitnet-cluster-"))
        if not self._processes:
            self._loop = _LoopThread()
        try:
            started = [self._new(name) for name in self.names]
            self._nodes = dict(zip(self.names, started, strict=True))
            for name, node in self._nodes.items():
                node.wait()
                forget_address(node.address)  # of an earlier cluster
                if self._certs is None:
                    know_address(node.address, PLAINTEXT, name)  # whatever credentials this process has
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        for node in self._nodes.values():
            node.ask_to_stop()
        for node in self._nodes.values():
            node.stop()
            forget_address(node.address)
        if not self._processes:
            self._loop.close()
        shutil.rmtree(self._directory, ignore_errors=True)

    @property
    def addresses(self) -> dict[str, str]:
        return {name: node.address for name, node in self._nodes.items()}

    def cluster(self) -> Cluster:
        """As a cluster file would describe it, with nominal figures for the links."""
        nodes = tuple(ClusterNode(name, node.address, self._limits[name], threads=self._threads) for name, node in self._nodes.items())
        links = tuple(Link(a, b, _LOOPBACK_BYTES_PER_S, _LOOPBACK_S) for a in self.names for b in self.names if a != b)
        return Cluster(nodes, links)

    def config(self, name: str) -> NodeConfig:
        own = {
            "listen": "127.0.0.1:0",
            "name": name,
            "memory_bytes": self._limits[name],
            "threads": self._threads,
            "data_dir": self._directory / name,
            "certs": None if self._certs is None else self._certs / name,
        }
        return NodeConfig(**{**own, **self._options})

    def pid(self, name: str) -> int:
        return self._process(name).pid

    def log(self, name: str) -> str:
        """What a node of its own process has written."""
        return self._process(name).log()

    def server(self, name: str) -> NodeServer:
        """A node in this process; to be looked at, from another thread than its own."""
        node = self._nodes[name]
        assert isinstance(node, _InProcess), "this node is a process of its own"
        return node.server

    def alive(self, name: str) -> bool:
        return self._nodes[name].running

    def kill(self, name: str) -> None:
        """As if its plug were pulled (SIGKILL). A node in this process closes its connections at once."""
        self._nodes[name].kill()

    def terminate(self, name: str) -> None:
        """SIGTERM: it drains. Returns at once; `wait_stopped` waits."""
        self._process(name).ask_to_stop()

    def wait_stopped(self, name: str, timeout_s: float = _STOP_S) -> int:
        """The exit status."""
        return self._process(name).wait_stopped(timeout_s)

    def restart(self, name: str) -> None:
        """Starts a node again that was killed or stopped: same address, same data."""
        address = self._nodes[name].address
        self._nodes[name] = self._new(name, address)
        self._nodes[name].wait()

    def _new(self, name: str, listen: str = "") -> _Node:
        config = self.config(name)
        if listen:
            config = replace(config, listen=listen)
        return _OwnProcess(config, self._directory) if self._processes else _InProcess(config, self._loop, self._quiet)

    def _process(self, name: str) -> _OwnProcess:
        node = self._nodes[name]
        assert isinstance(node, _OwnProcess), "needs LocalCluster(..., processes=True)"
        return node


class _Node:
    address = ""

    @property
    def running(self) -> bool:
        raise NotImplementedError

    def wait(self) -> None:
        """Until it serves."""
        raise NotImplementedError

    def kill(self) -> None:
        raise NotImplementedError

    def ask_to_stop(self) -> None:
        raise NotImplementedError

    def stop(self) -> None:
        raise NotImplementedError


class _LoopThread:
    """An event loop in a thread of its own."""

    def __init__(self) -> None:
        self.loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self.loop.run_forever, name="splitnet-cluster", daemon=True)
        self._thread.start()

    def run(self, work: Coroutine[Any, Any, T], timeout_s: float = _START_S) -> T:
        return asyncio.run_coroutine_threadsafe(work, self.loop).result(timeout_s)

    def close(self) -> None:
        async def finish() -> None:
            tasks = asyncio.all_tasks() - {asyncio.current_task()}
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            await self.loop.shutdown_default_executor()

        self.run(finish())
        self.loop.call_soon_threadsafe(self.loop.stop)
        self._thread.join()
        self.loop.close()


class _InProcess(_Node):
    def __init__(self, config: NodeConfig, loop: _LoopThread, quiet: bool) -> None:
        self._loop = loop
        self._running = False
        self.server = NodeServer(config, get_log(config.name, quiet=quiet))
        loop.run(self.server.start())
        self._running = True
        self.address = self.server.address

    @property
    def running(self) -> bool:
        return self._running

    def wait(self) -> None:
        pass

    def kill(self) -> None:
        self._loop.run(self.server.abandon())
        self._running = False

    def ask_to_stop(self) -> None:
        pass

    def stop(self) -> None:
        if self._running:
            self._loop.run(self.server.stop())
            self._running = False
        self.server.has_ended(_STOP_S)  # else torch's thread may outlive the interpreter


class _OwnProcess(_Node):
    def __init__(self, config: NodeConfig, directory: Path) -> None:
        self._name = config.name
        self._announce = directory / f"{config.name}.address"
        self._announce.unlink(missing_ok=True)
        self._log = directory / f"{config.name}.log"
        command = [sys.executable, "-m", "nodes", *_flags(replace(config, announce=self._announce))]
        with self._log.open("ab") as log:
            self._process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return self._process.poll() is None

    def log(self) -> str:
        return self._log.read_text(errors="replace")

    def wait(self) -> None:
        _until(lambda: self._announce.exists() or self._process.poll() is not None, _START_S)
        if not self._announce.exists():
            self.kill()
            raise NodeUnavailable(f"node {self._name!r} did not start; its log:\n{self.log()}")
        self.address = self._announce.read_text().strip()

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()

    def ask_to_stop(self) -> None:
        if self._process.poll() is None:
            self._process.send_signal(signal.SIGTERM)

    def wait_stopped(self, timeout_s: float) -> int:
        return self._process.wait(timeout_s)

    def stop(self) -> None:
        try:
            self._process.wait(_STOP_S)
        except subprocess.TimeoutExpired:
            self.kill()


def _flags(config: NodeConfig) -> list[str]:
    """The command line that makes this configuration."""
    flags: dict[str, object] = {
        "--listen": config.listen,
        "--name": config.name,
        "--memory": config.memory_bytes,
        "--data": config.directory,
        "--threads": config.threads,
        "--engine": config.engine,
        "--max-tensor": config.max_tensor_bytes,
        "--buffer": config.buffer_bytes,
        "--drain": config.drain_s,
        "--heartbeat": config.heartbeat.period_s,
        "--patience": config.heartbeat.patience_s,
        "--recovery": config.recovery_s,
        "--sessions": config.sessions,
        "--log-level": config.log_level,
        "--announce": config.announce,
    }
    if config.certs is not None:
        flags["--certs"] = config.certs
    return [str(part) for flag in flags.items() for part in flag] + ([] if config.restore else ["--no-restore"])


def _until(condition: Callable[[], bool], timeout_s: float) -> None:
    deadline = time.monotonic() + timeout_s
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)


def _letters(i: int) -> str:
    """a, b, ... z, node27, ..."""
    return chr(ord("a") + i) if i < 26 else f"node{i + 1}"

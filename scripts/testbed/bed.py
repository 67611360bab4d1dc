"""A testbed that runs: node processes, their shares, and what carries their bytes."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from splitnet.cluster import Cluster, ClusterCredentials
from splitnet.errors import BadInput, NodeUnavailable
from splitnet.security.addresses import INSECURE, know_address
from testbed import cpu
from testbed.kernel import KernelNetwork, check_kernel
from testbed.shaping import UNSHAPED, LinkShape
from testbed.spec import CLIENT, BedSpec, NodeSpec

__all__ = ["RelayProcess", "Testbed"]

_START_S = 60.0
_STOP_S = 15.0
_SCRIPTS = Path(__file__).resolve().parent.parent
_LAUNCH = Path(__file__).with_name("launch.py")
_SPARE_CORES = 0.2  # for the relay and the client


class RelayProcess:
    """The relay in a process of its own; ends with the block, and with this process."""

    def __init__(self, log: Path) -> None:
        path = os.pathsep.join([str(_SCRIPTS), *filter(None, [os.environ.get("PYTHONPATH")])])
        with log.open("wb") as errors:
            self._process = subprocess.Popen(
                [*_launched(None), sys.executable, "-m", "testbed.relay"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=errors, env={**os.environ, "PYTHONPATH": path},
                start_new_session=True,  # Ctrl-C in a terminal is for whoever runs the testbed, who then stops this in order
            )  # fmt: skip
        self._log = log
        self.priority = str(self._answer()["priority"])

    def listen(self, targets: list[str]) -> dict[str, str]:
        """The relay's address for each target."""
        return {str(name): str(address) for name, address in self._ask("listen", targets).items()}

    def connect(self, addresses: Mapping[str, str], pids: Mapping[str, int]) -> None:
        """Where the targets really are, and which processes the nodes are."""
        self._ask("connect", {"addresses": dict(addresses), "pids": dict(pids)})

    def set_links(self, shapes: Mapping[tuple[str, str], LinkShape]) -> None:
        """From now on, until they are set again."""
        self._ask(
            "links",
            [
                {
                    "source": a,
                    "target": b,
                    "bandwidth_bytes_per_s": shape.bandwidth_bytes_per_s,
                    "latency_s": shape.latency_s,
                    "jitter_s": shape.jitter_s,
                    "burst_bytes": shape.burst_bytes,
                }
                for (a, b), shape in shapes.items()
            ],
        )

    def set_overhead(self, overhead_s: float) -> None:
        """What the way through the relay takes by itself, one way: taken off every link's latency."""
        self._ask("overhead_s", overhead_s)

    def report(self) -> dict[str, Any]:
        """carried_bytes by "a->b", accepted connections likewise, the links that are delayed now, cpu_s of the relay."""
        return self._ask("report", None)

    def _ask(self, verb: str, argument: Any) -> dict[str, Any]:
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps({verb: argument}).encode() + b"\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            pass  # its log says why, below
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout is not None
        line = self._process.stdout.readline()
        if not line:
            raise NodeUnavailable(f"the testbed's relay has ended:\n{self._log.read_text(errors='replace')[-2000:]}")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def close(self) -> None:
        assert self._process.stdin is not None
        assert self._process.stdout is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()
        _end(self._process)
        self._process.stdout.close()


class Testbed:
    """The nodes of `spec` as processes, from entering the block to leaving it.

        with Testbed(load("two-tier")) as bed:
            cluster = bed.cluster()                       # their addresses, and the links as configured

    `notes` says what of the file could not be had on this machine. Raises BadInput for what this machine cannot do at all,
    NodeUnavailable, with its log, for a node that does not start. Nothing is left behind, also when this process is killed: the
    nodes get SIGTERM from the kernel, the relay sees its input end (of the control groups, empty directories stay then).
    """

    __test__ = False  # not a test class, whatever its name

    def __init__(self, spec: BedSpec) -> None:
        self.spec = spec
        self.notes: list[str] = []
        self.addresses: dict[str, str] = {}
        self.relay: RelayProcess | None = None  #: what shapes the links, unless the kernel does
        self._network: KernelNetwork | None = None
        self._processes: dict[str, subprocess.Popen[bytes]] = {}
        self._shares: dict[str, cpu.Share] = {}
        self._home: dict[str, int] = {}
        self._stack = contextlib.ExitStack()

    def __enter__(self) -> Self:
        if self.spec.shaping == "kernel":
            check_kernel(self.spec)
        with contextlib.ExitStack() as stack:
            self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="splitnet-testbed-")))
            self._shares = self._give_shares(stack)
            self._home = cpu.homes({node.name: node.cpu for node in self.spec.nodes if node.name in self._shares and node.threads == 1})
            if self.spec.shaping == "kernel":
                self._network = KernelNetwork(self.spec)
                stack.callback(self._network.close)
                self.addresses = {name: self._network.address(name) for name in self.spec.names}
            else:
                self.relay = RelayProcess(self.folder / "relay.log")
                stack.callback(self.relay.close)
                self.addresses = self.relay.listen(list(self.spec.names))
                if "real-time" not in self.relay.priority:
                    self.notes.append(f"relay: {self.relay.priority}")
            stack.callback(self._stop)
            for node in self.spec.nodes:
                self._processes[node.name] = self._start(node)
            for address in self.addresses.values():
                know_address(address, INSECURE)  # the bed is all there is on its network
            actual = {node.name: self._announced(node.name) for node in self.spec.nodes}
            if self.relay is not None:
                self.relay.connect(actual, {name: process.pid for name, process in self._processes.items()})
            self.reshape(self.spec)
            credentials = ClusterCredentials(insecure=self._network is not None)
            self.cluster_file.write_text(replace(self.cluster(), credentials=credentials).to_toml())
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._stack.close()

    @property
    def _carrier(self) -> RelayProcess | KernelNetwork:
        carrier = self.relay or self._network
        assert carrier is not None, "the testbed runs within its block only"
        return carrier

    @property
    def cluster_file(self) -> Path:
        """A cluster.toml with the configured links."""
        return self.folder / "cluster.toml"

    def cluster(self) -> Cluster:
        return self.spec.cluster(self.addresses)

    def has_share(self, name: str) -> bool:
        """Whether the node is held to a share of its own."""
        return name in self._shares

    def pid(self, name: str) -> int:
        return self._processes[name].pid

    def log(self, name: str) -> str:
        return (self.folder / name / "log").read_text(errors="replace")

    def reshape(self, spec: BedSpec) -> None:
        """Other links between the same nodes, from now on."""
        self._carrier.set_links({pair: spec.shape(*pair) for pair in spec.pairs()})
        self.spec = spec

    @contextlib.contextmanager
    def free_for_clients(self) -> Iterator[None]:
        """Within the block the client's way to every node is unshaped: to ship shards, which is not what is measured."""
        ways = [pair for pair in self.spec.pairs() if CLIENT in pair]
        self._carrier.set_links(dict.fromkeys(ways, UNSHAPED))
        try:
            yield
        finally:
            self._carrier.set_links({pair: self.spec.shape(*pair) for pair in ways})

    def report(self) -> dict[str, Any]:
        """What the links have carried, and the seconds for which each node was held back to its share."""
        return {**self._carrier.report(), "throttled_s": {name: share.throttled_s() for name, share in self._shares.items()}}

    def _give_shares(self, stack: contextlib.ExitStack) -> dict[str, cpu.Share]:
        wanted = {node.name: node.cpu for node in self.spec.nodes if node.cpu}
        if not wanted:
            return {}
        there = len(os.sched_getaffinity(0))
        if self.spec.cores > there:
            raise BadInput(
                f"the nodes' shares add up to {self.spec.cores:g} processors, this machine has {there}: they would take each other's time",
                remedy="make `cpu` smaller everywhere; only their ratio matters for which plan is best",
            )
        if self.spec.cores > there - _SPARE_CORES:
            self.notes.append(
                f"the shares add up to {self.spec.cores:g} of {there} processors; with less than {_SPARE_CORES:g} left, relay and client take the nodes' time"
            )
        parent = cpu.controller()
        if isinstance(parent, str):
            names = ", ".join(f"{name} ({cores:g})" for name, cores in wanted.items())
            self.notes.append(f"CPU shares are NOT applied, every node may use all processors: {parent}; asked for: {names}")
            return {}
        return stack.enter_context(cpu.shares(wanted, parent))

    def _start(self, node: NodeSpec) -> subprocess.Popen[bytes]:
        home = self.folder / node.name
        home.mkdir()
        where, listen = [], ["--listen", "127.0.0.1:0"]
        if self._network is not None:
            where, listen = self._network.command(node.name), ["--listen", self._network.address(node.name), "--insecure"]
        command = [
            *_launched(self._shares.get(node.name), self._home.get(node.name)), *where, sys.executable, "-m", "splitnet", "node", *listen, "--name", node.name, "--threads", str(node.threads),
            "--memory", str(node.memory_bytes), "--data", str(home / "data"), "--announce", str(home / "address"), "--log-json",
        ]  # fmt: skip
        with (home / "log").open("wb") as log:
            return subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True)

    def _announced(self, name: str) -> str:
        announced, deadline = self.folder / name / "address", time.monotonic() + _START_S
        while self._processes[name].poll() is None and time.monotonic() < deadline:
            if announced.exists() and (address := announced.read_text().strip()):
                return address
            time.sleep(0.02)
        raise NodeUnavailable(f"node {name!r} did not start:\n{self.log(name)[-2000:]}", remedy="run `splitnet doctor`")

    def _stop(self) -> None:
        for process in self._processes.values():
            process.terminate()
        for process in self._processes.values():
            _end(process)


def _launched(share: cpu.Share | None, home: int | None = None) -> list[str]:
    """What stands before a command that is to run in that share, and on that processor alone; without a share, in the group around this
    process's own."""
    around = cpu.controller()
    tasks = share.tasks if share else around / "cgroup.procs" if isinstance(around, Path) else None
    return [
        sys.executable,
        str(_LAUNCH),
        *(["--group", str(tasks)] if tasks else []),
        *(["--cpu", str(home)] if home is not None else []),
        "--",
    ]


def _end(process: subprocess.Popen[bytes]) -> None:
    try:
        process.wait(_STOP_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()

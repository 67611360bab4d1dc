"""A node: its rooms put together, served on one port, and stopped without losing what is in flight."""

from __future__ import annotations

import asyncio
import signal
import sys
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import grpc
import grpc.aio
from grpc_health.v1 import health, health_pb2, health_pb2_grpc
from grpc_reflection.v1alpha import reflection

from nodes.certificates import CertificateKeeper, node_access
from nodes.compute import ComputeThread
from nodes.config import NodeConfig
from nodes.deployment import Deployment
from nodes.describe import Describer
from nodes.guard import Guard
from nodes.ingress import Ingress
from nodes.installer import Installer
from nodes.ledger import Ledger
from nodes.link import Links
from nodes.logs import Log
from nodes.pipeline import Pipeline
from nodes.records import Records
from nodes.recovery import Recovery
from nodes.restoring import Keeper, Restorer
from nodes.servicer import SERVICE, Servicer, add_to_server
from nodes.store import BlobStore
from splitnet.channel import SERVER_OPTIONS
from splitnet.errors import BadInput, NodeUnavailable, SplitnetError
from splitnet.security.addresses import Plaintext
from splitnet.security.audit import AuditLog
from splitnet.security.credentials import access_in_context

__all__ = ["NodeServer", "serve"]

_CODEC_THREADS = 2
_MAX_CALLS = 1024  # at one time, streams included
_SWITCH_INTERVAL_S = 0.0005  # the event loop must not wait 5 ms for the compute thread's Python
_LAST_BYTES_S = 0.2
_LEAVE_S = 5.0  # that clients have to read their last answers
_REMEDY = "start it again, and deploy the plan again"


class NodeServer:
    """`start`, then `stop`; in one event loop. `address` is the real one once it was started."""

    def __init__(self, config: NodeConfig, log: Log) -> None:
        self.config = config
        self.address = ""
        self._log = log

    async def start(self) -> None:
        """Raises BadInput where the address cannot be listened on, StorageFailure where the data directory cannot be used."""
        config, log = self.config, self._log
        access = await asyncio.to_thread(node_access, config)
        access_in_context(access)  # the tasks that are started here speak to other nodes by it
        store = await asyncio.to_thread(BlobStore, config.directory)
        guard = Guard(access, AuditLog(config.directory / "audit.jsonl"), log)
        self._certificates = CertificateKeeper(access, guard, log, config.directory)
        self._certificates.start()
        self._server = grpc.aio.server(interceptors=(guard,), options=SERVER_OPTIONS, maximum_concurrent_rpcs=_MAX_CALLS)
        host, _ = config.host_and_port
        try:
            if isinstance(access, Plaintext):
                bound = self._server.add_insecure_port(config.listen)
            else:
                bound = self._server.add_secure_port(config.listen, access.server_credentials())
        except RuntimeError as error:
            raise BadInput(
                f"cannot listen on {config.listen}: the port is in use, or the address is not of this machine",
                remedy="choose another with --listen; port 0 takes any free one",
            ) from error
        sys.setswitchinterval(min(sys.getswitchinterval(), _SWITCH_INTERVAL_S))
        self.compute = ComputeThread(asyncio.get_running_loop())
        self._pool = ThreadPoolExecutor(_CODEC_THREADS, thread_name_prefix="splitnet-codec")
        self.ledger = Ledger(config, log)
        pipeline = Pipeline(self.ledger, self.compute, self._pool)
        self._links = Links(self.ledger, log, config.heartbeat)
        ingress = Ingress(self.ledger, pipeline)
        installer, records = Installer(self.ledger, store, self.compute, self._links), Records(config.directory)
        self._recovery = Recovery(self.ledger, installer, ingress.advance, ingress.rejoin)
        self._servicer = Servicer(
            self.ledger, pipeline, ingress, installer, self._recovery, Describer(self.ledger, installer, self._links), store, self.compute,
            self._certificates,
        )  # fmt: skip
        self._keeper = Keeper(self.ledger, records) if config.restore else None
        installer.keeper = self._keeper
        restorer = Restorer(self.ledger, installer, records, self._check_shards, self._recovery.restored)
        if config.restore:
            await restorer.look()
        else:
            await asyncio.to_thread(records.forget)
        self._health = health.aio.HealthServicer()
        add_to_server(self._servicer, self._server)
        health_pb2_grpc.add_HealthServicer_to_server(self._health, self._server)
        reflection.enable_server_reflection((SERVICE, health.SERVICE_NAME, reflection.SERVICE_NAME), self._server)
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.SERVING)
        await self._server.start()
        self._restoring = asyncio.create_task(restorer.run(), name="restoring")
        shown = f"[{host}]" if ":" in host else host
        self.address = f"{shown}:{bound}"
        log.info("listening", address=self.address, name=config.name, data=str(config.directory), threads=config.threads)
        if not isinstance(access, Plaintext):
            log.info("mutual TLS 1.3", certificate=str(access.identity), until=access.facts.not_after.isoformat())
        if config.open_plaintext:
            log.warning("insecure: this address is open to the network, without encryption or authentication", address=self.address)

    def _check_shards(self, shards: Mapping[str, str]) -> None:
        """As for those that somebody names: signatures that were seen hold."""
        self._certificates.check_shards(shards, {})

    def serve_directly(self, deployment: Deployment) -> None:
        """Serves a deployment that was not shipped here: the node's own measurements."""
        deployment.links = {node.name: self._links.take(deployment.node, node) for node in deployment.neighbours()}
        self.ledger.families.add(deployment)

    async def drain(self) -> bool:
        """Takes nothing new, finishes what was admitted, here or at another ingress; False when `drain_s` was not enough."""
        self.ledger.draining = True
        for service in ("", SERVICE):
            await self._health.set(service, health_pb2.HealthCheckResponse.NOT_SERVING)
        self._log.info("draining", in_flight=self.ledger.in_flight(), at_most_s=self.config.drain_s)
        clock = asyncio.get_running_loop().time
        until_s = clock() + self.config.drain_s
        done = await self.ledger.leave(self.config.drain_s) and await self.ledger.idle(max(until_s - clock(), _LAST_BYTES_S))
        with suppress(TimeoutError):
            async with asyncio.timeout(max(until_s - clock(), _LAST_BYTES_S)):
                await asyncio.gather(*(client.outbox.flushed() for client in self._servicer.clients))
                if done:
                    await self._links.finish()  # handed to gRPC is not yet received
                    async with asyncio.timeout(_LEAVE_S):
                        await self._servicer.take_leave(self._stopped())
        return done

    async def stop(self) -> None:
        """Fails what is still in flight, tells everybody, and lets go of everything. What is deployed stays written down."""
        await self._stop_restoring()
        cancelled = self.ledger.fail_all(None, self._stopped)
        if cancelled:
            self._log.warning("requests failed: the node was stopped", requests=cancelled)
            await asyncio.sleep(_LAST_BYTES_S)
        await self._recovery.close()
        await self._servicer.end_streams(self._stopped().at(node=self.config.name))
        await self._links.close()
        await self._server.stop(_LAST_BYTES_S)
        await self.abandon()
        self._log.info("stopped")

    @staticmethod
    def _stopped() -> SplitnetError:
        return NodeUnavailable("the node was stopped", remedy=_REMEDY)

    def has_ended(self, timeout_s: float = _LAST_BYTES_S) -> bool:
        """After `stop`: whether no thread is left, so that the process can end in the ordinary way."""
        return self.compute.join(timeout_s)

    async def abandon(self) -> None:
        """Lets go of everything, and tells nobody."""
        await self._stop_restoring()
        await self._recovery.close()
        await self._certificates.close()
        await self._links.close()
        await self._server.stop(None)
        self.compute.stop()
        self._pool.shutdown(wait=False)

    async def _stop_restoring(self) -> None:
        self._restoring.cancel()
        await asyncio.gather(self._restoring, return_exceptions=True)
        if self._keeper is not None:
            await self._keeper.close()


async def serve(config: NodeConfig, log: Log) -> bool:
    """Until SIGTERM or SIGINT: then drains and stops. A second signal stops at once. False when the compute thread is still inside an
    operator, which nothing can interrupt."""
    server = NodeServer(config, log)
    await server.start()
    signals: asyncio.Queue[int] = asyncio.Queue()
    loop = asyncio.get_running_loop()
    for number in (signal.SIGTERM, signal.SIGINT):
        loop.add_signal_handler(number, signals.put_nowait, number)
    if config.announce is not None:
        await asyncio.to_thread(_announce, config.announce, server.address)
    log.info("stopping", signal=signal.Signals(await signals.get()).name)
    draining = asyncio.create_task(server.drain())
    second = asyncio.create_task(signals.get())
    await asyncio.wait((draining, second), return_when=asyncio.FIRST_COMPLETED)
    for task in (draining, second):
        task.cancel()
    await asyncio.gather(draining, second, return_exceptions=True)
    await server.stop()
    return server.has_ended()


def _announce(path: Path, address: str) -> None:
    """Whole or not at all, so that a script may wait for the file."""
    temporary = path.with_name(path.name + ".part")
    temporary.write_text(address + "\n")
    temporary.replace(path)

"""The HTTP server around the gateway's edge: uvicorn, quiet, on one address, until it is asked to stop."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import signal
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import uvicorn

from splitnet.errors import BadInput, NotPermitted
from splitnet.gateway.asgi import Edge
from splitnet.security.credentials import is_loopback

__all__ = ["LONGEST_HEAD", "GatewayConfig", "GatewayServer"]

LONGEST_HEAD = 16 << 10  #: bytes of a request's line and headers
_KEEP_ALIVE_S = 30


@dataclass(frozen=True, slots=True)
class GatewayConfig:
    """Where the gateway listens. `keys`: whether callers must show one. Raises NotPermitted for an address that other machines reach, without keys; or without
    TLS, unless `insecure` says that whatever encrypts stands before it."""

    listen: str = "127.0.0.1:8000"
    keys: bool = False
    certificate: Path | None = None
    private_key: Path | None = None
    insecure: bool = False
    drain_s: float = 10.0

    def __post_init__(self) -> None:
        host, _ = self.host_and_port
        if (self.certificate is None) != (self.private_key is None):
            raise BadInput("--tls-cert and --tls-key belong together")
        if is_loopback(host):
            return
        if not self.keys:
            raise NotPermitted(
                f"--listen {self.listen} is reached by other machines, and nobody needs a key",
                remedy="make one (splitnet keys create NAME) and give --keys FILE, or listen on 127.0.0.1",
            )
        if self.certificate is None and not self.insecure:
            raise NotPermitted(
                f"--listen {self.listen} is reached by other machines, and keys and texts would cross the network in the clear",
                remedy="give --tls-cert and --tls-key; or --insecure where a proxy before it encrypts, or on a network where you trust everybody",
            )

    @property
    def host_and_port(self) -> tuple[str, int]:
        host, colon, port = self.listen.rpartition(":")
        if not colon or not host or not port.isdecimal() or int(port) > 65535:
            raise BadInput(f"--listen {self.listen!r}: expected HOST:PORT, such as 127.0.0.1:8000 or [::]:8000")
        return host.strip("[]"), int(port)


class GatewayServer:
    """`async with`: listens; at the end, finishes what is under way for at most `drain_s`."""

    def __init__(self, edge: Edge, config: GatewayConfig) -> None:
        self._config = config
        self._socket: socket.socket | None = None
        self._serving: asyncio.Task[None] | None = None
        tls = {"ssl_certfile": config.certificate, "ssl_keyfile": config.private_key} if config.certificate is not None else {}
        try:
            settings = uvicorn.Config(
                edge,
                http="h11", ws="none", lifespan="off", log_config=None, access_log=False, server_header=False, proxy_headers=False,
                timeout_keep_alive=_KEEP_ALIVE_S, timeout_graceful_shutdown=max(1, round(config.drain_s)), h11_max_incomplete_event_size=LONGEST_HEAD, **tls,  # type: ignore[arg-type]
            )  # fmt: skip
            settings.load()
        except OSError as error:  # of ssl, too
            raise BadInput(f"--tls-cert {config.certificate}, --tls-key {config.private_key}: {error}") from None
        logging.getLogger("uvicorn").setLevel(logging.ERROR)  # a client's malformed request is no news; a bug of ours is
        self._server = _Server(settings)

    @property
    def url(self) -> str:
        """Where it listens, for people and for clients' `base_url` (with /v1)."""
        assert self._socket is not None, "it has not started"
        host, port = self._socket.getsockname()[:2]
        scheme = "https" if self._config.certificate is not None else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def __aenter__(self) -> GatewayServer:
        host, port = self._config.host_and_port
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        try:
            self._socket = socket.create_server((host, port), family=family, backlog=256)
        except OSError as error:
            raise BadInput(
                f"--listen {self._config.listen}: {error.strerror}", remedy="choose another address, or port 0 for a free one"
            ) from None
        self._serving = asyncio.create_task(self._server.serve(sockets=[self._socket]))
        while not self._server.started:
            await asyncio.sleep(0.005)
            if self._serving.done():
                self._serving.result()
                raise BadInput(f"--listen {self._config.listen}: the server ended before it began")
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.should_exit = True
        if self._serving is not None:
            await self._serving

    async def until_asked_to_stop(self) -> None:
        """Until SIGTERM or SIGINT. A second one ends what is under way at once."""
        loop, asked = asyncio.get_running_loop(), asyncio.Event()

        def ask() -> None:
            self._server.force_exit = asked.is_set()
            asked.set()

        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, ask)
        await asked.wait()


class _Server(uvicorn.Server):
    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[Any]:
        """Signals are ours: uvicorn's way would end the process by the signal once more after it has stopped in order."""
        yield

"""A gateway from its models to its end."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from splitnet.client import AsyncClient
from splitnet.errors import BadInput, DeadlineExceeded
from splitnet.gateway.answering import ServedModel
from splitnet.gateway.asgi import Edge, Limits
from splitnet.gateway.keys import KeyFile
from splitnet.gateway.opening import ModelSource, open_model
from splitnet.gateway.server import GatewayConfig, GatewayServer
from splitnet.gateway.service import Service

__all__ = ["gateway_for", "run_gateway"]

_READY_S = 5.0


async def run_gateway(
    sources: Sequence[ModelSource],
    config: GatewayConfig,
    limits: Limits,
    key_file: Path | None,
    say: Callable[[str], None],
    *,
    requests: bool = True,
    announce: Path | None = None,
) -> None:
    """Opens the models, serves them until a signal, and closes them. `requests`: whether `say` is told of each. Raises what opening raises."""
    keys = KeyFile(key_file) if key_file is not None else None
    if keys is not None and not keys.keys():
        raise BadInput(f"{key_file} has no key, so nobody could ask for anything", remedy=f"splitnet keys create NAME --keys {key_file}")
    async with contextlib.AsyncExitStack() as stack:
        clients: dict[str, AsyncClient] = {}
        models = []
        for source in sources:
            opened = await open_model(source)
            stack.push_async_callback(opened.client.close)
            if opened.served.name in clients:
                raise BadInput(f"two models are called {opened.served.name!r}", remedy="name them: NAME=PLAN")
            clients[opened.served.name] = opened.client
            models.append(opened.served)

        async def ready(model: ServedModel) -> None:
            try:
                async with asyncio.timeout(_READY_S):
                    await clients[model.name].describe()
            except TimeoutError:
                raise DeadlineExceeded(f"the deployment did not answer within {_READY_S:g} s") from None

        def log(method: str, path: str, status: int, seconds: float) -> None:
            if requests:
                say(f"{status} {method} {path[:100]!a} {seconds * 1e3:.0f} ms")

        server = await stack.enter_async_context(gateway_for(tuple(models), keys, limits, config, ready, log))
        for model in models:
            chat = "chat and completions" if model.tokenizer.template is not None else "completions (it has no chat template)"
            say(f"{model.name}: {chat}, context {model.context}")
        say(f"Serving {server.url}/v1" + ("" if keys is not None else " for this machine alone"))
        if announce is not None:
            await asyncio.to_thread(_announce, announce, server.url)
        await server.until_asked_to_stop()
        say("Stopping")


def gateway_for(
    models: tuple[ServedModel, ...],
    keys: KeyFile | None,
    limits: Limits,
    config: GatewayConfig,
    ready: Callable[[ServedModel], Awaitable[None]],
    log: Callable[[str, str, int, float], None],
) -> GatewayServer:
    """A server, not started."""
    return GatewayServer(Edge(Service(models, keys, limits, ready).accept, limits, log), config)


def _announce(path: Path, url: str) -> None:
    """Whole or not at all, so that a script may wait for the file."""
    part = path.with_name(path.name + ".part")
    part.write_text(url + "\n")
    part.replace(path)

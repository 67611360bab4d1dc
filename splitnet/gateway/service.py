"""Which path is answered how, and by whose leave."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Iterator, Mapping
from typing import Any
from urllib.parse import unquote

from splitnet.errors import SplitnetError
from splitnet.gateway.answering import Answer, ServedModel
from splitnet.gateway.asgi import Answering, Caller, Events, JsonReply, Limits, Reply
from splitnet.gateway.errors import ApiError, busy, from_splitnet
from splitnet.gateway.fields import Fields, parse_json
from splitnet.gateway.keys import KeyFile
from splitnet.gateway.requests import Wanted, read_chat, read_completion
from splitnet.gateway.shapes import Shape, model_object, models_list

__all__ = ["Readiness", "Service"]

_RETRY_S = 1.0
_READY_FOR_S = 1.0
_LOCAL = ("localhost", "127.0.0.1", "::1")

#: Asks a model's deployment whether it serves. Raises a SplitnetError where it does not.
Readiness = Callable[[ServedModel], Awaitable[None]]


class Service:
    """`keys` None: everybody may ask, and only under a name of this machine, so that no web page can make a browser ask (DNS rebinding)."""

    def __init__(self, models: tuple[ServedModel, ...], keys: KeyFile | None, limits: Limits, ready: Readiness) -> None:
        self._models: Mapping[str, ServedModel] = {model.name: model for model in models}
        self._keys = keys
        self._limits = limits
        self._ready = ready
        self._running = 0
        self._known_state: tuple[float, dict[str, str]] | None = None
        self._asking = asyncio.Lock()

    # -------------------------------------------------------------------------------------------------------- before the body

    def accept(self, caller: Caller) -> Answering:
        """Who answers. Raises ApiError 401, 403, 404, 405 or 415."""
        path = caller.path.rstrip("/")
        self._check_host(caller)
        if path in ("/healthz", "/readyz"):
            _check_method(caller, "GET", "HEAD")
            return self._alive if path == "/healthz" else self._readiness
        self._check_key(caller)
        if path == "/v1/models":
            _check_method(caller, "GET", "HEAD")
            return self._list
        if path.startswith("/v1/models/"):
            _check_method(caller, "GET", "HEAD")
            model = self._model(unquote(path.removeprefix("/v1/models/")))
            return lambda _: _now(JsonReply(model_object(model)))
        if path in ("/v1/completions", "/v1/chat/completions"):
            _check_method(caller, "POST")
            _check_json(caller)
            read = read_chat if path.endswith("chat/completions") else read_completion
            return lambda body: self._generate(body, read)
        raise ApiError(
            404,
            f"Invalid URL ({caller.method} {caller.path[:200]}): there are /v1/models, /v1/completions, /v1/chat/completions, /healthz and /readyz.",
            code="unknown_url",
        )

    def _check_host(self, caller: Caller) -> None:
        if self._keys is not None:
            return
        host = caller.headers.get("host", "")
        name = host[1 : host.find("]")] if host.startswith("[") else host.partition(":")[0]
        if name.lower() not in _LOCAL:
            raise ApiError(
                403, f"Without API keys the gateway answers as localhost only, and was asked as {name[:80]!r}.", code="host_not_allowed"
            )

    def _check_key(self, caller: Caller) -> None:
        if self._keys is None:
            return
        scheme, _, key = caller.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip():
            raise ApiError(
                401,
                "You didn't provide an API key. You need to provide your API key in an Authorization header using Bearer auth (i.e. Authorization: Bearer YOUR_KEY).",
                code="missing_api_key",
                headers=(("www-authenticate", "Bearer"),),
            )
        try:
            owner = self._keys.owner(key.strip())
        except SplitnetError as error:  # the file went away, or others may write to it: nobody is let in
            raise ApiError(
                503, f"The gateway cannot read its API keys: {error.message}", kind="server_error", code="keys_unreadable"
            ) from error
        if owner is None:
            raise ApiError(
                401, "Incorrect API key provided.", code="invalid_api_key", headers=(("www-authenticate", 'Bearer error="invalid_token"'),)
            )

    def _model(self, name: str) -> ServedModel:
        if (model := self._models.get(name)) is None:
            there = ", ".join(repr(known) for known in self._models)
            raise ApiError(404, f"The model {name[:80]!r} does not exist. There is {there}.", param="model", code="model_not_found")
        return model

    # ----------------------------------------------------------------------------------------------------------------- answers

    async def _alive(self, body: bytes) -> Reply:
        return JsonReply({"status": "ok"})

    async def _readiness(self, body: bytes) -> Reply:
        """Whether each model's deployment answers; asked at most once a second, however often it is wanted."""
        async with self._asking:
            if self._known_state is None or time.monotonic() - self._known_state[0] > _READY_FOR_S:
                self._known_state = (time.monotonic(), {name: await self._state(model) for name, model in self._models.items()})
            states = self._known_state[1]
        ready = all(state == "ready" for state in states.values())
        return JsonReply({"status": "ready" if ready else "unavailable", "models": states}, 200 if ready else 503)

    async def _state(self, model: ServedModel) -> str:
        try:
            await self._ready(model)
        except SplitnetError as error:
            return error.message
        return "ready"

    async def _list(self, body: bytes) -> Reply:
        return JsonReply(models_list(self._models.values()))

    async def _generate(self, body: bytes, read: Callable[[Fields], Wanted]) -> Reply:
        wanted = read(parse_json(body))
        answer = Answer(self._model(wanted.model), wanted, self._limits.generation_s)
        if wanted.stream:
            return Events(self._events(answer))
        with self._slot(), _translated():
            text, finish = [], ""
            async with contextlib.aclosing(answer.pieces()) as pieces:
                async for piece in pieces:
                    text.append(piece.text)
                    finish = piece.finish
        return JsonReply(Shape(answer).whole("".join(text), finish))

    async def _events(self, answer: Answer) -> AsyncGenerator[Mapping[str, Any], None]:
        shape = Shape(answer)
        with self._slot(), _translated():
            async with contextlib.aclosing(answer.pieces()) as pieces:
                first = shape.first()
                async for piece in pieces:
                    if first is not None:
                        yield first
                        first = None
                    for chunk in shape.chunks(piece):
                        yield chunk
        if answer.wanted.include_usage:
            yield shape.last()

    @contextlib.contextmanager
    def _slot(self) -> Iterator[None]:
        """One of the generations that may run at once. Raises ApiError 429 where all do."""
        if self._running >= self._limits.max_requests:
            raise busy(f"The gateway answers {self._running} requests now, which is all that it takes at once.", _RETRY_S)
        self._running += 1
        try:
            yield
        finally:
            self._running -= 1


@contextlib.contextmanager
def _translated() -> Iterator[None]:
    try:
        yield
    except SplitnetError as error:
        raise from_splitnet(error) from error


async def _now(reply: Reply) -> Reply:
    return reply


def _check_method(caller: Caller, *allowed: str) -> None:
    if caller.method not in allowed:
        raise ApiError(
            405,
            f"Not allowed to {caller.method[:20]} on {caller.path[:200]}; use {allowed[0]}.",
            code="method_not_allowed",
            headers=(("allow", ", ".join(allowed)),),
        )


def _check_json(caller: Caller) -> None:
    """A form or plain text is what a web page may send elsewhere without asking: neither is taken."""
    kind = caller.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise ApiError(415, f"Expected Content-Type: application/json, got {kind[:80] or 'none'!r}.", code="unsupported_media_type")

"""The message edge: HTTP requests in, JSON or a stream of events out. No model in it.

Written on ASGI itself: six paths need no router, and what matters here is between the lines of one. A client that goes away is noticed at once, also while
nothing is being sent to it; the status waits for the first piece, so that a refusal is a 429 and not an event in a stream that began well.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import secrets
import time
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine, Mapping
from dataclasses import dataclass
from typing import Any, TypeAlias, TypeVar

from splitnet.gateway.errors import ApiError

__all__ = ["Answering", "Caller", "Edge", "Events", "JsonReply", "Limits", "Log", "Reply"]

Scope: TypeAlias = Mapping[str, Any]
Receive: TypeAlias = Callable[[], Awaitable[Mapping[str, Any]]]
Send: TypeAlias = Callable[[dict[str, Any]], Awaitable[None]]


@dataclass(frozen=True, slots=True)
class Limits:
    """`send_s`: how long a client may leave what was sent to it unread."""

    max_body_bytes: int = 4 << 20
    max_requests: int = 64
    body_s: float = 30.0
    send_s: float = 60.0
    generation_s: float = 600.0


@dataclass(frozen=True, slots=True)
class Caller:
    """A request without its body. What stands behind a "?" is not looked at."""

    method: str
    path: str
    headers: Mapping[str, str]


@dataclass(frozen=True, slots=True)
class JsonReply:
    body: Mapping[str, Any]
    status: int = 200
    headers: tuple[tuple[str, str], ...] = ()


@dataclass(frozen=True, slots=True)
class Events:
    """Server-sent events, each a JSON object; then [DONE]. An error after the first is the last event."""

    events: AsyncGenerator[Mapping[str, Any], None]


Reply: TypeAlias = JsonReply | Events
#: Makes the reply from the body, which is empty where the method has none.
Answering: TypeAlias = Callable[[bytes], Coroutine[Any, Any, Reply]]
#: Told of each request: method, path, status, seconds. Never what was said.
Log: TypeAlias = Callable[[str, str, int, float], None]

_T = TypeVar("_T")
_GONE = 499  #: nginx's number for a client that went away: nothing is sent


class _Gone(Exception):
    """The client went away."""


class Edge:
    """An ASGI application. `accept` looks at a request before its body is read, and says who answers it; it may raise ApiError, as may what answers."""

    def __init__(self, accept: Callable[[Caller], Answering], limits: Limits, log: Log) -> None:
        self._accept = accept
        self._limits = limits
        self._log = log

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await _Exchange(scope, receive, send, self._limits).run(self._accept, self._log)


class _Exchange:
    """One request and its answer."""

    def __init__(self, scope: Scope, receive: Receive, send: Send, limits: Limits) -> None:
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        self._caller = Caller(scope["method"], scope["path"], headers)
        self._receive = receive
        self._send = send
        self._limits = limits
        self._status = 0

    async def run(self, accept: Callable[[Caller], Answering], log: Log) -> None:
        started = time.monotonic()
        try:
            await self._answer(accept)
        except _Gone:
            self._status = _GONE
        finally:
            log(self._caller.method, self._caller.path, self._status, time.monotonic() - started)

    async def _answer(self, accept: Callable[[Caller], Answering]) -> None:
        try:
            answering = accept(self._caller)
            body = await self._body() if self._caller.method == "POST" else b""
            reply = await self._while_there(answering(body))
            if isinstance(reply, JsonReply):
                await self._json(reply)
                return
            async with contextlib.aclosing(reply.events) as events:
                first = await self._while_there(anext(events))  # a refusal comes before it
                await self._while_there(self._stream(first, events))
        except ApiError as error:
            await self._json(JsonReply(error.body(), error.status, error.headers))
        except _Gone:
            raise
        except Exception:
            if not self._status:
                failed = ApiError(500, "The gateway failed at this request; its log says how.", kind="server_error", code="internal_error")
                await self._json(JsonReply(failed.body(), 500))
            raise  # uvicorn writes the traceback

    async def _body(self) -> bytes:
        """All of it. Raises ApiError where it is too large, or too slow."""
        most = self._limits.max_body_bytes
        too_large = ApiError(413, f"The body of the request has more than {most} bytes.", code="request_too_large", headers=_CLOSE)
        declared = self._caller.headers.get("content-length", "")
        if declared.isdecimal() and int(declared[:20]) > most:
            raise too_large
        parts, length, more = [], 0, True
        try:
            async with asyncio.timeout(self._limits.body_s):
                while more:
                    message = await self._receive()
                    if message["type"] == "http.disconnect":
                        raise _Gone
                    parts.append(message.get("body", b""))
                    length += len(parts[-1])
                    if length > most:
                        raise too_large
                    more = message.get("more_body", False)
        except TimeoutError:
            raise ApiError(408, f"The body of the request did not come within {self._limits.body_s:g} s.", headers=_CLOSE) from None
        return b"".join(parts)

    async def _while_there(self, work: Awaitable[_T]) -> _T:
        """What the work gives. It is cancelled, and has ended, when the client goes away (_Gone), or when this is cancelled itself."""
        task = asyncio.ensure_future(work)
        gone = asyncio.create_task(self._until_gone())
        try:
            await asyncio.wait((task, gone), return_when=asyncio.FIRST_COMPLETED)
            if task.done():
                return task.result()
            raise _Gone
        finally:
            task.cancel()
            gone.cancel()
            await asyncio.gather(task, gone, return_exceptions=True)

    async def _until_gone(self) -> None:
        while (await self._receive())["type"] != "http.disconnect":
            pass

    async def _json(self, reply: JsonReply) -> None:
        content = json.dumps(reply.body, ensure_ascii=False).encode("utf-8", "backslashreplace")
        await self._start(reply.status, "application/json", (("content-length", str(len(content))), *reply.headers))
        await self._write(content, more=False)

    async def _stream(self, first: Mapping[str, Any], events: AsyncGenerator[Mapping[str, Any], None]) -> None:
        await self._start(200, "text/event-stream; charset=utf-8", (("cache-control", "no-cache"), ("x-accel-buffering", "no")))
        await self._event(json.dumps(first))
        try:
            async for event in events:
                await self._event(json.dumps(event))
            await self._event("[DONE]")
        except ApiError as error:
            await self._event(json.dumps(error.body()))
        await self._write(b"", more=False)

    async def _event(self, text: str) -> None:
        await self._write(f"data: {text}\n\n".encode(), more=True)

    async def _start(self, status: int, kind: str, headers: tuple[tuple[str, str], ...]) -> None:
        self._status = status
        every = (("content-type", kind), ("x-request-id", "req_" + secrets.token_hex(12)), ("x-content-type-options", "nosniff"), *headers)
        await self._send(
            {"type": "http.response.start", "status": status, "headers": [(name.encode(), value.encode()) for name, value in every]}
        )

    async def _write(self, content: bytes, more: bool) -> None:
        """Waits until the client has read what was sent before, so that what is held for it stays small; _Gone where it does not read."""
        try:
            async with asyncio.timeout(self._limits.send_s):
                await self._send({"type": "http.response.body", "body": content, "more_body": more})
        except (TimeoutError, OSError):
            raise _Gone from None


_CLOSE = (("connection", "close"),)

"""The gateway without its socket: what a client sends goes through uvicorn's own parser, the edge, and the readers of requests."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable, Sequence
from pathlib import Path

import uvicorn
from tokenizers import Tokenizer, models, pre_tokenizers
from uvicorn.protocols.http.h11_impl import H11Protocol
from uvicorn.server import ServerState

from splitnet import background
from splitnet.errors import BadInput
from splitnet.gateway.answering import ServedModel
from splitnet.gateway.asgi import Edge, Limits
from splitnet.gateway.server import LONGEST_HEAD
from splitnet.gateway.service import Service
from splitnet.gateway.tokenizing import TextTokenizer
from splitnet.generation import TextModel

__all__ = ["http_bodies", "http_requests", "http_target"]

_TEMPLATE = "{% for message in messages %}{{ message['role'] + ': ' + message['content'] + '\n' }}{% endfor %}"
_HEAD = "POST {path} HTTP/1.1\r\nhost: localhost\r\ncontent-type: application/json\r\ncontent-length: {length}\r\n\r\n"


class _Tokens:
    """What the deployment would say; not what is looked at here."""

    finish, cached_tokens = "length", 0

    def __init__(self, tokens: Sequence[int]) -> None:
        self._tokens = tokens

    async def __aiter__(self) -> AsyncIterator[int]:
        for token in self._tokens:
            yield token

    async def aclose(self) -> None: ...


class _Generator:
    def generate(
        self, input_ids: Sequence[int], max_new_tokens: int, temperature: float = 0.0, top_p: float = 1.0, top_k: int = 0,
        repetition_penalty: float = 1.0, seed: int | None = None, *, timeout_s: float | None = None,
    ) -> _Tokens:  # fmt: skip
        return _Tokens([65, 66, 195][:max_new_tokens])


class _Connection(asyncio.Transport):
    """Keeps what the server writes; its client never reads slowly."""

    def __init__(self) -> None:
        super().__init__({"sockname": ("127.0.0.1", 8000), "peername": ("127.0.0.1", 40000)})
        self.written = bytearray()
        self._closing = False

    def write(self, data: bytes | bytearray | memoryview) -> None:
        if not self._closing:
            self.written += data

    def is_closing(self) -> bool:
        return self._closing

    def close(self) -> None:
        self._closing = True

    def pause_reading(self) -> None: ...

    def resume_reading(self) -> None: ...


class _Complaints(logging.Handler):
    """What uvicorn logs of an exception that the gateway let through."""

    def __init__(self) -> None:
        super().__init__(logging.ERROR)
        self.found: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.found.append(self.format(record))


def http_target(folder: Path) -> Callable[[bytes], None]:
    """Takes the bytes of a connection, and raises BadInput where the answer was a refusal; RuntimeError, which is a fault, for an answer above 499, an
    exception that came through, or none of either."""
    complaints = _Complaints()
    logger = logging.getLogger("uvicorn.error")
    logger.handlers, logger.propagate = [complaints], False
    logger.setLevel(logging.ERROR)
    service = Service((_model(folder),), None, Limits(max_body_bytes=1 << 18, body_s=2.0), _ready)
    settings = uvicorn.Config(
        Edge(service.accept, Limits(max_body_bytes=1 << 18, body_s=2.0), lambda *_: None), http="h11", ws="none", lifespan="off", log_config=None,
        access_log=False, server_header=False, proxy_headers=False, h11_max_incomplete_event_size=LONGEST_HEAD,
    )  # fmt: skip
    settings.load()

    async def converse(data: bytes) -> bytes:
        state, connection = ServerState(), _Connection()
        protocol = H11Protocol(settings, state, {})
        protocol.connection_made(connection)
        if data:  # a transport has nothing to say of nothing
            protocol.data_received(data)
        while state.tasks:
            if protocol.cycle is not None and protocol.cycle.more_body:  # it waits for the rest, which never comes
                protocol.connection_lost(None)
            await asyncio.wait(set(state.tasks))
        protocol.connection_lost(None)
        return bytes(connection.written)

    def run(data: bytes) -> None:
        complaints.found.clear()
        answer = background.run(converse(data))
        status = int(answer[9:12]) if answer.startswith(b"HTTP/1.1 ") else 0
        if complaints.found or status >= 500 or (answer and not status):
            raise RuntimeError(f"the gateway answered {answer[:200]!r}; {complaints.found}")
        if status != 200:
            raise BadInput(f"refused with {status}")

    return run


async def _ready(model: ServedModel) -> None: ...


def _model(folder: Path) -> ServedModel:
    """Each byte a token."""
    vocabulary = {character: number for number, character in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    tokenizer = Tokenizer(models.BPE(vocabulary, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    directory = folder / "tokenizer"
    directory.mkdir(exist_ok=True)
    tokenizer.save(str(directory / "tokenizer.json"))
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": _TEMPLATE}))
    return ServedModel("hut", _Generator(), TextModel(4096, 256, 4096, (0,)), TextTokenizer(directory), 1_700_000_000)


def http_bodies() -> tuple[bytes, ...]:
    """Of requests, as JSON that can be changed and stay JSON."""
    completion = {
        "model": "hut",
        "prompt": "The hut",
        "max_tokens": 4,
        "temperature": 0.5,
        "top_p": 0.9,
        "seed": 7,
        "stop": ["\n"],
        "echo": True,
    }
    chat = {
        "model": "hut", "max_completion_tokens": 4, "stream": True, "stream_options": {"include_usage": True}, "top_k": 5, "logit_bias": {},
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": [{"type": "text", "text": "What is a hut?"}]},
        ],
    }  # fmt: skip
    return tuple(json.dumps(body).encode() + b"\n" for body in (completion, chat, {"model": "hut", "prompt": [1, 2, 3], "stream": True}))


def http_requests(body: bytes | None = None) -> tuple[bytes, ...]:
    """Whole requests; of one body, to the path that suits it."""
    if body is not None:
        path = "/v1/chat/completions" if b'"messages"' in body else "/v1/completions"
        return (_HEAD.format(path=path, length=len(body)).encode() + body,)
    simple = (f"GET {path} HTTP/1.1\r\nhost: localhost:8000\r\n\r\n".encode() for path in ("/v1/models", "/v1/models/hut", "/readyz"))
    chunked = b"POST /v1/completions HTTP/1.1\r\nhost: [::1]\r\ncontent-type: application/json\r\ntransfer-encoding: chunked\r\n\r\n"
    first, *others = http_bodies()
    pieces = b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in (first[:20], first[20:])) + b"0\r\n\r\n"
    posts = [request for each in (first, *others) for request in http_requests(each)]
    return (*simple, *posts, chunked + pieces, posts[0] + posts[1])

"""A cable between a node and all others: it breaks when told, or carries nothing any more, both ways or one way."""

from __future__ import annotations

import asyncio
import contextlib

__all__ = ["Cable"]


class Cable:
    """Leads to `target` (HOST:PORT); `open` gives its near end. A connection that was cut stays silent, also when it is mended: then new ones carry."""

    def __init__(self, target: str) -> None:
        self._host, _, self._port = target.rpartition(":")
        self._writers: set[asyncio.StreamWriter] = set()
        self._carries = {"there": True, "back": True}

    async def open(self) -> str:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        return f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    def reset(self) -> None:
        """Ends all connections; new ones carry."""
        for writer in list(self._writers):
            writer.transport.abort()

    def cut(self, *ways: str) -> None:
        """`ways`: "there", "back". Bytes are taken and come out nowhere."""
        for way in ways:
            self._carries[way] = False

    def mend(self) -> None:
        self._carries = {"there": True, "back": True}

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        both = {writer}
        with contextlib.suppress(OSError, asyncio.CancelledError):  # cancelled at the end, by whoever ends the loop
            far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
            both.add(far_writer)
            self._writers |= both
            await asyncio.gather(self._carry(reader, far_writer, "there"), self._carry(far_reader, writer, "back"))
        self._writers -= both
        for each in both:
            each.close()

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        broken = False
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                broken = broken or not self._carries[way]
                if not broken:
                    writer.write(data)
                    await writer.drain()
        if not broken and self._carries[way]:
            writer.close()

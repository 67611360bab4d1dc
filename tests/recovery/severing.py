"""A cable that can be cut, in one direction or both, without anybody being told: bytes are taken and come out nowhere."""

from __future__ import annotations

import asyncio
import contextlib
import threading

__all__ = ["Cable"]


class Cable:
    """Leads to `target` (HOST:PORT); `address` is its near end. `there` and `back` say which way still carries."""

    def __init__(self, target: str) -> None:
        self.there = self.back = True
        self.address = ""
        self._host, _, self._port = target.rpartition(":")
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="cable", daemon=True)
        self._writers: set[asyncio.StreamWriter] = set()

    def __enter__(self) -> Cable:
        self._thread.start()
        self._run(self._listen())
        return self

    def __exit__(self, *_: object) -> None:
        self._run(self._close())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    def cut(self, *, there: bool = True, back: bool = True) -> None:
        self.there, self.back = self.there and not there, self.back and not back

    def reset(self) -> None:
        """Breaks all connections at once; new ones carry."""
        for writer in list(self._writers):
            self._loop.call_soon_threadsafe(writer.transport.abort)

    def mend(self) -> None:
        """Connections that were cut stay silent; new ones carry."""
        self.there = self.back = True

    def _run(self, work: object) -> None:
        asyncio.run_coroutine_threadsafe(work, self._loop).result(10)  # type: ignore[arg-type]

    async def _listen(self) -> None:
        self._server = await asyncio.start_server(self._connect, "127.0.0.1", 0)
        self.address = f"127.0.0.1:{self._server.sockets[0].getsockname()[1]}"

    async def _connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(OSError):
            far_reader, far_writer = await asyncio.open_connection(self._host, int(self._port))
            self._writers |= {writer, far_writer}
            await asyncio.gather(self._carry(reader, far_writer, "there"), self._carry(far_reader, writer, "back"))

    async def _carry(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, way: str) -> None:
        broken = False
        with contextlib.suppress(OSError):
            while data := await reader.read(1 << 16):
                broken = broken or not getattr(self, way)
                if not broken:
                    writer.write(data)
                    await writer.drain()
            if not broken and getattr(self, way):
                writer.close()

    async def _close(self) -> None:
        self._server.close()
        for writer in self._writers:
            writer.close()
        tasks = asyncio.all_tasks() - {asyncio.current_task()}
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)

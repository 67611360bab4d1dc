"""The one thread that runs engines, so that a node uses the threads it was given and no more."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import Callable
from typing import TypeVar

__all__ = ["ComputeThread"]

T = TypeVar("T")


class ComputeThread:
    """Jobs run one after another, in the order in which they came. Nothing is bounded here: whoever hands jobs in is (admission)."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._jobs: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._stopped = False
        self._thread = threading.Thread(target=self._work, name="splitnet-compute", daemon=True)
        self._thread.start()

    def submit(self, job: Callable[[], None]) -> None:
        """`job` must not raise: it reports to the event loop itself."""
        self._jobs.put(job)

    async def call(self, function: Callable[[], T]) -> T:
        """What `function` returns or raises there. Cancelling does not stop a function that has begun."""
        outcome: asyncio.Future[T] = self._loop.create_future()

        def settle(result: T | None, error: BaseException | None) -> None:
            if outcome.done():
                return
            if error is not None:
                outcome.set_exception(error)
            else:
                outcome.set_result(result)  # type: ignore[arg-type] # T may be None itself

        def job() -> None:
            try:
                result, error = function(), None
            except BaseException as raised:  # noqa: BLE001 # handed to whoever waits, whatever it is
                self.report(settle, None, raised)
            else:
                self.report(settle, result, error)

        self._jobs.put(job)
        return await outcome

    def report(self, callback: Callable[..., None], *arguments: object) -> None:
        """Calls back in the event loop; to be used by jobs. Silent once the loop is closed: nobody is left to be told."""
        try:
            self._loop.call_soon_threadsafe(callback, *arguments)
        except RuntimeError:
            if not self._loop.is_closed():
                raise

    def stop(self) -> None:
        """Lets the thread end after the job that it is at. Does not wait: an operator cannot be interrupted."""
        self._stopped = True
        self._jobs.put(None)

    def join(self, timeout_s: float) -> bool:
        """After `stop`: whether the thread has ended within that time."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _work(self) -> None:
        while (job := self._jobs.get()) is not None and not self._stopped:
            job()
            del job  # a job holds tensors

"""The one event loop behind every blocking call of this process, in a daemon thread of its own.

One, because gRPC's completion queue belongs to the process and goes on delivering to each loop that ever used it: closing a
loop while it does so prints errors that nobody can catch. It is started at the first call and lives as long as the process.
"""

from __future__ import annotations

import asyncio
import os
import threading
from collections.abc import Coroutine
from concurrent.futures import Future
from typing import Any, TypeVar

__all__ = ["run", "start"]

_T = TypeVar("_T")
_lock = threading.Lock()
_loops: dict[int, asyncio.AbstractEventLoop] = {}  # by process: a forked child needs its own


def start(work: Coroutine[Any, Any, _T]) -> Future[_T]:
    """Begins the work; cancelling the future cancels it."""
    return asyncio.run_coroutine_threadsafe(work, _loop())


def run(work: Coroutine[Any, Any, _T]) -> _T:
    """The result of the work, or what it raises. An interrupt (Ctrl-C) cancels it. May be called where another event loop is running
    in this thread, as in a notebook."""
    future = start(work)
    try:
        return future.result()
    except BaseException:
        future.cancel()
        raise


def _loop() -> asyncio.AbstractEventLoop:
    with _lock:
        loop = _loops.get(os.getpid())
        if loop is None:
            loop = _loops[os.getpid()] = asyncio.new_event_loop()
            threading.Thread(target=loop.run_forever, name="splitnet", daemon=True).start()
        return loop

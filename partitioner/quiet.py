"""Silence while torch exports: what it has to say is in the error that it raises."""

from __future__ import annotations

import logging
import os
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any, TextIO

__all__ = ["quiet_torch"]


class _Elsewhere:
    """A stream for which one thread does not write."""

    def __init__(self, stream: TextIO, silent: int) -> None:
        self._stream = stream
        self._silent = silent

    def write(self, text: str) -> int:
        return len(text) if threading.get_ident() == self._silent else self._stream.write(text)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def quiet_torch() -> Iterator[None]:
    """Nothing that this thread logs under "torch", or prints on stderr, is seen: a failed torch.export logs warnings and prints its
    whole half-made graph (torch/export/_trace.py: `partial_fx_graph`), once for each attempt. Other threads and other loggers go on. With
    TORCH_LOGS set, somebody wants to see it: nothing is held back."""
    if os.environ.get("TORCH_LOGS"):
        yield
        return
    me = threading.get_ident()

    def keep(record: logging.LogRecord) -> bool:
        return record.thread != me or record.name.partition(".")[0] != "torch"

    loggers = [
        logging.getLogger(),
        *(logging.getLogger(name) for name in list(logging.root.manager.loggerDict) if name.startswith("torch")),
    ]
    handlers = {handler for logger in loggers for handler in logger.handlers}
    if logging.lastResort is not None:
        handlers.add(logging.lastResort)
    for handler in handlers:
        handler.addFilter(keep)
    try:
        with redirect_stderr(_Elsewhere(sys.stderr, me)):
            yield
    finally:
        for handler in handlers:
            handler.removeFilter(keep)

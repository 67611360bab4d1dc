"""Structured logs on standard error: lines for people on a terminal, JSON for machines."""

from __future__ import annotations

import contextlib
import logging
import sys
from typing import TextIO, cast

import structlog

__all__ = ["Log", "get_log", "set_up_logs"]

Log = structlog.typing.FilteringBoundLogger


class _Sink:
    """A line that cannot be written is lost, as on a full disk; what was to be logged goes on."""

    def __init__(self, file: TextIO) -> None:
        self._file = file

    def write(self, text: str) -> None:
        with contextlib.suppress(OSError):
            self._file.write(text)

    def flush(self) -> None:
        with contextlib.suppress(OSError):
            self._file.flush()


def set_up_logs(level: str, json: bool) -> None:
    """Once, by the process that is a node. A library that only imports this package keeps its own logging."""
    as_json = json or not sys.stderr.isatty()
    renderer: structlog.typing.Processor = structlog.processors.JSONRenderer() if as_json else structlog.dev.ConsoleRenderer()
    structlog.configure(
        processors=[
            structlog.contextvars.merge_contextvars,
            structlog.processors.add_log_level,
            structlog.processors.TimeStamper(fmt="iso", utc=True),
            structlog.processors.format_exc_info,
            renderer,
        ],
        wrapper_class=structlog.make_filtering_bound_logger(logging.getLevelName(level.upper())),
        logger_factory=structlog.PrintLoggerFactory(cast(TextIO, _Sink(sys.stderr))),
        cache_logger_on_first_use=True,
    )


def get_log(node: str, *, quiet: bool = False) -> Log:
    """A log whose every line names the node. `quiet`: nothing below an error (for nodes inside a test)."""
    if quiet:
        logger = structlog.wrap_logger(
            structlog.PrintLogger(cast(TextIO, _Sink(sys.stderr))),
            processors=[structlog.processors.add_log_level, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
            wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        )
        return cast(Log, logger.bind(node=node))
    return cast(Log, structlog.get_logger().bind(node=node))

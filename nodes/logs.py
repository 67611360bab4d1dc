"""Structured logs on standard error: lines for people on a terminal, JSON for machines."""

from __future__ import annotations

import logging
import sys
from typing import cast

import structlog

__all__ = ["Log", "get_log", "set_up_logs"]

Log = structlog.typing.FilteringBoundLogger


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
        logger_factory=structlog.PrintLoggerFactory(sys.stderr),
        cache_logger_on_first_use=True,
    )


def get_log(node: str, *, quiet: bool = False) -> Log:
    """A log whose every line names the node. `quiet`: nothing below an error (for nodes inside a test)."""
    if quiet:
        logger = structlog.wrap_logger(
            structlog.PrintLogger(sys.stderr),
            processors=[structlog.processors.add_log_level, structlog.processors.format_exc_info, structlog.processors.JSONRenderer()],
            wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR),
        )
        return cast(Log, logger.bind(node=node))
    return cast(Log, structlog.get_logger().bind(node=node))

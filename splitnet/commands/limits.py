"""Options that say what one client may use."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import click

from splitnet.errors import BadInput
from splitnet.security.policy import Limits

__all__ = ["limit_options", "limits_of", "seconds_of"]

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*([KMGT]i?)?B?(?:/s)?\Z", re.IGNORECASE)
_SHIFT = {"": 0, "k": 10, "m": 20, "g": 30, "t": 40}
_TIME = re.compile(r"(\d+)\s*([smhd])\Z")
_SECONDS = {"s": 1, "m": 60, "h": 3600, "d": 86400}


def limit_options(command: Callable[..., Any]) -> Callable[..., Any]:
    for option in (
        click.option(
            "--sessions",
            type=click.IntRange(0),
            default=0,
            help="Requests that a client may have in flight at a node.  [default: no limit]",
        ),
        click.option(
            "--bytes",
            "bytes_per_s",
            default="0",
            metavar="SIZE",
            help="What a client may send each second, such as 10MiB.  [default: no limit]",
        ),
        click.option(
            "--rate", type=click.FloatRange(0), default=0.0, help="Requests that a client may send each second.  [default: no limit]"
        ),
    ):
        command = option(command)
    return command


def limits_of(rate: float, bytes_per_s: str, sessions: int) -> Limits | None:
    """None where no limit is given. Raises BadInput."""
    match = _SIZE.match(bytes_per_s.strip())
    if match is None:
        raise BadInput(f"--bytes {bytes_per_s!r} is not a size", remedy="for example 10MiB")
    size = float(match[1]) * (1 << _SHIFT[(match[2] or "").lower().rstrip("i")])
    return Limits(rate, size, sessions) if rate or size or sessions else None


def seconds_of(text: str) -> int:
    """ "30d", "12h", "90m" or "45s". Raises BadInput."""
    match = _TIME.match(text.strip())
    if match is None or not 1 <= int(match[1]) * _SECONDS[match[2]] <= 36500 * 86400:
        raise BadInput(f"{text!r} is not a time from 1s to 36500d", remedy="for example 30d or 12h")
    return int(match[1]) * _SECONDS[match[2]]

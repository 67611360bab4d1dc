"""Reading a document of ours from a file."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from splitnet.errors import SplitnetError

__all__ = ["load_document"]

_T = TypeVar("_T")


def load_document(path: str | Path, parse: Callable[[bytes], _T], error: type[SplitnetError], *, what: str, remedy: str) -> _T:
    """What `parse` makes of the file. Raises `error` where it cannot be read, naming `what` and the remedy; an `error` of `parse` is
    given the path."""
    try:
        text = Path(path).read_bytes()
    except OSError as fault:
        raise error(f"cannot read {what}{str(path)!r}: {fault.strerror}", remedy=remedy) from None
    try:
        return parse(text)
    except error as fault:
        fault.message = f"{path}: {fault.message}"
        raise

"""Documents of ours in files: read with an error that names the file, and written whole or not at all."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TypeVar

from splitnet.errors import SplitnetError, StorageFailure
from splitnet.security.files import write_file

__all__ = ["load_document", "save_document"]

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


def save_document(path: str | Path, text: str) -> None:
    """Whoever is killed meanwhile, or finds the disk full, leaves what was there before. What is no file (/dev/stdout) is written to as it is. Raises
    StorageFailure."""
    place = Path(path).resolve()
    if (place.exists() and not place.is_file()) or Path(path).parts[:2] in (("/", "dev"), ("/", "proc")):
        try:
            place.write_text(text)
        except OSError as error:
            raise StorageFailure(f"cannot write {str(path)!r}: {error.strerror}", remedy="choose another place") from error
        return
    write_file(place, text.encode(), private=False)

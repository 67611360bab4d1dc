"""Files that only their owner may read, written whole or not at all."""

from __future__ import annotations

import os
import secrets
import stat
from pathlib import Path

from splitnet.errors import NotFound, NotPermitted, StorageFailure

__all__ = ["LARGEST_BYTES", "make_private_directory", "read_private", "read_public", "write_file"]

LARGEST_BYTES = 4 << 20  #: no key, certificate or policy is larger


def read_public(path: Path, remedy: str) -> bytes:
    """Raises NotFound where there is no such file, StorageFailure where it cannot be read or is too large."""
    return _read(path, remedy, private=False)


def read_private(path: Path, remedy: str) -> bytes:
    """As `read_public`; and NotPermitted where others than the owner may read or change the file."""
    return _read(path, remedy, private=True)


def write_file(path: Path, data: bytes, *, private: bool) -> None:
    """Replaces the file at once; `private`: readable by its owner only, from its first byte. Raises StorageFailure."""
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(4)}.part")
    try:
        descriptor = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600 if private else 0o644)
        try:
            with os.fdopen(descriptor, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            temporary.replace(path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
    except OSError as error:
        raise StorageFailure(f"cannot write {str(path)!r}: {error.strerror}", remedy="make room, or choose another folder") from error


def make_private_directory(path: Path) -> None:
    """Makes it if need be, and closes it to others. Raises StorageFailure."""
    try:
        path.mkdir(mode=0o700, parents=True, exist_ok=True)
        path.chmod(0o700)
    except OSError as error:
        raise StorageFailure(f"cannot use the folder {str(path)!r}: {error.strerror}", remedy="choose another folder") from error


def _read(path: Path, remedy: str, *, private: bool) -> bytes:
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    except FileNotFoundError:
        raise NotFound(f"there is no file {str(path)!r}", remedy=remedy) from None
    except OSError as error:
        raise StorageFailure(f"cannot read {str(path)!r}: {error.strerror}", remedy=remedy) from error
    with os.fdopen(descriptor, "rb") as file:
        status = os.fstat(file.fileno())
        if not stat.S_ISREG(status.st_mode) or status.st_size > LARGEST_BYTES:
            raise StorageFailure(f"{str(path)!r} is not a file of at most {LARGEST_BYTES} bytes", remedy=remedy)
        if private and (others := stat.S_IMODE(status.st_mode) & 0o077):
            raise NotPermitted(
                f"others than its owner may use {str(path)!r} (mode {stat.S_IMODE(status.st_mode):04o}, {others:03o} too much)",
                remedy=f"chmod 600 {path}; and if others had access to this machine, issue the certificate anew: `splitnet certs rotate`",
            )
        return file.read(LARGEST_BYTES)

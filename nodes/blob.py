"""One blob arriving: appended to a part file, hashed on the way, renamed into place when its sha256 is right."""

from __future__ import annotations

import errno
import fcntl
import hashlib
import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from splitnet.errors import BadInput, BadShard, Overloaded, SplitnetError, StorageFailure

__all__ = ["BlobWriter", "check_sha256", "lock_file", "translated", "write_private"]

_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_CHUNK_BYTES = 1 << 20
_RETRY_AFTER_S = 0.5


class BlobWriter:
    """One upload of one blob. Write from `offset` on, then `commit`. A context manager; `close` without `commit` keeps the part."""

    def __init__(
        self,
        part: Path,
        final: Path,
        sha256: str,
        size_bytes: int,
        *,
        check_room: Callable[[int, str], None],
        committed: Callable[[], None],
    ) -> None:
        self._file = -1
        self._path = part
        self._final = final
        self._committed = committed
        self._sha256 = sha256
        self._size_bytes = size_bytes
        self._what = f"blob {sha256[:12]}"
        self._digest = hashlib.sha256()
        self.offset = 0
        self._file = self._open()
        try:
            self._resume()
            check_room(size_bytes - self.offset, self._what)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

    def __del__(self) -> None:
        """A task that is cancelled while a thread opens the writer for it never sees it: the lock must not outlive it."""
        self.close()

    def write(self, data: bytes | memoryview) -> int:
        """Appends; returns the new offset. Raises BadShard for more bytes than were announced, StorageFailure when the disk is full
        (what was written is kept, and the upload can be continued)."""
        view = memoryview(data)
        if self.offset + len(view) > self._size_bytes:
            raise BadShard(
                f"{self._what}: {self._size_bytes} bytes were announced and more came",
                remedy="send the size of the very bytes that were hashed",
            )
        while view:
            with translated(self._what):
                written = os.write(self._file, view)
            self._digest.update(view[:written])
            self.offset += written
            view = view[written:]
        return self.offset

    def restart(self) -> None:
        """Forgets what arrived earlier and begins at 0."""
        with translated(self._what):
            os.ftruncate(self._file, 0)
            os.lseek(self._file, 0, os.SEEK_SET)
        self._digest = hashlib.sha256()
        self.offset = 0

    def discard(self) -> None:
        """Removes the part: what arrived is worth nothing."""
        self._path.unlink(missing_ok=True)

    def commit(self) -> Path:
        """Verifies and keeps the blob. Raises BadShard when bytes are missing (the part is kept), or when the sha256 is wrong (the part
        is removed: its bytes are worth nothing)."""
        if self.offset != self._size_bytes:
            raise BadShard(f"{self._what}: truncated, {self.offset} of {self._size_bytes} bytes came", remedy="send the rest")
        if self._digest.hexdigest() != self._sha256:
            self.discard()
            raise BadShard(
                f"{self._what}: wrong sha256: announced {self._sha256}, what came has {self._digest.hexdigest()}; it was removed",
                remedy="the shard changed while it was sent, or the link is faulty: deploy again",
            )
        with translated(self._what):
            os.fsync(self._file)
            self._path.replace(self._final)
            _sync_directory(self._final.parent)
        self._committed()
        return self._final

    def close(self) -> None:
        """Lets go of the part, which stays on disk unless it was committed."""
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _open(self) -> int:
        """The part, locked. Between opening and locking somebody may have committed it and made another: then again."""
        with translated(self._what):
            while True:
                file = os.open(self._path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC | getattr(os, "O_NOFOLLOW", 0), 0o600)
                if not lock_file(file):
                    os.close(file)
                    raise Overloaded(
                        f"{self._what} is being received from somebody else", remedy="try again in a moment", retry_after_s=_RETRY_AFTER_S
                    )
                if _same_file(file, self._path):
                    return file
                os.close(file)

    def _resume(self) -> None:
        with translated(self._what):
            if os.fstat(self._file).st_size > self._size_bytes:
                os.ftruncate(self._file, 0)
            while chunk := os.read(self._file, _CHUNK_BYTES):
                self._digest.update(chunk)
                self.offset += len(chunk)


@contextmanager
def translated(what: str) -> Iterator[None]:
    """An OSError becomes a StorageFailure that says what to do."""
    try:
        yield
    except SplitnetError:
        raise
    except OSError as error:
        if error.errno in _FULL:
            message, remedy = "the disk is full", "free space on the node's disk, then deploy again: it continues where it stopped"
        else:
            message, remedy = "cannot be written or read", "check the disk and the rights of the data directory"
        raise StorageFailure(f"{what}: {message}: {error.strerror}", remedy=remedy) from error


def check_sha256(sha256: str) -> None:
    """Raises BadInput for anything else: what is checked becomes a file name."""
    if not _SHA256.match(sha256):
        raise BadInput(f"{sha256!r:.80} is not a sha256 in lower-case hexadecimal digits", remedy="name a blob by the hash of its bytes")


def _same_file(file: int, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file), path.stat())
    except FileNotFoundError:
        return False


def lock_file(file: int) -> bool:
    """Locks until the file is closed; False where somebody else (another process included) has it locked."""
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def write_private(path: Path, content: bytes) -> None:
    """Replaces a file whole or not at all; its owner alone can read it."""
    temporary = path.with_suffix(".part")
    file = os.open(temporary, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600)
    with os.fdopen(file, "wb") as opened:
        opened.write(content)
        opened.flush()
        os.fsync(opened.fileno())
    temporary.replace(path)


def _sync_directory(directory: Path) -> None:
    file = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(file)
    finally:
        os.close(file)

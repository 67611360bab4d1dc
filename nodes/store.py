"""Blobs on disk, named by their sha256: what has been shipped to this node, and what is still arriving.

    DIR/blobs/<sha256>        complete and verified when it was written
    DIR/parts/<sha256>.part   arriving, or broken off; the next upload continues it
    DIR/packed/<sha256>       which shard a packed file held (the file itself is gone once it has been unpacked)

Every method blocks on the disk: call it from a worker thread. All of them may be called from several threads, and several
processes may share a directory. What an earlier process left on disk is hashed again before it is used for the first time.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
from collections import Counter
from collections.abc import Collection, Iterator, Set
from pathlib import Path

from nodes.blob import BlobWriter, check_sha256, lock_file, translated, write_private
from splitnet.errors import BadInput, BadShard, NotFound, StorageFailure
from splitnet.shard import DEFAULT_LIMITS, MANIFEST, Manifest, Shard, ShardLimits, check_member
from splitnet.shard.directory import check_param_bytes, hash_file
from splitnet.shard.packed import PackedShard

__all__ = ["BlobStore", "BlobWriter"]

_RESERVE_BYTES = 16 << 20  # left free on the disk, for logs and the file system itself
_Signature = tuple[int, int, int]  # inode, size, time of change: differs when a file was replaced or written to


class BlobStore:
    """`limit_bytes`: what the store may hold altogether, 0 for as much as the disk. Raises StorageFailure where the directory
    cannot be made. Files are readable by their owner only."""

    def __init__(self, directory: str | Path, *, limit_bytes: int = 0, limits: ShardLimits = DEFAULT_LIMITS) -> None:
        self.directory = Path(directory)
        self.limit_bytes = limit_bytes
        self.limits = limits
        self._verified: dict[str, _Signature] = {}
        self._shards: dict[str, Shard] = {}
        self._held: Counter[str] = Counter()
        self._lock = threading.Lock()  # guards the three records above; never held while hashing
        with translated(f"the data directory {str(self.directory)!r}"):
            for part in ("", "blobs", "parts", "packed"):
                (self.directory / part).mkdir(mode=0o700, parents=True, exist_ok=True)
            self.directory.chmod(0o700)

    def has(self, sha256: str) -> bool:
        """Whether the blob is here, whole. Hashes it first where an earlier process left it; a blob that changed on disk is
        removed, and the answer is no."""
        try:
            self._verify(sha256)
        except (NotFound, BadShard):
            return False
        return True

    def path(self, sha256: str) -> Path:
        """The file of a blob, its bytes verified. Raises NotFound, BadShard."""
        check_sha256(sha256)
        return self._verify(sha256)

    def offset(self, sha256: str, size_bytes: int) -> int:
        """How many bytes of the blob are here: `size_bytes` when it is complete. Raises BadShard where the blob has another size."""
        _check_header(sha256, size_bytes)
        if self.unpacked(sha256) is not None:
            return size_bytes
        if self.has(sha256):
            actual = self._blob(sha256).stat().st_size
            if actual != size_bytes:
                raise BadShard(
                    f"blob {sha256[:12]} has {actual} bytes, the sender says {size_bytes}",
                    remedy="send the size of the very bytes that were hashed",
                )
            return size_bytes
        try:
            return min(self._part(sha256).stat().st_size, size_bytes)
        except FileNotFoundError:
            return 0

    def writer(self, sha256: str, size_bytes: int) -> BlobWriter:
        """Takes up the upload of a blob where it broke off (`.offset` says where). Raises Overloaded, with `retry_after_s`, while another
        upload of the same blob runs, and StorageFailure where it would not fit."""
        _check_header(sha256, size_bytes)
        path = self._blob(sha256)
        return BlobWriter(
            self._part(sha256), path, sha256, size_bytes, check_room=self.check_room, committed=lambda: self._mark(sha256, _signature(path))
        )

    def shard(self, sha256: str) -> Shard:
        """The shard whose manifest has this sha256, every member present and checked. Raises NotFound where something was not
        shipped, BadShard where something is not as it must be (the blob is then removed, so that it is shipped again)."""
        with self._lock:
            known = self._shards.get(sha256)
        if known is not None and all(self._is_verified(m.sha256) for m in known.manifest.members.values()) and self._is_verified(sha256):
            return known
        place = f"shard {sha256[:12]}"
        path = self._verify(sha256, place)
        if path.stat().st_size > self.limits.manifest_bytes:
            raise BadShard(
                f"{place}: the manifest has {path.stat().st_size} bytes, the limit is {self.limits.manifest_bytes}",
                remedy="cut the model again",
            )
        manifest = Manifest.from_bytes(path.read_bytes(), place=f"{place}: {MANIFEST}", limits=self.limits)
        files, weight_bytes = {}, 0
        for name, member in manifest.members.items():
            file = self._verify(member.sha256, f"{place}: {name}")
            if file.stat().st_size != member.size_bytes:
                raise BadShard(
                    f"{place}: {name}: the manifest says {member.size_bytes} bytes, the file has {file.stat().st_size}",
                    remedy="cut the model again",
                )
            with translated(f"{place}: {name}"):
                weight_bytes += check_member(file, name, place=f"{place}: {name}", limits=self.limits)
            files[name] = file
        check_param_bytes(manifest, weight_bytes, place)
        shard = Shard(path, manifest, files)
        with self._lock:
            self._shards[sha256] = shard
        return shard

    def unpack_packed(self, sha256: str) -> Shard:
        """Takes a packed shard (shipped as one blob) apart into its members and drops the packed file. Idempotent. Raises BadShard for
        an archive that is not what it should be: the blob is removed then, and so is what had been unpacked of it."""
        if (known := self.unpacked(sha256)) is not None:
            return self.shard(known)
        path = self._verify(sha256, f"packed shard {sha256[:12]}")
        made: list[str] = []
        try:
            with PackedShard(path, self.limits) as packed:
                for name, member in packed.manifest.members.items():
                    if not self.has(member.sha256):
                        made.append(member.sha256)
                        self._store(member.sha256, member.size_bytes, packed.chunks(name))
                manifest = packed.manifest
                if not self.has(manifest.sha256):
                    made.append(manifest.sha256)
                    self._store(manifest.sha256, len(packed.manifest_bytes), iter([packed.manifest_bytes]))
            shard = self.shard(manifest.sha256)
        except BadShard:
            for blob in (*made, sha256):
                self._remove(blob)
            raise
        with translated(f"packed shard {sha256[:12]}"):
            write_private(self.directory / "packed" / sha256, manifest.sha256.encode())
        self._remove(sha256)
        return shard

    def unpacked(self, sha256: str) -> str | None:
        """The sha256 of the manifest of the shard that the packed file of this name held, where all of it is still here."""
        check_sha256(sha256)
        try:
            manifest = (self.directory / "packed" / sha256).read_text()
        except (FileNotFoundError, UnicodeDecodeError):
            return None
        try:
            self.shard(manifest)
        except (BadInput, BadShard, NotFound):
            return None
        return manifest

    @contextlib.contextmanager
    def holding(self, names: Collection[str]) -> Iterator[None]:
        """Nothing removes these blobs, nor the members of those that are manifests, until the block is left. Raises BadInput for what is no
        name of a blob."""
        for sha256 in names:
            check_sha256(sha256)
        with self._lock:
            self._held.update(names)
        try:
            yield
        finally:
            with self._lock:
                self._held.subtract(names)
                self._held = +self._held

    def delete(self, names: Collection[str], in_use: Set[str]) -> int:
        """Removes these blobs, and what has arrived of them, but for what is in use as `delete_unused` has it, or is held. Returns the bytes
        that became free."""
        for sha256 in names:
            check_sha256(sha256)
        keep = self._kept(in_use)
        return sum(self._drop_blob(name) + self._drop_part(self._part(name)) for name in set(names) - keep)

    def delete_unused(self, in_use: Set[str]) -> int:
        """Removes every blob but those held and in use: a shard (by its manifest's sha256) keeps its members. Uploads that broke off go too,
        those that run stay. Returns the bytes that became free. What is being activated must stand in `in_use` already."""
        keep = self._kept(in_use)
        freed = sum(self._drop_blob(path.name) for path in (self.directory / "blobs").iterdir() if path.name not in keep)
        freed += sum(self._drop_part(path) for path in (self.directory / "parts").iterdir())
        for path in (self.directory / "packed").iterdir():
            if path.read_text() not in keep:
                path.unlink(missing_ok=True)
        return freed

    def used_bytes(self) -> int:
        """What blobs and parts take on disk."""
        total = 0
        for part in ("blobs", "parts"):
            for path in (self.directory / part).iterdir():
                try:
                    total += path.stat().st_size
                except FileNotFoundError:
                    continue  # committed or removed meanwhile
        return total

    def check_room(self, more_bytes: int, what: str) -> None:
        """Raises StorageFailure where that many bytes more would not fit."""
        free = shutil.disk_usage(self.directory).free - _RESERVE_BYTES
        if more_bytes > free:
            raise StorageFailure(
                f"{what} needs {more_bytes} bytes more, the disk of {str(self.directory)!r} has {max(0, free)} to spare",
                remedy="free space there, `splitnet unload` a deployment, or start the node with another --data directory",
            )
        if self.limit_bytes and self.used_bytes() + more_bytes > self.limit_bytes:
            raise StorageFailure(
                f"{what} needs {more_bytes} bytes more, the store holds {self.used_bytes()} of {self.limit_bytes} bytes",
                remedy="`splitnet unload` a deployment, or start the node with a larger limit",
            )

    def _blob(self, sha256: str) -> Path:
        check_sha256(sha256)
        return self.directory / "blobs" / sha256

    def _part(self, sha256: str) -> Path:
        check_sha256(sha256)
        return self.directory / "parts" / f"{sha256}.part"

    def _is_verified(self, sha256: str) -> bool:
        with self._lock:
            known = self._verified.get(sha256)
        return known is not None and known == _signature(self._blob(sha256))

    def _verify(self, sha256: str, what: str = "") -> Path:
        """The blob's path, its bytes known to be right. Raises NotFound, or BadShard for a blob that is not what its name says."""
        path = self._blob(sha256)
        what = what or f"blob {sha256[:12]}"
        signature = _signature(path)
        if signature is None:
            raise NotFound(
                f"{what}: blob {sha256[:12]} is not on this node", remedy="run `splitnet deploy` again: it ships what is missing"
            )
        with self._lock:
            if self._verified.get(sha256) == signature:
                return path
        with translated(what):
            actual = hash_file(path)
        if actual != sha256:
            self._remove(sha256)
            raise BadShard(
                f"{what}: blob {sha256[:12]} was changed on disk: its sha256 is now {actual[:12]}; it was removed",
                remedy="run `splitnet deploy` again, and check the disk",
            )
        self._mark(sha256, signature)
        return path

    def _mark(self, sha256: str, signature: _Signature | None) -> None:
        if signature is not None:
            with self._lock:
                self._verified[sha256] = signature

    def _remove(self, sha256: str) -> None:
        with self._lock:
            self._verified.pop(sha256, None)
            self._shards.pop(sha256, None)
        with translated(f"blob {sha256[:12]}"):
            self._blob(sha256).unlink(missing_ok=True)

    def _kept(self, in_use: Set[str]) -> set[str]:
        with self._lock:
            keep = {*in_use, *self._held}
        for sha256 in tuple(keep):
            try:
                if self._blob(sha256).stat().st_size > self.limits.manifest_bytes:
                    continue
                manifest = Manifest.from_bytes(self._blob(sha256).read_bytes(), limits=self.limits)
            except (FileNotFoundError, BadShard):
                continue  # a member, or gone
            keep.update(member.sha256 for member in manifest.members.values())
        return keep

    def _drop_blob(self, sha256: str) -> int:
        try:
            size = self._blob(sha256).stat().st_size
        except FileNotFoundError:
            return 0
        self._remove(sha256)
        return size

    def _drop_part(self, path: Path) -> int:
        """Unless its upload runs."""
        try:
            with path.open("rb") as part:
                if not lock_file(part.fileno()):
                    return 0
                size = path.stat().st_size
                path.unlink()
                return size
        except FileNotFoundError:
            return 0  # committed meanwhile

    def _store(self, sha256: str, size_bytes: int, chunks: Iterator[bytes]) -> None:
        with self.writer(sha256, size_bytes) as writer:
            writer.restart()
            try:
                for chunk in chunks:
                    writer.write(chunk)
                writer.commit()
            except BadShard:
                writer.discard()
                raise


def _check_header(sha256: str, size_bytes: int) -> None:
    check_sha256(sha256)
    if size_bytes < 0:
        raise BadInput(f"blob {sha256[:12]}: negative size {size_bytes}")


def _signature(path: Path) -> _Signature | None:
    try:
        status = path.stat()
    except FileNotFoundError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns

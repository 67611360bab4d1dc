"""A shard packed in one .zip file: deterministic to write, bounded to read.

The archive holds manifest.json and the members, nothing else. splitnet stores them uncompressed; an archive that somebody
deflated is read too, under limits: nothing is decompressed past its declared size, and the declared sizes come from the manifest.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import stat
import struct
import tempfile
import weakref
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Self

from splitnet.errors import AlreadyExists, BadShard
from splitnet.shard.directory import MANIFEST, Shard, check_member, check_param_bytes
from splitnet.shard.manifest import DEFAULT_LIMITS, Manifest, ShardLimits, fault, looks_pickled_name

__all__ = ["PackedShard", "open_packed", "pack", "unpack"]

_CHUNK_BYTES = 1 << 20
_MAX_DIRECTORY_BYTES = 1 << 20
_MAX_RATIO = 200  # deflate reaches 1032 on zeros; weights and graphs stay far below this
_RATIO_FROM_BYTES = 1 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)
_END, _END64, _LOCATOR64 = b"PK\x05\x06", b"PK\x06\x06", b"PK\x06\x07"
_END_BYTES, _LOCATOR64_BYTES, _END64_BYTES, _LOCAL_HEADER_BYTES = 22, 20, 56, 30
_DAMAGED = "copy the file again, or pack the shard again"
_HOSTILE = "do not deploy this file: it was made to exhaust the node"
#: What zipfile and zlib raise for damaged archives.
_ZIP_ERRORS = (
    zipfile.BadZipFile,
    zipfile.LargeZipFile,
    zlib.error,
    struct.error,
    EOFError,
    NotImplementedError,
    RuntimeError,
    ValueError,
    KeyError,
    OverflowError,
)


def pack(shard: Shard, file: str | Path) -> Path:
    """Writes the shard to one file: the same shard always gives the same bytes. Raises BadShard when a member changed since it was opened."""
    file = Path(file)
    temporary = file.with_name(file.name + ".part")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_entry(MANIFEST), shard.manifest.to_bytes())
            for name, member in sorted(shard.manifest.members.items()):
                digest = hashlib.sha256()
                with (
                    shard.member(name).open("rb") as source,
                    archive.open(_entry(name), "w", force_zip64=member.size_bytes >= 1 << 31) as target,
                ):
                    while chunk := source.read(_CHUNK_BYTES):
                        digest.update(chunk)
                        target.write(chunk)
                if digest.hexdigest() != member.sha256:
                    fault(str(shard.path), f"member {name!r} changed while it was packed")
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


def unpack(file: str | Path, directory: str | Path, limits: ShardLimits = DEFAULT_LIMITS) -> Shard:
    """Unpacks into a new or empty directory, everything checked. On failure the directory is left empty. Raises BadShard;
    AlreadyExists where the directory holds something."""
    file, directory = Path(file), Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if any(directory.iterdir()):
        raise AlreadyExists(f"the directory {str(directory)!r} is not empty", remedy="unpack into a new directory")
    try:
        with PackedShard(file, limits) as packed:
            weight_bytes = 0
            for name in packed.manifest.members:
                with (directory / name).open("wb") as target:
                    for chunk in packed.chunks(name):
                        target.write(chunk)
                weight_bytes += check_member(directory / name, name, place=f"{file}: {name}", limits=limits)
            check_param_bytes(packed.manifest, weight_bytes, str(file))
            (directory / MANIFEST).write_bytes(packed.manifest_bytes)
            return Shard(directory, packed.manifest, {name: directory / name for name in packed.manifest.members})
    except BaseException:
        for entry in directory.iterdir():
            entry.unlink()
        raise


def open_packed(file: Path, *, limits: ShardLimits = DEFAULT_LIMITS) -> Shard:
    """Unpacks to a temporary directory that is removed with the Shard."""
    directory = tempfile.mkdtemp(prefix="splitnet-shard-")
    try:
        unpacked = unpack(file, directory, limits)
    except BaseException:
        os.rmdir(directory)  # unpack has left it empty
        raise
    shard = Shard(file, unpacked.manifest, unpacked.files)
    weakref.finalize(shard, shutil.rmtree, directory, ignore_errors=True)
    return shard


class PackedShard:
    """A packed shard being read. A context manager; raises BadShard at once for an archive that is not what it should be."""

    def __init__(self, file: Path, limits: ShardLimits = DEFAULT_LIMITS) -> None:
        self.file = file
        self.limits = limits
        self._place = str(file)
        _check_end(file, limits)
        with self._translated():
            self._archive = zipfile.ZipFile(file)
        try:
            self._entries = self._checked_entries()
            self.manifest_bytes = self._read_manifest()
            self.manifest = Manifest.from_bytes(self.manifest_bytes, place=f"{file}: {MANIFEST}", limits=limits)
            self._check_against_manifest()
        except BaseException:
            self._archive.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self._archive.close()

    def chunks(self, name: str) -> Iterator[bytes]:
        """A member's bytes. Raises BadShard, after the last chunk, unless size and sha256 are the manifest's; never yields more
        bytes than the manifest declares."""
        member = self.manifest.members[name]
        place = f"{self._place}: {name}"
        digest, left = hashlib.sha256(), member.size_bytes
        with self._translated(), self._archive.open(self._entries[name]) as source:
            while chunk := source.read(min(_CHUNK_BYTES, left + 1)):
                left -= len(chunk)
                if left < 0:
                    fault(place, f"zip bomb: more than the declared {member.size_bytes} bytes", _HOSTILE)
                digest.update(chunk)
                yield chunk
        if left:
            fault(place, f"truncated: {left} of {member.size_bytes} bytes are missing", _DAMAGED)
        if digest.hexdigest() != member.sha256:
            fault(place, f"wrong sha256: the manifest says {member.sha256}, the file has {digest.hexdigest()}", _DAMAGED)

    def _checked_entries(self) -> dict[str, zipfile.ZipInfo]:
        entries: dict[str, zipfile.ZipInfo] = {}
        for info in self._archive.infolist():
            name = info.filename
            place = f"{self._place}: {name!r:.200}"
            # zipfile cuts a name at its first NUL and turns os.sep into "/": judge the name that stands in the archive
            if info.orig_filename != name or "/" in name or "\\" in name or ":" in name or name in ("", ".", ".."):
                fault(
                    place,
                    "is not a plain file name: it would leave the shard's directory",
                    "do not deploy this shard: it was tampered with",
                )
            if stat.S_ISLNK(info.external_attr >> 16):
                fault(place, "is a symbolic link; a shard holds plain files only", "pack the file itself")
            if name in entries:
                fault(place, "stands twice in the archive", _DAMAGED)
            if looks_pickled_name(name):
                fault(
                    place,
                    "pickled member: splitnet never reads pickles",
                    "store weights as safetensors and the graph as JSON: cut the model again",
                )
            if info.flag_bits & 1:
                fault(place, "is encrypted", "pack the shard without a password")
            if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
                fault(place, f"compression method {info.compress_type} is not read here", "pack the shard with `splitnet.shard.pack`")
            if info.file_size > _RATIO_FROM_BYTES and info.file_size > _MAX_RATIO * info.compress_size:
                fault(place, f"zip bomb: {info.compress_size} bytes claim to hold {info.file_size}", _HOSTILE)
            if info.compress_type == zipfile.ZIP_STORED and info.file_size != info.compress_size:
                fault(place, f"stored {info.compress_size} bytes claim to be {info.file_size}", _DAMAGED)
            entries[name] = info
        total = sum(info.file_size for info in entries.values())
        if total > self.limits.total_bytes:
            fault(self._place, f"zip bomb: the members claim {total} bytes, the limit is {self.limits.total_bytes}", _HOSTILE)
        self._check_overlap(entries)
        return entries

    def _check_overlap(self, entries: dict[str, zipfile.ZipInfo]) -> None:
        """Members that share bytes are how a small file holds a large bomb (https://www.bamsoftware.com/hacks/zipbomb/)."""
        end = 0
        for info in sorted(entries.values(), key=lambda i: i.header_offset):
            if info.header_offset < 0:  # zipfile moves all offsets by what seems to be missing before the directory
                fault(self._place, "damaged archive: bytes are missing in it", _DAMAGED)
            if info.header_offset < end:
                fault(f"{self._place}: {info.filename!r:.200}", "zip bomb: shares its bytes with another member", _HOSTILE)
            end = info.header_offset + _LOCAL_HEADER_BYTES + info.compress_size
        if end > self.file.stat().st_size:
            fault(self._place, "truncated: a member reaches past the end of the file", _DAMAGED)

    def _read_manifest(self) -> bytes:
        if MANIFEST not in self._entries:
            fault(self._place, f"not a packed shard: it has no {MANIFEST}", "pack one with `splitnet.shard.pack`")
        size = self._entries[MANIFEST].file_size
        if size > self.limits.manifest_bytes:
            fault(self._place, f"the manifest has {size} bytes, the limit is {self.limits.manifest_bytes}")
        with self._translated(), self._archive.open(self._entries[MANIFEST]) as source:
            return source.read(self.limits.manifest_bytes + 1)

    def _check_against_manifest(self) -> None:
        members = self.manifest.members
        if unknown := sorted(set(self._entries) - set(members) - {MANIFEST}):
            fault(self._place, f"unknown member {unknown[0]!r:.200}: the manifest does not list it", "remove it, or cut the model again")
        for name, member in members.items():
            if name not in self._entries:
                fault(self._place, f"member {name!r} is missing", _DAMAGED)
            size = self._entries[name].file_size
            if size != member.size_bytes:
                what = "truncated" if size < member.size_bytes else "too long"
                fault(f"{self._place}: {name}", f"{what}: the manifest says {member.size_bytes} bytes, the archive holds {size}", _DAMAGED)

    @contextmanager
    def _translated(self) -> Iterator[None]:
        try:
            yield
        except BadShard:
            raise
        except (*_ZIP_ERRORS, OSError) as error:
            fault(self._place, f"damaged archive: {error!s:.200}", _DAMAGED)


def _check_end(file: Path, limits: ShardLimits) -> None:
    """The end-of-archive record is read before zipfile does, which would read a directory of any size into memory. An archive with
    a comment is refused: the record must be the last bytes."""
    tail_bytes = _END_BYTES + _LOCATOR64_BYTES + _END64_BYTES
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(0, size - tail_bytes))
        tail = opened.read(tail_bytes)
    end = tail[-_END_BYTES:]
    if len(end) < _END_BYTES or end[:4] != _END:
        fault(str(file), "not a packed shard: it does not end as a zip archive does (truncated?)", _DAMAGED)
    entries, directory_bytes = struct.unpack("<HL", end[10:16])
    if tail[-_END_BYTES - _LOCATOR64_BYTES :][:4] == _LOCATOR64 and tail[:4] == _END64:
        entries, directory_bytes = struct.unpack("<QQ", tail[32:48])
    if entries > limits.members + 1 or directory_bytes > _MAX_DIRECTORY_BYTES:
        fault(
            str(file),
            f"zip bomb: the archive claims {entries} members in {directory_bytes} bytes of directory, the limit is {limits.members} members",
            _HOSTILE,
        )


def _entry(name: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(name, _EPOCH)
    info.create_system = 3  # unix, on every system
    info.external_attr = (stat.S_IFREG | 0o600) << 16
    return info

"""A plan and its shards in one file, to be carried to where there is no network: what `splitnet deploy --bundle` needs, every byte by its hash.

An uncompressed zip archive: `bundle.json` (format, version, the sha256 and size of every other member, and what the operator signed), `plan.json`,
and `shards/STAGE/MEMBER`. The same plan and shards give the same bytes.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import shutil
import stat
import struct
import tempfile
import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO, NoReturn

from splitnet.errors import BadPlan, BadShard
from splitnet.plan import Plan
from splitnet.preflight import open_shards
from splitnet.shard import Shard

__all__ = ["BUNDLE_VERSION", "Bundle", "open_bundle", "write_bundle"]

BUNDLE_VERSION = 1
_FORMAT = "splitnet-bundle"
_INDEX, _PLAN, _SHARDS = "bundle.json", "plan.json", "shards"
_CHUNK_BYTES = 1 << 20
_MOST_MEMBERS = 65536
_MOST_INDEX_BYTES = 16 << 20
_MOST_PLAN_BYTES = 64 << 20
_EPOCH = (1980, 1, 1, 0, 0, 0)
_PART = r"(?!\.)[A-Za-z0-9._-]{1,100}"
_MEMBER = re.compile(rf"{_PLAN}|{_SHARDS}/{_PART}/{_PART}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_DAMAGED = "copy the bundle again, or make it again with `splitnet bundle`"
_END = struct.Struct("<4s4H2LH")
_LOCATOR64_BYTES, _END64_BYTES = 20, 56


@dataclass(frozen=True)
class Bundle:
    """An opened bundle, all of it checked. `shards` lie in a temporary folder that goes with the context. `signatures`: of shards, by the
    sha256 of their manifests, as text; whoever has the operator's key checks them."""

    plan: Plan
    shards: Mapping[str, Shard]
    signatures: Mapping[str, str] = field(default_factory=dict)


def write_bundle(
    plan: Plan, shards: Mapping[str, Shard | str | Path] | str | Path, file: str | Path, *, signatures: Mapping[str, str] | None = None
) -> Path:
    """Raises BadPlan or BadShard where plan and shards do not belong together, or a shard has changed meanwhile. An existing file is replaced,
    once the new one is whole."""
    opened = open_shards(plan, shards)
    plan = plan.with_shards({stage: shard.sha256 for stage, shard in opened.items()})
    contents: dict[str, bytes | Path] = {_PLAN: plan.to_json().encode()}
    members: dict[str, dict[str, Any]] = {_PLAN: _described(plan.to_json().encode())}
    for stage, shard in opened.items():
        manifest = shard.manifest.to_bytes()
        contents[f"{_SHARDS}/{stage}/manifest.json"], members[f"{_SHARDS}/{stage}/manifest.json"] = manifest, _described(manifest)
        for name, member in shard.manifest.members.items():
            contents[f"{_SHARDS}/{stage}/{name}"] = shard.member(name)
            members[f"{_SHARDS}/{stage}/{name}"] = {"sha256": member.sha256, "size_bytes": member.size_bytes}
    for path in members:
        if not _MEMBER.fullmatch(path):
            raise BadPlan(f"{path!r} cannot stand in a bundle", remedy="name stages with letters, digits, '.', '_' and '-'")
    index = {"format": _FORMAT, "version": BUNDLE_VERSION, "members": members, "signatures": dict(signatures or {})}
    file = Path(file)
    temporary = file.with_name(file.name + ".part")
    try:
        with zipfile.ZipFile(temporary, "w", zipfile.ZIP_STORED) as archive:
            archive.writestr(_entry(_INDEX), json.dumps(index, indent=1, sort_keys=True))
            for path, content in contents.items():
                _put(archive, path, content, members[path])
        temporary.replace(file)
    finally:
        temporary.unlink(missing_ok=True)
    return file


@contextlib.contextmanager
def open_bundle(file: str | Path) -> Iterator[Bundle]:
    """Checks and unpacks. Raises BadShard that says what is wrong and where, BadPlan for a plan that does not hold together. Nothing is left
    on the disk afterwards."""
    file = Path(file)
    with tempfile.TemporaryDirectory(prefix="splitnet-bundle-") as folder:
        index = _unpack(file, Path(folder))
        plan = Plan.from_json((Path(folder) / _PLAN).read_bytes())
        shards = open_shards(plan, Path(folder) / _SHARDS)
        yield Bundle(plan, shards, _signatures(file, index.get("signatures", {})))


def _unpack(file: Path, folder: Path) -> dict[str, Any]:
    try:
        _check_end(file)
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            if not entries or entries[0].filename != _INDEX:
                _fault(file, f"not a bundle: it does not begin with {_INDEX}", "make one with `splitnet bundle`")
            index = _read_index(file, archive, entries[0])
            _check_room(file, folder, index)
            for entry in entries[1:]:
                _take(file, archive, entry, index["members"], folder)
            if left := sorted(set(index["members"]) - {entry.filename for entry in entries}):
                _fault(file, f"member {left[0]!r} is missing")
            return index
    except (
        zipfile.BadZipFile,
        zipfile.LargeZipFile,
        struct.error,
        EOFError,
        NotImplementedError,
        RuntimeError,
        ValueError,
        OSError,
    ) as error:
        _fault(file, f"cannot be read: {error!s:.200}")


def _check_end(file: Path) -> None:
    """Before zipfile reads a directory of any size into memory; see `splitnet.shard.packed`."""
    size = file.stat().st_size
    with file.open("rb") as opened:
        opened.seek(max(0, size - _END.size - _LOCATOR64_BYTES - _END64_BYTES))
        tail = opened.read()
    if len(tail) < _END.size or tail[-_END.size :][:4] != b"PK\x05\x06":
        _fault(file, "not a bundle: it does not end as a zip archive does (truncated?)")
    *_, entries, directory_bytes, _, _ = _END.unpack(tail[-_END.size :])
    if tail[-_END.size - _LOCATOR64_BYTES :][:4] == b"PK\x06\x07" and len(tail) == _END.size + _LOCATOR64_BYTES + _END64_BYTES:
        entries, directory_bytes = struct.unpack("<QQ", tail[32:48])
    if entries > _MOST_MEMBERS or directory_bytes > _MOST_INDEX_BYTES:
        _fault(
            file, f"claims {entries} members in {directory_bytes} bytes of directory", "do not use this file: it was made to exhaust memory"
        )


def _read_index(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo) -> dict[str, Any]:
    _check_stored(file, entry)
    if entry.file_size > _MOST_INDEX_BYTES:
        _fault(file, f"{_INDEX} has {entry.file_size} bytes, at most {_MOST_INDEX_BYTES} are read")
    try:
        index = json.loads(archive.read(entry))
    except RecursionError:
        index = None
    if not isinstance(index, dict) or index.get("format") != _FORMAT:
        _fault(file, f"not a bundle: {_INDEX} does not say {_FORMAT!r}", "make one with `splitnet bundle`")
    if index.get("version") != BUNDLE_VERSION:
        _fault(file, f"has version {index.get('version')!r}, this splitnet reads {BUNDLE_VERSION}", "update splitnet on this machine")
    members = index.get("members")
    if not isinstance(members, dict) or _PLAN not in members or len(members) > _MOST_MEMBERS:
        _fault(file, f"{_INDEX} names no {_PLAN}")
    for path, member in members.items():
        size = member.get("size_bytes") if isinstance(member, dict) else None
        if not _MEMBER.fullmatch(path) or type(size) is not int or size < 0 or not _SHA256.fullmatch(str(member.get("sha256"))):
            _fault(file, f"{_INDEX}: {path!r:.200} is no member of a bundle", "do not deploy this file: it was tampered with")
    if members[_PLAN]["size_bytes"] > _MOST_PLAN_BYTES:
        _fault(file, f"the plan has {members[_PLAN]['size_bytes']} bytes, at most {_MOST_PLAN_BYTES} are read")
    return index


def _check_room(file: Path, folder: Path, index: Mapping[str, Any]) -> None:
    total = sum(member["size_bytes"] for member in index["members"].values())
    if total > file.stat().st_size:
        _fault(file, f"{_INDEX} claims {total} bytes, the file has {file.stat().st_size}")
    if total > shutil.disk_usage(folder).free:
        _fault(file, f"{total} bytes do not fit into {str(folder.parent)!r}", "set TMPDIR to where there is room")


def _take(file: Path, archive: zipfile.ZipFile, entry: zipfile.ZipInfo, members: Mapping[str, Any], folder: Path) -> None:
    member = members.get(entry.filename)
    if member is None or entry.orig_filename != entry.filename:
        _fault(file, f"member {entry.filename!r:.200} is not named in {_INDEX}", "do not deploy this file: it was tampered with")
    _check_stored(file, entry)
    target = folder / entry.filename
    if entry.file_size != member["size_bytes"] or target.exists():
        _fault(file, f"{entry.filename}: {entry.file_size} bytes, {_INDEX} says {member['size_bytes']}, once")
    target.parent.mkdir(parents=True, exist_ok=True)
    with archive.open(entry) as source, target.open("wb") as copy:
        actual = _copy(source, copy)
    if actual != (member["sha256"], member["size_bytes"]):
        _fault(file, f"{entry.filename}: wrong sha256: {_INDEX} says {member['sha256'][:12]}, the file has {actual[0][:12]}")


def _check_stored(file: Path, entry: zipfile.ZipInfo) -> None:
    if entry.compress_type != zipfile.ZIP_STORED or entry.file_size != entry.compress_size or entry.flag_bits & 1:
        _fault(file, f"{entry.filename!r:.200} is not stored as it is", "make the bundle with `splitnet bundle`")


def _signatures(file: Path, signatures: Any) -> dict[str, str]:
    if not isinstance(signatures, dict) or not all(isinstance(one, str) for one in signatures.values()):
        _fault(file, f"{_INDEX}: the signatures are no object of strings")
    return signatures


def _put(archive: zipfile.ZipFile, path: str, content: bytes | Path, member: Mapping[str, Any]) -> None:
    if isinstance(content, bytes):
        archive.writestr(_entry(path), content)
        return
    with content.open("rb") as source, archive.open(_entry(path), "w", force_zip64=member["size_bytes"] >= 1 << 31) as target:
        actual = _copy(source, target)
    if actual != (member["sha256"], member["size_bytes"]):
        _fault(content, "changed while it was bundled", "cut the model again")


def _copy(source: Any, target: BinaryIO | Any) -> tuple[str, int]:
    digest, size = hashlib.sha256(), 0
    while chunk := source.read(_CHUNK_BYTES):
        digest.update(chunk)
        size += len(chunk)
        target.write(chunk)
    return digest.hexdigest(), size


def _described(content: bytes) -> dict[str, Any]:
    return {"sha256": hashlib.sha256(content).hexdigest(), "size_bytes": len(content)}


def _entry(path: str) -> zipfile.ZipInfo:
    info = zipfile.ZipInfo(path, _EPOCH)
    info.create_system = 3  # unix, on every system
    info.external_attr = (stat.S_IFREG | 0o600) << 16
    return info


def _fault(file: Path, what: str, remedy: str = _DAMAGED) -> NoReturn:
    raise BadShard(f"{file}: {what}", remedy=remedy)

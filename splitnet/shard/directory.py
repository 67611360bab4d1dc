"""A shard as a directory of files: write it, open it, check everything in it."""

from __future__ import annotations

import hashlib
import os
import stat
from collections.abc import Container, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from splitnet import onnx_format
from splitnet.decoder_format import DECODER_MEMBER, DecoderSpec
from splitnet.errors import BadShard
from splitnet.graph import parse
from splitnet.noise import Noise
from splitnet.onnx_nouns import ONNX_MEMBER
from splitnet.shard.manifest import (
    DEFAULT_LIMITS,
    ENGINE_FORMATS,
    Manifest,
    Member,
    ShardLimits,
    check_member_name,
    fault,
    looks_pickled_name,
)
from splitnet.shard.weights import looks_pickled, read_header
from splitnet.tensors import TensorSpec

__all__ = ["MANIFEST", "Shard", "check_member", "check_param_bytes", "hash_file", "open_shard", "write_shard"]

MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 20
_PART = ".part"  # a member that is being written
_TAMPERED = "the shard was changed or damaged after it was cut: cut the model again, or copy the shard again"


@dataclass(frozen=True)
class Shard:
    """A shard whose every member was checked. `path` is its directory (or the packed file); members are found by `member`."""

    path: Path
    manifest: Manifest
    files: Mapping[str, Path] = field(repr=False)

    @property
    def sha256(self) -> str:
        """The shard's identity: the sha256 of its manifest."""
        return self.manifest.sha256

    @property
    def weights(self) -> tuple[Path, ...]:
        """The safetensors files, in order."""
        return tuple(self.files[name] for name in sorted(self.files) if name.endswith(".safetensors"))

    def member(self, name: str) -> Path:
        """Raises BadShard where there is no such member."""
        try:
            return self.files[name]
        except KeyError:
            raise BadShard(f"{self.path}: no member {name!r}; the shard has {', '.join(sorted(self.files))}") from None


def write_shard(
    directory: str | Path,
    *,
    model: str,
    model_sha256: str,
    stage: str,
    engine: str,
    inputs: Sequence[TensorSpec],
    outputs: Sequence[TensorSpec],
    members: Mapping[str, bytes | Path],
    param_bytes: int,
    activation_bytes: int,
    notes: Sequence[str] = (),
    noise: Noise | None = None,
) -> Shard:
    """Writes the members and, last, the manifest. A member given as a path is copied (or left, where it already stands at its
    place). A shard that was in the directory is replaced, whatever its engine. Raises BadShard for content that `open_shard` would
    refuse, and leaves no manifest behind then; a directory that holds something else besides is not touched."""
    directory = Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    if engine not in ENGINE_FORMATS:
        fault(str(directory), f"engine format {engine!r} is not known; this splitnet writes {', '.join(ENGINE_FORMATS)}")
    _clear(directory, members)
    written = {}
    for name, content in members.items():
        check_member_name(name, engine, str(directory))
        written[name] = _write_member(directory / name, content)
    manifest = Manifest(
        model=model,
        model_sha256=model_sha256,
        stage=stage,
        engine=engine,
        inputs=tuple(inputs),
        outputs=tuple(outputs),
        param_bytes=param_bytes,
        activation_bytes=activation_bytes,
        members=written,
        notes=tuple(notes),
        noise=noise,
    )
    weight_bytes = sum(check_member(directory / name, name, place=f"{directory}: {name}") for name in written)
    check_param_bytes(manifest, weight_bytes, str(directory))
    _replace(directory / MANIFEST, manifest.to_bytes())
    return Shard(directory, manifest, {name: directory / name for name in written})


def open_shard(path: str | Path, *, limits: ShardLimits = DEFAULT_LIMITS) -> Shard:
    """Opens a shard's directory, or its packed .zip (unpacked to a temporary directory that lives as long as the Shard).

    Everything is checked, all hashes included: raises BadShard that says what is wrong and where. Weights are hashed piece by
    piece, never held in memory."""
    path = Path(path)
    if path.is_file():
        from splitnet.shard.packed import open_packed  # it builds on this module

        return open_packed(path, limits=limits)
    if not path.is_dir():
        fault(str(path), "no such shard", "give the directory that `splitnet plan` wrote, or a packed shard (.zip)")
    manifest = Manifest.from_bytes(_read_manifest(path / MANIFEST, limits), place=f"{path / MANIFEST}", limits=limits)
    _check_entries(path, manifest)
    if manifest.total_bytes > limits.total_bytes:
        fault(str(path), f"the members have {manifest.total_bytes} bytes, the limit is {limits.total_bytes}")
    weight_bytes = 0
    for name, member in manifest.members.items():
        place = f"{path}: {name}"
        file = path / name
        size = _regular_size(file, place)
        if size != member.size_bytes:
            what = "truncated" if size < member.size_bytes else "too long"
            fault(place, f"{what}: the manifest says {member.size_bytes} bytes, the file has {size}", _TAMPERED)
        actual = hash_file(file)
        if actual != member.sha256:
            _refuse_pickle(file, place)
            fault(place, f"wrong sha256: the manifest says {member.sha256}, the file has {actual}", _TAMPERED)
        weight_bytes += check_member(file, name, place=place, limits=limits)
    check_param_bytes(manifest, weight_bytes, str(path))
    return Shard(path, manifest, {name: path / name for name in manifest.members})


def check_member(file: Path, name: str, *, place: str = "", limits: ShardLimits = DEFAULT_LIMITS) -> int:
    """Checks a member's content, hash aside. Returns the bytes of tensors in it. Raises BadShard."""
    place = place or str(file)
    _refuse_pickle(file, place)
    if name.endswith(".safetensors"):
        return sum(tensor.end - tensor.begin for tensor in read_header(file, place=place, limits=limits).values())
    if name == "graph.json":
        size = file.stat().st_size
        if size > limits.graph_bytes:
            fault(place, f"the graph has {size} bytes, the limit is {limits.graph_bytes}")
        _check_graph(file.read_bytes(), place)
    if name == ONNX_MEMBER:
        size = file.stat().st_size
        if size > limits.graph_bytes:
            fault(place, f"the graph has {size} bytes, the limit is {limits.graph_bytes}")
        onnx_format.from_bytes(file.read_bytes(), place=place)
    if name == DECODER_MEMBER:
        size = file.stat().st_size
        if size > limits.manifest_bytes:
            fault(place, f"has {size} bytes, the limit is {limits.manifest_bytes}")
        DecoderSpec.from_bytes(file.read_bytes(), place=place)
    return 0


def check_param_bytes(manifest: Manifest, weight_bytes: int, place: str) -> None:
    """A node reserves what the manifest declares, so it must not declare less than it carries."""
    if manifest.param_bytes < weight_bytes:
        fault(place, f"the manifest declares {manifest.param_bytes} bytes of parameters, the weights hold {weight_bytes}")


def hash_file(path: Path) -> str:
    """The sha256 of a file, read piece by piece."""
    digest = hashlib.sha256()
    buffer = memoryview(bytearray(_CHUNK_BYTES))
    with path.open("rb", buffering=0) as file:
        while size := file.readinto(buffer):
            digest.update(buffer[:size])
    return digest.hexdigest()


def _clear(directory: Path, keep: Container[str]) -> None:
    """Takes away what an earlier cut left: other members, of whichever engine, and what was broken off half way."""
    found = sorted(entry.name for entry in directory.iterdir())
    for name in found:
        member = name.removesuffix(_PART)
        if member != MANIFEST and not any(form.allows(member) for form in ENGINE_FORMATS.values()):
            fault(
                str(directory),
                f"{name!r} is in the folder that the shard is to be written to, and is not part of a shard",
                "remove it, or cut into another folder",
            )
    for name in found:
        if name not in keep:
            (directory / name).unlink()


def _check_graph(data: bytes, place: str) -> None:
    try:
        parse(data)
    except BadShard as error:
        error.message = f"{place}: {error.message}"
        raise


def _check_entries(directory: Path, manifest: Manifest) -> None:
    """Every file is a member, and none is a link out of the directory."""
    for entry in sorted(os.scandir(directory), key=lambda e: e.name):
        if entry.name == MANIFEST:
            continue
        if looks_pickled_name(entry.name):
            check_member_name(entry.name, manifest.engine, str(directory))
        if entry.name not in manifest.members:
            fault(str(directory), f"unknown member {entry.name!r}: the manifest does not list it", "remove it")
    for name in manifest.members:
        if not os.path.lexists(directory / name):
            fault(str(directory), f"member {name!r} is missing", _TAMPERED)


def _regular_size(file: Path, place: str) -> int:
    status = file.lstat()
    if stat.S_ISLNK(status.st_mode):
        fault(place, "is a symbolic link; a shard holds plain files only", "copy the file itself")
    if not stat.S_ISREG(status.st_mode):
        fault(place, "is not a plain file")
    return status.st_size


def _read_manifest(file: Path, limits: ShardLimits) -> bytes:
    if not os.path.lexists(file):
        fault(
            str(file.parent),
            f"not a shard: it has no {MANIFEST}",
            "give the directory that `splitnet plan` wrote; if cutting was cut short, cut again",
        )
    size = _regular_size(file, str(file))
    if size > limits.manifest_bytes:
        fault(str(file), f"the manifest has {size} bytes, the limit is {limits.manifest_bytes}")
    return file.read_bytes()


def _refuse_pickle(file: Path, place: str) -> None:
    with file.open("rb") as opened:
        if looks_pickled(opened.read(9)):
            fault(
                place,
                "pickled member: the file is a pickle or a zip archive",
                "store weights as safetensors and the graph as JSON: cut the model again",
            )


def _write_member(target: Path, content: bytes | Path) -> Member:
    if isinstance(content, Path):
        if not (target.exists() and target.samefile(content)):
            return _copy(content, target)
        return Member(hash_file(target), target.stat().st_size)
    _replace(target, content)
    return Member(hashlib.sha256(content).hexdigest(), len(content))


def _copy(source: Path, target: Path) -> Member:
    digest, size = hashlib.sha256(), 0
    temporary = target.with_name(target.name + _PART)
    with source.open("rb") as reader, temporary.open("wb") as writer:
        while chunk := reader.read(_CHUNK_BYTES):
            writer.write(chunk)
            digest.update(chunk)
            size += len(chunk)
    temporary.replace(target)
    return Member(digest.hexdigest(), size)


def _replace(target: Path, content: bytes) -> None:
    temporary = target.with_name(target.name + _PART)
    temporary.write_bytes(content)
    temporary.replace(target)

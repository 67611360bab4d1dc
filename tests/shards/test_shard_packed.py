"""Packed shards that are not as they should be: each is refused with its own message, and nothing is left on disk."""

from __future__ import annotations

import hashlib
import json
import resource
import stat
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import pytest

from splitnet.errors import BadShard
from splitnet.shard import MANIFEST, Shard, ShardLimits, open_shard, pack, unpack


def refuse(file: Path, tmp_path: Path, **limits: int) -> str:
    target = tmp_path / "target"
    with pytest.raises(BadShard) as caught:
        unpack(file, target, ShardLimits(**limits))
    assert caught.value.remedy
    assert str(file) in caught.value.message
    assert list(target.iterdir()) == []
    return caught.value.message


def archive(file: Path, entries: list[tuple[str | zipfile.ZipInfo, bytes]], compression: int = zipfile.ZIP_STORED) -> Path:
    with zipfile.ZipFile(file, "w", compression) as opened:
        for entry, data in entries:
            opened.writestr(entry, data)
    return file


@pytest.fixture
def entries(shard: Shard) -> list[tuple[str | zipfile.ZipInfo, bytes]]:
    return [(path.name, path.read_bytes()) for path in sorted(shard.path.iterdir())]


def test_an_archive_that_somebody_deflated_is_read(entries: list[tuple[str, bytes]], shard: Shard, tmp_path: Path) -> None:
    assert open_shard(archive(tmp_path / "s.zip", entries, zipfile.ZIP_DEFLATED)).sha256 == shard.sha256


@pytest.mark.parametrize("size", [0, 1, 21, 22, 100])
def test_a_file_that_is_no_archive(tmp_path: Path, size: int) -> None:
    (tmp_path / "s.zip").write_bytes(b"x" * size)
    assert "does not end as a zip archive does" in refuse(tmp_path / "s.zip", tmp_path)


def test_a_truncated_archive(shard: Shard, tmp_path: Path) -> None:
    file = pack(shard, tmp_path / "s.zip")
    file.write_bytes(file.read_bytes()[:-30])
    assert "truncated?" in refuse(file, tmp_path)


def test_an_archive_without_its_middle(shard: Shard, tmp_path: Path) -> None:
    file = pack(shard, tmp_path / "s.zip")
    data = file.read_bytes()
    file.write_bytes(data[:100] + data[300:])
    assert "damaged archive" in refuse(file, tmp_path)


def test_no_manifest(tmp_path: Path) -> None:
    assert f"it has no {MANIFEST}" in refuse(archive(tmp_path / "s.zip", [("graph.json", b"{}")]), tmp_path)


@pytest.mark.parametrize("name", ["../graph.json", "/etc/passwd", "a/b", "..\\x", "graph.json\0.txt", "C:x"])
def test_a_path_that_leaves_the_directory(entries: list[tuple[str, bytes]], tmp_path: Path, name: str) -> None:
    plain = name.replace("\0", "?")
    file = archive(tmp_path / "s.zip", [*entries, (plain, b"x")])
    if plain != name:  # zipfile does not write such a name itself
        file.write_bytes(file.read_bytes().replace(plain.encode(), name.encode()))
    assert "it would leave the shard's directory" in refuse(file, tmp_path)
    assert not (tmp_path / "graph.json").exists()


def test_a_symbolic_link(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    link = zipfile.ZipInfo("weights-00001-of-00001.safetensors")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    assert "is a symbolic link" in refuse(archive(tmp_path / "s.zip", [*entries, (link, b"/etc/passwd")]), tmp_path)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_a_member_twice(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    assert "stands twice in the archive" in refuse(archive(tmp_path / "s.zip", [*entries, entries[0]]), tmp_path)


def test_a_pickled_member(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    assert "'data.pkl': pickled member" in refuse(archive(tmp_path / "s.zip", [*entries, ("data.pkl", b"x")]), tmp_path)


def test_an_unknown_member(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    assert "unknown member 'readme'" in refuse(archive(tmp_path / "s.zip", [*entries, ("readme", b"x")]), tmp_path)


def test_a_missing_member(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    assert "member 'weights.safetensors' is missing" in refuse(archive(tmp_path / "s.zip", entries[:-1]), tmp_path)


@pytest.mark.parametrize("change", ["changed", "shorter", "longer"])
def test_a_member_that_is_not_the_manifests(entries: list[tuple[str, bytes]], tmp_path: Path, change: str) -> None:
    name, data = entries[-1]
    other = {"changed": data[:-1] + bytes([data[-1] ^ 1]), "shorter": data[:-1], "longer": data + b"x"}[change]
    message = {"changed": "wrong sha256", "shorter": "truncated", "longer": "too long"}[change]
    assert f"{name}: {message}: the manifest says" in refuse(archive(tmp_path / "s.zip", [*entries[:-1], (name, other)]), tmp_path)


def test_an_encrypted_member(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    file = archive(tmp_path / "s.zip", entries)
    data = bytearray(file.read_bytes())
    for signature, flags in ((b"PK\x03\x04", 6), (b"PK\x01\x02", 8)):
        data[data.index(signature) + flags] |= 1
    file.write_bytes(data)
    assert "is encrypted" in refuse(file, tmp_path)


def test_a_strange_compression(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    assert "compression method 12 is not read here" in refuse(archive(tmp_path / "s.zip", entries, zipfile.ZIP_BZIP2), tmp_path)


# ---------------------------------------------------------------------------------------------------------------- zip bombs


def bomb(make_shard: Callable[..., Shard], file: Path, size: int) -> Path:
    """A valid shard but for its weights: zeros, deflated a thousandfold."""
    shard = make_shard()
    manifest = json.loads((shard.path / MANIFEST).read_bytes())
    zeros = bytes(size)
    manifest["members"]["weights.safetensors"] = {"sha256": hashlib.sha256(zeros).hexdigest(), "size_bytes": size}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")) + "\n"
    graph = shard.member("graph.json").read_bytes()
    return archive(file, [(MANIFEST, text.encode()), ("graph.json", graph), ("weights.safetensors", zeros)], zipfile.ZIP_DEFLATED)


def test_a_bomb_by_ratio(make_shard: Callable[..., Shard], tmp_path: Path) -> None:
    file = bomb(make_shard, tmp_path / "s.zip", 64 << 20)
    assert file.stat().st_size < 100_000
    assert "zip bomb: " in (message := refuse(file, tmp_path))
    assert "claim to hold 67108864" in message


def test_a_bomb_by_total(make_shard: Callable[..., Shard], tmp_path: Path) -> None:
    file = bomb(make_shard, tmp_path / "s.zip", 1 << 20)
    assert "zip bomb: the members claim" in refuse(file, tmp_path, total_bytes=1 << 19)


def test_a_bomb_that_claims_to_be_small(make_shard: Callable[..., Shard], tmp_path: Path) -> None:
    """The directory of the archive and the manifest say 4096 bytes, the stream holds 64 MiB: no more than 4096 are made of it."""
    file = bomb(make_shard, tmp_path / "s.zip", 64 << 20)
    data = bytearray(file.read_bytes())
    at = data.rindex(b"PK\x01\x02", 0, data.rindex(b"weights.safetensors"))
    struct.pack_into("<L", data, at + 24, 4096)
    file.write_bytes(data)
    refused = refuse(file, tmp_path)
    assert "truncated: the manifest says 67108864 bytes, the archive holds 4096" in refused

    zeros = bytes(4096)
    manifest = json.loads((make_shard().path / MANIFEST).read_bytes())
    manifest["members"]["weights.safetensors"] = {"sha256": hashlib.sha256(zeros).hexdigest(), "size_bytes": 4096}
    text = json.dumps(manifest, sort_keys=True, separators=(",", ":")) + "\n"
    graph = make_shard().member("graph.json").read_bytes()
    entries = [("weights.safetensors", bytes(64 << 20)), ("graph.json", graph), (MANIFEST, text.encode())]
    file = archive(tmp_path / "t.zip", entries, zipfile.ZIP_DEFLATED)
    data = bytearray(file.read_bytes())
    struct.pack_into("<L", data, data.index(b"PK\x01\x02") + 24, 4096)
    file.write_bytes(data)
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert "damaged archive: Bad CRC-32 for file 'weights.safetensors'" in refuse(file, tmp_path)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


def test_a_bomb_of_members_that_share_their_bytes(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    file = archive(tmp_path / "s.zip", entries)
    data = bytearray(file.read_bytes())
    second = data.index(b"PK\x01\x02", data.index(b"PK\x01\x02") + 4)
    struct.pack_into("<L", data, second + 42, 0)  # its bytes are to be found where the first one's are
    file.write_bytes(data)
    assert "zip bomb: shares its bytes with another member" in refuse(file, tmp_path)


def test_a_bomb_of_many_members(tmp_path: Path) -> None:
    file = archive(tmp_path / "s.zip", [(f"m{i}", b"") for i in range(1200)])
    assert "zip bomb: the archive claims 1200 members" in refuse(file, tmp_path)


def test_a_bomb_of_many_members_in_the_64_bit_form(tmp_path: Path) -> None:
    """The record that zipfile would believe says 70,000 members."""
    file = archive(tmp_path / "s.zip", [(f"{i}", b"") for i in range(70_000)])
    assert "zip bomb: the archive claims 70000 members" in refuse(file, tmp_path)


def test_a_large_manifest(entries: list[tuple[str, bytes]], tmp_path: Path) -> None:
    assert "the manifest has" in refuse(archive(tmp_path / "s.zip", entries), tmp_path, manifest_bytes=10)

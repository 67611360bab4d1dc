"""The node's store: uploads that break off, lie, collide, and disks that are full."""

from __future__ import annotations

import gc
import hashlib
import os
import shutil
import stat
import subprocess
import sys
import textwrap
import threading
from pathlib import Path

import pytest

from nodes.store import BlobStore
from splitnet.errors import BadInput, BadShard, NotFound, Overloaded, StorageFailure
from splitnet.shard import MANIFEST, Shard, pack

DATA = bytes(range(256)) * 40_000  # 10 MB


def name_of(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def put(store: BlobStore, data: bytes) -> str:
    with store.writer(name_of(data), len(data)) as writer:
        writer.write(data[writer.offset :])
        writer.commit()
    return name_of(data)


def put_shard(store: BlobStore, shard: Shard) -> str:
    for file in shard.path.iterdir():
        put(store, file.read_bytes())
    return shard.sha256


@pytest.fixture
def store(tmp_path: Path) -> BlobStore:
    return BlobStore(tmp_path / "data")


def files_of(store: BlobStore) -> list[str]:
    return sorted(str(path.relative_to(store.directory)) for path in store.directory.rglob("*") if path.is_file())


# ------------------------------------------------------------------------------------------------------------------ arriving


def test_a_blob_arrives_in_pieces(store: BlobStore) -> None:
    sha256 = name_of(DATA)
    assert store.offset(sha256, len(DATA)) == 0
    with store.writer(sha256, len(DATA)) as writer:
        for start in range(0, len(DATA), 1 << 20):
            assert writer.write(DATA[start : start + (1 << 20)]) == min(len(DATA), start + (1 << 20))
        assert not store.has(sha256)
        path = writer.commit()
    assert store.has(sha256)
    assert store.offset(sha256, len(DATA)) == len(DATA)
    assert path.read_bytes() == DATA
    assert files_of(store) == [f"blobs/{sha256}"]


def test_an_empty_blob(store: BlobStore) -> None:
    assert store.has(put(store, b""))


def test_only_the_owner_can_read(store: BlobStore) -> None:
    sha256 = put(store, DATA)
    with store.writer(name_of(b"other"), 5) as writer:
        writer.write(b"ot")
    for path in (store.directory, *store.directory.rglob("*")):
        assert stat.S_IMODE(path.stat().st_mode) == (0o700 if path.is_dir() else 0o600), path
    assert stat.S_IMODE((store.directory / "blobs" / sha256).stat().st_mode) == 0o600


def test_an_upload_that_broke_off_continues(store: BlobStore) -> None:
    sha256 = name_of(DATA)
    with store.writer(sha256, len(DATA)) as writer:
        writer.write(DATA[:3_000_001])
    assert store.offset(sha256, len(DATA)) == 3_000_001
    again = BlobStore(store.directory)  # the node was restarted, too
    assert again.offset(sha256, len(DATA)) == 3_000_001
    with again.writer(sha256, len(DATA)) as writer:
        assert writer.offset == 3_000_001
        writer.write(DATA[writer.offset :])
        writer.commit()
    assert again.has(sha256)


def test_bytes_that_are_not_the_announced_ones_are_dropped(store: BlobStore) -> None:
    sha256 = name_of(DATA)
    with store.writer(sha256, 4) as writer:
        writer.write(b"evil")
        with pytest.raises(BadShard, match=f"wrong sha256: announced {sha256}, what came has {name_of(b'evil')}"):
            writer.commit()
    assert files_of(store) == []
    assert put(store, DATA) == sha256


def test_a_part_that_rotted_is_dropped_and_the_next_upload_begins_anew(store: BlobStore) -> None:
    sha256 = name_of(DATA)
    with store.writer(sha256, len(DATA)) as writer:
        writer.write(DATA[:1000])
    (store.directory / "parts" / f"{sha256}.part").write_bytes(b"x" * 1000)
    with store.writer(sha256, len(DATA)) as writer:
        assert writer.offset == 1000
        writer.write(DATA[1000:])
        with pytest.raises(BadShard, match="wrong sha256"):
            writer.commit()
    assert store.offset(sha256, len(DATA)) == 0


def test_a_truncated_upload_is_not_accepted_and_not_lost(store: BlobStore) -> None:
    with store.writer(name_of(DATA), len(DATA)) as writer:
        writer.write(DATA[:-1])
        with pytest.raises(BadShard, match=f"truncated, {len(DATA) - 1} of {len(DATA)} bytes came"):
            writer.commit()
    assert store.offset(name_of(DATA), len(DATA)) == len(DATA) - 1


def test_more_than_was_announced(store: BlobStore) -> None:
    with store.writer(name_of(DATA), 10) as writer, pytest.raises(BadShard, match="10 bytes were announced and more came"):
        writer.write(DATA[:11])


def test_a_size_that_is_not_the_blobs(store: BlobStore) -> None:
    sha256 = put(store, DATA)
    with pytest.raises(BadShard, match=f"has {len(DATA)} bytes, the sender says 5"):
        store.offset(sha256, 5)


@pytest.mark.parametrize("sha256", ["", "../../etc/passwd", "A" * 64, "0" * 63, "0" * 64 + "\n", "0" * 65])
def test_what_is_no_sha256_never_becomes_a_path(store: BlobStore, sha256: str) -> None:
    for call in (store.has, store.shard, store.unpack_packed, lambda s: store.offset(s, 1), lambda s: store.writer(s, 1)):
        with pytest.raises(BadInput, match="is not a sha256"):
            call(sha256)


# ---------------------------------------------------------------------------------------------------------------- collisions


def test_a_second_upload_of_the_same_blob_is_told_to_come_back(store: BlobStore) -> None:
    sha256 = name_of(DATA)
    with store.writer(sha256, len(DATA)) as writer:
        writer.write(DATA[:100])
        with pytest.raises(Overloaded, match="is being received from somebody else") as caught:
            store.writer(sha256, len(DATA))
        assert caught.value.retry_after_s > 0
        with pytest.raises(Overloaded):  # another process that shares the directory
            BlobStore(store.directory).writer(sha256, len(DATA))
        writer.write(DATA[100:])
        writer.commit()
    assert store.has(sha256)


def test_a_writer_that_nobody_holds_lets_go(store: BlobStore) -> None:
    store.writer(name_of(DATA), len(DATA)).write(DATA[:7])
    gc.collect()
    with store.writer(name_of(DATA), len(DATA)) as writer:
        assert writer.offset == 7


def test_many_uploads_of_the_same_blob_at_once(store: BlobStore) -> None:
    sha256 = name_of(DATA)
    outcomes: list[str] = []

    def upload(piece: int) -> None:
        while not store.has(sha256):
            try:
                with store.writer(sha256, len(DATA)) as writer:
                    for start in range(writer.offset, len(DATA), piece):
                        writer.write(DATA[start : start + piece])
                    writer.commit()
                outcomes.append("sent")
            except Overloaded:
                outcomes.append("refused")

    threads = [threading.Thread(target=upload, args=(piece,)) for piece in (100_001, 250_000, 300_007, 1 << 20)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert outcomes.count("sent") >= 1
    assert (store.directory / "blobs" / sha256).read_bytes() == DATA
    assert files_of(store) == [f"blobs/{sha256}"]


# -------------------------------------------------------------------------------------------------------------- full disks


def test_no_room_is_known_before_a_byte_is_written(store: BlobStore) -> None:
    with pytest.raises(StorageFailure, match="needs 4611686018427387904 bytes more, the disk of") as caught:
        store.writer(name_of(DATA), 1 << 62)
    assert "free space there" in caught.value.remedy
    limited = BlobStore(store.directory, limit_bytes=len(DATA) + 10)
    put(limited, DATA)
    with pytest.raises(StorageFailure, match=f"needs 11 bytes more, the store holds {len(DATA)} of {len(DATA) + 10} bytes"):
        limited.writer(name_of(b"eleven more"), 11)
    put(limited, b"ten more!!")


def test_a_disk_that_fills_up_while_a_blob_arrives(store: BlobStore) -> None:
    """In a process of its own, whose files may not grow beyond 1 MB: what a full disk does, without the rights to make one."""
    script = f"""
        import hashlib, resource, signal
        from nodes.store import BlobStore
        from splitnet.errors import StorageFailure

        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (1_000_000, resource.RLIM_INFINITY))
        data = bytes(range(256)) * 40_000
        store = BlobStore({str(store.directory)!r})
        writer = store.writer(hashlib.sha256(data).hexdigest(), len(data))
        try:
            writer.write(data[:600_000])
            writer.write(data[600_000:1_500_000])
        except StorageFailure as error:
            print(writer.offset, error.message, error.remedy)
        small = store.writer(hashlib.sha256(b"small").hexdigest(), 5)  # the store goes on
        small.write(b"small")
        small.commit()
    """
    result = subprocess.run([sys.executable, "-c", textwrap.dedent(script)], capture_output=True, text=True, timeout=60)
    assert result.returncode == 0, result.stderr
    assert result.stdout.startswith(f"1000000 blob {name_of(DATA)[:12]}: the disk is full")
    assert "it continues where it stopped" in result.stdout
    assert store.has(name_of(b"small"))
    with store.writer(name_of(DATA), len(DATA)) as writer:  # there is room again
        assert writer.offset == 1_000_000
        writer.write(DATA[writer.offset :])
        writer.commit()
    assert store.has(name_of(DATA))


@pytest.mark.skipif(os.geteuid() != 0 or sys.platform != "linux", reason="a small disk of our own needs the right to mount")
def test_a_small_disk_that_is_really_full(tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=24m", "tmpfs", str(disk)], capture_output=True)
    if mounted.returncode != 0:
        pytest.skip("mounting is not allowed here")
    try:
        store = BlobStore(disk)
        with store.writer(name_of(DATA * 2), 7_000_000) as writer:
            writer.write(DATA[:100])
            filler = disk / "filler"  # somebody else fills the disk after the upload was let in
            filler.write_bytes(bytes(shutil.disk_usage(disk).free))
            with pytest.raises(StorageFailure, match="the disk is full: No space left on device"):
                writer.write(DATA[:6_000_000])
        with pytest.raises(StorageFailure, match="bytes more, the disk of"):
            store.writer(name_of(b"next"), 4)
        filler.unlink()
        assert put(store, b"next") == name_of(b"next")
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def test_a_directory_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageFailure, match=r"the data directory .* cannot be written or read: Not a directory"):
        BlobStore(tmp_path / "file" / "data")


# ------------------------------------------------------------------------------------------------------------------- shards


def test_a_shard_is_put_together_from_its_blobs(store: BlobStore, shard: Shard) -> None:
    sha256 = put_shard(store, shard)
    found = store.shard(sha256)
    assert found.manifest == shard.manifest
    assert found.member("weights.safetensors").read_bytes() == shard.member("weights.safetensors").read_bytes()
    assert store.shard(sha256) is found


def test_a_shard_whose_member_was_not_shipped(store: BlobStore, shard: Shard) -> None:
    put(store, (shard.path / MANIFEST).read_bytes())
    with pytest.raises(NotFound, match=r"graph.json: blob [0-9a-f]{12} is not on this node") as caught:
        store.shard(shard.sha256)
    assert "it ships what is missing" in caught.value.remedy


def test_a_blob_that_is_no_manifest(store: BlobStore) -> None:
    with pytest.raises(BadShard, match=r"manifest\.json: not valid JSON"):
        store.shard(put(store, b"hello"))
    with pytest.raises(BadShard, match="the manifest has 10240000 bytes, the limit is"):
        store.shard(put(store, DATA))


@pytest.mark.parametrize("restarted", [False, True])
def test_a_byte_that_changed_on_disk_is_noticed(store: BlobStore, shard: Shard, restarted: bool) -> None:
    sha256 = put_shard(store, shard)
    if not restarted:
        store.shard(sha256)
    blob = store.directory / "blobs" / shard.manifest.members["weights.safetensors"].sha256
    data = bytearray(blob.read_bytes())
    data[-1] ^= 1
    blob.write_bytes(data)
    later = BlobStore(store.directory) if restarted else store
    with pytest.raises(BadShard, match=r"was changed on disk: its sha256 is now .* it was removed"):
        later.shard(sha256)
    assert later.offset(blob.name, len(data)) == 0  # so that it is shipped again
    put(later, shard.member("weights.safetensors").read_bytes())
    assert later.shard(sha256).sha256 == sha256


def test_after_a_restart_each_blob_is_hashed_once(store: BlobStore, shard: Shard, monkeypatch: pytest.MonkeyPatch) -> None:
    import nodes.store as module

    sha256 = put_shard(store, shard)
    hashed: list[Path] = []
    real = module.hash_file
    monkeypatch.setattr(module, "hash_file", lambda path: (hashed.append(path), real(path))[1])
    store.shard(sha256)
    assert hashed == []  # this process saw them arrive
    later = BlobStore(store.directory)
    for _ in range(3):
        later.shard(sha256)
    assert len(hashed) == len(set(hashed)) == 3


def test_a_packed_shard_is_taken_apart(store: BlobStore, shard: Shard, tmp_path: Path) -> None:
    packed = pack(shard, tmp_path / "s.zip").read_bytes()
    sha256 = put(store, packed)
    assert store.unpack_packed(sha256).manifest == shard.manifest
    members = {m.sha256 for m in shard.manifest.members.values()}
    assert files_of(store) == sorted([f"blobs/{s}" for s in (*members, shard.sha256)] + [f"packed/{sha256}"])
    assert store.offset(sha256, len(packed)) == len(packed)  # not to be sent again
    assert store.unpack_packed(sha256).sha256 == shard.sha256
    store.delete_unused(set())
    assert store.offset(sha256, len(packed)) == 0


def test_a_packed_shard_takes_the_place_of_an_upload_that_broke_off(store: BlobStore, shard: Shard, tmp_path: Path) -> None:
    weights = shard.manifest.members["weights.safetensors"]
    with store.writer(weights.sha256, weights.size_bytes) as writer:
        writer.write(b"rotten")
    sha256 = put(store, pack(shard, tmp_path / "s.zip").read_bytes())
    assert store.unpack_packed(sha256).sha256 == shard.sha256


def test_a_hostile_packed_shard_leaves_nothing(store: BlobStore, shard: Shard, tmp_path: Path) -> None:
    data = bytearray(pack(shard, tmp_path / "s.zip").read_bytes())
    weights = shard.member("weights.safetensors").read_bytes()
    data[data.index(weights) + len(weights) - 1] ^= 1
    sha256 = put(store, bytes(data))
    with pytest.raises(BadShard, match="damaged archive: Bad CRC-32"):
        store.unpack_packed(sha256)
    assert files_of(store) == []


def test_what_no_deployment_uses_is_deleted(store: BlobStore, shard: Shard) -> None:
    used = put_shard(store, shard)
    unused = put(store, DATA)
    broken = name_of(b"broken off")
    with store.writer(broken, 10) as writer:
        writer.write(b"bro")
    with store.writer(name_of(b"running"), 7) as running:
        running.write(b"run")
        assert store.delete_unused({used}) == len(DATA) + 3
        running.write(b"ning")
        running.commit()
    assert not store.has(unused)
    assert store.offset(broken, 10) == 0
    assert store.shard(used).sha256 == used
    assert store.has(name_of(b"running"))
    store.delete_unused(set())
    assert files_of(store) == []


def test_what_is_named_is_deleted_unless_it_is_used_or_held(store: BlobStore, shard: Shard, tmp_path: Path) -> None:
    used, other = put_shard(store, shard), put(store, DATA)
    graph = shard.manifest.members["graph.json"].sha256
    broken = name_of(b"broken off")
    with store.writer(broken, 10) as writer:
        writer.write(b"bro")
    with store.holding([used]), store.holding([used, other]):
        assert store.delete([used, graph, other, name_of(b"never here")], set()) == 0
        assert store.delete_unused(set()) == 3
        with pytest.raises(BadInput, match="sha256"), store.holding(["../x"]):
            raise AssertionError("held")
    with pytest.raises(BadInput, match="sha256"):
        store.delete(["../x", other], set())
    assert store.delete([used, graph], {used}) == 0
    assert store.delete([other], {used}) == len(DATA)
    assert store.shard(used).sha256 == used
    store.delete([graph], set())
    with pytest.raises(NotFound):
        store.shard(used)

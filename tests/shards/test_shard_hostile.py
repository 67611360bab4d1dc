"""Shards that are not as they should be: each is refused with its own message, and a remedy."""

from __future__ import annotations

import hashlib
import json
import pickle
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from splitnet.errors import BadShard
from splitnet.shard import MANIFEST, Manifest, Member, Shard, ShardLimits, open_shard, read_header


def refuse(path: Path, **limits: int) -> str:
    """The message of the refusal, which has a remedy and the path."""
    with pytest.raises(BadShard) as caught:
        open_shard(path, limits=ShardLimits(**limits))
    assert caught.value.remedy
    assert str(path) in caught.value.message
    return caught.value.message


def rewrite(shard: Shard, **changes: Any) -> None:
    """Changes fields of the manifest, in canonical form."""
    document = json.loads((shard.path / MANIFEST).read_bytes()) | changes
    (shard.path / MANIFEST).write_text(json.dumps(document, sort_keys=True, separators=(",", ":")) + "\n")


def with_member(shard: Shard, name: str, data: bytes) -> None:
    """Puts other bytes there, with the manifest saying so."""
    (shard.path / name).write_bytes(data)
    members = json.loads((shard.path / MANIFEST).read_bytes())["members"]
    rewrite(shard, members=members | {name: {"sha256": hashlib.sha256(data).hexdigest(), "size_bytes": len(data)}})


def safetensors(header: object, data: bytes = b"") -> bytes:
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + data


# ------------------------------------------------------------------------------------------------------------ the directory


def test_nothing_there(tmp_path: Path) -> None:
    assert "no such shard" in refuse(tmp_path / "none")


def test_a_directory_that_is_no_shard(tmp_path: Path) -> None:
    assert f"not a shard: it has no {MANIFEST}" in refuse(tmp_path)


def test_a_changed_byte(shard: Shard) -> None:
    file = shard.member("weights.safetensors")
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    assert "weights.safetensors: wrong sha256: the manifest says" in refuse(shard.path)


def test_a_truncated_member(shard: Shard) -> None:
    file = shard.member("weights.safetensors")
    file.write_bytes(file.read_bytes()[:-5])
    assert "weights.safetensors: truncated: the manifest says" in refuse(shard.path)


def test_a_member_that_is_too_long(shard: Shard) -> None:
    file = shard.member("graph.json")
    file.write_bytes(file.read_bytes() + b" ")
    assert "graph.json: too long" in refuse(shard.path)


def test_a_missing_member(shard: Shard) -> None:
    shard.member("graph.json").unlink()
    assert "member 'graph.json' is missing" in refuse(shard.path)


def test_an_unlisted_file(shard: Shard) -> None:
    (shard.path / "notes.txt").write_text("hello")
    assert "unknown member 'notes.txt': the manifest does not list it" in refuse(shard.path)


def test_a_link_out_of_the_directory(shard: Shard, tmp_path: Path) -> None:
    file = shard.member("graph.json")
    file.rename(tmp_path / "elsewhere.json")
    file.symlink_to(tmp_path / "elsewhere.json")
    assert "graph.json: is a symbolic link" in refuse(shard.path)


def test_a_manifest_that_is_a_link(shard: Shard, tmp_path: Path) -> None:
    (shard.path / MANIFEST).rename(tmp_path / "elsewhere.json")
    (shard.path / MANIFEST).symlink_to(tmp_path / "elsewhere.json")
    assert "is a symbolic link" in refuse(shard.path)


def test_a_member_that_is_a_directory(shard: Shard) -> None:
    shard.member("graph.json").unlink()
    shard.member("graph.json").mkdir()
    assert "graph.json: is not a plain file" in refuse(shard.path)


def test_more_bytes_than_the_node_takes(shard: Shard) -> None:
    assert "bytes, the limit is 100" in refuse(shard.path, total_bytes=100)


# ---------------------------------------------------------------------------------------------------------------- no pickles


class Trap:
    """Unpickling it creates a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Callable[[Path], None], tuple[Path]]:
        return Path.touch, (self.path,)


@pytest.mark.parametrize("protocol", [2, 3, 4, 5])
def test_a_pickle_that_poses_as_weights(shard: Shard, tmp_path: Path, protocol: int) -> None:
    trap = pickle.dumps(Trap(tmp_path / "sprung"), protocol=protocol)
    with_member(shard, "weights.safetensors", trap)
    assert "weights.safetensors: pickled member" in refuse(shard.path)
    assert not (tmp_path / "sprung").exists()
    pickle.loads(trap)
    assert (tmp_path / "sprung").exists()  # the trap works


def test_a_torch_archive_that_poses_as_weights(shard: Shard, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    torch.save({"w": torch.zeros(3)}, tmp_path / "w.pt")
    with_member(shard, "weights.safetensors", (tmp_path / "w.pt").read_bytes())
    assert "weights.safetensors: pickled member" in refuse(shard.path)


def test_a_pickle_that_poses_as_the_graph(shard: Shard) -> None:
    with_member(shard, "graph.json", pickle.dumps({"operators": []}, protocol=4))
    assert "graph.json: pickled member" in refuse(shard.path)


def test_a_pickle_that_replaced_the_weights_behind_the_manifests_back(shard: Shard) -> None:
    data = pickle.dumps("x" * 200, protocol=4)
    file = shard.member("weights.safetensors")
    file.write_bytes(data[: file.stat().st_size].ljust(file.stat().st_size, b"."))
    assert "weights.safetensors: pickled member" in refuse(shard.path)


@pytest.mark.parametrize("name", ["data.pkl", "weights.pt", "pytorch_model.bin", "w.ckpt", "w.npz"])
def test_a_member_with_the_name_of_a_pickle(shard: Shard, name: str) -> None:
    with_member(shard, name, b"whatever")
    assert f"pickled member '{name}'" in refuse(shard.path)


def test_a_stray_pickle_beside_the_members(shard: Shard) -> None:
    (shard.path / "optimizer.pkl").write_bytes(b"whatever")
    assert "pickled member 'optimizer.pkl'" in refuse(shard.path)


# -------------------------------------------------------------------------------------------------------------- the manifest


@pytest.mark.parametrize(
    "name", ["../graph.json", "/etc/passwd", "a/b", "..", ".", "", "..\\graph.json", "C:graph.json", "graph.json\0.png"]
)
def test_a_path_that_leaves_the_directory(shard: Shard, name: str) -> None:
    members = json.loads((shard.path / MANIFEST).read_bytes())["members"]
    rewrite(shard, members=members | {name: members["graph.json"]})
    assert "is not a plain file name: it would leave the shard's directory" in refuse(shard.path)


def test_a_member_that_the_engine_does_not_have(shard: Shard) -> None:
    with_member(shard, "model.onnx", b"onnx")
    assert "unknown member 'model.onnx': a shard of engine format 'torch-graph' may not hold it" in refuse(shard.path)


def test_a_newer_format(shard: Shard) -> None:
    rewrite(shard, version=2, something_new=True)
    with pytest.raises(BadShard, match="the shard has format version 2, this splitnet reads up to 1") as caught:
        open_shard(shard.path)
    assert caught.value.remedy == "update splitnet on this node"


def test_another_engine_format(shard: Shard) -> None:
    rewrite(shard, engine="torch-pickle")
    assert "engine: format 'torch-pickle' is not known here" in refuse(shard.path)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "not valid JSON"),
        (b"\xff\xfe", "not valid JSON"),
        (b"[" * 200_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
        (b"[]", "not the manifest of a splitnet shard"),
        (b'{"format":"splitnet-shard"}', "version: expected a whole number"),
        (b'{"format":"splitnet-shard","version":1}', "activation_bytes: missing"),
        (b'{"format":"splitnet-shard","version":1,"version":1}', "key 'version' stands twice"),
        (b'{"format":"splitnet-shard","version":1.0}', "not a whole number"),
        (b'{"format":"splitnet-shard","version":NaN}', "not a whole number"),
        (b'{"format":"splitnet-shard","version":' + b"9" * 5000 + b"}", "not valid JSON"),
        (b" " * (1 << 20) + b"{}", "the limit is 1048576"),
    ],
)
def test_a_manifest_that_is_none(shard: Shard, data: bytes, message: str) -> None:
    (shard.path / MANIFEST).write_bytes(data)
    assert message in refuse(shard.path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"extra": 1}, "unknown key 'extra'"),
        ({"stage": ""}, "stage: the stage has no name"),
        ({"stage": 7}, "stage: expected a string, got int"),
        ({"stage": "a\nb"}, "stage: expected at most 1024 printable characters"),
        ({"model": "\ud800"}, "model: expected at most 1024 printable characters"),
        ({"model_sha256": "abc"}, "model_sha256: expected 64 hexadecimal digits"),
        ({"param_bytes": -1}, "param_bytes: expected a size in bytes, got -1"),
        ({"param_bytes": True}, "param_bytes: expected a size in bytes, got True"),
        ({"activation_bytes": 1 << 80}, "activation_bytes: expected a size in bytes"),
        ({"param_bytes": 47}, "the manifest declares 47 bytes of parameters, the weights hold 48"),
        ({"inputs": {}}, "inputs: expected a list, got dict"),
        ({"inputs": ["x"]}, "inputs[0]: "),
        ({"inputs": [{"name": "x", "dtype": "float32"}]}, "inputs[0]: shape: missing"),
        ({"inputs": [{"name": "x", "dtype": "object", "shape": []}]}, "inputs[0]: element type 'object'"),
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": [-1]}]}, "inputs[0]: tensor 'x': negative dimension -1"),
        ({"inputs": [{"name": "x", "dtype": "float32", "shape": [1] * 65}]}, "inputs[0]: a name, a dimension or the number"),
        ({"inputs": [{"name": "x", "dtype": "int8", "shape": []}] * 2}, "inputs: a tensor stands twice"),
        ({"members": []}, "members: expected an object, got list"),
        ({"members": {}}, "members: 'graph.json' is missing"),
        ({"members": {"graph.json": "abc"}}, "members['graph.json']: expected an object with sha256 and size_bytes"),
        ({"members": {"graph.json": {"sha256": 1, "size_bytes": 1}}}, "members['graph.json'].sha256"),
        ({"members": {"graph.json": {"sha256": "0" * 64, "size_bytes": "1"}}}, "members['graph.json'].size_bytes"),
    ],
)
def test_a_manifest_with_a_wrong_field(shard: Shard, changes: dict[str, Any], message: str) -> None:
    rewrite(shard, **changes)
    assert message in refuse(shard.path)


def test_too_many_members(shard: Shard) -> None:
    assert "the shard has 2 members, the limit is 1" in refuse(shard.path, members=1)


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["weights-00001-of-00003.safetensors"], "the numbered weights are not complete"),
        (["weights-00002-of-00002.safetensors", "weights-00003-of-00002.safetensors"], "not complete"),
        (["weights-00000-of-00000.safetensors"], "not complete"),
        (["weights.safetensors", "weights-00001-of-00001.safetensors"], "stands beside numbered weights"),
    ],
)
def test_weights_that_are_not_complete(shard: Shard, names: list[str], message: str) -> None:
    members = json.loads((shard.path / MANIFEST).read_bytes())["members"]
    some = members["weights.safetensors"]
    rewrite(shard, members={"graph.json": members["graph.json"]} | dict.fromkeys(names, some))
    assert message in refuse(shard.path)


def test_another_spelling_of_the_same_manifest(shard: Shard) -> None:
    file = shard.path / MANIFEST
    file.write_text(json.dumps(json.loads(file.read_bytes()), indent=1))
    assert "not in canonical form" in refuse(shard.path)


# ---------------------------------------------------------------------------------------------------------------- the graph


def test_an_operator_that_is_not_allowed(shard: Shard) -> None:
    graph = json.loads(shard.member("graph.json").read_bytes())
    graph["operators"][0]["op"] = "os.system"
    with_member(shard, "graph.json", json.dumps(graph).encode())
    message = refuse(shard.path)
    assert "graph.json" in message
    assert "os.system" in message


def test_a_graph_that_is_too_large(shard: Shard) -> None:
    assert "graph.json: the graph has" in refuse(shard.path, graph_bytes=10)


# -------------------------------------------------------------------------------------------------------------- the weights

_W = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (b"", "safetensors: truncated, the file has only 0 bytes"),
        (b"\x02\0\0\0\0\0\0\0", "safetensors: truncated, the file has only 8 bytes"),
        (struct.pack("<Q", 1 << 62) + b"{}", "the header claims 4611686018427387904 bytes, the limit is"),
        (struct.pack("<Q", 100) + b"{}", "truncated, the header claims 100 bytes and the file has 10"),
        (safetensors(b"{nope"), "safetensors header: not valid JSON"),
        (safetensors(b"[" * 100_000), "safetensors header: JSON is nested too deeply"),
        (safetensors([]), "the header is not an object but list"),
        (safetensors(b'{"a":{},"a":{}}'), "key 'a' stands twice"),
        (safetensors({"__metadata__": {"a": 1}}), "__metadata__ must map strings to strings"),
        (safetensors({"w": 1}), "expected an object with dtype, shape and data_offsets"),
        (safetensors({"w": _W | {"more": 1}}, bytes(8)), "expected an object with dtype, shape and data_offsets"),
        (safetensors({"w": _W | {"dtype": "PICKLE"}}, bytes(8)), "unknown dtype 'PICKLE'"),
        (safetensors({"w": _W | {"dtype": ["F32"]}}, bytes(8)), "unknown dtype ['F32']"),
        (safetensors({"w": _W | {"shape": [-2]}}, bytes(8)), "the shape is not a list"),
        (safetensors({"w": _W | {"shape": [1] * 65}}, bytes(8)), "the shape is not a list of at most 64 sizes"),
        (safetensors({"w": _W | {"data_offsets": [0]}}, bytes(8)), "data_offsets are not two offsets"),
        (safetensors({"w": _W | {"data_offsets": [8, 0]}}, bytes(8)), "does not take the bytes [8, 0)"),
        (safetensors({"w": _W | {"shape": [3]}}, bytes(8)), "shape [3] of F32 does not take the bytes [0, 8)"),
        (safetensors({"w": _W | {"shape": [1 << 62] * 2}}, bytes(8)), "does not take the bytes"),
        (safetensors({"v": _W, "w": _W}, bytes(8)), "overlaps the one before"),
        (safetensors({"v": _W, "w": _W | {"data_offsets": [16, 24]}}, bytes(24)), "leaves a gap of 8 bytes before it"),
        (safetensors({"w": _W | {"data_offsets": [8, 16]}}, bytes(16)), "leaves a gap of 8 bytes before it"),
        (safetensors({"w": _W}, bytes(7)), "truncated, the tensors need 8 bytes and the file holds 7"),
        (safetensors({"w": _W}, bytes(9)), "too long, the tensors need 8 bytes and the file holds 9"),
    ],
)
def test_weights_that_are_not_safetensors(shard: Shard, data: bytes, message: str) -> None:
    with_member(shard, "weights.safetensors", data)
    assert message in refuse(shard.path)


def test_a_shard_that_open_would_refuse_is_not_written(make_shard: Callable[..., Shard], shard: Shard) -> None:
    graph = shard.member("graph.json").read_bytes()
    with pytest.raises(BadShard, match="the manifest declares 0 bytes of parameters, the weights hold 48"):
        make_shard(param_bytes=0)
    assert not (shard.path / MANIFEST).exists()
    with pytest.raises(BadShard, match="it would leave the shard's directory"):
        make_shard(members={"../graph.json": graph})
    with pytest.raises(BadShard, match="pickled member"):
        make_shard(members={"graph.json": graph, "weights.safetensors": pickle.dumps([1, 2, 3], protocol=4)})
    with pytest.raises(BadShard, match="engine format 'tf' is not known"):
        make_shard(engine="tf")
    assert not (shard.path / MANIFEST).exists()


def test_a_manifest_checks_itself_when_it_is_made(shard: Shard) -> None:
    with pytest.raises(BadShard, match="expected 64 hexadecimal digits"):
        Manifest("m", "0" * 64, "s", "torch-graph", (), (), 0, 0, {"graph.json": Member("zz", 1)})


def test_the_reference_reader_agrees_with_ours(tmp_path: Path) -> None:
    """What the safetensors library writes is read, for every dtype that numpy has."""
    tensors = {
        d: np.zeros((2, 3), d) for d in ("bool", "uint8", "int16", "uint16", "float16", "int32", "uint32", "float32", "int64", "float64")
    }
    (tmp_path / "w.safetensors").write_bytes(save(tensors | {"empty": np.zeros((0, 3), np.float32), "scalar": np.array(1, np.float32)}))
    header = read_header(tmp_path / "w.safetensors")
    assert header["empty"].begin == header["empty"].end
    assert header["scalar"].shape == ()
    assert {name: header[name].end - header[name].begin for name in tensors} == {name: t.nbytes for name, t in tensors.items()}

"""Shards that are as they should be: written, opened, packed, named by their content."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save, save_file

from splitnet.errors import AlreadyExists, BadInput, BadShard
from splitnet.graph import GraphDocument, Input, Operator, Ref
from splitnet.onnx_format import to_bytes
from splitnet.onnx_nouns import OnnxGraph, OnnxNode, OnnxValue
from splitnet.shard import MANIFEST, Manifest, Shard, ShardLimits, open_shard, pack, read_header, unpack


def test_what_is_written_can_be_opened(shard: Shard) -> None:
    opened = open_shard(shard.path)
    assert opened == shard
    assert opened.manifest.inputs[0].shape == ("batch", 4)
    assert opened.weights == (shard.path / "weights.safetensors",)
    assert opened.member("graph.json").read_bytes() == shard.member("graph.json").read_bytes()


def test_the_same_content_has_the_same_identity(make_shard: Callable[..., Shard]) -> None:
    a, b = make_shard("a"), make_shard("b")
    assert a.sha256 == b.sha256
    assert (a.path / MANIFEST).read_bytes() == (b.path / MANIFEST).read_bytes()
    assert make_shard("c", stage="stage1").sha256 != a.sha256
    other = save({"w": np.ones((3, 4), np.float32)})
    members = {"graph.json": a.member("graph.json"), "weights.safetensors": other}
    assert make_shard("d", members=members).sha256 != a.sha256


def test_a_shard_is_replaced_by_the_next_one_in_its_place(make_shard: Callable[..., Shard]) -> None:
    first = make_shard()
    half = save({"w": np.zeros((3, 2), np.float32)})
    numbered = {f"weights-0000{i}-of-00002.safetensors": half for i in (1, 2)}
    second = make_shard(members={"graph.json": first.member("graph.json"), **numbered})
    assert not (second.path / "weights.safetensors").exists()
    assert open_shard(second.path).sha256 == second.sha256
    assert [path.name for path in second.weights] == sorted(numbered)


def test_what_an_earlier_cut_left_goes(make_shard: Callable[..., Shard], tmp_path: Path) -> None:
    """Of another engine's format, and of a cut that was broken off: `deploy` would refuse the shard for them."""
    folder = tmp_path / "shard"
    folder.mkdir()
    for stale in ("graph.onnx", "graph.json.part", "weights.safetensors.part", "weights-00001-of-00002.safetensors", "manifest.json"):
        (folder / stale).write_bytes(b"stale")
    assert {p.name for p in make_shard().path.iterdir()} == {"graph.json", "weights.safetensors", MANIFEST}
    x, y = OnnxValue("x", "float32", ("batch", 4)), OnnxValue("y", "float32", ("batch", 4))
    relu = OnnxGraph((x,), (y,), (), {}, (OnnxNode("Relu", ("x",), ("y",)),))
    onnx = make_shard(engine="onnx", members={"graph.onnx": to_bytes(relu)}, param_bytes=0)
    assert {p.name for p in onnx.path.iterdir()} == {"graph.onnx", MANIFEST}
    assert open_shard(onnx.path) == onnx


def test_what_no_cut_wrote_is_left_alone_and_told(make_shard: Callable[..., Shard], tmp_path: Path) -> None:
    (tmp_path / "shard").mkdir()
    (tmp_path / "shard" / "notes.txt").write_text("mine")
    with pytest.raises(BadShard, match=r"'notes.txt'.*is not part of a shard") as caught:
        make_shard()
    assert "another folder" in caught.value.remedy
    assert [p.name for p in (tmp_path / "shard").iterdir()] == ["notes.txt"]


def test_weights_may_already_stand_at_their_place(make_shard: Callable[..., Shard], tmp_path: Path) -> None:
    folder = tmp_path / "in-place"
    folder.mkdir()
    save_file({"w": np.arange(12, dtype=np.float32).reshape(3, 4)}, folder / "weights.safetensors")
    graph = make_shard("other").member("graph.json")
    shard = make_shard("in-place", members={"graph.json": graph, "weights.safetensors": folder / "weights.safetensors"})
    assert shard.sha256 == make_shard("other").sha256


def test_a_stage_without_weights_needs_no_weights_file(make_shard: Callable[..., Shard]) -> None:
    graph = GraphDocument((Input("x", "tensor"),), {}, (Operator("aten.relu.default", (Ref("x"),), {}, "y"),), ("y",))
    shard = make_shard(members={"graph.json": graph.to_bytes()}, param_bytes=0)
    assert open_shard(shard.path).weights == ()


def test_packing_is_deterministic_and_comes_back(make_shard: Callable[..., Shard], tmp_path: Path) -> None:
    shard = make_shard()
    one, two = pack(shard, tmp_path / "one.zip"), pack(make_shard("again"), tmp_path / "two.zip")
    assert one.read_bytes() == two.read_bytes()
    opened = open_shard(one)
    assert opened.sha256 == shard.sha256
    assert opened.path == one
    unpacked = unpack(one, tmp_path / "unpacked")
    assert {p.name: p.read_bytes() for p in unpacked.path.iterdir()} == {p.name: p.read_bytes() for p in shard.path.iterdir()}
    assert open_shard(unpacked.path).sha256 == shard.sha256


def test_the_files_of_a_packed_shard_go_with_it(shard: Shard, tmp_path: Path) -> None:
    opened = open_shard(pack(shard, tmp_path / "s.zip"))
    file = opened.member("graph.json")
    assert file.exists()
    del opened
    assert not file.exists()


def test_unpacking_leaves_what_is_there_alone(shard: Shard, tmp_path: Path) -> None:
    packed = pack(shard, tmp_path / "s.zip")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    with pytest.raises(AlreadyExists, match="not empty"):
        unpack(packed, tmp_path / "full")
    assert (tmp_path / "full" / "mine.txt").read_text() == "mine"


def test_packing_notices_a_member_that_changed(shard: Shard, tmp_path: Path) -> None:
    (shard.path / "graph.json").write_text("{}")
    with pytest.raises(BadShard, match=r"member 'graph.json' changed while it was packed"):
        pack(shard, tmp_path / "s.zip")
    assert not list(tmp_path.glob("s.zip*"))


def test_an_unknown_member_is_named(shard: Shard) -> None:
    with pytest.raises(BadShard, match=r"no member 'model.onnx'; the shard has graph.json, weights.safetensors"):
        shard.member("model.onnx")


def test_the_manifest_survives_its_own_bytes(shard: Shard) -> None:
    data = shard.manifest.to_bytes()
    assert Manifest.from_bytes(data) == shard.manifest
    assert Manifest.from_bytes(data).to_bytes() == data
    assert data == (shard.path / MANIFEST).read_bytes()


def test_tensors_are_found_without_reading_them(shard: Shard) -> None:
    tensor = read_header(shard.member("weights.safetensors"))["w"]
    data = shard.member("weights.safetensors").read_bytes()[tensor.begin : tensor.end]
    assert (tensor.dtype, tensor.shape) == ("F32", (3, 4))
    assert np.array_equal(np.frombuffer(data, np.float32).reshape(3, 4), np.arange(12, dtype=np.float32).reshape(3, 4))


@pytest.mark.parametrize("names", [1, 9, 10, 11, 12, 13, 14, 15, 16, 17, 18, 19, 20, 21, 22])
def test_a_header_that_begins_like_a_pickle_is_not_taken_for_one(tmp_path: Path, names: int) -> None:
    """A header of 640, 896, 1152 or 1408 bytes gives the file the first two bytes of a pickle."""
    seen = set()
    for padding in range(0, 64, 8):
        tensors = {f"tensor_{i}": np.zeros(1, np.float32) for i in range(names)} | {"p" * (padding + 1): np.zeros(1, np.float32)}
        file = tmp_path / "w.safetensors"
        file.write_bytes(save(tensors))
        seen.add(file.read_bytes()[:2])
        assert set(read_header(file)) == set(tensors)
    if names == 9:
        assert b"\x80\x02" in seen


def test_limits_are_checked_when_they_are_made() -> None:
    with pytest.raises(BadInput, match=r"ShardLimits.members must be at least 1, got 0"):
        ShardLimits(members=0)

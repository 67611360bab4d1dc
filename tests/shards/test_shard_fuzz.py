"""Valid shards, damaged at random: what comes out is the same shard, or BadShard; never another error, never another shard."""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import SafetensorError
from safetensors import deserialize as reference
from safetensors.numpy import save

from splitnet.errors import BadShard
from splitnet.shard import MANIFEST, Manifest, Shard, open_packed, open_shard, pack, read_header

# (where as a fraction, how many bytes go, what comes in their place)
EDITS = st.lists(st.tuples(st.floats(0, 1), st.integers(0, 12), st.binary(max_size=12)), min_size=1, max_size=4)
FIXTURE = settings(suppress_health_check=[HealthCheck.function_scoped_fixture])


def edited(data: bytes, edits: list[tuple[float, int, bytes]]) -> bytes:
    for where, gone, new in edits:
        at = int(where * len(data))
        data = data[:at] + new + data[at + gone :]
    return data


def edits_of_json(data: bytes) -> st.SearchStrategy[bytes]:
    """Edits that often leave it JSON: a value, anywhere, replaced by another."""
    document = json.loads(data)
    values = st.one_of(
        st.none(),
        st.booleans(),
        st.integers(-(1 << 70), 1 << 70),
        st.floats(),
        st.text(max_size=8),
        st.just([]),
        st.just({}),
        st.just([1, "a"]),
    )

    def paths(node: Any, at: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
        children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
        return [at, *(path for key, child in children for path in paths(child, (*at, key)))]

    def put(path: tuple[Any, ...], value: Any) -> bytes:
        if not path:
            return json.dumps(value).encode()
        copy = json.loads(data)
        node = copy
        for key in path[:-1]:
            node = node[key]
        node[path[-1]] = value
        return json.dumps(copy, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    return st.builds(put, st.sampled_from(paths(document)), values)


def same_or_refused(action: Callable[[], Shard], sha256: str) -> None:
    try:
        found = action()
    except BadShard:
        return
    assert found.sha256 == sha256


@FIXTURE
@given(data=st.data())
def test_a_manifest_with_edits(shard: Shard, data: st.DataObject) -> None:
    valid = shard.manifest.to_bytes()
    given_bytes = data.draw(st.one_of(EDITS.map(lambda edits: edited(valid, edits)), edits_of_json(valid)))
    try:
        manifest = Manifest.from_bytes(given_bytes)
    except BadShard:
        return
    assert manifest.to_bytes() == given_bytes
    assert manifest.sha256 == hashlib.sha256(given_bytes).hexdigest()


VALID_WEIGHTS = save({"a": np.arange(6, dtype=np.float32), "b": np.zeros((2, 3), np.int8), "c": np.zeros(0, np.float16)}, {"note": "x"})


@settings(max_examples=300)
@given(data=st.data())
def test_weights_with_edits_are_read_as_the_reference_reads_them(data: st.DataObject) -> None:
    """Whatever we accept, the safetensors library accepts too, with the same shapes in the same places."""
    length = int.from_bytes(VALID_WEIGHTS[:8], "little")
    header = VALID_WEIGHTS[8 : 8 + length]

    def framed(new: bytes) -> bytes:
        return len(new).to_bytes(8, "little") + new + VALID_WEIGHTS[8 + length :]

    given_bytes = data.draw(
        st.one_of(
            EDITS.map(lambda edits: edited(VALID_WEIGHTS, edits)),
            EDITS.map(lambda edits: framed(edited(header, edits))),
            edits_of_json(header).map(framed),
        )
    )
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "w.safetensors"
        file.write_bytes(given_bytes)
        try:
            ours = read_header(file)
        except BadShard:
            return
    try:
        theirs = dict(reference(given_bytes))
    except SafetensorError as error:
        pytest.fail(f"accepted here, refused by safetensors: {error}")
    assert {name: (t.dtype, list(t.shape), given_bytes[t.begin : t.end]) for name, t in ours.items()} == {
        name: (t["dtype"], t["shape"], bytes(t["data"])) for name, t in theirs.items()
    }


@FIXTURE
@given(edits=EDITS, member=st.sampled_from([MANIFEST, "graph.json", "weights.safetensors"]))
def test_a_directory_with_edits(shard: Shard, edits: list[tuple[float, int, bytes]], member: str) -> None:
    valid = (shard.path / member).read_bytes()
    (shard.path / member).write_bytes(edited(valid, edits))
    try:
        # another manifest may be a valid one, of a shard with another identity
        same_or_refused(lambda: open_shard(shard.path), hashlib.sha256((shard.path / MANIFEST).read_bytes()).hexdigest())
    finally:
        (shard.path / member).write_bytes(valid)


@settings(FIXTURE, max_examples=400)
@given(edits=EDITS, tail=st.booleans())
def test_a_packed_shard_with_edits(shard: Shard, edits: list[tuple[float, int, bytes]], tail: bool) -> None:
    file = pack(shard, shard.path.parent / "valid.zip")
    valid = file.read_bytes()
    start = valid.index(b"PK\x01\x02") if tail else 0  # the archive's directory is where most of the parsing is
    damaged = shard.path.parent / "damaged.zip"
    damaged.write_bytes(valid[:start] + edited(valid[start:], edits))
    same_or_refused(lambda: open_packed(damaged), shard.sha256)


@settings(FIXTURE, max_examples=400)
@given(data=st.data())
def test_a_packed_shard_with_other_figures(shard: Shard, data: st.DataObject) -> None:
    """Sizes, offsets, flags and counts of the archive's directory replaced in place, so that it stays well formed."""
    valid = bytearray(pack(shard, shard.path.parent / "valid.zip").read_bytes())
    first = valid.index(b"PK\x01\x02")
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(first, len(valid) - 4))
        figure = data.draw(st.sampled_from([0, 1, 0x7FFF, 0xFFFF, 0x7FFFFFFF, 0xFFFFFFFF]))
        width = data.draw(st.sampled_from([2, 4]))
        valid[at : at + width] = (figure & ((1 << 8 * width) - 1)).to_bytes(width, "little")
    damaged = shard.path.parent / "damaged.zip"
    damaged.write_bytes(valid)
    same_or_refused(lambda: open_packed(damaged), shard.sha256)

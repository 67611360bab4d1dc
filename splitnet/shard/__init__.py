"""The shard: a stage's sub-graph and weights as files that a node can take from a stranger.

A shard is a directory (or the same packed in one .zip file):

    manifest.json         what the shard is, and the sha256 and size of every other member
    graph.json            the sub-graph (see `splitnet.graph`): operators by name, from an allow-list
    graph.onnx            the same sub-graph for ONNX Runtime (see `splitnet.onnx_format`), where it has a counterpart; a shard of engine
                          format "onnx", cut from a .onnx file, holds this one only
    weights.safetensors   its tensors; absent where it has none, `weights-00001-of-00003.safetensors`, ... where it is large

The manifest is canonical JSON, so the same content has the same bytes, and the sha256 of those bytes names the shard. Nothing in
a shard is ever executed or unpickled; `open_shard` refuses, with BadShard, whatever is not exactly as described here.
"""

from __future__ import annotations

from splitnet.shard.directory import MANIFEST, Shard, check_member, open_shard, write_shard
from splitnet.shard.manifest import DEFAULT_LIMITS, ENGINE_FORMATS, SHARD_VERSION, Manifest, Member, ShardLimits
from splitnet.shard.packed import open_packed, pack, unpack
from splitnet.shard.weights import STORED_DTYPES, StoredTensor, read_header

__all__ = [
    "DEFAULT_LIMITS", "ENGINE_FORMATS", "MANIFEST", "SHARD_VERSION", "STORED_DTYPES", "Manifest", "Member", "Shard", "ShardLimits", "StoredTensor",
    "check_member", "open_packed", "open_shard", "pack", "read_header", "unpack", "write_shard",
]  # fmt: skip

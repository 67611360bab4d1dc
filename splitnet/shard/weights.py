"""The header of a safetensors file, read and checked without reading the tensors.

The format (https://huggingface.co/docs/safetensors): 8 bytes little-endian header length, that many bytes of JSON mapping each name
to dtype, shape and data_offsets (relative to the end of the header), then the data without gaps or overlaps.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from splitnet.shard.manifest import DEFAULT_LIMITS, ShardLimits, fault, strict_json

__all__ = ["STORED_DTYPES", "StoredTensor", "looks_pickled", "read_header"]

_ITEM_BYTES = {
    "BOOL": 1, "U8": 1, "I8": 1, "F8_E5M2": 1, "F8_E4M3": 1, "U16": 2, "I16": 2, "F16": 2, "BF16": 2,
    "U32": 4, "I32": 4, "F32": 4, "U64": 8, "I64": 8, "F64": 8, "C64": 8,
}  # fmt: skip
#: safetensors' names of those element types that may cross a cut -> ours
STORED_DTYPES = {
    "BOOL": "bool", "U8": "uint8", "I8": "int8", "I16": "int16", "F16": "float16", "BF16": "bfloat16", "I32": "int32", "F32": "float32",
    "I64": "int64", "F64": "float64", "C64": "complex64",
}  # fmt: skip
_MAX_DIMENSIONS = 64
_TAMPERED = "the file is damaged or was tampered with: cut the model again"
_NO_PICKLE = "store weights as safetensors and the graph as JSON: cut the model again"


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """Where a tensor stands: bytes [begin, end) of the file. `dtype` is safetensors' name for it ("F32")."""

    dtype: str
    shape: tuple[int, ...]
    begin: int
    end: int


def looks_pickled(head: bytes) -> bool:
    """Whether a file that begins with these (at least 9) bytes is a zip archive, as torch.save writes it, or a pickle of protocol 2
    to 5. A safetensors file whose header has 640 bytes begins with the same two bytes as a pickle: its ninth is a brace."""
    if head[:4] in (b"PK\x03\x04", b"PK\x05\x06", b"PK\x07\x08"):
        return True
    return head[:1] == b"\x80" and head[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and head[8:9] != b"{"


def read_header(path: Path, *, place: str = "", limits: ShardLimits = DEFAULT_LIMITS) -> Mapping[str, StoredTensor]:
    """The tensors of a safetensors file. Raises BadShard unless the whole header is sound: known dtypes, shapes that agree with
    the offsets, offsets in range and contiguous, and nothing after the last tensor."""
    place = place or str(path)
    with path.open("rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(9)
        if looks_pickled(head):
            fault(place, "pickled member: the file is a pickle or a zip archive, not safetensors", _NO_PICKLE)
        length = int.from_bytes(head[:8], "little")
        if len(head) < 9:
            fault(place, f"safetensors: truncated, the file has only {size} bytes", _TAMPERED)
        if length > limits.header_bytes:
            fault(place, f"safetensors: the header claims {length} bytes, the limit is {limits.header_bytes}", _TAMPERED)
        if 8 + length > size:
            fault(place, f"safetensors: truncated, the header claims {length} bytes and the file has {size}", _TAMPERED)
        file.seek(8)
        document = strict_json(file.read(length), f"{place}: safetensors header")
    return _tensors(document, size - 8 - length, 8 + length, place)


def _tensors(document: Any, data_bytes: int, start: int, place: str) -> dict[str, StoredTensor]:
    if not isinstance(document, dict):
        fault(place, f"safetensors: the header is not an object but {type(document).__name__}", _TAMPERED)
    metadata = document.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        fault(place, "safetensors: __metadata__ must map strings to strings", _TAMPERED)
    tensors = {name: _tensor(name, entry, start, place) for name, entry in document.items()}
    position = start
    for name, tensor in sorted(tensors.items(), key=lambda item: (item[1].begin, item[1].end)):
        if tensor.begin != position:
            what = "overlaps the one before" if tensor.begin < position else f"leaves a gap of {tensor.begin - position} bytes before it"
            fault(place, f"safetensors: tensor {name!r:.200} {what}", _TAMPERED)
        position = tensor.end
    if position != start + data_bytes:
        kind = "truncated" if position > start + data_bytes else "too long"
        fault(place, f"safetensors: {kind}, the tensors need {position - start} bytes and the file holds {data_bytes}", _TAMPERED)
    return tensors


def _tensor(name: str, entry: Any, start: int, place: str) -> StoredTensor:
    at = f"{place}: safetensors: tensor {name!r:.200}"
    if not isinstance(entry, dict) or set(entry) != {"dtype", "shape", "data_offsets"}:
        fault(at, "expected an object with dtype, shape and data_offsets", _TAMPERED)
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _ITEM_BYTES:
        fault(at, f"unknown dtype {dtype!r:.80}", _TAMPERED)
    if not isinstance(shape, list) or len(shape) > _MAX_DIMENSIONS or not all(_is_size(size) for size in shape):
        fault(at, f"the shape is not a list of at most {_MAX_DIMENSIONS} sizes: {shape!r:.80}", _TAMPERED)
    if not isinstance(offsets, list) or len(offsets) != 2 or not all(_is_size(offset) for offset in offsets):
        fault(at, f"data_offsets are not two offsets: {offsets!r:.80}", _TAMPERED)
    begin, end = offsets
    if end - begin != math.prod(shape) * _ITEM_BYTES[dtype]:
        fault(at, f"shape {shape} of {dtype} does not take the bytes [{begin}, {end})", _TAMPERED)
    return StoredTensor(dtype, tuple(shape), start + begin, start + end)


def _is_size(value: object) -> bool:
    return type(value) is int and 0 <= value < 1 << 63

"""The tensors of a decoder shard, read one at a time straight into their memory: nothing is mapped, nothing is held twice."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch

from splitnet.decoder_weights import plain_name
from splitnet.errors import BadShard
from splitnet.shard import StoredTensor, read_header

__all__ = ["StoredTensors"]

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "I8": torch.int8, "U8": torch.uint8}
_REMEDY = "cut the model again and deploy the new shard"


class StoredTensors:
    """By name; each is taken once. `rest` says at the end what nobody took."""

    def __init__(self, files: Sequence[Path]) -> None:
        self._place: dict[str, tuple[Path, StoredTensor]] = {}
        for path in files:
            for name, stored in read_header(path).items():
                if name in self._place:
                    raise BadShard(f"{path}: tensor {name!r:.200} stands in two files", remedy=_REMEDY)
                self._place[name] = (path, stored)
        self._plain = {plain_name(name) for name in self._place}
        self._taken: set[str] = set()

    def __contains__(self, name: str) -> bool:
        return name in self._place

    def has(self, name: str) -> bool:
        """Whether the tensor is there in any format."""
        return name in self._plain

    def read(self, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> torch.Tensor:
        """In fresh, aligned memory, in the first of `dtypes` (floating-point ones are converted). Raises BadShard for a tensor that is missing, or has another shape, or
        an element type that is not one of `dtypes`."""
        path, stored, kind = self._found(name, shape, dtypes)
        tensor = torch.empty(tuple(shape), dtype=kind)
        _fill(path, stored.begin, tensor, name)
        self._taken.add(name)
        return tensor.to(dtypes[0])

    def read_into(self, name: str, target: torch.Tensor, *, row: int = 0, rows: int | None = None) -> None:
        """Rows [row, row + those of `target`) of a matrix that has `rows` of them (None: as many as `target`), straight into contiguous memory of the same element type.
        Raises BadShard as `read` does."""
        shape = (target.shape[0] if rows is None else rows, *target.shape[1:])
        path, stored, _ = self._found(name, shape, (target.dtype,))
        width = target[:1].nbytes
        _fill(path, stored.begin + row * width, target, name)
        self._taken.add(name)

    def _found(self, name: str, shape: Sequence[int], dtypes: Sequence[torch.dtype]) -> tuple[Path, StoredTensor, torch.dtype]:
        if name not in self._place:
            raise BadShard(f"tensor {name!r:.200} is missing in the shard's weights", remedy=_REMEDY)
        path, stored = self._place[name]
        kind = _DTYPES.get(stored.dtype)
        if kind not in dtypes or kind is None or tuple(stored.shape) != tuple(shape):
            expected = " or ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
            raise BadShard(
                f"{path}: tensor {name!r:.200} should be {expected} {tuple(shape)}, the file has {stored.dtype} {tuple(stored.shape)}",
                remedy=_REMEDY,
            )
        return path, stored, kind

    def rest(self) -> list[str]:
        return sorted(set(self._place) - self._taken)


def _fill(path: Path, begin: int, tensor: torch.Tensor, name: str) -> None:
    """Past Python's buffers."""
    with path.open("rb", buffering=0) as file:
        file.seek(begin)
        view = memoryview(tensor.view(-1).view(torch.uint8).numpy())
        done = 0
        while done < len(view):
            count = file.readinto(view[done:])
            if not count:
                raise BadShard(f"{path}: truncated while tensor {name!r:.200} was read", remedy="load the shard again")
            done += count

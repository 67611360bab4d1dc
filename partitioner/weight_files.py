"""A shard's weights on disk, for whoever writes one."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file

__all__ = ["weights_member"]

_FILE = "weights.safetensors"


def weights_member(directory: Path, tensors: Mapping[str, torch.Tensor]) -> dict[str, bytes | Path]:
    """The tensors written at their place in a shard's directory (made where it is missing), as a member for `write_shard`; none where
    there are no tensors. They must be contiguous and share no memory."""
    if not tensors:
        return {}
    directory.mkdir(parents=True, exist_ok=True)
    save_file(dict(tensors), str(directory / _FILE))
    return {_FILE: directory / _FILE}

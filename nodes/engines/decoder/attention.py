"""Attention of a batch of steps: new keys and values go to the sessions' caches, each session's rows look at its own."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch

from nodes.engines.decoder.cache import Session

__all__ = ["ATTENTION", "Pass", "Segment", "attend", "register"]

#: Under this name transformers calls `_for_transformers`; without a mask of that name it makes none.
ATTENTION = "splitnet"
_sdpa = torch.nn.functional.scaled_dot_product_attention


@dataclass(frozen=True, slots=True)
class Segment:
    """Rows [start, stop) of the batch are positions [position, position + stop - start) of the session."""

    session: Session
    start: int
    stop: int
    position: int


class Pass:
    """One forward pass: whose rows these are, and masks that layers share. `first`: the stage's first layer."""

    def __init__(self, segments: Sequence[Segment], first: int) -> None:
        self.segments = segments
        self.first = first
        self._masks: dict[tuple[int, int, int, int], torch.Tensor] = {}

    def positions(self) -> torch.Tensor:
        """int64 [rows]"""
        return torch.cat([torch.arange(s.position, s.position + s.stop - s.start) for s in self.segments])

    def mask(self, position: int, count: int, low: int, window: int) -> torch.Tensor:
        """bool [count, keys]: which of the keys [low, position + count) each row may look at."""
        key = (position, count, low, window)
        found = self._masks.get(key)
        if found is None:
            rows = torch.arange(position, position + count)[:, None]
            columns = torch.arange(low, position + count)[None, :]
            found = columns <= rows
            if window:
                found &= columns > rows - window
            self._masks[key] = found
        return found


def attend(
    current: Pass,
    layer: int,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    scale: float,
    window: int = 0,
    softcap: float | None = None,
) -> torch.Tensor:
    """[rows, heads, head_dim]. `query` [heads, rows, head_dim], `key`, `value` [KV heads, rows, head_dim]: of the new rows, positions applied. `layer` counts within the
    stage. `window`: how many positions a row sees, itself among them; 0: all. `softcap`: scores are bent to stay within it (Gemma 2)."""
    heads, rows, size = query.shape
    answer = query.new_empty(rows, heads, size)
    for segment in current.segments:
        start, stop = segment.start, segment.stop
        count, end = stop - start, segment.position + stop - start
        keys, values = segment.session.keys[layer], segment.session.values[layer]
        keys[:, segment.position : end] = key[:, start:stop]
        values[:, segment.position : end] = value[:, start:stop]
        low = max(segment.position + 1 - window, 0) if window else 0
        seen_keys, seen_values = keys[None, :, low:end], values[None, :, low:end]
        asked = query[None, :, start:stop]
        groups = heads // keys.shape[0]
        if softcap is not None:
            answer[start:stop] = _capped(current, asked, seen_keys, seen_values, segment, low, scale, window, softcap)
        elif count == 1:
            packed = asked.reshape(1, keys.shape[0], groups, size)  # one row sees every key: the heads of a group are rows to the kernel
            answer[start] = _sdpa(packed, seen_keys, seen_values, scale=scale).reshape(heads, size)
        else:
            causal = low == 0 == segment.position and (not window or end <= window)
            mask = None if causal else current.mask(segment.position, count, low, window)
            if groups > 1:
                seen_keys, seen_values = _repeated(seen_keys, groups), _repeated(seen_values, groups)
            found = _sdpa(asked, seen_keys, seen_values, attn_mask=mask, is_causal=causal, scale=scale)
            answer[start:stop] = found[0].transpose(0, 1)
    return answer


def _repeated(matrix: torch.Tensor, groups: int) -> torch.Tensor:
    one, heads, length, size = matrix.shape
    return matrix[:, :, None].expand(one, heads, groups, length, size).reshape(one, heads * groups, length, size)


def _capped(
    current: Pass,
    query: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    segment: Segment,
    low: int,
    scale: float,
    window: int,
    softcap: float,
) -> torch.Tensor:
    """As transformers' eager attention does it, softmax in float32. [rows, heads, head_dim]"""
    groups, count = query.shape[1] // keys.shape[1], query.shape[2]
    scores = torch.matmul(query, _repeated(keys, groups).transpose(2, 3)) * scale
    scores = torch.tanh(scores / softcap) * softcap
    scores = scores.masked_fill(~current.mask(segment.position, count, low, window), -math.inf)
    weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(query.dtype)
    return torch.matmul(weights, _repeated(values, groups))[0].transpose(0, 1)


def _for_transformers(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    splitnet_pass: Pass,
    **_: Any,
) -> tuple[torch.Tensor, None]:
    """The interface of transformers' attention functions; the batch is [1, heads, rows, head_dim]."""
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    layer = int(module.layer_idx) - splitnet_pass.first  # type: ignore[arg-type] # a module's attribute
    found = attend(splitnet_pass, layer, query[0], key[0], value[0], scale, sliding_window or 0, softcap)
    return found[None], None


def register() -> None:
    """Makes transformers know `ATTENTION`."""
    from transformers import AttentionInterface

    AttentionInterface.register(ATTENTION, _for_transformers)

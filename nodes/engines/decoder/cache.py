"""Keys and values of the sessions: each session's stand in one piece, memory comes page by page as tokens come.

A session's memory is a private, anonymous mapping for the longest that it may get. The system gives a page when it is first written, so that a short session takes what it
holds (and the rest of its last pages), attention reads plain strided matrices, and nothing is ever moved. What all sessions hold together is bounded by slots: a slot is a
token of a session in all layers.
"""

from __future__ import annotations

import math
import mmap
from dataclasses import dataclass, field

import numpy as np
import torch

from nodes.engines.decoder.steps import Sampling
from splitnet.errors import BadInput, Overloaded

__all__ = ["CacheShape", "KVCache", "Session"]

_RETRY_AFTER_S = 0.5


@dataclass(frozen=True, slots=True)
class CacheShape:
    layers: int
    heads: int  #: of keys and values
    head_dim: int
    dtype: torch.dtype

    @property
    def token_bytes(self) -> int:
        """Of one token in all layers."""
        return self.layers * 2 * self.heads * self.head_dim * self.dtype.itemsize


@dataclass(eq=False, slots=True)
class Session:
    """`whole`: [layers, 2, heads, capacity, head_dim], `keys[layer]` and `values[layer]` its parts. `length`: tokens that are valid, each in a slot. `history`: the tokens' ids."""

    whole: torch.Tensor
    keys: tuple[torch.Tensor, ...]
    values: tuple[torch.Tensor, ...]
    history: np.ndarray
    memory: mmap.mmap | None
    length: int = 0
    sampling: Sampling = field(default_factory=Sampling)


class KVCache:
    """`tokens`: slots in all. `capacity`: the most tokens of one session."""

    def __init__(self, shape: CacheShape, tokens: int, capacity: int) -> None:
        if tokens < 1:
            raise BadInput(f"cache_tokens: expected at least 1, got {tokens}")
        self.shape = shape
        self.tokens = tokens
        self.capacity = min(capacity, tokens)
        self._row_bytes = shape.head_dim * shape.dtype.itemsize
        self._block = mmap.PAGESIZE // math.gcd(mmap.PAGESIZE, self._row_bytes)  # tokens of one head in one layer that fill whole pages
        self._rows = self._rounded(self.capacity)
        self._sessions: dict[int, Session] = {}
        self._used = 0

    def find(self, session: int) -> Session | None:
        return self._sessions.get(session)

    @property
    def free(self) -> int:
        return self.tokens - self._used

    def open(self, session: int) -> Session:
        """A new one without tokens; one of that handle that was there is dropped."""
        self.close(session)
        shape = self.shape
        memory: mmap.mmap | None = None
        whole = torch.empty(0, 2, shape.heads, self._rows, shape.head_dim, dtype=shape.dtype)
        if shape.layers:
            flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | getattr(mmap, "MAP_NORESERVE", 0)
            memory = mmap.mmap(-1, shape.layers * 2 * shape.heads * self._rows * self._row_bytes, flags=flags)
            if hasattr(mmap, "MADV_NOHUGEPAGE"):
                memory.madvise(mmap.MADV_NOHUGEPAGE)  # a page of 2 MiB for each head would be given at the first token
            whole = torch.frombuffer(memory, dtype=shape.dtype).view(shape.layers, 2, shape.heads, self._rows, shape.head_dim)
        opened = Session(whole, whole[:, 0].unbind(), whole[:, 1].unbind(), np.zeros(self.capacity, np.int32), memory)
        self._sessions[session] = opened
        return opened

    def reserve(self, wanted: list[tuple[Session | None, int]]) -> None:
        """Checks that each session (None: a new one) may grow to so many tokens, all together. Raises Overloaded; changes nothing."""
        more = sum(max(length - (held.length if held else 0), 0) for held, length in wanted)
        if more > self.free:
            raise Overloaded(
                f"the KV cache has {self.free} of {self.tokens} slots left, {more} more are needed",
                remedy="try again when a generation has ended, or deploy with more memory for the cache",
                retry_after_s=_RETRY_AFTER_S,
            )

    def resize(self, session: Session, length: int) -> None:
        """Sets the valid tokens, and takes or frees slots; whole pages that are no longer needed go back to the system. To be called after `reserve` where it grows."""
        first, count = self._rounded(length), self._rounded(session.length) - self._rounded(length)
        if count > 0 and session.memory is not None and hasattr(mmap, "MADV_DONTNEED"):
            for start in range(0, len(session.memory), self._rows * self._row_bytes):
                session.memory.madvise(mmap.MADV_DONTNEED, start + first * self._row_bytes, count * self._row_bytes)
        self._used += length - session.length
        session.length = length

    def fork(self, source: int, target: int, tokens: int) -> None:
        held = self._sessions.get(source)
        if held is None or not 0 <= tokens <= held.length:
            there = "is not known" if held is None else f"holds {held.length} tokens"
            raise BadInput(f"fork: session {source} {there}, {tokens} were asked for", remedy="compute the prompt again from position 0")
        if source == target:
            raise BadInput(f"fork: session {source} cannot be forked onto itself")
        old = self._sessions.get(target)
        self.reserve([(old, tokens)])
        forked = self.open(target)
        self.resize(forked, tokens)
        forked.whole[..., :tokens, :].copy_(held.whole[..., :tokens, :])
        forked.history[:tokens] = held.history[:tokens]
        forked.sampling = held.sampling

    def close(self, session: int) -> None:
        closed = self._sessions.pop(session, None)
        if closed is not None:
            self._used -= closed.length
            # the mapping goes when the last tensor over it does

    def _rounded(self, length: int) -> int:
        return -(-length // self._block) * self._block

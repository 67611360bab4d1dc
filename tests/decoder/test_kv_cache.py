"""The memory of sessions: it comes with their tokens, and goes with them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import torch

from nodes.engines.decoder.cache import CacheShape, KVCache


def _resident_bytes(at: int) -> int:
    """Of the mapping that holds this address: the process around it has memory of its own that comes and goes."""
    inside = False
    for line in Path("/proc/self/smaps").read_text().splitlines():
        if bounds := re.match(r"([0-9a-f]+)-([0-9a-f]+) ", line):
            inside = int(bounds[1], 16) <= at < int(bounds[2], 16)
        elif inside and line.startswith("Rss:"):
            return int(line.split()[1]) * 1024
    return 0


@pytest.mark.parametrize("head_dim", [64, 80, 96, 200])  # rows that divide a page, and rows that do not
def test_truncating_keeps_what_stays_and_gives_the_rest_back(head_dim: int):
    cache = KVCache(CacheShape(8, 3, head_dim, torch.bfloat16), 4000, 4000)
    session = cache.open(1)
    assert session.whole.shape[:3] == (8, 2, 3)
    at, whole_bytes = session.whole.data_ptr(), session.whole.nbytes
    assert _resident_bytes(at) < 0.1 * whole_bytes
    cache.resize(session, 3000)
    session.whole[..., :3000, :] = 1.0
    written = session.whole[..., :3000, :].numel() * 2
    assert written <= _resident_bytes(at) < written * 1.2
    cache.resize(session, 700)
    assert cache.free == 3300
    assert (session.whole[..., :700, :] == 1.0).all()
    assert _resident_bytes(at) < written * 0.4
    assert not session.whole[..., 1500:3000, :].any()  # read as new
    cache.close(1)
    del session
    assert cache.free == 4000
    assert _resident_bytes(at) < 0.1 * whole_bytes


def test_a_session_is_no_longer_than_the_context_or_the_slots():
    assert KVCache(CacheShape(1, 1, 8, torch.float32), 50, 40).capacity == 40
    assert KVCache(CacheShape(1, 1, 8, torch.float32), 30, 40).capacity == 30


def test_a_stage_without_layers_counts_slots_all_the_same():
    cache = KVCache(CacheShape(0, 1, 8, torch.float32), 50, 40)
    cache.resize(cache.open(3), 20)
    cache.fork(3, 4, 15)
    assert cache.free == 15
    assert cache.shape.token_bytes == 0

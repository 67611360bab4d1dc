"""How this process's allocator treats the buffers that come and go with every activation."""

from __future__ import annotations

import ctypes

__all__ = ["give_back", "keep_buffers"]

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_ARENA_MAX = -1, -3, -8  # malloc.h
_KEPT_BYTES = 64 << 20  # free memory at the top of each arena
_ARENAS = 2
_LARGEST_BYTES = 32 << 20  # the most that glibc takes: what is larger comes from the system and goes back to it at once


def keep_buffers() -> None:
    """Lets glibc keep freed memory for the next activation instead of giving it back: a page that comes anew must be zeroed and mapped
    by the kernel, which costs more than all copies of a message together (half the latency of a hop of 1 MiB, scripts/bench/hop.py).

    The price is at most `_ARENAS` times `_KEPT_BYTES` of memory that is held without need. Does nothing where there is no glibc. See
    mallopt(3).
    """
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return
    for option, value in ((_M_ARENA_MAX, _ARENAS), (_M_MMAP_THRESHOLD, _LARGEST_BYTES), (_M_TRIM_THRESHOLD, _KEPT_BYTES)):
        mallopt(option, value)


def give_back() -> None:
    """Returns all free memory to the system: after weights have gone, whose places in the middle of an arena nothing else returns. See
    malloc_trim(3)."""
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return

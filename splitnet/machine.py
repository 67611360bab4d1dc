"""What box this is: its processor, how many cores this process may use, and whether two processes stand on the same ones."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from pathlib import Path

__all__ = ["machine_id", "processor_name", "usable_cores"]

_BOOT_ID = Path("/proc/sys/kernel/random/boot_id")
_BOARD = Path("/sys/firmware/devicetree/base/model")  # on ARM boards, whose cpuinfo names no model


def processor_name() -> str:
    """The processor's (or board's) model where the system tells it, else its architecture."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
        return _BOARD.read_text().strip("\0\n ")
    except (OSError, UnicodeDecodeError):
        return platform.processor() or platform.machine()


def usable_cores() -> int:
    """How many processors this process may run on."""
    return len(_affinity()) or os.cpu_count() or 1


def machine_id() -> str:
    """The same for processes that compete for the same cores: one boot of one kernel (containers included) and one set of processors.
    Says nothing else of the box."""
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        boot = socket.gethostname()
    return hashlib.sha256(f"splitnet:{boot}:{sorted(_affinity())}".encode()).hexdigest()[:16]


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

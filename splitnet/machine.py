"""What box this is: its processor, how much of it this process may use, and whether two processes stand on the same cores."""

from __future__ import annotations

import hashlib
import os
import platform
import socket
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

__all__ = ["Quota", "cpu_quota", "machine_id", "processor_name", "usable_processors"]

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


def usable_processors() -> float:
    """How many processors' time this process may use: those that it may run on, or fewer where a control group has a quota (a
    container that was given half a processor: 0.5)."""
    cores = len(_affinity()) or os.cpu_count() or 1
    quota = cpu_quota()
    return min(float(cores), quota.processors) if quota else float(cores)


def machine_id() -> str:
    """The same for processes that compete for the same cores: one boot of one kernel (containers included), one set of processors,
    and, where a quota holds them to less, one control group. What stands before a "/" is the same for all on the box.
    Says nothing else of it."""
    try:
        boot = _BOOT_ID.read_text().strip()
    except OSError:
        boot = socket.gethostname()
    quota = cpu_quota()
    held = quota.group if quota and quota.processors < len(_affinity()) else ""

    def hashed(*parts: object) -> str:
        return hashlib.sha256(":".join(["splitnet", *map(str, parts)]).encode()).hexdigest()[:12]

    return f"{hashed(boot)}/{hashed(boot, sorted(_affinity()), held)}"


@dataclass(frozen=True, slots=True)
class Quota:
    """`processors`: how many of them the time is that a control group gets; `group` names it, the same for all processes in it."""

    processors: float
    group: str


def cpu_quota(groups: Path = Path("/proc/self/cgroup"), mounts: Path = Path("/proc/self/mountinfo")) -> Quota | None:
    """The least quota of processor time among this process's control group and those around it (v1: cpu.cfs_quota_us, v2: cpu.max; see
    the kernel's scheduler/sched-bwc and cgroup-v2 pages). None where there is none, or no control groups."""
    try:
        paths = [line.split(":", 2) for line in groups.read_text().splitlines()]
        mounted = [_mount(line) for line in mounts.read_text().splitlines()]
    except (OSError, UnicodeDecodeError):
        return None
    found: list[Quota] = []
    for number, controllers, path in paths:
        for kind, options, root, at in mounted:
            v1 = kind == "cgroup" and "cpu" in controllers.split(",") and "cpu" in options.split(",")
            if v1 or (kind == "cgroup2" and number == "0" and not controllers):
                inside = path[len(root.rstrip("/")) :] if path.startswith(root) else path
                found += _quotas(Path(at), inside.strip("/"))
    return min(found, key=lambda quota: quota.processors, default=None)


def _mount(line: str) -> tuple[str, str, str, str]:
    """(kind, options, root, mount point) of a line of mountinfo."""
    fields, _, rest = line.partition(" - ")
    ours, theirs = fields.split(), rest.split()
    return theirs[0], theirs[-1], ours[3], ours[4]


def _quotas(at: Path, inside: str) -> Iterator[Quota]:
    directory = at / inside
    while True:
        processors = _processors(directory)
        if processors is not None:
            identity = directory.stat()
            yield Quota(processors, f"{identity.st_dev}:{identity.st_ino}")
        if directory == at or at not in directory.parents:
            return
        directory = directory.parent


def _processors(directory: Path) -> float | None:
    try:
        if (unified := directory / "cpu.max").exists():
            quota, period = unified.read_text().split()
        else:
            quota, period = ((directory / f"cpu.cfs_{what}_us").read_text().strip() for what in ("quota", "period"))
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError, ZeroDivisionError):
        return None


def _affinity() -> set[int]:
    return os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()

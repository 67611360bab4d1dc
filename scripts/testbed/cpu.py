"""CPU shares: a control group per node with a quota of processor time (cgroup v1, cpu.cfs_quota_us)."""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Iterator, Sequence
from pathlib import Path

__all__ = ["PERIOD_S", "Share", "controller", "homes", "hurried", "shares"]

PERIOD_S = 0.01  #: a node gets its share anew so often. The kernel's default of 0.1 s would make a request wait up to that long
_WEIGHT = 1 << 18  # the most there is: what else runs on this machine must not take a node's share away
_EMPTY_S = 2.0
_PREFIX = "splitnet-testbed-"


def homes(cores: dict[str, float], processors: Sequence[int] | None = None) -> dict[str, int]:
    """The processor that each node with at most one processor's share keeps to, the largest first, where there is most left: a box of half the
    speed is one that works all the time at half the speed, not two that work a quarter of it. A node for which none has room keeps to none."""
    left = dict.fromkeys(sorted(os.sched_getaffinity(0) if processors is None else processors), 1.0)
    found: dict[str, int] = {}
    for name, share in sorted(cores.items(), key=lambda item: -item[1]):
        widest = max(left, key=lambda number: left[number])
        if 0 < share <= left[widest] + 1e-9:
            found[name] = widest
            left[widest] -= share
    return found


def controller(mounts: Path = Path("/proc/self/mountinfo"), groups: Path = Path("/proc/self/cgroup")) -> Path | str:
    """The directory of this process's own group in the cpu controller (the one around it where it is `hurried`), or why there is none that
    can be used."""
    root = None
    for line in mounts.read_text().splitlines():
        fields, _, rest = line.partition(" - ")
        kind, _, options = rest.split()[:3]
        if kind == "cgroup" and "cpu" in options.split(","):
            root = Path(fields.split()[4])
    if root is None:
        return "this machine has no cgroup v1 cpu controller mounted"
    own = ""
    for line in groups.read_text().splitlines():
        _, names, path = line.split(":", 2)
        if "cpu" in names.split(","):
            own = path
    directory = root / own.lstrip("/")
    if directory.name.startswith(_PREFIX):
        directory = directory.parent
    if not (directory / "cpu.cfs_quota_us").exists():
        return f"{directory} has no cpu.cfs_quota_us"
    if not os.access(directory, os.W_OK):
        return f"{directory} cannot be written by this user"
    return directory


class Share:
    """A group that may use `cores` processors' time (0: all there is), and goes before everything that is in no such group. To be closed
    when its processes have ended."""

    def __init__(self, parent: Path, name: str, cores: float) -> None:
        self.directory = parent / f"{_PREFIX}{os.getpid()}-{name}"
        self.directory.mkdir()
        period_us = round(PERIOD_S * 1e6)
        (self.directory / "cpu.cfs_period_us").write_text(str(period_us))
        (self.directory / "cpu.cfs_quota_us").write_text(str(max(round(cores * period_us), 1000) if cores else -1))
        (self.directory / "cpu.shares").write_text(str(_WEIGHT))

    @property
    def tasks(self) -> Path:
        """Where a process writes its id to join."""
        return self.directory / "cgroup.procs"

    def throttled_s(self) -> float:
        """For how long its processes have been held back so far, in seconds."""
        figures = dict(line.split() for line in (self.directory / "cpu.stat").read_text().splitlines())
        return int(figures["throttled_time"]) / 1e9

    def close(self) -> None:
        """Waits a moment for the kernel to forget the processes that ended. Raises OSError where some are still there."""
        deadline = time.monotonic() + _EMPTY_S
        while True:
            try:
                self.directory.rmdir()
            except FileNotFoundError:
                return
            except OSError:
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.01)
            else:
                return


@contextlib.contextmanager
def hurried() -> Iterator[bool]:
    """Within the block this process (the client of a measurement) goes before what else runs on this machine, as the nodes with a share
    do; False where that cannot be had."""
    parent = controller()
    if isinstance(parent, str):
        yield False
        return
    with contextlib.closing(Share(parent, "client", 0.0)) as share:
        share.tasks.write_text(str(os.getpid()))
        try:
            yield True
        finally:
            (parent / "cgroup.procs").write_text(str(os.getpid()))


@contextlib.contextmanager
def shares(cores: dict[str, float], parent: Path) -> Iterator[dict[str, Share]]:
    """A group for each name whose cores are not 0; removed at the end."""
    made: dict[str, Share] = {}
    with contextlib.ExitStack() as stack:
        for name, count in cores.items():
            if count:
                made[name] = Share(parent, name, count)
                stack.callback(made[name].close)
        yield made

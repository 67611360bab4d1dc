"""Which of some processes of this machine holds the far end of a TCP connection. Linux's /proc, no privileges beyond the same user."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

__all__ = ["find_owner", "socket_inode"]

_TABLES = ("tcp", "tcp6")  # gRPC opens IPv6 sockets for IPv4 addresses, too


def find_owner(peer_port: int, own_port: int, pids: Mapping[str, int], proc: Path = Path("/proc")) -> str | None:
    """The name in `pids` of the process whose socket has `peer_port` on its side and `own_port` on ours, both on this machine; None where
    it is another process. Not cached: connections are few and live long, and ports are used again by others."""
    inode = socket_inode(peer_port, own_port, proc)
    if inode is None:
        return None
    wanted = f"socket:[{inode}]"
    for name, pid in pids.items():
        if any(target == wanted for target in _open_files(proc / str(pid) / "fd")):
            return name
    return None


def socket_inode(local_port: int, remote_port: int, proc: Path = Path("/proc")) -> int | None:
    """The inode of the TCP socket with these two ports; None where there is none, or where it belongs to no process any more."""
    for table in _TABLES:
        try:
            lines = (proc / "net" / table).read_text().splitlines()[1:]
        except OSError:
            continue  # a kernel without IPv6
        for line in lines:
            fields = line.split()
            if (_port(fields[1]), _port(fields[2])) == (local_port, remote_port):
                return int(fields[9]) or None
    return None


def _port(address: str) -> int:
    return int(address.rpartition(":")[2], 16)


def _open_files(directory: Path) -> list[str]:
    """Where the descriptors of a process lead; none for one that has ended."""
    targets = []
    try:
        entries = os.listdir(directory)
    except OSError:
        return []
    for entry in entries:
        try:
            targets.append(os.readlink(directory / entry))
        except OSError:
            continue  # closed meanwhile
    return targets

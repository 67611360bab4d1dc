"""What this process knows of nodes' addresses: from cluster files, plans, and from starting nodes itself. Neither certificates nor gRPC are needed to know it."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass

__all__ = ["INSECURE", "PLAINTEXT", "Known", "Plaintext", "forget_address", "is_loopback", "know_address", "known"]

_MOST_ADDRESSES = 4096


@dataclass(frozen=True, slots=True)
class Plaintext:
    """No encryption and no authentication: within this machine only, unless `insecure`."""

    insecure: bool = False


PLAINTEXT, INSECURE = Plaintext(), Plaintext(insecure=True)


@dataclass(frozen=True, slots=True)
class Known:
    """`access`: plaintext, or the folder of the credentials to use there; None where nothing was said. `node`: the name of the node there; empty for unknown."""

    access: Plaintext | str | None = None
    node: str = ""


_NOTHING = Known()
_addresses: dict[str, Known] = {}


def know_address(address: str, access: Plaintext | str | None = None, node: str = "") -> None:
    """None and "" leave what was said before."""
    before = _addresses.pop(address, _NOTHING)
    _addresses[address] = Known(access or before.access, node or before.node)
    if len(_addresses) > _MOST_ADDRESSES:
        del _addresses[next(iter(_addresses))]


def forget_address(address: str) -> None:
    """Another node may get it."""
    _addresses.pop(address, None)


def known(address: str) -> Known:
    return _addresses.get(address, _NOTHING)


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches that host."""
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host.strip("[]")).is_loopback
    except ValueError:
        return False

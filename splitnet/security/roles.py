"""Roles and identities: what a certificate or a token says of its holder."""

from __future__ import annotations

import re
from dataclasses import dataclass
from enum import StrEnum

from splitnet.errors import BadInput, NotPermitted

__all__ = ["LOCAL", "NODE_DOMAIN", "Identity", "Role", "check_name", "node_host"]

NODE_DOMAIN = "node.splitnet"  #: a node's certificate is made out to NAME.node.splitnet, so that it is known by its name at any address
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}\Z")
_URI = re.compile(r"splitnet://([0-9a-f]{16})/([a-z]+)/([A-Za-z0-9][A-Za-z0-9._-]{0,62})\Z")


class Role(StrEnum):
    """What its holder may do stands in one table: `nodes.guard.RULES`."""

    NODE = "node"  #: a node of the cluster: passes activations on to others
    OPERATOR = "operator"  #: deploys, updates, unloads, measures; and all that the others may
    CLIENT = "client"  #: sends requests
    OBSERVER = "observer"  #: reads status and health
    GUEST = "guest"  #: a certificate that only opens the door: what its holder may do, a token says
    LOCAL = "local"  #: whoever speaks plaintext: another process of this machine, or, with --insecure, anybody


@dataclass(frozen=True, slots=True)
class Identity:
    """`cluster`: 16 hex digits, the authority's. In a certificate it stands as the URI splitnet://CLUSTER/ROLE/NAME."""

    cluster: str
    role: Role
    name: str

    @property
    def uri(self) -> str:
        return f"splitnet://{self.cluster}/{self.role}/{self.name}"

    def __str__(self) -> str:
        return f"{self.role} {self.name!r}" if self.name else str(self.role)

    @classmethod
    def from_uri(cls, uri: str) -> Identity:
        """Raises NotPermitted for what is not an identity."""
        match = _URI.match(uri)
        role = match[2] if match is not None else ""
        if match is None or role not in list(Role) or role == Role.LOCAL:
            raise NotPermitted(f"{uri[:200]!r} is not an identity of splitnet", remedy="issue the certificate with `splitnet certs issue`")
        return cls(match[1], Role(role), match[3])


LOCAL = Identity("", Role.LOCAL, "")


def node_host(name: str) -> str:
    """The host name that a node's certificate is made out to, whatever its address."""
    return f"{name.lower()}.{NODE_DOMAIN}"


def check_name(name: str) -> str:
    """Raises BadInput for what cannot be the name of a node, a person or a token."""
    if not _NAME.match(name):
        raise BadInput(f"name {name!r}: expected 1 to 63 letters, digits, '.', '_' or '-'", remedy="choose another name")
    return name

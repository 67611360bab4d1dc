"""The policy of a cluster: its tokens (hashed), which certificates were revoked, and what each client may use.

A small JSON document, `policy.json`: the authority's folder holds the master copy, each node one of its own. `serial` grows with every change; a node takes no older one.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import math
import re
import secrets
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from typing import Any

from splitnet.errors import BadInput, NotFound, NotPermitted
from splitnet.security.roles import Role, check_name

__all__ = ["POLICY_BYTES", "TOKEN_ROLES", "Limits", "Policy", "Token"]

POLICY_BYTES = 1 << 20  #: no policy is larger
TOKEN_ROLES = (Role.CLIENT, Role.OBSERVER, Role.OPERATOR)
_SECRET = re.compile(r"spl_([0-9a-f]{12})_([A-Za-z0-9_-]{43})\Z")
_HEX = re.compile(r"[0-9a-f]{1,64}\Z")
_DEPLOYMENT = re.compile(r"[A-Za-z0-9][A-Za-z0-9._@-]{0,62}\Z")


@dataclass(frozen=True, slots=True)
class Limits:
    """What one client may use of one node, over all its streams; 0: no limit."""

    requests_per_s: float = 0.0  # more is refused as Overloaded, with the time after which to try again
    bytes_per_s: float = 0.0  # more is read more slowly
    sessions: int = 0  # requests and generations in flight

    def __post_init__(self) -> None:
        for name in ("requests_per_s", "bytes_per_s", "sessions"):
            value = getattr(self, name)
            if not (0 <= value < math.inf):
                raise BadInput(f"{name} must be finite and must not be negative, got {value}", remedy="give 0 for no limit")


@dataclass(frozen=True, slots=True)
class Token:
    """`sha256`: of the secret part, which has 256 random bits, so that a plain hash is enough. `deployments`: empty for all."""

    name: str
    role: Role
    sha256: str
    created: int  # seconds since 1970, UTC
    expires: int  # likewise
    deployments: tuple[str, ...] = ()
    revoked: bool = False
    limits: Limits = field(default_factory=Limits)


@dataclass(frozen=True)
class Policy:
    """`revoked`: serial number (hex) of a certificate -> its holder. `limits`: by the name in a certificate; "" stands for every client that is not named."""

    serial: int = 0
    tokens: Mapping[str, Token] = field(default_factory=dict)
    revoked: Mapping[str, str] = field(default_factory=dict)
    limits: Mapping[str, Limits] = field(default_factory=dict)

    def token(self, secret: str, now: float) -> Token:
        """The token whose secret this is. Raises NotPermitted where there is none, or it does not hold any more; what it says is the same for an unknown
        token and a wrong one."""
        match = _SECRET.match(secret)
        found = self.tokens.get(match[1]) if match is not None else None
        given = hashlib.sha256((match[2] if match is not None else "").encode()).hexdigest()
        if not hmac.compare_digest(given, found.sha256 if found is not None else "0" * 64) or found is None:
            raise NotPermitted(
                "the token is not known here", remedy="ask the operator for one: `splitnet token create`, then `splitnet token push`"
            )
        if found.revoked:
            raise NotPermitted(f"token {found.name!r} was revoked", remedy="ask the operator for another")
        if now >= found.expires:
            raise NotPermitted(
                f"token {found.name!r} expired at {_time(found.expires)}; this node's clock says {_time(now)}",
                remedy="ask the operator for another, or set the node's clock if it is wrong",
            )
        return found

    def with_token(
        self, name: str, role: Role, *, expires: int, deployments: tuple[str, ...] = (), limits: Limits | None = None
    ) -> tuple[Policy, str]:
        """The policy with one more token, and its secret, which is kept nowhere. Raises BadInput."""
        check_name(name)
        if role not in TOKEN_ROLES:
            raise BadInput(f"a token cannot make its holder a {role}", remedy=f"choose one of {', '.join(TOKEN_ROLES)}")
        if any(token.name == name and not token.revoked for token in self.tokens.values()):
            raise BadInput(f"there is a token {name!r}", remedy="revoke it first, or choose another name")
        for deployment in deployments:
            if not _DEPLOYMENT.match(deployment):
                raise BadInput(f"{deployment!r} is not the name of a deployment")
        identifier, secret = secrets.token_hex(6), secrets.token_urlsafe(32)
        digest = hashlib.sha256(secret.encode()).hexdigest()
        token = Token(name, role, digest, int(datetime.now(UTC).timestamp()), expires, deployments, limits=limits or Limits())
        return replace(self, serial=self.serial + 1, tokens={**self.tokens, identifier: token}), f"spl_{identifier}_{secret}"

    def without_token(self, name: str) -> Policy:
        """Raises NotFound where no token of that name holds."""
        found = [identifier for identifier, token in self.tokens.items() if token.name == name and not token.revoked]
        if not found:
            raise NotFound(f"there is no token {name!r}", remedy="see `splitnet token list`")
        changed = {identifier: replace(self.tokens[identifier], revoked=True) for identifier in found}
        return replace(self, serial=self.serial + 1, tokens={**self.tokens, **changed})

    def without_certificate(self, serial: str, holder: str) -> Policy:
        return replace(self, serial=self.serial + 1, revoked={**self.revoked, serial: holder})

    def with_limits(self, name: str, limits: Limits) -> Policy:
        return replace(self, serial=self.serial + 1, limits={**self.limits, name: limits})

    def to_json(self) -> bytes:
        document = {
            "version": 1,
            "serial": self.serial,
            "tokens": {identifier: asdict(token) for identifier, token in self.tokens.items()},
            "revoked": dict(self.revoked),
            "limits": {name: asdict(limits) for name, limits in self.limits.items()},
        }
        return json.dumps(document, sort_keys=True, indent=1).encode() + b"\n"

    @classmethod
    def from_json(cls, data: bytes) -> Policy:
        """Raises BadInput with the path to the fault."""
        if len(data) > POLICY_BYTES:
            raise BadInput(f"policy: {len(data)} bytes, the limit is {POLICY_BYTES}")
        try:
            document = json.loads(data)
        except (ValueError, RecursionError) as error:
            raise BadInput(f"policy: not JSON: {error}") from None
        d = _object(document, "policy", {"version", "serial", "tokens", "revoked", "limits"})
        if d.get("version") != 1:
            raise BadInput(
                f"policy.version: expected 1, got {d.get('version')!r:.40}", remedy="use the same version of splitnet everywhere"
            )
        return cls(
            _number(d.get("serial"), "policy.serial"),
            {_hex(key, "policy.tokens"): _token(value, f"policy.tokens[{key!r}]") for key, value in _pairs(d, "tokens")},
            {_hex(key, "policy.revoked"): _text(value, f"policy.revoked[{key!r}]") for key, value in _pairs(d, "revoked")},
            {_text(key, "policy.limits"): _limits(value, f"policy.limits[{key!r}]") for key, value in _pairs(d, "limits")},
        )


# -------------------------------------------------------------------------------------------------------------------- reading


def _object(value: Any, at: str, keys: set[str]) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise BadInput(f"{at}: expected an object, got {type(value).__name__}")
    if unknown := sorted(set(value) - keys):
        raise BadInput(f"{at}: unknown key {unknown[0]!r:.60}")
    return value


def _pairs(document: Mapping[str, Any], key: str) -> list[tuple[str, Any]]:
    value = document.get(key, {})
    if not isinstance(value, dict):
        raise BadInput(f"policy.{key}: expected an object, got {type(value).__name__}")
    return list(value.items())


def _token(value: Any, at: str) -> Token:
    d = _object(value, at, {"name", "role", "sha256", "created", "expires", "deployments", "revoked", "limits"})
    role, names, revoked = d.get("role"), d.get("deployments", []), d.get("revoked", False)
    if role not in list(TOKEN_ROLES):
        raise BadInput(f"{at}.role: expected one of {', '.join(TOKEN_ROLES)}, got {role!r:.40}")
    if not isinstance(names, list) or not all(isinstance(name, str) and _DEPLOYMENT.match(name) for name in names):
        raise BadInput(f"{at}.deployments: expected names of deployments")
    if not isinstance(revoked, bool):
        raise BadInput(f"{at}.revoked: expected true or false, got {revoked!r:.40}")
    digest = _hex(d.get("sha256"), f"{at}.sha256")
    if len(digest) != 64:
        raise BadInput(f"{at}.sha256: expected 64 hex digits")
    created, expires = (_number(d.get(key), f"{at}.{key}") for key in ("created", "expires"))
    limits = _limits(d.get("limits", {}), f"{at}.limits")
    return Token(_text(d.get("name"), f"{at}.name"), Role(role), digest, created, expires, tuple(names), revoked, limits)


def _limits(value: Any, at: str) -> Limits:
    d = _object(value, at, {"requests_per_s", "bytes_per_s", "sessions"})
    for key, figure in d.items():
        if isinstance(figure, bool) or not isinstance(figure, int if key == "sessions" else (int, float)):
            raise BadInput(f"{at}.{key}: expected a number, got {figure!r:.40}")
    try:
        return Limits(**d)
    except BadInput as error:
        raise BadInput(f"{at}: {error.message}") from None


def _number(value: Any, at: str) -> int:
    if isinstance(value, bool) or not isinstance(value, int) or not 0 <= value < 1 << 53:
        raise BadInput(f"{at}: expected a whole number, got {value!r:.40}")
    return value


def _text(value: Any, at: str) -> str:
    if not isinstance(value, str) or len(value) > 100:
        raise BadInput(f"{at}: expected a text of at most 100 characters, got {value!r:.40}")
    return value


def _hex(value: Any, at: str) -> str:
    if not isinstance(value, str) or not _HEX.match(value):
        raise BadInput(f"{at}: expected hex digits, got {value!r:.40}")
    return value


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).strftime("%Y-%m-%d %H:%M:%S UTC")

"""API keys: made once, shown once, kept as hashes in a file that only its owner may read.

A key has 256 random bits, so one SHA-256 is enough: there is no dictionary to try it against.
"""

from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import os
import re
import secrets
import stat
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from splitnet.errors import AlreadyExists, BadInput, NotFound, NotPermitted

__all__ = ["ApiKey", "KeyFile", "default_key_file"]

_PREFIX = "sk-splitnet-"
_VERSION = 1
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")
_SHA256 = re.compile(r"[0-9a-f]{64}")


@dataclass(frozen=True, slots=True)
class ApiKey:
    """`name` says whose it is; `sha256` of the key, in hex; `created`: UTC, ISO 8601."""

    name: str
    sha256: str
    created: str


class KeyFile:
    """The keys in one file. A change to the file counts from the next request on."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._read_at: tuple[int, int, int] | None = None
        self._keys: tuple[ApiKey, ...] = ()

    def keys(self) -> tuple[ApiKey, ...]:
        """Raises NotFound where there is no file, NotPermitted where others may read or change it, BadInput where it is malformed."""
        try:
            found = self.path.stat()
        except FileNotFoundError:
            raise NotFound(f"no key file {str(self.path)!r}", remedy="make a key: splitnet keys create NAME") from None
        if found.st_mode & (stat.S_IRWXG | stat.S_IRWXO):
            raise NotPermitted(
                f"{str(self.path)!r} may be read or changed by others (mode {stat.S_IMODE(found.st_mode):04o}, expected 0600)",
                remedy=f"chmod 600 {self.path}",
            )
        version = (found.st_mtime_ns, found.st_size, found.st_ino)
        if version != self._read_at:
            self._keys = _parse(self.path)
            self._read_at = version
        return self._keys

    def owner(self, key: str) -> str | None:
        """Whose key it is; None for a wrong one. Takes the same time for each, whatever it has in common with a right one."""
        digest = hashlib.sha256(key.encode("utf-8", "surrogateescape")).hexdigest()
        owner = None
        for known in self.keys():
            if hmac.compare_digest(known.sha256, digest):
                owner = known.name
        return owner

    def create(self, name: str) -> str:
        """A new key, which is not kept anywhere. Makes the file if need be. Raises AlreadyExists or BadInput."""
        if not _NAME.fullmatch(name):
            raise BadInput(f"a key's name is letters, digits, '.', '_' and '-', at most 64, got {name!r:.80}")
        known = self.keys() if self.path.exists() else ()
        if any(each.name == name for each in known):
            raise AlreadyExists(
                f"there is a key {name!r} in {str(self.path)!r}", remedy=f"splitnet keys revoke {name}, or choose another name"
            )
        key = _PREFIX + secrets.token_urlsafe(32)
        digest = hashlib.sha256(key.encode()).hexdigest()
        self._write((*known, ApiKey(name, digest, time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()))))
        return key

    def revoke(self, name: str) -> None:
        """Raises NotFound."""
        known = self.keys()
        if not any(each.name == name for each in known):
            raise NotFound(f"no key {name!r} in {str(self.path)!r}; it has {', '.join(each.name for each in known) or 'none'}")
        self._write(tuple(each for each in known if each.name != name))

    def _write(self, keys: tuple[ApiKey, ...]) -> None:
        """All of it or nothing: a gateway that reads meanwhile sees the old or the new."""
        self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        text = json.dumps({"version": _VERSION, "keys": [asdict(key) for key in keys]}, indent=1) + "\n"
        part = self.path.with_name(f".{self.path.name}.{os.getpid()}.part")
        with contextlib.suppress(FileNotFoundError):
            part.unlink()
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(handle, "w") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        part.replace(self.path)


def default_key_file() -> Path:
    """$XDG_CONFIG_HOME/splitnet/gateway-keys.json, by default ~/.config/splitnet/gateway-keys.json."""
    base = os.environ.get("XDG_CONFIG_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "splitnet" / "gateway-keys.json"


def _parse(path: Path) -> tuple[ApiKey, ...]:
    try:
        document = json.loads(path.read_text())
        if document["version"] != _VERSION:
            raise BadInput(f"{path} has version {document['version']!r}, this splitnet reads version {_VERSION}")
        keys = tuple(ApiKey(str(each["name"]), str(each["sha256"]), str(each["created"])) for each in document["keys"])
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(
            f"{path} is no key file: {type(error).__name__}: {error}"[:300], remedy="make another: splitnet keys create NAME --keys FILE"
        ) from None
    if wrong := [key.name for key in keys if not _SHA256.fullmatch(key.sha256)]:
        raise BadInput(f"{path}: the key {wrong[0]!r:.80} has no sha256")
    return keys

"""Credentials: by which certificates this process speaks to nodes, or serves as one; and how they are found.

A folder, as `splitnet certs issue` makes it: `ca.pem` (whom to trust), `cert.pem` and `key.pem` (who this is), and where there is one `token`, `signing.key`, `operators.pub` and
`policy.json`. The files are looked at again for every connection, so new ones are used as soon as they are there; old connections go on.

Where nobody gives any, `access_to` looks in this order: inside a node, its own; the cluster file that named the address (`[credentials]`), what the command was told (`splitnet --certs DIR`), the
environment (SPLITNET_CERTS, SPLITNET_INSECURE=1), and, for other machines, ~/.config/splitnet/certs. What is left is plaintext, and that goes to this machine only.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Iterable, Mapping
from contextvars import ContextVar
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TypeAlias

import grpc

from splitnet.errors import BadInput, NotFound, NotPermitted, SplitnetError
from splitnet.security.addresses import INSECURE, PLAINTEXT, Plaintext, is_loopback, known
from splitnet.security.certificates import CertificateFacts, Pair, read_certificates, read_facts, signed_by
from splitnet.security.files import read_private, read_public
from splitnet.security.roles import Identity, node_host
from splitnet.security.signing import SHARD, SigningKey

__all__ = [
    "ENVIRONMENT", "Access", "AccessLike", "Credentials", "access_in_context", "access_to", "as_access", "channel_options", "check_plaintext",
    "default_directory", "explain", "is_loopback", "know_signatures", "shard_signatures", "sign_shards", "use_access",
]  # fmt: skip

ENVIRONMENT = "SPLITNET_CERTS"
_INSECURE_ENVIRONMENT = "SPLITNET_INSECURE"
_REMEDY = "make certificates with `splitnet certs init` and `splitnet certs issue`, and copy the folder here"
#: TLS 1.2 has no cipher in common with our certificates under this list, and TLS 1.3 does not look at it.
_ONLY_TLS_1_3 = "ECDHE-RSA-AES128-GCM-SHA256"
_TOKEN_BYTES = 200
_Stamp: TypeAlias = "tuple[tuple[int, int, int], ...]"


@dataclass(frozen=True, slots=True)
class _Loaded:
    bundle: bytes
    pair: Pair
    facts: CertificateFacts
    token: str


class Credentials:
    """Those in a folder; `token`: in place of the one in there. Raises NotFound for a missing file, NotPermitted for a key that others can read, for files that do not
    belong together, and for a certificate that does not hold now (with both times). May be used from several threads."""

    def __init__(self, directory: str | Path, *, token: str = "") -> None:
        self.directory = Path(directory).expanduser()
        self._token = token
        self._lock = threading.Lock()
        if not self.directory.is_dir():
            raise NotFound(f"there is no folder {str(self.directory)!r} with certificates", remedy=_REMEDY)
        self._stamp = self._look()
        self._loaded = self._load()
        self._made: tuple[_Loaded, grpc.ChannelCredentials] | None = None
        self._serving: _Loaded | None = None

    @property
    def identity(self) -> Identity:
        return self._loaded.facts.identity

    @property
    def facts(self) -> CertificateFacts:
        return self._loaded.facts

    @property
    def token(self) -> str:
        """The bearer token that goes with every call; empty for none."""
        return self._loaded.token

    @property
    def signing_key(self) -> SigningKey | None:
        """An operator's. Raises NotPermitted where others can read it."""
        path = self.directory / "signing.key"
        return SigningKey.from_text(read_private(path, _REMEDY)) if path.exists() else None

    def refresh(self) -> bool:
        """Takes new files, if there are any and they are good; whether there were. Raises as the constructor where they are not (the old ones stay in use)."""
        with self._lock:
            stamp = self._look()
            if stamp == self._stamp:
                return False
            loaded = self._load()  # two files cannot be replaced at once: a mismatch is tried again at the next look
            self._stamp, self._loaded = stamp, loaded
            return True

    def channel_credentials(self) -> grpc.ChannelCredentials:
        """For a connection to a node. Raises NotPermitted where the certificate does not hold now."""
        try:
            self.refresh()
        except SplitnetError:
            self._loaded.facts.check_now(str(self.directory))  # the old ones go on, as long as they hold
        loaded = self._loaded
        loaded.facts.check_now(str(self.directory))
        if self._made is None or self._made[0] is not loaded:
            made = grpc.ssl_channel_credentials(loaded.bundle, loaded.pair.key, loaded.pair.certificate)
            if loaded.token:
                made = grpc.composite_channel_credentials(made, grpc.access_token_call_credentials(loaded.token))
            self._made = loaded, made
        return self._made[1]

    def server_credentials(self) -> grpc.ServerCredentials:
        """For a node's port: mutual TLS 1.3. The files are looked at for every handshake."""
        os.environ.setdefault("GRPC_SSL_CIPHER_SUITES", _ONLY_TLS_1_3)  # gRPC reads it when it makes its first TLS connection
        self._serving = self._loaded
        return grpc.dynamic_ssl_server_credentials(_configuration(self._loaded), self._fetch, require_client_authentication=True)  # type: ignore[arg-type]

    def _fetch(self) -> grpc.ServerCertificateConfiguration | None:
        """In one of gRPC's threads. None: nothing has changed."""
        try:
            self.refresh()
        except SplitnetError:
            return None  # the node says so in its log (nodes.certificates), once, and not for each handshake
        loaded = self._loaded
        if loaded is self._serving:
            return None
        self._serving = loaded
        return _configuration(loaded)

    def _look(self) -> _Stamp:
        found = []
        for name in ("ca.pem", "cert.pem", "key.pem", "token"):
            try:
                status = (self.directory / name).stat()
            except OSError:
                found.append((0, 0, 0))
            else:
                found.append((status.st_ino, status.st_size, status.st_mtime_ns))
        return tuple(found)

    def _load(self) -> _Loaded:
        bundle = read_public(self.directory / "ca.pem", _REMEDY)
        pair = Pair(read_public(self.directory / "cert.pem", _REMEDY), read_private(self.directory / "key.pem", _REMEDY))
        read_certificates(bundle, str(self.directory / "ca.pem"))
        facts = read_facts(pair.certificate, str(self.directory / "cert.pem"))
        signed_by(pair, bundle, str(self.directory))
        facts.check_now(str(self.directory / "cert.pem"))
        return _Loaded(bundle, pair, facts, self._token or self._stored_token())

    def _stored_token(self) -> str:
        path = self.directory / "token"
        text = read_private(path, _REMEDY).decode(errors="replace").strip() if path.exists() else ""
        if len(text) > _TOKEN_BYTES or not text.isascii():
            raise BadInput(f"{path}: not a token", remedy="put into it what `splitnet token create` has printed")
        return text


Access: TypeAlias = Credentials | Plaintext
AccessLike: TypeAlias = Access | str | Path


def as_access(given: AccessLike) -> Access:
    """What a caller gave as `credentials`: a folder's name is read. Raises as `Credentials`."""
    return given if isinstance(given, Credentials | Plaintext) else _folder(str(given))


def explain(access: Access) -> str:
    """For an error message: who this side is, and what its clock says."""
    now = datetime.now(UTC)
    if isinstance(access, Plaintext):
        return "this side speaks plaintext"
    facts = access.facts
    return (
        f"this side is {facts.identity} by the certificate in {str(access.directory)!r}, valid {facts.not_before:%Y-%m-%d %H:%M} to "
        f"{facts.not_after:%Y-%m-%d %H:%M} UTC; this machine's clock says {now:%Y-%m-%d %H:%M} UTC"
    )


def channel_options(node: str) -> tuple[tuple[str, str], ...]:
    """So that whoever answers must be the node of that name; where no name is known, its certificate must be made out to the address."""
    return (("grpc.ssl_target_name_override", node_host(node)),) if node else ()


# --------------------------------------------------------------------------------------------------------------- what is known


_in_context: ContextVar[Access | None] = ContextVar("access", default=None)
_used: Access | None = None
_signatures: dict[str, bytes] = {}
_folders: dict[str, Credentials] = {}


def access_in_context(access: Access) -> None:
    """What this task, and those that it starts, use where nothing else is said: a node's own. Several nodes may be in one process."""
    _in_context.set(access)


def shard_signatures(address: str, shards: Mapping[str, str]) -> dict[str, bytes]:
    """For the node at `address`: stage -> the signature over its shard's sha256, by the operator's key in this side's credentials; none where there is no such key."""
    access = access_to(address)
    key = None if isinstance(access, Plaintext) else access.signing_key
    if key is not None:
        return {stage: key.sign(SHARD, sha256) for stage, sha256 in shards.items()}
    return {stage: _signatures[sha256] for stage, sha256 in shards.items() if sha256 in _signatures}


def sign_shards(shards: Iterable[str]) -> dict[str, str]:
    """For a bundle: sha256 of a shard's manifest -> signature in hex, by the key in this user's own credentials; empty where there is none."""
    access = access_to("")
    key = None if isinstance(access, Plaintext) else access.signing_key
    return {} if key is None else {sha256: key.sign(SHARD, sha256).hex() for sha256 in shards}


def know_signatures(signatures: Mapping[str, str]) -> None:
    """What a bundle brought: it goes to the nodes, which check it, where this side has no key to sign with. Raises BadInput for what is not hex."""
    try:
        _signatures.update({sha256: bytes.fromhex(text) for sha256, text in signatures.items()})
    except ValueError as error:
        raise BadInput(f"a signature is not hexadecimal: {error}", remedy="make the bundle again") from None


def use_access(access: AccessLike | None) -> None:
    """What this process uses from now on wherever nothing else is said; None: nothing in particular."""
    global _used
    _used = None if access is None else as_access(access)


def access_to(address: str, environment: Mapping[str, str] = os.environ) -> Access:
    """For a connection to `address` about which the caller says nothing; see the top of this file. Raises as `Credentials`."""
    if (own := _in_context.get()) is not None:
        return own
    if (said := known(address).access) is not None:
        return as_access(said)
    if _used is not None:
        return _used
    if directory := environment.get(ENVIRONMENT, ""):
        return _folder(directory)
    if environment.get(_INSECURE_ENVIRONMENT, "") == "1":
        return INSECURE
    standard = default_directory(environment)
    if not is_loopback(address.rpartition(":")[0]) and (standard / "cert.pem").exists():
        return _folder(str(standard))
    return PLAINTEXT


def default_directory(environment: Mapping[str, str] = os.environ) -> Path:
    """Where this user's own certificates are, unless told otherwise (XDG Base Directory Specification)."""
    base = environment.get("XDG_CONFIG_HOME", "")
    return (Path(base) if Path(base).is_absolute() else Path.home() / ".config") / "splitnet" / "certs"


def check_plaintext(address: str, access: Plaintext) -> None:
    """Raises NotPermitted for an address of another machine, unless it was said that this is wanted."""
    if not access.insecure and not is_loopback(address.rpartition(":")[0]):
        raise NotPermitted(
            f"{address} is another machine, and there are no credentials for it: what is sent would be neither encrypted nor authenticated",
            remedy=f"give this machine certificates (`splitnet certs issue`) and name their folder with `splitnet --certs DIR`, {ENVIRONMENT} or [credentials] in the cluster file; "
            "or, on a network where you trust everybody, `splitnet --insecure`",
        )


def _folder(directory: str) -> Credentials:
    """One object for each folder, so that its files are read once."""
    found = _folders.get(directory)
    if found is None:
        found = _folders[directory] = Credentials(directory)
    return found


def _configuration(loaded: _Loaded) -> grpc.ServerCertificateConfiguration:
    return grpc.ssl_server_certificate_configuration([(loaded.pair.key, loaded.pair.certificate)], loaded.bundle)

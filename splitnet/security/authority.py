"""The private authority of a cluster: a folder on the operator's machine, from which certificates, tokens and revocations come.

    DIR/authority.json   what was issued to whom
    DIR/ca.pem, ca.key   the authorities that the cluster trusts (the first one signs), and the first one's key
    DIR/signing.key      signs shards and policies (Ed25519); operators.pub: its public half
    DIR/policy.json      tokens, revocations, limits
    DIR/audit.jsonl      what was done here
    DIR/NAME/            what NAME needs, to be copied to its machine: ca.pem, cert.pem, key.pem, policy.json, operators.pub

Every method blocks on the disk. Two processes must not change one authority at a time: a lock file refuses the second.
"""

from __future__ import annotations

import contextlib
import fcntl
import getpass
import json
import os
import secrets
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from splitnet.errors import AlreadyExists, BadInput, NotFound, NotPermitted
from splitnet.security.audit import AuditLog
from splitnet.security.certificates import CertificateFacts, Pair, make_authority, make_leaf, read_certificates, read_facts
from splitnet.security.files import make_private_directory, read_private, read_public, write_file
from splitnet.security.policy import Limits, Policy
from splitnet.security.roles import Identity, Role, check_name
from splitnet.security.signing import SigningKey

__all__ = ["AUTHORITY_DAYS", "CERTIFICATE_DAYS", "Authority", "Issued"]

AUTHORITY_DAYS = 3650
CERTIFICATE_DAYS = 90
_INDEX, _BUNDLE, _KEY, _SIGNING, _PUBLIC, _POLICY, _AUDIT = (
    "authority.json", "ca.pem", "ca.key", "signing.key", "operators.pub", "policy.json", "audit.jsonl",
)  # fmt: skip
_REMEDY = "make an authority with `splitnet certs init --dir DIR`, or name its folder with --dir"
_ISSUABLE = (Role.NODE, Role.OPERATOR, Role.CLIENT, Role.OBSERVER, Role.GUEST)


@dataclass(frozen=True, slots=True)
class Issued:
    """A certificate. `not_after`: seconds since 1970, UTC."""

    name: str
    role: Role
    serial: str
    not_after: int
    days: int
    addresses: tuple[str, ...] = ()
    revoked: bool = False


class Authority:
    def __init__(self, directory: Path, cluster: str, issued: tuple[Issued, ...], policy: Policy) -> None:
        self.directory = directory
        self.cluster = cluster
        self.issued = issued
        self.policy = policy
        self.audit = AuditLog(directory / _AUDIT)

    @classmethod
    def init(cls, directory: Path, operator: str = "operator", days: int = AUTHORITY_DAYS) -> Authority:
        """Makes an authority, and the first operator's certificate. Raises AlreadyExists, BadInput, StorageFailure."""
        check_name(operator)
        if (directory / _INDEX).exists():
            raise AlreadyExists(f"there is an authority in {str(directory)!r}", remedy="use it, or choose another --dir")
        make_private_directory(directory)
        cluster = secrets.token_hex(8)
        pair, signer = make_authority(cluster, _checked_days(days)), SigningKey.new()
        write_file(directory / _BUNDLE, pair.certificate, private=False)
        write_file(directory / _KEY, pair.key, private=True)
        write_file(directory / _SIGNING, signer.to_text(), private=True)
        write_file(directory / _PUBLIC, f"{signer.public_line} {cluster}\n".encode(), private=False)
        authority = cls(directory, cluster, (), Policy())
        authority._save()
        authority._record("certs init", f"cluster {cluster}")
        authority.issue(operator, Role.OPERATOR, days=CERTIFICATE_DAYS * 4)
        return authority

    @classmethod
    @contextlib.contextmanager
    def opened(cls, directory: Path) -> Iterator[Authority]:
        """The authority in this folder, for as long as the block lasts. Raises NotFound, NotPermitted, BadInput, AlreadyExists (in use)."""
        index = read_public(directory / _INDEX, _REMEDY)
        lock = os.open(directory / ".lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except OSError:
                raise AlreadyExists(
                    f"another command is changing the authority in {str(directory)!r}", remedy="wait until it has ended"
                ) from None
            cluster, issued = _read_index(index, directory / _INDEX)
            yield cls(directory, cluster, issued, Policy.from_json(read_private(directory / _POLICY, _REMEDY)))
        finally:
            os.close(lock)

    def issue(
        self, name: str, role: Role, addresses: Sequence[str] = (), *, days: int = CERTIFICATE_DAYS, limits: Limits | None = None
    ) -> Path:
        """Makes the folder that `name` needs; returns it. Raises AlreadyExists where somebody has that name, BadInput."""
        check_name(name)
        if role not in _ISSUABLE:
            raise BadInput(f"role {role!r}: expected one of {', '.join(_ISSUABLE)}")
        if other := next((i for i in self.issued if i.name.lower() == name.lower() and not i.revoked), None):
            raise AlreadyExists(
                f"{other.name!r} has a certificate already ({other.role})",
                remedy=f"renew it with `splitnet certs rotate {other.name}`, or revoke it first",
            )
        if role is Role.NODE and not addresses:
            raise BadInput(f"node {name!r}: no address", remedy="give the host by which others reach it: --address 10.0.0.5")
        if limits is not None:
            self.policy = self.policy.with_limits(name, limits)
        folder = self._make(name, role, tuple(addresses), _checked_days(days))
        self._record("certs issue", f"{role} {name} {self.issued[-1].serial}")
        return folder

    def rotate(self, names: Sequence[str] = ()) -> list[Path]:
        """New keys and certificates, of the same names, roles and addresses; all of them unless named. The old ones hold until they expire. Raises NotFound."""
        current = {i.name: i for i in self.issued if not i.revoked}
        if unknown := [name for name in names if name not in current]:
            raise NotFound(f"nobody named {unknown[0]!r} has a certificate", remedy="see `splitnet certs list`")
        folders = []
        for name in names or current:
            old = current[name]
            folders.append(self._make(name, old.role, old.addresses, old.days))
            self._record("certs rotate", f"{old.role} {name} {self.issued[-1].serial}")
        return folders

    def revoke(self, name: str) -> list[str]:
        """Every certificate of that name that has not expired is refused from now on by the nodes that have the new policy. Returns their serial numbers."""
        found = [i for i in self.issued if i.name == name and not i.revoked]
        if not found:
            raise NotFound(f"nobody named {name!r} has a certificate", remedy="see `splitnet certs list`")
        for one in found:
            self.policy = self.policy.without_certificate(one.serial, name)
        self.issued = tuple(replace(i, revoked=True) if i in found else i for i in self.issued)
        self._save()
        self._record("certs revoke", f"{name} {' '.join(i.serial for i in found)}")
        return [i.serial for i in found]

    def rotate_authority(self, days: int = AUTHORITY_DAYS) -> None:
        """A new authority signs from now on; the old ones are trusted until `drop_old`. Certificates stay: bring the new ca.pem to every machine, then
        `rotate`, then `drop_old`."""
        pair = make_authority(self.cluster, _checked_days(days))
        old = read_public(self.directory / _BUNDLE, _REMEDY)
        write_file(self.directory / _BUNDLE, pair.certificate + old, private=False)
        write_file(self.directory / _KEY, pair.key, private=True)
        self._save()
        self._record("certs rotate", "authority")

    def drop_old(self) -> int:
        """Trusts only the authority that signs; how many others are gone. Raises NotPermitted where a certificate of theirs would stop to hold."""
        from cryptography.hazmat.primitives.serialization import Encoding

        signing, *others = read_certificates(read_public(self.directory / _BUNDLE, _REMEDY), str(self.directory / _BUNDLE))
        for name in sorted({i.name for i in self.issued if not i.revoked}):
            leaf = read_certificates(read_public(self.directory / name / "cert.pem", _REMEDY), name)[0]
            if leaf.issuer != signing.subject:
                raise NotPermitted(
                    f"{name!r} still has a certificate of an old authority", remedy="`splitnet certs rotate` first, and copy the folders"
                )
        write_file(self.directory / _BUNDLE, signing.public_bytes(Encoding.PEM), private=False)
        self._save()
        self._record("certs rotate", "old authorities dropped")
        return len(others)

    def change_policy(self, policy: Policy, act: str, what: str) -> None:
        self.policy = policy
        self._save()
        self._record(act, what)

    def folder(self, name: str) -> Path:
        return self.directory / name

    def signing_key(self) -> SigningKey:
        return SigningKey.from_text(read_private(self.directory / _SIGNING, _REMEDY))

    # ------------------------------------------------------------------------------------------------------------------ on disk

    def _make(self, name: str, role: Role, addresses: tuple[str, ...], days: int) -> Path:
        bundle = read_public(self.directory / _BUNDLE, _REMEDY)
        signing = Pair(bundle, read_private(self.directory / _KEY, _REMEDY))
        pair = make_leaf(signing, Identity(self.cluster, role, name), addresses, days)
        facts: CertificateFacts = read_facts(pair.certificate, name)
        folder = self.directory / name
        make_private_directory(folder)
        write_file(folder / "key.pem", pair.key, private=True)
        write_file(folder / "cert.pem", pair.certificate, private=False)
        if role is Role.OPERATOR:
            write_file(folder / _SIGNING, read_private(self.directory / _SIGNING, _REMEDY), private=True)
        issued = Issued(name, role, facts.serial, int(facts.not_after.timestamp()), days, addresses)
        now = datetime.now(UTC).timestamp()
        self.issued = (*(i for i in self.issued if i.not_after > now), issued)
        self._save()
        return folder

    def _save(self) -> None:
        """The index, the policy, and copies of what all folders share."""
        index = {"version": 1, "cluster": self.cluster, "issued": [asdict(i) for i in self.issued]}
        write_file(self.directory / _POLICY, self.policy.to_json(), private=True)
        write_file(self.directory / _INDEX, json.dumps(index, indent=1).encode() + b"\n", private=True)
        for name in {i.name for i in self.issued if not i.revoked}:
            folder = self.directory / name
            if not folder.is_dir():
                continue
            write_file(folder / _BUNDLE, read_public(self.directory / _BUNDLE, _REMEDY), private=False)
            write_file(folder / _PUBLIC, read_public(self.directory / _PUBLIC, _REMEDY), private=False)
            write_file(folder / _POLICY, self.policy.to_json(), private=True)

    def _record(self, act: str, what: str) -> None:
        self.audit.append(who=f"user {getpass.getuser()}", came_from="this machine", act=act, what=what, result="ok")


def _read_index(data: bytes, path: Path) -> tuple[str, tuple[Issued, ...]]:
    try:
        document: Any = json.loads(data)
        cluster = document["cluster"]
        issued = tuple(Issued(**{**i, "role": Role(i["role"]), "addresses": tuple(i["addresses"])}) for i in document["issued"])
        if document["version"] != 1 or not isinstance(cluster, str):
            raise ValueError("not of version 1")
    except (ValueError, TypeError, KeyError, RecursionError) as error:
        raise BadInput(f"{path}: not the index of an authority: {error}", remedy="restore the file, or make a new authority") from None
    return cluster, issued


def _checked_days(days: int) -> int:
    if not 1 <= days <= 36500:
        raise BadInput(f"days must be 1 to 36500, got {days}")
    return days

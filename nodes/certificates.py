"""A node's own certificate and policy: found, checked, and looked at again while it serves."""

from __future__ import annotations

import asyncio
import contextlib
import hashlib
import json
import os
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path

from nodes.config import NodeConfig
from nodes.guard import Guard
from nodes.logs import Log
from splitnet.errors import BadInput, NotFound, NotPermitted, SplitnetError
from splitnet.security.addresses import INSECURE, PLAINTEXT, is_loopback
from splitnet.security.credentials import ENVIRONMENT, Access, Credentials, default_directory
from splitnet.security.files import read_private, write_file
from splitnet.security.policy import Policy
from splitnet.security.roles import Role
from splitnet.security.signing import POLICY as POLICY_CONTEXT
from splitnet.security.signing import SHARD, check_signature, read_public_keys

__all__ = ["CertificateKeeper", "find_certs", "name_in", "node_access"]

_LOOK_S = 1.0
_CHECK_EVERY = 5  # looks between checks of what is open
_MOST_SIGNED = 4096
_SOON = timedelta(days=14)
_POLICY, _OPERATORS = "policy.json", "operators.pub"


def find_certs(listen: str, insecure: bool) -> Path | None:
    """Where a node that others reach finds its certificate when it was not told: SPLITNET_CERTS, then ~/.config/splitnet/certs."""
    if insecure or is_loopback(listen.rpartition(":")[0]):
        return None
    if directory := os.environ.get(ENVIRONMENT, ""):
        return Path(directory)
    standard = default_directory()
    return standard if (standard / "cert.pem").exists() else None


def name_in(certs: Path) -> str:
    """The name that the certificate in this folder is made out to: what the node is called unless it was told otherwise. Raises as `Credentials`."""
    return Credentials(certs).identity.name


def node_access(config: NodeConfig) -> Access:
    """Reads the node's certificate. Raises NotPermitted where it is not a node's, or another node's."""
    if config.certs is None:
        return INSECURE if config.insecure else PLAINTEXT
    credentials = Credentials(config.certs)
    identity = credentials.identity
    if identity.role is not Role.NODE:
        raise NotPermitted(
            f"{config.certs}: this is the certificate of {identity}, not of a node",
            remedy=f"issue one: `splitnet certs issue {config.name} --address HOST`",
        )
    if identity.name != config.name:
        raise NotPermitted(
            f"{config.certs}: this is the certificate of node {identity.name!r}, and this node is {config.name!r}",
            remedy=f"leave --name out, or issue a certificate for {config.name!r}",
        )
    return credentials


class CertificateKeeper:
    """Looks every second whether there are new files, takes them, and says so."""

    def __init__(self, access: Access, guard: Guard, log: Log, directory: Path) -> None:
        self._access = access
        self._guard = guard
        self._log = log
        self._policy_stamp: tuple[int, int, int] | None = None
        self._complaint = ""
        self._task: asyncio.Task[None] | None = None
        self._signatures = directory / "signatures.json"
        self._signed: dict[str, bytes] = {}  # the signatures of shards that were seen, also by an earlier process
        self.operators: tuple[bytes, ...] = ()  #: who may sign shards; empty: nobody needs to

    def start(self) -> None:
        """Raises what is wrong with the policy or the operators' keys."""
        if not isinstance(self._access, Credentials):
            return
        self._guard.policy = self._read_policy() or Policy()
        self.operators = self._read_operators()
        self._recall()
        self._warn_of_the_end()
        self._task = asyncio.create_task(self._watch(), name="certificates")

    async def close(self) -> None:
        if self._task is not None:
            self._task.cancel()
            await asyncio.gather(self._task, return_exceptions=True)

    def check_shards(self, shards: Mapping[str, str], signatures: Mapping[str, bytes]) -> None:
        """`shards`: stage -> sha256 of its manifest. Raises NotPermitted where an operator must have signed them and has not. A signature that was seen holds as long as the
        keys do, over restarts: another node that has to replace a lost one has none to show. Raises StorageFailure where it cannot be kept."""
        if not self.operators:
            return
        for stage, sha256 in shards.items():
            if sha256 not in self._signed:
                check_signature(self.operators, SHARD, sha256, signatures.get(stage, b""), f"shard {sha256[:12]} of stage {stage!r}")
        new = {sha256: signatures[stage] for stage, sha256 in shards.items() if sha256 not in self._signed}
        if not new:
            return
        self._signed.update(new)
        for old in list(self._signed)[: max(0, len(self._signed) - _MOST_SIGNED)]:
            del self._signed[old]
        kept = {sha256: signature.hex() for sha256, signature in self._signed.items()}
        write_file(self._signatures, json.dumps(kept).encode(), private=True)

    async def set_policy(self, data: bytes, signature: bytes) -> int:
        """Takes a newer policy that an operator has signed, and keeps it; the number of calls that it ended. Raises BadInput, NotPermitted (not signed, or older)."""
        if not isinstance(self._access, Credentials):
            raise NotPermitted("this node speaks plaintext, so it has no policy", remedy="start it with --certs")
        check_signature(self.operators, POLICY_CONTEXT, hashlib.sha256(data).hexdigest(), signature, "the policy")
        policy = Policy.from_json(data)
        if policy.serial < self._guard.policy.serial:
            raise NotPermitted(
                f"this policy has serial {policy.serial}, and the node has {self._guard.policy.serial} already",
                remedy="push from the folder of the authority that made the newer one",
            )
        await asyncio.to_thread(write_file, self._access.directory / _POLICY, data, private=True)
        self._policy_stamp = _stamp(self._access.directory / _POLICY)
        return await self._guard.apply(policy)

    async def _watch(self) -> None:
        looks = 0
        while True:
            await asyncio.sleep(_LOOK_S)
            looks += 1
            try:
                await self._look(looks % _CHECK_EVERY == 0)
                self._complaint = ""
            except SplitnetError as error:
                if error.message != self._complaint:
                    self._log.error("certificates", error=error.message, remedy=error.remedy)
                self._complaint = error.message

    async def _look(self, check: bool) -> None:
        assert isinstance(self._access, Credentials)
        if await asyncio.to_thread(self._access.refresh):
            self._log.info("new certificate", serial=self._access.facts.serial, until=self._access.facts.not_after.isoformat())
            self._warn_of_the_end()
        operators = await asyncio.to_thread(self._read_operators)
        if operators != self.operators:
            self.operators = operators
            self._recall()
        policy = await asyncio.to_thread(self._read_policy)
        if policy is not None and policy.serial < self._guard.policy.serial:
            raise NotPermitted(f"policy.json has serial {policy.serial}, older than {self._guard.policy.serial}: not taken")
        if policy is not None or check:
            ended = await self._guard.apply(policy)
            if policy is not None:
                self._log.info("new policy", serial=policy.serial, calls_ended=ended)

    def _recall(self) -> None:
        """What an earlier process has seen, as far as the operators' keys still bear it out."""
        self._signed.clear()
        if not self._signatures.exists():
            return
        try:
            document = json.loads(read_private(self._signatures, "remove it; the next deployment brings the signatures again"))
            kept = {str(sha256): bytes.fromhex(signature) for sha256, signature in document.items()}
        except (ValueError, TypeError, AttributeError, RecursionError) as error:
            self._log.warning("signatures.json is damaged, and not used", error=str(error))
            return
        for sha256, signature in kept.items():
            with contextlib.suppress(NotPermitted, BadInput):
                check_signature(self.operators, SHARD, sha256, signature, "shard")
                self._signed[sha256] = signature

    def _read_policy(self) -> Policy | None:
        """None where there is nothing new."""
        assert isinstance(self._access, Credentials)
        path = self._access.directory / _POLICY
        stamp = _stamp(path)
        if stamp == self._policy_stamp:
            return None
        policy = Policy.from_json(read_private(path, "copy it from the authority's folder")) if stamp is not None else None
        self._policy_stamp = stamp
        return policy

    def _read_operators(self) -> tuple[bytes, ...]:
        assert isinstance(self._access, Credentials)
        path = self._access.directory / _OPERATORS
        try:
            return read_public_keys(path.read_bytes(), str(path))
        except FileNotFoundError:
            return ()
        except OSError as error:
            raise NotFound(f"cannot read {str(path)!r}: {error.strerror}") from None

    def _warn_of_the_end(self) -> None:
        assert isinstance(self._access, Credentials)
        left = self._access.facts.not_after - datetime.now(UTC)
        if left < _SOON:
            self._log.warning(
                "the certificate expires soon",
                days=round(left / timedelta(days=1), 1),
                remedy="`splitnet certs rotate`, and copy the folder",
            )


def _stamp(path: Path) -> tuple[int, int, int] | None:
    try:
        status = path.stat()
    except OSError:
        return None
    return status.st_ino, status.st_size, status.st_mtime_ns

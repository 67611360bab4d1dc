"""The operator's signature on a shard: Ed25519 over the sha256 of its manifest, which holds those of all its members.

What is signed is "splitnet shard 1\\n" + the 64 hex digits, so that a signature of one thing is never taken for one of another (`context`).
"""

from __future__ import annotations

import base64
import binascii
import re

from splitnet.errors import BadInput, NotPermitted

__all__ = ["POLICY", "SHARD", "SigningKey", "check_signature", "read_public_keys"]

SHARD = b"splitnet shard 1\n"
POLICY = b"splitnet policy 1\n"
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_PUBLIC = re.compile(r"splitnet-ed25519 ([A-Za-z0-9+/]{43}=)(?: .*)?\Z")


class SigningKey:
    """The operator's private key (32 bytes). Raises BadInput for what is none."""

    def __init__(self, seed: bytes) -> None:
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

        try:
            self._key = Ed25519PrivateKey.from_private_bytes(seed)
        except ValueError as error:
            raise BadInput(f"not a signing key: {error}", remedy="make one with `splitnet certs init`") from None

    @classmethod
    def new(cls) -> SigningKey:
        import secrets

        return cls(secrets.token_bytes(32))

    @classmethod
    def from_text(cls, text: bytes) -> SigningKey:
        try:
            return cls(base64.b64decode(text.strip(), validate=True))
        except binascii.Error as error:
            raise BadInput(f"not a signing key: {error}", remedy="make one with `splitnet certs init`") from None

    def to_text(self) -> bytes:
        return base64.b64encode(self._key.private_bytes_raw()) + b"\n"

    @property
    def public(self) -> bytes:
        return self._key.public_key().public_bytes_raw()

    @property
    def public_line(self) -> str:
        """For a node's `operators.pub`."""
        return f"splitnet-ed25519 {base64.b64encode(self.public).decode()}"

    def sign(self, context: bytes, sha256: str) -> bytes:
        """64 bytes. Raises BadInput for what is not a sha256 in lower-case hex."""
        return self._key.sign(_signed(context, sha256))


def check_signature(keys: tuple[bytes, ...], context: bytes, sha256: str, signature: bytes, what: str) -> None:
    """Raises NotPermitted unless one of these public keys has signed it."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

    signed = _signed(context, sha256)
    for key in keys:
        try:
            Ed25519PublicKey.from_public_bytes(key).verify(signature, signed)
            return
        except InvalidSignature:
            continue
    raise NotPermitted(
        f"{what} {'has no signature' if not signature else 'was not signed by an operator whom this node knows'}",
        remedy="deploy it with the operator's credentials (the folder with signing.key), or put the signer's public key into this node's operators.pub",
    )


def read_public_keys(text: bytes, place: str) -> tuple[bytes, ...]:
    """One key on each line: `splitnet-ed25519 BASE64 [comment]`; '#' begins a comment. Raises BadInput with the line."""
    keys = []
    for number, line in enumerate(text.decode(errors="replace").splitlines(), 1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _PUBLIC.match(line.strip())
        if match is None:
            raise BadInput(f"{place}:{number}: expected `splitnet-ed25519 BASE64`, got {line[:60]!r}")
        keys.append(base64.b64decode(match[1]))
    return tuple(keys)


def _signed(context: bytes, sha256: str) -> bytes:
    if not _SHA256.match(sha256):
        raise BadInput(f"{sha256[:80]!r} is not a sha256")
    return context + sha256.encode()

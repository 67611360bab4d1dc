"""X.509 certificates of an authority and of those it vouches for: made and read.

Keys are on the curve P-256. A leaf carries its identity as a URI and, for a node, NAME.node.splitnet and the addresses that clients use; only a node's certificate may be a
server's. (RFC 5280; the URI in the manner of SPIFFE.)
"""

from __future__ import annotations

import ipaddress
import secrets
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any

from splitnet.errors import BadInput, NotPermitted
from splitnet.security.roles import Identity, Role, node_host

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePrivateKey
    from cryptography.x509 import Certificate

__all__ = ["CertificateFacts", "Pair", "make_authority", "make_leaf", "read_certificates", "read_facts", "signed_by"]

_BACKDATED = timedelta(minutes=5)  # clocks in a cluster differ a little
_REMEDY = "issue it again with `splitnet certs issue`, or `splitnet certs rotate`"


@dataclass(frozen=True, slots=True)
class Pair:
    """A certificate (PEM) and its private key (PEM, PKCS 8, not encrypted: the file's permissions protect it)."""

    certificate: bytes
    key: bytes


@dataclass(frozen=True, slots=True)
class CertificateFacts:
    """What a certificate says. Times are UTC."""

    identity: Identity
    serial: str  # hex
    not_before: datetime
    not_after: datetime
    hosts: tuple[str, ...]

    def check_now(self, what: str, now: datetime | None = None) -> None:
        """Raises NotPermitted with both times where the certificate does not hold now."""
        now = now or datetime.now(UTC)
        if self.not_before <= now <= self.not_after:
            return
        fault = f"expired at {_text(self.not_after)}" if now > self.not_after else f"is not valid before {_text(self.not_before)}"
        raise NotPermitted(
            f"{what}: the certificate of {self.identity} {fault}; this machine's clock says {_text(now)}",
            remedy="set the clock if it is wrong (is NTP running?), else issue the certificate anew: `splitnet certs rotate`",
        )


def make_authority(cluster: str, days: int) -> Pair:
    """A certificate that signs itself, and may sign others but no further authority."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes

    key = _new_key()
    name = f"splitnet {cluster} {secrets.token_hex(4)}"  # each authority of a cluster has its own, so that they can be told apart
    builder = _builder(name, name, key, days)
    builder = builder.add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
    builder = builder.add_extension(_usage(key_cert_sign=True, crl_sign=True), critical=True)
    builder = builder.add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
    return Pair(_pem(builder.sign(key, hashes.SHA256())), _key_pem(key))


def make_leaf(authority: Pair, identity: Identity, addresses: Sequence[str], days: int) -> Pair:
    """`addresses`: hosts or IP addresses, without ports, by which clients call a node. Raises BadInput for what is neither."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes
    from cryptography.hazmat.primitives.asymmetric import ec
    from cryptography.hazmat.primitives.serialization import load_pem_private_key
    from cryptography.x509.oid import ExtendedKeyUsageOID

    signer = load_pem_private_key(authority.key, None)
    if not isinstance(signer, ec.EllipticCurvePrivateKey):
        raise BadInput("the authority's key is not one of P-256", remedy="make a new authority: `splitnet certs init`")
    issuer = x509.load_pem_x509_certificate(authority.certificate)
    names: list[x509.GeneralName] = [x509.UniformResourceIdentifier(identity.uri)]
    usages = [ExtendedKeyUsageOID.CLIENT_AUTH]
    if identity.role is Role.NODE:
        names += [x509.DNSName(node_host(identity.name)), *(_general_name(address) for address in addresses)]
        usages.append(ExtendedKeyUsageOID.SERVER_AUTH)
    elif addresses:
        raise BadInput(f"{identity} does not listen, so its certificate has no address", remedy="leave --address out")
    key = _new_key()
    last = issuer.not_valid_after_utc
    builder = _builder(identity.name, "", key, days, last).issuer_name(issuer.subject)
    builder = builder.add_extension(x509.BasicConstraints(ca=False, path_length=None), critical=True)
    builder = builder.add_extension(_usage(digital_signature=True), critical=True)
    builder = builder.add_extension(x509.ExtendedKeyUsage(usages), critical=False)
    builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    authority_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
    builder = builder.add_extension(authority_id, critical=False)
    return Pair(_pem(builder.sign(signer, hashes.SHA256())), _key_pem(key))


def read_certificates(pem: bytes, place: str) -> list[Certificate]:
    """Raises NotPermitted where there is none, or what stands there is not one."""
    from cryptography import x509

    try:
        return x509.load_pem_x509_certificates(pem)
    except (ValueError, x509.InvalidVersion) as error:
        raise NotPermitted(f"{place}: not a PEM certificate: {error}", remedy=_REMEDY) from None


def read_facts(pem: bytes, place: str) -> CertificateFacts:
    """Of the first certificate in there. Raises NotPermitted where it is not one of splitnet's."""
    from cryptography import x509

    certificate = read_certificates(pem, place)[0]
    try:
        names = certificate.extensions.get_extension_for_class(x509.SubjectAlternativeName).value
        uris = names.get_values_for_type(x509.UniformResourceIdentifier)
        hosts = [*names.get_values_for_type(x509.DNSName), *map(str, names.get_values_for_type(x509.IPAddress))]
        serial, first, last = certificate.serial_number, certificate.not_valid_before_utc, certificate.not_valid_after_utc
    except (ValueError, x509.ExtensionNotFound, x509.DuplicateExtension, x509.UnsupportedGeneralNameType) as error:
        raise NotPermitted(f"{place}: the certificate names no holder: {error}", remedy=_REMEDY) from None
    if len(uris) != 1:
        raise NotPermitted(f"{place}: the certificate names {len(uris)} holders, expected one", remedy=_REMEDY)
    return CertificateFacts(Identity.from_uri(uris[0]), f"{serial:x}", first, last, tuple(hosts))


def signed_by(pair: Pair, bundle: bytes, place: str) -> None:
    """Raises NotPermitted where the key is not the certificate's, or no authority in the bundle has signed it."""
    from cryptography.exceptions import InvalidSignature
    from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat, load_pem_private_key

    leaf = read_certificates(pair.certificate, f"{place}/cert.pem")[0]
    try:
        key = load_pem_private_key(pair.key, None)
    except (ValueError, TypeError) as error:
        raise NotPermitted(f"{place}/key.pem: not a private key in PEM: {error}", remedy=_REMEDY) from None
    raw = (Encoding.DER, PublicFormat.SubjectPublicKeyInfo)
    if key.public_key().public_bytes(*raw) != leaf.public_key().public_bytes(*raw):
        raise NotPermitted(f"{place}: key.pem is not the key of cert.pem", remedy="copy the whole folder again")
    for authority in read_certificates(bundle, f"{place}/ca.pem"):
        try:
            leaf.verify_directly_issued_by(authority)
            return
        except (ValueError, TypeError, InvalidSignature):
            continue
    raise NotPermitted(
        f"{place}: cert.pem was not signed by an authority in ca.pem", remedy="copy the whole folder again, from the authority's folder"
    )


# ------------------------------------------------------------------------------------------------------------------- in pieces


def _new_key() -> EllipticCurvePrivateKey:
    from cryptography.hazmat.primitives.asymmetric import ec

    return ec.generate_private_key(ec.SECP256R1())


def _builder(subject: str, issuer: str, key: EllipticCurvePrivateKey, days: int, last: datetime | None = None) -> Any:
    from cryptography import x509

    now = datetime.now(UTC)
    until = now + timedelta(days=days)
    builder = x509.CertificateBuilder().subject_name(_common_name(subject)).public_key(key.public_key())
    builder = builder.serial_number(x509.random_serial_number())
    builder = builder.not_valid_before(now - _BACKDATED).not_valid_after(until if last is None else min(until, last))
    return builder.issuer_name(_common_name(issuer)) if issuer else builder


def _common_name(text: str) -> Any:
    from cryptography import x509
    from cryptography.x509.oid import NameOID

    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, text[:64])])


def _general_name(address: str) -> Any:
    from cryptography import x509

    try:
        return x509.IPAddress(ipaddress.ip_address(address.strip("[]")))
    except ValueError:
        pass
    try:
        if not address or "*" in address or ":" in address or "/" in address or " " in address:
            raise ValueError("expected a host name or an IP address, without a port")
        return x509.DNSName(address)
    except ValueError as error:
        raise BadInput(f"address {address!r}: {error}", remedy="for example --address 10.0.0.5 or --address attic.local") from None


def _usage(**allowed: bool) -> Any:
    from cryptography import x509

    kinds = (
        "digital_signature", "content_commitment", "key_encipherment", "data_encipherment", "key_agreement", "key_cert_sign", "crl_sign",
        "encipher_only", "decipher_only",
    )  # fmt: skip
    return x509.KeyUsage(**{kind: allowed.get(kind, False) for kind in kinds})


def _pem(certificate: Certificate) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding

    return certificate.public_bytes(Encoding.PEM)


def _key_pem(key: EllipticCurvePrivateKey) -> bytes:
    from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat

    return key.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())


def _text(time: datetime) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S UTC")

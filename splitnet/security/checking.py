"""What stands between this side and a node: both certificates and both clocks, looked at without trusting either."""

from __future__ import annotations

import socket
import ssl
from dataclasses import dataclass, field
from datetime import UTC, datetime

from splitnet.errors import BadInput, NodeUnavailable, SplitnetError
from splitnet.security.addresses import Plaintext, known
from splitnet.security.certificates import read_facts
from splitnet.security.credentials import Access, access_to, explain
from splitnet.security.roles import Role, node_host

__all__ = ["Findings", "check_node"]

_TIMEOUT_S = 5.0


@dataclass
class Findings:
    """`fault`: empty where the two sides would come together."""

    lines: list[str] = field(default_factory=list)
    fault: str = ""
    remedy: str = ""


def check_node(address: str, access: Access | None = None) -> Findings:
    """Shakes hands with the node at HOST:PORT and believes nothing. Blocks for seconds at most. Raises BadInput, NodeUnavailable."""
    host, _, port = address.rpartition(":")
    if not host or not port.isdigit() or not 0 < int(port) < 65536:
        raise BadInput(f"address {address!r} is not HOST:PORT", remedy="give a node's address, for example 10.0.0.5:7001")
    access = access or access_to(address)
    found = Findings([explain(access)])
    try:
        pem, refusal = _shake(host.strip("[]"), int(port), access)
    except OSError as error:
        raise NodeUnavailable(f"no node answers at {address}: {error}", remedy="check that `splitnet node` runs there") from None
    if not pem:
        found.lines.append(f"{address} speaks plaintext")
        if not isinstance(access, Plaintext):
            found.fault, found.remedy = f"{address} speaks plaintext, this side has certificates", "start the node with --certs"
        return found
    try:
        facts = read_facts(pem.encode(), address)
    except SplitnetError as error:
        found.fault, found.remedy = f"{address} is no node of splitnet: {error.message}", "check the address"
        return found
    now = datetime.now(UTC)
    found.lines.append(
        f"{address} shows the certificate of {facts.identity}, of cluster {facts.identity.cluster}, valid {facts.not_before:%Y-%m-%d %H:%M} to "
        f"{facts.not_after:%Y-%m-%d %H:%M} UTC, made out to {', '.join(facts.hosts)}"
    )
    name = known(address).node
    if isinstance(access, Plaintext):
        found.fault, found.remedy = (
            f"{address} wants certificates, and this side has none",
            "name their folder: `splitnet --certs DIR`, or SPLITNET_CERTS",
        )
    elif facts.identity.cluster != access.identity.cluster:
        found.fault = f"{address} belongs to cluster {facts.identity.cluster}, this side to {access.identity.cluster}"
        found.remedy = "use credentials of that cluster's authority"
    elif facts.identity.role is not Role.NODE:
        found.fault, found.remedy = f"{address} shows the certificate of {facts.identity}", "give the node a node's certificate"
    elif not facts.not_before <= now <= facts.not_after:
        found.fault, found.remedy = (
            "the node's certificate does not hold now, by this machine's clock",
            "`splitnet certs rotate`, or set the clock",
        )
    elif name and node_host(name) not in facts.hosts:
        found.fault, found.remedy = (
            f"the cluster file has node {name!r} at {address}",
            "correct the cluster file, or the node's certificate",
        )
    elif not name and host.strip("[]").lower() not in (h.lower() for h in facts.hosts):
        found.fault = f"the certificate is not made out to {host}"
        found.remedy = f"issue it with --address {host}, or name the node in a cluster file"
    elif refusal:
        found.fault, found.remedy = f"the node refuses this side's certificate: {refusal}", "compare the authorities, and the clock there"
    else:
        found.lines.append("both sides accept each other")
    return found


def _shake(host: str, port: int, access: Access) -> tuple[str, str]:
    """The node's certificate (PEM; empty where it speaks plaintext), and why it refuses ours. Raises OSError where nobody answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    context.set_alpn_protocols(["h2"])
    if not isinstance(access, Plaintext):
        context.load_cert_chain(access.directory / "cert.pem", access.directory / "key.pem")
    with socket.create_connection((host, port), timeout=_TIMEOUT_S) as plain:
        try:
            with context.wrap_socket(plain) as shaken:
                der = shaken.getpeercert(binary_form=True)
                pem = ssl.DER_cert_to_PEM_cert(der) if der else ""
                try:
                    return pem, "" if shaken.recv(1) else "it ended the connection"  # HTTP/2 servers speak first
                except (ssl.SSLError, OSError) as error:
                    return pem, str(error)
        except ssl.SSLError:
            return "", ""

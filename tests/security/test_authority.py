"""The authority's folder: issuing, renewing, revoking, changing the authority itself."""

from __future__ import annotations

import ssl
import stat
from pathlib import Path

import pytest
from click.testing import CliRunner

from splitnet.commands.certs import certs
from splitnet.errors import AlreadyExists, BadInput, NotFound, NotPermitted
from splitnet.security.authority import Authority
from splitnet.security.certificates import read_facts
from splitnet.security.credentials import Credentials
from splitnet.security.policy import Policy
from splitnet.security.roles import Identity, Role
from splitnet.security.signing import SHARD, SigningKey, check_signature, read_public_keys


def run(*arguments: str) -> str:
    ended = CliRunner().invoke(certs, list(arguments), catch_exceptions=False)
    assert ended.exit_code == 0, ended.output
    return ended.output


def test_the_commands_make_what_a_node_and_a_client_need(tmp_path: Path) -> None:
    folder = str(tmp_path / "certs")
    assert "keep" in run("init", "--dir", folder)
    assert "splitnet node --listen" in run("issue", "attic", "--address", "10.0.0.5", "--address", "attic.local", "--dir", folder)
    run("issue", "camera", "--role", "client", "--rate", "5", "--dir", folder)
    facts = Credentials(tmp_path / "certs" / "attic").facts
    assert (facts.identity.role, facts.hosts) == (Role.NODE, ("attic.node.splitnet", "attic.local", "10.0.0.5"))
    assert Credentials(tmp_path / "certs" / "camera").identity.role is Role.CLIENT
    assert Policy.from_json((tmp_path / "certs" / "attic" / "policy.json").read_bytes()).limits["camera"].requests_per_s == 5
    assert "attic" in run("list", "--dir", folder)
    for path in (tmp_path / "certs").rglob("*"):
        mode = stat.S_IMODE(path.stat().st_mode)
        public = path.suffix == ".pub" or (path.suffix == ".pem" and path.name != "key.pem")
        assert public or not mode & 0o077, f"{path}: {mode:04o}"


def test_what_cannot_be_issued(tmp_path: Path) -> None:
    made = Authority.init(tmp_path / "certs")
    with pytest.raises(AlreadyExists, match="there is an authority in"):
        Authority.init(tmp_path / "certs")
    made.issue("attic", Role.NODE, ["10.0.0.5"])
    with pytest.raises(AlreadyExists, match=r"'attic' has a certificate already \(node\)"):
        made.issue("Attic", Role.CLIENT)
    with pytest.raises(BadInput, match="node 'cellar': no address"):
        made.issue("cellar", Role.NODE)
    for wrong in ("10.0.0.5:7001", "*.example.org", "http://x", ""):
        with pytest.raises(BadInput, match="expected a host name or an IP address"):
            made.issue("cellar", Role.NODE, [wrong])
    with pytest.raises(BadInput, match="name '../x'"):
        made.issue("../x", Role.CLIENT)
    with pytest.raises(NotFound, match="nobody named 'nobody'"):
        made.rotate(["nobody"])
    with pytest.raises(NotFound, match="nobody named 'nobody'"):
        made.revoke("nobody")
    with pytest.raises(NotFound, match=r"no file .*authority.json.*\n.*splitnet certs init"), Authority.opened(tmp_path / "nowhere"):
        pass


def test_two_commands_do_not_change_one_authority_at_a_time(tmp_path: Path) -> None:
    Authority.init(tmp_path / "certs")
    with Authority.opened(tmp_path / "certs"), pytest.raises(AlreadyExists, match="another command"), Authority.opened(tmp_path / "certs"):
        pass


def test_renewed_certificates_keep_name_role_and_addresses(tmp_path: Path) -> None:
    made = Authority.init(tmp_path / "certs")
    folder = made.issue("attic", Role.NODE, ["10.0.0.5"])
    used = Credentials(folder)
    before = used.facts
    assert not used.refresh()
    made.rotate()
    assert used.refresh()
    after = used.facts
    assert before.serial != after.serial
    assert (before.identity, before.hosts) == (after.identity, after.hosts)


def test_half_a_new_pair_is_not_taken(tmp_path: Path) -> None:
    """Two files cannot be replaced at once: what is in use goes on until both are there."""
    made = Authority.init(tmp_path / "certs")
    folder = made.issue("attic", Role.NODE, ["10.0.0.5"])
    used = Credentials(folder)
    serial, key = used.facts.serial, (folder / "key.pem").read_bytes()
    made.rotate()
    new = (folder / "key.pem").read_bytes()
    (folder / "key.pem").write_bytes(key)
    with pytest.raises(NotPermitted, match="key.pem is not the key of cert.pem"):
        used.refresh()
    assert used.facts.serial == serial
    used.channel_credentials()
    (folder / "key.pem").write_bytes(new)
    assert used.refresh()


def test_the_authority_itself_is_changed_in_three_steps(tmp_path: Path) -> None:
    made = Authority.init(tmp_path / "certs")
    folder = made.issue("attic", Role.NODE, ["10.0.0.5"])
    old = Credentials(folder)
    made.rotate_authority()
    assert old.refresh(), "the new one is trusted"
    with pytest.raises(NotPermitted, match="still has a certificate of an old authority"):
        made.drop_old()
    made.rotate()
    assert old.refresh()
    assert made.drop_old() == 1
    assert old.refresh()
    assert (folder / "ca.pem").read_bytes().count(b"BEGIN CERTIFICATE") == 1


@pytest.mark.parametrize(
    "uri", ["", "splitnet://x/node/a", "splitnet://0123456789abcdef/local/a", "splitnet://0123456789abcdef/king/a", "https://a/node/b"]
)
def test_what_is_not_an_identity(uri: str) -> None:
    with pytest.raises(NotPermitted, match="is not an identity of splitnet"):
        Identity.from_uri(uri)


def test_a_certificate_of_no_version_is_refused_in_words(tmp_path: Path) -> None:
    """Found by scripts/fuzz.py: an error of the library came out that is not a ValueError."""
    der = ssl.PEM_cert_to_DER_cert((Authority.init(tmp_path / "certs").folder("operator") / "cert.pem").read_text())
    at = der.index(b"\xa0\x03\x02\x01\x02")
    with pytest.raises(NotPermitted, match="not a PEM certificate.*66 is not a valid"):
        read_facts(ssl.DER_cert_to_PEM_cert(der[: at + 4] + bytes((66,)) + der[at + 5 :]).encode(), "cert.pem")


def test_signatures() -> None:
    key, other = SigningKey.new(), SigningKey.new()
    again = SigningKey.from_text(key.to_text())
    shard = "ab" * 32
    keys = read_public_keys(f"# ours\n{key.public_line} me\n\n{other.public_line}\n".encode(), "operators.pub")
    assert keys == (key.public, other.public)
    check_signature(keys, SHARD, shard, again.sign(SHARD, shard), "shard")
    for signature in (
        b"",
        b"x" * 64,
        key.sign(SHARD, "cd" * 32),
        key.sign(b"something else\n", shard),
        SigningKey.new().sign(SHARD, shard),
    ):
        with pytest.raises(NotPermitted, match="no signature|not signed by an operator"):
            check_signature(keys, SHARD, shard, signature, "shard")
    with pytest.raises(BadInput, match="operators.pub:2: expected"):
        read_public_keys(f"{key.public_line}\nssh-ed25519 AAAA\n".encode(), "operators.pub")
    with pytest.raises(BadInput, match="not a signing key"):
        SigningKey.from_text(b"!!!")

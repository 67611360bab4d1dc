"""Nodes with certificates: what works without further ado, and who does not get in, with which words."""

from __future__ import annotations

import asyncio
import datetime
import shutil
import socket
import ssl
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from deploy.chain_model import WIDTH, expected, write_chain

import splitnet
from nodes.certificates import find_certs
from nodes.config import NodeConfig
from nodes.testing import LocalCluster
from splitnet import channel
from splitnet.commands.deploying import bundle, deploy
from splitnet.errors import NodeUnavailable, NotFound, NotPermitted
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.security import certificates
from splitnet.security.authority import Authority
from splitnet.security.credentials import Credentials, use_access
from splitnet.security.roles import Identity, Role

PATIENCE_S = 20.0


@pytest.fixture(scope="module")
def cluster(authority: Path) -> Iterator[LocalCluster]:
    with LocalCluster(2, certs=authority) as nodes:
        yield nodes


def leaf(
    authority: Path, folder: Path, role: Role, name: str, *, shift: datetime.timedelta = datetime.timedelta(0), **options: object
) -> Path:
    """A folder with a certificate that holds for a day, from now + shift on; of that authority."""
    folder.mkdir(mode=0o700)
    pair = certificates.Pair((authority / "ca.pem").read_bytes(), (authority / "ca.key").read_bytes())
    cluster = certificates.read_facts((authority / "operator" / "cert.pem").read_bytes(), "").identity.cluster
    real = certificates.datetime

    class Shifted(real):  # type: ignore[misc, valid-type]
        @classmethod
        def now(cls, tz: datetime.tzinfo | None = None) -> datetime.datetime:
            return real.now(tz) + shift

    certificates.datetime = Shifted  # type: ignore[misc]
    try:
        made = certificates.make_leaf(pair, Identity(cluster, role, name), ["127.0.0.1"] if role is Role.NODE else [], 1)
    finally:
        certificates.datetime = real  # type: ignore[misc]
    (folder / "cert.pem").write_bytes(made.certificate)
    (folder / "key.pem").write_bytes(made.key)
    (folder / "key.pem").chmod(0o600)
    shutil.copy(authority / "ca.pem", folder)
    return folder


def test_a_plan_is_deployed_and_served_over_mutual_tls(cluster: LocalCluster, authority: Path, tmp_path: Path) -> None:
    """Node to node, too; signed by the operator, as the nodes demand; and by a client that may not deploy."""
    plan, shards = write_chain(tmp_path, cluster.cluster())
    x = np.random.default_rng(0).standard_normal((2, WIDTH)).astype(np.float32)
    use_access(authority / "operator")
    deployed = splitnet.deploy(plan, shards, name="chain")
    try:
        with splitnet.Client(deployed.ingress, "chain", credentials=authority / "client") as client:
            np.testing.assert_allclose(client.infer({"v0": x})["y"], expected(x), rtol=1e-3)
        assert all(not status.error and not status.insecure for status in splitnet.status(plan))
        assert all(link.connected for status in splitnet.status(plan) for link in status.links)
    finally:
        splitnet.undeploy(plan, "chain")
    keeper = cluster.server("a")._certificates
    stage, shard = next((stage.name, stage.shard) for stage in plan.stages if stage.node == "a")
    keeper._recall()  # as after a restart
    keeper.check_shards({stage: shard}, {})
    with pytest.raises(NotPermitted, match="has no signature"):
        keeper.check_shards({stage: "0" * 64}, {})
    audited = (Path(cluster.config("a").directory) / "audit.jsonl").read_text()
    assert '"act": "Activate"' in audited
    assert "operator 'operator'" in audited


def test_after_a_power_cut_only_what_an_operator_signed_is_served_again(cluster: LocalCluster, authority: Path, tmp_path: Path) -> None:
    plan, shards = write_chain(tmp_path, cluster.cluster(), seed=3)
    x = np.ones((2, WIDTH), np.float32)

    def restart(*names: str) -> None:
        for name in names:
            cluster.restart(name)
        deadline = time.monotonic() + 20
        while not all(cluster.server(name)._restoring.done() for name in names):
            assert time.monotonic() < deadline
            time.sleep(0.01)

    use_access(authority / "operator")
    deployed = splitnet.deploy(plan, shards, name="signed")
    try:
        with splitnet.Client(deployed.ingress, "signed") as client:
            before = client.infer({"v0": x})["y"]
        for name in ("a", "b"):
            cluster.kill(name)
        restart("b", "a")
        with splitnet.Client(deployed.ingress, "signed") as client:
            assert np.array_equal(client.infer({"v0": x})["y"], before)
        cluster.kill("b")
        (cluster.config("b").directory / "signatures.json").unlink()
        restart("b")
        (told,) = [event.text for event in cluster.server("b").ledger.events if event.kind == "unrestored"]
        assert "has no signature" in told
    finally:
        splitnet.undeploy(plan, "signed")


def test_a_client_may_not_deploy(cluster: LocalCluster, authority: Path, tmp_path: Path) -> None:
    plan, shards = write_chain(tmp_path, cluster.cluster(), seed=1)
    use_access(authority / "client")
    with pytest.raises(NotPermitted, match=r"client 'client' may not call Load.*\n.*operator"):
        splitnet.deploy(plan, shards, name="chain")


def test_shards_that_no_operator_has_signed_are_refused(cluster: LocalCluster, authority: Path, tmp_path: Path) -> None:
    unsigned = shutil.copytree(authority / "operator", tmp_path / "unsigned")
    (unsigned / "signing.key").unlink()
    plan, shards = write_chain(tmp_path, cluster.cluster(), seed=2)
    use_access(unsigned)
    with pytest.raises(NotPermitted, match=r"shard .* of stage .* has no signature"):
        splitnet.deploy(plan, shards, name="unsigned")


def test_shards_that_only_the_plan_names_are_checked_too(cluster: LocalCluster, authority: Path, tmp_path: Path) -> None:
    """An Activate may leave its own list of shards empty; the node then takes them from the plan."""
    plan, _ = write_chain(tmp_path, cluster.cluster(), seed=4)
    plan_json = plan.to_json().encode()
    assert all(stage.shard for stage in plan.stages)

    async def activate() -> None:
        async with channel.open_channel(cluster.addresses["a"], node="a", credentials=authority / "operator") as opened:
            with channel.translated(cluster.addresses["a"]):
                await channel.stub(opened).Activate(pb.ActivateRequest(deployment="named", plan_json=plan_json, node="a"))

    with pytest.raises(NotPermitted, match=r"shard .* of stage .* has no signature"):
        asyncio.run(activate())


def test_plaintext_does_not_get_in(cluster: LocalCluster) -> None:
    with pytest.raises(NodeUnavailable, match="it may want certificates"), splitnet.Client(cluster.addresses["a"]):
        pass


def test_certificates_do_not_get_into_plaintext(authority: Path) -> None:
    with LocalCluster(1) as plain:
        with pytest.raises(NodeUnavailable, match="it speaks plaintext, and this side has certificates"):
            splitnet.Client(plain.addresses["a"], credentials=authority / "client").connect()
        use_access(authority / "client")  # for everything but what was started here, and is known to speak plaintext
        assert not splitnet.status(plain.cluster())[0].error


def test_another_authority_is_not_believed(cluster: LocalCluster, tmp_path: Path) -> None:
    stranger = Authority.init(tmp_path / "other").folder("operator")
    with (
        pytest.raises(NodeUnavailable, match="not by an authority that this side trusts"),
        splitnet.Client(cluster.addresses["a"], credentials=stranger),
    ):
        pass


def test_a_client_of_another_authority_is_not_let_in(cluster: LocalCluster, authority: Path, tmp_path: Path) -> None:
    """It trusts the nodes, and they do not trust it."""
    folder = leaf(Authority.init(tmp_path / "other").directory, tmp_path / "mixed", Role.OPERATOR, "operator")
    other = (folder / "ca.pem").read_bytes()
    (folder / "ca.pem").write_bytes((authority / "ca.pem").read_bytes() + other)
    with (
        pytest.raises(NodeUnavailable, match="may not trust this side's certificate.*this machine's clock says"),
        splitnet.Client(cluster.addresses["a"], credentials=folder),
    ):
        pass


@pytest.mark.parametrize(
    ("shift", "said"),
    [(datetime.timedelta(days=-3), "expired at"), (datetime.timedelta(days=3), "is not valid before")],
    ids=["expired", "from the future"],
)
def test_a_certificate_that_does_not_hold_now_says_both_times(
    authority: Path, tmp_path: Path, shift: datetime.timedelta, said: str
) -> None:
    folder = leaf(authority, tmp_path / "late", Role.CLIENT, "late", shift=shift)
    with pytest.raises(NotPermitted, match=rf"certificate of client 'late' {said} 20.* UTC; this machine's clock says 20.* UTC"):
        Credentials(folder)


def test_a_node_of_another_name_is_not_believed(cluster: LocalCluster, authority: Path) -> None:
    """The cluster file says who is where."""
    wrong = splitnet.Cluster((splitnet.ClusterNode("b", cluster.addresses["a"]),))
    use_access(authority / "operator")
    assert "another node's" in splitnet.status(wrong)[0].error


def test_a_client_certificate_cannot_serve(authority: Path, tmp_path: Path) -> None:
    (tmp_path / "a").symlink_to(authority / "client")
    with pytest.raises(NotPermitted, match="certificate of client 'client', not of a node"), LocalCluster(1, certs=tmp_path):
        pass
    (tmp_path / "a").unlink()
    (tmp_path / "a").symlink_to(authority / "b")
    with pytest.raises(NotPermitted, match="certificate of node 'b', and this node is 'a'"), LocalCluster(1, certs=tmp_path):
        pass


def test_tls_1_2_is_refused(authority: Path) -> None:
    """In a process of its own, as a node is: which versions are offered is decided once in a process."""
    with LocalCluster(1, certs=authority, processes=True) as nodes:
        host, port = nodes.addresses["a"].split(":")
        assert shaken(host, int(port), authority, ssl.TLSVersion.TLSv1_3) == "TLSv1.3"
        with pytest.raises((ssl.SSLError, ConnectionError)):
            shaken(host, int(port), authority, ssl.TLSVersion.TLSv1_2)


def shaken(host: str, port: int, authority: Path, newest: ssl.TLSVersion) -> str | None:
    context = ssl.create_default_context(cafile=str(authority / "ca.pem"))
    context.load_cert_chain(authority / "client" / "cert.pem", authority / "client" / "key.pem")
    context.maximum_version = newest
    context.set_alpn_protocols(["h2"])
    with socket.create_connection((host, port), timeout=PATIENCE_S) as plain, context.wrap_socket(plain, server_hostname=host) as shaken:
        return shaken.version()


def test_a_new_certificate_is_taken_without_a_restart(tmp_path: Path) -> None:
    made = Authority.init(tmp_path / "certs")
    made.issue("a", Role.NODE, ["127.0.0.1"])
    with LocalCluster(1, certs=made.directory) as nodes:
        host, port = nodes.addresses["a"].split(":")
        before = serial(host, int(port))
        with Authority.opened(made.directory) as authority:
            authority.rotate(["a"])
        after = serial(host, int(port))
    assert before != after
    assert after == Credentials(made.folder("a")).facts.serial


def serial(host: str, port: int) -> str:
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    with socket.create_connection((host, port), timeout=PATIENCE_S) as plain, context.wrap_socket(plain) as shaken:
        der = shaken.getpeercert(binary_form=True)
    assert der is not None
    return certificates.read_facts(ssl.DER_cert_to_PEM_cert(der).encode(), "").serial


# ------------------------------------------------------------------------------------------------------------------- the files


@pytest.mark.parametrize("name", ["ca.pem", "cert.pem", "key.pem"])
def test_a_missing_file_is_named(authority: Path, tmp_path: Path, name: str) -> None:
    folder = shutil.copytree(authority / "client", tmp_path / "client")
    (folder / name).unlink()
    with pytest.raises(NotFound, match=rf"no file '.*{name}'\n.*splitnet certs"):
        Credentials(folder)


def test_a_key_that_others_can_read_is_refused(authority: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(authority / "client", tmp_path / "client")
    (folder / "key.pem").chmod(0o640)
    with pytest.raises(NotPermitted, match=r"others than its owner may use '.*key.pem' \(mode 0640, 040 too much\)\n.*chmod 600"):
        Credentials(folder)


def test_files_that_do_not_belong_together_are_refused(authority: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(authority / "client", tmp_path / "client")
    shutil.copy(authority / "observer" / "key.pem", folder)
    with pytest.raises(NotPermitted, match="key.pem is not the key of cert.pem"):
        Credentials(folder)
    shutil.copy(authority / "client" / "key.pem", folder)
    shutil.copy(Authority.init(tmp_path / "other").directory / "ca.pem", folder)
    with pytest.raises(NotPermitted, match="was not signed by an authority in ca.pem"):
        Credentials(folder)


def test_plaintext_to_another_machine_needs_to_be_asked_for() -> None:
    with pytest.raises(NotPermitted, match=r"neither encrypted nor authenticated\n.*splitnet --insecure"):
        splitnet.Client("192.0.2.1:7001", timeout_s=1).connect()


def test_a_node_finds_its_certificate_where_the_environment_says(authority: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert find_certs("0.0.0.0:0", insecure=False) is None
    monkeypatch.setenv("SPLITNET_CERTS", str(authority / "a"))
    assert find_certs("0.0.0.0:0", insecure=False) == authority / "a"
    assert find_certs("127.0.0.1:0", insecure=False) is None, "within the machine as before"
    with pytest.raises(NotPermitted, match="neither encrypted nor authenticated"):
        NodeConfig(listen="0.0.0.0:0")
    assert not NodeConfig(listen="0.0.0.0:0", certs=authority / "a").open_plaintext


def test_a_bundle_carries_the_operators_signatures(cluster: LocalCluster, authority: Path, tmp_path: Path) -> None:
    """Whoever deploys it needs an operator's certificate, and not the key."""
    keyless = shutil.copytree(authority / "operator", tmp_path / "keyless")
    (keyless / "signing.key").unlink()
    plan, _ = write_chain(tmp_path, cluster.cluster(), seed=3)
    (tmp_path / "plan.json").write_text(plan.to_json())
    use_access(authority / "operator")
    runner = CliRunner()
    made = runner.invoke(
        bundle,
        [str(tmp_path / "plan.json"), "--shards", str(tmp_path / "model3-96.shards"), "-o", str(tmp_path / "chain.splitnet")],
        catch_exceptions=False,
    )
    assert made.exit_code == 0, made.output
    use_access(keyless)
    done = runner.invoke(deploy, ["--bundle", str(tmp_path / "chain.splitnet"), "--name", "bundled"], catch_exceptions=False)
    assert done.exit_code == 0, done.output
    splitnet.undeploy(plan, "bundled")

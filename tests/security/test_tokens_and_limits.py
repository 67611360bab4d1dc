"""Tokens, revocation and limits: as a document, as arithmetic, and on a real node."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from click.testing import CliRunner
from deploy.chain_model import WIDTH, write_chain

import splitnet
from nodes.callers import Caller, Callers, Usage
from nodes.testing import LocalCluster
from splitnet.cluster import ClusterCredentials
from splitnet.commands.certs import certs
from splitnet.commands.token import token
from splitnet.errors import BadInput, NotFound, NotPermitted, Overloaded
from splitnet.security.authority import Authority
from splitnet.security.credentials import Credentials, use_access
from splitnet.security.policy import Limits, Policy
from splitnet.security.roles import Identity, Role

LATER = 4_000_000_000


# ------------------------------------------------------------------------------------------------------------------ a document


def test_a_policy_survives_its_file() -> None:
    policy, secret = Policy().with_token("camera", Role.CLIENT, expires=LATER, deployments=("digits",), limits=Limits(20, 1e6, 3))
    policy = policy.without_certificate("ab12", "old").with_limits("desk", Limits(5))
    read = Policy.from_json(policy.to_json())
    assert read == policy
    assert read.token(secret, time.time()).name == "camera"
    assert secret.rpartition("_")[2].encode() not in policy.to_json(), "the secret itself is kept nowhere"


def test_a_token_that_does_not_hold_says_why() -> None:
    policy, secret = Policy().with_token("camera", Role.CLIENT, expires=1_000)
    with pytest.raises(
        NotPermitted, match=r"token 'camera' expired at 1970-01-01 00:16:40 UTC; this node's clock says 1970-01-01 00:33:20 UTC"
    ):
        policy.token(secret, 2_000)
    assert policy.token(secret, 999).name == "camera"
    with pytest.raises(NotPermitted, match="was revoked"):
        policy.without_token("camera").token(secret, 999)
    for wrong in ("", "spl_", secret[:-1] + "-", secret.replace("spl_", "spl_0"), "spl_" + "0" * 12 + "_" + "A" * 43):
        with pytest.raises(NotPermitted, match="not known here"):
            policy.token(wrong, 999)


def test_what_a_token_cannot_be() -> None:
    policy, _ = Policy().with_token("camera", Role.CLIENT, expires=LATER)
    with pytest.raises(BadInput, match="there is a token 'camera'"):
        policy.with_token("camera", Role.CLIENT, expires=LATER)
    with pytest.raises(BadInput, match="cannot make its holder a node"):
        policy.with_token("attic", Role.NODE, expires=LATER)
    with pytest.raises(NotFound, match="no token 'desk'"):
        policy.without_token("desk")
    with pytest.raises(BadInput, match="bytes_per_s must be finite"):
        Limits(bytes_per_s=float("nan"))


# ------------------------------------------------------------------------------------------------------------------- arithmetic


def test_the_rate_is_kept_and_a_second_may_be_saved_up() -> None:
    now = [0.0]
    usage, limits = Usage(lambda: now[0]), Limits(requests_per_s=4)
    assert [usage.take_request(limits) for _ in range(4)] == [0.0] * 4
    assert usage.take_request(limits) == pytest.approx(0.25)
    now[0] = 0.25
    assert usage.take_request(limits) == 0.0
    now[0] = 1000.0
    taken = 0
    while not usage.take_request(limits):
        taken += 1
    assert taken == 4, "and no more than a second's"


def test_bytes_are_slowed_down() -> None:
    now = [0.0]
    usage, limits = Usage(lambda: now[0]), Limits(bytes_per_s=1000)
    assert usage.take_bytes(1000, limits) == 0.0
    assert usage.take_bytes(500, limits) == pytest.approx(0.5)
    now[0] = 0.5
    assert usage.take_bytes(0, limits) == 0.0


def test_sessions_and_deployments_of_a_caller() -> None:
    usage = Callers().usage("x")
    caller = Caller(Identity("0" * 16, Role.CLIENT, "x"), "", token="t", deployments=("digits",), limits=Limits(sessions=1), usage=usage)
    with pytest.raises(NotPermitted, match="token 't' is not for deployment 'other'"):
        caller.admit("other")
    caller.admit("digits@3")
    caller.entered()
    with pytest.raises(Overloaded, match="1 requests in flight") as raised:
        caller.admit("digits")
    assert raised.value.retry_after_s > 0
    caller.left()
    caller.admit("digits")


# ------------------------------------------------------------------------------------------------------------------- on a node


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An authority of our own, whose policy these tests change."""
    authority = Authority.init(tmp_path_factory.mktemp("tokens") / "certs")
    authority.issue("a", Role.NODE, ["127.0.0.1"])
    for name, role in (("client", Role.CLIENT), ("guest", Role.GUEST)):
        authority.issue(name, role)
    return authority.directory


@pytest.fixture(scope="module")
def cluster(made: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    shutil.copytree(made / "a", (copied := tmp_path_factory.mktemp("node")) / "a")  # to the node's machine
    with LocalCluster(1, certs=copied) as nodes:
        plan, shards = write_chain(tmp_path_factory.mktemp("model"), nodes.cluster(), stages=1)
        use_access(made / "operator")
        for name in ("digits", "faces"):
            splitnet.deploy(plan, shards, name=name)
        yield nodes


def command(made: Path, group: object, *arguments: str) -> str:
    ended = CliRunner().invoke(group, [*arguments, "--dir", str(made)], catch_exceptions=False)  # type: ignore[arg-type]
    assert ended.exit_code == 0, ended.output
    return ended.stdout


def pushed(made: Path, cluster: LocalCluster, tmp_path: Path) -> str:
    file = tmp_path / "cluster.toml"
    file.write_text(replace(cluster.cluster(), credentials=ClusterCredentials(str(made / "operator"))).to_toml())
    return command(made, token, "push", "--cluster", str(file))


def asked(cluster: LocalCluster, credentials: Credentials | Path, deployment: str) -> np.ndarray:
    with splitnet.Client(cluster.addresses["a"], deployment, credentials=credentials) as client:
        return client.infer({"v0": np.zeros((1, WIDTH), np.float32)})["y"]


def test_a_guest_may_what_its_token_says(cluster: LocalCluster, made: Path, tmp_path: Path) -> None:
    with pytest.raises(NotPermitted, match="guest 'guest' may not call Describe"):
        asked(cluster, made / "guest", "digits")
    secret = command(made, token, "create", "camera", "--deployment", "digits", "--rate", "3").strip()
    guest = Credentials(made / "guest", token=secret)
    with pytest.raises(NotPermitted, match="the token is not known here"):
        asked(cluster, guest, "digits")
    assert "a: has it" in pushed(made, cluster, tmp_path)
    assert asked(cluster, guest, "digits").shape == (1, WIDTH)
    with pytest.raises(NotFound, match="faces"):
        asked(cluster, guest, "faces")
    with splitnet.Client(cluster.addresses["a"], "digits", credentials=guest) as client:
        zeros = {"v0": np.zeros((1, WIDTH), np.float32)}
        with pytest.raises(Overloaded, match="may send 3 requests a second") as raised:
            for _ in range(10):
                client.infer(zeros)
        assert 0 < raised.value.retry_after_s <= 1 / 3
    assert "camera  client  digits" in command(made, token, "list")
    command(made, token, "revoke", "camera")
    assert "a: has it" in pushed(made, cluster, tmp_path)
    with pytest.raises(NotPermitted, match="token 'camera' was revoked"):
        asked(cluster, guest, "digits")


def test_a_revoked_certificate_is_out_at_once_even_in_the_middle(cluster: LocalCluster, made: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(made / "client", tmp_path / "client")
    with splitnet.Client(cluster.addresses["a"], "digits", credentials=folder) as client:
        zeros = {"v0": np.zeros((1, WIDTH), np.float32)}
        client.infer(zeros)
        assert "revoked 1 certificates" in command(made, certs, "revoke", "client")
        assert "calls ended" in pushed(made, cluster, tmp_path)
        with pytest.raises(NotPermitted, match="the certificate .* of client 'client' was revoked"):
            for _ in range(3):
                try:
                    client.infer(zeros)
                except splitnet.NodeUnavailable:
                    continue
    assert "client" in (Path(cluster.config("a").directory) / "audit.jsonl").read_text()


def test_an_old_policy_or_a_foreign_one_is_not_taken(cluster: LocalCluster, made: Path, tmp_path: Path) -> None:
    pushed(made, cluster, tmp_path)
    kept = (made / "policy.json").read_bytes()
    (made / "policy.json").write_bytes(Policy().to_json())
    file = tmp_path / "cluster.toml"
    try:
        ended = CliRunner().invoke(token, ["push", "--cluster", str(file), "--dir", str(made)])
        assert (ended.exit_code, "has serial 0, and the node has" in ended.stderr or "this policy has serial 0" in ended.stderr) == (
            1,
            True,
        )
    finally:
        (made / "policy.json").write_bytes(kept)
    other = Authority.init(tmp_path / "other")
    ended = CliRunner().invoke(token, ["push", "--cluster", str(file), "--dir", str(other.directory)])
    assert ended.exit_code == 1
    assert "not signed by an operator whom this node knows" in ended.stderr

"""`splitnet certs check HOST:PORT` says why two sides do not come together."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path

import pytest
from click.testing import CliRunner

from nodes.testing import LocalCluster
from splitnet.commands.certs import certs
from splitnet.errors import BadInput, NodeUnavailable, NotPermitted
from splitnet.security.addresses import PLAINTEXT
from splitnet.security.authority import Authority
from splitnet.security.checking import check_node
from splitnet.security.credentials import Credentials
from splitnet.security.roles import Role


@pytest.fixture(scope="module")
def secure(authority: Path) -> Iterator[str]:
    with LocalCluster(1, certs=authority) as nodes:
        yield nodes.addresses["a"]


def test_two_sides_that_accept_each_other(secure: str, authority: Path) -> None:
    found = check_node(secure, Credentials(authority / "client"))
    assert (found.fault, found.lines[-1]) == ("", "both sides accept each other")
    assert "node 'a'" in found.lines[1]
    assert "made out to" in found.lines[1]


def test_a_side_without_certificates(secure: str) -> None:
    assert "wants certificates, and this side has none" in check_node(secure, PLAINTEXT).fault


def test_a_side_of_another_cluster(secure: str, tmp_path: Path) -> None:
    other = Authority.init(tmp_path / "other")
    other.issue("camera", Role.CLIENT)
    found = check_node(secure, Credentials(other.directory / "camera"))
    assert "belongs to cluster" in found.fault
    assert "authority" in found.remedy


def test_a_node_that_speaks_plaintext_and_none_at_all(authority: Path) -> None:
    credentials = Credentials(authority / "client")
    with LocalCluster(1) as nodes:
        address = nodes.addresses["a"]
        assert check_node(address, PLAINTEXT).fault == ""
        assert "speaks plaintext, this side has certificates" in check_node(address, credentials).fault
        result = CliRunner().invoke(certs, ["check", address])
        assert result.exit_code == 0
        assert f"{address} speaks plaintext" in result.output
    with socket.create_server(("127.0.0.1", 0)) as free:
        gone = f"127.0.0.1:{free.getsockname()[1]}"
    with pytest.raises(NodeUnavailable, match="no node answers"):
        check_node(gone, credentials)
    with pytest.raises(BadInput, match="is not HOST:PORT"):
        check_node("attic", credentials)


def test_the_command_refuses_with_the_reason(secure: str) -> None:
    result = CliRunner().invoke(certs, ["check", secure])
    assert isinstance(result.exception, NotPermitted)
    assert "wants certificates" in result.exception.message

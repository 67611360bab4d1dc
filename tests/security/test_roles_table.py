"""Every call of every service, with every role: the table in nodes/guard.py is what is applied, and nothing stands outside of it."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import grpc
import pytest
from grpc_health.v1 import health_pb2
from grpc_reflection.v1alpha import reflection_pb2

from nodes.guard import RULES
from nodes.testing import LocalCluster
from splitnet.rpc.v1 import node_pb2
from splitnet.security.credentials import Credentials, channel_options
from splitnet.security.roles import Role

ROLES = {Role.NODE: "b", Role.OPERATOR: "operator", Role.CLIENT: "client", Role.OBSERVER: "observer", Role.GUEST: "guest"}

#: Written down a second time, so that a slip in the table is seen: what each role may call.
EXPECTED = {
    Role.NODE: {"Activate", "Switch", "Unload", "Describe", "Forward", "Give", "Heartbeat", "Probe"},
    Role.CLIENT: {"Describe", "Heartbeat", "Run"},
    Role.OBSERVER: {"Describe"},
    Role.GUEST: set(),
}
NODES_ONLY = {"Forward", "Give"}  # what not even an operator may call


def methods() -> list[tuple[str, bool, bool]]:
    """(path, request streams, answer streams) of all calls that a node serves."""
    services = [
        node_pb2.DESCRIPTOR.services_by_name["Node"],
        health_pb2.DESCRIPTOR.services_by_name["Health"],
        reflection_pb2.DESCRIPTOR.services_by_name["ServerReflection"],
    ]
    return [(f"/{s.full_name}/{m.name}", m.client_streaming, m.server_streaming) for s in services for m in s.methods]


@pytest.fixture(scope="module")
def cluster(authority: Path) -> Iterator[LocalCluster]:
    with LocalCluster(1, certs=authority) as nodes:
        yield nodes


def test_every_call_stands_in_the_table_and_nothing_else() -> None:
    assert set(RULES) == {path for path, _, _ in methods()}


@pytest.mark.parametrize("role", list(ROLES))
def test_each_role_may_call_what_the_table_says(cluster: LocalCluster, authority: Path, role: Role) -> None:
    access = Credentials(authority / ROLES[role]).channel_credentials()
    with grpc.secure_channel(cluster.addresses["a"], access, options=channel_options("a")) as channel:
        allowed = {path for path, *streams in methods() if not refused(channel, path, *streams)}
    assert allowed == {path for path in RULES if role in RULES[path].roles}
    names = {path.rpartition("/")[2] for path in allowed if path.startswith("/splitnet.")}
    every = {path.rpartition("/")[2] for path in RULES if path.startswith("/splitnet.")}
    assert names == (every - NODES_ONLY if role is Role.OPERATOR else EXPECTED[role])
    assert {path for path in RULES if path.startswith("/grpc.")} <= allowed


def refused(channel: grpc.Channel, path: str, request_streams: bool, answer_streams: bool) -> bool:
    """Whether the guard refuses it; what the call makes of a senseless request is another matter."""
    sent, answer = b"\xff", None
    kind = ("stream" if request_streams else "unary") + "_" + ("stream" if answer_streams else "unary")
    try:
        call = getattr(channel, kind)(path)
        answer = call(iter((sent,)) if request_streams else sent, timeout=0.5 if path.endswith(("Watch", "Run")) else 5)
        for _ in answer if answer_streams else ():
            return False
    except grpc.RpcError as error:
        found = error
        return found.code() is grpc.StatusCode.PERMISSION_DENIED and "may not call" in found.details()
    return False


def test_a_call_that_nobody_knows_is_refused(cluster: LocalCluster, authority: Path) -> None:
    access = Credentials(authority / "operator").channel_credentials()
    channel = grpc.secure_channel(cluster.addresses["a"], access, options=channel_options("a"))
    with channel, pytest.raises(grpc.RpcError) as raised:
        channel.unary_unary("/splitnet.rpc.v1.Node/Surprise")(b"", timeout=5)
    assert raised.value.code() is grpc.StatusCode.UNIMPLEMENTED

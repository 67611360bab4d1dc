"""Bytes that are no message, on every call but Run and Forward (whose frames are tested elsewhere)."""

from __future__ import annotations

import logging

import grpc
import pytest

from nodes.testing import LocalCluster
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.rpc.v1.node_pb2_grpc import NodeStub

_CALLS = [call for call in pb.DESCRIPTOR.services_by_name["Node"].methods if call.name not in ("Run", "Forward")]


def test_what_is_no_message_is_an_invalid_argument(caplog: pytest.LogCaptureFixture) -> None:
    with LocalCluster(1) as nodes, grpc.insecure_channel(nodes.addresses["a"]) as channel:
        for call in _CALLS:
            path, garbage = f"/splitnet.rpc.v1.Node/{call.name}", b"\xff\xff\xff"
            with pytest.raises(grpc.RpcError) as caught:
                if call.client_streaming:
                    list(channel.stream_stream(path)(iter([garbage]), timeout=10))
                else:
                    channel.unary_unary(path)(garbage, timeout=10)
            assert isinstance(caught.value, grpc.Call)
            assert caught.value.code() == grpc.StatusCode.INVALID_ARGUMENT, call.name
            assert f"not a {call.input_type.name}" in (caught.value.details() or "")
        assert NodeStub(channel).Describe(pb.DescribeRequest(), timeout=10).name == "a"
    assert not [record for record in caplog.records if record.levelno >= logging.ERROR], caplog.text

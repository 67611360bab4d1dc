"""Nodes measure pieces of decoder models; what cannot be measured is refused, and nothing is left behind."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from nodes.testing import LocalCluster
from partitioner.decoders import measuring
from partitioner.decoders.figures import Workload
from partitioner.decoders.measuring import columns_for, measure_decoder
from partitioner.decoders.model import DecoderModel
from splitnet import background
from splitnet.channel import open_channel, stub, translated
from splitnet.cluster import Cluster
from splitnet.errors import BadInput, BadShard, InsufficientMemory, NoPlan, SplitnetError
from splitnet.rpc.v1 import node_pb2 as pb

WORKLOAD = Workload(48, 2, 8, 6, 8)


@pytest.fixture(scope="module")
def boxes(tmp_path_factory: pytest.TempPathFactory) -> Iterator[LocalCluster]:
    """In this process, with a directory for temporary files of their own."""
    with pytest.MonkeyPatch.context() as patch, LocalCluster(2, memory_bytes=[0, 2000]) as cluster:
        patch.setattr(tempfile, "tempdir", str(tmp_path_factory.mktemp("temporary")))
        yield cluster


def request_of(model: DecoderModel, a: int, b: int, **changed: Any) -> pb.DecoderRequest:
    spec = model.spec(a, b, form="float32", dtype="float32", context_length=48)
    piece = measuring._Piece(a, b, (a,))
    request = measuring._request(model, spec, piece, "float32", WORKLOAD, (1, 2))
    for name, value in changed.items():
        if name == "batches":
            del request.batches[:]
            request.batches.extend(value)
        elif name == "tensors":
            del request.tensors[:]
            request.tensors.extend(value)
        else:
            setattr(request, name, value)
    return request


def ask(address: str, request: pb.DecoderRequest) -> pb.DecoderReply:
    async def measure() -> pb.DecoderReply:
        async with open_channel(address) as channel:
            with translated(address):
                return (await stub(channel).Measure(pb.MeasureRequest(decoder=request, budget_s=0.05), timeout=30)).decoder

    return background.run(measure())


def address(boxes: LocalCluster, name: str) -> str:
    return boxes.cluster().node(name).address


def test_layers_alone_are_measured(boxes: LocalCluster, llama: DecoderModel) -> None:
    reply = ask(address(boxes, "a"), request_of(llama, 1, 3))
    assert reply.prefill_s > 0
    assert len(reply.decode_s) == 2
    assert min(reply.decode_s) > 0
    assert reply.rounds >= 3
    assert reply.weight_bytes == llama.param_bytes(1, 3, "float32", "float32")


@pytest.mark.parametrize(
    ("change", "error", "said"),
    [
        ({"spec": b"{}"}, BadShard, "not the description of a decoder stage"),
        ({"chunk_tokens": 0}, BadInput, r"decoder\.chunk_tokens: expected 1 to"),
        ({"cached_tokens": 48}, BadInput, r"decoder\.cached_tokens: expected 1 to 47, got 48"),
        ({"batches": []}, BadInput, r"decoder\.batches: expected 1 to 1024, got 0"),
        ({"batches": [5000]}, BadInput, r"decoder\.batches: expected 1 to 1024"),
        ({"tensors": []}, BadShard, "missing"),
        ({"tensors": [pb.TensorSpec(name="x", dtype="float32", shape=["n"])]}, BadInput, "expected plain sizes"),
        (
            {"tensors": [pb.TensorSpec(name="x", dtype="float32", shape=["1000000000000"])]},
            InsufficientMemory,
            "measuring this piece needs 4000",
        ),
    ],
)
def test_what_cannot_be_measured_is_refused(
    boxes: LocalCluster, llama: DecoderModel, change: dict[str, Any], error: type[SplitnetError], said: str
) -> None:
    with pytest.raises(error, match=said):
        ask(address(boxes, "a"), request_of(llama, 1, 3, **change))
    assert not list(Path(tempfile.gettempdir()).glob("splitnet-decoder-*"))
    assert ask(address(boxes, "a"), request_of(llama, 0, 1)).rounds >= 3


def test_a_node_with_too_little_memory_gets_anothers_figures(boxes: LocalCluster, llama: DecoderModel) -> None:
    cluster = boxes.cluster()
    another = replace(cluster.node("b"), processor="another", reference_s=1.0)  # or it may count as equal to the first one
    cluster = replace(cluster, nodes=(cluster.node("a"), another))
    found = measure_decoder(llama, WORKLOAD, cluster=cluster, columns=("float32/float32",), budget_s=0.05)
    assert set(found.columns) == {"a"}
    known = cluster.node("b")
    scaled = found.on(type(known)(known.name, known.address, reference_s=2 * found.reference_s["a"]))
    times = scaled["float32/float32"]
    assert "scaled by the reference kernel: 2x of 'a'" in times.how
    assert times.step_s == pytest.approx(2 * found.columns["a"]["float32/float32"].step_s)
    small = Cluster((known,), ())
    with pytest.raises(NoPlan, match=r"no node could measure the model: node 'b': .*needs \d+ bytes here"):
        measure_decoder(llama, WORKLOAD, cluster=small, columns=("float32/float32",), budget_s=0.05)


def test_which_columns_are_measured() -> None:
    assert columns_for("bfloat16") == ("bfloat16/bfloat16",)
    assert columns_for("int4") == ("float32/int4", "bfloat16/int4")
    assert len(columns_for("auto")) == 6
    with pytest.raises(BadInput, match="expected auto, float32"):
        columns_for("int3")

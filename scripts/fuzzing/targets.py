"""The decoders, each with valid documents to begin with. A target takes any bytes and raises nothing but SplitnetError."""

from __future__ import annotations

import io
import tomllib
import zipfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from safetensors.numpy import save

from fuzzing.http import http_bodies, http_requests, http_target
from nodes.engines.decoder.steps import Sampling, Step
from nodes.generation.orders import Fork, Orders, decode_orders, encode_orders
from splitnet import wire
from splitnet.bundle import open_bundle, write_bundle
from splitnet.cluster import Cluster, ClusterCredentials, ClusterNode, Link
from splitnet.codecs import codec_names, get_codec
from splitnet.decoder_format import DecoderSpec
from splitnet.errors import BadCluster, BadInput
from splitnet.graph import GraphDocument, Input, Operator, Ref, Weight, WeightSpec
from splitnet.graph import parse as parse_graph
from splitnet.onnx_format import from_bytes as read_onnx
from splitnet.onnx_format import to_bytes as write_onnx
from splitnet.onnx_nouns import WEIGHT, OnnxGraph, OnnxNode, OnnxTensor, OnnxValue
from splitnet.plan import NodeRef, OutputSpec, Plan, StageSpec, Transfer
from splitnet.rpc.v1 import node_pb2 as pb
from splitnet.security.audit import AuditLog, verify_audit
from splitnet.security.certificates import read_facts
from splitnet.security.policy import Limits, Policy
from splitnet.security.roles import Identity, Role
from splitnet.security.signing import SigningKey, read_public_keys
from splitnet.shard import Manifest, Shard, open_packed, pack, read_header, write_shard
from splitnet.tensors import TensorSpec

__all__ = ["Target", "targets"]

_MOST_BYTES = 1 << 20  # of a tensor: what a node's limit is for its own


@dataclass(frozen=True)
class Target:
    """`share`: of the inputs, compared with others; less for those that take longer."""

    name: str
    run: Callable[[bytes], object]
    seeds: tuple[bytes, ...]
    share: float = 1.0


def targets(folder: Path) -> dict[str, Target]:
    """`folder`: where those that read files keep theirs."""
    shard, graph, weights = _shard(folder)
    packed = pack(shard, folder / "stage.zip").read_bytes()
    manifest = (shard.path.parent if shard.path.is_file() else shard.path).joinpath("manifest.json").read_bytes()
    scratch = folder / "scratch"

    def in_file(read: Callable[[Path], object]) -> Callable[[bytes], object]:
        def run(data: bytes) -> object:
            scratch.write_bytes(data)
            return read(scratch)

        return run

    def bundle(data: bytes) -> None:
        scratch.write_bytes(data)
        with open_bundle(scratch):
            pass

    answered = http_target(folder)
    found = [
        Target("frame", _frame, _frames()),
        Target("codec", _codec, _payloads()),
        Target("orders", decode_orders, _orders()),
        Target("manifest", Manifest.from_bytes, (manifest,)),
        Target("graph", parse_graph, (graph,)),
        Target("weights", in_file(read_header), (weights, save({"a": np.zeros((2, 3), np.float16), "b": np.zeros(0, np.int64)}))),
        Target("packed", in_file(open_packed), (packed, _zip({"a": b"x" * 100})), 0.1),
        Target("bundle", bundle, (_bundle(folder),), 0.1),
        Target("http", answered, http_requests(), 0.3),
        Target("request", lambda body: answered(http_requests(body)[0]), http_bodies(), 0.3),
        Target("onnx", read_onnx, (_onnx(),)),
        Target("decoder", DecoderSpec.from_bytes, (_decoder().to_bytes(),)),
        Target("plan", Plan.from_json, (_plan().to_json().encode(),), 0.3),
        Target("cluster", _cluster, (_cluster_file(),)),
        Target("policy", Policy.from_json, (_policy(),)),
        Target(
            "operators", lambda data: read_public_keys(data, "operators.pub"), (SigningKey.new().public_line.encode() + b" me\n# no\n",)
        ),
        Target(
            "identity",
            lambda data: Identity.from_uri(data.decode(errors="replace")),
            (Identity("0" * 16, Role.NODE, "attic").uri.encode(),),
        ),
        Target("certificate", lambda data: read_facts(data, "cert.pem"), _certificates(folder)),
        Target("audit", in_file(_audited), (_audit(folder),)),
    ]
    return {target.name: target for target in found}


# ------------------------------------------------------------------------------------------------------------------- the wire


def _frame(data: bytes) -> None:
    """As a node does: the frame, the tensor's header, the chunk."""
    message = wire.decode_frame(data)
    if message.frame.HasField("tensor"):
        wire.TensorAssembler(message.frame.tensor, _MOST_BYTES).add(message.frame.tensor, message.payload)
    if message.frame.steps:
        decode_orders(message.frame.steps)


def _frames() -> tuple[bytes, ...]:
    arrays = (np.arange(24, dtype=np.float32).reshape(2, 3, 4), np.zeros((4, 0), np.int64), np.ones((3, 5), np.float16).T)
    frames = []
    for array in arrays:
        for codec in ("raw", "zstd", "int8-zstd"):
            chunk, payload = next(wire.tensor_chunks("x", array, codec))
            frame = pb.Frame(request="r-1", deployment="digits@2", stage="s1", ingress="a", timeout_s=1.5, end=True, tensor=chunk)
            frames.append(wire.encode_frame(wire.Message(frame, payload)))
    frames.append(wire.encode_frame(wire.Message(pb.Frame(request="r", failure=pb.Failure(code=3, message="no", kind="BadInput")))))
    frames.append(wire.encode_frame(wire.Message(pb.Frame(request="r", steps=_orders()[0]))))
    return tuple(frames)


_LENGTHS = (1, 7, 64, 200)


def _codec(data: bytes) -> None:
    """The first bytes say which codec and how many numbers are expected; the rest is the payload."""
    names = codec_names()
    if len(data) < 3:
        return
    out = np.empty(_LENGTHS[data[1] % 4], (np.float32, np.float16, np.int64, np.uint8)[data[2] % 4])
    get_codec(names[data[0] % len(names)]).decode(memoryview(data)[3:], out)


def _payloads() -> tuple[bytes, ...]:
    chance = np.random.default_rng(0)
    seeds = []
    for place, name in enumerate(codec_names()):
        for length, size in enumerate(_LENGTHS):
            for dtype, kind in enumerate((np.float32, np.float16)):
                values = (chance.standard_normal(size) * (chance.random(size) < 0.5)).astype(kind)
                seeds.append(bytes((place, length, dtype)) + bytes(get_codec(name).encode(values)))
    return tuple(seeds)


def _orders() -> tuple[bytes, ...]:
    tokens = np.arange(5, dtype=np.int32)
    steps = (Step(7, 0, tokens, 1, Sampling(0.7, 0.9, 40, 1.1, 1 << 63)), Step(1 << 60, 100, tokens[:1], 1, None))
    return encode_orders(Orders(steps, (Fork(1, 2, 30),), (3, 4), ((1e-3, 2e-3),))), encode_orders(Orders())


# ----------------------------------------------------------------------------------------------------------------- documents


def _shard(folder: Path) -> tuple[Shard, bytes, bytes]:
    graph = GraphDocument(
        inputs=(Input("x", "tensor"),),
        weights={"w": WeightSpec("float32", (4, 4), (0, 1))},
        operators=(Operator("aten.linear.default", (Ref("x"), Weight("w")), {}, "h"), Operator("aten.relu.default", (Ref("h"),), {}, "y")),
        outputs=("y",),
    ).to_bytes()
    weights = save({"w": np.eye(4, dtype=np.float32)})
    shard = write_shard(
        folder / "stage", model="hf:someone/model", model_sha256="0" * 64, stage="stage0", engine="torch-graph",
        inputs=[TensorSpec("x", "float32", ("batch", 4))], outputs=[TensorSpec("y", "float32", ("batch", 4))],
        members={"graph.json": graph, "weights.safetensors": weights}, param_bytes=64, activation_bytes=100,
    )  # fmt: skip
    return shard, graph, weights


def _bundle(folder: Path) -> bytes:
    plan, shards = _plan(), {}
    for stage in plan.stages:
        shards[stage.name] = write_shard(
            folder / "bundled" / stage.name, model=plan.model, model_sha256=plan.model_sha256, stage=stage.name, engine="torch-graph",
            inputs=stage.inputs, outputs=stage.outputs, members={"graph.json": _relu(stage.inputs[0].name, stage.outputs[0].name), "weights.safetensors": save({})},
            param_bytes=0, activation_bytes=100,
        )  # fmt: skip
    return write_bundle(plan, shards, folder / "plan.bundle").read_bytes()


def _relu(given: str, made: str) -> bytes:
    return GraphDocument((Input(given, "tensor"),), {}, (Operator("aten.relu.default", (Ref(given),), {}, made),), (made,)).to_bytes()


def _zip(members: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return file.getvalue()


def _onnx() -> bytes:
    x, y = (OnnxValue(name, "float32", ("batch", 4)) for name in ("x", "y"))
    weight = OnnxValue(f"{WEIGHT}w", "float32", (4, 4))
    nodes = (
        OnnxNode("MatMul", ("x", weight.name), ("h",)),
        OnnxNode("Add", ("h", "c"), ("s",)),
        OnnxNode("Softmax", ("s",), ("y",), {"axis": -1}),
    )
    return write_onnx(OnnxGraph((x,), (y,), (weight,), {"c": OnnxTensor("float32", (1,), b"\0" * 4)}, nodes))


def _decoder() -> DecoderSpec:
    config = {
        "model_type": "llama", "vocab_size": 32, "hidden_size": 8, "num_hidden_layers": 4, "num_attention_heads": 2, "num_key_value_heads": 1,
        "intermediate_size": 16, "max_position_embeddings": 64, "tie_word_embeddings": False, "rope_theta": 10000.0,
    }  # fmt: skip
    return DecoderSpec(config, 0, 2, True, False, "float32", {"embedding": "float32", "layers": "float32"}, 64)


def _plan() -> Plan:
    specs = [TensorSpec(f"v{i}", "float32", ("batch", 8)) for i in range(3)]
    return Plan(
        model="m", model_sha256="0" * 64, objective="latency", nodes=(NodeRef("a", "10.0.0.1:7001"), NodeRef("b", "10.0.0.2:7001")),
        stages=(StageSpec("s0", "a", ("op0",), (specs[0],), (specs[1],), 100, 10), StageSpec("s1", "b", ("op1",), (specs[1],), (specs[2],), 100, 10)),
        transfers=(Transfer("", "s0", ("v0",)), Transfer("s0", "s1", ("v1",)), Transfer("s1", "", ("v2",))),
        inputs=(specs[0],), outputs=(OutputSpec("v2", TensorSpec("y", "float32", ("batch", 8))),),
    )  # fmt: skip


def _cluster(data: bytes) -> None:
    """As `Cluster.load` reads it."""
    try:
        document = tomllib.loads(data.decode())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadCluster(f"not TOML: {error}") from None
    Cluster.from_document(document)


def _cluster_file() -> bytes:
    nodes = (ClusterNode("a", "10.0.0.1:7001", 1 << 30, threads=4), ClusterNode("b", "10.0.0.2:7001"))
    return Cluster(nodes, (Link("a", "b", 1e7, 1e-3),), ClusterCredentials("certs")).to_toml().encode()


def _policy() -> bytes:
    policy, _ = Policy().with_token("camera", Role.CLIENT, expires=2_000_000_000, deployments=("digits",), limits=Limits(10, 1e6, 2))
    return policy.without_certificate("ab12", "old").with_limits("desk", Limits(5)).to_json()


def _certificates(folder: Path) -> tuple[bytes, ...]:
    from splitnet.security.authority import Authority

    made = Authority.init(folder / "authority")
    return (made.issue("attic", Role.NODE, ["10.0.0.5", "attic.local"]) / "cert.pem").read_bytes(), (made.directory / "ca.pem").read_bytes()


def _audited(path: Path) -> None:
    report = verify_audit(path)
    if report.fault:
        raise BadInput(report.fault)


def _audit(folder: Path) -> bytes:
    log = AuditLog(folder / "audit.jsonl")
    for i in range(3):
        log.append(who="operator 'me'", came_from="here", act="Activate", what=f"digits@{i}", result="ok")
    return log.path.read_bytes()

"""The manifest of a shard: its fields, its canonical bytes, and a reader that trusts nothing."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NoReturn

from splitnet.decoder_format import DECODER_MEMBER
from splitnet.errors import BadInput, BadPlan, BadShard
from splitnet.noise import Noise
from splitnet.onnx_nouns import ONNX_MEMBER
from splitnet.tensors import TensorSpec

__all__ = [
    "DEFAULT_LIMITS", "ENGINE_FORMATS", "SHARD_VERSION", "EngineFormat", "Manifest", "Member", "ShardLimits", "check_member_name",
    "fault", "looks_pickled_name", "strict_json",
]  # fmt: skip

SHARD_VERSION = 1
_FORMAT = "splitnet-shard"
_MAX_NOTES = 16
_NOISE = ("epsilon", "delta", "clip_norm")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_WEIGHTS = r"weights\.safetensors|weights-\d{5}-of-\d{5}\.safetensors"
_PICKLE_NAMES = (".pkl", ".pickle", ".pt", ".pth", ".pt2", ".bin", ".ckpt", ".joblib", ".npy", ".npz", ".dill")


@dataclass(frozen=True, slots=True)
class ShardLimits:
    """What a shard may be at most. A node may set lower ones."""

    manifest_bytes: int = 1 << 20
    graph_bytes: int = 64 << 20
    header_bytes: int = 4 << 20  # a safetensors header; about 30,000 tensors
    members: int = 1024
    total_bytes: int = 1 << 40  # all members together

    def __post_init__(self) -> None:
        for name in self.__dataclass_fields__:
            if getattr(self, name) < 1:
                raise BadInput(f"ShardLimits.{name} must be at least 1, got {getattr(self, name)}")


DEFAULT_LIMITS = ShardLimits()


@dataclass(frozen=True, slots=True)
class EngineFormat:
    """Which members a shard of one engine format holds: exactly the required ones, and any that match `optional`."""

    required: frozenset[str]
    optional: re.Pattern[str]

    def allows(self, name: str) -> bool:
        return name in self.required or self.optional.fullmatch(name) is not None


#: Every engine format that this version reads. A new one is one line here (and its content check in `directory.check_member`).
ENGINE_FORMATS: Mapping[str, EngineFormat] = {
    "torch-graph": EngineFormat(frozenset({"graph.json"}), re.compile(rf"graph\.onnx|{_WEIGHTS}")),
    "onnx": EngineFormat(frozenset({ONNX_MEMBER}), re.compile(_WEIGHTS)),  # of a model that came as a .onnx file
    "decoder": EngineFormat(frozenset({DECODER_MEMBER}), re.compile(_WEIGHTS)),  # layers of a language model, with KV cache
}


@dataclass(frozen=True, slots=True)
class Member:
    sha256: str
    size_bytes: int


@dataclass(frozen=True)
class Manifest:
    """What a shard is. Raises BadShard when a field is not what it must be. `param_bytes` and `activation_bytes` (at the example
    batch) are what a node reserves to serve it. `notes`: what a person should know of it, such as why it has no ONNX graph. `noise`: with which alone its
    outputs may go to other stages; a node serves it by no plan that says otherwise."""

    model: str
    model_sha256: str
    stage: str
    engine: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    param_bytes: int
    activation_bytes: int
    members: Mapping[str, Member] = field(default_factory=dict)
    version: int = SHARD_VERSION
    notes: tuple[str, ...] = ()
    noise: Noise | None = None

    def __post_init__(self) -> None:
        _check(self)

    def to_bytes(self) -> bytes:
        """Canonical JSON: the same manifest has the same bytes everywhere."""
        document: dict[str, Any] = {
            "format": _FORMAT,
            "version": self.version,
            "model": self.model,
            "model_sha256": self.model_sha256,
            "stage": self.stage,
            "engine": self.engine,
            "inputs": [spec.to_json() for spec in self.inputs],
            "outputs": [spec.to_json() for spec in self.outputs],
            "param_bytes": self.param_bytes,
            "activation_bytes": self.activation_bytes,
            "members": {name: {"sha256": m.sha256, "size_bytes": m.size_bytes} for name, m in self.members.items()},
        }
        if self.notes:
            document["notes"] = list(self.notes)
        if self.noise is not None:  # fractions as text: the same figure has one spelling
            noise = self.noise
            document["noise"] = {name: repr(getattr(noise, name)) for name in _NOISE} | {"per": noise.per}
        return json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n"

    @property
    def sha256(self) -> str:
        """The shard's identity."""
        return hashlib.sha256(self.to_bytes()).hexdigest()

    @property
    def total_bytes(self) -> int:
        """All members together, the manifest not included."""
        return sum(member.size_bytes for member in self.members.values())

    @classmethod
    def from_bytes(cls, data: bytes, *, place: str = "manifest.json", limits: ShardLimits = DEFAULT_LIMITS) -> Manifest:
        """Raises BadShard with the path to the fault. Bytes that say the same in another spelling are refused too: they would give
        one shard two identities."""
        if len(data) > limits.manifest_bytes:
            fault(place, f"the manifest has {len(data)} bytes, the limit is {limits.manifest_bytes}")
        document = strict_json(data, place)
        if not isinstance(document, dict) or document.get("format") != _FORMAT:
            fault(place, f'not the manifest of a splitnet shard (no "format": "{_FORMAT}")')
        version = document.get("version")
        if type(version) is not int or version < 1:
            fault(place, f"version: expected a whole number from 1, got {version!r:.80}")
        if version > SHARD_VERSION:
            fault(
                place, f"the shard has format version {version}, this splitnet reads up to {SHARD_VERSION}", "update splitnet on this node"
            )
        try:
            manifest = cls(**_fields(document, place, limits))
        except BadShard as error:
            if not error.message.startswith(place):
                error.message = f"{place}: {error.message}"
            raise
        if manifest.to_bytes() != data:
            fault(place, "the manifest is not in canonical form (sorted keys, no spaces, one line)", _REWRITE)
        return manifest


_REWRITE = "write the shard with `partitioner.cut` or `splitnet.shard.write_shard`"


def fault(place: str, message: str, remedy: str = "cut the model again and deploy the new shard") -> NoReturn:
    """Raises BadShard."""
    raise BadShard(f"{place}: {message}" if place else message, remedy=remedy)


def strict_json(data: bytes, place: str) -> Any:
    """JSON with neither duplicate keys, fractions, NaN nor bottomless nesting. Raises BadShard."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(items)
        if len(document) != len(items):
            keys = [key for key, _ in items]
            raise ValueError(f"key {next(k for k in keys if keys.count(k) > 1)!r:.80} stands twice")
        return document

    def refused(text: str) -> NoReturn:
        raise ValueError(f"{text:.40} is not a whole number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_float=refused, parse_constant=refused)
    except RecursionError:
        fault(place, "JSON is nested too deeply")
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        fault(place, f"not valid JSON: {error!s:.200}", "the file is damaged or was not written by splitnet: cut the model again")


def looks_pickled_name(name: str) -> bool:
    """Whether a file of this name customarily holds (or may hold) a pickle."""
    return name.lower().endswith(_PICKLE_NAMES)


def check_member_name(name: str, engine: str, place: str) -> None:
    """Raises BadShard unless a shard of this engine format may hold a member of this name."""
    if name in ("", ".", "..") or "/" in name or "\\" in name or ":" in name or "\0" in name:
        fault(
            place,
            f"member {name!r:.200} is not a plain file name: it would leave the shard's directory",
            "do not deploy this shard: it was tampered with",
        )
    if looks_pickled_name(name):
        fault(
            place,
            f"pickled member {name!r:.200}: splitnet never reads pickles",
            "store weights as safetensors and the graph as JSON: cut the model again",
        )
    if not ENGINE_FORMATS[engine].allows(name):
        fault(place, f"unknown member {name!r:.200}: a shard of engine format {engine!r} may not hold it")


def _check(m: Manifest) -> None:
    for name in ("model", "model_sha256", "stage", "engine"):
        value = getattr(m, name)
        if not isinstance(value, str):
            fault("", f"{name}: expected a string, got {type(value).__name__}")
        if len(value) > 1024 or not value.isprintable():
            fault("", f"{name}: expected at most 1024 printable characters, got {value!r:.80}")
    if not _SHA256.match(m.model_sha256):
        fault("", f"model_sha256: expected 64 hexadecimal digits, got {m.model_sha256!r:.80}")
    if not m.stage:
        fault("", "stage: the stage has no name")
    if m.engine not in ENGINE_FORMATS:
        fault(
            "",
            f"engine: format {m.engine!r:.80} is not known here; this splitnet reads {', '.join(ENGINE_FORMATS)}",
            "update splitnet on this node",
        )
    for name in ("param_bytes", "activation_bytes"):
        _size(getattr(m, name), name)
    if len(m.notes) > _MAX_NOTES or not all(isinstance(note, str) and len(note) <= 1024 and note.isprintable() for note in m.notes):
        fault("", f"notes: expected at most {_MAX_NOTES} texts of at most 1024 printable characters")
    for side, specs in (("inputs", m.inputs), ("outputs", m.outputs)):
        names = [spec.name for spec in specs]
        for i, spec in enumerate(specs):
            shown = (spec.name, *(size for size in spec.shape if isinstance(size, str)))
            if any(len(text) > 1024 or not text.isprintable() for text in shown) or len(spec.shape) > 64:
                fault("", f"{side}[{i}]: a name, a dimension or the number of dimensions is out of bounds")
        if len(set(names)) != len(names):
            fault("", f"{side}: a tensor stands twice")
    for name, member in m.members.items():
        check_member_name(name, m.engine, "members")
        if not isinstance(member.sha256, str) or not _SHA256.match(member.sha256):
            fault("", f"members[{name!r}].sha256: expected 64 hexadecimal digits, got {member.sha256!r:.80}")
        _size(member.size_bytes, f"members[{name!r}].size_bytes")
    if missing := sorted(ENGINE_FORMATS[m.engine].required - set(m.members)):
        fault("", f"members: {missing[0]!r} is missing")
    _check_weights_complete(m.members)


def _check_weights_complete(members: Mapping[str, Member]) -> None:
    """Either weights.safetensors, or all of 00001-of-0000N to 0000N-of-0000N, or none."""
    numbered = sorted(name for name in members if name.startswith("weights-"))
    if not numbered:
        return
    if "weights.safetensors" in members:
        fault("", "members: weights.safetensors stands beside numbered weights")
    count = int(numbered[0][17:22])
    expected = {f"weights-{i:05}-of-{count:05}.safetensors" for i in range(1, min(count, len(members)) + 1)}
    if set(numbered) != expected or count != len(numbered):
        fault("", f"members: the numbered weights are not complete: {len(numbered)} members, {numbered[0]!r} announces {count}")


def _size(value: object, at: str) -> None:
    if type(value) is not int or not 0 <= value < 1 << 63:
        fault("", f"{at}: expected a size in bytes, got {value!r:.80}")


def _fields(d: Mapping[str, Any], place: str, limits: ShardLimits) -> dict[str, Any]:
    expected = {"format", *Manifest.__dataclass_fields__}
    if missing := sorted(expected - set(d) - {"notes", "noise"}):
        fault(place, f"{missing[0]}: missing")
    if unknown := sorted(set(d) - expected):
        fault(place, f"unknown key {unknown[0]!r:.80}")
    members = d["members"]
    if not isinstance(members, dict):
        fault(place, f"members: expected an object, got {type(members).__name__}")
    if len(members) > limits.members:
        fault(place, f"the shard has {len(members)} members, the limit is {limits.members}")
    for name, member in members.items():
        if not isinstance(member, dict) or set(member) != {"sha256", "size_bytes"}:
            fault(place, f"members[{name!r:.80}]: expected an object with sha256 and size_bytes")
    notes = d.get("notes", [])
    if not isinstance(notes, list):
        fault(place, f"notes: expected a list, got {type(notes).__name__}")
    values = {key: d[key] for key in expected - {"format", "notes", "noise"}} | {"notes": tuple(notes)}
    values["noise"] = _noise(d["noise"], f"{place}: noise") if "noise" in d else None
    values["inputs"] = _specs(d["inputs"], f"{place}: inputs")
    values["outputs"] = _specs(d["outputs"], f"{place}: outputs")
    values["members"] = {name: Member(**member) for name, member in members.items()}
    return values


def _noise(value: Any, at: str) -> Noise:
    if not isinstance(value, dict) or set(value) != {*_NOISE, "per"} or not all(isinstance(text, str) for text in value.values()):
        fault(at, f"expected an object with the texts {', '.join(_NOISE)}, per")
    try:
        return Noise(**{name: float(value[name]) for name in _NOISE}, per=value["per"])
    except (ValueError, BadPlan) as error:
        fault(at, f"{error!s:.200}")


def _specs(value: Any, at: str) -> Sequence[TensorSpec]:
    if not isinstance(value, list):
        fault(at, f"expected a list, got {type(value).__name__}")
    specs = []
    for i, document in enumerate(value):
        try:
            specs.append(TensorSpec.from_json(document))
        except KeyError as error:
            fault(f"{at}[{i}]", f"{error.args[0]}: missing")
        except (TypeError, BadInput) as error:
            fault(f"{at}[{i}]", f"{error!s:.200}")
    return tuple(specs)

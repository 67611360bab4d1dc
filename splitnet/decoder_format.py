"""decoder.json: what a stage of a decoder model is, and a reader that trusts nothing.

A shard of engine format "decoder" holds `decoder.json` (a `DecoderSpec`) and `weights.safetensors` (or numbered parts). Its tensors bear the names of
`splitnet.decoder_architectures.canonical_name`, experts one by one; matrices in 8 or 4 bits are stored as `splitnet.decoder_weights` says. Which tensors: those of
layers [first, last), the embedding's where `embedding`, the final norm's and the head's where `head`. Where the config ties head and embedding, a stage that has the head
stores the matrix as the head's ("lm_head.weight"), one that has the embedding as the embedding's; a stage that has both, in the same format, stores the embedding's only.
Matrices that are not quantised have the format `dtype`; only the embedding may have another.

    from splitnet.decoder_format import DECODER_MEMBER, DecoderSpec, plain_config
    spec = DecoderSpec(plain_config(config.to_dict()), first=0, last=12, embedding=True, head=False, dtype="bfloat16",
                       weights={"embedding": "bfloat16", "layers": "int4"}, context_length=2048)
    write_shard(..., engine="decoder", inputs=spec.inputs(), outputs=spec.outputs(), members={DECODER_MEMBER: spec.to_bytes(), ...})
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NoReturn

from splitnet.decoder_architectures import CONFIG_KEYS, EMBEDDING, HEAD, LAYERS, architecture
from splitnet.errors import BadModel, BadShard
from splitnet.tensors import TensorSpec

__all__ = [
    "COMPUTE_DTYPES",
    "DECODER_MEMBER",
    "EMBEDDING_FORMATS",
    "WEIGHT_FORMATS",
    "DecoderSpec",
    "hidden_size_of",
    "plain_config",
    "tied_in",
    "vocabulary_of",
]

DECODER_MEMBER = "decoder.json"
#: Of hidden states, caches, norms and biases.
COMPUTE_DTYPES = ("float32", "bfloat16")
WEIGHT_FORMATS = ("float32", "bfloat16", "int8", "int4")
EMBEDDING_FORMATS = ("float32", "bfloat16", "int8")
_FORMAT, _VERSION = "splitnet-decoder", 1
_MAX_BYTES, _MAX_DEPTH, _MAX_ITEMS = 1 << 20, 6, 4096
_GROUP_SIZES = (32, 64, 128)
_CUT_AGAIN = "cut the model again and deploy the new shard"
#: The largest that a config may say: what is made of these is made before a weight is read.
_LIMITS = {
    "vocab_size": 1 << 22, "hidden_size": 1 << 16, "num_hidden_layers": 1 << 10, "num_attention_heads": 1 << 11, "num_key_value_heads": 1 << 11,
    "head_dim": 1 << 12, "intermediate_size": 1 << 20, "moe_intermediate_size": 1 << 20, "num_experts": 1 << 10, "num_local_experts": 1 << 10,
    "num_experts_per_tok": 1 << 10, "max_position_embeddings": 1 << 24,
}  # fmt: skip
_NEEDED = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings")


@dataclass(frozen=True)
class DecoderSpec:
    """`config`: what `plain_config` left of the model's. `weights`: the format of the matrices, by group ("embedding", "layers", "head"), of those groups that the stage
    has. `group_size`: how many weights of a row share a scale, in int4. `context_length`: the most tokens of a session. Raises BadShard when a field is not what it must
    be, BadModel for an architecture that is not supported."""

    config: Mapping[str, Any]
    first: int
    last: int
    embedding: bool
    head: bool
    dtype: str
    weights: Mapping[str, str]
    context_length: int
    group_size: int = 64

    def __post_init__(self) -> None:
        _check(self)

    @property
    def model_type(self) -> str:
        return str(self.config["model_type"])

    @property
    def hidden_size(self) -> int:
        return hidden_size_of(self.config)

    @property
    def vocabulary(self) -> int:
        return vocabulary_of(self.config)

    @property
    def tied(self) -> bool:
        """Whether head and embedding are one matrix."""
        return tied_in(self.config)

    @property
    def head_is_embedding(self) -> bool:
        """Whether this stage stores one matrix for both."""
        return self.tied and self.embedding and self.head and self.weights[EMBEDDING] == self.weights[HEAD]

    @property
    def kv_bytes_per_token(self) -> int:
        """Of this stage's layers."""
        heads = int(self.config.get("num_key_value_heads") or self.config["num_attention_heads"])
        size = int(self.config.get("head_dim") or self.hidden_size // int(self.config["num_attention_heads"]))
        return (self.last - self.first) * 2 * heads * size * (4 if self.dtype == "float32" else 2)

    def inputs(self) -> tuple[TensorSpec, ...]:
        """Of the shard's manifest."""
        if self.embedding:
            return (TensorSpec("input_ids", "int64", ("tokens",)),)
        return (TensorSpec("hidden_states", self.dtype, ("tokens", self.hidden_size)),)

    def outputs(self) -> tuple[TensorSpec, ...]:
        """Of the shard's manifest."""
        if self.head:
            return (TensorSpec("tokens", "int32", ("tokens",)),)
        return (TensorSpec("hidden_states", self.dtype, ("tokens", self.hidden_size)),)

    def to_bytes(self) -> bytes:
        """Canonical JSON."""
        document = {"format": _FORMAT, "version": _VERSION} | {name: getattr(self, name) for name in self.__dataclass_fields__}
        document["config"], document["weights"] = dict(self.config), dict(self.weights)
        return json.dumps(document, sort_keys=True, separators=(",", ":"), allow_nan=False).encode() + b"\n"

    @classmethod
    def from_bytes(cls, data: bytes, *, place: str = DECODER_MEMBER) -> DecoderSpec:
        """Raises BadShard with the path to the fault; an architecture that is not supported is one."""
        if len(data) > _MAX_BYTES:
            _fault(f"{place}: has {len(data)} bytes, the limit is {_MAX_BYTES}")
        document = _strict(data, place)
        if not isinstance(document, dict) or document.pop("format", None) != _FORMAT:
            _fault(f'{place}: not the description of a decoder stage (no "format": "{_FORMAT}")')
        version = document.pop("version", None)
        if type(version) is not int or version != _VERSION:
            raise BadShard(
                f"{place}: version {version!r:.80}; this splitnet reads version {_VERSION}", remedy="update splitnet on this node"
            )
        fields = set(cls.__dataclass_fields__)
        if wrong := sorted(fields ^ set(document)):
            _fault(f"{place}: {wrong[0]!r:.80}: {'missing' if wrong[0] in fields else 'unknown key'}")
        try:
            spec = cls(**document)
        except (BadShard, BadModel) as error:
            raise BadShard(f"{place}: {error.message}", remedy=error.remedy) from None
        if spec.to_bytes() != data:
            _fault(f"{place}: not in canonical form (sorted keys, no spaces, one line)")
        return spec


def hidden_size_of(config: Mapping[str, Any]) -> int:
    return int(config["hidden_size"])


def vocabulary_of(config: Mapping[str, Any]) -> int:
    return int(config["vocab_size"])


def tied_in(config: Mapping[str, Any]) -> bool:
    """Whether head and embedding are one matrix."""
    return bool(config.get("tie_word_embeddings", False))


def plain_config(document: Mapping[str, Any]) -> dict[str, Any]:
    """Of a config.json (better: of transformers' `config.to_dict()`, where defaults are filled in) what decides the arithmetic. Raises BadModel for an architecture that
    is not supported. Null stays: it may stand for something else than the default."""
    architecture(document.get("model_type"))
    return {key: value for key, value in document.items() if key in CONFIG_KEYS}


def _fault(message: str) -> NoReturn:
    raise BadShard(message, remedy=_CUT_AGAIN)


def _check(spec: DecoderSpec) -> None:
    config = spec.config
    if not isinstance(config, Mapping):
        _fault(f"config: expected an object, got {type(config).__name__}")
    architecture(config.get("model_type"))
    if unknown := sorted(map(str, set(config) - CONFIG_KEYS)):
        _fault(f"config.{unknown[0]:.80}: decides nothing that a node computes; leave it out (plain_config does)")
    _check_plain(config, "config", 0)
    for name in _NEEDED:
        if config.get(name) is None:
            _fault(f"config.{name}: missing")
    for name, most in _LIMITS.items():
        if config.get(name) is not None:
            _whole(config[name], f"config.{name}", 1, most)
    if (types := config.get("layer_types")) is not None and (not isinstance(types, list) or len(types) != config["num_hidden_layers"]):
        _fault("config.layer_types: expected one text for each layer")
    for name in ("embedding", "head"):
        if type(getattr(spec, name)) is not bool:
            _fault(f"{name}: expected true or false, got {getattr(spec, name)!r:.80}")
    layers = config["num_hidden_layers"]
    _whole(spec.first, "first", 0, layers)
    _whole(spec.last, "last", spec.first, layers)
    _whole(spec.context_length, "context_length", 1, config["max_position_embeddings"])
    if spec.embedding and spec.first != 0:
        _fault(f"embedding: a stage that begins at layer {spec.first} has none")
    if spec.head and spec.last != layers:
        _fault(f"head: a stage that ends at layer {spec.last} of {layers} has none")
    if spec.first == spec.last and not (spec.embedding or spec.head):
        _fault("the stage has neither layers, embedding nor head")
    if spec.dtype not in COMPUTE_DTYPES:
        _fault(f"dtype: expected one of {', '.join(COMPUTE_DTYPES)}, got {spec.dtype!r:.80}")
    has = {EMBEDDING: spec.embedding, LAYERS: spec.first < spec.last, HEAD: spec.head}
    if not isinstance(spec.weights, Mapping) or set(spec.weights) != {group for group, there in has.items() if there}:
        _fault(
            f"weights: expected a format for each of {', '.join(group for group, there in has.items() if there)}, got {spec.weights!r:.200}"
        )
    for group, form in spec.weights.items():
        allowed = WEIGHT_FORMATS if group != EMBEDDING else EMBEDDING_FORMATS
        if form not in allowed:
            _fault(f"weights.{group}: expected one of {', '.join(allowed)}, got {form!r:.80}")
        if form in COMPUTE_DTYPES and form != spec.dtype and group != EMBEDDING:
            _fault(f"weights.{group}: {form} beside dtype {spec.dtype}: matrices that are not quantised have the dtype of the computation")
    if spec.group_size not in _GROUP_SIZES or type(spec.group_size) is not int:
        _fault(f"group_size: expected one of {_GROUP_SIZES}, got {spec.group_size!r:.80}")


def _whole(value: object, at: str, least: int, most: int) -> None:
    if type(value) is not int or not least <= value <= most:
        _fault(f"{at}: expected a whole number from {least} to {most}, got {value!r:.80}")


def _check_plain(value: object, at: str, depth: int) -> None:
    """Plain data: what JSON says and comes back the same."""
    if depth > _MAX_DEPTH:
        _fault(f"{at:.200}: nested too deeply")
    if isinstance(value, Mapping | list):
        if len(value) > _MAX_ITEMS:
            _fault(f"{at:.200}: {len(value)} items, the limit is {_MAX_ITEMS}")
        for key, item in value.items() if isinstance(value, Mapping) else enumerate(value):
            if isinstance(value, Mapping) and not isinstance(key, str):
                _fault(f"{at:.200}: the key {key!r:.80} is no text")
            _check_plain(item, f"{at}.{key}", depth + 1)
    elif isinstance(value, float):
        if not math.isfinite(value):
            _fault(f"{at:.200}: {value} is not a finite number")
    elif isinstance(value, str):
        if len(value) > 256 or not value.isprintable():
            _fault(f"{at:.200}: a text of at most 256 printable characters is expected")
    elif type(value) is int:
        if abs(value) >= 1 << 53:
            _fault(f"{at:.200}: {value!r:.40} is too large")
    elif not (value is None or isinstance(value, bool)):
        _fault(f"{at:.200}: {type(value).__name__} is no plain data")


def _strict(data: bytes, place: str) -> Any:
    """JSON without duplicate keys, NaN or bottomless nesting; unlike a manifest's, with fractions."""

    def pairs(items: list[tuple[str, Any]]) -> dict[str, Any]:
        document = dict(items)
        if len(document) != len(items):
            raise ValueError("a key stands twice")
        return document

    def refused(text: str) -> NoReturn:
        raise ValueError(f"{text:.40} is not a number")

    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=pairs, parse_constant=refused)
    except RecursionError:
        _fault(f"{place}: JSON is nested too deeply")
    except ValueError as error:  # UnicodeDecodeError and JSONDecodeError are ValueErrors
        _fault(f"{place}: not valid JSON: {error!s:.200}")

"""Shards that do not hold together are refused with a reason, and decoder.json is read as what a stranger sent."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import decoder_shards as tiny
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from nodes.engines.decoder.engine import DecoderEngine
from splitnet.decoder_architectures import canonical_name, place_of
from splitnet.decoder_format import DecoderSpec, plain_config
from splitnet.errors import BadModel, BadShard
from splitnet.shard import open_shard

CONFIG: Mapping[str, Any] = {
    "model_type": "llama", "vocab_size": 96, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 4, "num_attention_heads": 4,
    "max_position_embeddings": 128, "rms_norm_eps": 1e-6,
}  # fmt: skip
SPEC = DecoderSpec(CONFIG, 0, 2, True, False, "float32", {"embedding": "float32", "layers": "float32"}, 64)


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny.build(tiny.CONFIGS["llama"])


@pytest.fixture(scope="module")
def tensors(model: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, np.ndarray]:
    return tiny.save(model, tmp_path_factory.mktemp("model"))


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.self_attn.k_proj.weight", "model.layers.0.input_layernorm.weight", "model.embed_tokens.weight", "lm_head.weight"],
)
def test_a_missing_tensor_is_named(model: Any, tensors: dict[str, np.ndarray], name: str, tmp_path: Path):
    shard = tiny.cut(model, {key: array for key, array in tensors.items() if key != name}, [], tmp_path)[0]
    with pytest.raises(BadShard, match=f"tensor '{name}' is missing"):
        DecoderEngine.load(shard, threads=1, cache_tokens=8)


def test_tensors_must_fit(model: Any, tensors: dict[str, np.ndarray], tmp_path: Path):
    name = "model.layers.0.mlp.down_proj.weight"
    wrong = tiny.cut(model, tensors | {name: tensors[name][:, :40]}, [], tmp_path / "a")[0]
    with pytest.raises(BadShard, match=rf"tensor '{name}' should be float32 \(32, 48\), the file has F32 \(32, 40\)"):
        DecoderEngine.load(wrong, threads=1, cache_tokens=8)
    more = tiny.cut(model, tensors | {"model.layers.0.mlp.extra": tensors[name]}, [], tmp_path / "b")[0]
    with pytest.raises(BadShard, match=r"holds tensor 'model.layers.0.mlp.extra', which this stage does not have"):
        DecoderEngine.load(more, threads=1, cache_tokens=8)


def test_an_unsupported_architecture_is_named_with_the_list():
    with pytest.raises(
        BadModel, match="architecture 'mamba' is not supported for generation; splitnet runs gemma2, .*llama.*qwen3_moe"
    ) as raised:
        plain_config({"model_type": "mamba"})
    assert "--generate" in raised.value.remedy
    with pytest.raises(BadShard, match="decoder.json: architecture 'mamba' is not supported"):
        DecoderSpec.from_bytes(SPEC.to_bytes().replace(b'"llama"', b'"mamba"'))
    with pytest.raises(BadModel, match="has no tensor 'transformer.h.0.weight'"):
        place_of("llama", "transformer.h.0.weight")


@pytest.mark.parametrize(
    ("rope", "context", "said"),
    [
        ({"rope_type": "dynamic", "rope_theta": 1e4, "factor": 2.0}, 64, "'dynamic' depend on the length"),
        ({"rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 4, "long_factor": [2.0] * 4, "original_max_position_embeddings": 32}, 64, "'longrope'"),
        ({"rope_type": "no such", "rope_theta": 1e4}, 64, "transformers does not take the config"),
    ],
)  # fmt: skip
def test_rotary_variants_that_hang_on_the_length_are_refused(
    model: Any, tensors: dict[str, np.ndarray], rope: Any, context: int, said: str, tmp_path: Path
):
    shard = tiny.cut(model, tensors, [2], tmp_path)[0]
    spec = DecoderSpec.from_bytes(shard.member("decoder.json").read_bytes())
    odd = dataclasses.replace(spec, config=dict(spec.config) | {"rope_parameters": rope}, context_length=context)
    shard.member("decoder.json").write_bytes(odd.to_bytes())
    with pytest.raises(BadShard, match=said):
        DecoderEngine.load(shard, threads=1, cache_tokens=8)


def test_the_description_survives_the_way_and_the_shard_is_checked(model: Any, tensors: dict[str, np.ndarray], tmp_path: Path):
    shards = tiny.cut(model, tensors, [1], tmp_path, form="float32")
    for shard, (inputs, outputs) in zip(shards, [("input_ids", "hidden_states"), ("hidden_states", "tokens")], strict=True):
        opened = open_shard(shard.path)
        spec = DecoderSpec.from_bytes(opened.member("decoder.json").read_bytes())
        assert spec.to_bytes() == opened.member("decoder.json").read_bytes()
        assert ([s.name for s in opened.manifest.inputs], [s.name for s in opened.manifest.outputs]) == ([inputs], [outputs])
    file = shards[0].path / "decoder.json"
    assert spec.kv_bytes_per_token == 3 * 2 * 2 * 8 * 4
    with pytest.raises(BadShard, match="wrong sha256"):
        file.write_bytes(file.read_bytes().replace(b'"last":1', b'"last":2'))
        open_shard(shards[0].path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"first": 3}, "last: expected a whole number from 3 to 4"),
        ({"first": 1}, "a stage that begins at layer 1 has none"),
        ({"head": True}, "a stage that ends at layer 2 of 4 has none"),
        ({"dtype": "float16"}, "dtype: expected one of float32, bfloat16"),
        ({"weights": {"layers": "float32"}}, "weights: expected a format for each of embedding, layers"),
        ({"weights": {"embedding": "int4", "layers": "int4"}}, "weights.embedding: expected one of"),
        ({"weights": {"embedding": "float32", "layers": "bfloat16"}}, "layers: bfloat16 beside dtype float32"),
        ({"context_length": 129}, "context_length: expected a whole number from 1 to 128"),
        ({"group_size": 48}, "group_size"),
        ({"config": dict(CONFIG) | {"auto_map": {"AutoModel": "evil.py"}}}, "config.auto_map: decides nothing"),
        ({"config": dict(CONFIG) | {"_attn_implementation": "someone/kernels"}}, "config._attn_implementation: decides nothing"),
        ({"config": dict(CONFIG) | {"hidden_size": 1 << 40}}, "config.hidden_size"),
        ({"config": dict(CONFIG) | {"rope_theta": 1e999}}, "not a finite number"),
        ({"config": dict(CONFIG) | {"num_attention_heads": True}}, "config.num_attention_heads"),
        ({"config": {key: value for key, value in CONFIG.items() if key != "hidden_size"}}, "config.hidden_size: missing"),
        ({"config": dict(CONFIG) | {"layer_types": ["full_attention"]}}, "config.layer_types"),
    ],
)  # fmt: skip
def test_wrong_descriptions_are_refused(change: Mapping[str, Any], said: str):
    with pytest.raises(BadShard, match=said):
        dataclasses.replace(SPEC, **change)
    document = json.loads(SPEC.to_bytes()) | change
    with pytest.raises(BadShard, match="decoder.json: "):
        DecoderSpec.from_bytes(json.dumps(document, sort_keys=True, separators=(",", ":")).encode() + b"\n")


@given(st.data())
def test_damaged_descriptions_raise_bad_shard_or_say_the_same(data: st.DataObject):
    raw = bytearray(SPEC.to_bytes())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(raw) - 1))
        raw[at : at + data.draw(st.integers(0, 4))] = data.draw(st.binary(max_size=4))
    try:
        spec = DecoderSpec.from_bytes(bytes(raw))
    except BadShard:
        return
    assert spec.to_bytes() == bytes(raw)


def test_names_of_old_checkpoints_become_canonical():
    assert (
        canonical_name("mixtral", "model.layers.3.block_sparse_moe.experts.7.w2.weight") == "model.layers.3.mlp.experts.7.down_proj.weight"
    )
    assert canonical_name("mixtral", "model.layers.3.block_sparse_moe.gate.weight") == "model.layers.3.mlp.gate.weight"
    assert canonical_name("gpt_neox", "embed_out.weight") == "lm_head.weight"
    assert canonical_name("gpt_neox", "gpt_neox.layers.0.attention.masked_bias") is None
    assert canonical_name("llama", "model.layers.0.self_attn.rotary_emb.inv_freq") is None

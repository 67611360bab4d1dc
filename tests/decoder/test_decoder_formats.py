"""Weights in every format, and the two ways to compute: each against plain arithmetic."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import decoder_shards as tiny
import ml_dtypes
import numpy as np
import pytest
import torch
from decoder_shards import Step, ids
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from nodes.engines.decoder.engine import DecoderEngine
from nodes.engines.decoder.linear import Dense, Int4, Int8, read_matrix
from nodes.engines.decoder.loading import StoredTensors
from splitnet.decoder_weights import dequantize, quantize, stored_bytes, stored_format

BF16 = np.dtype(ml_dtypes.bfloat16)
PROMPT = np.random.default_rng(3).integers(0, tiny.VOCABULARY, 20).tolist()


@given(arrays(np.float32, (16, 64), elements=st.floats(-4, 4, width=32)), st.sampled_from(["int8", "int4"]))
def test_a_code_is_at_most_half_a_step_away(weight: np.ndarray, form: str):
    stored = quantize("w", weight, form, 32)
    back = dequantize("w", stored)
    assert sum(array.nbytes for array in stored.values()) == stored_bytes(weight.shape, form, 32)
    if form == "int8":
        step = np.abs(weight).max(axis=1, keepdims=True) / 127
    else:
        groups = weight.reshape(16, 2, 32)
        step = np.repeat((groups.max(axis=2) - groups.min(axis=2)) / 15, 32, axis=1)
        # scale and offset are bfloat16: they are off by up to 2^-8 of themselves
        step = step + 2 * np.abs(weight).max() / 128
    assert (np.abs(back - weight) <= 0.51 * step + 1e-6).all()


@pytest.mark.parametrize("rows", [1, 3, 20, 70])
@pytest.mark.parametrize("form", ["float32", "bfloat16", "int8", "int4"])
def test_kernels_compute_what_is_stored(form: str, rows: int, tmp_path: Path):
    from safetensors.numpy import save_file

    random = np.random.default_rng(rows)
    first, second = (random.standard_normal((size, 128)).astype(np.float32) for size in (128, 64))
    stored = quantize("first", first, form, 64) | quantize("second", second, form, 64)
    save_file(stored, tmp_path / "weights.safetensors")
    dtype = torch.float32 if form == "float32" else torch.bfloat16
    bias = torch.linspace(-1, 1, 192).to(dtype)
    matrix = read_matrix(StoredTensors([tmp_path / "weights.safetensors"]), ["first", "second"], [(128, 128), (64, 128)], dtype, 64, bias)
    assert isinstance(matrix, {"int8": Int8, "int4": Int4}.get(form, Dense))
    assert matrix.nbytes() <= sum(array.nbytes for array in stored.values())
    x = torch.from_numpy(random.standard_normal((rows, 128)).astype(np.float32)).to(dtype)
    whole = np.concatenate([dequantize("first", stored), dequantize("second", stored)])
    expected = x.float().numpy() @ whole.T + bias.float().numpy()
    found = matrix(x)
    assert found.dtype == dtype
    error = np.abs(found.float().numpy() - expected).max() / np.abs(expected).max()
    assert error < (1e-6 if form == "float32" else 0.012)


@pytest.mark.parametrize("name", ["llama", "llama-tied", "mistral", "qwen2", "qwen3", "phi3", "granite", "smollm3", "mixtral", "qwen3_moe"])
def test_the_lean_pass_equals_transformers_modules(name: str, tmp_path: Path):
    model = tiny.build(tiny.CONFIGS[name])
    shard = tiny.cut(model, tiny.save(model, tmp_path / "model"), [3], tmp_path)[0]
    lean, whole = (DecoderEngine.load(shard, threads=1, cache_tokens=64, lean=lean) for lean in (True, False))
    assert lean.memory_bytes() == whole.memory_bytes()
    for step in (Step(1, 0, ids(*PROMPT[:12])), Step(1, 12, ids(*PROMPT[12:18])), Step(1, 18, ids(PROMPT[18]))):
        found, expected = lean.step([step], None), whole.step([step], None)
        np.testing.assert_allclose(found, expected, atol=1e-4 * np.abs(expected).max())


@pytest.mark.parametrize("form", ["bfloat16", "int8", "int4"])
@pytest.mark.parametrize("name", ["llama-tied", "gemma2", "mixtral"])
def test_narrow_weights_stay_close_to_what_they_stand_for(name: str, form: str, tmp_path: Path):
    """Against a float32 model of the dequantised weights: what is left is the rounding of activations to bfloat16."""
    settings = dict(tiny.CONFIGS[name]) | {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2}
    settings |= {"layer_types": ["sliding_attention", "full_attention"]} if name == "gemma2" else {}
    model = tiny.build(settings)
    tensors = tiny.save(model, tmp_path / "model")
    narrow = tiny.engines(tiny.cut(model, tensors, [1], tmp_path / "narrow", dtype="bfloat16", form=form))
    rounded = {name: _as_stored(name, array, form) for name, array in tensors.items()}
    exact = tiny.engines(tiny.cut(model, rounded, [1], tmp_path / "exact"))
    assert sum(stage.memory_bytes() for stage in narrow) < 0.6 * sum(stage.memory_bytes() for stage in exact)
    step = Step(1, 0, ids(*PROMPT))
    expected = exact[0].step([step], None)
    found = narrow[0].step([step], None)
    assert found.dtype == BF16
    error = np.linalg.norm(found.astype(np.float32) - expected) / np.linalg.norm(expected)
    assert error < 0.05
    tokens = tiny.greedy(narrow, PROMPT, 6, session=2)
    assert all(0 <= token < tiny.VOCABULARY for token in tokens)
    assert tokens == tiny.greedy(narrow, PROMPT, 6, session=3)


def _as_stored(name: str, array: np.ndarray, form: str) -> np.ndarray:
    wanted = form
    if name.endswith("embed_tokens.weight") and form == "int4":
        wanted = "bfloat16"
    kept = stored_format(name, array.shape, wanted, 32, "bfloat16")
    return np.asarray(dequantize(name, quantize(name, array, kept, 32)))


def test_a_tied_head_shares_memory_with_the_embedding(tmp_path: Path):
    model: Any = tiny.build(tiny.CONFIGS["llama-tied"])
    tensors = tiny.save(model, tmp_path / "model")
    whole = tiny.engines(tiny.cut(model, tensors, [], tmp_path / "whole"))[0]
    halves = tiny.engines(tiny.cut(model, tensors, [2], tmp_path / "halves"))
    matrix = tiny.VOCABULARY * 32 * 4
    assert sum(half.memory_bytes() for half in halves) == whole.memory_bytes() + matrix

"""Greedy generation of every architecture, split anywhere, equals that of transformers' whole model."""

from __future__ import annotations

from pathlib import Path

import decoder_shards as tiny
import numpy as np
import pytest

from splitnet.decoder_architectures import ARCHITECTURES

COUNT = 10


def test_every_architecture_is_tested():
    assert {settings["model_type"] for settings in tiny.CONFIGS.values()} == set(ARCHITECTURES)


@pytest.mark.parametrize("name", tiny.CONFIGS)
def test_split_generation_equals_the_whole_models(name: str, tmp_path: Path):
    model = tiny.build(tiny.CONFIGS[name])
    tensors = tiny.save(model, tmp_path / "model")
    prompt = np.random.default_rng(5).integers(0, tiny.VOCABULARY, 11).tolist()
    expected = tiny.generated(model, prompt, COUNT)
    assert len(set(expected)) > 1
    whole = tiny.engines(tiny.cut(model, tensors, [], tmp_path / "whole"))
    assert tiny.greedy(whole, prompt, COUNT) == expected
    split = tiny.engines(tiny.cut(model, tensors, [1, 3], tmp_path / "split"))
    assert tiny.greedy(split, prompt, COUNT, chunk=4) == expected


def test_any_layer_boundary_will_do(tmp_path: Path):
    model = tiny.build(tiny.CONFIGS["gemma3"])
    tensors = tiny.save(model, tmp_path / "model")
    expected = tiny.generated(model, [1, 2, 3], 5)
    for bounds in ([2], [1, 2, 3], [0, 4]):  # the last: embedding, layers and head apart
        stages = tiny.engines(tiny.cut(model, tensors, bounds, tmp_path / str(bounds)))
        assert tiny.greedy(stages, [1, 2, 3], 5) == expected, bounds

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from tiny_decoders import WORKLOAD, save_tiny

from partitioner.decoders.figures import DecoderProfile, Times
from partitioner.decoders.model import DecoderModel, load_decoder


@pytest.fixture(scope="session")
def llama(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    """Head and embedding of its own, stored in float32."""
    return load_decoder(str(save_tiny(tmp_path_factory.mktemp("decoders") / "llama")))


@pytest.fixture(scope="session")
def tied(tmp_path_factory: pytest.TempPathFactory) -> DecoderModel:
    """Head and embedding in one matrix, stored in bfloat16 and in several files."""
    import torch

    folder = tmp_path_factory.mktemp("decoders") / "tied"
    return load_decoder(str(save_tiny(folder, "qwen2", dtype=torch.bfloat16, shard="60KB", tie_word_embeddings=True)))


def times(count: int, layer_s: float, slope: float = 0.1) -> Times:
    """Layers of `layer_s`, ends of half of it; chunks take five times as long, a further session adds `slope`."""
    row = (layer_s / 2, *([layer_s] * (count - 2)), layer_s / 2)
    return Times(tuple(5 * s for s in row), (row, tuple(s * (1 + 3 * slope) for s in row)))


@pytest.fixture(scope="session")
def profile_of() -> Callable[..., DecoderProfile]:
    """`speeds`: node -> how much slower than 1 ms a layer; `columns`: "dtype/format" -> how much slower than the node."""

    def make(model: DecoderModel, speeds: dict[str, float], columns: dict[str, float]) -> DecoderProfile:
        count = len(model.vertices)
        figures = {node: {c: times(count, 1e-3 * speed * factor) for c, factor in columns.items()} for node, speed in speeds.items()}
        return DecoderProfile(
            model.structure(1, "float32"), WORKLOAD.chunk_tokens, WORKLOAD.cached_tokens, (1, 4), figures, dict.fromkeys(speeds, 1.0)
        )

    return make


def folder_of(model: DecoderModel) -> Path:
    return model.checkpoint.folder

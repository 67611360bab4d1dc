"""Perplexity is what the whole model says, though never more than a layer of it is in memory."""

from __future__ import annotations

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers
from tiny_decoders import SIZES, save_tiny

from partitioner.decoders import perplexity
from partitioner.decoders.model import load_decoder

IDS = np.random.default_rng(0).integers(0, SIZES["vocab_size"], 40)
OF_EACH_KIND = ["gemma3_text", "gpt_neox", "granite", "mixtral", "phi3", "qwen3_moe", "starcoder2"]


def whole(folder: Path, window: int) -> float:
    model = transformers.AutoModelForCausalLM.from_pretrained(str(folder), dtype=torch.float32).eval()
    total = 0.0
    with torch.inference_mode():
        for start in range(0, len(IDS), window):
            ids = torch.from_numpy(IDS[start : start + window])[None]
            total += float(torch.nn.functional.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="sum"))
    return math.exp(total / (len(IDS) - -(-len(IDS) // window)))


@pytest.mark.parametrize("model_type", OF_EACH_KIND)
def test_layer_by_layer_is_as_good_as_whole(model_type: str, tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model", model_type, num_hidden_layers=3, sliding_window=8)
    data = tmp_path / "ids.json"
    data.write_text(json.dumps(IDS.tolist()))
    found, of = perplexity.measure_perplexity(load_decoder(str(folder)), data, ["float32", "int4"], context=20)
    assert of == "on 38 tokens of ids.json"
    assert found[""] == pytest.approx(whole(folder, 20), rel=1e-5)
    assert found["float32"] == found[""]
    assert found["int4"] != found[""]


def test_one_layer_has_weights_at_a_time(tmp_path: Path) -> None:
    model = load_decoder(str(save_tiny(tmp_path / "model")))
    runner, most = perplexity._Runner(model), 0
    read = runner._weight

    def watched(name: str, form: str) -> np.ndarray:
        nonlocal most
        most = max(most, sum(p.nbytes for p in runner._module.parameters() if not p.is_meta))
        return read(name, form)

    runner._weight = watched  # type: ignore[method-assign] # to look at it while it works
    assert runner.losses("", [IDS]) > 0
    assert all(p.is_meta for p in runner._module.parameters())
    largest = max(sum(4 * math.prod(model.checkpoint.shape(name)) for name in names) for names in model.tensors.values())
    assert most <= largest

"""The proof: architectures of transformers, cut into 2, 3 and 5 at random, at three batch sizes, give the whole model's bits."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pytest
import torch
from architectures import ARCHITECTURES, make
from splitting import assert_same_bits, divide

from nodes.engines import load_engine
from partitioner.capturing import capture
from partitioner.cutting import write_stage
from partitioner.graph import ModelGraph
from partitioner.layout import lay_out
from partitioner.trees import flatten_output

#: whose graph has no counterpart in ONNX, and why
WITHOUT_ONNX = {
    "efficientnet": ("no graph for ONNX Runtime: operator aten.avg_pool2d.default (-> avg_pool2d): with a last window that is cut off",),
}


@pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # transformers' and torch's own
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_divided_equals_whole(name: str, tmp_path: Path) -> None:
    model, inputs = make(name)
    torch.manual_seed(1)
    captured = capture(model, inputs(2))
    assert captured.structure.notes == ()
    assert all(spec.shape[0] == "batch" for spec in captured.structure.inputs)
    expected = {}
    for batch in (1, 2, 5):
        example = inputs(batch)
        with torch.no_grad():
            expected[batch] = (example, dict(flatten_output(model(**example))))
    for stages in (2, 3, 5):
        divided = divide(captured, stages, seed=stages, folder=tmp_path / str(stages))
        for batch, (example, answer) in expected.items():
            assert_same_bits(divided.run(example, wire=batch != 5), answer)
    for example, answer in expected.values():
        whole = captured.run(example)
        assert_same_bits({key: value.numpy() for key, value in whole.items()}, answer)
    _onnx_runtime_agrees(name, captured, expected, tmp_path / "whole")


def _onnx_runtime_agrees(
    name: str, captured: ModelGraph, expected: Mapping[int, tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]], folder: Path
) -> None:
    """The tolerance that docs/engines.md states: 1e-4 of the largest value."""
    stage = lay_out(captured.structure, {v.name: 0 for v in captured.structure.vertices if v.op != "input"}).stages[0]
    shard = write_stage(captured, stage, folder, name="whole")
    assert shard.manifest.notes == WITHOUT_ONNX.get(name, ())
    if shard.manifest.notes:
        return
    engine = load_engine(shard, threads=1, engine="onnx")
    for example, answer in expected.values():
        actual = engine.run({spec.name: example[spec.name].numpy() for spec in stage.inputs})
        for output in captured.structure.outputs:
            wanted = answer[output.spec.name].numpy()
            np.testing.assert_allclose(actual[output.value], wanted, rtol=0, atol=1e-4 * float(np.abs(wanted).max()))


def test_there_are_enough() -> None:
    assert len(ARCHITECTURES) >= 24

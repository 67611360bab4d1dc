"""The proof: architectures of transformers, cut into 2, 3 and 5 at random, at three batch sizes, give the whole model's bits."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from architectures import ARCHITECTURES, make
from splitting import assert_same_bits, divide

from partitioner.capturing import capture
from partitioner.trees import flatten_output


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


def test_there_are_enough() -> None:
    assert len(ARCHITECTURES) >= 24

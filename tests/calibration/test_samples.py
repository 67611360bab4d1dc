"""The user's samples: what is read, and what is refused and how."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from partitioner.capturing import capture
from partitioner.samples import load_samples
from partitioner.structure import Structure
from splitnet.errors import BadInput


class Two(torch.nn.Module):
    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x.sum(1, keepdim=True) + y


@pytest.fixture(scope="module")
def structure() -> Structure:
    return capture(Two(), (torch.zeros(4, 3), torch.zeros(4, 1)), name="two").structure


def arrays(count: int = 10, **more: Any) -> dict[str, np.ndarray]:
    x = np.arange(count * 3, dtype=np.float32).reshape(count, 3)
    return {"x": x, "y": np.ones((count, 1), np.float32), "labels": np.arange(count), **more}


@pytest.mark.parametrize("suffix", [".npz", ".safetensors"])
def test_samples_come_in_the_model_s_batches(tmp_path: Path, structure: Structure, suffix: str) -> None:
    path = tmp_path / f"data{suffix}"
    if suffix == ".npz":
        np.savez(path, **arrays())
    else:
        save_file(arrays(), str(path))
    found = load_samples(path, structure)
    assert (found.count, found.labelled) == (10, True)
    assert [len(batch.inputs["x"]) for batch in found.batches] == [4, 4, 2]
    labels = [batch.labels for batch in found.batches if batch.labels is not None]
    assert np.concatenate(labels).tolist() == list(range(10))
    assert np.array_equal(np.concatenate([batch.inputs["x"] for batch in found.batches]), arrays()["x"])
    some = load_samples(path, structure, most=3, batch=2)
    assert [batch.labels.tolist() for batch in some.batches if batch.labels is not None] == [[0, 4], [9]]  # from all of it
    assert some.sha256 == found.sha256


def test_the_only_input_may_come_as_npy(tmp_path: Path) -> None:
    single = capture(torch.nn.Linear(3, 2), (torch.zeros(2, 3),), name="single").structure
    np.save(tmp_path / "x.npy", arrays()["x"])
    assert load_samples(tmp_path / "x.npy", single).count == 10


def test_a_fixed_batch_is_kept() -> None:
    """A model whose batch cannot be symbolic takes whole batches only."""
    pytest.importorskip("torch")

    class Fixed(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x.reshape(12) * 2

    with pytest.warns(UserWarning, match="batch|fixed|static"):
        fixed = capture(Fixed(), (torch.zeros(4, 3),), name="fixed").structure
    assert fixed.inputs[0].shape == (4, 3)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"z": np.zeros(10)}, "the model has no input 'z'; it has x, y"),
        ({"y": np.ones((9, 1), np.float32)}, "'y' has 9 samples and 'x' has 10"),
        ({"x": np.zeros((10, 4), np.float32)}, "dimension 1 must be 3, got 4"),
        ({"x": np.zeros((10, 3))}, "expected float32, got float64"),
        ({"labels": np.zeros(10)}, "'labels' must be whole numbers, got float64"),
        ({"labels": np.zeros(9, np.int64)}, "'labels' has 9 samples"),
        ({"x": np.float32(1.0)}, "has 10 samples and 'x' has 0"),
    ],
)
def test_what_does_not_fit_is_named(tmp_path: Path, structure: Structure, given: dict[str, np.ndarray], message: str) -> None:
    np.savez(tmp_path / "data.npz", **arrays(**given))
    with pytest.raises(BadInput, match=message) as caught:
        load_samples(tmp_path / "data.npz", structure)
    assert "data.npz" in caught.value.message


def test_files_that_are_none_are_refused(tmp_path: Path, structure: Structure) -> None:
    for name, content, message in (
        ("data.csv", b"1,2", r"is a .npz, .npy, .safetensors or .txt file"),
        ("data.npz", b"nonsense", "data.npz"),
        ("data.safetensors", b"nonsense", "data.safetensors"),
        ("data.txt", b"a line", "needs a model with a tokenizer"),
    ):
        (tmp_path / name).write_bytes(content)
        with pytest.raises(BadInput, match=message):
            load_samples(tmp_path / name, structure, "py:a:b")
    with pytest.raises(BadInput, match="cannot read the data"):
        load_samples(tmp_path / "nothing.npz", structure)
    np.savez(tmp_path / "half.npz", x=arrays()["x"])
    with pytest.raises(BadInput, match="there is no array 'y'; the file has x"):
        load_samples(tmp_path / "half.npz", structure)
    np.savez(tmp_path / "empty.npz", **arrays(0))
    with pytest.raises(BadInput, match="there is no sample in it"):
        load_samples(tmp_path / "empty.npz", structure)
    np.savez(tmp_path / "objects.npz", **arrays(labels=np.array([{}] * 10)))
    with pytest.raises(BadInput, match="objects.npz"):
        load_samples(tmp_path / "objects.npz", structure)
